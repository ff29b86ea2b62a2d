"""What `trl_bridge` exports, for type checkers. Written by `make stub`."""

from . import rewards as rewards
from .methods.actguide import ActGuideConfig as ActGuideConfig
from .methods.actguide import ActGuideTrainer as ActGuideTrainer
from .methods.ada_prefix import AdaPrefixConfig as AdaPrefixConfig
from .methods.ada_prefix import AdaPrefixTrainer as AdaPrefixTrainer
from .methods.alternating import AlternatingConfig as AlternatingConfig
from .methods.alternating import AlternatingTrainer as AlternatingTrainer
from .methods.aopd import AOPDConfig as AOPDConfig
from .methods.aopd import AOPDTrainer as AOPDTrainer
from .methods.bridge.config import BridgeConfig as BridgeConfig
from .methods.bridge.trainer import BridgeTrainer as BridgeTrainer
from .methods.chord import CHORDConfig as CHORDConfig
from .methods.chord import CHORDTrainer as CHORDTrainer
from .methods.hpt import HPTConfig as HPTConfig
from .methods.hpt import HPTTrainer as HPTTrainer
from .methods.lightning_opd import LightningOPDConfig as LightningOPDConfig
from .methods.lightning_opd import LightningOPDTrainer as LightningOPDTrainer
from .methods.luffy import LUFFYConfig as LUFFYConfig
from .methods.luffy import LUFFYTrainer as LUFFYTrainer
from .methods.naive_mix import NaiveMixConfig as NaiveMixConfig
from .methods.naive_mix import NaiveMixTrainer as NaiveMixTrainer
from .methods.opd import OPDConfig as OPDConfig
from .methods.opd import OPDTrainer as OPDTrainer
from .methods.packed_grpo import PackedGRPOConfig as PackedGRPOConfig
from .methods.packed_grpo import PackedGRPOTrainer as PackedGRPOTrainer
from .methods.prefix_rft import PrefixRFTConfig as PrefixRFTConfig
from .methods.prefix_rft import PrefixRFTTrainer as PrefixRFTTrainer
from .methods.relift import ReLIFTConfig as ReLIFTConfig
from .methods.relift import ReLIFTTrainer as ReLIFTTrainer
from .methods.self_teacher import SelfTeacherConfig as SelfTeacherConfig
from .methods.self_teacher import SelfTeacherTrainer as SelfTeacherTrainer
from .methods.srft import SRFTConfig as SRFTConfig
from .methods.srft import SRFTTrainer as SRFTTrainer
from .methods.two_stage import TwoStageConfig as TwoStageConfig
from .methods.two_stage import TwoStageTrainer as TwoStageTrainer
from .methods.uft import UFTConfig as UFTConfig
from .methods.uft import UFTTrainer as UFTTrainer
from .training.group import ExpertTrainer as ExpertTrainer
from .training.group_config import ExpertConfig as ExpertConfig
from .training.stream import DemonstrationTrainer as DemonstrationTrainer
from .training.stream_config import DemonstrationConfig as DemonstrationConfig

__version__: str

"""
trl-bridge: cooperative SFT + RL post-training for Hugging Face TRL.

[`BridgeTrainer`] is TRL's `GRPOTrainer` that also learns from demonstrations. Names are imported on first use, so that
`import trl_bridge` stays quick.
"""

import importlib
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any

from packaging.specifiers import SpecifierSet


__version__ = "0.1.0"

_SUPPORTED_TRL = SpecifierSet(">=1.16,<1.17")

_LAZY = {
    "AOPDConfig": "trl_bridge.distillation.config",
    "AOPDTrainer": "trl_bridge.distillation.aopd",
    "ActGuideConfig": "trl_bridge.baselines.actguide_config",
    "ActGuideTrainer": "trl_bridge.baselines.actguide",
    "AlternatingConfig": "trl_bridge.baselines.alternating",
    "AlternatingTrainer": "trl_bridge.baselines.alternating",
    "BridgeConfig": "trl_bridge.bridge.config",
    "BridgeTrainer": "trl_bridge.bridge.trainer",
    "CHORDConfig": "trl_bridge.baselines.chord",
    "CHORDTrainer": "trl_bridge.baselines.chord",
    "DemonstrationConfig": "trl_bridge.training.config",
    "DemonstrationTrainer": "trl_bridge.training.trainer",
    "ExpertConfig": "trl_bridge.baselines.expert_config",
    "ExpertTrainer": "trl_bridge.baselines.expert_trainer",
    "HPTConfig": "trl_bridge.baselines.hpt",
    "HPTTrainer": "trl_bridge.baselines.hpt",
    "LUFFYConfig": "trl_bridge.baselines.luffy",
    "LUFFYTrainer": "trl_bridge.baselines.luffy",
    "LightningOPDConfig": "trl_bridge.distillation.lightning_config",
    "LightningOPDTrainer": "trl_bridge.distillation.lightning",
    "NaiveMixConfig": "trl_bridge.baselines.naive_mix",
    "NaiveMixTrainer": "trl_bridge.baselines.naive_mix",
    "OPDConfig": "trl_bridge.distillation.config",
    "OPDTrainer": "trl_bridge.distillation.opd",
    "PrefixRFTConfig": "trl_bridge.baselines.prefix_rft",
    "PrefixRFTTrainer": "trl_bridge.baselines.prefix_rft",
    "ReLIFTConfig": "trl_bridge.baselines.relift",
    "ReLIFTTrainer": "trl_bridge.baselines.relift",
    "SRFTConfig": "trl_bridge.baselines.srft",
    "SRFTTrainer": "trl_bridge.baselines.srft",
    "TwoStageConfig": "trl_bridge.baselines.two_stage_config",
    "TwoStageTrainer": "trl_bridge.baselines.two_stage",
    "UFTConfig": "trl_bridge.baselines.uft",
    "UFTTrainer": "trl_bridge.baselines.uft",
    "rewards": "trl_bridge.rewards",
}

__all__ = [
    "AOPDConfig",
    "AOPDTrainer",
    "ActGuideConfig",
    "ActGuideTrainer",
    "AlternatingConfig",
    "AlternatingTrainer",
    "BridgeConfig",
    "BridgeTrainer",
    "CHORDConfig",
    "CHORDTrainer",
    "DemonstrationConfig",
    "DemonstrationTrainer",
    "ExpertConfig",
    "ExpertTrainer",
    "HPTConfig",
    "HPTTrainer",
    "LUFFYConfig",
    "LUFFYTrainer",
    "LightningOPDConfig",
    "LightningOPDTrainer",
    "NaiveMixConfig",
    "NaiveMixTrainer",
    "OPDConfig",
    "OPDTrainer",
    "PrefixRFTConfig",
    "PrefixRFTTrainer",
    "ReLIFTConfig",
    "ReLIFTTrainer",
    "SRFTConfig",
    "SRFTTrainer",
    "TwoStageConfig",
    "TwoStageTrainer",
    "UFTConfig",
    "UFTTrainer",
    "__version__",
    "rewards",
]

if TYPE_CHECKING:
    from . import rewards
    from .baselines.actguide import ActGuideTrainer
    from .baselines.actguide_config import ActGuideConfig
    from .baselines.alternating import AlternatingConfig, AlternatingTrainer
    from .baselines.chord import CHORDConfig, CHORDTrainer
    from .baselines.expert_config import ExpertConfig
    from .baselines.expert_trainer import ExpertTrainer
    from .baselines.hpt import HPTConfig, HPTTrainer
    from .baselines.luffy import LUFFYConfig, LUFFYTrainer
    from .baselines.naive_mix import NaiveMixConfig, NaiveMixTrainer
    from .baselines.prefix_rft import PrefixRFTConfig, PrefixRFTTrainer
    from .baselines.relift import ReLIFTConfig, ReLIFTTrainer
    from .baselines.srft import SRFTConfig, SRFTTrainer
    from .baselines.two_stage import TwoStageTrainer
    from .baselines.two_stage_config import TwoStageConfig
    from .baselines.uft import UFTConfig, UFTTrainer
    from .bridge.config import BridgeConfig
    from .bridge.trainer import BridgeTrainer
    from .distillation.aopd import AOPDTrainer
    from .distillation.config import AOPDConfig, OPDConfig
    from .distillation.lightning import LightningOPDTrainer
    from .distillation.lightning_config import LightningOPDConfig
    from .distillation.opd import OPDTrainer
    from .training.config import DemonstrationConfig
    from .training.trainer import DemonstrationTrainer


def _check_trl() -> None:
    # A renamed parent method turns an override into dead code without a word, so other minor releases are refused.
    try:
        found = version("trl")
    except PackageNotFoundError:
        found = "none"
    if found == "none" or not _SUPPORTED_TRL.contains(found, prereleases=True):
        raise ImportError(
            f"trl-bridge {__version__} works with trl{_SUPPORTED_TRL}, found {found}. "
            "Install a supported version: pip install 'trl>=1.16,<1.17'"
        )


_check_trl()


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module = importlib.import_module(_LAZY[name])
    value = module if _LAZY[name] == f"{__name__}.{name}" else getattr(module, name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)

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
    "AOPDConfig": "trl_bridge.methods.opd_config",
    "AOPDTrainer": "trl_bridge.methods.aopd",
    "ActGuideConfig": "trl_bridge.methods.actguide",
    "ActGuideTrainer": "trl_bridge.methods.actguide",
    "AlternatingConfig": "trl_bridge.methods.alternating",
    "AlternatingTrainer": "trl_bridge.methods.alternating",
    "BridgeConfig": "trl_bridge.methods.bridge.config",
    "BridgeTrainer": "trl_bridge.methods.bridge.trainer",
    "CHORDConfig": "trl_bridge.methods.chord",
    "CHORDTrainer": "trl_bridge.methods.chord",
    "DemonstrationConfig": "trl_bridge.training.stream_config",
    "DemonstrationTrainer": "trl_bridge.training.stream",
    "ExpertConfig": "trl_bridge.training.group_config",
    "ExpertTrainer": "trl_bridge.training.group",
    "HPTConfig": "trl_bridge.methods.hpt",
    "HPTTrainer": "trl_bridge.methods.hpt",
    "LUFFYConfig": "trl_bridge.methods.luffy",
    "LUFFYTrainer": "trl_bridge.methods.luffy",
    "LightningOPDConfig": "trl_bridge.methods.lightning_opd",
    "LightningOPDTrainer": "trl_bridge.methods.lightning_opd",
    "NaiveMixConfig": "trl_bridge.methods.naive_mix",
    "NaiveMixTrainer": "trl_bridge.methods.naive_mix",
    "OPDConfig": "trl_bridge.methods.opd_config",
    "OPDTrainer": "trl_bridge.methods.opd",
    "PrefixRFTConfig": "trl_bridge.methods.prefix_rft",
    "PrefixRFTTrainer": "trl_bridge.methods.prefix_rft",
    "ReLIFTConfig": "trl_bridge.methods.relift",
    "ReLIFTTrainer": "trl_bridge.methods.relift",
    "SRFTConfig": "trl_bridge.methods.srft",
    "SRFTTrainer": "trl_bridge.methods.srft",
    "TwoStageConfig": "trl_bridge.methods.two_stage",
    "TwoStageTrainer": "trl_bridge.methods.two_stage",
    "UFTConfig": "trl_bridge.methods.uft",
    "UFTTrainer": "trl_bridge.methods.uft",
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
    from .methods.actguide import ActGuideConfig, ActGuideTrainer
    from .methods.alternating import AlternatingConfig, AlternatingTrainer
    from .methods.aopd import AOPDTrainer
    from .methods.bridge.config import BridgeConfig
    from .methods.bridge.trainer import BridgeTrainer
    from .methods.chord import CHORDConfig, CHORDTrainer
    from .methods.hpt import HPTConfig, HPTTrainer
    from .methods.lightning_opd import LightningOPDConfig, LightningOPDTrainer
    from .methods.luffy import LUFFYConfig, LUFFYTrainer
    from .methods.naive_mix import NaiveMixConfig, NaiveMixTrainer
    from .methods.opd import OPDTrainer
    from .methods.opd_config import AOPDConfig, OPDConfig
    from .methods.prefix_rft import PrefixRFTConfig, PrefixRFTTrainer
    from .methods.relift import ReLIFTConfig, ReLIFTTrainer
    from .methods.srft import SRFTConfig, SRFTTrainer
    from .methods.two_stage import TwoStageConfig, TwoStageTrainer
    from .methods.uft import UFTConfig, UFTTrainer
    from .training.group import ExpertTrainer
    from .training.group_config import ExpertConfig
    from .training.stream import DemonstrationTrainer
    from .training.stream_config import DemonstrationConfig


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

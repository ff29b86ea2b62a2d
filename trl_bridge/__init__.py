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
    "BridgeConfig": "trl_bridge.bridge.config",
    "BridgeTrainer": "trl_bridge.bridge.trainer",
    "rewards": "trl_bridge.rewards",
}

__all__ = ["BridgeConfig", "BridgeTrainer", "__version__", "rewards"]

if TYPE_CHECKING:
    from . import rewards
    from .bridge.config import BridgeConfig
    from .bridge.trainer import BridgeTrainer


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

"""
trl-bridge: cooperative SFT + RL post-training for Hugging Face TRL.

[`BridgeTrainer`] is TRL's `GRPOTrainer` that also learns from demonstrations. Names are imported on first use, so that
`import trl_bridge` stays quick.
"""

from importlib.metadata import PackageNotFoundError, version

from packaging.specifiers import SpecifierSet

from ._lazy import exports
from .methods.catalogue import METHODS


__version__ = "0.2.0"

_SUPPORTED_TRL = SpecifierSet(">=1.16,<2")

_CLASSES = [path.rpartition(".") for method in METHODS.values() for path in (method.trainer, method.config)]
# Type checkers read `__init__.pyi`, which `make stub` writes from this.
_LAZY = {
    **{name: module for module, _, name in _CLASSES if module.startswith("trl_bridge.")},
    "DemonstrationConfig": "trl_bridge.training.stream_config",
    "DemonstrationTrainer": "trl_bridge.training.stream",
    "ExpertConfig": "trl_bridge.training.group_config",
    "ExpertTrainer": "trl_bridge.training.group",
    "rewards": "trl_bridge.rewards",
}


def _check_trl() -> None:
    try:
        found = version("trl")
    except PackageNotFoundError:
        found = "none"
    if found == "none" or not _SUPPORTED_TRL.contains(found, prereleases=True):
        raise ImportError(
            f"trl-bridge {__version__} works with trl{_SUPPORTED_TRL}, found {found}. "
            f"Install a supported version: pip install 'trl{_SUPPORTED_TRL}'"
        )


_check_trl()
__getattr__, __dir__, _names = exports(__name__, _LAZY)
__all__ = sorted([*_names, "__version__"])

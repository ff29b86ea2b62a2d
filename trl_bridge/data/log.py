"""Warnings about data, once per machine."""

__all__ = ["warn"]


def warn(message: str) -> None:
    """Log a warning on the main process of each machine."""
    # Late: accelerate imports torch, which listing the sources must not wait for.
    from accelerate import PartialState
    from accelerate.logging import get_logger

    PartialState()  # accelerate's logger needs it
    get_logger("trl_bridge.data").warning(message)

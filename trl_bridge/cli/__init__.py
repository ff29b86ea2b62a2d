"""The `trl-bridge` command."""

from .command import main


__all__ = ["main"]

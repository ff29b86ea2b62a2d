"""Parser of the tools' own options."""

import argparse
from typing import Any, NoReturn

from .errors import UsageError


__all__ = ["ToolParser"]


class ToolParser(argparse.ArgumentParser):
    """argparse without abbreviations, with errors that are exceptions, so that a user's error is one line."""

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **{"allow_abbrev": False, **kwargs})

    def error(self, message: str) -> NoReturn:
        raise UsageError(message)

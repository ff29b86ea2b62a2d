"""A user's error is one line on stderr and exit code 2, never a traceback."""

import argparse
import contextlib
import json
import os
import re
import sys
from collections.abc import Iterator
from types import TracebackType
from typing import Any, NoReturn


DEBUG_VARIABLE = "TRL_BRIDGE_DEBUG"
_USER_ERRORS = (ValueError, TypeError, NotImplementedError, OSError, ImportError)


class UsageError(ValueError):
    """The command line or a recipe cannot be used as it stands."""


@contextlib.contextmanager
def user_errors(program: str, only_ours: bool = False) -> Iterator[None]:
    """
    Turn exceptions that speak to the user into one line and exit code 2.

    Wrap what checks and builds from the user's input. `TRL_BRIDGE_DEBUG=1` in the environment lets the traceback through.
    """
    try:
        yield
    except BrokenPipeError:
        # The reader of a pipe has seen enough (`| head`). Python would write once more when it flushes at its end.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise SystemExit(1) from None
    except _USER_ERRORS as error:
        if os.environ.get(DEBUG_VARIABLE) or (only_ours and not _raised_here(error.__traceback__)):
            raise
        # With several ranks each one meets the same error; one line is enough.
        if os.environ.get("LOCAL_RANK", "0") == "0":
            message = " ".join(str(error).split()) or type(error).__name__
            sys.stderr.write(f"{program}: error: {message}\n")
        raise SystemExit(2) from None


def _raised_here(traceback: TracebackType | None) -> bool:
    module = ""
    while traceback is not None:
        module = traceback.tb_frame.f_globals.get("__name__", "")
        traceback = traceback.tb_next
    return module.split(".")[0] == "trl_bridge"


def expand_home(token: str) -> str:
    """A token of the command line with the home folder for `~/`, also where a shell leaves it (`--output_dir=~/run`)."""
    if token.startswith("~/"):
        return os.path.expanduser(token)
    return token if re.search(r"\s", token) else re.sub(r"(?<=[=,@])~/", lambda _: os.path.expanduser("~/"), token)


class RaisingParser(argparse.ArgumentParser):
    """A parser whose errors are exceptions, so that a user's error is one line."""

    def error(self, message: str) -> NoReturn:
        raise UsageError(message)


class ToolParser(RaisingParser):
    """argparse without abbreviations, with errors that are exceptions."""

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **{"allow_abbrev": False, **kwargs})


def json_mapping(option: str, text: str | None) -> dict[str, Any]:
    """The value of an option that takes a mapping as JSON; an empty one where it is not given."""
    try:
        values = json.loads(text or "{}")
    except ValueError:
        values = None
    if not isinstance(values, dict):
        raise UsageError(f"`{option} {text}` is no JSON mapping")
    return values

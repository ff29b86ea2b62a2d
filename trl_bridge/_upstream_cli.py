"""
Names of TRL and accelerate that the command line needs and that are not documented API.

The counterpart of `_upstream.py`, kept apart from it because that one imports torch, which `--help` must not wait for.
"""

import argparse
import importlib.resources
from functools import cache
from pathlib import Path
from typing import Any


def launch_parser() -> argparse.ArgumentParser:
    """Parser of `accelerate launch`."""
    from accelerate.commands.launch import launch_command_parser

    return launch_command_parser()


@cache
def launch_options() -> dict[str, argparse.Action]:
    """Options of `accelerate launch`, without the script and its arguments."""
    actions = [action for action in launch_parser()._actions if action.dest not in ("help", "training_script_args")]
    return {
        option.lstrip("-"): action for action in actions for option in action.option_strings if option.startswith("--")
    }


def launch_command(args: Any) -> None:
    """`accelerate launch` itself."""
    from accelerate.commands.launch import launch_command as launch

    launch(args)


def trl_accelerate_config(name: str) -> Path | None:
    """A config for `accelerate launch` that TRL ships, such as `zero2`."""
    path = Path(str(importlib.resources.files("trl.accelerate_configs").joinpath(f"{name}.yaml")))
    return path if path.is_file() else None


def print_trl_env() -> None:
    """What `trl env` prints."""
    from trl.scripts.env import print_env

    print_env()

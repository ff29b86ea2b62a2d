"""Reward functions by name."""

import difflib
import importlib
import os
import sys
from collections.abc import Callable
from typing import Any

from .arguments import RewardArguments


__all__ = ["load_reward_functions", "reward_function"]

_TRL_NAMES = ("accuracy_reward", "reasoning_accuracy_reward", "think_format_reward", "get_soft_overlong_punishment")


def load_reward_functions(arguments: RewardArguments) -> list[Any]:
    """Reward model and reward functions that the script arguments name."""
    rewards: list[Any] = [arguments.reward_model_name_or_path] if arguments.reward_model_name_or_path else []
    rewards += [reward_function(name) for name in arguments.reward_funcs or []]
    if not rewards:
        raise ValueError(
            "`reward_funcs` is not set: name at least one reward function (or `reward_model_name_or_path`)"
        )
    return rewards


def reward_function(name: str) -> Callable[..., Any]:
    """
    A reward function by name: from `trl_bridge.rewards`, from TRL's GRPO script, or by dotted path (the current
    directory is looked into as well).
    """
    from .. import rewards as ours

    own = [each for each in ours.__all__ if each.endswith("_reward")]
    if name in own:
        return getattr(ours, name)
    if name in _TRL_NAMES:
        return _from_trl(name)
    if "." not in name:
        known = sorted({*own, *_TRL_NAMES})
        nearest = difflib.get_close_matches(name, known, n=1)
        hint = f"did you mean `{nearest[0]}`?" if nearest else f"known are {', '.join(known)}"
        raise ValueError(f"`reward_funcs`: no reward function is called {name!r} ({hint}, or a dotted path)")
    module, _, attribute = name.rpartition(".")
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        return getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError) as error:
        raise ValueError(f"`reward_funcs`: {name} cannot be imported: {error}") from error


def _from_trl(name: str) -> Callable[..., Any]:
    from trl import rewards

    if name == "get_soft_overlong_punishment":
        # The values of TRL's script.
        return rewards.get_soft_overlong_punishment(max_completion_len=1280, soft_punish_cache=256)
    return getattr(rewards, name)

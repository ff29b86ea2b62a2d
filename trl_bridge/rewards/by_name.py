"""Reward functions by name, for training and evaluation."""

import difflib
import os
import sys
from collections.abc import Callable
from pkgutil import resolve_name
from typing import Any


_TRL_NAMES = ("accuracy_reward", "reasoning_accuracy_reward", "think_format_reward", "get_soft_overlong_punishment")


def reward_function(name: str, argument: str = "reward_funcs") -> Callable[..., Any]:
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
        raise ValueError(f"`{argument}`: no reward function is called {name!r} ({hint}, or a dotted path)")
    return function_at(name, argument)


def function_at(path: str, argument: str) -> Callable[..., Any]:
    """What a dotted path names; the current directory is looked into as well."""
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        # With a colon: a module's own import errors are not mistaken for a name that it does not have.
        found = resolve_name(":".join(path.rsplit(".", 1)))
    except (ImportError, AttributeError, ValueError) as error:
        raise ValueError(f"`{argument}`: {path} cannot be imported: {error}") from error
    check_callable(found, argument, path)
    return found


def check_reward_funcs(reward_funcs: Any) -> None:
    """Refuse a trainer's `reward_funcs` that are neither functions nor reward models."""
    for place, each in enumerate(reward_funcs if isinstance(reward_funcs, list) else [reward_funcs]):
        if each is not None and not isinstance(each, str):  # TRL loads a reward model by its name
            check_callable(each, "reward_funcs", f"number {place}")


def check_callable(found: Any, argument: str, name: str) -> None:
    """Refuse what no trainer can call, or would only make an instance of."""
    if isinstance(found, type) or not callable(found):
        what = "a class (name an instance of it)" if isinstance(found, type) else f"{found!r:.60}"
        raise TypeError(f"`{argument}`: {name} is {what} and no function")


def _from_trl(name: str) -> Callable[..., Any]:
    from trl import rewards

    if name == "get_soft_overlong_punishment":
        # The values of TRL's script.
        return rewards.get_soft_overlong_punishment(max_completion_len=1280, soft_punish_cache=256)
    return getattr(rewards, name)

"""Verifiable rewards for any TRL trainer: `reward_funcs=[math_reward]`, or `trl_bridge.rewards.math_reward` in YAML."""

from importlib import import_module
from typing import TYPE_CHECKING, Any


if TYPE_CHECKING:
    from .arithmetic_rewards import answer_reward, closeness_reward
    from .checks import BadGold, check_golds
    from .choice_rewards import choice_reward
    from .code_rewards import CodeReward, code_reward
    from .logic_rewards import knights_knaves_reward
    from .math_rewards import MathReward, boxed_format_reward, math_reward, same_answer
    from .noise import noisy
    from .reasoning_gym_rewards import reasoning_gym_reward
    from .route_rewards import RouteReward, route_reward


# Lazy (PEP 562): a worker process imports this package on every start and must pay for nothing that it does not use.
_EXPORTS = {
    "BadGold": "checks",
    "CodeReward": "code_rewards",
    "MathReward": "math_rewards",
    "RouteReward": "route_rewards",
    "answer_reward": "arithmetic_rewards",
    "boxed_format_reward": "math_rewards",
    "check_golds": "checks",
    "choice_reward": "choice_rewards",
    "closeness_reward": "arithmetic_rewards",
    "code_reward": "code_rewards",
    "knights_knaves_reward": "logic_rewards",
    "math_reward": "math_rewards",
    "noisy": "noise",
    "reasoning_gym_reward": "reasoning_gym_rewards",
    "route_reward": "route_rewards",
    "same_answer": "math_rewards",
}

__all__ = [
    "BadGold",
    "CodeReward",
    "MathReward",
    "RouteReward",
    "answer_reward",
    "boxed_format_reward",
    "check_golds",
    "choice_reward",
    "closeness_reward",
    "code_reward",
    "knights_knaves_reward",
    "math_reward",
    "noisy",
    "reasoning_gym_reward",
    "route_reward",
    "same_answer",
]


def __getattr__(name: str) -> Any:
    if name in _EXPORTS:
        return getattr(import_module(f"{__name__}.{_EXPORTS[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *_EXPORTS])

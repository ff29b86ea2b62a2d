"""Verifiable rewards for any TRL trainer: `reward_funcs=[math_reward]`, or `trl_bridge.rewards.math_reward` in YAML."""

from typing import TYPE_CHECKING

from .._lazy import exports


if TYPE_CHECKING:
    from .arithmetic_rewards import answer_reward as answer_reward
    from .arithmetic_rewards import closeness_reward as closeness_reward
    from .checks import BadGold as BadGold
    from .checks import check_golds as check_golds
    from .choice_rewards import choice_reward as choice_reward
    from .code_rewards import CodeReward as CodeReward
    from .code_rewards import code_reward as code_reward
    from .logic_rewards import knights_knaves_reward as knights_knaves_reward
    from .math_rewards import MathReward as MathReward
    from .math_rewards import boxed_format_reward as boxed_format_reward
    from .math_rewards import math_reward as math_reward
    from .math_rewards import same_answer as same_answer
    from .noise import noisy as noisy
    from .reasoning_gym_rewards import reasoning_gym_reward as reasoning_gym_reward
    from .route_rewards import RouteReward as RouteReward
    from .route_rewards import route_reward as route_reward


# A worker process imports this package on every start and must pay for nothing that it does not use.
_EXPORTS = {
    "BadGold": ".checks",
    "CodeReward": ".code_rewards",
    "MathReward": ".math_rewards",
    "RouteReward": ".route_rewards",
    "answer_reward": ".arithmetic_rewards",
    "boxed_format_reward": ".math_rewards",
    "check_golds": ".checks",
    "choice_reward": ".choice_rewards",
    "closeness_reward": ".arithmetic_rewards",
    "code_reward": ".code_rewards",
    "knights_knaves_reward": ".logic_rewards",
    "math_reward": ".math_rewards",
    "noisy": ".noise",
    "reasoning_gym_reward": ".reasoning_gym_rewards",
    "route_reward": ".route_rewards",
    "same_answer": ".math_rewards",
}

__getattr__, __dir__, __all__ = exports(__name__, _EXPORTS)

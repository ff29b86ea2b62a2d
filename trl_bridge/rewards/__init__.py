"""Reward functions that any TRL trainer takes, from Python or by name in a YAML file."""

from .arithmetic_rewards import answer_reward, closeness_reward
from .reasoning_gym_rewards import reasoning_gym_reward


__all__ = ["answer_reward", "closeness_reward", "reasoning_gym_reward"]

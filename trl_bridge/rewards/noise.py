"""Rewards that are wrong with a known probability, to study how a method bears noise."""

import functools
import hashlib
import inspect
import json
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

from .completions import Completion, message_text


Reward = Callable[..., Any]


class NoisyReward:
    """
    Reward function whose binary rewards are flipped with probability `p`; made by [`noisy`].

    Whether a reward is flipped follows from the seed, the prompt, the completion and the number of earlier calls with
    that pair, counted over all ranks: a second opinion on the same answer is independent of the first, and a run on one
    rank flips what a run on eight flips.
    """

    def __init__(self, reward: Reward, p: float, seed: int):
        self.reward = reward
        self.p = p
        self.seed = seed
        self.calls: Counter[str] = Counter()
        self.__name__ = f"noisy_{_name(reward)}"

    def __call__(self, prompts: Sequence[Any], completions: Sequence[Completion], **kwargs: Any) -> list[float | None]:
        rewards = self.reward(prompts=prompts, completions=completions, **kwargs)
        return self._flip(prompts, completions, rewards, kwargs.get("log_metric"))

    def state_dict(self) -> dict[str, int]:
        """Counts of calls, by a hash of prompt and completion."""
        return dict(self.calls)

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Continue from the counts of an earlier run."""
        self.calls = Counter(state)

    def _flip(
        self,
        prompts: Sequence[Any],
        completions: Sequence[Completion],
        rewards: Sequence[float | None],
        log_metric: Callable[[str, float], None] | None,
    ) -> list[float | None]:
        keys = [_key(prompt, completion) for prompt, completion in zip(prompts, completions, strict=True)]
        for row, value in enumerate(rewards):
            if value is not None and value not in (0, 1):
                raise ValueError(
                    f"`reward` gave {value} in row {row}: `noisy` flips binary rewards (0 or 1) only. Threshold it first."
                )
        flips = [self._draw(key) < self.p for key in keys]
        # All copies of a pair in one call share its count, on whichever rank they are.
        self.calls.update(set().union(*_all_ranks(set(keys))))
        if log_metric is not None:
            log_metric(f"{self.__name__}/flipped_fraction", sum(flips) / max(1, len(flips)))
        return [
            None if value is None else float(1 - value if flip else value)
            for value, flip in zip(rewards, flips, strict=True)
        ]

    def _draw(self, key: str) -> float:
        digest = hashlib.sha256(f"{self.seed}:{key}:{self.calls[key]}".encode()).digest()
        return int.from_bytes(digest[:8], "big") / 2**64


class AsyncNoisyReward(NoisyReward):
    """[`NoisyReward`] around an async reward function."""

    async def __call__(
        self, prompts: Sequence[Any], completions: Sequence[Completion], **kwargs: Any
    ) -> list[float | None]:
        rewards = await self.reward(prompts=prompts, completions=completions, **kwargs)
        return self._flip(prompts, completions, rewards, kwargs.get("log_metric"))


def _unwrapped(reward: Reward) -> Reward:
    while isinstance(reward, functools.partial):
        reward = reward.func
    return reward


def _name(reward: Reward) -> str:
    return getattr(_unwrapped(reward), "__name__", type(_unwrapped(reward)).__name__)


def _key(prompt: Any, completion: Completion) -> str:
    content = json.dumps([prompt, message_text(completion)], sort_keys=True, default=str)
    return hashlib.sha256(content.encode()).hexdigest()[:32]


def _all_ranks(keys: set[str]) -> list[set[str]]:
    import torch.distributed

    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return [keys]
    gathered: list[set[str]] = [set() for _ in range(torch.distributed.get_world_size())]
    torch.distributed.all_gather_object(gathered, keys)
    return gathered


def noisy(reward: Reward, p: float, seed: int = 0) -> NoisyReward:
    """
    Wrap a binary reward so that each of its rewards is flipped with probability `p`.

    Args:
        reward (`callable`):
            Reward function, sync or async, of values 0, 1 and `None` (which stays `None`).
        p (`float`):
            Probability of a flip, from 0 to 1.
        seed (`int`, *optional*, defaults to `0`):
            Seed of the flips.

    Returns:
        `NoisyReward`:
            Reward function of the same kind, called `noisy_<name>` in the logs. On several ranks every rank must call
            it as often as every other, as TRL's trainers do.

    Raises:
        `ValueError`:
            If `p` is no probability; when called, if a reward is not binary.

    Example:
    ```python
    >>> from trl_bridge.rewards import boxed_format_reward, noisy

    >>> reward = noisy(boxed_format_reward, p=1.0)
    >>> reward(prompts=["Say 1."], completions=[r"\\boxed{1}"])
    [0.0]
    ```
    """
    if not 0 <= p <= 1:
        raise ValueError(f"`p` is {p}: it must be a probability, from 0 to 1.")
    inner = _unwrapped(reward)
    is_async = inspect.iscoroutinefunction(inner) or inspect.iscoroutinefunction(type(inner).__call__)
    return (AsyncNoisyReward if is_async else NoisyReward)(reward, p, seed)

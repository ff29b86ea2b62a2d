"""What the reward functions say: of the rollouts, and of demonstrations that are put before them."""

import contextlib
import inspect
import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from accelerate.utils import gather_object
from datasets import Dataset
from torch import nn

from ..demonstrations.rows import split_demonstration
from .demonstrations import Demonstrations
from .weighting import DemonstrationWeighting


# What TRL itself passes to a reward function.
_PASSED_BY_TRL = frozenset(
    {"prompts", "completions", "completion_ids", "trainer_state", "log_extra", "log_metric", "environments"}
)
# Total rewards of examples that are no rollouts, with a filler for ranks that have fewer of them. Collective.
AskRewards = Callable[[list[dict[str, Any]], dict[str, Any]], list[float]]


class RolloutRewards:
    """Rewards of the newest generation batch, kept as they pass through TRL's trainer."""

    def __init__(self) -> None:
        self._total: torch.Tensor | None = None

    def keep(self, rewards_per_func: torch.Tensor, weights: torch.Tensor) -> None:
        """
        Keep the rewards of a generation batch: their weighted sum, as TRL forms it.

        Shapes: rewards_per_func (rows over all ranks, reward functions), weights (reward functions,).
        """
        total = (rewards_per_func * weights.to(rewards_per_func.device)).nansum(dim=1)
        self._total = total.masked_fill(torch.isnan(rewards_per_func).all(dim=1), torch.nan)

    @contextlib.contextmanager
    def set_aside(self) -> Iterator[None]:
        """While inside, rewards of other completions may be kept; afterwards those of the rollouts are back."""
        kept = self._total
        try:
            yield
        finally:
            self._total = kept

    def replace(self, moves: Mapping[int, int], rewards: torch.Tensor, size: int) -> None:
        """Take the rewards of other groups, of `size` rows each: from each group to the one in its place."""
        total = self.total_rewards().clone().view(-1, size)
        total[list(moves)] = rewards.view(-1, size)[list(moves.values())]
        self._total = total.flatten()

    def total_rewards(self) -> torch.Tensor:
        """
        Weighted sum over the reward functions; NaN where none could score.

        Shapes: returns (rows over all ranks,).
        """
        if self._total is None:
            raise RuntimeError("No rewards have been computed yet.")
        return self._total


def missing_columns(reward_funcs: list[Any], train_columns: list[str], sft_dataset: Dataset) -> list[str]:
    """Columns that the reward functions need and the demonstrations lack."""
    needed: set[str] = set()
    for func in reward_funcs:
        if isinstance(func, nn.Module):
            continue
        parameters = inspect.signature(func).parameters.values()
        named = [p for p in parameters if p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL)]
        required = {p.name for p in named if p.default is p.empty} - _PASSED_BY_TRL
        takes_only_kwargs = any(p.kind is p.VAR_KEYWORD for p in parameters) and not (
            {p.name for p in named} - _PASSED_BY_TRL
        )
        needed |= (set(train_columns) - {"prompt"}) if takes_only_kwargs else required
    return sorted(needed - set(sft_dataset.column_names))


def collect_verdicts(
    ask: AskRewards,
    weighting: DemonstrationWeighting,
    demonstrations: Demonstrations,
    indices: list[int],
    *,
    rank: int,
    success_threshold: float,
    once: bool = False,
) -> None:
    """Ask the reward functions about a window's demonstrations, `once` or as often as is due. Collective: every rank calls."""
    rows = demonstrations.rows(indices)
    asked = rows
    if not once:
        # A first visit has one more call, and ranks may visit a row first in the same window: the calls due are counted
        # over all ranks' rows, in rank order.
        everyone = gather_object([rows])
        before = sum(len(other) for other in everyone[:rank])
        due = weighting.visits_due([row for other in everyone for row in other])[before : before + len(rows)]
        asked = [row for row, calls in zip(rows, due, strict=True) for _ in range(calls)]
    filler = _as_rollout(demonstrations, demonstrations.rows([0])[0])
    rewards = ask([_as_rollout(demonstrations, row) for row in asked], filler)
    # A demonstration that no reward function could score has no verdict.
    scored = [(row, reward) for row, reward in zip(asked, rewards, strict=True) if not math.isnan(reward)]
    positives = [int(reward >= success_threshold) for _, reward in scored]
    weighting.record_verdicts([row for row, _ in scored], positives)
    weighting.fold_verdicts(gather_object([weighting.pending_verdicts()]))


def _as_rollout(demonstrations: Demonstrations, row: int) -> dict[str, Any]:
    """One demonstration in the form that the reward functions see rollouts in."""
    source = demonstrations.source[row]
    prompt, completion = split_demonstration(source)
    columns = {k: v for k, v in source.items() if k not in ("messages", "text", "prompt", "completion")}
    return {
        "inputs": {"prompt": prompt, **columns},
        "prompt": prompt,
        "completion": completion,
        "completion_ids": demonstrations.completion_ids(row),
    }

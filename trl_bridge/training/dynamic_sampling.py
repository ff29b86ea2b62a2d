"""Dynamic sampling: groups of rollouts without a signal give way to groups of fresh prompts."""

from collections.abc import Mapping
from typing import Any

import torch

from ..demonstrations.stream import DemonstrationStream
from .checkpoint.layout import has_rows, joined


Batch = dict[str, Any]

# Added to the run's seed, which is below it: demonstrations of as many rows would come in the same order.
_APART = 2**32


class FreshPrompts:
    """Rows of the RL dataset for groups that give way, in a seeded order of their own; and a count of all rollouts."""

    def __init__(self, size: int, seed: int):
        self._stream = DemonstrationStream(size, seed + _APART)
        self.rollouts = 0

    def draw(self, count: int) -> list[int]:
        """The next rows, the same on every rank."""
        return self._stream.draw(count)

    def state_dict(self) -> dict[str, Any]:
        """Plain integers for a checkpoint."""
        return {"stream": self._stream.state_dict(), "rollouts": self.rollouts}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue where a saved run stood."""
        self._stream.load_state_dict(state["stream"])
        self.rollouts = state["rollouts"]


def alike(rewards: torch.Tensor) -> torch.Tensor:
    """
    Groups whose known rewards are all equal, or that have none.

    Shapes: rewards (groups, G), NaN where unknown; returns (groups,).
    """
    highest, lowest = rewards.nan_to_num(nan=-torch.inf), rewards.nan_to_num(nan=torch.inf)
    return highest.amax(dim=1) <= lowest.amin(dim=1)


def moved_by_advantage(batch: Batch) -> torch.Tensor:
    """Rows with an advantage that is not exactly zero at a token that is not masked and no tool's, (B,)."""
    advantages = batch["advantages"]
    advantages = advantages.unsqueeze(1) if advantages.dim() == 1 else advantages
    written = batch["completion_mask"] * (batch.get("tool_mask", 1) | batch.get("expert_mask", 0))
    return ((advantages != 0) & written.bool()).any(dim=1)


def exchanged(mine: Batch, fresh: Batch, taken: Mapping[int, int], pad_token_id: int) -> Batch:
    """
    A rank's rows, some of which give way.

    Args:
        mine (`dict[str, Any]`):
            The rank's generation batch.
        fresh (`dict[str, torch.Tensor]`):
            What has rows in another generation batch, of all ranks.
        taken (`dict[int, int]`):
            From each row of `mine` that gives way to the row of `fresh` in its place.
        pad_token_id (`int`):
            What pads token ids to the longer of the two.
    """
    size = len(mine["completion_ids"])
    rows = [size + taken[row] if row in taken else row for row in range(size)]
    names = [name for name, value in {**fresh, **mine}.items() if has_rows(value)]
    return mine | {name: joined(name, _both(name, mine, fresh), pad_token_id)[rows] for name in names}


def _both(name: str, *batches: Batch) -> list[torch.Tensor]:
    """A tensor in two batches; a method may have none in one of them, or a value for each row where the other's are of tokens."""
    like = max((batch[name] for batch in batches if name in batch), key=torch.Tensor.dim)
    values = []
    for batch in batches:
        ids = batch["completion_ids"]
        value = batch[name] if name in batch else like.new_zeros(len(ids), *like.shape[1:])
        values.append(value if value.dim() == like.dim() else value[:, None].expand_as(ids))
    return values

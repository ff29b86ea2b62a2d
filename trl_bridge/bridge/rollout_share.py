"""`shadow_rollout_fraction`: which groups of rollouts the shadow is trained on."""

from typing import TYPE_CHECKING, Any

import torch


if TYPE_CHECKING:
    from .trainer import BridgeTrainer

# Column of a generation batch: groups over taken groups for a row that is taken, 0 for the others.
_WEIGHT = "shadow_weight"


class RolloutShare:
    """
    A part of each generation batch's groups, every group with the same probability.

    With k of n groups taken, the gradient of the taken rows times n / k has the gradient of all rows as its mean over
    the draws: each group is taken in k of the n draws that there are.

    Args:
        trainer ([`BridgeTrainer`]):
            Trainer whose rollouts they are.
    """

    def __init__(self, trainer: "BridgeTrainer"):
        self.trainer = trainer
        self.fraction = trainer.args.shadow_rollout_fraction

    @property
    def whole(self) -> bool:
        """Whether the shadow is trained on every rollout."""
        return self.fraction == 1.0

    def mark(self, rows: int) -> dict[str, torch.Tensor]:
        """
        Draw the groups of a generation batch, alike on every rank.

        Args:
            rows (`int`):
                Rows of the generation batch on this rank; groups are contiguous over the ranks' rows.

        Returns:
            `dict[str, torch.Tensor]`: a weight of shape (rows,), to travel with the rows. Empty where all are taken.
        """
        if self.whole:
            return {}
        trainer: Any = self.trainer
        size = trainer.num_generations
        groups = rows * trainer.backend.world_size // size
        # A function of seed and position alone: every rank draws the same, and a resumed run has nothing to bring back.
        number = trainer._step // (trainer.args.steps_per_generation * trainer.num_iterations)
        generator = torch.Generator().manual_seed(trainer.args.seed + 1_000_003 * number)
        start = int(torch.randint(groups, (1,), generator=generator))
        taken = taken_groups(groups, self.fraction, start)
        first = trainer.accelerator.process_index * rows
        weights = [groups / len(taken) if row // size in taken else 0.0 for row in range(first, first + rows)]
        return {_WEIGHT: torch.tensor(weights, device=trainer.accelerator.device)}

    def weight_of(self, inputs: dict[str, Any]) -> torch.Tensor:
        """Weight of a micro-batch's rows, (B,): one where all are taken."""
        if self.whole:
            return torch.ones(len(inputs["completion_ids"]), device=inputs["completion_ids"].device)
        return inputs[_WEIGHT]


def taken_groups(groups: int, fraction: float, start: int) -> set[int]:
    """
    Groups that one draw takes: evenly spaced, so that ranks have about the same number of rows to run.

    Args:
        groups (`int`):
            Number of groups n.
        fraction (`float`):
            Part that is taken, in (0, 1]; rounded to whole groups, at least one.
        start (`int`):
            The draw, from 0 to n - 1.

    Returns:
        `set[int]`: k group numbers; over the n draws each group is taken k times.
    """
    count = max(1, round(fraction * groups))
    return {(start + i * groups // count) % groups for i in range(count)}

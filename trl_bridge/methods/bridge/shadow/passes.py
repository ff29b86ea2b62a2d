"""The shadow's pass over a micro-batch: TRL's RL loss at (theta_hat, w), on all of the rollouts or a part."""

import dataclasses
from typing import Any

import torch

from ....training.backends import Backend
from ....training.pictures import picture_inputs, rows_of
from ....training.policy import PolicyLoss, Scores, Snapshot, detached
from .model import Shadow


# Column of a generation batch: groups over taken groups for a row that is taken, 0 for the others.
_WEIGHT = "shadow_weight"


class RolloutShare:
    """
    A part of each generation batch's groups, every group with the same probability.

    With k of n groups taken, the gradient of the taken rows times n / k has the gradient of all rows as its mean over
    the draws: each group is taken in k of the n draws that there are.
    """

    def __init__(self, fraction: float, seed: int, device: torch.device):
        self.fraction = fraction
        self._seed = seed
        self._device = device

    @property
    def is_all(self) -> bool:
        """Whether the shadow is trained on every rollout."""
        return self.fraction == 1.0

    def mark(self, places: list[tuple[int, int]], num_groups: int, generation: int) -> dict[str, torch.Tensor]:
        """
        Draw among the groups of a generation batch, alike on every rank, for this rank's rows.

        Shapes: returns (rows,).
        """
        if self.is_all:
            return {}
        # A function of seed and position only: every rank draws the same, and a resumed run has nothing to bring back.
        generator = torch.Generator().manual_seed(self._seed + 1_000_003 * generation)
        start = int(torch.randint(num_groups, (1,), generator=generator))
        taken = taken_groups(num_groups, self.fraction, start)
        weights = [num_groups / len(taken) if group in taken else 0.0 for group, _ in places]
        return {_WEIGHT: torch.tensor(weights, device=self._device)}

    def weight_of(self, inputs: dict[str, Any]) -> torch.Tensor:
        """Weight of a micro-batch's rows, (B,): one where all are taken."""
        if self.is_all:
            return torch.ones(len(inputs["completion_ids"]), device=inputs["completion_ids"].device)
        return inputs[_WEIGHT]


def taken_groups(groups: int, fraction: float, start: int) -> set[int]:
    """Groups that one draw takes: evenly spaced, so that ranks have about the same number of rows to run."""
    count = max(1, round(fraction * groups))
    return {(start + i * groups // count) % groups for i in range(count)}


@dataclasses.dataclass
class Scored:
    """A micro-batch that the policy has scored, and what its pass started from."""

    inputs: dict[str, Any]
    scores: Scores
    start: Snapshot

    @property
    def shared(self) -> dict[str, Any]:
        """
        Inputs of the shadow's loss: the rollouts were drawn with the student's probabilities, so those are what its
        ratio divides by.
        """
        return {"old_per_token_logps": self.scores[0], **self.inputs}


class ShadowPass:
    """Forward and backward of the shadow, beside the student's."""

    def __init__(self, policy: PolicyLoss, backend: Backend, share: RolloutShare, *, importance_sampling: bool):
        self._policy = policy
        self._backend = backend
        self._share = share
        self._importance_sampling = importance_sampling

    def run(self, shadow: Shadow, batch: Scored, weights: torch.Tensor) -> Scores:
        """
        The micro-batch's loss and its backward; the shadow's scores, and the student's where it has none.

        Shapes: weights (B,), of the rollouts that the shadow is trained on; 0 for the others.
        """
        inputs = batch.shared if self._importance_sampling else _without_old(batch.inputs)
        shadow.model.train()
        shadow.held.onload()
        with shadow.active(self._backend):
            loss: torch.Tensor | None
            if self._share.is_all:
                loss, scores = self._policy.loss(shadow.model, inputs)
            else:
                loss, scores = self._loss_of_part(shadow, inputs, batch.scores, weights)
            if loss is not None:
                self._backend.backward_alongside(loss)
        return scores

    def _loss_of_part(
        self, shadow: Shadow, inputs: dict[str, Any], student: Scores, weight: torch.Tensor
    ) -> tuple[torch.Tensor | None, Scores]:
        """
        The loss of the taken rows, times the number of groups over that of taken ones, and detached scores.

        The other rows enter TRL's loss with the student's scores, which carry no gradient: so every divisor of every
        `loss_type`, of the KL and of the entropy bonus is the full micro-batch's.
        """
        rows = weight.nonzero().squeeze(1)
        if not len(rows) and self._backend.world_size == 1:
            return None, student
        # The loss is collective, and so is a sharded shadow's pass: a rank without a taken row runs one that trains on
        # nothing.
        scored = rows if len(rows) else torch.zeros(1, dtype=torch.long, device=weight.device)
        names = ("prompt_ids", "prompt_mask", "completion_ids", "completion_mask")
        part = {name: inputs[name][scored] for name in names}
        if "pixel_values" in inputs:
            part |= rows_of(picture_inputs(inputs), scored.tolist())
        log_probs, entropies, _ = self._policy.score(shadow.model, part)
        scores = (_placed(student[0], rows, log_probs), _placed(student[1], rows, entropies), None)
        return weight.max() * self._policy.loss_of(scores, inputs), detached(scores)


def _placed(full: torch.Tensor | None, rows: torch.Tensor, part: torch.Tensor | None) -> torch.Tensor:
    if full is None or part is None:
        raise RuntimeError("The policy's pass left no entropies.")
    if not len(rows):
        return full + 0.0 * part.sum()  # no number changes, and the pass has a backward
    return full.index_copy(0, rows, part.to(full.dtype))


def _without_old(inputs: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in inputs.items() if name != "old_per_token_logps"}

"""The shadow's pass over a micro-batch: the parent's RL loss at (theta_hat, w), on all of the rollouts or a part."""

import dataclasses
from typing import TYPE_CHECKING, Any

import torch

from ...._upstream import isolated_bookkeeping
from ....training.policy import Scores
from ....training.randomness import forked_torch_rng


if TYPE_CHECKING:
    from ..trainer import BridgeTrainer


# Column of a generation batch: groups over taken groups for a row that is taken, 0 for the others.
_WEIGHT = "shadow_weight"


class RolloutShare:
    """
    A part of each generation batch's groups, every group with the same probability.

    With k of n groups taken, the gradient of the taken rows times n / k has the gradient of all rows as its mean over
    the draws: each group is taken in k of the n draws that there are.
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

        Shapes: returns (rows,).
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
    """Groups that one draw takes: evenly spaced, so that ranks have about the same number of rows to run."""
    count = max(1, round(fraction * groups))
    return {(start + i * groups // count) % groups for i in range(count)}


@dataclasses.dataclass
class Scored:
    """A micro-batch that the policy has scored, with all that the shadow's pass must find as the student's did."""

    inputs: dict[str, Any]
    scores: Scores
    rng: list[torch.Tensor]
    entropy_control: tuple[float, float]


class ShadowPass:
    """Forward and backward of the shadow, beside the student's and without a trace in the trainer's books."""

    def __init__(self, trainer: "BridgeTrainer"):
        self.trainer = trainer
        self.share = RolloutShare(trainer)
        self._rng: list[torch.Tensor] = []
        self._entropy_control = (trainer.entropy_coef, trainer._last_world_entropy)

    def before_policy(self) -> None:
        """Before a micro-batch's policy pass: keep what the shadow's pass must find as the student's did."""
        trainer = self.trainer
        device = trainer.accelerator.device
        self._rng = [torch.get_rng_state()]
        if device.type == "cuda":
            self._rng.append(torch.cuda.get_rng_state(device))
        self._entropy_control = (trainer.entropy_coef, trainer._last_world_entropy)

    def scored(self, inputs: dict[str, Any]) -> Scored:
        """After a micro-batch's policy pass: what `run` needs of it, now or later."""
        return Scored(inputs, self.trainer.rollouts.scores, self._rng, self._entropy_control)

    def run(self, batch: Scored) -> None:
        """The micro-batch's loss and its backward."""
        trainer: Any = self.trainer
        student = batch.scores
        # The rollouts were drawn with the student's probabilities, so those are what the shadow's ratio divides by.
        shared = {"old_per_token_logps": student[0], **batch.inputs}
        trained = shared if trainer.args.shadow_importance_sampling else _without_old(batch.inputs)
        trainer.shadow.model.train(trainer.model.training)
        trainer.shadow.held.bring()
        with (
            forked_torch_rng(trainer.accelerator.device),
            isolated_bookkeeping(trainer, batch.entropy_control),
            trainer.shadow.active(trainer.backend),
        ):
            self._restore_rng(batch.rng)
            if self.share.whole:
                loss = trainer._compute_loss(trainer.shadow.model, trained)
                scores = trainer.rollouts.scores
            else:
                loss, scores = self._loss_of_part(trained, student)
            if loss is not None:
                trainer.backend.backward_beside(loss)
        trainer._gain.observe(shared, student, scores)

    def _loss_of_part(self, inputs: dict[str, Any], student: Scores) -> tuple[torch.Tensor | None, Scores]:
        """
        The loss of the taken rows, times the number of groups over that of taken ones, and detached scores.

        The other rows enter the parent's loss with the student's scores, which carry no gradient: so every divisor of
        every `loss_type`, of the KL and of the entropy bonus is the whole micro-batch's.
        """
        trainer: Any = self.trainer
        weight = self.share.weight_of(inputs)
        rows = weight.nonzero().squeeze(1)
        if not len(rows) and trainer.backend.world_size == 1:
            return None, student
        # The loss is collective, and so is a spread shadow's pass: a rank without a taken row runs one that trains on nothing.
        scored = rows if len(rows) else torch.zeros(1, dtype=torch.long, device=weight.device)
        ids = [torch.cat([inputs[f"prompt_{k}"], inputs[f"completion_{k}"]], dim=1)[scored] for k in ("ids", "mask")]
        log_probs, entropies, _ = trainer._get_per_token_logps_and_entropies(
            trainer.shadow.model, *ids, inputs["completion_ids"].size(1), compute_entropy=True
        )
        scores = (_placed(student[0], rows, log_probs), _placed(student[1], rows, entropies), None)
        with trainer.rollouts.replay(scores):
            loss = weight.max() * trainer._compute_loss(trainer.shadow.model, inputs)
        return loss, (scores[0].detach(), scores[1].detach(), None)

    def _restore_rng(self, rng: list[torch.Tensor]) -> None:
        torch.set_rng_state(rng[0])
        if len(rng) > 1:
            torch.cuda.set_rng_state(rng[1], self.trainer.accelerator.device)


def _placed(whole: torch.Tensor | None, rows: torch.Tensor, part: torch.Tensor) -> torch.Tensor:
    if whole is None:
        raise RuntimeError("The policy's pass left no entropies.")
    if not len(rows):
        return whole + 0.0 * part.sum()  # no number changes, and the pass has a backward
    return whole.index_copy(0, rows, part.to(whole.dtype))


def _without_old(inputs: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in inputs.items() if name != "old_per_token_logps"}

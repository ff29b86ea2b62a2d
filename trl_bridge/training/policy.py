"""TRL's RL loss as a function of a model, a micro-batch of rollouts and, where they are given, its scores."""

import contextlib
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import nn
from trl import GRPOTrainer

from .._upstream import isolated_bookkeeping, policy_term_only, scored_by
from .pictures import picture_inputs
from .randomness import forked_torch_rng
from .teacher import SCORES


# Ids and mask of prompts and completions, (B, P + T), and T.
Completions = tuple[torch.Tensor, torch.Tensor, int]
# Log-probabilities (B, T), entropies (B, T) or None, auxiliary loss or None.
Scores = tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]


class Snapshot(NamedTuple):
    """What a pass of the loss starts from beside weights and rollouts."""

    rng: list[torch.Tensor]  # of torch's generators: the CPU's, and the device's
    entropy_control: tuple[float, float]  # coefficient, and last entropy over all ranks
    micro_batches: int | None  # that TRL's loss divides by


class PolicyLoss:
    """The loss of a [`~trl.GRPOTrainer`], with the scores that it was formed of, or of scores already computed."""

    def __init__(self, trainer: GRPOTrainer):
        self._trainer: Any = trainer

    def score(self, model: nn.Module, inputs: dict[str, Any]) -> Scores:
        """The forward that the loss would run, with its graph."""
        trainer = self._trainer
        seen = picture_inputs(inputs)
        return trainer._get_per_token_logps_and_entropies(
            model, *completions_of(inputs), compute_entropy=True, compute_aux_loss=trainer.aux_loss_enabled, **seen
        )

    def loss(self, model: nn.Module, inputs: dict[str, Any]) -> tuple[torch.Tensor, Scores]:
        """The loss at a model, with its graph, and the detached scores that it was formed of."""
        taken: list[Scores] = []
        score = self._trainer._get_per_token_logps_and_entropies

        def taking(*args: Any, **kwargs: Any) -> Scores:
            taken.append(score(*args, **kwargs))
            return taken[-1]

        with scored_by(self._trainer, taking):
            loss = self._trainer._compute_loss(model, inputs)
        (scores,) = taken
        return loss, detached(scores)

    def loss_of(self, scores: Scores, inputs: dict[str, Any]) -> torch.Tensor:
        """The same loss from scores already computed; their graph is kept."""
        with scored_by(self._trainer, lambda *args, **kwargs: scores):
            return self._trainer._compute_loss(self._trainer.model, inputs)

    def objective(self, inputs: dict[str, Any], scores: Scores) -> torch.Tensor:
        """Value of the RL term only, without KL, teacher, entropy and auxiliary terms: no gradient, no trace in TRL's books."""
        alone = {name: value for name, value in inputs.items() if name != SCORES}
        with torch.no_grad(), isolated_bookkeeping(self._trainer), policy_term_only(self._trainer):
            return self.loss_of(scores, alone)

    def snapshot(self) -> Snapshot:
        """What the pass that comes next starts from."""
        device = self._trainer.accelerator.device
        rng = [torch.get_rng_state()]
        if device.type == "cuda":
            rng.append(torch.cuda.get_rng_state(device))
        control = (self._trainer.entropy_coef, self._trainer._last_world_entropy)
        return Snapshot(rng, control, self._trainer.current_gradient_accumulation_steps)

    @contextlib.contextmanager
    def isolated(self, start: Snapshot) -> Iterator[None]:
        """A pass inside starts from a snapshot, and leaves no trace in TRL's books and random numbers."""
        device = self._trainer.accelerator.device
        with forked_torch_rng(device), isolated_bookkeeping(self._trainer, start.entropy_control, start.micro_batches):
            torch.set_rng_state(start.rng[0])
            if len(start.rng) > 1:
                torch.cuda.set_rng_state(start.rng[1], device)
            yield


def completions_of(inputs: dict[str, Any]) -> Completions:
    """What a forward over a micro-batch of rollouts takes."""
    ids = torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], dim=1)
    mask = torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], dim=1)
    return ids, mask, inputs["completion_ids"].size(1)


def detached(scores: Scores) -> Scores:
    """Scores without their graph."""
    log_probs, entropies, aux_loss = (None if part is None else part.detach() for part in scores)
    return log_probs, entropies, aux_loss  # type: ignore[return-value]

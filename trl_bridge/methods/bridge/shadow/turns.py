"""In which updates the shadow steps (`shadow_update_steps`, `shadow_overlap`), and what the bracket takes in the others."""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from accelerate.utils import send_to_device

from ...._upstream import asked_twice
from ..targets import Projection
from .passes import Scored


if TYPE_CHECKING:
    from ..trainer import BridgeTrainer


class ShadowSchedule:
    """
    The shadow's turn comes in updates n, 2n, ... of `shadow_update_steps=n`; with `shadow_overlap` in those whose
    generation it has run in.

    In the updates between, the coordinator's gradient takes the projection of the last G_hat. Where there is none yet,
    or the shadow has been reset since, it takes the projection of the student's own RL gradient, which leaves a bracket
    of zero: what the exact rule has at `theta_hat = theta`.
    """

    def __init__(self, trainer: "BridgeTrainer"):
        self.trainer = trainer
        self.every = trainer.args.shadow_update_steps
        self._last: Projection | None = None

    @property
    def due(self) -> bool:
        """Whether the shadow has its turn in the update under way: its gradient counts, and it steps."""
        trainer = self.trainer
        if trainer.shadow is None:
            return False
        if trainer.args.shadow_overlap:
            return trainer._shadow_overlap.done
        return (trainer.state.global_step + 1) % self.every == 0

    @property
    def needs_policy_part(self) -> bool:
        """Whether the update under way takes the student's RL gradient in the place of the shadow's."""
        return self.trainer.shadow is not None and not self.due and self._last is None

    def projection(self, weight: float) -> Projection | None:
        """At the end of a window: what the bracket subtracts. Collective."""
        if self.trainer.shadow_gradient is None:
            return None
        if self.due:
            whole = self.trainer.shadow_gradient.whole()
            # With `shadow_overlap` it has its turn in every update but the first of a call of `train`.
            self._last = whole if self.every > 1 else None
            return whole
        if self._last is not None:
            return self._last
        # The student's backward was of lambda times its loss; with lambda 0 the bracket counts for nothing.
        part = self.trainer._probe.policy_part()
        return [(a / weight, b / weight) for a, b in part] if weight else part

    def forget(self) -> None:
        """The last G_hat says nothing any more: the shadow has been set to other weights."""
        self._last = None

    def state_dict(self) -> list[tuple[torch.Tensor, torch.Tensor]] | None:
        """The last projection, on the CPU."""
        return None if self._last is None else [(a.cpu(), b.cpu()) for a, b in self._last]

    def load_state_dict(self, state: list[tuple[torch.Tensor, torch.Tensor]] | None) -> None:
        """Take over what `state_dict` returned."""
        device = self.trainer.accelerator.device
        self._last = None if state is None else [(a.to(device), b.to(device)) for a, b in state]


T = TypeVar("T")


class ShadowOverlap:
    """
    Puts the shadow's passes off until the server is asked for the next rollouts.

    Update k then takes the shadow's gradient on the rollouts of update k - 1, at (theta_hat, w) of update k: its part of
    w's gradient, and the shadow's own step, are one batch of rollouts old. The first update has a bracket of zero, and
    the last one's rollouts never reach the shadow.
    """

    def __init__(self, trainer: "BridgeTrainer"):
        self.trainer = trainer
        self.done = False
        # Micro-batches of the update under way, and of the one before, which the shadow has still to see.
        self._open: list[Scored] = []
        self._waiting: list[Scored] = []

    def put_off(self, batch: Scored) -> None:
        """Keep a micro-batch for the next generation."""
        self._open.append(batch)

    def during(self, generate: Callable[[], T]) -> T:
        """Generate, and run what was put off meanwhile. Collective."""
        trainer = self.trainer
        if not self._waiting or not trainer.model.training:
            return generate()
        with asked_twice(trainer):
            generate()
            with trainer.compute_loss_context_manager():
                for batch in self._waiting:
                    trainer._shadow_pass.run(batch)
            self._waiting, self.done = [], True
            return generate()

    def end_of_update(self) -> None:
        """The update's rollouts wait for the next generation."""
        self._waiting, self._open = self._open, []
        self.done = False

    def clear(self) -> None:
        """Forget what an earlier call of `train` has left."""
        self._open, self._waiting, self.done = [], [], False

    def state_dict(self) -> list[dict[str, Any]]:
        """The micro-batches that wait, as they are on this rank."""
        return [vars(batch) for batch in self._waiting]

    def load_state_dict(self, state: list[dict[str, Any]]) -> None:
        """Take over what `state_dict` returned."""
        device = self.trainer.accelerator.device
        self._waiting = [
            # The generators' states stay on the CPU.
            Scored(**{**batch, **send_to_device({name: batch[name] for name in ("inputs", "scores")}, device)})
            for batch in state
        ]

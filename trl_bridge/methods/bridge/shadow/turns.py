"""
In which updates the shadow steps (`shadow_update_steps`, `shadow_overlap`), and what the gain gradient subtracts in the
others.
"""

from collections.abc import Callable
from typing import Any

import torch
from accelerate.utils import send_to_device

from ....training.policy import Snapshot
from ..coordinator import CoordinatorGradient
from ..targets import Projection
from .passes import Scored


class ShadowOverlap:
    """
    Puts the shadow's passes off until the server is asked for the next rollouts.

    Update k then takes the shadow's gradient on the rollouts of update k - 1, at (theta_hat, w) of update k: its part of
    w's gradient, and the shadow's own step, are one batch of rollouts old. The first update has a gain gradient of zero,
    and the last one's rollouts never reach the shadow.
    """

    def __init__(self, device: torch.device):
        self._device = device
        self.done = False
        # Micro-batches of the update before, which the shadow has still to see.
        self._waiting: list[Scored] = []

    @property
    def waits(self) -> bool:
        """Whether the shadow has still to see micro-batches of the update before."""
        return bool(self._waiting)

    def run(self, run: Callable[[Scored], None]) -> None:
        """During the next generation: run what was put off. Collective."""
        for batch in self._waiting:
            run(batch)
        self._waiting, self.done = [], True

    def end_of_update(self, batches: list[Scored]) -> None:
        """The update's micro-batches wait for the next generation."""
        self._waiting, self.done = batches, False

    def clear(self) -> None:
        """Forget what an earlier call of `train` has left."""
        self._waiting, self.done = [], False

    def state_dict(self) -> list[dict[str, Any]]:
        """The micro-batches that wait, as they are on this rank."""
        return [{"inputs": batch.inputs, "scores": batch.scores, **batch.start._asdict()} for batch in self._waiting]

    def load_state_dict(self, state: list[dict[str, Any]]) -> None:
        """Take over what `state_dict` returned."""
        self._waiting = [
            Scored(
                **send_to_device({name: batch[name] for name in ("inputs", "scores")}, self._device),
                # The generators' states stay on the CPU.
                start=Snapshot(batch["rng"], batch["entropy_control"], batch.get("micro_batches")),
            )
            for batch in state
        ]


class ShadowTurns:
    """
    The shadow's turn comes in updates n, 2n, ... of `shadow_update_steps=n`; with `shadow_overlap` in those whose
    generation it has run in.

    In the updates between, the coordinator's gradient takes the last G_hat. Where there is none yet, or the shadow has
    been reset since, it takes the student's own RL gradient, which leaves a gain gradient of zero: what the exact rule
    has at `theta_hat = theta`.
    """

    def __init__(self, every: int, overlap: ShadowOverlap | None, device: torch.device):
        self.every = every
        self._overlap = overlap
        self._device = device
        self._last: Projection | None = None

    def due(self, update: int) -> bool:
        """Whether the shadow has its turn in an update, counted from 1: its gradient counts, and it steps."""
        return update % self.every == 0 if self._overlap is None else self._overlap.done

    def needs_policy_part(self, update: int) -> bool:
        """Whether an update takes the student's RL gradient in the place of the shadow's."""
        return not self.due(update) and self._last is None

    def gradient(
        self, update: int, shadow: CoordinatorGradient, policy_part: Callable[[], Projection], policy_weight: float
    ) -> Projection:
        """
        At the end of a window: G_hat's projection, or what stands for it; `policy_part` gives that of lambda times the
        student's RL gradient. Collective.
        """
        if self.due(update):
            full = shadow.full()
            # With `shadow_overlap` it has its turn in every update but the first of a call of `train`.
            self._last = full if self.every > 1 else None
            return full
        if self._last is not None:
            return self._last
        # With lambda 0 the gain gradient counts for nothing.
        part = policy_part()
        return [(a / policy_weight, b / policy_weight) for a, b in part] if policy_weight else part

    def forget(self) -> None:
        """The last G_hat says nothing any more: the shadow has been set to other weights."""
        self._last = None

    def state_dict(self) -> list[tuple[torch.Tensor, torch.Tensor]] | None:
        """The last projection, on the CPU."""
        return None if self._last is None else [(a.cpu(), b.cpu()) for a, b in self._last]

    def load_state_dict(self, state: list[tuple[torch.Tensor, torch.Tensor]] | None) -> None:
        """Take over what `state_dict` returned."""
        self._last = None if state is None else [(a.to(self._device), b.to(self._device)) for a, b in state]

"""In which updates the shadow steps (`shadow_update_steps`, `shadow_overlap`), and what the bracket takes in the others."""

from typing import TYPE_CHECKING

import torch

from .targets import Projection


if TYPE_CHECKING:
    from .trainer import BridgeTrainer


class ShadowSchedule:
    """
    The shadow's turn comes in updates n, 2n, ... of `shadow_update_steps=n`; with `shadow_overlap` in those whose
    generation it has run in.

    In the updates between, the coordinator's gradient takes the projection of the last G_hat. Where there is none yet,
    or the shadow has been reset since, it takes the projection of the student's own RL gradient, which leaves a bracket
    of zero: what the exact rule has at `theta_hat = theta`.

    Args:
        trainer ([`BridgeTrainer`]):
            Trainer whose shadow it is.
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
        """
        At the end of a window: what the bracket subtracts. Collective.

        Args:
            weight (`float`):
                lambda of the update.

        Returns:
            `list[tuple[torch.Tensor, torch.Tensor]]`, *optional*: projection of G_hat or of what stands in for it,
            without lambda; `None` where there is no shadow.
        """
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

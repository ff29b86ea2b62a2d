"""`shadow_overlap`: the shadow's pass over an update's rollouts while a vLLM server generates the next ones."""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar

from accelerate.utils import send_to_device

from .._upstream import asked_twice
from .shadow_pass import Scored


if TYPE_CHECKING:
    from .trainer import BridgeTrainer

T = TypeVar("T")


class ShadowOverlap:
    """
    Puts the shadow's passes off until the server is asked for the next rollouts.

    Update k then takes the shadow's gradient on the rollouts of update k - 1, at (theta_hat, w) of update k: its part of
    w's gradient, and the shadow's own step, are one batch of rollouts old. The first update has a bracket of zero, and
    the last one's rollouts never reach the shadow.

    Args:
        trainer ([`BridgeTrainer`]):
            Trainer whose shadow it is.

    Attributes:
        done (`bool`):
            Whether the shadow has run since the last update.
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
        """
        Generate, and run what was put off meanwhile. Collective.

        Args:
            generate (`Callable`):
                The parent's generation on the server. It is called twice (see [`_upstream.TwiceAsked`]).

        Returns:
            What `generate` returns.
        """
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

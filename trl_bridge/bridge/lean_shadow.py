"""The shadow theta_hat of lean mode: a second set of LoRA weights on the student's own frozen base."""

import contextlib
import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn

from .lean_weights import ADAPTER, AdapterWeights, ShadowAdapterWeights, lora_layers
from .shadow import Shadow


class LeanShadow(Shadow):
    """
    Theta_hat's slices and w's, their optimizer, and their steps. `model` is the student, which computes with them while
    `active`: the base is there once.

    Args:
        model ([`~peft.PeftModel`]):
            The student, unwrapped.
        student ([`AdapterWeights`]):
            Its LoRA weights, which the shadow's start from.
        optimizer_for (`Callable`):
            Makes the optimizer of the shadow's parameters, given by the names that the student's have.
        max_grad_norm (`float`):
            Norm that its gradient is clipped to; 0 clips nothing.
    """

    held: AdapterWeights
    model: Any

    def __init__(
        self,
        model: Any,
        student: AdapterWeights,
        optimizer_for: Callable[[dict[str, nn.Parameter]], torch.optim.Optimizer],
        max_grad_norm: float,
    ):
        own = {
            module: (nn.Parameter(a.detach().clone()), nn.Parameter(b.detach().clone()))
            for module, (a, b) in student.layers.items()
        }
        self._student = student
        weights = ShadowAdapterWeights(own, student.rank, student.backend)
        super().__init__(model, weights, optimizer_for, max_grad_norm)

    @contextlib.contextmanager
    def active(self) -> Iterator[None]:
        """Forward and backward inside (recomputed activations too) are the shadow's."""
        try:
            self._put(self.held)
            yield
        finally:
            self._put(self._student)

    def _put(self, weights: AdapterWeights) -> None:
        layers = lora_layers(self.model)
        for module, (a, b) in weights.layers.items():
            layers[module].lora_A[ADAPTER].weight, layers[module].lora_B[ADAPTER].weight = a, b

    @torch.no_grad()
    def distance(self, student: AdapterWeights, coordinator: Any) -> float:
        """Norm of theta_hat - theta over that of theta, both as changes of the base; 0 before either has moved."""
        squares = torch.zeros(2, dtype=torch.float64)
        rank = student.rank
        for module, (a, b) in student.layers.items():
            hat_a, hat_b = self.held.layers[module]
            theta = (b[:, :rank].double(), a[:rank].double())
            both = (
                torch.cat([hat_b[:, :rank].double(), -theta[0]], dim=1),
                torch.cat([hat_a[:rank].double(), theta[1]]),
            )
            squares += torch.stack([_product_square(*both), _product_square(*theta)]).cpu()
        difference, own = squares.clamp(min=0).sqrt().tolist()
        if not difference:
            return 0.0
        return difference / own if own else math.nan


def _product_square(b: torch.Tensor, a: torch.Tensor) -> torch.Tensor:
    """|B A|^2 from r x r products."""
    return ((b.T @ b) * (a @ a.T)).sum()

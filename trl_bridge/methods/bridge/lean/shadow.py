"""The shadow theta_hat of lean mode: a second set of LoRA weights on the student's own frozen base."""

import contextlib
import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn

from ....training.backends import Backend
from ..shadow.model import Shadow
from .weights import ADAPTER, AdapterWeights, ShadowAdapterWeights, lora_layers


class LeanShadow(Shadow):
    """
    Theta_hat's slices and w's, their optimizer, and their steps. `model` is the student, which computes with them while
    `active`: the base is there once.
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
        layers: Any = lora_layers(model)
        self._modules: dict[str, dict[str, nn.Module]] = {}
        own = {}
        for module, a, b in student.pairs():
            # The dtype that the student's passes compute with, which DeepSpeed's engine has cast its weights to.
            dtype = student.layers[module][0].dtype
            pair = (_Linear(a, dtype), _Linear(b, dtype))
            self._modules[module] = {"lora_A": pair[0], "lora_B": pair[1]}
            own[module] = (pair[0].weight, pair[1].weight)
        self._layers = layers
        weights = ShadowAdapterWeights(own, student.rank, student.backend)
        super().__init__(model, weights, optimizer_for, max_grad_norm)

    @contextlib.contextmanager
    def active(self, backend: Backend) -> Iterator[None]:
        """Forward and backward inside (recomputed activations too) are the shadow's."""
        students = self._exchange(self._modules)
        try:
            yield
        finally:
            self._exchange(students)

    def _exchange(self, modules: dict[str, dict[str, nn.Module]]) -> dict[str, dict[str, nn.Module]]:
        """Put modules into the layers, and return those that were there."""
        # Modules and not weights: what FSDP and DeepSpeed do around a forward hangs on the student's own.
        there: dict[str, dict[str, nn.Module]] = {}
        for name, pair in modules.items():
            layer: Any = self._layers[name]
            there[name] = {part: getattr(layer, part)[ADAPTER] for part in pair}
            for part, module in pair.items():
                getattr(layer, part)[ADAPTER] = module
        return there

    @torch.no_grad()
    def distance(self, student: AdapterWeights, coordinator: Any) -> float:
        """Norm of theta_hat - theta over that of theta, both as changes of the base; 0 before either has moved."""
        squares = torch.zeros(2, dtype=torch.float64)
        rank = student.rank
        for (_, a, b), (_, hat_a, hat_b) in zip(student.pairs(), self.held.pairs(), strict=True):
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


class _Linear(nn.Module):
    """A float32 weight without bias, in the place of a layer's A or B."""

    def __init__(self, weight: torch.Tensor, dtype: torch.dtype):
        super().__init__()
        self.weight = nn.Parameter(weight.detach().float().clone())
        self._dtype = dtype

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        return nn.functional.linear(inputs.to(self._dtype), self.weight.to(self._dtype))


def _product_square(b: torch.Tensor, a: torch.Tensor) -> torch.Tensor:
    """|B A|^2 from r x r products."""
    return ((b.T @ b) * (a @ a.T)).sum()

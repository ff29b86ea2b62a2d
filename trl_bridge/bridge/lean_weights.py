"""
One set of LoRA weights of lean mode (the student's or the shadow's): theta's slices of each layer, and w's beside them.

A layer's A has theta's rows first and then w's, its B theta's columns and then w's, under theta's scaling s_theta. w's
columns are held as B s_w / s_theta, so that the layer adds s_theta B_theta A_theta + s_w B_w A_w.
"""

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from torch import nn

from ..training.backends import Weights, gradient_of
from ..training.backends.weights import Reducer
from .targets import Projection


ADAPTER = "default"  # the name under which TRL puts its adapter into the model
_PREFIX = "base_model.model."


def lora_layers(model: PeftModel) -> dict[str, LoraLayer]:
    """The LoRA layers of a model, by the names of their layers in the plain model."""
    return {name.removeprefix(_PREFIX): m for name, m in model.named_modules() if isinstance(m, LoraLayer)}


def adapter_pairs(model: PeftModel, adapter: str) -> dict[str, tuple[nn.Parameter, nn.Parameter]]:
    """A and B of an adapter, by the names of their layers in the plain model."""
    layers: dict[str, Any] = lora_layers(model)
    return {m: (layer.lora_A[adapter].weight, layer.lora_B[adapter].weight) for m, layer in layers.items()}


class AdapterWeights(Weights):
    """
    LoRA weights of every layer, alike on each rank. They hold theta and w; gradients are those of theta.

    Args:
        parameters (`dict[str, tuple[nn.Parameter, nn.Parameter]]`):
            A of shape (r_theta + r_w, in_features) and B of shape (out_features, r_theta + r_w) by the layer's name in
            the plain model.
        rank (`int`):
            r_theta.
        backend ([`Reducer`]):
            Reduces over ranks.
    """

    def __init__(self, parameters: Mapping[str, tuple[nn.Parameter, nn.Parameter]], rank: int, backend: Reducer):
        self.backend = backend
        self.layers = dict(parameters)
        self.rank = rank
        # As the model names them: by these names the parent decides which of its parameters decay.
        self.parameters = {
            f"{_PREFIX}{module}.lora_{part}.{ADAPTER}.weight": parameter
            for module, pair in self.layers.items()
            for part, parameter in zip("AB", pair, strict=True)
        }
        self._in_rows = {name: ".lora_A." in name for name in self.parameters}

    def gradient(self, name: str) -> torch.Tensor:
        return self._theta(name, gradient_of(self.parameters[name]))

    def theta(self) -> dict[str, torch.Tensor]:
        """Theta's slices under PEFT's names, not to be written to."""
        return {
            name.replace(f".{ADAPTER}.", "."): self._theta(name, parameter.detach())
            for name, parameter in self.parameters.items()
        }

    def coordinator_gradients(self) -> Projection:
        """Accumulated gradients of w's slices as they are held: copies, (r_w, in_features) and (out_features, r_w)."""
        return [
            (gradient_of(a)[self.rank :].clone(), gradient_of(b)[:, self.rank :].clone())
            for a, b in self.layers.values()
        ]

    def forget_coordinator_gradients(self) -> None:
        """w's slices do not count in the clipping and the step of theta."""
        for a, b in self.layers.values():
            for parameter, where in ((a, slice(self.rank, None)), (b, (slice(None), slice(self.rank, None)))):
                if parameter.grad is not None:
                    parameter.grad[where] = 0

    @torch.no_grad()
    def write_coordinator(self, module: str, a: torch.Tensor, b: torch.Tensor) -> None:
        """Overwrite w's slices of a layer; B as it is held, times s_w / s_theta."""
        held_a, held_b = self.layers[module]
        held_a[self.rank :] = a
        held_b[:, self.rank :] = b

    def _theta(self, name: str, tensor: torch.Tensor) -> torch.Tensor:
        return tensor[: self.rank] if self._in_rows[name] else tensor[:, : self.rank]


class ShadowAdapterWeights(AdapterWeights):
    """The shadow's: no engine averages their gradients over ranks, and no parent steps on them."""

    def complete_(self, tensors: Iterable[torch.Tensor], synced: bool) -> None:
        self.backend.average_(tensors)

    def refresh(self, leaves: Mapping[str, nn.Parameter]) -> None:
        self.forget_coordinator_gradients()
        for parameter in leaves.values():
            # A rank may have had none of the rollouts that the shadow is trained on.
            parameter.grad = gradient_of(parameter)
        self.backend.average_(p.grad for p in leaves.values() if p.grad is not None)

"""
One set of LoRA weights of lean mode (the student's or the shadow's): theta's slices of each layer, and w's beside them.

A layer's A has theta's rows first and then w's, its B theta's columns and then w's, under theta's scaling s_theta. w's
columns are held as B s_w / s_theta, so that the layer adds s_theta B_theta A_theta + s_w B_w A_w.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from torch import nn

from ....training.backends import Part, Weights, gradient_of, overlap
from ....training.backends.reducer import Reducer
from ..targets import Projection


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
    LoRA weights of every layer, held as a model's own weights are. They hold theta and w; gradients are those of theta.
    """

    def __init__(self, parameters: Mapping[str, tuple[nn.Parameter, nn.Parameter]], rank: int, held: Weights):
        super().__init__(parameter_names(parameters), held.backend)
        self.layers = dict(parameters)
        self.rank = rank
        self._held = held
        self.sharded, self.needs_grad_hooks = held.sharded, held.needs_grad_hooks
        # w's part of each weight: the last rows of A, the last columns of B.
        self.parts: dict[str, Part] = {}
        for name in self.parameters:
            rows, columns = self.shape(name)
            in_rows = ".lora_A." in name
            self.parts[name] = (slice(rank if in_rows else 0, rows), slice(0 if in_rows else rank, columns))

    def pairs(self) -> Iterator[tuple[str, torch.Tensor, torch.Tensor]]:
        """Each layer's name, A and B, in full and not to be written to. Collective where weights are sharded."""
        names = iter(self.parameters)
        for module in self.layers:
            yield module, self.full(next(names)), self.full(next(names))

    def gradient(self, name: str) -> torch.Tensor:
        return self._theta(name, self._held.gradient(name), self.bounds(name)[0])

    def theta(self, name: str) -> torch.Tensor:
        """Theta's slice of a weight, not to be written to. Collective where weights are sharded."""
        return self._theta(name, self.full(name), 0)

    def coordinator_gradients(self) -> Projection:
        """What this rank has of w's slices of the gradient, as they are held: (r_w, in_features), (out_features, r_w)."""
        parts = [self._coordinator_gradient(name, part) for name, part in self.parts.items()]
        return list(zip(parts[::2], parts[1::2], strict=True))

    def forget_coordinator_gradients(self) -> None:
        """w's slices do not count in the clipping and the step of theta."""
        for name, part in self.parts.items():
            if self.parameters[name].grad is not None:
                mine, _ = overlap(self.bounds(name), part[0])
                self._held.gradient(name)[mine, part[1]] = 0

    def write_coordinator(self, module: str, a: torch.Tensor, b: torch.Tensor) -> None:
        """Overwrite w's slices of a layer; B as it is held, times s_w / s_theta."""
        for part, values in (("A", a), ("B", b)):
            name = weight_name(module, part)
            self.write_(name, self.parts[name], values)

    def _theta(self, name: str, tensor: torch.Tensor, first: int) -> torch.Tensor:
        return tensor[: max(0, self.rank - first)] if ".lora_A." in name else tensor[:, : self.rank]

    def _coordinator_gradient(self, name: str, part: Part) -> torch.Tensor:
        gradient = self._held.gradient(name)
        mine, of_part = overlap(self.bounds(name), part[0])
        full = gradient.new_zeros(part[0].stop - part[0].start, part[1].stop - part[1].start)
        full[of_part] = gradient[mine, part[1]]
        return full

    # As the model's weights are held

    def shape(self, name: str) -> torch.Size:
        return self._held.shape(name)

    def bounds(self, name: str) -> tuple[int, int]:
        return self._held.bounds(name)

    def rows(self, name: str, first: int, last: int) -> torch.Tensor:
        return self._held.rows(name, first, last)

    def full(self, name: str) -> torch.Tensor:
        return self._held.full(name)

    def register_grad_hook(self, name: str, hook: Callable[[torch.Tensor], torch.Tensor | None]) -> None:
        self._held.register_grad_hook(name, hook)

    @torch.no_grad()
    def write_(self, name: str, part: Part, values: torch.Tensor) -> None:
        self._held.write_(name, part, values)

    def reduce_unsynced_(self, tensors: Iterable[torch.Tensor]) -> None:
        self._held.reduce_unsynced_(tensors)

    def reduce_shards_(self, tensors: Iterable[torch.Tensor]) -> None:
        self._held.reduce_shards_(tensors)

    def reduce_(self, tensors: Iterable[torch.Tensor], synced: bool) -> None:
        self._held.reduce_(tensors, synced)


class ShadowAdapterWeights(AdapterWeights):
    """The shadow's, in full on each rank: no engine averages their gradients, and TRL's optimizer does not step on them."""

    def __init__(self, parameters: Mapping[str, tuple[nn.Parameter, nn.Parameter]], rank: int, backend: Reducer):
        super().__init__(parameters, rank, Weights(parameter_names(parameters), backend))

    def reduce_(self, tensors: Iterable[torch.Tensor], synced: bool) -> None:
        self.backend.average_(tensors)

    def refresh(self, leaves: Mapping[str, nn.Parameter]) -> None:
        self.forget_coordinator_gradients()
        for parameter in leaves.values():
            # A rank may have had none of the rollouts that the shadow is trained on.
            parameter.grad = gradient_of(parameter)
        self.backend.average_(p.grad for p in leaves.values() if p.grad is not None)


def weight_name(module: str, part: str) -> str:
    """A layer's A or B as the model names it: by these names transformers decides which of its parameters decay."""
    return f"{_PREFIX}{module}.lora_{part}.{ADAPTER}.weight"


def parameter_names(layers: Mapping[str, tuple[nn.Parameter, nn.Parameter]]) -> dict[str, nn.Parameter]:
    """A and B of each layer in turn, as the model names them."""
    return {weight_name(m, part): p for m, pair in layers.items() for part, p in zip("AB", pair, strict=True)}

"""The coordinator `w` of lean mode: slices of the student's LoRA adapter, with weights and an optimizer of its own."""

import functools
from collections.abc import Sequence

import torch
from peft import LoraConfig, PeftModel
from torch import nn

from ....training.backends import Part, Weights
from ..coordinator import Coordinator, CoordinatorGradient
from ..targets import Projection, Target
from .weights import ADAPTER, AdapterWeights, adapter_pairs


class SliceGradient(CoordinatorGradient):
    """
    In lean mode A and B's part of a gradient is a slice, where the merged form projects.

    Where the engine takes gradients away (DeepSpeed), the slice is taken out of each as it comes, and summed here.
    """

    weights: AdapterWeights

    def __init__(self, weights: AdapterWeights, ratio: float):
        super().__init__(weights)
        self._ratio = ratio
        self._sums: dict[str, torch.Tensor] = {}
        if weights.needs_grad_hooks:
            for name, part in weights.parts.items():
                shape = [side.stop - side.start for side in part]
                self._sums[name] = torch.zeros(shape, device=weights.backend.device)
                weights.register_grad_hook(name, functools.partial(_take, self._sums[name], part))

    def so_far(self) -> Projection:
        if self._sums:
            parts = [total.clone() for total in self._sums.values()]
            slices = list(zip(parts[::2], parts[1::2], strict=True))
        else:
            slices = self.weights.coordinator_gradients()
        return [(a, self._ratio * b) for a, b in slices]

    def clear(self) -> None:
        """Take it out of the gradient, which theta is clipped by and steps on."""
        for total in self._sums.values():
            total.zero_()
        if not self._sums:
            self.weights.forget_coordinator_gradients()


def _take(total: torch.Tensor, part: Part, gradient: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        total += gradient[part]
        gradient = gradient.clone()
        gradient[part] = 0
    return gradient


class LeanCoordinator(Coordinator):
    """
    A and B of every layer in full, which `settle` writes over w's slices whatever an optimizer has done to those.
    """

    def __init__(
        self,
        initial: dict[str, tuple[torch.Tensor, torch.Tensor]],
        peft_config: LoraConfig,
        scalings: tuple[float, float],
    ):
        self._ratio = scalings[1] / scalings[0]
        targets = [
            Target(module=module, a=nn.Parameter(a), b=nn.Parameter(b), scaling=scalings[1], transposed=False)
            for module, (a, b) in initial.items()
        ]
        super().__init__(targets, peft_config)

    def gradient_of(self, weights: AdapterWeights) -> SliceGradient:
        return SliceGradient(weights, self._ratio)

    def push(self, old: Projection, models: Sequence[Weights]) -> None:
        """Nothing yet: theta's optimizer still steps on tensors that hold w."""

    def settle(self, models: Sequence[AdapterWeights]) -> None:
        """Write w over its slices."""
        for weights in models:
            for target in self.targets:
                weights.write_coordinator(target.module, target.a.detach(), self._ratio * target.b.detach())

    def subtract_from(self, weights: AdapterWeights, keep: bool) -> dict[str, torch.Tensor]:
        """Theta's slices, under PEFT's names: an adapter of rank r_theta on the frozen base."""
        state = {}
        for name in weights.parameters:
            part = weights.theta(name)
            if keep:
                state[name.replace(f".{ADAPTER}.", ".")] = part.float().cpu().clone()
        return state


def initial_values(
    model: PeftModel, configs: Sequence[LoraConfig], seed: int
) -> list[dict[str, tuple[torch.Tensor, torch.Tensor]]]:
    """PEFT's own initial values of adapters that are put into a model one after the other, and taken out again."""
    values = []
    trained = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    devices = sorted({p.device for p in model.parameters() if p.device.type == "cuda"}, key=str)
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(seed)
        for number, config in enumerate(configs):
            name = f"initial_{number}"
            model.add_adapter(name, config)
            pairs = adapter_pairs(model, name)
            values.append({m: (a.detach().float().clone(), b.detach().float().clone()) for m, (a, b) in pairs.items()})
            model.delete_adapter(name)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(trained[name])
    return values

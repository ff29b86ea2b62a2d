"""A model alongside the student with float32 master weights apart from the ones that its passes compute with."""

import dataclasses
import functools

import torch
from torch import nn

from .reducer import Reducer
from .weights import Weights


@dataclasses.dataclass(frozen=True)
class Storage:
    """How a model alongside the student is stored."""

    dtype: torch.dtype | None = None
    offload: bool = False


class MasterWeights(Weights):
    """
    Full, on one process: float32 masters, and working weights that are filled from them for a window's passes.

    Gradients leave the model weight by weight, as the backward is done with each, and add up at the masters in
    float32.
    """

    def __init__(self, model: nn.Module, backend: Reducer, storage: Storage):
        super().__init__(model, backend)
        self._working = self.parameters
        self._offload = storage.offload
        self._present = False
        self.parameters = {name: nn.Parameter(self._master(p.detach())) for name, p in self._working.items()}
        for name, parameter in self._working.items():
            if storage.dtype is not None:
                parameter.data = parameter.data.to(storage.dtype)
            parameter.register_post_accumulate_grad_hook(functools.partial(self._take, name))
        self.offload()

    def _master(self, weight: torch.Tensor) -> torch.Tensor:
        place = torch.device("cpu") if self._offload else weight.device
        pinned = self._offload and weight.device.type == "cuda"
        return torch.empty(weight.shape, dtype=torch.float32, device=place, pin_memory=pinned).copy_(weight)

    def _take(self, name: str, parameter: nn.Parameter) -> None:
        master, gradient = self.parameters[name], parameter.grad
        parameter.grad = None
        if gradient is None:
            return
        gradient = gradient.to(master)
        master.grad = gradient if master.grad is None else master.grad.add_(gradient)

    @torch.no_grad()
    def onload(self) -> None:
        if self._present:
            return
        for name, parameter in self._working.items():
            storage = parameter.untyped_storage()
            storage.resize_(parameter.numel() * parameter.element_size())
            parameter.data.copy_(self.parameters[name])
        self._present = True

    def offload(self) -> None:
        self._present = False
        if self._offload:
            for parameter in self._working.values():
                parameter.untyped_storage().resize_(0)

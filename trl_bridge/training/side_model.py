"""A model alongside the student: a copy with an optimizer of its own, and its steps."""

from collections.abc import Callable

import torch
from torch import nn
from transformers import PreTrainedModel

from .backends import Weights


class SideModel:
    """A copy of the student that learns by itself."""

    def __init__(
        self,
        model: PreTrainedModel,
        weights: Weights,
        optimizer_for: Callable[[dict[str, nn.Parameter]], torch.optim.Optimizer],
        max_grad_norm: float,
    ):
        self.model = model
        self.held = weights
        # An ordinary optimizer steps on this rank's rows: its step goes element by element.
        self._leaves = weights.leaves()
        self.optimizer = optimizer_for(self._leaves)
        self.max_grad_norm = max_grad_norm

    @property
    def weights(self) -> dict[str, torch.Tensor]:
        """The rows that this rank holds, by the plain model's names."""
        return self.held.shards()

    def gradients(self) -> dict[str, torch.Tensor]:
        """Accumulated gradient of these rows by name; zero where the loss does not reach them."""
        return {name: self.held.gradient(name) for name in self._leaves}

    def step(self, rate_factor: float, counts_zeros: bool = False) -> None:
        """Clip, step, and clear the gradient."""
        self.held.offload()
        self.held.refresh(self._leaves)
        if counts_zeros:
            for name, leaf in self._leaves.items():
                if leaf.grad is None:
                    leaf.grad = self.held.gradient(name)
        if self.max_grad_norm > 0:
            leaves = list(self._leaves.values())
            square = nn.utils.get_total_norm([p.grad for p in leaves if p.grad is not None]).square()
            self.held.reduce_shards_([square])
            nn.utils.clip_grads_with_norm_(leaves, self.max_grad_norm, square.sqrt())
        for group in self.optimizer.param_groups:
            group["lr"] = group["initial_lr"] * rate_factor
        self.optimizer.step()
        self.clear_gradients()

    def clear_gradients(self) -> None:
        """Forget the accumulated gradient."""
        self.held.offload()
        self.optimizer.zero_grad(set_to_none=True)
        self.held.clear_gradients()

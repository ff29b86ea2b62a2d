"""The shadow theta_hat: a plain copy of the student that follows RL only."""

import contextlib
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from ....training.backends import Backend, Weights, copy_rows_
from ....training.checkpoint.sharded_state import ShardedState


class Shadow:
    """The RL-only copy, its optimizer, and its steps. It holds M_hat = theta_hat + s B A."""

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
        # M_hat itself (not theta_hat: a difference would not come back bit for bit) and the optimizer's state.
        self.saved = ShardedState(weights, self._leaves, self.optimizer)
        self.max_grad_norm = max_grad_norm

    def active(self, backend: Backend) -> contextlib.AbstractContextManager[None]:
        """Around the shadow's forward and backward: it is a model of its own, beside the backend's."""
        return backend.alongside()

    @property
    def weights(self) -> dict[str, torch.Tensor]:
        """The rows of M_hat that this rank holds, by the plain model's names."""
        return self.held.shards()

    def gradients(self) -> dict[str, torch.Tensor]:
        """Accumulated gradient G_hat of these rows by name; zero where the loss does not reach them."""
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
        """Forget G_hat."""
        self.held.offload()
        self.optimizer.zero_grad(set_to_none=True)
        self.held.clear_gradients()

    def reset(self, student: Weights) -> None:
        """Set M_hat to M and forget the optimizer's state (`shadow_reset_steps`). Collective."""
        copy_rows_(self.weights, self.held, student)
        self.optimizer.state.clear()

    @torch.no_grad()
    def distance(self, student: Weights, coordinator: Any) -> float:
        """Norm of theta_hat - theta over that of theta. Collective."""
        difference: list[torch.Tensor] = []
        base: list[torch.Tensor] = []
        for name, rows in self.weights.items():
            first, last = self.held.bounds(name)
            policy = student.rows(name, first, last)
            # Of one weight in float32, exact to six digits in half the time; what is summed over the weights in float64.
            difference.append(torch.linalg.vector_norm(rows.to(policy.device) - policy).double().square())
            # |M - sBA|^2 = |M|^2 - 2 <M, sBA> + |sBA|^2
            base.append(torch.linalg.vector_norm(policy).double().square())
            base.append(-2 * coordinator.overlap(name, policy, first))
        squares = torch.stack([torch.stack(difference).sum(), torch.stack(base).sum()])
        self.held.reduce_shards_([squares])
        return (squares[0] / (squares[1] + coordinator.norm() ** 2).clamp(min=0)).sqrt().item()

"""The shadow theta_hat: a plain copy of the student that follows RL only."""

import contextlib
import functools
from typing import Any

import torch

from ....training.backends import Backend, Weights, copy_rows_
from ....training.checkpoint.sharded_state import ShardedState
from ....training.side_model import SideModel


class Shadow(SideModel):
    """The RL-only copy. It holds M_hat = theta_hat + s B A."""

    @functools.cached_property
    def saved(self) -> ShardedState:
        """M_hat itself (not theta_hat: a difference would not come back bit for bit) and the optimizer's state."""
        return ShardedState(self.held, self._leaves, self.optimizer)

    def active(self, backend: Backend) -> contextlib.AbstractContextManager[None]:
        """Around the shadow's forward and backward: it is a model of its own, beside the backend's."""
        return backend.alongside()

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

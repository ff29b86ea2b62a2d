"""The shadow theta_hat: a plain copy of the student that follows RL alone."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel


class Shadow:
    """
    The RL-only copy, its optimizer, and its steps. It holds M_hat = theta_hat + s B A.

    Args:
        model ([`~transformers.PreTrainedModel`]):
            Copy of the student with a fused head of its own (see `_upstream.plain_copy`).
        optimizer (`torch.optim.Optimizer`):
            Optimizer over the copy's parameters; each group carries `initial_lr`.
        max_grad_norm (`float`):
            Norm that its gradient is clipped to; 0 clips nothing.
    """

    def __init__(self, model: PreTrainedModel, optimizer: torch.optim.Optimizer, max_grad_norm: float):
        self.model = model
        self.optimizer = optimizer
        self.max_grad_norm = max_grad_norm

    @property
    def weights(self) -> dict[str, nn.Parameter]:
        """Parameters by the plain model's names."""
        return dict(self.model.named_parameters())

    def gradients(self) -> dict[str, torch.Tensor]:
        """Accumulated gradient G_hat by name; zero where the loss does not reach a parameter."""
        return {name: gradient_of(parameter) for name, parameter in self.model.named_parameters()}

    def step(self, rate_factor: float) -> None:
        """
        Clip, step, and clear the gradient.

        Args:
            rate_factor (`float`):
                Where the student's learning rate stands in its schedule, relative to its initial rate.
        """
        if self.max_grad_norm > 0:
            nn.utils.clip_grad_norm_(self.model.parameters(), self.max_grad_norm)
        for group in self.optimizer.param_groups:
            group["lr"] = group["initial_lr"] * rate_factor
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

    @torch.no_grad()
    def reset(self, student: Mapping[str, torch.Tensor]) -> None:
        """Set M_hat to M and forget the optimizer's state (`shadow_reset_steps`)."""
        for name, parameter in self.model.named_parameters():
            parameter.copy_(student[name])
        self.optimizer.state.clear()

    @torch.no_grad()
    def distance(self, student: Mapping[str, torch.Tensor]) -> float:
        """Norm of M_hat - M, which is that of theta_hat - theta."""
        # `dtype` sums in float64 without a float64 copy of the largest weight.
        norms = [
            torch.linalg.vector_norm(p - student[name], dtype=torch.float64)
            for name, p in self.model.named_parameters()
        ]
        return torch.stack(norms).norm().item()

    def state_dict(self) -> dict[str, Any]:
        """M_hat itself (not theta_hat: a difference would not come back bit for bit) and the optimizer's state."""
        weights = {name: parameter.detach().cpu() for name, parameter in self.model.named_parameters()}
        return {"weights": weights, "optimizer": self.optimizer.state_dict()}

    @torch.no_grad()
    def load_weights(self, weights: Mapping[str, torch.Tensor]) -> None:
        """Take over saved weights M_hat."""
        for name, parameter in self.model.named_parameters():
            parameter.copy_(weights[name])

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over what `state_dict` returned."""
        self.load_weights(state["weights"])
        self.optimizer.load_state_dict(state["optimizer"])


def gradient_of(parameter: nn.Parameter) -> torch.Tensor:
    """The gradient of a parameter; zero where no loss has reached it."""
    return torch.zeros_like(parameter) if parameter.grad is None else parameter.grad

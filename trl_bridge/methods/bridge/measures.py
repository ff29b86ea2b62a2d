"""Norms and cosines of the parts of a gradient, read off by differences where they add up anyway."""

import contextlib
import math
from collections.abc import Iterator
from typing import Any

import torch
from accelerate import Accelerator

from ...training.policy import PolicyLoss, Scores
from .coordinator import CoordinatorGradient
from .targets import Projection


class GainMeter:
    """
    Accumulates `bridge/gain`, `bridge/shadow_ratio` and `bridge/shadow_clip_fraction` over a window.

    The gain is L_RL(theta_hat, w) - L_RL(theta, w) at the iterate, on the shared rollouts, always with the ratio
    (without it the two values are equal by construction), without KL and entropy terms. With `shadow_rollout_fraction`
    below 1 it is estimated from the rollouts that the shadow scores, scaled as its gradient is.
    """

    def __init__(
        self,
        policy: PolicyLoss,
        accelerator: Accelerator,
        *,
        ratio_level: str,
        epsilon_low: float,
        epsilon_high: float,
    ):
        self._policy = policy
        self._accelerator = accelerator
        self._ratio_level = ratio_level
        self._range = (1 - epsilon_low, 1 + epsilon_high)
        self._sums: torch.Tensor | None = None

    def observe(self, inputs: dict[str, Any], student: Scores, shadow: Scores, row_weights: torch.Tensor) -> None:
        """
        Add one micro-batch, whose `old_per_token_logps` are the ones that the shadow's ratio divides by.

        Shapes: row_weights (B,), 0 where the shadow has not scored.
        """
        gain = self._policy.objective(inputs, shadow) - self._policy.objective(inputs, student)
        gain = row_weights.max() * gain  # rows that were not taken have the student's scores, and cancel
        mask = inputs["completion_mask"] * (row_weights > 0).unsqueeze(1)
        if "tool_mask" in inputs:
            mask = mask * inputs["tool_mask"]
        log_ratio = shadow[0] - inputs["old_per_token_logps"]
        if self._ratio_level == "sequence":
            per_sequence = (log_ratio * mask).sum(dim=1, keepdim=True) / mask.sum(dim=1, keepdim=True).clamp(min=1)
            log_ratio = per_sequence.expand_as(log_ratio)
        ratio = log_ratio.exp()
        advantages = inputs["advantages"]
        advantages = advantages.unsqueeze(1) if advantages.dim() == 1 else advantages
        low = (ratio < self._range[0]) & (advantages < 0)
        high = (ratio > self._range[1]) & (advantages > 0)
        values = [gain, (ratio * mask).sum(), ((low | high) * mask).sum(), mask.sum()]
        sums = torch.stack([value.double() for value in values])
        self._sums = sums if self._sums is None else self._sums + sums

    def clear(self) -> None:
        """Forget an unfinished window."""
        self._sums = None

    def finish(self) -> dict[str, float]:
        """The window's metrics, over all ranks."""
        totals = self._accelerator.reduce(self._sums, reduction="sum").tolist()
        self.clear()
        values = {"bridge/gain": totals[0] / self._accelerator.num_processes}
        if totals[3] > 0:
            values["bridge/shadow_ratio"] = totals[1] / totals[3]
            values["bridge/shadow_clip_fraction"] = totals[2] / totals[3]
        return values


class GradientProbe:
    """
    The RL part of the fused gradient, over the coordinator and, where wanted, over theta.

    The parts are summed in one buffer, so RL's is the difference of what stands there after and before its backward.
    The projection is linear, so over the coordinator it is taken pass by pass and needs no copy of the gradient.
    """

    def __init__(self, gradient: CoordinatorGradient):
        self._gradient = gradient
        self.clear()

    def clear(self) -> None:
        """Forget what the window's policy passes have left."""
        self._policy_w: Projection | None = None
        self._complete = False
        self._policy_theta: dict[str, torch.Tensor] | None = None

    @contextlib.contextmanager
    def reading(self, over_theta: bool) -> Iterator[None]:
        """Around a micro-batch's policy pass."""
        self._add(-1.0, over_theta)
        yield
        self._add(1.0, over_theta)

    def policy_part(self) -> Projection:
        """At the end of a window that was read: the projection of lambda times RL's gradient. Collective."""
        if self._policy_w is None:
            raise RuntimeError("The window's policy passes were not read.")
        if not self._complete:
            self._gradient.reduce_(self._policy_w, synced=False)
            self._complete = True
        return self._policy_w

    def _add(self, sign: float, over_theta: bool) -> None:
        projected = self._gradient.so_far()
        if self._policy_w is None:
            self._policy_w = [(torch.zeros_like(a), torch.zeros_like(b)) for a, b in projected]
        for (total_a, total_b), (a, b) in zip(self._policy_w, projected, strict=True):
            total_a.add_(a, alpha=sign)
            total_b.add_(b, alpha=sign)
        if over_theta:
            weights = self._gradient.weights
            gradients = {name: weights.gradient(name) for name in weights.parameters}
            if self._policy_theta is None:
                self._policy_theta = {name: torch.zeros_like(g) for name, g in gradients.items()}
            for name, gradient in gradients.items():
                self._policy_theta[name].add_(gradient, alpha=sign)

    def metrics(self, weight: float, fused: Projection, shadow: Projection | None) -> dict[str, float]:
        """Metrics of a window that was read, before any clipping and without lambda factors. Collective."""
        total, policy = _flat(fused), _flat(self.policy_part())
        rl, sft = _divide(policy, weight), _divide(total - policy, 1.0 - weight)
        values = {
            "bridge/coordinator_grad_norm_sft": sft.norm().item(),
            "bridge/coordinator_grad_norm_rl": rl.norm().item(),
            "bridge/coordinator_grad_cosine": _cosine(sft, rl),
        }
        if shadow is not None:
            values["bridge/gain_grad_norm"] = (rl - _flat(shadow)).norm().item()
        return values

    def over_theta(self, weight: float) -> dict[str, float]:
        """At the end of a window, where that was wanted: metrics over theta, before any clipping. Collective."""
        policy, self._policy_theta = self._policy_theta, None
        if policy is None:
            return {}
        weights = self._gradient.weights
        weights.reduce_unsynced_(policy.values())
        norms = torch.zeros(3, dtype=torch.float64, device=weights.backend.device)
        for name, gradient in policy.items():
            rl = _divide(gradient, weight).double()
            sft = _divide(weights.gradient(name) - gradient, 1.0 - weight).double()
            norms += torch.stack([sft.square().sum(), rl.square().sum(), (sft * rl).sum()])
        weights.reduce_shards_([norms])
        sft_norm, rl_norm = math.sqrt(norms[0]), math.sqrt(norms[1])
        product = sft_norm * rl_norm
        return {
            "bridge/grad_norm_sft": sft_norm,
            "bridge/grad_norm_rl": rl_norm,
            "bridge/grad_cosine": norms[2].item() / product if product else math.nan,
        }


def _flat(projection: Projection) -> torch.Tensor:
    return torch.cat([part.reshape(-1) for pair in projection for part in pair])


def _divide(tensor: torch.Tensor, weight: float) -> torch.Tensor:
    return tensor / weight if weight else torch.full_like(tensor, math.nan)


def _cosine(x: torch.Tensor, y: torch.Tensor) -> float:
    product = x.norm() * y.norm()
    return ((x @ y) / product).item() if product else math.nan

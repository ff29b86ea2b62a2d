"""The actual cooperative gain: how much better the RL objective is at theta than at the RL-only shadow."""

from typing import TYPE_CHECKING, Any

import torch

from .._upstream import policy_objective
from ..training.rollouts import Scores


if TYPE_CHECKING:
    from .trainer import BridgeTrainer


class GainMeter:
    """
    Accumulates `bridge/gain`, `bridge/shadow_ratio` and `bridge/shadow_clip_fraction` over a window.

    The gain is L_RL(theta_hat, w) - L_RL(theta, w) at the iterate, on the shared rollouts, always with the ratio
    (without it the two values are equal by construction), without KL and entropy terms. With `shadow_rollout_fraction`
    below 1 it is estimated from the rollouts that the shadow scores, scaled as its gradient is.

    Args:
        trainer ([`BridgeTrainer`]):
            Trainer whose loss is measured.
    """

    def __init__(self, trainer: "BridgeTrainer"):
        self.trainer = trainer
        self._sums: torch.Tensor | None = None

    def observe(self, inputs: dict[str, Any], student: Scores, shadow: Scores) -> None:
        """
        Add one micro-batch.

        Args:
            inputs (`dict[str, Any]`):
                The micro-batch with `old_per_token_logps`, what the rollouts were sampled with.
            student (`Scores`):
                The student's scores on it, detached.
            shadow (`Scores`):
                The shadow's; the student's in rows that were not taken.
        """
        trainer = self.trainer
        weight = trainer._shadow_pass.share.weight_of(inputs)
        gain = policy_objective(trainer, inputs, shadow) - policy_objective(trainer, inputs, student)
        gain = weight.max() * gain  # rows that were not taken have the student's scores, and cancel
        mask = inputs["completion_mask"] * (weight > 0).unsqueeze(1)
        if "tool_mask" in inputs:
            mask = mask * inputs["tool_mask"]
        log_ratio = shadow[0] - inputs["old_per_token_logps"]
        if trainer.importance_sampling_level == "sequence":
            per_sequence = (log_ratio * mask).sum(dim=1, keepdim=True) / mask.sum(dim=1, keepdim=True).clamp(min=1)
            log_ratio = per_sequence.expand_as(log_ratio)
        ratio = log_ratio.exp()
        advantages = inputs["advantages"]
        advantages = advantages.unsqueeze(1) if advantages.dim() == 1 else advantages
        low = (ratio < 1 - trainer.epsilon_low) & (advantages < 0)
        high = (ratio > 1 + trainer.epsilon_high) & (advantages > 0)
        values = [gain, (ratio * mask).sum(), ((low | high) * mask).sum(), mask.sum()]
        sums = torch.stack([value.double() for value in values])
        self._sums = sums if self._sums is None else self._sums + sums

    def finish(self) -> dict[str, float]:
        """
        The window's metrics, over all ranks.

        Returns:
            `dict[str, float]`: `bridge/gain`; where the shadow has scored a token also `bridge/shadow_ratio` (mean over
            completion tokens) and `bridge/shadow_clip_fraction`.
        """
        totals = self.trainer.accelerator.reduce(self._sums, reduction="sum").tolist()
        self._sums = None
        values = {"bridge/gain": totals[0] / self.trainer.backend.world_size}
        if totals[3] > 0:
            values["bridge/shadow_ratio"] = totals[1] / totals[3]
            values["bridge/shadow_clip_fraction"] = totals[2] / totals[3]
        return values

"""What the parent's loss knows of the rollouts: their scores, rewards, and the loss over scores already computed."""

import contextlib
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from trl import GRPOTrainer


if TYPE_CHECKING:
    from .stream import DemonstrationTrainer

# Log-probabilities (B, T), entropies (B, T) or None, auxiliary loss or None.
Scores = tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]


class RolloutRecord:
    """Keeps what passes through the parent's methods, so that nothing is computed twice."""

    def __init__(self, trainer: GRPOTrainer):
        self.trainer: Any = trainer
        self.replayed: Scores | None = None
        self._scores: Scores | None = None
        self._rewards_per_func: torch.Tensor | None = None

    @property
    def scores(self) -> Scores:
        """Scores of the last pass of the parent's loss, detached."""
        if self._scores is None:
            raise RuntimeError("No pass of the policy has been scored yet.")
        return self._scores

    @scores.setter
    def scores(self, scores: Scores) -> None:
        log_probs, entropies, aux_loss = scores[0], scores[1], scores[2]
        self._scores = (
            log_probs.detach(),
            None if entropies is None else entropies.detach(),
            None if aux_loss is None else aux_loss.detach(),
        )

    @contextlib.contextmanager
    def replay(self, scores: Scores) -> Iterator[None]:
        """While inside, the parent's loss takes these scores in place of a forward; their graph is kept."""
        self.replayed = scores
        try:
            yield
        finally:
            self.replayed = None

    def keep(self, rewards_per_func: torch.Tensor) -> None:
        """Keep the rewards of a generation batch, (rows over all ranks, reward functions)."""
        self._rewards_per_func = rewards_per_func

    @contextlib.contextmanager
    def set_aside(self) -> Iterator[None]:
        """While inside, rewards of other completions may be kept; afterwards those of the rollouts are back."""
        kept = self._rewards_per_func
        try:
            yield
        finally:
            self._rewards_per_func = kept

    def total_rewards(self) -> torch.Tensor:
        """
        Weighted sum of the kept rewards, as the parent forms it.

        Shapes: returns (rows over all ranks,).
        """
        rewards = self._rewards_per_func
        if rewards is None:
            raise RuntimeError("No rewards have been computed yet.")
        total = (rewards * self.trainer.reward_weights.to(rewards.device)).nansum(dim=1)
        return total.masked_fill(torch.isnan(rewards).all(dim=1), torch.nan)


class RolloutObserver(RolloutRecord):
    """Tells the judge of `sft_weighting` what the rollouts are worth, and how likely the policy finds them."""

    def __init__(self, trainer: "DemonstrationTrainer"):
        super().__init__(trainer)

    def rewards(self, output: dict[str, Any]) -> dict[str, torch.Tensor]:
        """
        Rewards of a generation batch for the judge.

        Shapes: returns (rows,).
        """
        if not self.trainer.weighting.needs_rollouts:
            return {}
        rows = output["completion_ids"].size(0)
        first = self.trainer.accelerator.process_index * rows
        rewards = self.total_rewards()[first : first + rows]
        if "old_per_token_logps" in output:
            self._tell_judge({**output, "rollout_reward": rewards}, output["old_per_token_logps"])
            return {}
        return {"rollout_reward": rewards}

    def observe(self, inputs: dict[str, Any]) -> None:
        """Tell the judge of a micro-batch that the policy has just scored for the first time."""
        trainer = self.trainer
        iteration = (trainer._step // trainer.args.steps_per_generation) % trainer.num_iterations
        if "rollout_reward" in inputs and iteration == 0:
            self._tell_judge(inputs, self.scores[0])

    def _tell_judge(self, inputs: dict[str, Any], log_probs: torch.Tensor) -> None:
        ids, mask = inputs["completion_ids"], inputs["completion_mask"]
        lengths = mask.sum(dim=1)
        last = ids.gather(1, (lengths - 1).clamp(min=0).unsqueeze(1)).squeeze(1)
        eos = torch.tensor(self.trainer.eos_token_ids, device=ids.device)
        # A rollout that was cut off has no likelihood as a whole; one that nobody could score has no reward.
        usable = (lengths > 0) & torch.isin(last, eos) & ~torch.isnan(inputs["rollout_reward"])
        own = mask * inputs["tool_mask"] if "tool_mask" in inputs else mask
        sums = self.trainer.weighting.judged((log_probs.double() * own).sum(dim=1), own.sum(dim=1))[usable]
        right = (inputs["rollout_reward"][usable] >= self.trainer.args.success_threshold).double()
        self.trainer.weighting.observe_rollouts(list(zip(sums.tolist(), right.tolist(), strict=True)))

"""Prefix-RFT: one rollout of the group continues a prefix of the expert trace, and learns from it by RL."""

import math
from dataclasses import field
from typing import Any

import torch

from ..objectives.expert import CONTINUATIONS, most_uncertain, prefix_advantages
from ..objectives.schedules import cosine_decay
from ..training.group import ExpertPlan, ExpertTrainer
from ..training.group_config import ExpertConfig, require_room
from ..training.options import at_least, one_of, options, within
from ..training.paper import arxiv
from ..training.policy import Scores
from ..training.refusals import Rules, other_than, refuse


# Purpose of a group's random number.
_LENGTH = 2


_REFUSED: Rules = {
    "scale_rewards": (
        other_than("group", "none"),
        "pure rows are scaled among themselves. Set it to 'group' or 'none'",
    ),
    "multi_objective_aggregation": (
        other_than("sum_then_normalize"),
        "its advantages are formed from raw rewards. Set it to 'sum_then_normalize'",
    ),
}


@options
class PrefixRFTConfig(ExpertConfig):
    """Configuration of [`PrefixRFTTrainer`]."""

    prefix_high: float = 0.95
    """Largest share of the trace that a prefix has, below 1."""
    prefix_low: float = 0.05
    """What the smallest share decays to, from `prefix_high`."""
    prefix_steps: int | None = field(default=None, metadata=at_least(0))
    """Updates of the decay of the smallest share. `None` is the whole run."""
    prefix_entropy_quantile: float = field(default=0.2, metadata=within(0, 1))
    """Share of prefix tokens that learn: those of highest entropy."""
    continuation_advantage: str | None = field(default=None, metadata=one_of(*CONTINUATIONS))
    """Advantage of the hybrid row's own tokens: 'reward' (its raw reward) or 'none' (0). `None` takes 'reward' with
    `preset='paper'` and 'none' with 'code'."""
    loss_type: str = "dr_grpo"
    """GRPO's loss type: 'grpo', 'dr_grpo' or 'dapo'."""
    scale_rewards: str = "none"
    """Scaling of pure rows' advantages, as in GRPO: 'group' or 'none'."""
    delta: float | None = 3.0
    """Largest ratio where the advantage is negative, as in GRPO (dual clip)."""

    reads_success_threshold = False

    def __post_init__(self) -> None:
        if self.continuation_advantage is None:
            self.continuation_advantage = "reward" if self.preset == "paper" else "none"
        super().__post_init__()
        if not 0.0 <= self.prefix_low <= self.prefix_high < 1.0:
            raise ValueError(
                f"`prefix_low` and `prefix_high` must lie in [0, 1) and in this order, got {self.prefix_low} and "
                f"{self.prefix_high}."
            )
        refuse(self, _REFUSED)
        require_room(self)


class PrefixRFTTrainer(ExpertTrainer):
    """
    Prefix-RFT: the last rollout of the group is an expert prefix with the policy's own continuation (a hybrid row).

    The prefix has `l |y*|` tokens (at least one of the trace is left out), `l ~ U(low(t), high)`, with `low` falling by
    half a cosine from `high` to `prefix_low`. All tokens, the prefix's too, are in GRPO's clipped loss, with the
    policy's own old probabilities in the ratio, and these advantages from raw rewards:

        pure rows                 r_i - mean(pure)
        continuation              r_hybrid
        prefix                    r_hybrid - mean(pure), at the 20 % of prefix tokens of highest entropy; 0 elsewhere

    A group without trace has GRPO's advantages.

    Source: "Blending Supervised and Reinforcement Fine-Tuning with Prefix Sampling" (arXiv 2507.01679).

    Deviations and choices:
    - which prefix tokens learn is decided among those of a micro-batch, as in the released code, so the result depends
      on the split into micro-batches (with `prefix_entropy_quantile=1.0` it does not);
    - the released code forms the prefix's advantage from rewards it has already overwritten; here it is formed from the
      raw ones, which changes nothing in the first variant there, and is what the second means to do. `preset="code"` is
      that second variant: the continuation has advantage 0;
    - the prefix's tokens are the trace's own; there they are decoded and tokenised again;
    - the settings of the published run are not released. `prefix_high`, `prefix_low` and the decay over the whole run
      are quoted from memory of the paper and from reports of it; `loss_type`, `scale_rewards` (none), the clip range
      (0.2) and `delta` are the first variant's and the released code's;
    - an entropy bonus (0.001 there) is off; `entropy_coef` acts on prefix tokens too, and so does `beta`;
    - the prefix counts in `max_completion_length`.

    Args: as in [`ExpertTrainer`].
    """

    config_class = PrefixRFTConfig
    prompts_differ_in_group = True
    refuses_turns = "a rollout may have to continue inside a tool's result, which no policy writes"
    _tag_names = ["trl", "prefix-rft"]
    _name = "Prefix-RFT"
    _paper = arxiv(
        "2507.01679",
        "Blending Supervised and Reinforcement Fine-Tuning with Prefix Sampling",
        "huang2025prefixrft",
        "Zeyu Huang and Tianhao Cheng and Zihan Qiu and Zili Wang and Yinghui Xu and Edoardo M. Ponti and Ivan Titov",
        2025,
    )

    def prefix_floor(self) -> float:
        """Smallest share of the trace that a prefix has, in rollouts made now."""
        args = self.args
        steps = self.state.max_steps if args.prefix_steps is None else args.prefix_steps
        return cosine_decay(self.state.global_step, args.prefix_high, args.prefix_low, steps)

    def expert_heads(self, plan: ExpertPlan, inputs: list[dict[str, Any]]) -> list[int]:
        low, last = self.prefix_floor(), int(self.num_generations or 0) - 1
        heads = []
        for expert, group, member in zip(plan.experts, plan.groups, plan.members, strict=True):
            head = 0
            if expert is not None and member == last:
                text = len(expert) - 1  # without the token that ends the trace
                share = low + (self.args.prefix_high - low) * self.experts.uniform(plan.generation, group, _LENGTH)
                head = int(share * text)  # below `text`, since the share is below 1
            heads.append(head)
        return heads

    def assign(self, output: dict[str, Any], plan: ExpertPlan) -> None:
        # Prefix tokens are in TRL's loss like own ones.
        output["tool_mask"] = output["tool_mask"] | output["expert_mask"]
        local = [
            head / max(len(expert) - 1, 1) if expert else 0.0
            for head, expert in zip(plan.heads, plan.experts, strict=True)
        ]
        size, device = int(self.num_generations or 0), output["expert_mask"].device
        # A group may straddle two ranks, so all of it is told from all ranks' rows.
        shares = self.accelerator.gather(torch.tensor(local, device=device)).view(-1, size)[:, -1]  # (groups,)
        rewards = self.rollouts.total_rewards().view(-1, size)  # (groups, G)
        hybrid = shares > 0
        self._record_prefixes(shares[hybrid], rewards[hybrid])
        if not hybrid.any():
            return
        own, prefix = prefix_advantages(rewards, self.scale_rewards, self.args.continuation_advantage)
        first = self.accelerator.process_index * len(plan.heads)
        rows = torch.arange(first, first + len(plan.heads), device=device)
        parents = output["advantages"]  # (B,)
        own = torch.where(hybrid[rows // size], own.flatten()[rows].to(parents.dtype), parents)
        prefix = prefix[rows // size].to(parents.dtype)
        output["advantages"] = torch.where(output["expert_mask"].bool(), prefix.unsqueeze(1), own.unsqueeze(1))

    def _record_prefixes(self, shares: torch.Tensor, rewards: torch.Tensor) -> None:
        values = {"low": self.prefix_floor()}
        if len(shares):
            values |= {
                "prefix_share": shares.mean().item(),
                "hybrid_reward": rewards[:, -1].nanmean().item(),
                "pure_reward": rewards[:, :-1].nanmean().item(),
            }
        self.record({f"prefix_rft/{name}": value for name, value in values.items() if not math.isnan(value)})

    def policy_inputs(self, inputs: dict[str, Any], scores: Scores) -> dict[str, Any]:
        if inputs["advantages"].dim() == 1:
            return inputs
        assert scores[1] is not None
        prefix = inputs["expert_mask"].bool()
        learning = most_uncertain(scores[1].detach(), prefix, self.args.prefix_entropy_quantile)
        changed = {"advantages": inputs["advantages"].masked_fill(prefix & ~learning, 0.0)}
        if "importance_sampling_ratio" in inputs:
            # The prefix was not sampled, so there is no mismatch of vLLM's probabilities to correct in it.
            ratio = inputs["importance_sampling_ratio"]
            changed["importance_sampling_ratio"] = torch.where(prefix, torch.ones_like(ratio), ratio)
        return {**inputs, **changed}

"""HPT: RL where the policy finds an answer, SFT where it finds none. SuperRL is a preset of it."""

import dataclasses
from dataclasses import field
from typing import Any

import torch
from accelerate.utils import gather_object

from .._upstream import decode_completions
from ..objectives.expert import group_advantages
from ..training.group import ExpertPlan
from ..training.options import at_least, one_of, options
from ..training.paper import arxiv
from ..training.randomness import forked_python_rng, forked_torch_rng
from ..training.refusals import SCALED_BY_GROUP, refuse
from ..training.shaping import SHAPING_FIELDS, UNCLIPPED, ShapedConfig, ShapedTrainer


# SuperRL calls a rollout right from any reward that is not zero.
_ANY_REWARD = 1e-8


@options
class HPTConfig(ShapedConfig):
    """Configuration of [`HPTTrainer`]. The shaping of [`LUFFYConfig`] is for traces of the second gate."""

    preset: str = field(default="paper", metadata=one_of("paper", "code", "superrl"))
    """'paper', 'code', or 'superrl' for SuperRL. Fills fields left at `None`."""
    gate: int = 0
    """Groups with at most so many right rollouts are trained by SFT on their trace. -1 never fires, which is GRPO."""
    gate_off: int | None = None
    """Second gate: groups with more than `gate` and at most so many right rollouts have their trace in the place of a
    rollout, by LUFFY's off-policy RL term. `None` switches it off, as the published runs do."""
    sft_loss_coef: float = field(default=1.0, metadata=at_least(0))
    """Weight of the SFT term (the released scripts have 0.3 for Qwen2.5-Math-1.5B)."""
    success_threshold: float | None = None  # type: ignore[assignment]
    """Reward from which a rollout counts as right. `None` takes 1.0, and 1e-8 (any reward) with `preset='superrl'`."""
    loss_type: str = "dr_grpo"
    """GRPO's loss type: 'grpo', 'dr_grpo' or 'dapo'."""
    scale_rewards: str | None = None  # type: ignore[assignment]
    """Scaling of advantages, as in GRPO. `None` takes 'none', and 'group' with `preset='superrl'`."""
    epsilon: float | None = None  # type: ignore[assignment]
    """Clipping of own tokens' ratios, as in GRPO. `None` takes 0.2, and no clipping with `preset='code'`."""

    def __post_init__(self) -> None:
        superrl = self.preset == "superrl"
        if self.success_threshold is None:
            self.success_threshold = _ANY_REWARD if superrl else 1.0
        if self.scale_rewards is None:
            self.scale_rewards = "group" if superrl else "none"
        if self.epsilon is None:
            self.epsilon = UNCLIPPED if self.preset == "code" else 0.2
        super().__post_init__()
        rows = int(self.num_generations or 1)
        if not -1 <= self.gate <= rows:
            raise ValueError(f"`gate` must lie between -1 (never) and `num_generations` ({rows}), got {self.gate}.")
        if self.gate_off is not None and not self.gate <= self.gate_off <= rows:
            raise ValueError(
                f"`gate_off` must lie between `gate` ({self.gate}) and `num_generations` ({rows}), got "
                f"{self.gate_off}. Set it to None to switch it off."
            )
        if self.gate >= 0 or self.gate_off is not None:
            refuse(self, SCALED_BY_GROUP)
        if self.gate_off is None:
            self._refuse_shaping()

    def _refuse_shaping(self) -> None:
        for shaped in dataclasses.fields(ShapedConfig):
            if shaped.name in SHAPING_FIELDS and getattr(self, shaped.name) != shaped.default:
                raise ValueError(f"`{shaped.name}` has no effect without `gate_off`. Remove it, or set `gate_off`.")


class HPTTrainer(ShapedTrainer):
    """
    HPT: for each question a hard switch between RL and SFT, by how many of its rollouts are right.

    With `s` right rollouts in a group (reward of `success_threshold` and above; one that nobody could score is wrong):

        s <= gate, and the prompt has a trace      -sft_loss_coef mean log p(trace)        the rollouts are not trained on
        otherwise                                  TRL's RL loss

    The group that is switched leaves the RL loss as a whole, with its KL and entropy terms, and its trace takes the
    last row, so shapes stay as they are. For a sum of token losses that is the removal of the group. The mean is over
    the update's trained tokens (see `loss_scale`), at temperature 1.

    With `gate_off`, groups with `gate < s <= gate_off` have their trace in the last row, in the place of a rollout, by
    LUFFY's off-policy term `-f(p_t) A` (see [`LUFFYTrainer`]). The reward functions are then asked about the trace, and
    the group's advantages are formed again.

    Metrics, as shares of all groups: `hpt/gate_rate` (trained by SFT), `hpt/off_rate` (by the second gate),
    `hpt/solve_none` and `hpt/solve_all` (no rollout is right, all are).

    Sources: "Towards a Unified View of Large Language Model Post-Training" (arXiv 2509.04419); with
    `preset="superrl"` "SuperRL: Reinforcement Learning with Supervision to Boost Language Model Reasoning" (arXiv
    2506.01096).

    Deviations:
    - `loss_type="dr_grpo"` divides by `max_completion_length` and the number of rows, switched ones included; the
      released code by 8192 (`loss_scale="paper"` reproduces its balance of SFT and RL);
    - updates with a gradient norm above 80 (about 1.25 in our scale) are skipped in the released code; here the
      gradient is clipped to `max_grad_norm`, and an update is never left out;
    - the number of updates for each generation batch is fixed; in the released code it falls with each group removed;
    - no entropy bonus by default (the released script has 0.001; set `entropy_coef`, about 1e-4 in our scale);
    - `gate_off`: the released code removes the group's rollouts here too, and the trace stands alone with its reward
      as advantage; here it stands among the other rollouts, as in LUFFY. No published run uses it;
    - no "soft" table of coefficients: no released script uses it;
    - `preset="code"`: own ratios are not clipped;
    - `preset="superrl"`: the rule for each question alone, not the variant with learned weights of the two losses; a
      negative reward is not right; advantages are divided by the standard deviation.

    Args: as in [`ExpertTrainer`].
    """

    config_class = HPTConfig
    _tag_names = ["trl", "hpt"]
    _name = "HPT"
    _paper = arxiv(
        "2509.04419",
        "Towards a Unified View of Large Language Model Post-Training",
        "lv2025hpt",
        "Xingtai Lv and Yuxin Zuo and Youbang Sun and Hongyi Liu and Yuntian Wei and Zhekai Chen and Lixuan He "
        "and Xuekai Zhu and Kaiyan Zhang and Bingning Wang and Ning Ding and Bowen Zhou",
        2025,
    )

    def with_signal(self, output: dict[str, Any]) -> torch.Tensor:
        return super().with_signal(output) | output["sft_mask"].any(
            dim=1
        )  # what no rollout solves is not lost, but imitated

    def assign(self, output: dict[str, Any], plan: ExpertPlan) -> None:
        args = self.args
        size: Any = self.num_generations
        rewards = self.rollouts.total_rewards().view(-1, size)  # (groups, G)
        counts = (rewards >= args.success_threshold).sum(dim=1).tolist()  # right rollouts of each group
        second = args.gate if args.gate_off is None else args.gate_off
        # Of a group that lies on two ranks both see all rewards and the same trace, so they decide alike.
        traced = [(row, counts[plan.groups[row]]) for row, expert in enumerate(plan.experts) if expert is not None]
        to_sft = [row for row, count in traced if count <= args.gate]
        to_off = [row for row, count in traced if args.gate < count <= second]
        last = [row for row, member in enumerate(plan.members) if member == size - 1]
        if args.gate_off is not None:
            self._put_among_rollouts(output, plan, rewards, to_off, [row for row in last if row in to_off])
        trained = [row for row in last if row in to_sft]
        self.write_experts(output, plan, trained)
        output["tool_mask"][to_sft] = 0
        output["advantages"][to_sft] = 0.0
        output["sft_mask"][trained] = output["expert_mask"][trained]
        numbers = {
            "hpt/gate_rate": self._sum_over_ranks(len(set(last) & set(to_sft))),
            "hpt/off_rate": self._sum_over_ranks(len(set(last) & set(to_off))),
            "hpt/solve_none": counts.count(0),
            "hpt/solve_all": counts.count(size),
        }
        self.record({name: number / len(counts) for name, number in numbers.items()})

    def _put_among_rollouts(
        self, output: dict[str, Any], plan: ExpertPlan, rewards: torch.Tensor, rows: list[int], written: list[int]
    ) -> None:
        """Second gate: the trace as a rollout of its group. Collective: every rank calls."""
        filler = self._as_rollout(output, plan, 0, output["completion_ids"][0].tolist())
        traces = [self._as_rollout(output, plan, row, plan.experts[row] or []) for row in written]
        # A reward function may draw random numbers; RL's own go on as if it had not been asked.
        with forked_torch_rng(self.accelerator.device), forked_python_rng():
            asked = self.ask_rewards(traces, filler)
        graded = gather_object([(plan.groups[row], reward) for row, reward in zip(written, asked, strict=True)])
        if not graded:  # the same on every rank
            return
        rewards = rewards.clone()
        for group, reward in graded:
            rewards[group, -1] = reward
        self.record({"expert/reward": rewards[[group for group, _ in graded], -1].nanmean().item()})
        advantages = group_advantages(rewards, self.scale_rewards)
        for row in rows:
            output["advantages"][row] = advantages[plan.groups[row], plan.members[row]]
        self.write_experts(output, plan, written)

    def _as_rollout(self, output: dict[str, Any], plan: ExpertPlan, row: int, ids: list[int]) -> dict[str, Any]:
        prompt = plan.inputs[row]["prompt"]
        prompt_ids = output["prompt_ids"][row][output["prompt_mask"][row] > 0].tolist()
        completion = self.experts.messages(ids) or decode_completions(self, [prompt], [prompt_ids], [ids])[0]
        return {"inputs": plan.inputs[row], "prompt": prompt, "completion": completion, "completion_ids": ids}

    def expert_loss(self, log_probs: torch.Tensor, entropies: torch.Tensor, inputs: dict[str, Any]) -> torch.Tensor:
        return super().expert_loss(log_probs, entropies, inputs).masked_fill(inputs["sft_mask"] > 0, 0.0)

    def has_expert_loss(self) -> bool:
        return self.args.gate_off is not None

    def count_items(self, output: dict[str, Any]) -> None:
        # Traces of the first gate are trained by SFT: they are not among the tokens of the RL loss.
        expert_mask = output["expert_mask"]
        output["expert_mask"] = expert_mask * (1 - output["sft_mask"])
        super().count_items(output)
        output["expert_mask"] = expert_mask

    def sft_coefficient(self) -> float:
        return self.args.sft_loss_coef if self.args.gate >= 0 else 0.0

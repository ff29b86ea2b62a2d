"""LUFFY: an expert trace as one rollout of the group."""

from typing import Any

from ..training.group import ExpertPlan
from ..training.options import options
from ..training.paper import arxiv
from ..training.shaping import UNCLIPPED, ShapedConfig, ShapedTrainer


@options
class LUFFYConfig(ShapedConfig):
    """Configuration of [`LUFFYTrainer`]."""

    num_experts: int = 1
    """Rows of each group that the expert takes; below `num_generations`."""
    loss_type: str = "dr_grpo"
    """GRPO's loss type: 'grpo', 'dr_grpo' or 'dapo'."""
    scale_rewards: str | None = None  # type: ignore[assignment]
    """Scaling of advantages, as in GRPO. `None` takes 'group' with `preset='paper'` and 'none' with 'code'."""
    epsilon: float | None = None  # type: ignore[assignment]
    """Clipping of own tokens' ratios, as in GRPO. `None` takes 0.2 with `preset='paper'`, and no clipping with
    'code'."""

    reads_success_threshold = False

    def __post_init__(self) -> None:
        paper = self.preset == "paper"
        if self.scale_rewards is None:
            self.scale_rewards = "group" if paper else "none"
        if self.epsilon is None:
            self.epsilon = 0.2 if paper else UNCLIPPED
        super().__post_init__()
        if not 1 <= self.num_experts < int(self.num_generations or 1):
            raise ValueError(
                f"`num_experts` must be at least 1 and below `num_generations` ({self.num_generations}), got "
                f"{self.num_experts}."
            )


class LUFFYTrainer(ShapedTrainer):
    """
    LUFFY: the expert trace is one rollout of its group, with a shaped and unclipped policy loss.

    Per optimizer update, with the group's advantages `A` over own and expert rows together:

        L = L_GRPO(own tokens)  -  sum over expert tokens of f(p_t) A,        f(p) = p / (p + gamma)

    `p_t` is the policy's probability of the expert's token at the sampling temperature; `f` is differentiated, so the
    weight on `grad log p_t` is `gamma p / (p + gamma)^2 A`. The expert is scored by the same reward functions, and its
    reward is in the group's mean. Both sums are scaled as `loss_type` says.

    Source: "Learning to Reason under Off-Policy Guidance" (arXiv 2504.14945).

    Deviations:
    - the expert takes the last rows of the group, which are sampled and discarded (as in the released code), so that
      the other rows' samples are plain GRPO's;
    - `loss_type="dr_grpo"` divides by `max_completion_length`; the released code by 8192 and not by the number of rows;
    - no entropy bonus by default (the released script has 0.001; set `entropy_coef`, about 1e-4 in our scale);
    - traces that are too long are left out in place of cut (`expert_overlong`): a cut trace is scored wrong, and its
      negative advantage pushes a possibly right trace down;
    - `preset="code"`: advantages are not divided by the standard deviation and own ratios are not clipped;
      `policy_shaping="rl_plus"` has `V = 1`, as RL-PLUS's released code.

    Args: as in [`ExpertTrainer`].
    """

    config_class = LUFFYConfig
    _tag_names = ["trl", "luffy"]
    _name = "LUFFY"
    _paper = arxiv(
        "2504.14945",
        "Learning to Reason under Off-Policy Guidance",
        "yan2025luffy",
        "Jianhao Yan and Yafu Li and Zican Hu and Zhi Wang and Ganqu Cui and Xiaoye Qu and Yu Cheng and Yue Zhang",
        2025,
    )

    def expert_heads(self, plan: ExpertPlan, inputs: list[dict[str, Any]]) -> list[int]:
        first = self.num_generations - self.args.num_experts
        return [
            len(expert) if expert is not None and member >= first else 0
            for expert, member in zip(plan.experts, plan.members, strict=True)
        ]

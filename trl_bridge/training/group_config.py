"""Arguments that every trainer with experts in the rollout group shares."""

from dataclasses import field
from typing import ClassVar

from ..objectives.expert import LOSS_TYPES, published_sft_scale
from .options import one_of, options, within
from .refusals import Rules, check_config, other_than, refuse
from .student_config import StudentConfig


_REFUSED: Rules = {
    "loss_type": (
        other_than(*LOSS_TYPES),
        f"own and expert tokens would be scaled differently. Use one of {', '.join(map(repr, LOSS_TYPES))}",
    ),
    "importance_sampling_level": (
        other_than("token"),
        "a sequence's ratio has no meaning for tokens that the policy did not sample. Set it to 'token'",
    ),
    "off_policy_mask_threshold": (other_than(None), "expert rows are off-policy on purpose. Set it to None"),
    "top_entropy_quantile": (
        lambda value: value < 1.0,
        "it ranks the tokens of own and expert rows together. Set it to 1.0",
    ),
    "router_aux_loss_coef": "the load of experts (of a mixture) was not tested on groups with expert rows. Set it to 0",
}


@options
class ExpertConfig(StudentConfig):
    """
    Configuration of GRPO with an `expert` column: everything of [`~trl.GRPOConfig`], and what a method does with it.
    """

    preset: str = field(default="paper", metadata=one_of("paper", "code"))
    """Fills fields left at `None` where a paper and its released code disagree."""
    expert_max_length: int | None = None
    """Longest expert trace, in completion tokens. `None` takes `max_completion_length`."""
    expert_overlong: str = field(default="skip", metadata=one_of("skip", "truncate", "error"))
    """What happens to longer ones: 'skip' (the group trains as in GRPO), 'truncate' (the trace then does not end, which
    a verifier calls wrong) or 'error'."""
    expert_probability: float = field(default=1.0, metadata=within(0, 1))
    """Probability that a group whose prompt has a trace uses it. 0 is plain GRPO."""
    success_threshold: float = 1.0
    """Reward from which a rollout counts as right."""
    loss_scale: str = field(default="trl", metadata=one_of("trl", "paper"))
    """Scale of the SFT term. 'trl': the mean over the update's trained expert tokens (where an update needs several
    generation batches, `steps_per_generation` below `gradient_accumulation_steps`, the mean of their means). 'paper':
    times the factor that reproduces the published scripts' balance of SFT and RL
    (`objectives.expert.published_sft_scale`); needs `loss_type='dr_grpo'`."""
    sft_token_weight: str = field(default="none", metadata=one_of("none", "trapo"))
    """Weight of each token in the SFT term, beside the method's own: 'none', or 'trapo' for the detached
    `p / max(p, 0.1)`, which holds back tokens that the policy finds unlikely (`objectives.weights.trapo`). Refused by
    methods without SFT term."""

    # Whether a method asks which rollouts are right.
    reads_success_threshold: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.longest_expert < 2:
            name = "max_completion_length" if self.expert_max_length is None else "expert_max_length"
            raise ValueError(
                f"`{name}` must be at least 2 (a token and the one that ends a trace), got {self.longest_expert}."
            )
        if not self.reads_success_threshold and self.success_threshold != 1.0:
            raise ValueError(
                f"`success_threshold` has no effect in {type(self).__name__}, which has no notion of a right rollout. "
                "Remove it."
            )
        refuse(self, _REFUSED)
        if self.loss_scale == "paper" and self.loss_type != "dr_grpo":
            raise ValueError(
                f"`loss_scale='paper'` is defined for `loss_type='dr_grpo'`, got {self.loss_type!r}. Set it, or use "
                "`loss_scale='trl'`."
            )
        if self.mask_truncated_completions and self.expert_overlong == "truncate":
            raise ValueError(
                "`mask_truncated_completions=True` would mask truncated expert traces. Set "
                "`expert_overlong='skip'`, or `mask_truncated_completions=False`."
            )
        if self.remove_unused_columns:
            raise ValueError(
                "`remove_unused_columns=True` would remove the `expert` column. Set it to False (GRPO's default)."
            )
        check_config(self)

    @property
    def longest_expert(self) -> int:
        """Longest expert trace, in completion tokens."""
        return int(self.max_completion_length or 0) if self.expert_max_length is None else self.expert_max_length

    @property
    def sft_scale(self) -> float:
        """Factor on the SFT term that `loss_scale` asks for."""
        return 1.0 if self.loss_scale == "trl" else published_sft_scale(int(self.max_completion_length or 0))


def require_room(args: ExpertConfig) -> None:
    """Refuse traces that leave a continuation no room, for methods whose rollouts continue a part of the trace."""
    reason = "a continuation would have to match it from its start. Set it to None"
    refuse(args, {"vllm_structured_outputs_regex": (other_than(None), reason)})
    if args.longest_expert > int(args.max_completion_length or 0):
        raise ValueError(
            f"`expert_max_length` ({args.expert_max_length}) must not exceed `max_completion_length` "
            f"({args.max_completion_length}), which holds a part of the trace and its continuation. Raise the latter."
        )

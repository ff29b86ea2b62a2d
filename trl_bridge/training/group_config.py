"""Arguments that every trainer with experts in the rollout group shares."""

from dataclasses import dataclass, field
from typing import ClassVar

from trl import GRPOConfig

from ..objectives.expert import LOSS_TYPES, published_sft_scale
from .refusals import check_config


EXPERT_OVERLONG = ("skip", "truncate", "error")
LOSS_SCALES = ("trl", "paper")
SFT_TOKEN_WEIGHTS = ("none", "trapo")
PRESETS = ("paper", "code")


@dataclass
class ExpertConfig(GRPOConfig):
    r"""
    Configuration of GRPO with an `expert` column: everything of [`~trl.GRPOConfig`], and what a method does with it.

    Parameters:
        preset (`str`, *optional*, defaults to `"paper"`):
            `"paper"` or `"code"`: fills fields left at `None` where a paper and its released code disagree.
        expert_max_length (`int`, *optional*):
            Longest expert trace, in completion tokens. `None` takes `max_completion_length`.
        expert_overlong (`str`, *optional*, defaults to `"skip"`):
            What happens to longer ones: `"skip"` (the group trains as in GRPO), `"truncate"` (the trace then does not
            end, which a verifier calls wrong) or `"error"`.
        expert_probability (`float`, *optional*, defaults to `1.0`):
            Probability that a group whose prompt has a trace uses it. 0 is plain GRPO.
        success_threshold (`float`, *optional*, defaults to `1.0`):
            Reward from which a rollout counts as right.
        loss_scale (`str`, *optional*, defaults to `"trl"`):
            Scale of the SFT term. `"trl"`: the mean over the update's trained expert tokens (where an update needs several
            generation batches, `steps_per_generation` below `gradient_accumulation_steps`, the mean of their means). `"paper"`: times the
            factor that reproduces the published scripts' balance of SFT and RL (see
            [`objectives.expert.published_sft_scale`]); needs `loss_type="dr_grpo"`.
        sft_token_weight (`str`, *optional*, defaults to `"none"`):
            Weight of each token in the SFT term, beside the method's own: `"none"`, or `"trapo"` for the detached
            `p / max(p, 0.1)`, which holds back tokens that the policy finds unlikely (see
            [`objectives.weights.trapo`]). Refused by methods without SFT term.
    """

    preset: str = field(
        default="paper",
        metadata={
            "help": "'paper' or 'code': fills fields left at None where a paper and its code disagree.",
        },
    )
    expert_max_length: int | None = field(
        default=None,
        metadata={"help": "Longest expert trace in completion tokens. None takes max_completion_length."},
    )
    expert_overlong: str = field(
        default="skip",
        metadata={
            "help": "What happens to longer expert traces: 'skip', 'truncate' or 'error'.",
            "choices": list(EXPERT_OVERLONG),
        },
    )
    expert_probability: float = field(
        default=1.0,
        metadata={"help": "Probability that a group whose prompt has an expert trace uses it. 0 is plain GRPO."},
    )
    success_threshold: float = field(default=1.0, metadata={"help": "Reward from which a rollout counts as right."})
    loss_scale: str = field(
        default="trl",
        metadata={
            "help": "Scale of the SFT term: 'trl' (mean over trained expert tokens) or 'paper' (the published scripts' "
            "balance of SFT and RL).",
            "choices": list(LOSS_SCALES),
        },
    )
    sft_token_weight: str = field(
        default="none",
        metadata={
            "help": "Weight of each token in the SFT term: 'none', or 'trapo' (p / max(p, 0.1): less for tokens that "
            "the policy finds unlikely).",
            "choices": list(SFT_TOKEN_WEIGHTS),
        },
    )

    # Whether a method asks which rollouts are right.
    reads_success_threshold: ClassVar[bool] = True
    # Presets that a method knows.
    presets: ClassVar[tuple[str, ...]] = PRESETS

    def __post_init__(self) -> None:
        require_choice("preset", self.preset, self.presets)
        super().__post_init__()
        require_choice("expert_overlong", self.expert_overlong, EXPERT_OVERLONG)
        require_choice("loss_scale", self.loss_scale, LOSS_SCALES)
        require_choice("sft_token_weight", self.sft_token_weight, SFT_TOKEN_WEIGHTS)
        if not 0.0 <= self.expert_probability <= 1.0:
            raise ValueError(f"`expert_probability` must lie in [0, 1], got {self.expert_probability}.")
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
        if self.loss_type not in LOSS_TYPES:
            raise NotImplementedError(
                f"`loss_type={self.loss_type!r}` is not supported by {type(self).__name__}: own and expert tokens "
                f"would be scaled differently. Use one of {', '.join(map(repr, LOSS_TYPES))}."
            )
        if self.loss_scale == "paper" and self.loss_type != "dr_grpo":
            raise ValueError(
                f"`loss_scale='paper'` is defined for `loss_type='dr_grpo'`, got {self.loss_type!r}. Set it, or use "
                "`loss_scale='trl'`."
            )
        self._refuse_what_acts_on_all_tokens()
        if self.remove_unused_columns:
            raise ValueError(
                "`remove_unused_columns=True` would remove the `expert` column. Set it to False (GRPO's default)."
            )
        check_config(self)

    def _refuse_what_acts_on_all_tokens(self) -> None:
        owner = type(self).__name__
        if self.importance_sampling_level != "token":
            raise NotImplementedError(
                f"`importance_sampling_level={self.importance_sampling_level!r}` is not supported by {owner}: a "
                "sequence's ratio has no meaning for tokens that the policy did not sample. Set it to 'token'."
            )
        if self.off_policy_mask_threshold is not None:
            raise NotImplementedError(
                f"`off_policy_mask_threshold` is not supported by {owner}: expert rows are off-policy on purpose. Set "
                "it to None."
            )
        if self.top_entropy_quantile < 1.0:
            raise NotImplementedError(
                f"`top_entropy_quantile` is not supported by {owner}: it ranks the tokens of own and expert rows "
                "together. Set it to 1.0."
            )
        if self.mask_truncated_completions and self.expert_overlong == "truncate":
            raise ValueError(
                "`mask_truncated_completions=True` would mask truncated expert traces. Set "
                "`expert_overlong='skip'`, or `mask_truncated_completions=False`."
            )

    @property
    def longest_expert(self) -> int:
        """Longest expert trace, in completion tokens."""
        return int(self.max_completion_length or 0) if self.expert_max_length is None else self.expert_max_length

    @property
    def sft_scale(self) -> float:
        """Factor on the SFT term that `loss_scale` asks for."""
        return 1.0 if self.loss_scale == "trl" else published_sft_scale(int(self.max_completion_length or 0))


def require_choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    """Refuse a value that is not among an option's choices."""
    if value not in choices:
        raise ValueError(f"`{name}` must be one of {', '.join(map(repr, choices))}, got {value!r}.")


def require_room(args: ExpertConfig) -> None:
    """Refuse traces that leave a continuation no room, for methods whose rollouts continue a part of the trace."""
    if args.vllm_structured_outputs_regex is not None:
        raise NotImplementedError(
            f"`vllm_structured_outputs_regex` is not supported by {type(args).__name__}: a continuation would have to "
            "match it from its start. Set it to None."
        )
    if args.longest_expert > int(args.max_completion_length or 0):
        raise ValueError(
            f"`expert_max_length` ({args.expert_max_length}) must not exceed `max_completion_length` "
            f"({args.max_completion_length}), which holds a part of the trace and its continuation. Raise the latter."
        )

"""Arguments of ActGuide."""

from dataclasses import dataclass, field

from .expert_config import ExpertConfig


@dataclass
class ActGuideConfig(ExpertConfig):
    r"""
    Configuration of [`ActGuideTrainer`].

    Parameters:
        hard_threshold (`float`, *optional*, defaults to `0.0`):
            Groups whose best reward is at most this are hard, and get guidance; a probe works if one of its rollouts
            has more.
        probe_rounds (`int`, *optional*, defaults to `5`):
            Most probes of a hard group, each with guidance of another length.
        probe_rollouts (`int`, *optional*, defaults to `2`):
            Rollouts of a probe.
        show_last_step (`bool`, *optional*, defaults to `False`):
            Whether all steps may be shown. Mostly the last one holds the answer.
        guidance_template (`str`, *optional*, defaults to `"Reference steps:\n{steps}\n\n{prompt}"`):
            The prompt with guidance: a text with `{prompt}` and `{steps}`, in a conversation the last user message.
        shaping_gamma (`float`, *optional*, defaults to `0.0`):
            Above 0 a guided token has the weight `r / (r + gamma)` on its advantage, detached, in the place of its
            ratio `r`. 0 keeps the ratio.
        loss_type (`str`, *optional*, defaults to `"dapo"`):
            As in [`~trl.GRPOConfig`]; `"grpo"`, `"dr_grpo"` or `"dapo"`.
        beta (`float`, *optional*, defaults to `0.001`):
            As in [`~trl.GRPOConfig`]: weight of the KL term, which needs a reference model.
        delta (`float`, *optional*, defaults to `3.0`):
            As in [`~trl.GRPOConfig`]: upper bound of the ratio where the advantage is negative.
        expert_max_length (`int`, *optional*):
            Longest worked solution, in tokens. `None` takes `max_completion_length`. Its steps go into the prompt, so
            it may exceed that.
    """

    hard_threshold: float = field(
        default=0.0, metadata={"help": "Groups whose best reward is at most this are hard, and get guidance."}
    )
    probe_rounds: int = field(default=5, metadata={"help": "Most probes of a hard group."})
    probe_rollouts: int = field(default=2, metadata={"help": "Rollouts of a probe."})
    show_last_step: bool = field(
        default=False, metadata={"help": "Whether all steps may be shown. Mostly the last one holds the answer."}
    )
    guidance_template: str = field(
        default="Reference steps:\n{steps}\n\n{prompt}",
        metadata={"help": "The prompt with guidance: a text with {prompt} and {steps}."},
    )
    shaping_gamma: float = field(
        default=0.0,
        metadata={"help": "Above 0, guided tokens have the weight r / (r + gamma) in the place of their ratio r."},
    )
    loss_type: str = field(default="dapo", metadata={"help": "GRPO's loss type: 'grpo', 'dr_grpo' or 'dapo'."})
    beta: float = field(default=0.001, metadata={"help": "Weight of the KL term, as in GRPO."})
    delta: float | None = field(
        default=3.0, metadata={"help": "Upper bound of the ratio where the advantage is negative, as in GRPO."}
    )

    presets = ("paper",)
    reads_success_threshold = False

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("probe_rounds", "probe_rollouts"):
            if getattr(self, name) < 1:
                raise ValueError(f"`{name}` must be at least 1, got {getattr(self, name)}.")
        if not self.shaping_gamma >= 0:
            raise ValueError(f"`shaping_gamma` must not be negative, got {self.shaping_gamma}.")
        for part in ("{prompt}", "{steps}"):
            if self.guidance_template.count(part) != 1:
                raise ValueError(f"`guidance_template` must contain {part} once, got {self.guidance_template!r}.")
        if self.loss_scale != "trl":
            raise ValueError(
                f"`loss_scale={self.loss_scale!r}` scales an SFT term, and ActGuide has none. Set it to 'trl'."
            )

"""Arguments that every trainer with a demonstration stream shares."""

from dataclasses import dataclass, field

from trl import GRPOConfig

from .refusals import check_config


WEIGHTINGS = ("none", "likelihood", "likelihood_sequence", "phi", "judge", "verdict", "judge_verdict")
OVERLONG = ("drop", "truncate", "error")
PAIRINGS = ("independent", "prompt")


@dataclass
class DemonstrationConfig(GRPOConfig):
    r"""
    Configuration of GRPO with a demonstration stream: everything of [`~trl.GRPOConfig`], and the stream.

    > Parameters that control the demonstration stream

    Parameters:
        sft_per_device_train_batch_size (`int`, *optional*):
            Demonstrations in each micro-batch on each device. `None` takes one for each distinct prompt of the
            micro-batch, `per_device_train_batch_size // num_generations` and at least 1, so that the SFT pass costs
            about `1 / num_generations` of an RL pass at equal lengths. Not used with `sft_pairing="prompt"`.
        sft_max_length (`int`, *optional*):
            Longest demonstration, in tokens of prompt and completion together. `None` sets no limit.
        sft_overlong (`str`, *optional*, defaults to `"drop"`):
            What happens to a demonstration longer than `sft_max_length`: `"drop"` it, `"truncate"` its end, or
            `"error"`.
        sft_pairing (`str`, *optional*, defaults to `"independent"`):
            `"independent"` draws demonstrations without replacement, epoch by epoch. `"prompt"` takes, for each group
            of rollouts, one demonstration of that very prompt.

    > Parameters that control how demonstrations are weighted

    Parameters:
        sft_weighting (`str`, *optional*):
            Detached weight of the demonstrations' tokens. `None` and `"none"` weigh all alike. `"likelihood"`,
            `"likelihood_sequence"` and `"phi"` weigh by the policy's own probability `p` of the token, of the
            completion, or by `p (1 - p)`, normalised to mean one. `"judge"` predicts from the rollouts what reward a
            likelihood foretells, `"verdict"` asks the reward functions about the demonstration itself,
            `"judge_verdict"` multiplies both; these three are absolute: bad data means less SFT.
        judge_window (`int`, *optional*, defaults to `20`):
            Number of past windows (optimizer updates) whose rollouts the judge is fitted on.
        judge_beta (`float`, *optional*, defaults to `4.0`):
            Exponent of the judge's weight: how sharply demonstrations below the policy's own reward fade out.
        judge_penalty (`float`, *optional*, defaults to `1.0`):
            L2 penalty on the judge's slope.
        judge_per_token (`bool`, *optional*, defaults to `False`):
            Whether the judge reads the mean log-likelihood of a completion's tokens in place of their sum, by which a
            demonstration much longer than the rollouts is unlikely whatever it says.
        verdict_calls (`int`, *optional*, defaults to `1`):
            Times the reward functions are called on a demonstration at each visit (once more at its first).
        success_threshold (`float`, *optional*, defaults to `1.0`):
            Reward from which a rollout or a demonstration counts as right.
    """

    sft_per_device_train_batch_size: int | None = field(
        default=None,
        metadata={
            "help": "Demonstrations in each micro-batch on each device. None takes one for each distinct prompt of the "
            "micro-batch (per_device_train_batch_size // num_generations, at least 1)."
        },
    )
    sft_max_length: int | None = field(
        default=None,
        metadata={"help": "Longest demonstration in tokens, prompt and completion together. None sets no limit."},
    )
    sft_overlong: str = field(
        default="drop",
        metadata={
            "help": "What happens to demonstrations longer than sft_max_length: 'drop', 'truncate' or 'error'.",
            "choices": list(OVERLONG),
        },
    )
    sft_pairing: str = field(
        default="independent",
        metadata={
            "help": "'independent' draws demonstrations without replacement; 'prompt' takes one demonstration of each "
            "group's own prompt.",
            "choices": list(PAIRINGS),
        },
    )
    sft_weighting: str | None = field(
        default=None,
        metadata={
            "help": "Detached weight of the demonstrations: 'none', 'likelihood', 'likelihood_sequence', 'phi', "
            "'judge', 'verdict' or 'judge_verdict'."
        },
    )
    judge_window: int = field(
        default=20, metadata={"help": "Number of past optimizer updates whose rollouts the judge is fitted on."}
    )
    judge_beta: float = field(default=4.0, metadata={"help": "Exponent of the judge's weight."})
    judge_penalty: float = field(default=1.0, metadata={"help": "L2 penalty on the judge's slope."})
    judge_per_token: bool = field(
        default=False,
        metadata={"help": "Whether the judge reads the mean log-likelihood of the tokens in place of their sum."},
    )
    verdict_calls: int = field(
        default=1,
        metadata={"help": "Calls of the reward functions on a demonstration at each visit (once more at its first)."},
    )
    success_threshold: float = field(
        default=1.0, metadata={"help": "Reward from which a rollout or a demonstration counts as right."}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        _require_choice("sft_overlong", self.sft_overlong, OVERLONG)
        _require_choice("sft_pairing", self.sft_pairing, PAIRINGS)
        if self.sft_weighting is not None:
            _require_choice("sft_weighting", self.sft_weighting, WEIGHTINGS)
        for name in ("sft_per_device_train_batch_size", "sft_max_length", "judge_window", "verdict_calls"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"`{name}` must be at least 1, got {value}.")
        if self.judge_beta < 0:
            raise ValueError(f"`judge_beta` must not be negative, got {self.judge_beta}.")
        if self.judge_penalty <= 0:
            raise ValueError(f"`judge_penalty` must be above 0, got {self.judge_penalty}.")
        if self.sft_pairing == "prompt":
            if self.sft_per_device_train_batch_size is not None:
                raise ValueError(
                    "`sft_per_device_train_batch_size` has no effect with `sft_pairing='prompt'`, where every group of "
                    "rollouts brings one demonstration. Remove it, or use `sft_pairing='independent'`."
                )
            # TRL's own `__post_init__` has filled it in.
            if int(self.steps_per_generation or 0) % self.gradient_accumulation_steps != 0:
                raise ValueError(
                    f"`sft_pairing='prompt'` needs `steps_per_generation` ({self.steps_per_generation}) to be a "
                    f"multiple of `gradient_accumulation_steps` ({self.gradient_accumulation_steps}), so that the "
                    "demonstrations of an update are known at its first micro-batch."
                )
        check_config(self)

    @property
    def demonstration_batch_size(self) -> int:
        """Demonstrations per micro-batch and device with `sft_pairing="independent"`."""
        if self.sft_per_device_train_batch_size is not None:
            return self.sft_per_device_train_batch_size
        return max(1, self.per_device_train_batch_size // int(self.num_generations or 1))


def _require_choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ValueError(f"`{name}` must be one of {', '.join(map(repr, choices))}, got {value!r}.")

"""Arguments that every trainer with a demonstration stream shares."""

from dataclasses import field

from .options import above, at_least, one_of, options
from .refusals import check_config
from .student_config import StudentConfig


# What a trial reads besides its length.
_TRIAL = {
    "trial_learning_rate_factor": 3.0,
    "trial_eval_steps": 60,
    "trial_prompts": 64,
    "trial_tolerance": 0.005,
    "trial_takes_updates": False,
}


@options
class DemonstrationConfig(StudentConfig):
    """Configuration of GRPO with a demonstration stream: everything of [`~trl.GRPOConfig`], and the stream."""

    sft_per_device_train_batch_size: int | None = field(default=None, metadata=at_least(1))
    """Demonstrations in each micro-batch on each device. `None` takes one for each distinct prompt of the micro-batch,
    `per_device_train_batch_size // num_generations` and at least 1, so that the SFT pass costs about
    `1 / num_generations` of an RL pass at equal lengths. Not used with `sft_pairing='prompt'`."""
    sft_max_length: int | None = field(default=None, metadata=at_least(1))
    """Longest demonstration in tokens, prompt and completion together. `None` sets no limit."""
    sft_overlong: str = field(default="drop", metadata=one_of("drop", "truncate", "error"))
    """What happens to a demonstration longer than `sft_max_length`: 'drop' it, 'truncate' its end, or 'error'."""
    sft_pairing: str = field(default="independent", metadata=one_of("independent", "prompt"))
    """'independent' draws demonstrations without replacement, epoch by epoch; 'prompt' takes, for each group of
    rollouts, one demonstration of that very prompt."""

    # How demonstrations are weighted

    sft_weighting: str | None = field(
        default=None,
        metadata=one_of("none", "likelihood", "likelihood_sequence", "phi", "judge", "verdict", "judge_verdict"),
    )
    """Detached weight of the demonstrations' tokens. `None` and 'none' weigh all alike. 'likelihood',
    'likelihood_sequence' and 'phi' weigh by the policy's own probability `p` of the token, of the completion, or by
    `p (1 - p)`, normalised to mean one. 'judge' predicts from the rollouts the reward that goes with a likelihood,
    'verdict' asks the reward functions about the demonstration itself, 'judge_verdict' multiplies both; these three
    are absolute: bad data means less SFT."""
    judge_window: int = field(default=20, metadata=at_least(1))
    """Number of past windows (optimizer updates) whose rollouts the judge is fitted on."""
    judge_beta: float = field(default=4.0, metadata=at_least(0))
    """Exponent of the judge's weight: how sharply demonstrations below the policy's own reward fade out."""
    judge_penalty: float = field(default=1.0, metadata=above(0))
    """L2 penalty on the judge's slope."""
    judge_per_token: bool = False
    """Whether the judge reads the mean log-likelihood of a completion's tokens in place of their sum, by which a
    demonstration much longer than the rollouts is unlikely whatever it says."""
    verdict_calls: int = field(default=1, metadata=at_least(1))
    """Times the reward functions are called on a demonstration at each visit (once more at its first)."""
    success_threshold: float = 1.0
    """Reward from which a rollout or a demonstration counts as right."""

    # A trial before RL: `docs/bridge.md`

    trial_steps: int | None = field(default=None, metadata=at_least(1))
    """Updates of a trial before RL: the policy learns from verified demonstrations alone, and keeps what it has learnt if its
    rollouts are paid as well as before; else nothing has happened. `None` makes none."""
    trial_learning_rate_factor: float = field(default=3.0, metadata=above(0))
    """The trial's learning rate over `learning_rate`."""
    trial_eval_steps: int = field(default=60, metadata=at_least(1))
    """Every so many of its updates, and after the last one, rollouts are sampled and paid. The best point is kept."""
    trial_prompts: int = field(default=64, metadata=at_least(1))
    """Prompts of such a measurement, with `num_generations` rollouts each; rounded up to whole generation batches. The same
    prompts each time."""
    trial_tolerance: float = field(default=0.005, metadata=at_least(0))
    """How far below the policy's mean reward that of the best point may be."""
    trial_takes_updates: bool = False
    """Whether the updates that the measurements' rollouts are worth are taken off the end of the run, so that it samples as many
    as one without a trial. The learning rate's schedule stays that of `max_steps`."""

    def __post_init__(self) -> None:
        super().__post_init__()
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
        changed = [name for name, default in _TRIAL.items() if getattr(self, name) != default]
        if changed and self.trial_steps is None:
            raise ValueError(f"`{changed[0]}` has no effect without a trial. Set `trial_steps`, or remove it.")
        check_config(self, noisy_demonstrations=True)
        if self.neftune_noise_alpha is not None and self.sft_weighting not in (None, "none", "verdict"):
            raise NotImplementedError(
                f"`neftune_noise_alpha` is not supported with `sft_weighting={self.sft_weighting!r}`, whose likelihoods would be those "
                "of noisy passes. Set it to None, or take 'none' or 'verdict'."
            )

    @property
    def demonstration_batch_size(self) -> int:
        """Demonstrations per micro-batch and device with `sft_pairing="independent"`."""
        if self.sft_per_device_train_batch_size is not None:
            return self.sft_per_device_train_batch_size
        return max(1, self.per_device_train_batch_size // int(self.num_generations or 1))

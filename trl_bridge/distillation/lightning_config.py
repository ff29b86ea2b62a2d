"""Arguments of [`LightningOPDTrainer`]."""

from dataclasses import dataclass, field

from trl import SFTConfig

from ..objectives.distill import AGGREGATIONS
from ..training.support import check_best_model


# Field -> (value that it must have, why).
_FIXED = {
    "packing": (False, "scores belong to one sequence each"),
    "eval_packing": ((None, False), "scores belong to one sequence each"),
    "padding_free": (False, "the stored scores are padded with their rows"),
    "assistant_only_loss": (False, "the completion's tokens are trained, all of them"),
    "completion_only_loss": ((None, True), "the completion's tokens are trained, and no others have a score"),
    "loss_type": ("nll", "the loss is Lightning OPD's"),
    "label_smoothing_factor": (0.0, "the loss is Lightning OPD's"),
    "neftune_noise_alpha": (None, "its noise would enter the log-probabilities that are compared with the teacher's"),
    "parallelism_config": (None, "only data parallelism is built"),
    "enable_jit_checkpoint": (False, "it may save inside an update, which cannot be gone on with exactly"),
}


@dataclass
class LightningOPDConfig(SFTConfig):
    r"""
    Configuration of [`LightningOPDTrainer`]: everything of [`~trl.SFTConfig`] that does not concern its loss, and the
    fields below.

    Parameters:
        advantage_clip (`float`, *optional*, defaults to `10.0`):
            Bound of a token's advantage, in nats. `None` sets none, as in the released program; 10 is what readers of the
            paper's third version report.
        loss_aggregation (`str`, *optional*, defaults to `"sequence"`):
            `"sequence"` is the mean over sequences of each one's mean over its tokens (as published), `"token"` the mean
            over all tokens.
        require_same_teacher (`bool`, *optional*, defaults to `True`):
            Whether to refuse scores of another model than the one that wrote the student's SFT data.

    > [!NOTE]
    > These parameters have default values different from [`~trl.SFTConfig`]:
    > - `learning_rate`: Defaults to `2e-6` instead of `2e-5`.
    > - `max_length`: Defaults to `None` instead of `1024`: rollouts have the length that they were sampled with.
    """

    learning_rate: float = field(default=2e-6, metadata={"help": "The initial learning rate for AdamW."})
    max_length: int | None = field(
        default=None,
        metadata={"help": "Longest rollout in tokens, prompt included; longer ones lose their end. None: no limit."},
    )
    advantage_clip: float | None = field(
        default=10.0, metadata={"help": "Bound of a token's advantage, in nats. None sets none."}
    )
    loss_aggregation: str = field(
        default="sequence",
        metadata={
            "help": "'sequence': mean over sequences of their means over tokens (as published). 'token': mean over tokens.",
            "choices": list(AGGREGATIONS),
        },
    )
    require_same_teacher: bool = field(
        default=True,
        metadata={"help": "Whether to refuse scores of another model than the one that wrote the student's SFT data."},
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.advantage_clip is not None and self.advantage_clip <= 0:
            raise ValueError(f"`advantage_clip` must be above 0, or None for no bound, got {self.advantage_clip}.")
        if self.loss_aggregation not in AGGREGATIONS:
            known = " or ".join(map(repr, AGGREGATIONS))
            raise ValueError(f"`loss_aggregation` must be {known}, got {self.loss_aggregation!r}.")
        if self.max_length is not None and self.max_length < 2:
            raise ValueError(
                f"`max_length` must be at least 2 (a prompt's token and a trained one), got {self.max_length}."
            )
        for name, (allowed, reason) in _FIXED.items():
            value = getattr(self, name)
            if value not in (allowed if isinstance(allowed, tuple) else (allowed,)):
                raise NotImplementedError(f"`{name}={value!r}` is not supported by LightningOPDConfig: {reason}.")
        if self.truncation_mode != "keep_start":
            raise NotImplementedError(
                "`truncation_mode` must be 'keep_start': a rollout without its prompt has no score."
            )
        if (self.dataset_kwargs or {}).get("skip_prepare_dataset"):
            raise NotImplementedError(
                "`dataset_kwargs={'skip_prepare_dataset': True}` is not supported by LightningOPDConfig: rows are checked "
                "and laid out with their scores. Remove it."
            )
        check_best_model(self)

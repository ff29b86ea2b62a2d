"""Arguments of [`TwoStageTrainer`]."""

import copy
import dataclasses
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from transformers import TrainingArguments
from trl import GRPOConfig, SFTConfig


FOLDERS = ("sft", "grpo")
FINISHED = "finished.json"
# What the first stage does not take over from the run: evaluation and the hub are the second one's.
_SECOND_STAGE_ONLY = {
    "eval_strategy": "no",
    "do_eval": False,
    "eval_on_start": False,
    "load_best_model_at_end": False,
    "metric_for_best_model": None,
    "push_to_hub": False,
    "remove_unused_columns": True,
}
# Keys of TRL's SFT alone, and keys of both stages, with the prefix `sft_` in our config.
_SFT_ONLY = ("max_length", "packing", "completion_only_loss", "assistant_only_loss", "loss_type")
_OWN_PACE = ("learning_rate", "num_train_epochs", "max_steps", "warmup_steps")
_OVERRIDES = (
    "per_device_train_batch_size",
    "gradient_accumulation_steps",
    "lr_scheduler_type",
    "weight_decay",
    "max_grad_norm",
    "save_steps",
)


@dataclass
class TwoStageConfig(GRPOConfig):
    r"""
    Configuration of [`TwoStageTrainer`]: everything of [`~trl.GRPOConfig`] for the second stage, and `sft_*` for the
    first.

    A key with the prefix `sft_` is the first stage's key of [`~trl.SFTConfig`] without it. Pace and length of the stages
    are each stage's own (`learning_rate`, `num_train_epochs`, `max_steps`, `warmup_steps`: TRL's defaults of SFT where
    `sft_*` does not say otherwise). All other keys that the two have in common (`seed`, `bf16`, `report_to`,
    `logging_steps`, ...) serve both stages. Evaluation and the hub are the second stage's.

    > Parameters that control the first stage (SFT)

    Parameters:
        sft_learning_rate (`float`, *optional*, defaults to `2e-5`):
            Initial learning rate.
        sft_num_train_epochs (`float`, *optional*, defaults to `3.0`):
            Epochs over the demonstrations.
        sft_max_steps (`int`, *optional*, defaults to `-1`):
            Updates; above 0 it goes before `sft_num_train_epochs`.
        sft_warmup_steps (`float`, *optional*, defaults to `0.0`):
            Updates of the learning rate's warmup, or below 1 their share.
        sft_per_device_train_batch_size (`int`, *optional*):
            Demonstrations in each micro-batch on each device. `None` takes `per_device_train_batch_size`.
        sft_gradient_accumulation_steps (`int`, *optional*):
            Micro-batches of an update. `None` takes `gradient_accumulation_steps`.
        sft_lr_scheduler_type (`str`, *optional*):
            Schedule of the learning rate. `None` takes `lr_scheduler_type`.
        sft_weight_decay (`float`, *optional*):
            Weight decay. `None` takes `weight_decay`.
        sft_max_grad_norm (`float`, *optional*):
            Gradient clipping. `None` takes `max_grad_norm`.
        sft_save_steps (`float`, *optional*):
            Updates between checkpoints, or below 1 their share. `None` takes `save_steps`.
        sft_max_length (`int`, *optional*, defaults to `1024`):
            Longest demonstration in tokens, prompt and completion together; longer ones are cut. `None` sets no limit.
        sft_packing (`bool`, *optional*, defaults to `False`):
            Whether to pack demonstrations into sequences of `sft_max_length`.
        sft_completion_only_loss (`bool`, *optional*):
            Whether to train on completions alone. `None` does so for prompt-completion rows.
        sft_assistant_only_loss (`bool`, *optional*, defaults to `False`):
            Whether to train on the assistant's turns alone.
        sft_loss_type (`str`, *optional*, defaults to `"nll"`):
            Loss of [`~trl.SFTTrainer`].
    """

    sft_learning_rate: float = field(default=2e-5, metadata={"help": "SFT: initial learning rate."})
    sft_num_train_epochs: float = field(default=3.0, metadata={"help": "SFT: epochs over the demonstrations."})
    sft_max_steps: int = field(
        default=-1, metadata={"help": "SFT: updates; above 0 it goes before sft_num_train_epochs."}
    )
    sft_warmup_steps: float = field(
        default=0.0, metadata={"help": "SFT: updates of the learning rate's warmup, or below 1 their share."}
    )
    sft_per_device_train_batch_size: int | None = field(
        default=None,
        metadata={"help": "SFT: demonstrations in a micro-batch. None takes per_device_train_batch_size."},
    )
    sft_gradient_accumulation_steps: int | None = field(
        default=None, metadata={"help": "SFT: micro-batches of an update. None takes gradient_accumulation_steps."}
    )
    sft_lr_scheduler_type: str | None = field(
        default=None, metadata={"help": "SFT: schedule of the learning rate. None takes lr_scheduler_type."}
    )
    sft_weight_decay: float | None = field(
        default=None, metadata={"help": "SFT: weight decay. None takes weight_decay."}
    )
    sft_max_grad_norm: float | None = field(
        default=None, metadata={"help": "SFT: gradient clipping. None takes max_grad_norm."}
    )
    sft_save_steps: float | None = field(
        default=None, metadata={"help": "SFT: updates between checkpoints. None takes save_steps."}
    )
    sft_max_length: int | None = field(
        default=1024, metadata={"help": "SFT: longest demonstration in tokens; longer ones are cut."}
    )
    sft_packing: bool = field(default=False, metadata={"help": "SFT: pack demonstrations into full sequences."})
    sft_completion_only_loss: bool | None = field(
        default=None,
        metadata={"help": "SFT: train on completions alone. None does so for prompt-completion rows."},
    )
    sft_assistant_only_loss: bool = field(
        default=False, metadata={"help": "SFT: train on the assistant's turns alone."}
    )
    sft_loss_type: str = field(default="nll", metadata={"help": "SFT: loss of TRL's SFT trainer."})

    def first_stage(self) -> SFTConfig:
        """
        Configuration of the SFT stage.

        Returns:
            [`~trl.SFTConfig`]: with `output_dir/sft` as its folder.

        Raises:
            ValueError: as TRL raises it for a value that SFT cannot use.
        """
        shared: dict[str, Any] = {
            f.name: getattr(self, f.name) for f in dataclasses.fields(TrainingArguments) if f.init
        }
        own = {name: getattr(self, f"sft_{name}") for name in (*_OWN_PACE, *_SFT_ONLY, *_OVERRIDES)}
        kept = {name: value for name, value in own.items() if value is not None or name not in _OVERRIDES}
        shared |= {
            "model_init_kwargs": copy.copy(self.model_init_kwargs),
            "trust_remote_code": self.trust_remote_code,
            "pad_to_multiple_of": self.pad_to_multiple_of,
            "output_dir": str(self.folders[0]),
        }
        return SFTConfig(**{**shared, **_SECOND_STAGE_ONLY, **kept})

    def second_stage(self) -> "TwoStageConfig":
        """
        Configuration of the GRPO stage.

        Returns:
            [`TwoStageConfig`]: this one with `output_dir/grpo` as its folder.
        """
        args = copy.copy(self)
        args.output_dir = str(self.folders[1])
        if self.push_to_hub and self.hub_model_id is None:
            args.hub_model_id = Path(str(self.output_dir)).name
        return args

    @property
    def folders(self) -> tuple[Path, Path]:
        """Folders of the two stages."""
        first, second = (Path(str(self.output_dir)) / name for name in FOLDERS)
        return first, second

    @property
    def first_stage_finished(self) -> bool:
        """Whether `output_dir` holds a finished SFT stage."""
        return (self.folders[0] / FINISHED).is_file()

    def can_resume(self) -> bool:
        """Whether `output_dir` holds what `resume_from_checkpoint=True` can go on from."""
        return self.first_stage_finished or any(any(folder.glob("checkpoint-*")) for folder in self.folders)

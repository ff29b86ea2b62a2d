"""[`TwoStageTrainer`]: cold start, SFT and then RL, as one resumable run."""

import copy
import dataclasses
import gc
import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import is_peft_model
from datasets import Dataset, IterableDataset
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, Trainer, TrainingArguments
from transformers.trainer import TRAINER_STATE_NAME
from transformers.utils import logging
from trl import SFTConfig, SFTTrainer

from .._upstream import set_up_again
from ..demonstrations.rows import check_nulls, check_prompts, check_size
from ..generation.day import clock_template, stopped, today
from ..rewards.by_name import check_reward_funcs
from ..training.backends import backend_for
from ..training.backends.refusals import refuse_quantised
from ..training.checkpoint import folder as checkpoints
from ..training.checkpoint import lock
from ..training.checkpoint.registry import Registry
from ..training.checkpoint.resume import Sealed
from ..training.options import options
from ..training.refusals import refuse_pictures
from ..training.student_config import StudentConfig
from .packed_grpo import PackedGRPOTrainer


logger = logging.get_logger(__name__)

FOLDERS = ("sft", "grpo")
FINISHED = "finished.json"
DAY = "day.txt"
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


@options
class TwoStageConfig(StudentConfig):
    """
    Configuration of [`TwoStageTrainer`]: everything of [`~trl.GRPOConfig`] for the second stage, and `sft_*` for the
    first.

    A key with the prefix `sft_` is the first stage's key of [`~trl.SFTConfig`] without it. Pace and length of the stages
    are each stage's own (`learning_rate`, `num_train_epochs`, `max_steps`, `warmup_steps`: TRL's defaults of SFT where
    `sft_*` does not say otherwise). All other keys that the two have in common (`seed`, `bf16`, `report_to`,
    `logging_steps`, ...) serve both stages. Evaluation and the hub are the second stage's.
    """

    sft_learning_rate: float = 2e-5
    """SFT: initial learning rate."""
    sft_num_train_epochs: float = 3.0
    """SFT: epochs over the demonstrations."""
    sft_max_steps: int = -1
    """SFT: updates; above 0 it goes before `sft_num_train_epochs`."""
    sft_warmup_steps: float = 0.0
    """SFT: updates of the learning rate's warmup, or below 1 their share."""
    sft_per_device_train_batch_size: int | None = None
    """SFT: demonstrations in each micro-batch on each device. `None` takes `per_device_train_batch_size`."""
    sft_gradient_accumulation_steps: int | None = None
    """SFT: micro-batches of an update. `None` takes `gradient_accumulation_steps`."""
    sft_lr_scheduler_type: str | None = None
    """SFT: schedule of the learning rate. `None` takes `lr_scheduler_type`."""
    sft_weight_decay: float | None = None
    """SFT: weight decay. `None` takes `weight_decay`."""
    sft_max_grad_norm: float | None = None
    """SFT: gradient clipping. `None` takes `max_grad_norm`."""
    sft_save_steps: float | None = None
    """SFT: updates between checkpoints, or below 1 their share. `None` takes `save_steps`."""
    sft_max_length: int | None = 1024
    """SFT: longest demonstration in tokens, prompt and completion together; longer ones are cut. `None` sets no
    limit."""
    sft_packing: bool = False
    """SFT: whether to pack demonstrations into sequences of `sft_max_length`."""
    sft_completion_only_loss: bool | None = None
    """SFT: whether to train on completions only. `None` does so for prompt-completion rows."""
    sft_assistant_only_loss: bool = False
    """SFT: whether to train on the assistant's turns only."""
    sft_loss_type: str = "nll"
    """SFT: loss of TRL's SFT trainer."""

    def first_stage(self) -> SFTConfig:
        """Configuration of the SFT stage."""
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
        """Configuration of the GRPO stage."""
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
        """Whether `output_dir` holds what `resume_from_checkpoint=True` can resume from."""
        return self.first_stage_finished or any(any(folder.glob("checkpoint-*")) for folder in self.folders)


class _ColdStart(Sealed, SFTTrainer):
    """TRL's SFT, whose chat template's clock stands at the day of the run's first start."""

    def __init__(self, *args: Any, day: str, **kwargs: Any):
        self.day = day
        super().__init__(*args, **kwargs)

    def _prepare_dataset(self, dataset: Any, processing_class: Any, *args: Any, **kwargs: Any) -> Any:
        template = clock_template(processing_class, self.chat_template)
        if template is not None:
            self.chat_template = stopped(template, self.day)
        return super()._prepare_dataset(dataset, processing_class, *args, **kwargs)


class _Reinforcement(PackedGRPOTrainer):
    """The second stage, whose arguments are those of both."""

    config_class = StudentConfig
    _name = "a cold start (SFT, then GRPO)"

    def register_state(self, saved: Registry) -> None:
        super().register_state(saved)
        saved.must_match(trainer="ResumableTrainer")  # as in the checkpoints that there are


class TwoStageTrainer:
    """
    Cold start: TRL's [`~trl.SFTTrainer`] on the demonstrations, then TRL's GRPO on the RL rows, as one run.

    The stages write to `output_dir/sft` and `output_dir/grpo`. The second starts from what the first has saved, model and
    tokenizer, once the first one's model is released. With a `peft_config` one adapter goes through both stages. GRPO is
    [`PackedGRPOTrainer`], which resumes exactly.

    Args:
        model (`str` or [`~transformers.PreTrainedModel`]):
            Model to start from; a name or path where there is a `peft_config`.
        reward_funcs, train_dataset, eval_dataset, reward_processing_classes:
            As in [`~trl.GRPOTrainer`].
        args ([`TwoStageConfig`]):
            Configuration.
        sft_dataset ([`~datasets.Dataset`]):
            Demonstrations in any of TRL's SFT formats.
        processing_class ([`~transformers.PreTrainedTokenizerBase`], *optional*):
            Tokenizer. `None` takes the model's.
        callbacks (`list[~transformers.TrainerCallback]`, *optional*):
            Callbacks of both stages.
        quantization_config, peft_config:
            As in [`~trl.GRPOTrainer`].

    Raises:
        ValueError, TypeError, NotImplementedError: an argument cannot be used; the message names it and what to do.
    """

    card_lines: Sequence[str] = ()

    def __init__(
        self,
        model: "str | PreTrainedModel",
        reward_funcs: Any = None,
        args: TwoStageConfig | None = None,
        train_dataset: Dataset | IterableDataset | None = None,
        sft_dataset: Dataset | IterableDataset | None = None,
        eval_dataset: Any = None,
        processing_class: Any = None,
        reward_processing_classes: Any = None,
        callbacks: Any = None,
        quantization_config: Any = None,
        peft_config: Any = None,
    ):
        if not isinstance(args, TwoStageConfig):
            raise TypeError(f"`args` of TwoStageTrainer must be a `TwoStageConfig`, got `{type(args).__name__}`.")
        # The second stage is built once the first is over, so what it needs is looked for now.
        if sft_dataset is None:
            raise ValueError("TwoStageTrainer needs `sft_dataset`: demonstrations in any of TRL's SFT formats.")
        if train_dataset is None:
            raise ValueError("TwoStageTrainer needs a `train_dataset` with a `prompt` column for its RL stage.")
        check_nulls(sft_dataset, "sft_dataset")
        check_prompts(train_dataset, "train_dataset")
        check_prompts(eval_dataset, "eval_dataset")
        rollouts: Any = args.generation_batch_size
        check_size(train_dataset, rollouts // args.num_generations)
        if not reward_funcs:
            raise ValueError("TwoStageTrainer needs `reward_funcs` for its RL stage.")
        check_reward_funcs(reward_funcs)
        if peft_config is not None and not isinstance(model, str):
            raise NotImplementedError(
                "`peft_config` with a model object is not supported: the second stage loads the base again. Pass the "
                "model's name or path."
            )
        rows = {"sft_dataset": sft_dataset, "train_dataset": train_dataset, "eval_dataset": eval_dataset}
        refuse_pictures("TwoStageTrainer", processing_class, model, **rows)
        self.args = args
        self._first_args = args.first_stage()
        self._model: Any = model
        self._by_name = isinstance(model, str)
        self._processing_class = processing_class
        self._sft_dataset = sft_dataset
        self._rl: dict[str, Any] = {
            "reward_funcs": reward_funcs,
            "train_dataset": train_dataset,
            "eval_dataset": eval_dataset,
            "reward_processing_classes": reward_processing_classes,
        }
        self._callbacks = callbacks
        self._quantization_config = quantization_config
        self._peft_config = peft_config
        self._day = today()
        self._second: PackedGRPOTrainer | None = None

    def train(self, resume_from_checkpoint: bool | None = None) -> Any:
        """Run both stages."""
        with lock.held(str(self.args.output_dir)):
            return self._run_stages(resume_from_checkpoint)

    def _run_stages(self, resume_from_checkpoint: bool | None) -> Any:
        self._check_resume(resume_from_checkpoint)
        first, second = self.args.folders
        checkpoint = None
        self._day = checkpoints.agreed(lambda: _first_day(first, bool(resume_from_checkpoint)))
        if resume_from_checkpoint and checkpoints.agreed(lambda: self.args.first_stage_finished):
            checkpoint = checkpoints.agreed(lambda: checkpoints.latest(second))
        else:
            self._run_first_stage(resume=bool(resume_from_checkpoint))
        self._second = self._build_second_stage(first)
        return self._second.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))

    def _check_resume(self, resume_from_checkpoint: Any) -> None:
        args = self.args
        if resume_from_checkpoint not in (None, False, True):
            raise ValueError(
                f"`resume_from_checkpoint={resume_from_checkpoint!r}`: a two-stage run finds the checkpoint itself. Set "
                "it to true, and `output_dir` to the run's folder."
            )
        held = checkpoints.agreed(args.can_resume)
        if not resume_from_checkpoint and held:
            raise ValueError(
                f"`output_dir`: {args.output_dir!r} holds an earlier two-stage run. Set `resume_from_checkpoint` to resume "
                "it, remove it, or take another folder."
            )
        if resume_from_checkpoint and not held:
            raise ValueError(f"`resume_from_checkpoint` is set, but {args.output_dir!r} holds no two-stage run.")
        if resume_from_checkpoint and args.save_only_model:
            raise ValueError("`resume_from_checkpoint` needs checkpoints that were made with `save_only_model=False`.")

    # The stages

    def _run_first_stage(self, resume: bool) -> None:
        folder = self.args.folders[0]
        checkpoint = checkpoints.agreed(lambda: _latest(folder)) if resume else None
        steps = None if checkpoint is None else checkpoints.agreed(lambda: _steps_of_finished(checkpoint))
        if checkpoint is not None and steps is not None:
            # Cut off between its last checkpoint and its end; transformers would make one update more.
            if PartialState().is_main_process:
                _copy_model(checkpoint, folder)
        else:
            trainer = self._sft_trainer()
            # A model object is not needed again: the second stage loads what this one saves.
            self._model = self._model if self._by_name else None
            trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
            trainer.save_model(str(folder))
            steps = trainer.state.global_step
            # Trainers are reference cycles: without this, two models would be held.
            trainer.accelerator.free_memory()
            del trainer
            gc.collect()
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
        PartialState().wait_for_everyone()
        if PartialState().is_main_process:
            (folder / FINISHED).write_text(json.dumps({"global_step": steps}))
        PartialState().wait_for_everyone()

    def _sft_trainer(self) -> SFTTrainer:
        trainer = _ColdStart(
            day=self._day,
            model=self._model,
            args=self._first_args,
            train_dataset=self._sft_dataset,
            processing_class=self._processing_class,
            callbacks=self._callbacks,
            quantization_config=self._quantization_config,
            peft_config=self._peft_config,
        )
        refuse_pictures("TwoStageTrainer", trainer.processing_class, trainer.model)
        self._check_backend(trainer)
        return trainer

    def _check_backend(self, trainer: Trainer) -> None:
        backend_for(trainer.accelerator).check(self.args)
        model = trainer.accelerator.unwrap_model(trainer.model)
        if is_peft_model(model):
            refuse_quantised(trainer.accelerator.distributed_type, model.get_base_model())

    def _build_second_stage(self, folder: Path) -> PackedGRPOTrainer:
        model, processing_class = self._load(folder)
        args = self.args.second_stage()
        # What FSDP and DeepSpeed are told of accumulation and clipping is each stage's own.
        set_up_again(args)
        if not self._by_name:
            # A model object's own dtype, which the first stage has saved it in.
            args.model_init_kwargs = {"dtype": "auto"}
        trainer = _Reinforcement(
            model=model, args=args, processing_class=processing_class, callbacks=self._callbacks, **self._rl
        )
        self._check_backend(trainer)
        trainer.take_over({"day": self._day})
        return trainer

    def _load(self, folder: Path) -> tuple[Any, Any]:
        """Student and tokenizer that a stage has saved."""
        tokenizer = AutoTokenizer.from_pretrained(
            folder, truncation_side="left", padding_side="left", trust_remote_code=self.args.trust_remote_code
        )
        if self._peft_config is None:
            return str(folder), tokenizer
        given: Any = self.args.model_init_kwargs or {}
        options = {"dtype": "float32", **given}
        base = AutoModelForCausalLM.from_pretrained(
            self._model, quantization_config=self._quantization_config, **options
        )
        return PeftModel.from_pretrained(base, str(folder), is_trainable=True), tokenizer

    # What scripts call afterwards

    @property
    def trainer(self) -> PackedGRPOTrainer:
        """The second stage's trainer; there is one once `train` has reached that stage."""
        if self._second is None:
            raise RuntimeError("The RL stage has not started: call `train` first.")
        return self._second

    @property
    def accelerator(self) -> Any:
        """The second stage's accelerator."""
        return self.trainer.accelerator

    @property
    def hub_model_id(self) -> str | None:
        """Repository that `push_to_hub` pushes to."""
        return self.trainer.hub_model_id

    def save_model(self, output_dir: str | None = None) -> None:
        """Save the final policy; at the top of `output_dir` unless told otherwise."""
        self.trainer.save_model(output_dir or str(self.args.output_dir))

    def create_model_card(self, **kwargs: Any) -> None:
        """As TRL's trainers, in the second stage's folder and at the top of `output_dir`."""
        self.trainer.card_lines = self.card_lines
        self.trainer.create_model_card(**kwargs)
        if self.trainer.is_world_process_zero():
            last, top = (f"{args.output_dir}/README.md" for args in (self.trainer.args, self.args))
            shutil.copyfile(last, top)

    def save_state(self) -> None:
        """As [`~transformers.Trainer.save_state`], of the second stage, at the top of `output_dir`."""
        if self.trainer.args.should_save:
            self.trainer.state.save_to_json(str(Path(str(self.args.output_dir)) / TRAINER_STATE_NAME))

    def push_to_hub(self, **kwargs: Any) -> Any:
        """As [`~transformers.Trainer.push_to_hub`]."""
        return self.trainer.push_to_hub(**kwargs)

    def end(self) -> None:
        """As [`~transformers.Trainer.end`]."""
        self.trainer.end()


def _progress(checkpoint: Path) -> dict[str, Any] | None:
    """Trainer state of a checkpoint, which transformers writes last; `None` where saving was cut off before it."""
    try:
        return json.loads((checkpoint / TRAINER_STATE_NAME).read_text())
    except (FileNotFoundError, json.JSONDecodeError):
        return None


def _first_day(folder: Path, resumed: bool) -> str:
    """The day of a run's first start, kept in the first stage's folder."""
    kept = folder / DAY
    if not resumed or not kept.is_file():
        folder.mkdir(parents=True, exist_ok=True)
        kept.write_text(today())
    return kept.read_text()


def _steps_of_finished(checkpoint: Path) -> int | None:
    """Updates that the checkpoint of a stage's end has behind it; `None` where the stage was not at its end."""
    state = _progress(checkpoint)
    return state["global_step"] if state is not None and state["global_step"] >= state["max_steps"] else None


def _copy_model(checkpoint: Path, folder: Path) -> None:
    """Model and tokenizer of a checkpoint, to where the stage's end would have saved them."""
    for file in checkpoint.iterdir():
        if file.is_file() and file.suffix not in (".pt", ".pth", ".bin") and file.name != TRAINER_STATE_NAME:
            shutil.copy2(file, folder / file.name)


def _latest(folder: Path) -> Path | None:
    for checkpoint in checkpoints.numbered(folder):
        wrong = "was cut off while saving" if _progress(checkpoint) is None else checkpoints.damaged(checkpoint)
        if wrong is None:
            return checkpoint
        logger.warning(f"Passing over {checkpoint}: it {wrong}.")
    return None

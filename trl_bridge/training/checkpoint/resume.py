"""Saving and resuming: TRL's checkpoint, and `bridge/` inside it."""

import functools
from collections import defaultdict
from pathlib import Path
from typing import Any, cast

import torch
from accelerate.utils import is_peft_model, send_to_device
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer import SCHEDULER_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR
from transformers.utils import logging
from trl import GRPOTrainer

from ..._upstream import SERVER_GONE, keep_4_bit_weights
from ...demonstrations.rows import check_prompts, check_size
from ...generation.day import clock_template, stopped, today
from ..backends import Backend, backend_for
from ..randomness import seed_anew
from . import folder as checkpoints
from . import lock
from .drift import rows_hash
from .layout import RANKS, reshard_rollouts
from .registry import LOCAL, Registry, Value, attribute
from .seal import Background


logger = logging.get_logger(__name__)


class Sealed(Trainer):
    """A trainer whose checkpoints have a marker, written last, that vouches for all of their files."""

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        keep_4_bit_weights(cast(torch.nn.Module, self.model))

    @functools.cached_property
    def _sealing(self) -> Background:
        return Background()

    @property
    def description(self) -> dict[str, Any] | None:
        """What the marker says besides; `None` for no marker."""
        return {}

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """As [`~transformers.Trainer.train`]."""
        try:
            result = super().train(*args, **kwargs)
        finally:
            self._sealing.wait()
        self.accelerator.wait_for_everyone()
        return result

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        args = self.args
        self._sealing.wait()
        folder = Path(self._get_output_dir(trial=trial)) / f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
        checkpoints.clear(folder, self.accelerator)
        # TRL's trainer uploads and rotates before the checkpoint is whole: both are done below, in this order.
        last = {"save_total_limit": None, "push_to_hub": False}
        kept = {name: getattr(args, name) for name in last}
        vars(args).update(last)
        try:
            super()._save_checkpoint(model, trial)
        finally:
            vars(args).update(kept)
        self.accelerator.wait_for_everyone()
        state = self.state
        rest = functools.partial(
            checkpoints.finish,
            folder,
            state.global_step,
            None if args.save_only_model else self.description,
            limit=args.save_total_limit,
            best=state.best_model_checkpoint,
        )
        if self.accelerator.is_main_process:
            self._sealing.start(rest)
        if args.push_to_hub:
            self._sealing.wait()
            self._push_from_checkpoint(str(folder))

    def _finalize_training(self, *args: Any, **kwargs: Any) -> Any:
        self._sealing.wait()  # it deletes checkpoints
        return super()._finalize_training(*args, **kwargs)


class _Stepping(TrainerCallback):
    """Notes when an update's gradients are whole and `global_step` does not count it yet."""

    under_way = False

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.under_way = False  # an exception may have cut off an earlier call of `train`

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.under_way = False


class Resumable(Sealed):
    """
    The part of an exact resume that any TRL trainer can carry: `class Mine(Resumable, SFTTrainer)`.

    A side folder in the checkpoint with what subclasses add in `register_state`, a marker of completeness written last,
    refusals of checkpoints that cannot be resumed exactly, and the metrics gathered since the last log. Another number of
    ranks may resume a checkpoint where its updates are of the same rows.
    """

    _metrics: dict[str, Any]

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self._stepping = _Stepping()
        self.callback_handler.callbacks.insert(0, self._stepping)  # before user callbacks, which may save

    @functools.cached_property
    def backend(self) -> Backend:
        """How gradients, weights and checkpoints are reached on this distributed backend."""
        return backend_for(self.accelerator)

    # What subclasses add

    @property
    def saved(self) -> Registry:
        """What a checkpoint of this run holds, as it is now: parts are built late, and options may still be changed."""
        registry = Registry(self.args)
        self.register_state(registry)
        return registry

    def register_state(self, saved: Registry) -> None:
        """Add state that outlives an update, and name what a resumed run must share."""
        sizes = ("per_device_train_batch_size", "gradient_accumulation_steps")
        saved.layout |= {RANKS: self.args.world_size, **{name: getattr(self.args, name) for name in sizes}}
        saved.only_same_ranks = self.backend.bound_to_ranks
        # "way of training": the backend, spelt as in the checkpoints that there are.
        saved.must_match("seed", trainer=type(self).__name__, **{"way of training": self.backend.checkpoint_kind})
        # The optimizer brings these back with its state, so changed ones would be ignored.
        saved.must_match("learning_rate", "weight_decay", "adam_beta1", "adam_beta2", "adam_epsilon")
        metrics = self._metrics
        since_last_log = Value(
            lambda: dict(metrics["train"]), lambda state: metrics.update(train=defaultdict(list, state))
        )
        saved.add("metrics", since_last_log, LOCAL)

    @property
    def description(self) -> dict[str, Any] | None:
        return None if self._is_cut else self.saved.description

    def build_parts(self) -> None:
        """Build, once, what needs the student as `train` has prepared it. Called before a checkpoint is loaded."""

    def take_over(self, first_start: dict[str, Any]) -> None:
        """Go by what a resumed run decided at its first start. Called before the checkpoint is compared with this run."""

    @property
    def inside_update(self) -> bool:
        """Whether some micro-batches of an update are done and others are not."""
        return False

    @property
    def _is_cut(self) -> bool:
        return self.inside_update or self._stepping.under_way

    # TRL's methods

    def training_step(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        loss = super().training_step(*args, **kwargs)
        self._stepping.under_way = self.accelerator.sync_gradients
        return loss

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        """
        As [`~transformers.Trainer.train`]. `resume_from_checkpoint=True` takes the newest checkpoint that is whole. Refused
        while another run writes to `output_dir`.
        """
        with lock.held(str(self.args.output_dir)):
            folder = Path(str(self.args.output_dir))
            found: Path | None = None
            if resume_from_checkpoint:
                wanted = None if resume_from_checkpoint is True else Path(resume_from_checkpoint)
                found = checkpoints.whole(folder, wanted)
                self.take_over(checkpoints.first_start_of(found))
                checkpoints.check_run(found, self.saved)
            else:
                checkpoints.say_what_is_there(folder)
            return super().train(None if found is None else str(found), *args, **kwargs)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        super()._save_optimizer_and_scheduler(output_dir)
        if self._is_cut:
            logger.warning(
                f"{output_dir} is saved inside an update, which cannot be resumed exactly: it is not marked as "
                "complete, and `resume_from_checkpoint=True` will pass over it."
            )
            return
        checkpoints.write(Path(output_dir), self.accelerator, self.saved)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is None:
            return
        folder = Path(checkpoint)
        if self.backend.loads_optimizer(self.optimizer):
            super()._load_optimizer_and_scheduler(checkpoint)
        else:
            # All that TRL's trainer would restore here, besides what is in our own state.
            scheduler: Any = self.lr_scheduler
            scheduler.load_state_dict(torch.load(folder / SCHEDULER_NAME, weights_only=True))
            for group, rate in zip(self.optimizer.param_groups, scheduler.get_last_lr(), strict=True):
                group["lr"] = rate
        self.build_parts()
        checkpoints.read(folder, self.saved, self.accelerator.process_index)

    def _prepare_for_training(self, *args: Any, **kwargs: Any) -> Any:
        prepared = super()._prepare_for_training(*args, **kwargs)
        self.build_parts()  # where no checkpoint was loaded
        return prepared

    def _load_rng_state(self, checkpoint: str | None) -> None:
        if checkpoint is None or checkpoints.layout_of(Path(checkpoint))[RANKS] == self.args.world_size:
            super()._load_rng_state(checkpoint)
        else:
            # Not those of the run's start, which would draw the first updates' numbers again.
            seed_anew(self.args.seed, self.state.global_step, self.args.process_index)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, *args: Any, **kwargs: Any) -> None:
        super()._load_from_checkpoint(resume_from_checkpoint, *args, **kwargs)
        self._load_renamed(resume_from_checkpoint)

    def _load_renamed(self, checkpoint: str) -> None:
        # transformers saves some models under other names than their own (vision-language models, experts one by one), and its
        # trainer goes on without the weights that it does not find.
        model: Any = self.accelerator.unwrap_model(self.model)
        if is_peft_model(model) or self.is_fsdp_enabled or self.is_deepspeed_enabled:
            return  # they are saved by their own names
        if not checkpoints.names_of_weights(Path(checkpoint)) <= set(model.state_dict()):
            model.load_state_dict(type(model).from_pretrained(checkpoint, dtype=model.dtype).state_dict())

    def _load_best_model(self) -> None:
        super()._load_best_model()
        self._load_renamed(str(self.state.best_model_checkpoint))
        checkpoints.read_weights(Path(str(self.state.best_model_checkpoint)), self.saved)

    def _run_epoch(self, *args: Any, **kwargs: Any) -> None:
        # TRL's trainer looks for the end only after an update: resuming a finished run would make one more.
        if self.state.global_step >= self.state.max_steps:
            self.control.should_training_stop = True
        else:
            super()._run_epoch(*args, **kwargs)


class BufferResumable(Resumable):
    """
    [`Resumable`] for TRL's trainers that generate for several micro-batches at once (GRPO, distillation).

    They save neither their generation buffer nor their micro-batch counter, and forget the order of a second epoch. Their
    chat template's clock stands at the day of the run's first start.
    """

    _step: int
    _buffered_inputs: Any
    chat_template: str | None

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        for what in ("train_dataset", "eval_dataset"):
            check_prompts(getattr(self, what), what)
        check_size(self.train_dataset, self.prompts_per_generation)
        # The day that prompts and demonstrations print; None where the template prints none.
        self.template_day: str | None = None
        self._clock_template = clock_template(self._tokenizer, self.chat_template)
        if self._clock_template is not None:
            self._stop_clock(checkpoints.agreed(today))
            if self.accelerator.is_main_process:
                logger.warning(
                    f"The chat template prints the day: it stays {self.template_day} for the whole run, and a resumed run goes on "
                    "with the day of its first start. What `chat_template_kwargs` say (such as `date_string`) wins."
                )

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """As [`Resumable.train`]; a server of rollouts or of a teacher that goes away is named."""
        try:
            return super().train(*args, **kwargs)
        except SERVER_GONE as error:
            newest = checkpoints.latest(Path(str(self.args.output_dir)))
            go_on = f"`resume_from_checkpoint=True` goes on from {newest}" if newest else "there is no checkpoint yet"
            request = getattr(error, "request", None)
            where = "A server" if request is None else f"The server of {request.url}"
            raise ConnectionError(f"{where} does not answer any more. Start it again; {go_on}.") from error

    @functools.cached_property
    def _rows_hash(self) -> str | None:
        return rows_hash(self.train_dataset)

    @property
    def prompts_per_generation(self) -> int:
        """Prompts of one generation batch, over all ranks."""
        return self.args.per_device_train_batch_size * self.args.world_size * self.args.gradient_accumulation_steps

    def _stop_clock(self, day: str) -> None:
        self.template_day, self.chat_template = day, stopped(str(self._clock_template), day)

    def take_over(self, first_start: dict[str, Any]) -> None:
        super().take_over(first_start)
        day = first_start.get("day")
        if self.template_day is not None and day not in (None, self.template_day):
            self._stop_clock(day)
            self.render_rows()

    def render_rows(self) -> None:
        """Render rows that training reads, once the chat template and its day are known. Nothing here."""

    def register_state(self, saved: Registry) -> None:
        super().register_state(saved)
        if self.template_day is not None:
            saved.first_start["day"] = self.template_day
        saved.must_match(train_dataset=self._rows_hash)
        saved.add("step", attribute(self, "_step"), LOCAL)
        saved.add("buffered_inputs", Value(lambda: self._buffered_inputs, self._load_rollouts), LOCAL)
        saved.reshard |= {"step": self._reshard_step, "buffered_inputs": self._reshard_rollouts}

    def _load_rollouts(self, state: Any) -> None:
        self._buffered_inputs = send_to_device(state, self.accelerator.device)

    @property
    def generation_cycle(self) -> int:
        """Micro-batches on each rank that one generation batch serves."""
        return self.args.gradient_accumulation_steps

    def _reshard_step(self, steps: list[int], layout: dict[str, int]) -> int:
        return steps[0] * self.args.gradient_accumulation_steps // layout["gradient_accumulation_steps"]

    def _reshard_rollouts(self, buffers: list[Any], layout: dict[str, int]) -> Any:
        # `_step` is loaded before.
        if self._step % self.generation_cycle == 0 or buffers[0] is None:
            return None  # used up
        count = self._reshard_step([len(buffers[0])], layout)
        accelerator, pad = self.accelerator, self._tokenizer.pad_token_id
        return reshard_rollouts(buffers, count, accelerator.num_processes, accelerator.process_index, pad)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is not None:
            self._advance_sampler(int(self.state.epoch or 0))

    def _prepare_for_training(self, max_steps: int, train_dataloader: Any, resume_from_checkpoint: Any) -> Any:
        # What an exception left behind in an earlier call of `train` is dropped; a resume loads its own.
        self._step, self._buffered_inputs = 0, None
        return super()._prepare_for_training(max_steps, train_dataloader, resume_from_checkpoint)

    def _get_train_sampler(self, *args: Any, **kwargs: Any) -> Any:
        self._train_sampler = super()._get_train_sampler(*args, **kwargs)
        return self._train_sampler

    def _advance_sampler(self, epochs: int) -> None:
        # The sampler draws each epoch's order from one running generator, which starts again in a new process.
        sampler = getattr(self, "_train_sampler", None)  # absent for an iterable dataset
        if sampler is not None and sampler.shuffle:
            for _ in range(epochs):
                torch.randperm(sampler.num_samples, generator=sampler.generator)


class ResumableTrainer(BufferResumable, GRPOTrainer):
    """
    A `GRPOTrainer` that resumes from a checkpoint bit for bit.

    TRL's trainer writes its entropy controller after old checkpoints are gone; it is saved here too.
    """

    @property
    def generation_cycle(self) -> int:
        return self.args.steps_per_generation * self.num_iterations

    @property
    def prompts_per_generation(self) -> int:
        return self.args.generation_batch_size // self.args.num_generations

    def register_state(self, saved: Registry) -> None:
        super().register_state(saved)
        saved.layout["steps_per_generation"] = self.args.steps_per_generation
        # Rollouts of a generation batch that is half used were sampled at one temperature.
        saved.must_match("num_generations", "num_iterations", "temperature")
        saved.told["reward_funcs"] = self.reward_func_names
        saved.add("entropy_coef", attribute(self, "entropy_coef"), LOCAL)
        saved.add("last_world_entropy", attribute(self, "_last_world_entropy"), LOCAL)

    def _prepare_for_training(self, *args: Any, **kwargs: Any) -> Any:
        self._entropy_window_stats = None
        return super()._prepare_for_training(*args, **kwargs)

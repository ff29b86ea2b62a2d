"""Saving and resuming: the parent's checkpoint, and `bridge/` beside it."""

import functools
from collections import defaultdict
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import send_to_device
from transformers import Trainer
from transformers.trainer import SCHEDULER_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR
from transformers.utils import logging
from trl import GRPOTrainer

from ..backends import Backend, backend_for
from ..randomness import seed_anew
from . import folder as checkpoints
from .layout import RANKS, recut, totals
from .sharded_state import RowState


logger = logging.get_logger(__name__)


class Resumable(Trainer):
    """
    The part of an exact resume that any TRL trainer can carry: `class Mine(Resumable, SFTTrainer)`.

    A side folder in the checkpoint with what subclasses add through `shared_state` and `load_shared_state`, a marker of
    completeness written last, refusals of checkpoints that cannot be gone on with, and the metrics gathered since the
    last log. Another number of ranks may go on with a checkpoint where its updates are of the same rows.
    """

    _metrics: dict[str, Any]

    @functools.cached_property
    def backend(self) -> Backend:
        """How gradients, weights and checkpoints are reached on this way of training."""
        return backend_for(self.accelerator)

    # What subclasses add

    def shared_state(self) -> dict[str, Any]:
        """State that all ranks have alike: tensors and plain Python values, read back with `weights_only=True`."""
        return {}

    def local_state(self) -> dict[str, Any]:
        """State that each rank has of its own, of the same kinds."""
        return {}

    def row_states(self) -> dict[str, RowState]:
        """State whose rows may be spread over the ranks, by the name of its folder; built by `load_shared_state`."""
        return {}

    @property
    def inside_update(self) -> bool:
        """Whether some micro-batches of an update are done and others are not."""
        return False

    def load_shared_state(self, state: dict[str, Any]) -> None:
        """Take over what `shared_state` returned."""

    def load_local_state(self, state: dict[str, Any]) -> None:
        """Take over what `local_state` returned, after `load_shared_state`."""

    def load_best_shared_state(self, state: dict[str, Any]) -> None:
        """Take over the weights of the best checkpoint, and no more, from what `shared_state` returned there."""

    def layout(self) -> dict[str, int]:
        """How an update is cut into ranks and micro-batches, which a resumed run may change (see [`training.layout`])."""
        names = ("per_device_train_batch_size", "gradient_accumulation_steps")
        return {RANKS: self.args.world_size, **{name: getattr(self.args, name) for name in names}}

    def bound_to_ranks(self) -> str | None:
        """Why a checkpoint can be gone on with by as many ranks as wrote it alone; `None` where it can by others."""
        return self.backend.bound_to_ranks

    def resume_requirements(self) -> dict[str, Any]:
        """Options that a resumed run must share with the checkpoint, as JSON values."""
        return {
            "trainer": type(self).__name__,
            "way of training": self.backend.checkpoint_kind,
            "seed": self.args.seed,
            **totals(self.layout()),
        }

    # What the bases below add for the parent

    def progress_state(self) -> dict[str, Any]:
        """What the parent has on each rank between two updates and does not save itself."""
        return {"metrics": dict(self._metrics["train"])}

    def load_progress_state(self, state: dict[str, Any]) -> None:
        """Take over what `progress_state` returned, before `load_shared_state`."""
        self._metrics["train"] = defaultdict(list, state["metrics"])

    def recut_local_state(self, states: list[dict[str, Any]], layout: dict[str, int]) -> dict[str, Any]:
        """This rank's local state where an update was cut otherwise."""
        return states[0]

    # The parent's methods

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        """
        As [`~transformers.Trainer.train`]. `resume_from_checkpoint=True` passes over an unfinished newest checkpoint.
        """
        if resume_from_checkpoint is True:
            found = checkpoints.agreed(lambda: checkpoints.latest(Path(str(self.args.output_dir))))
            if found is None:
                raise ValueError(f"`resume_from_checkpoint`: no whole checkpoint in {self.args.output_dir!r}.")
            resume_from_checkpoint = str(found)
        if resume_from_checkpoint:
            folder, layout = Path(resume_from_checkpoint), self.layout()
            checkpoints.check(folder, self.resume_requirements(), layout, self.bound_to_ranks())
            ranks = checkpoints.layout_of(folder)[RANKS]
            if ranks != layout[RANKS] and self.accelerator.is_main_process:
                logger.warning(
                    f"{resume_from_checkpoint} was written by {ranks} ranks and is gone on with by {layout[RANKS]}: from "
                    "the same weights, optimizer states, prompts and demonstrations, but with random numbers (of sampling "
                    "and dropout) other than those of an uninterrupted run."
                )
        return super().train(resume_from_checkpoint or None, *args, **kwargs)

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        folder = Path(self._get_output_dir(trial=trial)) / f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
        if self.args.should_save:
            checkpoints.discard_marker(folder)
        super()._save_checkpoint(model, trial)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        super()._save_optimizer_and_scheduler(output_dir)
        if self.inside_update:
            logger.warning(
                f"{output_dir} is saved inside an update, which cannot be gone on with exactly: it is not marked as "
                "whole, and `resume_from_checkpoint=True` will pass over it."
            )
            return
        rows = self.row_states()
        # Here, because the parent rotates and uploads checkpoints once this and its own state are written.
        checkpoints.write(
            Path(output_dir),
            self.accelerator,
            local={
                **self.local_state(),
                **self.progress_state(),
                "rows": {name: state.rest() for name, state in rows.items()},
            },
            shared=self.shared_state() if self.accelerator.is_main_process else {},
            rows=rows,
            requirements=self.resume_requirements(),
            layout=self.layout(),
            step=self.state.global_step,
            parts=self.backend.checkpoint_parts,
        )

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is None:
            return
        folder = Path(checkpoint)
        if self.backend.loads_optimizer(self.optimizer):
            super()._load_optimizer_and_scheduler(checkpoint)
        else:
            # All that the parent would restore here, beside what is in our own state.
            scheduler: Any = self.lr_scheduler
            scheduler.load_state_dict(torch.load(folder / SCHEDULER_NAME, weights_only=True))
            for group, rate in zip(self.optimizer.param_groups, scheduler.get_last_lr(), strict=True):
                group["lr"] = rate
        layout = checkpoints.layout_of(folder)
        if layout == self.layout():
            local = checkpoints.read_local(folder, self.accelerator.process_index)
        else:
            local = self.recut_local_state([checkpoints.read_local(folder, r) for r in range(layout[RANKS])], layout)
        self.load_progress_state(local)
        self.load_shared_state(checkpoints.read_shared(folder))
        self.load_local_state(local)
        for name, state in self.row_states().items():
            state.load(checkpoints.rows_folder(folder, name), local["rows"][name])

    def _load_rng_state(self, checkpoint: str | None) -> None:
        if checkpoint is None or checkpoints.layout_of(Path(checkpoint))[RANKS] == self.args.world_size:
            super()._load_rng_state(checkpoint)
        else:
            # Not those of the run's start, which would draw the first updates' numbers once more.
            seed_anew(self.args.seed, self.state.global_step, self.args.process_index)

    def _load_best_model(self) -> None:
        super()._load_best_model()
        best = Path(str(self.state.best_model_checkpoint))
        self.load_best_shared_state(checkpoints.read_shared(best))
        for name, state in self.row_states().items():
            state.load_weights(checkpoints.rows_folder(best, name))

    def _run_epoch(self, *args: Any, **kwargs: Any) -> None:
        # The parent looks for the end after an update only: resuming a finished run would make one more.
        if self.state.global_step >= self.state.max_steps:
            self.control.should_training_stop = True
        else:
            super()._run_epoch(*args, **kwargs)


class BufferResumable(Resumable):
    """
    [`Resumable`] for TRL's trainers that generate for several micro-batches at once (GRPO, distillation).

    They save neither their generation buffer nor their micro-batch counter, and forget the order of a second epoch.
    """

    _step: int
    _buffered_inputs: Any

    def progress_state(self) -> dict[str, Any]:
        return {**super().progress_state(), "step": self._step, "buffered_inputs": self._buffered_inputs}

    def load_progress_state(self, state: dict[str, Any]) -> None:
        super().load_progress_state(state)
        self._step = state["step"]
        self._buffered_inputs = send_to_device(state["buffered_inputs"], self.accelerator.device)
        self._advance_sampler(int(self.state.epoch or 0))

    @property
    def generation_cycle(self) -> int:
        """Micro-batches on each rank that one generation batch serves."""
        return self.args.gradient_accumulation_steps

    def recut_local_state(self, states: list[dict[str, Any]], layout: dict[str, int]) -> dict[str, Any]:
        state = dict(super().recut_local_state(states, layout))
        micro_batches, before = self.args.gradient_accumulation_steps, layout["gradient_accumulation_steps"]
        state["step"] = state["step"] * micro_batches // before
        buffers = [each["buffered_inputs"] for each in states]
        if state["step"] % self.generation_cycle == 0 or buffers[0] is None:
            state["buffered_inputs"] = None  # used up
        else:
            count = len(buffers[0]) * micro_batches // before
            accelerator, pad = self.accelerator, self._tokenizer.pad_token_id
            state["buffered_inputs"] = recut(buffers, count, accelerator.num_processes, accelerator.process_index, pad)
        return state

    def _prepare_for_training(self, max_steps: int, train_dataloader: Any, resume_from_checkpoint: Any) -> Any:
        # What an exception left behind in an earlier call of `train` is not gone on with; a resume loads its own.
        self._step, self._buffered_inputs = 0, None
        return super()._prepare_for_training(max_steps, train_dataloader, resume_from_checkpoint)

    def _get_train_sampler(self, *args: Any, **kwargs: Any) -> Any:
        self._train_sampler = super()._get_train_sampler(*args, **kwargs)
        return self._train_sampler

    def _advance_sampler(self, epochs: int) -> None:
        # The sampler draws each epoch's order from one running generator, which starts anew in a new process.
        sampler = getattr(self, "_train_sampler", None)  # absent for an iterable dataset
        if sampler is not None and sampler.shuffle:
            for _ in range(epochs):
                torch.randperm(sampler.num_samples, generator=sampler.generator)


class ResumableTrainer(BufferResumable, GRPOTrainer):
    """
    A `GRPOTrainer` that goes on from a checkpoint bit for bit.

    The parent writes its entropy controller after old checkpoints are gone; it is kept here too.
    """

    def layout(self) -> dict[str, int]:
        return {**super().layout(), "steps_per_generation": self.args.steps_per_generation}

    @property
    def generation_cycle(self) -> int:
        return self.args.steps_per_generation * self.num_iterations

    def resume_requirements(self) -> dict[str, Any]:
        args = self.args
        return {
            **super().resume_requirements(),
            "num_generations": args.num_generations,
            "num_iterations": args.num_iterations,
        }

    def progress_state(self) -> dict[str, Any]:
        return {
            **super().progress_state(),
            "entropy_coef": self.entropy_coef,
            "last_world_entropy": self._last_world_entropy,
        }

    def load_progress_state(self, state: dict[str, Any]) -> None:
        super().load_progress_state(state)
        self.entropy_coef = state["entropy_coef"]
        self._last_world_entropy = state["last_world_entropy"]

    def _prepare_for_training(self, *args: Any, **kwargs: Any) -> Any:
        self._entropy_window_stats = None
        return super()._prepare_for_training(*args, **kwargs)

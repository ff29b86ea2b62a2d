"""Saving and resuming: the parent's checkpoint, and `bridge/` beside it."""

import functools
from collections import defaultdict
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import send_to_device
from transformers import Trainer
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR
from transformers.utils import logging
from trl import GRPOTrainer

from . import checkpoint as checkpoints
from .backends import Backend, backend_for


logger = logging.get_logger(__name__)


class Resumable(Trainer):
    """
    The part of an exact resume that any TRL trainer can carry: `class Mine(Resumable, SFTTrainer)`.

    A side folder in the checkpoint with what subclasses add through `shared_state` and `load_shared_state`, a marker of
    completeness written last, refusals of checkpoints that cannot be gone on with exactly, and the metrics gathered
    since the last log.
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

    def load_best_local_state(self, state: dict[str, Any]) -> None:
        """Take over the weights of the best checkpoint, and no more, from what `local_state` returned there."""

    def resume_requirements(self) -> dict[str, Any]:
        """Options that a resumed run must share with the checkpoint, as JSON values."""
        args = self.args
        return {
            "trainer": type(self).__name__,
            "world_size": args.world_size,
            "seed": args.seed,
            "per_device_train_batch_size": args.per_device_train_batch_size,
            "gradient_accumulation_steps": args.gradient_accumulation_steps,
        }

    # What the bases below add for the parent

    def progress_state(self) -> dict[str, Any]:
        """What the parent has on each rank between two updates and does not save itself."""
        return {"metrics": dict(self._metrics["train"])}

    def load_progress_state(self, state: dict[str, Any]) -> None:
        """Take over what `progress_state` returned, before `load_shared_state`."""
        self._metrics["train"] = defaultdict(list, state["metrics"])

    # The parent's methods

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        """
        As [`~transformers.Trainer.train`]. `resume_from_checkpoint=True` passes over an unfinished newest checkpoint.

        Raises:
            ValueError: the checkpoint lacks a part, or was made with other options; the message names it.
        """
        if resume_from_checkpoint is True:
            found = checkpoints.agreed(lambda: checkpoints.latest(Path(str(self.args.output_dir))))
            if found is None:
                raise ValueError(f"`resume_from_checkpoint`: no whole checkpoint in {self.args.output_dir!r}.")
            resume_from_checkpoint = str(found)
        if resume_from_checkpoint:
            checkpoints.check(Path(resume_from_checkpoint), self.resume_requirements())
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
        # Here, because the parent rotates and uploads checkpoints once this and its own state are written.
        checkpoints.write(
            Path(output_dir),
            self.accelerator,
            local={**self.local_state(), **self.progress_state()},
            shared=self.shared_state() if self.accelerator.is_main_process else {},
            requirements=self.resume_requirements(),
            step=self.state.global_step,
            parts=self.backend.checkpoint_parts,
        )

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is None:
            return
        folder = Path(checkpoint)
        local = checkpoints.read_local(folder, self.accelerator.process_index)
        self.load_progress_state(local)
        self.load_shared_state(checkpoints.read_shared(folder))
        self.load_local_state(local)

    def _load_best_model(self) -> None:
        super()._load_best_model()
        best = Path(str(self.state.best_model_checkpoint))
        self.load_best_shared_state(checkpoints.read_shared(best))
        self.load_best_local_state(checkpoints.read_local(best, self.accelerator.process_index))

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

    def resume_requirements(self) -> dict[str, Any]:
        args = self.args
        return {
            **super().resume_requirements(),
            "steps_per_generation": args.steps_per_generation,
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

"""Saving and resuming: the parent's checkpoint, and `bridge/` beside it."""

import functools
from collections import defaultdict
from pathlib import Path
from typing import Any

import torch
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR
from transformers.utils import logging
from trl import GRPOTrainer

from . import checkpoint as checkpoints
from .backends import Backend, backend_for


logger = logging.get_logger(__name__)


class ResumableTrainer(GRPOTrainer):
    """
    A `GRPOTrainer` that goes on from a checkpoint bit for bit.

    The parent saves neither its generation buffer nor its micro-batch counter, forgets the order of a second epoch,
    and writes its entropy controller after old checkpoints are gone; all of it is kept here, with what subclasses add
    through `shared_state` and `load_shared_state`.
    """

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
            "steps_per_generation": args.steps_per_generation,
            "num_generations": args.num_generations,
            "num_iterations": args.num_iterations,
        }

    # The parent's methods

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        """
        As [`~transformers.Trainer.train`]. `resume_from_checkpoint=True` passes over an unfinished newest checkpoint.

        Raises:
            ValueError: the checkpoint lacks a part, or was made with other options; the message names it.
        """
        if resume_from_checkpoint is True:
            found = checkpoints.latest(Path(str(self.args.output_dir)))
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
            local={
                **self.local_state(),
                "step": self._step,
                "buffered_inputs": self._buffered_inputs,
                "metrics": dict(self._metrics["train"]),
                "entropy_coef": self.entropy_coef,
                "last_world_entropy": self._last_world_entropy,
            },
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
        self._step = local["step"]
        self._buffered_inputs = _to_device(local["buffered_inputs"], self.accelerator.device)
        self._metrics["train"] = defaultdict(list, local["metrics"])
        self.entropy_coef = local["entropy_coef"]
        self._last_world_entropy = local["last_world_entropy"]
        self.load_shared_state(checkpoints.read_shared(folder))
        self.load_local_state(local)
        self._advance_sampler(int(self.state.epoch or 0))

    def _load_best_model(self) -> None:
        super()._load_best_model()
        best = Path(str(self.state.best_model_checkpoint))
        self.load_best_shared_state(checkpoints.read_shared(best))
        self.load_best_local_state(checkpoints.read_local(best, self.accelerator.process_index))

    def _prepare_for_training(self, max_steps: int, train_dataloader: Any, resume_from_checkpoint: Any) -> Any:
        # What an exception left behind in an earlier call of `train` is not gone on with; a resume loads its own.
        self._step, self._buffered_inputs, self._entropy_window_stats = 0, None, None
        return super()._prepare_for_training(max_steps, train_dataloader, resume_from_checkpoint)

    def _run_epoch(self, *args: Any, **kwargs: Any) -> None:
        # The parent looks for the end after an update only: resuming a finished run would make one more.
        if self.state.global_step >= self.state.max_steps:
            self.control.should_training_stop = True
        else:
            super()._run_epoch(*args, **kwargs)

    def _get_train_sampler(self, dataset: Any = None) -> Any:
        self._train_sampler = super()._get_train_sampler(dataset)
        return self._train_sampler

    def _advance_sampler(self, epochs: int) -> None:
        # The sampler draws each epoch's order from one running generator, which starts anew in a new process.
        sampler = getattr(self, "_train_sampler", None)  # absent for an iterable dataset
        if sampler is not None and sampler.shuffle:
            for _ in range(epochs):
                torch.randperm(sampler.num_samples, generator=sampler.generator)


def _to_device(batches: Any, device: torch.device) -> Any:
    if batches is None:
        return None
    return [
        {name: value.to(device) if isinstance(value, torch.Tensor) else value for name, value in batch.items()}
        for batch in batches
    ]

"""One process and DDP: every pass but a window's last runs unsynced, and the last one averages the sum."""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn
from torch.distributed.fsdp import MixedPrecisionPolicy
from transformers import PreTrainedModel

from .reducer import Reducer
from .sharding import meta_copy, shard
from .storage import MasterWeights, Storage
from .weights import ShardedWeights, Weights, copy_rows_, trained


class Backend(Reducer):
    """How gradients and weights are reached: one process, or DDP with a replica on each rank."""

    # Whether the engine steps inside the window's last backward.
    steps_in_backward = False
    # Reason why a checkpoint must be resumed on the same number of ranks; None if any number works.
    bound_to_ranks: str | None = None

    def check(self, args: Any) -> None:
        """Refuse options that this backend cannot have."""

    @property
    def keeps_master(self) -> bool:
        """Whether weights in 16 bits have a float32 master that the optimizer steps on."""
        return False

    @property
    def loads_everywhere(self) -> bool:
        """Whether every rank has the model's weights in the trainer's constructor."""
        return True

    @property
    def shards_copies(self) -> bool:
        """Whether the models alongside the student are sharded."""
        return self.world_size > 1

    @property
    def checkpoint_kind(self) -> str:
        """Which of TRL's formats a checkpoint has."""
        return "one process or DDP"

    # The student's passes

    def attach(self, model: nn.Module, before_step: Callable[[], None]) -> None:
        """Once the student is prepared, and before each call of `train`."""

    def before_micro_batch(self, model: nn.Module) -> None:
        """Before a micro-batch's first forward."""

    @contextlib.contextmanager
    def earlier_pass(self, model: nn.Module) -> Iterator[None]:
        """Forward and backward of a pass that is not the micro-batch's last: gradients stay on their rank."""
        with self.accelerator.no_sync(model):
            yield

    def backward(self, loss: torch.Tensor) -> None:
        """Backward of an earlier pass, outside the autocast that `compute_loss` is called under."""
        with torch.autocast(device_type=loss.device.type, enabled=False):
            self.accelerator.backward(loss)

    def last_backward(self, loss: torch.Tensor) -> None:
        """Backward of the last pass of a step that is not the student's; there the engine steps, if it does so."""
        self.backward(loss)

    def drop_gathered(self, model: nn.Module) -> None:
        """Before the student's weights are written to after a generation: no older copy of them is computed with."""

    def weights(self, model: nn.Module) -> Weights:
        """The student's weights and gradients; `model` is the unwrapped student as it stands now."""
        return Weights(model, self)

    def pieces(self, model: nn.Module) -> Weights:
        """The prepared student's trained weights as each rank stores them, for `shards`, `bounds` and `replaced`."""
        return Weights(trained(model), self)

    @contextlib.contextmanager
    def readable(self, parameter: nn.Parameter) -> Iterator[None]:
        """A weight of the student's before it is prepared, in full on the main process. Collective."""
        yield

    # Models alongside the student

    @contextlib.contextmanager
    def alongside(self) -> Iterator[None]:
        """Forward and backward of a model alongside the student."""
        yield

    def backward_alongside(self, loss: torch.Tensor) -> None:
        """Backward of a model alongside the student, outside the autocast that `compute_loss` is called under."""
        with torch.autocast(device_type=loss.device.type, enabled=False):
            loss.backward()

    def meta_copy(self, model: PreTrainedModel, copy: Callable[..., PreTrainedModel]) -> PreTrainedModel:
        """A copy of the unwrapped student without memory for weights, which `materialize` fills."""
        return meta_copy(model, copy)

    def wrap(self, model: PreTrainedModel, storage: Storage) -> Weights:
        """The weights of a full copy of the student, on one process."""
        return Weights(model, self) if storage == Storage() else MasterWeights(model, self, storage)

    def materialize(self, model: PreTrainedModel, source: Weights, storage: Storage) -> ShardedWeights:
        """Shard a meta copy and fill it with the student's weights. Collective."""
        policy = self.sharding_policy()
        if storage.dtype is not None:
            policy = MixedPrecisionPolicy(param_dtype=storage.dtype, reduce_dtype=torch.float32)
        return shard(model, source, self, policy, storage.offload)

    def sharding_policy(self) -> Any:
        """Precision of the sharded copies' passes (`MixedPrecisionPolicy`); `None` leaves it to autocast."""
        return None

    def prepare_reference(self, model: PreTrainedModel, offload: bool = False) -> nn.Module:
        """Prepare a frozen model for evaluation, as TRL prepares its reference; `offload` as in `place_frozen`."""
        return self.place_frozen(self.accelerator.prepare_model(model, evaluation_mode=True), offload)

    def place_frozen(self, model: nn.Module, offload: bool) -> nn.Module:
        """Put a frozen model, as TRL prepares a teacher, where it stays; `offload`: on the CPU but within `at_hand`."""
        return model.to("cpu") if offload else model

    @contextlib.contextmanager
    def at_hand(self, model: nn.Module, offload: bool) -> Iterator[None]:
        """Passes of what `place_frozen` has placed."""
        if offload:
            model.to(self.device)
        yield
        if offload:
            model.to("cpu")

    def fill_reference(self, reference: nn.Module, source: Weights) -> None:
        """Overwrite a prepared reference with the student's weights. Collective."""
        weights = Weights(self.accelerator.unwrap_model(reference), self)
        copy_rows_(weights.shards(), weights, source)

    # Saving

    def loads_optimizer(self, optimizer: Any) -> bool:
        """Whether TRL's trainer can load a checkpoint's optimizer into this one."""
        return True

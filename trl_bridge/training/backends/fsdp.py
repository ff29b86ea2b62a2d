"""FSDP2: every pass averages its rows, since unsynced ones would hold the full gradient on each rank."""

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from accelerate import Accelerator
from torch import nn
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel
from trl.models import prepare_fsdp

from .base import Backend
from .refusals import refuse_fsdp
from .weights import ShardedWeights, Weights, copy_rows_, trained


class FSDP2Backend(Backend):
    """`fully_shard` through accelerate (`fsdp_version: 2`)."""

    def __init__(self, accelerator: Accelerator):
        super().__init__(accelerator)
        refuse_fsdp(accelerator.state.fsdp_plugin)

    def check(self, args: Any) -> None:
        if args.cast_lm_head_to_fp32:
            raise NotImplementedError(
                "`cast_lm_head_to_fp32` is not supported under FSDP: the head shares the precision of its group. Set it "
                "to False."
            )

    @property
    def loads_everywhere(self) -> bool:
        return not self.accelerator.state.fsdp_plugin.cpu_ram_efficient_loading

    @property
    def shards_copies(self) -> bool:
        return True

    def before_micro_batch(self, model: Any) -> None:
        # TRL's loop has switched it off for all micro-batches but the window's last.
        model.set_requires_gradient_sync(True)

    @contextlib.contextmanager
    def earlier_pass(self, model: nn.Module) -> Iterator[None]:
        yield

    def drop_gathered(self, model: nn.Module) -> None:
        # The outermost module keeps what a forward has gathered until a backward comes.
        for module in model.modules():
            if isinstance(module, FSDPModule):
                module.reshard()

    def weights(self, model: nn.Module) -> Weights:
        prepared = any(isinstance(parameter, DTensor) for parameter in model.parameters())
        return ShardedWeights(model, self) if prepared else _UnpreparedWeights(model, self)

    def pieces(self, model: nn.Module) -> Weights:
        return _Pieces(model, self)

    @property
    def checkpoint_kind(self) -> str:
        return "FSDP2"

    def sharding_policy(self) -> Any:
        return self.accelerator.state.fsdp_plugin.mixed_precision_policy

    def prepare_reference(self, model: PreTrainedModel, offload: bool = False) -> nn.Module:
        return self.place_frozen(model, offload)

    def place_frozen(self, model: nn.Module, offload: bool) -> nn.Module:
        if not self.loads_everywhere:
            # It was copied before `prepare` gave every rank the main process's values, and is sharded from what each has.
            self.broadcast_(parameter.data for parameter in model.parameters())
        plugin = self.accelerator.state.fsdp_plugin
        kept = plugin.cpu_offload
        plugin.cpu_offload = CPUOffloadPolicy(pin_memory=self.device.type == "cuda") if offload else kept
        try:
            placed: Any = prepare_fsdp(model, self.accelerator)
        finally:
            plugin.cpu_offload = kept
        return placed

    @contextlib.contextmanager
    def at_hand(self, model: nn.Module, offload: bool) -> Iterator[None]:
        yield  # `CPUOffloadPolicy` brings the weights

    def fill_reference(self, reference: nn.Module, source: Weights) -> None:
        weights = ShardedWeights(reference, self)
        copy_rows_(weights.shards(), weights, source)

    def loads_optimizer(self, optimizer: Any) -> bool:
        # torch looks for the device of the state, and SGD without momentum has none ("Expected device to be set").
        plain = getattr(optimizer, "optimizer", optimizer)
        return not isinstance(plain, torch.optim.SGD) or any(group["momentum"] for group in plain.param_groups)


class _Pieces(ShardedWeights):
    """Of the trained weights, replaced in the memory that FSDP gathers from."""

    def __init__(self, model: nn.Module, backend: Backend):
        super().__init__(trained(model), backend)
        self._model = model

    @contextlib.contextmanager
    def replaced(self, values: Mapping[str, torch.Tensor]) -> Iterator[None]:
        own = {name: piece.clone() for name, piece in self.shards().items()}
        try:
            self._overwrite(values)
            yield
        finally:
            self._overwrite(own)

    @torch.no_grad()
    def _overwrite(self, values: Mapping[str, torch.Tensor]) -> None:
        for name, piece in self.shards().items():
            piece.copy_(values[name])
        # What a pass has gathered may be kept for the next one.
        for module in self._model.modules():
            if isinstance(module, FSDPModule):
                module.reshard()


class _UnpreparedWeights(Weights):
    """Before `prepare`: full where they were loaded, which may be the main process only."""

    def rows(self, name: str, first: int, last: int) -> torch.Tensor:
        return self.full(name)[first:last]

    def full(self, name: str) -> torch.Tensor:
        # `prepare` gives every rank the main process's values, whatever the others have.
        value = self.parameters[name].detach().clone()
        self.backend.broadcast_([value])
        return value

"""
DeepSpeed ZeRO-1, 2 and 3: the engine steps inside a window's last backward and takes gradients away as they come.

So the coordinator's projection is summed up by tensor hooks, what has to run before the student's step is run at the
head of the engine's own `step`, and what is added to the weights is added to their float32 master, from which that step
refreshes the working weights.
"""

import contextlib
import functools
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import deepspeed
import torch
from accelerate import Accelerator
from deepspeed.utils import safe_get_full_fp32_param, safe_get_local_fp32_param, safe_set_local_fp32_param
from torch import nn
from torch.distributed.fsdp import MixedPrecisionPolicy
from transformers import PreTrainedModel
from trl.models import prepare_deepspeed

from ..._upstream import outside_zero3, without_gradient_sync
from .base import Backend
from .refusals import refuse_deepspeed
from .weights import Part, Rows, Weights, trained


class ZeroBackend(Backend):
    """DeepSpeed ZeRO through accelerate, with an optimizer of torch."""

    steps_in_backward = True
    bound_to_ranks = "DeepSpeed keeps each rank's part of the optimizer in a file of its own"

    def __init__(self, accelerator: Accelerator):
        super().__init__(accelerator)
        self.stage = accelerator.state.deepspeed_plugin.zero_stage
        self.config = accelerator.state.deepspeed_plugin.deepspeed_config
        self._before_step: Callable[[], None] = _nothing
        refuse_deepspeed(self.stage, self.config)

    def check(self, args: Any) -> None:
        if args.cast_lm_head_to_fp32:
            raise NotImplementedError(
                "`cast_lm_head_to_fp32` is not supported under DeepSpeed: the engine casts the whole model. Set it to "
                "False."
            )
        if getattr(args, "log_gradient_stats", False):
            raise NotImplementedError(
                "`log_gradient_stats` is not supported under DeepSpeed: the engine takes the gradients away. Set it to "
                "False."
            )

    @property
    def keeps_master(self) -> bool:
        return bool(self.config.get("bf16", {}).get("enabled", False))

    @property
    def checkpoint_kind(self) -> str:
        return f"DeepSpeed ZeRO-{self.stage}"

    @property
    def shards_copies(self) -> bool:
        return True

    def attach(self, model: nn.Module, before_step: Callable[[], None]) -> None:
        self._before_step = before_step
        if "step" in vars(model):  # an earlier call of `train`
            return
        engine: Any = model
        engine_step = engine.step

        @functools.wraps(engine_step)
        def step(*args: Any, **kwargs: Any) -> Any:
            self._before_step()
            return engine_step(*args, **kwargs)

        engine.step = step

    @contextlib.contextmanager
    def earlier_pass(self, model: nn.Module) -> Iterator[None]:
        yield

    def backward(self, loss: torch.Tensor) -> None:
        # Only around the backward: TRL's loss reads the flag too.
        with torch.autocast(device_type=loss.device.type, enabled=False), without_gradient_sync(self.accelerator):
            self.accelerator.backward(loss, scale_wrt_gas=False)

    def last_backward(self, loss: torch.Tensor) -> None:
        with torch.autocast(device_type=loss.device.type, enabled=False):
            self.accelerator.backward(loss, scale_wrt_gas=False)

    def weights(self, model: nn.Module) -> Weights:
        parameters = list(model.parameters())
        if any(hasattr(p, "_z3_optimizer") or hasattr(p, "_hp_mapping") for p in parameters):
            return ZeroWeights(model, self)
        return _PartitionedWeights(model, self) if _partitioned(parameters) else Weights(model, self)

    def pieces(self, model: nn.Module) -> Weights:
        return _Partitions(trained(model), self) if self.stage == 3 else super().pieces(model)

    @contextlib.contextmanager
    def readable(self, parameter: nn.Parameter) -> Iterator[None]:
        with _gathered(parameter):
            yield

    @contextlib.contextmanager
    def alongside(self) -> Iterator[None]:
        with outside_zero3():
            yield

    def sharding_policy(self) -> Any:
        # There is no autocast under DeepSpeed: the engine's model computes in bfloat16 throughout.
        if not self.keeps_master:
            return None
        return MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)

    def meta_copy(self, model: PreTrainedModel, copy: Callable[..., PreTrainedModel]) -> PreTrainedModel:
        with outside_zero3():
            return super().meta_copy(model, copy)

    def prepare_reference(self, model: PreTrainedModel, offload: bool = False) -> nn.Module:
        return self.place_frozen(prepare_deepspeed(model, self.accelerator), offload)

    def place_frozen(self, model: nn.Module, offload: bool) -> nn.Module:
        if offload and self.stage == 3:
            raise NotImplementedError(
                "`teacher_offload` is not supported under ZeRO-3, which spreads the teacher over the ranks. Set it to False."
            )
        return super().place_frozen(model, offload)

    def fill_reference(self, reference: nn.Module, source: Weights) -> None:
        for name, parameter in self.accelerator.unwrap_model(reference).named_parameters():
            value = source.full(name)
            with _gathered(parameter, write=True), torch.no_grad():
                if self.rank == 0 or not hasattr(parameter, "ds_id"):
                    parameter.copy_(value)


class _GatheredWeights(Weights):
    """In pieces that are no rows: read in full."""

    def shape(self, name: str) -> torch.Size:
        return _shape(self.parameters[name])

    def bounds(self, name: str) -> tuple[int, int]:
        return 0, self.shape(name)[0]

    def rows(self, name: str, first: int, last: int) -> torch.Tensor:
        return self.full(name)[first:last]


class ZeroWeights(_GatheredWeights):
    """Of a prepared engine: read from and written to the float32 master; gradients only pass by the hooks."""

    needs_grad_hooks = True

    def full(self, name: str) -> torch.Tensor:
        parameter = self.parameters[name]
        if not hasattr(parameter, "ds_id") and parameter.dtype == torch.float32:
            return parameter.detach()  # equal to the master between updates
        return safe_get_full_fp32_param(parameter).detach().view(self.shape(name))

    def shards(self) -> dict[str, torch.Tensor]:
        raise NotImplementedError("DeepSpeed's pieces are not rows.")

    def gradient(self, name: str) -> torch.Tensor:
        raise NotImplementedError("DeepSpeed keeps no gradients to read.")

    def add_(self, name: str, rows: Rows) -> None:
        parameter = self.parameters[name]
        flat = rows(*self.bounds(name)).reshape(-1)
        if hasattr(parameter, "ds_id"):
            piece = safe_get_local_fp32_param(parameter)
            first = min(self.backend.rank * piece.numel(), flat.numel())
            mine = flat[first : first + piece.numel()]  # the last rank's piece is padded
            changed = piece.detach().reshape(-1).clone()
            changed[: mine.numel()] += mine
            safe_set_local_fp32_param(parameter, changed)
            return
        mapping = parameter._hp_mapping
        if mapping is not None:  # ranks without a piece of this weight have none
            address = mapping.lp_fragment_address
            mapping.hp_fragment.add_(flat.narrow(0, address.start, address.numel).view_as(mapping.hp_fragment))

    @torch.no_grad()
    def write_(self, name: str, part: Part, values: torch.Tensor) -> None:
        parameter, shape = self.parameters[name], self.shape(name)
        new = torch.zeros(shape, dtype=torch.float32, device=values.device)
        chosen = torch.zeros(shape, dtype=torch.bool, device=values.device)
        new[part], chosen[part] = values.float(), True
        write = functools.partial(_write_flat, new.reshape(-1), chosen.reshape(-1))
        # Master and working weights: the engine refreshes these from that only in its steps.
        if not hasattr(parameter, "ds_id"):
            mapping = parameter._hp_mapping
            if mapping is not None:
                write(mapping.hp_fragment, mapping.lp_fragment_address.start)
            write(parameter.data, 0)
            return
        master = safe_get_local_fp32_param(parameter).detach().clone()
        first = self.backend.rank * master.numel()
        write(master, first)
        safe_set_local_fp32_param(parameter, master)
        write(parameter.ds_tensor.data, first)
        if parameter.data.numel() == shape.numel():  # small ones are never given away
            write(parameter.data, 0)

    def reduce_(self, tensors: Iterable[torch.Tensor], synced: bool) -> None:
        # The hooks see this rank's gradients, before any reduction.
        self.backend.average_(tensors)


class _PartitionedWeights(_GatheredWeights):
    """Loaded under `zero3_init_flag`, before the engine is made."""

    def full(self, name: str) -> torch.Tensor:
        with _gathered(self.parameters[name]):
            return self.parameters[name].detach().clone()

    def add_(self, name: str, rows: Rows) -> None:
        parameter = self.parameters[name]
        with _gathered(parameter, write=True):
            if self.backend.rank == 0:
                parameter.data.add_(rows(*self.bounds(name)).to(parameter.dtype))


class _Partitions(Weights):
    """ZeRO-3's own pieces, which passes are gathered from: flat, and padded on the last rank."""

    sharded = True

    def bounds(self, name: str) -> tuple[int, int]:
        size = self.parameters[name].ds_tensor.numel()
        return self.backend.rank * size, (self.backend.rank + 1) * size

    def shards(self) -> dict[str, torch.Tensor]:
        return {name: parameter.ds_tensor.data for name, parameter in self.parameters.items()}

    @contextlib.contextmanager
    def replaced(self, values: Mapping[str, torch.Tensor]) -> Iterator[None]:
        own = self.shards()
        try:
            self._put(values)
            yield
        finally:
            self._put(own)

    def _put(self, values: Mapping[str, torch.Tensor]) -> None:
        for name, value in values.items():
            parameter = self.parameters[name]
            parameter.ds_tensor.data = value.to(parameter.ds_tensor)
            # Small ones are never given away, and others may be kept for the next pass.
            if parameter.data.numel() == parameter.ds_numel:
                parameter.data = self._whole(parameter)

    def _whole(self, parameter: Any) -> torch.Tensor:
        piece = parameter.ds_tensor.data
        gathered = piece.new_empty(self.backend.world_size * piece.numel())
        torch.distributed.all_gather_into_tensor(gathered, piece.contiguous())
        return gathered[: parameter.ds_numel].view(parameter.ds_shape)


def _nothing() -> None:
    """Before `attach`."""


def _write_flat(new: torch.Tensor, chosen: torch.Tensor, piece: torch.Tensor, first: int) -> None:
    """Overwrite what was chosen of a full weight, flat, in a piece of it that starts at `first` and may be padded."""
    flat = piece.view(-1)[: max(0, new.numel() - first)]
    where = slice(first, first + flat.numel())
    flat.copy_(torch.where(chosen[where], new[where].to(flat), flat))


def _shape(parameter: nn.Parameter) -> torch.Size:
    return getattr(parameter, "ds_shape", parameter.shape)


def _partitioned(parameters: Iterable[nn.Parameter]) -> bool:
    return any(hasattr(parameter, "ds_id") for parameter in parameters)


def _gathered(parameter: nn.Parameter, write: bool = False) -> Any:
    if not hasattr(parameter, "ds_id"):
        return contextlib.nullcontext()
    return deepspeed.zero.GatheredParameters([parameter], modifier_rank=0 if write else None)

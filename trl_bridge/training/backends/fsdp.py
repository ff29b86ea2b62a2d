"""FSDP2: every pass averages its rows, since unsynced ones would hold the full gradient on each rank."""

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils.constants import FSDP_MODEL_NAME, OPTIMIZER_NAME
from torch import nn
from torch.distributed.fsdp import CPUOffloadPolicy, StateDictType
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel
from transformers.trainer import SCHEDULER_NAME
from trl.models import prepare_fsdp

from .base import Backend
from .weights import RowWeights, Weights, copy_rows_


class FSDP2Backend(Backend):
    """
    `fully_shard` through accelerate (`fsdp_version: 2`).

    Args:
        accelerator ([`~accelerate.Accelerator`]):
            Accelerator of the trainer.

    Raises:
        NotImplementedError: an FSDP option cannot be had; the message names it.
    """

    def __init__(self, accelerator: Accelerator):
        super().__init__(accelerator)
        plugin = accelerator.state.fsdp_plugin
        refusals = {
            "fsdp_version": (plugin.fsdp_version != 2, "FSDP1 is not supported. Set it to 2"),
            "fsdp_state_dict_type": (
                plugin.state_dict_type != StateDictType.FULL_STATE_DICT,
                "`save_model` would write no plain model. Set it to FULL_STATE_DICT",
            ),
            "fsdp_offload_params": (
                isinstance(plugin.cpu_offload, CPUOffloadPolicy),
                "the parts beside the student are not moved with it. Set it to false",
            ),
            "fsdp_activation_checkpointing": (
                plugin.activation_checkpointing,
                "it renames the weights of the student alone. Set it to false, and `gradient_checkpointing=True`",
            ),
            "fsdp_ignored_modules": (plugin.ignored_modules is not None, "every weight is trained. Remove it"),
        }
        for name, (refused, reason) in refusals.items():
            if refused:
                raise NotImplementedError(f"`{name}` of the FSDP configuration is not supported: {reason}.")

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

    def before_micro_batch(self, model: nn.Module) -> None:
        # The parent's loop has switched it off for all micro-batches but the window's last.
        model.set_requires_gradient_sync(True)

    @contextlib.contextmanager
    def earlier_pass(self, model: nn.Module) -> Iterator[None]:
        yield

    def weights(self, model: nn.Module) -> Weights:
        prepared = any(isinstance(parameter, DTensor) for parameter in model.parameters())
        return RowWeights(model, self) if prepared else _UnpreparedWeights(model, self)

    def sharding_policy(self) -> Any:
        return self.accelerator.state.fsdp_plugin.mixed_precision_policy

    def prepare_reference(self, twin: PreTrainedModel) -> nn.Module:
        return prepare_fsdp(twin, self.accelerator)

    def fill_reference(self, reference: nn.Module, source: Weights) -> None:
        weights = RowWeights(reference, self)
        copy_rows_(weights.held(), weights, source)

    def checkpoint_parts(self, checkpoint: Path) -> list[str]:
        return [f"{OPTIMIZER_NAME}.bin", f"{FSDP_MODEL_NAME}.bin", SCHEDULER_NAME]


class _UnpreparedWeights(Weights):
    """Before `prepare`: whole where they were loaded, which may be the main process alone."""

    def rows(self, name: str, first: int, last: int) -> torch.Tensor:
        return self.whole(name)[first:last]

    def whole(self, name: str) -> torch.Tensor:
        # `prepare` gives every rank the main process's values, whatever the others hold.
        parameter = self.parameters[name].detach()
        value = torch.empty_like(parameter, device="cpu") if parameter.is_meta else parameter.clone()
        self.backend.broadcast_([value])
        return value

"""A copy of the student that is spread over the ranks by hand, beside a student of any backend."""

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, OffloadPolicy, fully_shard
from transformers import PreTrainedModel

from .weights import Reducer, RowWeights, Weights, copy_rows_


def sharded_copy(model: PreTrainedModel, plain_copy: Callable[..., PreTrainedModel]) -> PreTrainedModel:
    """Copy a model's modules and buffers, with weights that have shapes but no memory."""
    memo: dict[int, Any] = {}
    for parameter in model.parameters():
        shape = getattr(parameter, "ds_shape", parameter.shape)
        blank = torch.empty(shape, dtype=torch.float32, device="meta")
        memo[id(parameter)] = nn.Parameter(blank, requires_grad=parameter.requires_grad)
    return plain_copy(model, memo=memo)


def shard(
    outline: PreTrainedModel, source: Weights, backend: Reducer, policy: Any, offload: bool = False
) -> RowWeights:
    """
    Spread an outline over all ranks, layer by layer, and fill it. No rank ever holds more than one weight of it whole.
    """
    device = backend.device
    buffers = {name: copy.deepcopy(buffer) for name, buffer in outline.named_buffers()}
    options: dict[str, Any] = {
        "offload_policy": CPUOffloadPolicy(pin_memory=device.type == "cuda") if offload else OffloadPolicy(),
        "mesh": init_device_mesh(device.type, (backend.world_size,)),
        "mp_policy": policy or MixedPrecisionPolicy(),
    }
    layers = set(outline._no_split_modules or [])
    for module in outline.modules():
        if type(module).__name__ in layers:
            fully_shard(module, **options)
    fully_shard(outline, **options)
    outline.to_empty(device="cpu" if offload else device)
    outline.tie_weights()
    for name, buffer in buffers.items():
        owner, _, leaf = name.rpartition(".")
        setattr(outline.get_submodule(owner), leaf, buffer.to(device))
    weights = RowWeights(outline, backend)
    copy_rows_(weights.held(), weights, source)
    return weights

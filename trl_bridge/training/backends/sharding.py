"""A sharded copy of the student, alongside a student of any backend."""

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, OffloadPolicy, fully_shard
from transformers import PreTrainedModel

from .reducer import Reducer
from .weights import ShardedWeights, Weights, copy_rows_


def meta_copy(model: PreTrainedModel, plain_copy: Callable[..., PreTrainedModel]) -> PreTrainedModel:
    """Copy a model's modules and buffers, with weights that have shapes but no memory."""
    memo: dict[int, Any] = {}
    for parameter in model.parameters():
        shape = getattr(parameter, "ds_shape", parameter.shape)
        blank = torch.empty(shape, dtype=torch.float32, device="meta")
        memo[id(parameter)] = nn.Parameter(blank, requires_grad=parameter.requires_grad)
    return plain_copy(model, memo=memo)


def shard(
    model: PreTrainedModel, source: Weights, backend: Reducer, policy: Any, offload: bool = False
) -> ShardedWeights:
    """
    Shard a meta copy layer by layer, and fill it. No rank ever has more than one weight of it in full.
    """
    device = backend.device
    buffers = {name: copy.deepcopy(buffer) for name, buffer in model.named_buffers()}
    options: dict[str, Any] = {
        "offload_policy": CPUOffloadPolicy(pin_memory=device.type == "cuda") if offload else OffloadPolicy(),
        "mesh": init_device_mesh(device.type, (backend.world_size,)),
        "mp_policy": policy or MixedPrecisionPolicy(),
    }
    layers = set(model._no_split_modules or [])
    for module in model.modules():
        if type(module).__name__ in layers:
            fully_shard(module, **options)
    fully_shard(model, **options)
    model.to_empty(device="cpu" if offload else device)
    model.tie_weights()
    for name, buffer in buffers.items():
        owner, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(owner), leaf, buffer.to(device))
    weights = ShardedWeights(model, backend)
    copy_rows_(weights.shards(), weights, source)
    return weights

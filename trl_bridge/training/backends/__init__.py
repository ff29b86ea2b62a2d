"""How gradients and weights are reached on each distributed backend. The only place that knows them."""

from accelerate import Accelerator
from accelerate.utils import DistributedType

from .base import Backend
from .storage import MasterWeights, Storage
from .weights import Part, Rows, ShardedWeights, Weights, copy_rows_, gradient_of, overlap


__all__ = [
    "MasterWeights",
    "Backend",
    "Part",
    "ShardedWeights",
    "Rows",
    "Storage",
    "Weights",
    "backend_for",
    "copy_rows_",
    "gradient_of",
    "overlap",
]


def backend_for(accelerator: Accelerator) -> Backend:
    """The backend of a trainer."""
    kind = accelerator.distributed_type
    # Imported where used: DeepSpeed is an extra.
    if kind == DistributedType.FSDP:
        from .fsdp import FSDP2Backend

        return FSDP2Backend(accelerator)
    if kind == DistributedType.DEEPSPEED:
        from .zero import ZeroBackend

        return ZeroBackend(accelerator)
    if kind in (DistributedType.NO, DistributedType.MULTI_CPU, DistributedType.MULTI_GPU):
        return Backend(accelerator)
    raise NotImplementedError(
        f"Training with {kind} is not supported. Launch on one device, or with DDP (torchrun), FSDP2 or DeepSpeed."
    )

"""
How gradients and weights are reached on each way of training. The only place that knows them.

One process and DDP are here; every pass but a window's last runs unsynced, and the last one averages the sum.
"""

import contextlib
from collections.abc import Iterable, Iterator

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType
from torch import nn


_FLAT_ELEMENTS = 2**25  # 128 MiB of float32 in each all-reduce: few launches, and a bounded extra copy


class Backend:
    """
    One process, or DDP with a replica on each rank.

    Args:
        accelerator ([`~accelerate.Accelerator`]):
            Accelerator of the trainer.
    """

    def __init__(self, accelerator: Accelerator):
        supported = (
            DistributedType.NO,
            DistributedType.MULTI_CPU,
            DistributedType.MULTI_GPU,
        )
        if accelerator.distributed_type not in supported:
            raise NotImplementedError(
                f"Training with {accelerator.distributed_type} is not built yet. Launch with DDP (torchrun) or on one "
                "device."
            )
        self.accelerator = accelerator

    @property
    def world_size(self) -> int:
        """Number of ranks."""
        return self.accelerator.num_processes

    @property
    def rank(self) -> int:
        """This process's rank."""
        return self.accelerator.process_index

    @contextlib.contextmanager
    def earlier_pass(self, model: nn.Module) -> Iterator[None]:
        """Forward and backward of a pass that is not the micro-batch's last: gradients stay on their rank."""
        with self.accelerator.no_sync(model):
            yield

    def backward(self, loss: torch.Tensor) -> None:
        """Backward of an earlier pass, outside the autocast that `compute_loss` is called under."""
        with torch.autocast(device_type=loss.device.type, enabled=False):
            self.accelerator.backward(loss)

    def average_(self, tensors: Iterable[torch.Tensor]) -> None:
        """Average tensors over ranks, in place and in flat pieces."""
        if self.world_size == 1:
            return
        piece: list[torch.Tensor] = []
        for tensor in tensors:
            if piece and sum(t.numel() for t in piece) + tensor.numel() > _FLAT_ELEMENTS:
                self._average_flat(piece)
                piece = []
            piece.append(tensor)
        if piece:
            self._average_flat(piece)

    def broadcast_(self, tensors: Iterable[torch.Tensor]) -> None:
        """Give every rank the main process's values, in place."""
        if self.world_size > 1:
            for tensor in tensors:
                torch.distributed.broadcast(tensor, src=0)

    def _average_flat(self, tensors: list[torch.Tensor]) -> None:
        flat = torch.cat([t.reshape(-1) for t in tensors])
        torch.distributed.all_reduce(flat)
        flat /= self.world_size
        for tensor, part in zip(tensors, flat.split([t.numel() for t in tensors]), strict=True):
            tensor.copy_(part.view_as(tensor))

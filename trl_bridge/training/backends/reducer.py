"""This process among the ranks, and what is summed, averaged and sent between them."""

from collections.abc import Iterable

import torch
from accelerate import Accelerator


_FLAT_ELEMENTS = 2**25  # 128 MiB of float32 in each all-reduce: few launches, and a bounded extra copy


class Reducer:
    """What weights need of a backend."""

    def __init__(self, accelerator: Accelerator):
        self.accelerator = accelerator

    @property
    def world_size(self) -> int:
        """Number of ranks."""
        return self.accelerator.num_processes

    @property
    def rank(self) -> int:
        """This process's rank."""
        return self.accelerator.process_index

    @property
    def device(self) -> torch.device:
        """This rank's device."""
        return self.accelerator.device

    def average_(self, tensors: Iterable[torch.Tensor]) -> None:
        """Average tensors over ranks, in place and in flat pieces."""
        self._reduce(tensors, self.world_size)

    def sum_(self, tensors: Iterable[torch.Tensor]) -> None:
        """Sum tensors over ranks, in place and in flat pieces."""
        self._reduce(tensors, 1)

    def broadcast_(self, tensors: Iterable[torch.Tensor]) -> None:
        """Give every rank the main process's values, in place."""
        if self.world_size > 1:
            for tensor in tensors:
                sent = tensor.to(
                    self.device
                )  # weights that are not prepared may be on the CPU, which NCCL cannot read
                torch.distributed.broadcast(sent, src=0)
                if sent is not tensor:
                    tensor.copy_(sent)

    def _reduce(self, tensors: Iterable[torch.Tensor], divisor: int) -> None:
        if self.world_size == 1:
            return
        piece: list[torch.Tensor] = []
        for tensor in tensors:
            if piece and sum(t.numel() for t in piece) + tensor.numel() > _FLAT_ELEMENTS:
                _reduce_flat(piece, divisor, self.device)
                piece = []
            piece.append(tensor)
        if piece:
            _reduce_flat(piece, divisor, self.device)


def _reduce_flat(tensors: list[torch.Tensor], divisor: int, device: torch.device) -> None:
    flat = torch.cat([t.reshape(-1) for t in tensors]).to(device)
    torch.distributed.all_reduce(flat)
    flat /= divisor
    for tensor, part in zip(tensors, flat.split([t.numel() for t in tensors]), strict=True):
        tensor.copy_(part.view_as(tensor))

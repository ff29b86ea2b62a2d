"""The moving average of weights, for a teacher that follows the student."""

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from .backends import Weights
from .checkpoint.rows import rows_within, write_rows


class MovingAverage:
    """Each rank averages what it holds of the weights; a `SHARDED` part of a checkpoint."""

    def __init__(self, weights: Weights, rate: float):
        self._weights, self._rate = weights, rate
        # In float32 at least: in 16 bits what an update adds is rounded away.
        self.values = {
            name: piece.to(torch.promote_types(piece.dtype, torch.float32), copy=True)
            for name, piece in weights.shards().items()
        }

    def update(self) -> None:
        """Take in the weights as they are now."""
        for name, piece in self._weights.shards().items():
            self.values[name].lerp_(piece.to(self.values[name]), self._rate)

    @contextlib.contextmanager
    def in_place(self) -> Iterator[None]:
        """Passes with the average in the place of the weights. Collective."""
        with self._weights.replaced(self.values):
            yield

    # In a checkpoint

    def shards(self) -> dict[str, torch.Tensor]:
        """This rank's part, by the weight's name."""
        return self.values

    def rest(self) -> dict[str, Any]:
        """What is not sharded: nothing."""
        return {}

    def save(self, folder: Path) -> None:
        """Write this rank's part to a file of a folder. Every rank calls."""
        rank = self._weights.backend.rank
        if rank == 0 or self._weights.sharded:
            write_rows(folder, rank, self.values, lambda name: self._weights.bounds(name)[0])

    def load(self, folder: Path, rest: dict[str, Any]) -> None:
        """Take over what `save` has written."""
        self.load_weights(folder)

    def load_weights(self, folder: Path) -> None:
        """The same: all of it belongs to the weights."""
        for name, piece in rows_within(folder, self._weights.bounds).items():
            self.values[name].copy_(piece)

"""State that may be sharded by rows: a row is read by whichever rank has it now."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..backends import Weights
from .rows import rows_within, write_rows


_WEIGHTS = "weights"


class ShardedState:
    """
    The state of an optimizer that steps on each rank's shards, with those shards themselves where they are not saved
    elsewhere.

    What has a weight's shape (Adam's moments) is sharded as the weight is. The rest (the count of steps, parameter
    groups) is the same on all ranks, but for optimizers that keep more than that (8-bit ones), which are bound to their
    number.
    """

    def __init__(
        self,
        weights: Weights,
        leaves: Mapping[str, nn.Parameter],
        optimizer: torch.optim.Optimizer,
        with_weights: bool = True,
    ):
        self._weights = weights
        self._leaves = leaves
        self._optimizer = optimizer
        self._with_weights = with_weights

    def shards(self) -> dict[str, torch.Tensor]:
        """This rank's shards, by what they are and the weight's name: `weights/NAME`, `exp_avg/NAME`."""
        rows = {f"{_WEIGHTS}/{name}": piece for name, piece in self._held().items()}
        for name, state in self._states():
            rows.update({f"{kind}/{name}": value for kind, value in state.items() if self._is_rows(name, value)})
        return rows

    def rest(self) -> dict[str, Any]:
        """What is not sharded: tensors and plain Python values."""
        states = {
            name: {kind: value for kind, value in state.items() if not self._is_rows(name, value)}
            for name, state in self._states()
        }
        return {"states": states, "param_groups": self._optimizer.state_dict()["param_groups"]}

    def save(self, folder: Path) -> None:
        """Write this rank's shards to a file of a folder. Every rank calls."""
        rank = self._weights.backend.rank
        if rank == 0 or self._weights.sharded:
            write_rows(folder, rank, self.shards(), lambda key: self._bounds(key)[0])

    def load(self, folder: Path, rest: dict[str, Any]) -> None:
        """Take over what `save` has written and `rest` returned, on any number of ranks."""
        rows = rows_within(folder, self._bounds)
        self._write_weights(rows)
        states: dict[str, dict[str, Any]] = {name: dict(state) for name, state in rest["states"].items()}
        for key, piece in rows.items():
            kind, _, name = key.partition("/")
            if kind != _WEIGHTS:
                states[name][kind] = piece
        parameters = [parameter for group in self._optimizer.param_groups for parameter in group["params"]]
        number = {id(parameter): index for index, parameter in enumerate(parameters)}
        by_number = {number[id(self._leaves[name])]: state for name, state in states.items()}
        self._optimizer.load_state_dict({"state": by_number, "param_groups": rest["param_groups"]})

    def load_weights(self, folder: Path) -> None:
        """Take over only the weights."""
        self._write_weights(rows_within(folder, self._bounds, _WEIGHTS))

    def _held(self) -> dict[str, torch.Tensor]:
        return self._weights.shards() if self._with_weights else {}

    def _states(self) -> Iterator[tuple[str, dict[str, Any]]]:
        for name, leaf in self._leaves.items():
            if leaf in self._optimizer.state:
                yield name, self._optimizer.state[leaf]

    def _is_rows(self, name: str, value: Any) -> bool:
        return isinstance(value, torch.Tensor) and value.dim() > 0 and value.shape == self._leaves[name].shape

    @torch.no_grad()
    def _write_weights(self, rows: Mapping[str, torch.Tensor]) -> None:
        for name, piece in self._held().items():
            piece.copy_(rows[f"{_WEIGHTS}/{name}"])

    def _bounds(self, key: str) -> tuple[int, int]:
        return self._weights.bounds(key.partition("/")[2])

"""
State that may be sharded by rows, in torch's own format for distributed checkpoints.

A row is read by whichever rank has it now, so the number of ranks may change between saving and loading.
"""

import contextlib
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Shard

from ..backends import Weights


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
        """Write the shards to a folder. Collective."""
        mesh_of: dict[str, DeviceMesh] = {}
        with _without_warning():
            dcp.save(
                {key: self._placed(key, piece, mesh_of) for key, piece in self.shards().items()},
                # An unfinished checkpoint of the same update may be there.
                storage_writer=dcp.FileSystemWriter(folder, overwrite=True),
            )

    def load(self, folder: Path, rest: dict[str, Any]) -> None:
        """Take over what `save` has written and `rest` returned, on any number of ranks. Collective."""
        rows = self._read(folder)
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
        """Take over only the weights. Collective."""
        self._write_weights(self._read(folder, _WEIGHTS))

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

    def _read(self, folder: Path, only: str = "") -> dict[str, torch.Tensor]:
        written = dcp.FileSystemReader(folder).read_metadata().state_dict_metadata
        pieces: dict[str, torch.Tensor] = {}
        for key, entry in written.items():
            kind, _, name = key.partition("/")
            if not only or kind == only:
                first, last = self._weights.bounds(name)
                shape = (last - first, *self._weights.shape(name)[1:])
                pieces[key] = torch.empty(shape, dtype=entry.properties.dtype)
        if pieces:
            mesh_of: dict[str, DeviceMesh] = {}
            with _without_warning():
                dcp.load(
                    {key: self._placed(key, piece, mesh_of) for key, piece in pieces.items()}, checkpoint_id=folder
                )
        return pieces

    def _placed(self, key: str, piece: torch.Tensor, mesh_of: dict[str, DeviceMesh]) -> torch.Tensor:
        """A shard and where in the full tensor it lies, without copying it."""
        world_size = self._weights.backend.world_size
        if not self._weights.sharded or world_size == 1:
            return piece
        kind = piece.device.type
        if kind not in mesh_of:
            mesh_of[kind] = init_device_mesh(kind, (world_size,))
        shape = self._weights.shape(key.partition("/")[2])
        stride = torch.empty(shape, device="meta").stride()
        return DTensor.from_local(
            piece.detach(), mesh_of[kind], [Shard(0)], run_check=False, shape=shape, stride=stride
        )


@contextlib.contextmanager
def _without_warning() -> Iterator[None]:
    """On one process torch says at each call that it takes it for one process, and of `overwrite` that it may change."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled, unavailable or uninitialized")
        warnings.filterwarnings("ignore", message="Detected an existing checkpoint")
        yield

"""Files of rows: what each rank had of a sharded tensor, and where in the full one it lies."""

import io
import pickle
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file


def write_rows(folder: Path, rank: int, rows: Mapping[str, torch.Tensor], first_row: Callable[[str], int]) -> None:
    """Write a rank's rows of several tensors."""
    folder.mkdir(parents=True, exist_ok=True)
    starts = {key: str(first_row(key)) for key in rows}
    save_file({key: value.contiguous() for key, value in rows.items()}, folder / f"rows-{rank}.safetensors", starts)


def saved_rows(folder: Path) -> Iterator[tuple[str, int, Any]]:
    """Each rank's rows of each tensor: the tensor's key, the number of the first row, and the rows, read by slicing."""
    if (folder / _DCP_METADATA).is_file():
        yield from _rows_of_dcp(folder)
    for path in sorted(folder.glob("rows-*.safetensors")):
        with safe_open(path, "pt") as file:
            starts = file.metadata() or {}
            for key in file.keys():  # noqa: SIM118 (it is no mapping)
                yield key, int(starts[key]), file.get_slice(key)


def rows_within(folder: Path, bounds: Callable[[str], tuple[int, int]], only: str = "") -> dict[str, torch.Tensor]:
    """The rows of each tensor between the first and the last of `bounds`, of whichever files have them; `only` of one kind."""
    pieces: dict[str, torch.Tensor] = {}
    for key, start, saved in saved_rows(folder):
        if only and key.partition("/")[0] != only:
            continue
        first, last = bounds(key)
        count, *rest = saved.get_shape()
        low, high = (min(max(place - start, 0), count) for place in (first, last))
        rows = saved[low:high]
        if key not in pieces:
            pieces[key] = torch.empty((last - first, *rest), dtype=rows.dtype)
        if low < high:
            pieces[key][start + low - first : start + high - first] = rows
    return pieces


# Earlier releases wrote torch's distributed checkpoints.

_DCP_METADATA = ".metadata"
_DCP_CLASSES = {
    "torch.distributed.checkpoint.metadata": {
        "Metadata",
        "MetadataIndex",
        "TensorProperties",
        "TensorStorageMetadata",
        "ChunkStorageMetadata",
        "StorageMeta",
        "_MEM_FORMAT_ENCODING",
    },
    "torch.distributed.checkpoint.filesystem": {"_StorageInfo"},
    "torch": {"Size"},
    "torch.serialization": {"_get_layout"},
    "pathlib": {"PosixPath", "Path"},
    "pathlib._local": {"PosixPath", "Path"},
}


class _DCPUnpickler(pickle.Unpickler):
    """Makes what torch's description of a distributed checkpoint consists of, and calls nothing else."""

    def find_class(self, module: str, name: str) -> Any:
        is_dtype = module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)
        if is_dtype or name in _DCP_CLASSES.get(module, ()):
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"it would call {module}.{name}, which is no part of a checkpoint")


class _Rows:
    """A tensor as a slice of a safetensors file reads."""

    def __init__(self, rows: torch.Tensor):
        self._rows = rows

    def get_shape(self) -> list[int]:
        return list(self._rows.shape)

    def __getitem__(self, part: slice) -> torch.Tensor:
        return self._rows[part]


def _rows_of_dcp(folder: Path) -> Iterator[tuple[str, int, Any]]:
    try:
        with (folder / _DCP_METADATA).open("rb") as file:
            written = _DCPUnpickler(file).load().storage_data
    except (pickle.UnpicklingError, EOFError, AttributeError) as error:
        raise ValueError(f"`resume_from_checkpoint`: {folder / _DCP_METADATA} cannot be read: {error}.") from error
    for index, place in written.items():
        with (folder / place.relative_path).open("rb") as file:
            file.seek(place.offset)
            rows = torch.load(io.BytesIO(file.read(place.length)), map_location="cpu", weights_only=True)
        yield index.fqn, index.offset[0] if index.offset else 0, _Rows(rows)

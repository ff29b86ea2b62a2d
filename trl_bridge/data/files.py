"""Local data files by path or pattern, and what all that reads data needs: the cache's key, and warnings."""

import hashlib
import os
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType

from datasets import Dataset, DatasetDict, IterableDatasetDict, load_dataset


READERS = {".json": "json", ".jsonl": "json", ".parquet": "parquet", ".csv": "csv"}
"""From a file's ending to the reader of [`~datasets.load_dataset`]."""


def read_files(
    files: str | list[str] | Mapping[str, str], streaming: bool = False
) -> DatasetDict | IterableDatasetDict:
    """Read data files, all of one kind."""
    names = list(files.values()) if isinstance(files, Mapping) else [files] if isinstance(files, str) else files
    for name in names:
        if not any(character in name for character in "*?[") and "://" not in name and not Path(name).is_file():
            raise FileNotFoundError(f"no such dataset file: {name}")
    endings = sorted({Path(name).suffix for name in names})
    if len(endings) != 1 or endings[0] not in READERS:
        raise ValueError(
            f"data files must all end in one of {', '.join(READERS)}, got {', '.join(endings) or 'none'} ({names[0]})"
        )
    return load_dataset(READERS[endings[0]], data_files=files, streaming=streaming)


def write_rows(rows: Dataset, path: Path) -> None:
    """Write rows as Parquet or JSONL, by the file's ending; the full file or none."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.tmp")
    if path.suffix == ".parquet":
        rows.to_parquet(temporary)
    else:
        rows.to_json(temporary, force_ascii=False)
    os.replace(temporary, path)


def code_of(*modules: ModuleType) -> dict[str, str]:
    """Argument that ties rows in the cache of `datasets` to the code that made them."""
    # `datasets` tells functions of modules apart by their names, not by what they do: without this, rows that an older
    # version of trl-bridge converted would be found again by a newer one.
    digest = hashlib.sha256()
    for module in modules:
        digest.update(Path(str(module.__file__)).read_bytes())
    return {"code": digest.hexdigest()}


def warn(message: str) -> None:
    """Log a warning on the main process of each machine."""
    # Late: accelerate imports torch, which listing the sources must not wait for.
    from accelerate import PartialState
    from accelerate.logging import get_logger

    PartialState()  # accelerate's logger needs it
    get_logger("trl_bridge.data").warning(message)

"""Local data files by path or pattern."""

from collections.abc import Mapping
from pathlib import Path

from datasets import DatasetDict, IterableDatasetDict, load_dataset


__all__ = ["READERS", "read_files"]

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

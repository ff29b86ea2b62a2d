"""Local data files by path or pattern, and what all that reads data needs: the cache's key, and warnings."""

import glob
import hashlib
import os
import sys
from collections.abc import Iterator, Mapping
from itertools import chain
from pathlib import Path
from types import ModuleType
from typing import Any

from datasets import Dataset, DatasetDict, IterableDatasetDict, load_dataset
from datasets.exceptions import DatasetGenerationError
from pyarrow import ArrowInvalid

from .written import kind_of, rewritten_by_readers, written_dataset, written_rows


READERS = {
    ".json": "json",
    ".jsonl": "json",
    ".ndjson": "json",
    ".parquet": "parquet",
    ".csv": "csv",
    ".tsv": "csv",
}
"""From a data file's ending to its kind. JSON and CSV may be compressed (`.jsonl.gz`)."""

_ENDINGS = f"{', '.join(READERS)}, JSON and CSV also with .gz, .bz2 or .xz"


def is_file_name(name: str) -> bool:
    """Whether a dataset's name is that of a data file, by its ending."""
    return kind_of(name) in READERS


def refuse_lost_path(name: str) -> None:
    """Refuse the name of a local file that is no data file, or of a path that is not there: the hub has neither."""
    path = Path(name)
    if path.is_file():
        raise ValueError(f"{name}: data files end in one of {_ENDINGS}, got {path.suffix or 'no ending'}")
    if (path.is_absolute() or name.startswith(("./", "../"))) and not path.exists():
        raise FileNotFoundError(f"no such dataset file or folder: {name}")


def read_files(
    files: str | list[str] | Mapping[str, str], streaming: bool = False
) -> DatasetDict | IterableDatasetDict:
    """Read data files, all of one kind."""
    named = dict(files) if isinstance(files, Mapping) else {"train": files}
    found = {split: _found([names] if isinstance(names, str) else names) for split, names in named.items()}
    names = list(chain(*found.values()))
    endings = sorted({kind_of(name) for name in names})
    if len({READERS.get(ending) for ending in endings}) != 1 or endings[0] not in READERS:
        raise ValueError(
            f"data files must all end in one of {_ENDINGS}, got {', '.join(endings) or 'none'} ({names[0]})"
        )
    if endings[0] == ".parquet" or any("://" in name for name in names):
        # Patterns are resolved already: brackets in a name are brackets.
        plain = {split: [n if "://" in n else glob.escape(n) for n in part] for split, part in found.items()}
        try:
            return load_dataset(READERS[endings[0]], data_files=plain, streaming=streaming)
        except (ArrowInvalid, DatasetGenerationError, OSError) as error:
            raise ValueError(
                f"{', '.join(names)} cannot be read ({error}): cut off, damaged, or out of reach."
            ) from error
    code = code_of(sys.modules[written_dataset.__module__])["code"]
    made: Any = IterableDatasetDict if streaming else DatasetDict
    return made(
        {
            split: written_dataset([Path(name) for name in part], ", ".join(part), code, streaming)
            for split, part in found.items()
        }
    )


def respelt(name: str, column: str) -> Iterator[tuple[int, str]]:
    """Cells of a local JSON or CSV file, by row, that other readers of such files give back in another spelling."""
    if "://" in name or READERS.get(kind_of(name)) not in ("json", "csv") or not Path(name).expanduser().is_file():
        return
    for row, cells in enumerate(written_rows([Path(name).expanduser()])):
        cell: Any = cells.get(column)
        if rewritten_by_readers(cell, READERS[kind_of(name)]):
            yield row, cell


def _found(names: list[str]) -> list[str]:
    """Files by their names and patterns. A file goes before a pattern: its name may have brackets."""
    found: list[str] = []
    for name in names:
        path = str(Path(name).expanduser()) if "://" not in name else name
        matching = [path] if "://" in path or Path(path).is_file() else sorted(glob.glob(path, recursive=True))
        if not matching:
            raise FileNotFoundError(f"no such dataset file: {name}")
        found += matching
    return found


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

"""
Local JSON and CSV files, as they are written: no text becomes a date, a number or a null because a reader guesses so.

A column is numbers only where every cell of it is one. What rewards and templates read as text is text, in the file's spelling.
"""

import bz2
import csv
import gzip
import json
import lzma
import math
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from decimal import Decimal
from functools import partial
from itertools import chain, islice
from pathlib import Path
from typing import IO, Any

import pyarrow as pa
from datasets import Dataset, Features, IterableDataset, Json, Value


COMPRESSED: dict[str, Callable[..., IO[str]]] = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open}
"""From an ending after the kind's own to what opens it."""

# Columns that are text, whatever stands in them.
_TEXTS = ("prompt", "solution", "completion", "expert")
_EXACT = 2**53
_ROWS = 10_000
_NULL = Value("null")
# What pandas takes for missing in a CSV.
_NULLS = (
    "null",
    "NULL",
    "nan",
    "NaN",
    "NA",
    "N/A",
    "n/a",
    "None",
    "#N/A",
    "<NA>",
    "-nan",
    "-NaN",
    "1.#QNAN",
    "1.#IND",
)

Row = dict[str, Any]


class Number(str):
    """A number in the file's spelling."""

    __slots__ = ()

    @property
    def value(self) -> int | float:
        """As Python reads it."""
        try:
            return int(self)
        except ValueError:
            return float(self)

    @property
    def kind(self) -> str:
        """Which numbers hold it: `big` is an integer that no float is sure to hold, `lost` one that changes if it is read."""
        value = self.value
        if isinstance(value, int):
            return "lost" if abs(value) >= 2**63 else "big" if abs(value) > _EXACT else "integer"
        return "real" if not math.isfinite(value) or Decimal(self) == Decimal(repr(value)) else "lost"


def written_dataset(paths: Sequence[Path], name: str, code: str, streaming: bool = False) -> Dataset | IterableDataset:
    """The rows of files of one kind. `code` ties what `datasets` keeps of them to the code that read them."""
    features, texts = _schema(paths, name)
    mixed = [column for column, feature in features.items() if isinstance(feature, Json)]
    # The size and the time of a file tell a changed one from what is kept.
    files = [(str(path), path.stat().st_size, path.stat().st_mtime_ns) for path in paths]
    made: Any = IterableDataset if streaming else Dataset
    read = made.from_generator(
        _examples, features=features, gen_kwargs={"files": [files], "texts": [texts], "mixed": [mixed], "code": [code]}
    )
    return read


def written_rows(paths: Sequence[Path]) -> Iterator[Row]:
    """Rows whose numbers are [`Number`]s. A file that cannot be read is refused with its line."""
    for path in paths:
        kind, opened = _opened(path)
        with opened() as file:
            try:
                yield from (_csv_rows(file, path, kind) if kind in (".csv", ".tsv") else _json_rows(file, path))
            except UnicodeDecodeError as error:
                raise ValueError(f"{path} is not UTF-8: {error}") from error
            except (EOFError, gzip.BadGzipFile, lzma.LZMAError) as error:
                raise ValueError(f"{path} is cut off or damaged: {error}") from error


def rewritten_by_readers(cell: Any, kind: str) -> bool:
    """Whether readers that guess give back a cell of a JSON or CSV file in another spelling."""
    if isinstance(cell, Number):
        return cell.kind in ("big", "lost") or str(cell.value) != cell
    if kind == "json" or not isinstance(cell, str):
        return False  # a JSON string, but for dates
    try:
        float(cell)
    except ValueError:
        return cell in _NULLS
    return True


def uncompressed(name: str | Path) -> Path:
    """A file's name without the ending of a compression."""
    path = Path(name)
    inner = path.with_suffix("")
    # Parquet is compressed inside.
    return inner if path.suffix.lower() in COMPRESSED and inner.suffix.lower() != ".parquet" else path


def kind_of(name: str | Path) -> str:
    """A file's kind by its ending, in lower case, without that of a compression."""
    return uncompressed(name).suffix.lower()


def _opened(path: Path) -> tuple[str, Callable[[], IO[str]]]:
    # A mark at the start of the file, as some programs write it, is no part of the text.
    opener = COMPRESSED.get(path.suffix.lower(), open)
    return kind_of(path), partial(opener, path, "rt", encoding="utf-8-sig", newline="")


def _json_rows(file: IO[str], path: Path) -> Iterator[Row]:
    read = partial(json.loads, parse_int=Number, parse_float=Number, parse_constant=Number)
    number, lines = 0, iter(file)
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            value = read(line)
        except ValueError as error:
            # One value over many lines: a list of rows, or a single row.
            value = _whole(line + file.read(), read) if number == 1 else None
            if value is None:
                raise ValueError(f"{path} line {number} is no JSON: {error}. It is cut off or damaged.") from error
        for row in value if isinstance(value, list) else [value]:
            if isinstance(row, str) and not isinstance(row, Number):
                row = {"text": row}
            if not isinstance(row, dict):
                raise ValueError(f"{path} line {number} is no mapping of columns to values: {line.strip()[:60]}")
            yield row


def _whole(text: str, read: Callable[[str], Any]) -> Any:
    try:
        return read(text)
    except ValueError:
        return None


def _csv_rows(file: IO[str], path: Path, kind: str) -> Iterator[Row]:
    csv.field_size_limit(sys.maxsize)
    rows = csv.reader(file, delimiter="\t" if kind == ".tsv" else ",", strict=True)
    try:
        header = next(rows, [])
        for cells in rows:
            if not cells:
                continue
            if len(cells) != len(header):
                raise ValueError(f"{path} line {rows.line_num} has {len(cells)} cells, the header {len(header)}")
            yield {name: _cell(cell) for name, cell in zip(header, cells, strict=True)}
    except csv.Error as error:
        raise ValueError(f"{path} line {rows.line_num} cannot be read: {error}. It is cut off or damaged.") from error


def _cell(cell: str) -> Any:
    """A CSV's cell: a number where it is written as numbers print, nothing where it is empty."""
    for kind in (int, float):
        try:
            if str(kind(cell)) == cell:
                return Number(cell)
        except ValueError:
            continue
    return cell or None


def _schema(paths: Sequence[Path], name: str) -> tuple[Features, list[str]]:
    """The features of all rows, and the columns of text; one reading of the files, a part of the rows at a time."""
    kinds: dict[str, set[str]] = {}
    for row in written_rows(paths):
        for column, value in row.items():
            kinds.setdefault(column, set()).add(_kind(value))
    if not kinds:
        raise ValueError(f"{name} has no rows.")
    texts = [column for column, found in kinds.items() if _is_text(column, found - {"null"})]
    found: dict[str, Any] = dict.fromkeys(kinds, _NULL)
    plain = (_plain(row, texts) for row in written_rows(paths))
    while rows := list(islice(plain, _ROWS)):
        columns: Any = {column: [row.get(column) for row in rows] for column in kinds}
        part = Dataset.from_dict(columns, on_mixed_types="use_json").features
        found = {column: _unified(found[column], part[column]) for column in kinds}
    # Nothing but nulls may be followed by text in another file.
    return Features({column: Value("string") if kind == _NULL else kind for column, kind in found.items()}), texts


def _is_text(column: str, kinds: set[str]) -> bool:
    """Whether a column's cells are kept in the file's spelling."""
    mixed = "text" in kinds and len(kinds) > 1
    return "nested" not in kinds and (column in _TEXTS or mixed or "lost" in kinds or {"big", "real"} <= kinds)


def _unified(first: Any, second: Any) -> Any:
    """The feature that holds the values of two; any JSON where no other one does."""
    if first == second or second == _NULL:
        return first
    if first == _NULL:
        return second
    if "Json" in f"{first}{second}":
        return Json()
    try:
        schemas = [Features({"": each}).arrow_schema.remove_metadata() for each in (first, second)]
        unified = pa.unify_schemas(schemas, promote_options="permissive")
    except (pa.ArrowInvalid, pa.ArrowTypeError):
        return Json()
    return Features.from_arrow_schema(unified)[""]


def _kind(value: Any) -> str:
    if isinstance(value, Number):
        return value.kind
    names = {str: "text", bool: "bool", type(None): "null"}
    return names.get(type(value), "nested")


def _examples(files: list[Any], texts: list[list[str]], mixed: list[list[str]], code: list[str]) -> Iterator[Row]:
    for row in written_rows([Path(path) for path, _, _ in chain(*files)]):
        plain = _plain(row, *texts)
        # `datasets` would read a string in such a column as JSON: "null" as nothing.
        yield {
            column: json.dumps(value) if column in mixed[0] and isinstance(value, str) else value
            for column, value in plain.items()
        }


def _plain(row: Mapping[str, Any], texts: Sequence[str]) -> Row:
    """A row in Python's values."""
    return {
        column: _text(value) if column in texts else _value(value, column in _TEXTS) for column, value in row.items()
    }


def _text(value: Any) -> str | None:
    if value is None:
        return None
    return str(value) if isinstance(value, str) else json.dumps(value)


def _value(value: Any, spoken: bool = False) -> Any:
    """Numbers as numbers. What is `spoken` (the items of a list, the content of a message) is text."""
    if isinstance(value, Number):
        return value.value
    if isinstance(value, list):
        return [str(item) if spoken and isinstance(item, Number) else _value(item, spoken) for item in value]
    if isinstance(value, dict):
        return {
            key: str(item) if spoken and key == "content" and isinstance(item, Number) else _value(item)
            for key, item in value.items()
        }
    return value

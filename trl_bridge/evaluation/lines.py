"""Files of JSON lines that are appended to and survive a kill."""

import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any


__all__ = ["append_lines", "read_lines"]


def append_lines(path: Path, records: Iterable[Mapping[str, Any]]) -> None:
    """
    Append records, one JSON line each. What a kill left of a line is cut off first.

    Args:
        path (`Path`):
            The file. Made if missing.
        records (`Iterable[Mapping]`):
            JSON values.
    """
    lines = "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records)
    _cut_torn_line(path)
    with open(path, "ab") as file:
        file.write(lines.encode("utf-8"))


def read_lines(path: Path) -> list[dict[str, Any]]:
    """
    Records of a file. A last line that was cut off by a kill is left out.

    Args:
        path (`Path`):
            The file. One that is missing has no records.

    Returns:
        `list[dict]`: the records.

    Raises:
        ValueError: a line that is no JSON and not the last one.
    """
    if not path.is_file():
        return []
    *lines, rest = path.read_bytes().split(b"\n")
    records = []
    for number, line in enumerate(lines, start=1):
        try:
            records.append(json.loads(line))
        except ValueError as error:
            raise ValueError(f"`output_dir`: line {number} of {path} is no JSON: {error}") from error
    # `rest` is what follows the last newline: empty, or a line that was being written when the process was killed.
    return records


def _cut_torn_line(path: Path) -> None:
    if not path.is_file() or not path.stat().st_size:
        return
    with open(path, "rb") as file:
        file.seek(-1, os.SEEK_END)
        whole = file.read() == b"\n"
    if not whole:
        os.truncate(path, path.read_bytes().rfind(b"\n") + 1)

"""Completions on disk: one JSON line each, appended as they come, so that a killed run goes on where it stopped."""

import hashlib
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from .day import clock_template


def append_lines(path: Path, records: Iterable[Mapping[str, Any]]) -> None:
    """Append records, one JSON line each. What a kill left of a line is cut off first."""
    lines = "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records)
    _cut_torn_line(path)
    with open(path, "ab") as file:
        file.write(lines.encode("utf-8"))


def read_lines(path: Path, fields: Sequence[str] = (), numbers: Sequence[str] = ()) -> list[dict[str, Any]]:
    """
    Records of a file, each with all of the fields and with counts from 0 under `numbers`. A last line that was cut off by a
    kill is left out.
    """
    if not path.is_file():
        return []
    *lines, rest = path.read_bytes().split(b"\n")
    records = []
    for number, line in enumerate(lines, start=1):
        try:
            record = json.loads(line)
        except ValueError as error:
            raise ValueError(f"`output_dir`: line {number} of {path} is no JSON: {error}") from error
        fault = _fault(record, fields, numbers)
        if fault is not None:
            raise ValueError(
                f"`output_dir`: line {number} of {path} {fault}. Delete the line, or choose another folder."
            )
        records.append(record)
    # `rest` is what follows the last newline: empty, or a line that was being written when the process was killed.
    return records


def _fault(record: Any, fields: Sequence[str], numbers: Sequence[str]) -> str | None:
    if not isinstance(record, dict):
        return "is no record"
    missing = next((name for name in (*numbers, *fields) if name not in record), None)
    if missing is not None:
        return f"lacks `{missing}`"
    odd = next((name for name in numbers if type(record[name]) is not int or record[name] < 0), None)
    return None if odd is None else f"has an odd `{odd}`"


def _cut_torn_line(path: Path) -> None:
    if not path.is_file() or not path.stat().st_size:
        return
    with open(path, "rb") as file:
        file.seek(-1, os.SEEK_END)
        whole = file.read() == b"\n"
    if not whole:
        os.truncate(path, path.read_bytes().rfind(b"\n") + 1)


Record = dict[str, Any]

_NAME = "completions"


class Store:
    """
    The folder of one task: its settings and its completions.

    Each rank appends to a file of its own; [`~Store.finish`] makes one sorted file of them.
    """

    def __init__(self, folder: Path, rank: int = 0, fields: Sequence[str] = ()):
        self.folder = folder
        self._fields = fields
        self.rank = rank

    @property
    def path(self) -> Path:
        """File with all completions, and the one that the first rank appends to."""
        return self.folder / f"{_NAME}.jsonl"

    def check(self, settings: Mapping[str, Any]) -> None:
        """Refuse to continue with completions that were made in another way."""
        before = self.settings()
        if not before:
            if self._files():
                raise ValueError(
                    f"`output_dir`: {self.folder} holds completions but no config.json: choose another one."
                )
            return
        now = json.loads(json.dumps(settings))
        changed = [key for key in sorted({*before, *now}) if before.get(key) != now.get(key)]
        if changed:
            listed = ", ".join(f"`{key}` ({_short(before.get(key))}, now {_short(now.get(key))})" for key in changed)
            raise ValueError(
                f"`output_dir`: {self.folder} holds completions made with another {listed}. Choose another `output_dir`, "
                "or delete that folder."
            )

    def settings(self) -> dict[str, Any]:
        """How the folder's completions were made; empty where there is nothing yet."""
        path = self.folder / "config.json"
        if not path.is_file():
            return {}
        try:
            found = json.loads(path.read_text(encoding="utf-8"))
        except ValueError:
            found = None
        if not isinstance(found, dict):
            raise ValueError(
                f"`output_dir`: {path} is damaged, so nobody knows how the completions beside it were made. Choose another "
                "`output_dir`, or delete that folder."
            )
        return found

    def day(self, tokenizer: Any, now: str) -> str | None:
        """The day that a chat template prints in all of the folder: that of its first start. `None` where it prints none."""
        return None if clock_template(tokenizer) is None else self.settings().get("day", now)

    def write_settings(self, settings: Mapping[str, Any]) -> None:
        """Make the folder and write the settings."""
        self.folder.mkdir(parents=True, exist_ok=True)
        _replace(self.folder / "config.json", json.dumps(settings, indent=2, ensure_ascii=False) + "\n")

    def read(self) -> list[Record]:
        """
        All completions, of all ranks, by question and sample. A last line that was cut off by a kill is left out.
        """
        found: dict[tuple[int, int], Record] = {}
        for path in self._files():
            for record in read_lines(path, self._fields, ("question", "sample")):
                found.setdefault((record["question"], record["sample"]), record)
        return [found[key] for key in sorted(found)]

    def append(self, records: Iterable[Record]) -> None:
        """Write completions. What a kill left of a line is cut off first."""
        path = self.path if self.rank == 0 else self.folder / f"{_NAME}-{self.rank}.jsonl"
        append_lines(path, records)

    def finish(self) -> list[Record]:
        """One file, sorted, in place of the ranks' own. For the main process alone, when all have finished."""
        records = self.read()
        _replace(self.path, "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records))
        for path in self._files():
            if path != self.path:
                path.unlink()
        return records

    def _files(self) -> list[Path]:
        return sorted(self.folder.glob(f"{_NAME}*.jsonl"))


def _replace(path: Path, text: str) -> None:
    """Write a file as a whole or not at all."""
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)


def _short(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 80 else f"{text[:77]}..."


_TAIL = 2**20
_WEIGHTS = ("*.safetensors", "pytorch_model*.bin", "adapter_model*.bin")


def model_fingerprint(directory: Path) -> str:
    """
    Hash of the names, the sizes and the last MiB of the weight files of a model directory.

    Training moves every weight, so the end of each file tells two models apart without reading gigabytes.
    """
    files = sorted({path for pattern in _WEIGHTS for path in directory.glob(pattern)})
    if not files:
        raise FileNotFoundError(f"`model`: {directory} holds no weights (*.safetensors or pytorch_model*.bin)")
    digest = hashlib.sha256()
    for path in files:
        size = path.stat().st_size
        digest.update(f"{path.name}/{size}/".encode())
        with open(path, "rb") as file:
            file.seek(max(0, size - _TAIL))
            digest.update(file.read())
    return digest.hexdigest()[:16]


def model_identity(name: str, **options: Any) -> dict[str, Any]:
    """What tells a model apart from another one of the same name, its weights not loaded."""
    from transformers import AutoConfig

    found: dict[str, Any] = {}
    if Path(name).is_dir():
        found["weights"] = model_fingerprint(Path(name))
    if not (Path(name) / "adapter_config.json").is_file():
        # An adapter's directory has no config of its own.
        found["revision"] = getattr(AutoConfig.from_pretrained(name, **options), "_commit_hash", None)
    return found

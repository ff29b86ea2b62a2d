"""Datasets by name: sources, generated tasks, local files, directories and the hub, with columns mapped to TRL's names."""

import inspect
from pathlib import Path
from typing import Any, TypeAlias

import yaml
from datasets import Dataset, DatasetDict, IterableDataset, IterableDatasetDict, load_dataset

from .addition import addition_dataset, addition_pairs
from .files import READERS, read_files
from .reasoning_gym_tasks import reasoning_gym_dataset
from .routes import routes_dataset
from .sources import load_source


__all__ = ["load_named_dataset", "map_columns", "with_system_prompt"]


"""From a file's ending to the reader of [`~datasets.load_dataset`]."""


AnyDataset: TypeAlias = Dataset | IterableDataset
AnyDatasetDict: TypeAlias = DatasetDict | IterableDatasetDict

_ADDITION = "builtin:addition"
_ROUTES = "builtin:routes"
_REASONING_GYM = "reasoning-gym:"
_SOURCE = "source:"


def load_named_dataset(name: str, config: str | None = None, streaming: bool = False) -> AnyDatasetDict:
    """Load a dataset by the name that a script argument gives."""
    if name == _ADDITION:
        return _call(_addition, name, config)
    if name == _ROUTES:
        return _call(routes_dataset, name, config)
    if name.startswith(_REASONING_GYM):
        return _call(reasoning_gym_dataset, name, config, task=name.removeprefix(_REASONING_GYM))
    if name.startswith(_SOURCE):
        return _call(load_source, name, config, name=name.removeprefix(_SOURCE), streaming=streaming)
    if Path(name).suffix in READERS:
        return read_files(name, streaming)
    return load_dataset(name, name=config, streaming=streaming)


def map_columns(dataset: AnyDataset, columns: dict[str, str | None], what: str) -> AnyDataset:
    """Rename columns to the names that the trainers read."""
    for target, source in columns.items():
        if source is None or source == target:
            continue
        present = list(dataset.column_names or [])
        if source not in present:
            raise ValueError(f"`{what}` has no column {source!r}; it has: {', '.join(present)}.")
        if target in present:
            dataset = dataset.remove_columns(target)
        dataset = dataset.rename_column(source, target)
    return dataset


def with_system_prompt(dataset: AnyDataset, system_prompt: str) -> AnyDataset:
    """
    Put a system message in front of every conversation; prompts and completions that are strings become messages.
    """
    present = list(dataset.column_names or [])
    system = {"role": "system", "content": system_prompt}

    def convert(row: dict[str, Any]) -> dict[str, Any]:
        converted = {}
        for column, role in (("prompt", "user"), ("completion", "assistant"), ("messages", "user")):
            if column not in present:
                continue
            value = row[column]
            messages = [{"role": role, "content": value}] if isinstance(value, str) else list(value)
            if column != "completion" and messages[0]["role"] != "system":
                messages = [system, *messages]
            converted[column] = messages
        return converted

    # Columns that change their type are dropped first: datasets would cast the messages back to strings.
    changed = [column for column in ("prompt", "completion", "messages") if column in present]
    return dataset.map(convert, remove_columns=changed)


def _addition(
    max_number: int = 9, size: int = 64, test_size: int = 32, wrong_share: float = 0.0, seed: int = 0
) -> DatasetDict:
    pairs = addition_pairs(max_number, seed)
    if size + test_size > len(pairs):
        raise ValueError(f"there are {len(pairs)} sums up to `max_number={max_number}`, fewer than size + test_size")
    test = pairs[size : size + test_size]
    return DatasetDict(
        {"train": addition_dataset(pairs[:size], wrong_share, seed), "test": addition_dataset(test, 0.0, seed)}
    )


def _call(maker: Any, called: str, config: str | None, **fixed: Any) -> Any:
    parameters: dict[str, Any] = {}
    for part in (config or "").replace(",", " ").split():
        key, equals, value = part.partition("=")
        if not equals:
            raise ValueError(f"the parameters of {called} are written as `key=value`, got {part!r}")
        if key in fixed:
            raise ValueError(f"{called} has no parameter {key!r}")
        parameters[key] = yaml.safe_load(value)
    takes = inspect.signature(maker).parameters
    if not any(p.kind is p.VAR_KEYWORD for p in takes.values()):
        for key in parameters:
            if key not in takes:
                raise ValueError(f"{called} has no parameter {key!r}; it has: {', '.join(takes)}")
    return maker(**fixed, **parameters)

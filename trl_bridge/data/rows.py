"""
From a dataset's name to the rows that are trained on, checked or evaluated: one way for all verbs.

A name stands for a source, a generated task, local files, a directory or a dataset on the hub. Of its splits one is taken; the
columns get TRL's names; the prompt template and the system message go around the questions.
"""

import inspect
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeAlias

from datasets import Dataset, DatasetDict, IterableDataset, IterableDatasetDict, load_dataset
from transformers import PreTrainedTokenizerBase

from ..demonstrations.rows import prompt_fault, split_demonstration
from ..generation import engines
from ..yaml_core import read_yaml
from .addition import addition_dataset, addition_pairs
from .files import code_of, is_file_name, read_files, refuse_lost_path, warn
from .reasoning_gym_tasks import reasoning_gym_dataset
from .routes import routes_dataset
from .search import search_dataset
from .sources import load_source
from .templates import Prompting, with_prompting


AnyDataset: TypeAlias = Dataset | IterableDataset
AnyDatasetDict: TypeAlias = DatasetDict | IterableDatasetDict
Columns: TypeAlias = Mapping[str, str | None]


def load(name: str, split: str, config: str | None = None, **options: Any) -> Any:
    """Rows of a split by the dataset's name. `options` are those of [`prepared`]."""
    return prepared(take_split(load_named_dataset(name, config), split, name), name, **options)


def load_named_dataset(name: str, config: str | None = None, streaming: bool = False) -> AnyDatasetDict:
    """All splits of a dataset by its name, with the columns that it has."""
    kind, _, rest = name.partition(":")
    if kind == "reasoning-gym":
        return _call(reasoning_gym_dataset, name, config, task=rest)
    if kind == "source":
        return _call(load_source, name, config, name=rest, streaming=streaming)
    if name in _GENERATED:
        return _call(_GENERATED[name], name, config)
    local = str(Path(name).expanduser()) if name.startswith("~") else name
    if is_file_name(local) and not Path(local).is_dir():
        return read_files(local, streaming)
    refuse_lost_path(local)
    return load_dataset(local, name=config, streaming=streaming)


def take_split(splits: AnyDatasetDict, split: str, what: str, argument: str = "dataset_split") -> AnyDataset:
    """One of the splits."""
    if split not in splits:
        known = ", ".join(map(str, splits))
        raise ValueError(f"`{argument}: {split}`: {what} has no such split; it has: {known}")
    return splits[split]


def prepared(
    rows: Any, what: str, columns: Columns | None = None, prompting: Prompting | None = None, limit: int | None = None
) -> Any:
    """Rows with the columns and the prompts that training reads."""
    rows = map_columns(rows, columns or {}, what)
    if limit is not None:
        rows = rows.select(range(min(limit, len(rows))))
    return rows if prompting is None else with_prompting(rows, prompting)


def map_columns(dataset: AnyDataset, columns: Columns, what: str) -> AnyDataset:
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


def within_prompt_length(
    dataset: Dataset | IterableDataset,
    tokenizer: PreTrainedTokenizerBase,
    max_prompt_length: int,
    what: str,
    chat_template_kwargs: dict[str, Any] | None = None,
) -> Dataset | IterableDataset:
    """The rows whose prompt is short enough; how many are dropped is logged."""
    if max_prompt_length < 1:
        raise ValueError(f"`max_prompt_length` must be at least 1, got {max_prompt_length}")
    if not {"prompt", "messages", "conversations"} & set(dataset.column_names or []):
        raise ValueError(f"`max_prompt_length`: the rows of `{what}` have no prompt to measure")
    kept = dataset.filter(
        lambda row, code: len(prompt_tokens(row, tokenizer, chat_template_kwargs)) <= max_prompt_length,
        fn_kwargs=code_of(sys.modules[__name__], engines),
    )
    if isinstance(dataset, IterableDataset):
        warn(f"`{what}` is streamed: its prompts above `max_prompt_length={max_prompt_length}` are dropped uncounted.")
        return kept
    if not len(kept):
        raise ValueError(
            f"every prompt of `{what}` ({len(dataset)} rows) has more than `max_prompt_length={max_prompt_length}` tokens"
        )
    if len(kept) < len(dataset):
        warn(
            f"{len(dataset) - len(kept)} of {len(dataset)} rows of `{what}` have prompts of more than "
            f"`max_prompt_length={max_prompt_length}` tokens and are dropped."
        )
    return kept


def prompt_tokens(
    row: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase, chat_template_kwargs: dict[str, Any] | None = None
) -> list[int]:
    """A row's prompt, as generation sees it."""
    return engines.prompt_ids(prompt_of(row), tokenizer, chat_template_kwargs)


def prompt_of(row: Mapping[str, Any]) -> Any:
    """A row's prompt; of a whole conversation, all but the last answer."""
    if not {"prompt", "messages", "conversations", "text"} & row.keys():
        raise ValueError(
            f"the rows have no column `prompt`; name it with `prompt_column`. They have: {', '.join(row)}"
        )
    prompt = row["prompt"] if "prompt" in row else split_demonstration(dict(row))[0]
    fault = prompt_fault(prompt) if "prompt" in row else None
    if fault is not None:
        raise ValueError(f"{fault}. Remove the row (`trl-bridge data prepare --clean` does).")
    return prompt


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


_GENERATED = {"builtin:addition": _addition, "builtin:routes": routes_dataset, "builtin:search": search_dataset}


def _call(maker: Any, called: str, config: str | None, **fixed: Any) -> Any:
    parameters: dict[str, Any] = {}
    for part in (config or "").replace(",", " ").split():
        key, equals, value = part.partition("=")
        if not equals:
            raise ValueError(f"the parameters of {called} are written as `key=value`, got {part!r}")
        if key in fixed:
            raise ValueError(f"{called} has no parameter {key!r}")
        parameters[key] = read_yaml(value)
    takes = inspect.signature(maker).parameters
    if not any(p.kind is p.VAR_KEYWORD for p in takes.values()):
        for key in parameters:
            if key not in takes:
                raise ValueError(f"{called} has no parameter {key!r}; it has: {', '.join(takes)}")
    return maker(**fixed, **parameters)

"""Rows of a demonstration dataset: which format they are in, and what in them is prompt and what completion."""

import json
from collections.abc import Mapping
from typing import Any

from datasets import Dataset
from trl import maybe_convert_to_chatml

from .tools import with_arguments


Prompt = str | list[dict[str, Any]]

_FORMATS = (
    "Pass rows in one of TRL's SFT formats: `prompt` and `completion`, `messages`, or `text` (strings or, for the "
    "first two, lists of messages)."
)


def python_rows(dataset: Dataset) -> Dataset:
    """A dataset whose rows are Python's values: a transform stays, another format leaves its choice of columns behind."""
    if dataset.format["type"] == "custom":
        return dataset
    return dataset.select_columns(dataset.format["columns"]).with_format(None)


def check_prompts(dataset: Any, what: str) -> None:
    """
    Refuse rows that cannot be asked. A stream and what a transform makes of rows cannot be looked through beforehand.
    """
    for name, part in dataset.items() if isinstance(dataset, Mapping) else ():
        check_prompts(part, f"{what}[{name!r}]")
    columns = getattr(dataset, "column_names", None)
    if isinstance(columns, list) and "prompt" not in columns:
        raise ValueError(
            f"`{what}` has no column `prompt`; name it with `prompt_column` on the command line, or rename it. It has: "
            f"{', '.join(columns)}."
        )
    if not isinstance(dataset, Dataset) or dataset.format["type"] == "custom":
        return
    if dataset.format["type"] not in (None, "torch"):
        raise ValueError(
            f"`{what}` has the format {dataset.format['type']!r}, whose rows are no prompts: pass `{what}.with_format(None)`."
        )
    first: tuple[int, str] | None = None
    for row, prompt in enumerate(dataset.with_format(None)["prompt"]):
        fault = prompt_fault(prompt)
        if fault is not None:
            raise ValueError(f"`{what}` row {row}: {fault}. Remove the row (`trl-bridge data prepare --clean` does).")
        kind = "a string" if isinstance(prompt, str) else "messages"
        first = first or (row, kind)
        if kind != first[1]:
            raise ValueError(
                f"`{what}` row {row}: `prompt` is {kind}, and that of row {first[0]} is {first[1]}. Make all of one kind."
            )


def check_nulls(dataset: Any, what: str) -> None:
    """Refuse demonstrations of which a part is missing, for TRL's trainer, which does not name the row."""
    if not isinstance(dataset, Dataset) or dataset.format["type"] == "custom":
        return
    for column in sorted({"prompt", "completion", "messages", "text"} & set(dataset.column_names)):
        for row, value in enumerate(dataset.with_format(None)[column]):
            if value is None:
                raise ValueError(
                    f"`{what}` row {row}: `{column}` is null. Remove the row (`trl-bridge data prepare --clean` does)."
                )


def check_size(train_dataset: Any, needed: int) -> None:
    """Refuse rows that do not fill one generation batch: TRL's sampler leaves an unfinished one out."""
    if isinstance(train_dataset, Dataset) and len(train_dataset) < needed:
        raise ValueError(
            f"`train_dataset` has {len(train_dataset)} rows (after `max_prompt_length`, where it is set), and one generation "
            f"batch takes {needed} prompts: no update would be made. Add rows, or lower `per_device_train_batch_size`, "
            "`gradient_accumulation_steps` or `generation_batch_size`."
        )


def prompt_fault(prompt: Any) -> str | None:
    """Why a prompt cannot be asked."""
    if prompt is None:
        return "`prompt` is null"
    if not isinstance(prompt, (str, list)):
        return f"`prompt` is neither a string nor messages, but `{type(prompt).__name__}`"
    if not prompt or (isinstance(prompt, str) and not prompt.strip()):
        return "`prompt` is empty"
    for message in prompt if isinstance(prompt, list) else ():
        if not isinstance(message, Mapping) or message.get("role") is None:
            return "a message of `prompt` has no `role`"
        if message.get("content") is None and not message.get("tool_calls"):
            return "a message of `prompt` has no `content`"
    return None


def prompt_key(prompt: Prompt) -> str:
    """
    Canonical JSON key of a prompt, equal for an RL row and an SFT row that hold the same prompt.

    Fields that a dataset's schema has filled with `None` do not count, nor does the order of a message's fields, nor
    whether a text stands as a string or as a single text block.
    """
    if not isinstance(prompt, str):
        prompt = [_canonical_message(message) for message in prompt]
    return json.dumps(prompt, ensure_ascii=False, sort_keys=True, separators=(",", ":"))


def _canonical_message(message: dict[str, Any]) -> dict[str, Any]:
    message = without_none(message)
    content = message.get("content")
    if isinstance(content, list) and len(content) == 1 and content[0].get("type") == "text":
        message["content"] = content[0]["text"]
    return message


def check_dataset(dataset: Dataset) -> None:
    """Refuse a dataset that holds no demonstrations."""
    if not isinstance(dataset, Dataset):
        raise TypeError(
            f"`sft_dataset` must be a `datasets.Dataset`, got `{type(dataset).__name__}`. Iterable datasets cannot be "
            "resumed exactly; a split of a `DatasetDict` is taken by name."
        )
    if len(dataset) == 0:
        raise ValueError("`sft_dataset` is empty: pass at least one demonstration.")
    # A transform may make other columns than those that are stored.
    columns = set(dataset[0] if dataset.format["type"] == "custom" else dataset.column_names)
    if not {"prompt", "completion"} <= columns and not columns & {"messages", "conversations", "text"}:
        missing = "a `prompt` column but no `completion`" if "prompt" in columns else "none of the columns needed"
        raise ValueError(f"`sft_dataset` has {missing} (its columns: {sorted(columns)}). {_FORMATS}")


def split_demonstration(example: dict[str, Any], row: str = "the demonstration") -> tuple[Prompt, Prompt]:
    """Prompt and completion of one row."""
    example = maybe_convert_to_chatml(dict(example))
    prompt: Prompt
    completion: Prompt
    if "prompt" in example and "completion" in example:
        prompt, completion = example["prompt"], example["completion"]
    elif "messages" in example:
        prompt, completion = _split_messages(example["messages"], row)
    else:
        prompt, completion = "", example["text"]
    prompt, completion = with_arguments(prompt, row), with_arguments(completion, row)
    for name, part in (("prompt", prompt), ("completion", completion)):
        if part is None:
            raise ValueError(f"{row}: `{name}` is null. Remove the row (`trl-bridge data prepare --clean` does).")
    strings = isinstance(prompt, str) and isinstance(completion, str)
    if not strings and not (isinstance(prompt, list) and isinstance(completion, list)):
        raise ValueError(
            f"{row}: prompt and completion must be two strings or two lists of messages, got "
            f"`{type(prompt).__name__}` and `{type(completion).__name__}`."
        )
    if isinstance(prompt, list) and not prompt:
        raise ValueError(f"{row} has no prompt: at least one message must come before the assistant's.")
    return prompt, completion


def _split_messages(messages: list[dict[str, Any]] | None, row: str) -> tuple[list[dict], list[dict]]:
    messages = messages or []
    turns = [position for position, message in enumerate(messages) if message["role"] == "assistant"]
    if not turns:
        raise ValueError(f"{row} has no completion tokens: no message of its `messages` is the assistant's.")
    first = turns[-1]
    # What a tool answers belongs to the turn that called it.
    while any(turn < first for turn in turns) and messages[first - 1]["role"] == "tool":
        first = max(turn for turn in turns if turn < first)
    return messages[:first], messages[first : turns[-1] + 1]


def without_none(value: Any) -> Any:
    """Without the `None`s that a dataset's schema fills in where rows have different fields."""
    if isinstance(value, dict):
        return {key: without_none(item) for key, item in value.items() if item is not None}
    if isinstance(value, list):
        return [without_none(item) for item in value]
    return value

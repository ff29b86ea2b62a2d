"""Rows of a demonstration dataset: which format they are in, and what in them is prompt and what completion."""

import json
from typing import Any

from datasets import Dataset
from trl import maybe_convert_to_chatml


Prompt = str | list[dict[str, Any]]

_FORMATS = (
    "Pass rows in one of TRL's SFT formats: `prompt` and `completion`, `messages`, or `text` (strings or, for the "
    "first two, lists of messages)."
)


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
    """
    Refuse a dataset that holds no demonstrations.

    Args:
        dataset ([`~datasets.Dataset`]):
            The user's `sft_dataset`.

    Raises:
        `TypeError`: if it is not a [`~datasets.Dataset`].
        `ValueError`: if it is empty, has none of the formats' columns, or has pictures.
    """
    if not isinstance(dataset, Dataset):
        raise TypeError(f"`sft_dataset` must be a `datasets.Dataset`, got `{type(dataset).__name__}`.")
    if len(dataset) == 0:
        raise ValueError("`sft_dataset` is empty: pass at least one demonstration.")
    columns = set(dataset.column_names)
    if not {"prompt", "completion"} <= columns and not columns & {"messages", "conversations", "text"}:
        missing = "a `prompt` column but no `completion`" if "prompt" in columns else "none of the columns needed"
        raise ValueError(f"`sft_dataset` has {missing} (its columns: {sorted(columns)}). {_FORMATS}")
    if columns & {"image", "images"}:
        raise ValueError("`sft_dataset` has pictures, which demonstrations do not support. Remove the column.")


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
    return messages[: turns[-1]], messages[turns[-1] : turns[-1] + 1]


def without_none(value: Any) -> Any:
    """Without the `None`s that a dataset's schema fills in where rows have different fields."""
    if isinstance(value, dict):
        return {key: without_none(item) for key, item in value.items() if item is not None}
    if isinstance(value, list):
        return [without_none(item) for item in value]
    return value

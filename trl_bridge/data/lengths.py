"""Prompts that are too long, left out before training."""

import sys
from typing import Any

from datasets import Dataset, IterableDataset
from transformers import PreTrainedTokenizerBase

from ..demonstrations.rows import split_demonstration
from .cache import code_of
from .log import warn


__all__ = ["prompt_tokens", "within_prompt_length"]


def prompt_tokens(
    row: dict[str, Any], tokenizer: PreTrainedTokenizerBase, chat_template_kwargs: dict[str, Any] | None = None
) -> list[int]:
    """
    A row's prompt, as generation sees it.

    Args:
        row (`dict[str, Any]`):
            Row with `prompt` (string or messages), or a demonstration in one of TRL's SFT formats.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]):
            Tokenizer of the model.
        chat_template_kwargs (`dict[str, Any]`, *optional*):
            Keyword arguments of the chat template.

    Returns:
        `list[int]`: its tokens, the generation prompt included.
    """
    prompt: Any = row["prompt"] if "prompt" in row else split_demonstration(row)[0]
    encoded: Any
    if isinstance(prompt, str):
        encoded = tokenizer(text=prompt)
    else:
        encoded = tokenizer.apply_chat_template(
            prompt, add_generation_prompt=True, tokenize=True, return_dict=True, **(chat_template_kwargs or {})
        )
    return list(encoded["input_ids"])


def within_prompt_length(
    dataset: Dataset | IterableDataset,
    tokenizer: PreTrainedTokenizerBase,
    max_prompt_length: int,
    what: str,
    chat_template_kwargs: dict[str, Any] | None = None,
) -> Dataset | IterableDataset:
    """
    The rows whose prompt is short enough; how many are dropped is logged.

    Args:
        dataset ([`~datasets.Dataset`] or [`~datasets.IterableDataset`]):
            Rows as [`prompt_tokens`] takes them.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]):
            Tokenizer of the model.
        max_prompt_length (`int`):
            Longest prompt, in tokens.
        what (`str`):
            Argument that named the dataset, for the messages.
        chat_template_kwargs (`dict[str, Any]`, *optional*):
            Keyword arguments of the chat template.

    Returns:
        [`~datasets.Dataset`] or [`~datasets.IterableDataset`]: the rows that are kept.

    Raises:
        ValueError: `max_prompt_length` below 1, rows without a prompt, or no row is left.
    """
    if max_prompt_length < 1:
        raise ValueError(f"`max_prompt_length` must be at least 1, got {max_prompt_length}")
    if not {"prompt", "messages", "conversations"} & set(dataset.column_names or []):
        raise ValueError(f"`max_prompt_length`: the rows of `{what}` have no prompt to measure")
    kept = dataset.filter(
        lambda row, code: len(prompt_tokens(row, tokenizer, chat_template_kwargs)) <= max_prompt_length,
        fn_kwargs=code_of(sys.modules[__name__]),
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

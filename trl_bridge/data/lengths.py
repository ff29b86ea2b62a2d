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
    """A row's prompt, as generation sees it."""
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
    """The rows whose prompt is short enough; how many are dropped is logged."""
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

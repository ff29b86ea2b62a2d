"""How an update's rows are cut into ranks and micro-batches, and what a resumed run that cuts them otherwise has to redo."""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch.nn import functional


RANKS = "world_size"
# Options whose product over all ranks makes up an update, a generation batch and an update's demonstrations.
_CUTS = (
    ("per_device_train_batch_size", "gradient_accumulation_steps"),
    ("per_device_train_batch_size", "steps_per_generation"),
    ("sft_per_device_train_batch_size", "gradient_accumulation_steps"),
)


def totals(layout: dict[str, int]) -> dict[str, int]:
    """What a resumed run has in common with the checkpoint's, however the two are cut."""
    return {
        " x ".join([*names, "ranks"]): layout[RANKS] * math.prod(layout[name] for name in names)
        for names in _CUTS
        if all(name in layout for name in names)
    }


def reshard_rollouts(
    buffers: Sequence[Sequence[dict[str, Any]]], micro_batches: int, world_size: int, rank: int, pad_token_id: int
) -> list[dict[str, Any]]:
    """
    A rank's part of buffered rollouts that other ranks have made.

    The rows of micro-batch 0 of all ranks come first, in rank order, then those of micro-batch 1: so the rows of an
    update stay those of that update.
    """
    pieces = [batch for batches in zip(*buffers, strict=True) for batch in batches]
    whole = {name: joined(name, [piece[name] for piece in pieces], pad_token_id) for name in pieces[0]}
    rows = len(whole["completion_ids"])
    size = rows // (micro_batches * world_size)
    starts = [(micro_batch * world_size + rank) * size for micro_batch in range(micro_batches)]
    return [
        {name: value[start : start + size] if has_rows(value) else value for name, value in whole.items()}
        for start in starts
    ]


def has_rows(value: Any) -> bool:
    """Whether a part of a batch of rollouts holds something of each row."""
    return isinstance(value, list) or (isinstance(value, torch.Tensor) and value.dim() > 0)


def joined(name: str, values: list[Any], pad_token_id: int) -> Any:
    """One part of several batches of rollouts, their rows one after the other."""
    if not has_rows(values[0]):
        return values[0]  # nothing, or a number of the whole generation batch
    if isinstance(values[0], list):
        return [row for value in values for row in value]
    if values[0].dim() == 1:
        return torch.cat(values)
    # Each rank has padded to its own longest row: prompts on the left, and what goes with completions on the right.
    width = max(value.size(1) for value in values)
    fill = filler(name, pad_token_id)
    return torch.cat([_padded(value, width, name.startswith("prompt_"), fill) for value in values])


def filler(name: str, pad_token_id: int) -> int:
    """What pads a tensor of rollouts to a longer row."""
    # VESPO multiplies the sampler's correction over all places, without a mask.
    return {"prompt_ids": pad_token_id, "completion_ids": pad_token_id, "importance_sampling_ratio": 1}.get(name, 0)


def _padded(value: torch.Tensor, width: int, left: bool, fill: int) -> torch.Tensor:
    missing = width - value.size(1)
    after = (0, 0) * (value.dim() - 2)
    return functional.pad(value, (*after, missing, 0) if left else (*after, 0, missing), value=fill)

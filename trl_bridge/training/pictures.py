"""Pictures of a batch of rollouts: what the forward takes of them beside tokens, row by row."""

from collections.abc import Sequence
from typing import Any

import torch

from .._upstream import PICTURE_INPUTS, split_pixel_values_by_grid, unsplit_pixel_values_by_grid


def picture_inputs(inputs: dict[str, Any]) -> dict[str, Any]:
    """What a batch has for the forward of a model that sees."""
    return {name: inputs[name] for name in PICTURE_INPUTS if inputs.get(name) is not None}


def one_entry_for_each_row(inputs: dict[str, Any]) -> dict[str, Any]:
    """
    A batch whose pixels TRL cuts by rows. Where they have an entry for each row, (B, pictures, ...), it would cut them by the
    number of pictures if there happen to be as many pictures as rows.
    """
    pixels = inputs.get("pixel_values")
    return {**inputs, "num_images": [1] * len(pixels)} if pixels is not None and pixels.dim() == 5 else inputs


def rows_of(inputs: dict[str, Any], rows: Sequence[int]) -> dict[str, Any]:
    """The forward's inputs of some rows; without pixels where none of these has a picture, which no model takes."""
    whole: dict[str, Any] = split_pixel_values_by_grid(one_entry_for_each_row(inputs))
    part: dict[str, Any] = {
        name: v[rows] if isinstance(v, torch.Tensor) else [v[row] for row in rows] for name, v in whole.items()
    }
    part = unsplit_pixel_values_by_grid(part)
    padding = part.get("pixel_attention_mask")
    seen = part["pixel_values"].numel() if padding is None else padding.any()
    return part if seen else {name: value for name, value in part.items() if name.endswith("token_type_ids")}

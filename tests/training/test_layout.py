"""Cutting an update into other ranks and micro-batches."""

import pytest
import torch

from trl_bridge.training.checkpoint.layout import reshard_rollouts, totals


def test_totals_are_those_of_any_cut():
    names = ("world_size", "per_device_train_batch_size", "gradient_accumulation_steps", "steps_per_generation")
    first = dict(zip(names, (2, 8, 2, 4), strict=True))
    second = dict(zip(names, (1, 4, 8, 16), strict=True))
    assert list(totals(first).values()) == [32, 64] and totals(first) == totals(second)
    assert totals({**first, "gradient_accumulation_steps": 3}) != totals(first)


def _batch(rows, prompt, completion):
    """Row r holds 10 r, 10 r + 1, ... beside the padding (99)."""
    columns = torch.arange(completion)
    ids = torch.tensor(rows).unsqueeze(1) * 10 + columns
    return {
        "prompt_ids": torch.full((len(rows), prompt), 7),
        "prompt_mask": torch.ones(len(rows), prompt, dtype=torch.long),
        "completion_ids": ids,
        "completion_mask": torch.ones_like(ids),
        "old_per_token_logps": -ids.float(),
        "importance_sampling_ratio": ids / 10,
        "top": torch.zeros(len(rows), completion, 3),
        "advantages": torch.tensor(rows).float(),
        "num_items_in_batch": torch.tensor(5),
        "sources": [str(row) for row in rows],
        "images": None,
    }


def test_rows_of_an_update_stay_those_of_it_and_are_padded_alike():
    # Two ranks with two micro-batches of two rows; updates of one micro-batch of each.
    buffers = [[_batch([0, 1], 2, 3), _batch([4, 5], 2, 3)], [_batch([2, 3], 1, 2), _batch([6, 7], 1, 2)]]
    one = reshard_rollouts(buffers, 4, 1, 0, pad_token_id=99)
    assert [batch["advantages"].tolist() for batch in one] == [[0, 1], [2, 3], [4, 5], [6, 7]]
    assert [batch["sources"] for batch in one] == [["0", "1"], ["2", "3"], ["4", "5"], ["6", "7"]]
    assert one[1]["completion_ids"].tolist() == [[20, 21, 99], [30, 31, 99]]
    assert one[1]["completion_mask"].tolist() == [[1, 1, 0], [1, 1, 0]]
    assert one[1]["prompt_ids"].tolist() == [[99, 7], [99, 7]] and one[1]["prompt_mask"].tolist() == [[0, 1], [0, 1]]
    assert one[1]["old_per_token_logps"].tolist() == [[-20, -21, 0], [-30, -31, 0]]
    assert one[1]["importance_sampling_ratio"].tolist() == [[2, pytest.approx(2.1), 1], [3, pytest.approx(3.1), 1]]
    assert one[1]["top"].shape == (2, 3, 3)
    assert all(batch["num_items_in_batch"] == 5 and batch["images"] is None for batch in one)
    # And back.
    again = [reshard_rollouts([one], 2, 2, rank, pad_token_id=99) for rank in range(2)]
    assert [[batch["advantages"].tolist() for batch in rank] for rank in again] == [[[0, 1], [4, 5]], [[2, 3], [6, 7]]]

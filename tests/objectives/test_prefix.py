import math

import pytest
import torch

from trl_bridge.objectives.expert import most_uncertain, prefix_advantages


NAN = math.nan


@pytest.mark.parametrize(
    ("rewards", "continuation", "own", "prefix"),
    [
        ([0, 0, 1, 1], "reward", [-1 / 3, -1 / 3, 2 / 3, 1], 2 / 3),
        ([0, 0, 1, 1], "none", [-1 / 3, -1 / 3, 2 / 3, 0], 2 / 3),
        ([0, 0, 0, 1], "reward", [0, 0, 0, 1], 1),
        ([1, 1, 1, 0], "reward", [0, 0, 0, 0], -1),
        ([1, NAN, 0, 2], "reward", [0.5, 0, -0.5, 2], 1.5),
        ([1, 0, 0, NAN], "reward", [2 / 3, -1 / 3, -1 / 3, 0], 0),
        ([NAN, NAN, NAN, 1], "reward", [0, 0, 0, 1], 0),
    ],
)
def test_advantages_from_raw_rewards(rewards, continuation, own, prefix):
    got_own, got_prefix = prefix_advantages(torch.tensor([rewards], dtype=torch.float64), "none", continuation)
    assert got_own.tolist() == [pytest.approx(own, abs=1e-12)]
    assert got_prefix.tolist() == [pytest.approx(prefix, abs=1e-12)]


def test_only_pure_rows_are_scaled():
    rewards = torch.tensor([[0.0, 2.0, 4.0, 5.0], [1.0, 1.0, 1.0, 3.0]], dtype=torch.float64)
    own, prefix = prefix_advantages(rewards, "group", "reward")
    assert own[0].tolist() == pytest.approx([-2 / 2.0001, 0, 2 / 2.0001, 5])
    assert own[1].tolist() == [0, 0, 0, 3]
    assert prefix.tolist() == [3, 2]


def test_bad_choices_are_refused():
    with pytest.raises(ValueError, match="`scale_rewards`"):
        prefix_advantages(torch.zeros(1, 4), "batch", "reward")
    with pytest.raises(ValueError, match="`continuation`"):
        prefix_advantages(torch.zeros(1, 4), "none", "mean")


def test_the_most_uncertain_of_the_masked_tokens():
    entropies = torch.tensor([[9.0, 0.1, 0.5, 0.2, 9.0], [9.0, 0.3, 0.9, 0.4, 9.0]])
    mask = torch.tensor([[0, 1, 1, 1, 0], [0, 1, 1, 1, 0]]).bool()
    kept = {share: most_uncertain(entropies, mask, share).nonzero().tolist() for share in (0.0, 0.2, 0.5, 1.0)}
    assert kept[0.0] == []
    # floor(6 * 0.8) = 4 are left out, and floor(6 * 0.5) = 3.
    assert kept[0.2] == [[0, 2], [1, 2]]
    assert kept[0.5] == [[0, 2], [1, 2], [1, 3]]
    assert kept[1.0] == mask.nonzero().tolist()


@pytest.mark.parametrize(
    ("count", "share", "kept"), [(10, 0.9, 9), (10, 0.2, 2), (5, 0.2, 1), (4, 0.2, 1), (1, 0.2, 1)]
)
def test_number_kept(count, share, kept):
    assert most_uncertain(torch.rand(1, count), torch.ones(1, count).bool(), share).sum() == kept


def test_ties_and_nothing_to_rank():
    entropies = torch.tensor([[1.0, 1.0, 1.0], [1.0, 2.0, 1.0]])
    everything = torch.ones(2, 3).bool()
    assert most_uncertain(entropies, everything, 0.5).nonzero().tolist() == [[0, 0], [0, 1], [1, 1]]
    assert not most_uncertain(entropies, ~everything, 0.5).any()

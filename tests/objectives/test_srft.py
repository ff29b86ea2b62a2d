import math

import pytest
import torch

from trl_bridge.objectives.expert import entropy_weight, sequence_entropy, verdict_advantages


def test_entropy_is_a_mean_over_the_sequence():
    entropies = torch.tensor([[1.0, 2.0, math.nan], [0.5, 9.0, 9.0], [9.0, 9.0, 9.0]], requires_grad=True)
    mask = torch.tensor([[1, 1, 0], [1, 0, 0], [0, 0, 0]])
    found = sequence_entropy(entropies, mask)
    assert found.tolist() == [[1.5], [0.5], [0.0]]
    assert not found.requires_grad


@pytest.mark.parametrize(("sign", "expected"), [(-1, [0.5, 0.5 * math.exp(-2.0)]), (1, [0.5, 0.5 * math.exp(2.0)])])
def test_weight_by_hand(sign, expected):
    entropy = torch.tensor([[0.0], [2.0]], dtype=torch.float64, requires_grad=True)
    found = entropy_weight(entropy, 0.5, sign)
    assert found.flatten().tolist() == pytest.approx(expected, rel=1e-12)
    assert not found.requires_grad


def test_advantages_by_verdict():
    log_probs = torch.tensor([[-0.1, -11.0], [-0.1, -11.0], [-0.1, -11.0], [-10.0, -10.1]], requires_grad=True)
    verdicts = torch.tensor([1.0, -1.0, 0.0, -1.0])
    weights = torch.tensor([[0.2], [0.3], [0.4], [0.5]])
    found = verdict_advantages(log_probs, verdicts, weights, -10.0)
    # The right sample keeps its improbable token, the wrong ones' are held back.
    assert torch.equal(found, torch.tensor([[0.2, 0.2], [-1.0, 0.0], [0.0, 0.0], [-1.0, 0.0]]))
    assert not found.requires_grad
    unguarded = verdict_advantages(log_probs, verdicts, weights, None)
    assert torch.equal(unguarded, torch.tensor([[0.2, 0.2], [-1.0, -1.0], [0.0, 0.0], [-1.0, -1.0]]))

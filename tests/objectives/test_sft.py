import math

import pytest
import torch

from trl_bridge.objectives.sft import demonstration_loss


@pytest.fixture
def batch():
    log_probs = torch.tensor([[0.5, 0.25, 0.1], [0.2, 0.4, 0.8]], dtype=torch.float64).log().requires_grad_()
    mask = torch.tensor([[True, True, False], [False, True, True]])
    return log_probs, mask


def test_worked_example(batch):
    log_probs, mask = batch
    weights = torch.tensor([[1.0, 0.5, 9.0], [9.0, 0.0, 2.0]])
    loss, sums = demonstration_loss(log_probs, mask, weights, num_tokens=10, world_size=2)
    nll = [math.log(2), math.log(4), math.log(2.5), math.log(1.25)]
    expected = (nll[0] + 0.5 * nll[1] + 0.0 * nll[2] + 2.0 * nll[3]) / 10 * 2
    assert loss.item() == pytest.approx(expected, rel=1e-12)
    assert sums["nll_sum"].item() == pytest.approx(sum(nll), rel=1e-12)
    assert sums["weight_sum"].item() == 3.5
    assert sums["zero_sum"].item() == 1
    assert sums["tokens"].item() == 4
    assert not any(value.requires_grad for value in sums.values())
    loss.backward()
    assert torch.allclose(log_probs.grad, -torch.tensor([[1.0, 0.5, 0.0], [0.0, 0.0, 2.0]]).double() / 5)


def test_without_weights_it_is_the_mean_negative_log_likelihood(batch):
    log_probs, mask = batch
    loss, sums = demonstration_loss(log_probs, mask, None, num_tokens=4)
    assert loss.item() == pytest.approx(-log_probs[mask].mean().item(), rel=1e-12)
    ones, _ = demonstration_loss(log_probs, mask, torch.ones(2, 1), num_tokens=4)
    assert torch.equal(loss, ones)
    assert sums["weight_sum"].item() == sums["tokens"].item() == 4 and sums["zero_sum"].item() == 0


def test_a_weight_for_each_demonstration(batch):
    log_probs, mask = batch
    per_demonstration = torch.tensor([[0.0], [0.5]], requires_grad=True)
    loss, sums = demonstration_loss(log_probs, mask, per_demonstration, num_tokens=4)
    assert loss.item() == pytest.approx((math.log(2.5) + math.log(1.25)) * 0.5 / 4)
    assert sums["weight_sum"].item() == 1.0 and sums["zero_sum"].item() == 2
    loss.backward()
    assert per_demonstration.grad is None


def test_micro_batches_add_up_to_the_window():
    generator = torch.Generator().manual_seed(0)
    log_probs = -torch.rand(4, 6, generator=generator, dtype=torch.float64)
    mask = torch.rand(4, 6, generator=generator) < 0.6
    weights = torch.rand(4, 1, generator=generator)
    whole, sums = demonstration_loss(log_probs, mask, weights, int(mask.sum()))
    parts = [
        demonstration_loss(log_probs[i : i + 1], mask[i : i + 1], weights[i : i + 1], torch.tensor(int(mask.sum())))
        for i in range(4)
    ]
    assert sum(loss for loss, _ in parts).item() == pytest.approx(whole.item(), rel=1e-12)
    for name, value in sums.items():
        assert sum(part[name] for _, part in parts).item() == pytest.approx(value.item(), rel=1e-6)


def test_what_is_not_trained_cannot_spoil_the_gradient():
    log_probs = torch.tensor([[-1.0, -torch.inf]], requires_grad=True)
    loss, _ = demonstration_loss(log_probs, torch.tensor([[True, False]]), torch.ones(1, 2), 1)
    loss.backward()
    assert loss.item() == 1.0
    assert log_probs.grad.tolist() == [[-1.0, 0.0]]

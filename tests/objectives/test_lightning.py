"""Lightning OPD's term in float64: closed forms, the clamp, the averages."""

import pytest
import torch

from trl_bridge.objectives.distill import reference_weights, stored_teacher_terms


ON = torch.ones(1, 1, dtype=torch.bool)


def gradient(logits, token, score, clip=10.0):
    logits = torch.tensor(logits, dtype=torch.float64, requires_grad=True)
    log_p = logits.log_softmax(-1)[token].view(1, 1)
    terms, sums = stored_teacher_terms(log_p, torch.tensor([[score]], dtype=torch.float64), ON, clip, "sequence")
    terms.sum().backward()
    return logits.grad, float(log_p.detach().exp()), sums


@pytest.mark.parametrize("score", [-0.1, -3.0])
def test_two_symbols(score):
    got, p, sums = gradient([0.3, -0.9], 0, score)
    advantage = score - torch.tensor(p, dtype=torch.float64).log()
    assert torch.allclose(got, torch.stack([-advantage * (1 - p), advantage * (1 - p)]), atol=1e-15)
    assert sums["advantage"] == pytest.approx(float(advantage)) and sums["tokens"] == 1


def test_clamp():
    logits, log_p = [1.0, 0.0, 0.5], torch.tensor([1.0, 0.0, 0.5], dtype=torch.float64).log_softmax(-1)[0]
    far, near = (gradient(logits, 0, float(log_p) + gap) for gap in (-30.0, -10.0))
    assert torch.allclose(far[0], near[0], atol=1e-15) and far[2]["clipped"] == 1 and near[2]["clipped"] == 0
    assert far[2]["advantage"] == pytest.approx(-30) and far[2]["advantage_abs"] == pytest.approx(30)
    free = gradient(logits, 0, float(log_p) - 30.0, clip=None)
    assert torch.allclose(free[0], 3 * near[0], atol=1e-14) and free[2]["clipped"] == 0


@pytest.fixture
def ragged():
    """Lengths 1 and 9, as a function of logits."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(2, 9, 5, dtype=torch.float64, generator=generator, requires_grad=True)
    tokens = torch.randint(5, (2, 9), generator=generator)
    teacher = torch.randn(2, 9, 5, dtype=torch.float64, generator=generator).log_softmax(-1)
    mask = torch.ones(2, 9, dtype=torch.bool)
    mask[0, 1:] = False
    pick = tokens.unsqueeze(2)
    return logits, logits.log_softmax(-1).gather(2, pick).squeeze(2), teacher.gather(2, pick).squeeze(2), mask


def test_sequences_or_tokens(ragged):
    logits, log_p, teacher, mask = ragged
    plain = (-(teacher - log_p.detach()) * log_p).masked_fill(~mask, 0.0)
    for aggregation, count, want in (
        ("token", 10, plain.sum() / 10),
        ("sequence", 2, (plain[0, 0] + plain[1].mean()) / 2),
    ):
        terms, _ = stored_teacher_terms(log_p, teacher, mask, None, aggregation)
        assert terms.masked_select(~mask).abs().sum() == 0
        (got,) = torch.autograd.grad(terms.sum() / count, logits, retain_graph=True)
        (expected,) = torch.autograd.grad(want, logits, retain_graph=True)
        assert torch.allclose(got, expected, atol=1e-15), aggregation


def test_a_shift_of_the_scores_adds_the_gradient_of_the_likelihood(ragged):
    logits, log_p, teacher, mask = ragged
    gradients = []
    for shift in (0.0, 0.7):
        terms, _ = stored_teacher_terms(log_p, teacher + shift, mask, None, "sequence")
        gradients += torch.autograd.grad(terms.sum() / 2, logits, retain_graph=True)
    mean = (log_p[0, 0] + log_p[1].mean()) / 2
    (want,) = torch.autograd.grad(-0.7 * mean, logits, retain_graph=True)
    assert torch.allclose(gradients[1] - gradients[0], want, atol=1e-15)


def test_what_is_masked_may_be_anything(ragged):
    logits, log_p, teacher, mask = ragged
    got = stored_teacher_terms(log_p, teacher.masked_fill(~mask, float("-inf")), mask, 10.0, "token")
    want = stored_teacher_terms(log_p, teacher, mask, 10.0, "token")
    assert torch.equal(got[0], want[0]) and all(torch.equal(got[1][k], want[1][k]) for k in want[1])
    assert torch.autograd.grad(got[0].sum(), logits)[0].isfinite().all()


def test_weights_against_the_model_that_sampled():
    log_p = torch.tensor([[0.5, 0.25, 0.9]]).log()
    sums = reference_weights(log_p, torch.tensor([[0.25, 0.5, 0.0]]).log(), torch.tensor([[True, True, False]]))
    assert float(sums["weight"]) == pytest.approx(2.5) and float(sums["weight_squared"]) == pytest.approx(4.25)

import math

import pytest
import torch

from trl_bridge.objectives.distill import (
    aggregate,
    imitation_gate,
    imitation_term,
    policy_term,
    reference_weights,
    stored_teacher_terms,
)


TEACHER = torch.tensor([0.4, 0.3, 0.2, 0.1], dtype=torch.float64)
LOGITS = torch.tensor([0.3, -0.7, 1.1, 0.2], dtype=torch.float64)


def student(logits=LOGITS):
    logits = logits.clone().requires_grad_()
    return logits, torch.log_softmax(logits, -1)


def gradient(loss, logits):
    return torch.autograd.grad(loss, logits)[0]


def test_expected_gradient_is_that_of_the_reverse_divergence():
    logits, log_p = student()
    # Every token that could be drawn, weighted by the probability that it is.
    losses = policy_term(log_p, TEACHER.log()).loss
    expected = gradient((log_p.exp().detach() * losses).sum(), logits)
    logits, log_p = student()
    reverse = gradient((log_p.exp() * (log_p - TEACHER.log())).sum(), logits)
    assert torch.allclose(expected, reverse, rtol=0, atol=1e-15)
    assert reverse.abs().max() > 0.05


def test_two_symbols_by_hand():
    logits, log_p = student(torch.tensor([0.8, -0.5], dtype=torch.float64))
    teacher = torch.tensor([0.9, 0.1], dtype=torch.float64)
    p = log_p[0].exp().item()
    term = policy_term(log_p[:1], teacher[:1].log())
    advantage = math.log(0.9) - math.log(p)
    assert term.advantages.item() == pytest.approx(advantage, rel=1e-12)
    assert gradient(term.loss.sum(), logits)[0].item() == pytest.approx(-advantage * (1 - p), rel=1e-12)


def test_clip():
    student_log_probs = torch.tensor([-1.0, -1.0, -1.0], requires_grad=True)
    term = policy_term(student_log_probs, torch.tensor([-31.0, -2.0, 0.0]), clip=10.0)
    assert term.advantages.tolist() == [-30.0, -1.0, 1.0]
    assert term.clipped.tolist() == [True, False, False]
    assert gradient(term.loss.sum(), student_log_probs).tolist() == [10.0, 1.0, -1.0]


def test_a_student_like_its_teacher_is_left_alone():
    logits, log_p = student()
    term = policy_term(log_p, log_p.detach())
    assert term.loss.tolist() == [0.0] * 4 and gradient(term.loss.sum(), logits).tolist() == [0.0] * 4


@pytest.mark.parametrize("k", [1, 2, 3, 4])
@pytest.mark.parametrize("matching", [False, True])
def test_gradient_of_the_truncated_divergence(k, matching):
    logits, log_p = student(TEACHER.log() if matching else LOGITS)
    loss = imitation_term(log_p[None, :k], TEACHER[None, :k].log()).sum()
    z = TEACHER[:k].sum()
    inside = torch.arange(4) < k
    closed = z * log_p.detach().exp() - TEACHER * inside
    assert torch.allclose(gradient(loss, logits), closed, rtol=0, atol=1e-15)
    # At a match it still draws the student into the set, unless the set is everything.
    assert bool((closed.abs() < 1e-15).all()) == (matching and k == 4)


def test_truncated_divergence_goes_below_zero():
    z = TEACHER[:2].sum()
    inside = TEACHER[:2] / z  # all of the student's mass on the set, shared out as the teacher's
    found = imitation_term(inside.log()[None], TEACHER[None, :2].log()).item()
    assert found == pytest.approx((z * z.log()).item(), rel=1e-12) and found < 0


def test_generalized_divergence_has_no_gradient_at_a_match():
    logits, log_p = student(TEACHER.log())
    loss = imitation_term(log_p[None, :2], TEACHER[None, :2].log(), generalized=True)
    assert gradient(loss.sum(), logits).abs().max() < 1e-15 and abs(loss.item()) < 1e-15
    logits, log_p = student()
    loss = imitation_term(log_p[None, :2], TEACHER[None, :2].log(), generalized=True).sum()
    p = log_p.detach().exp()
    by_hand = sum(TEACHER[v] * (TEACHER[v] / p[v]).log() - TEACHER[v] + p[v] for v in range(2))
    assert loss.item() == pytest.approx(by_hand.item(), rel=1e-12)


def test_normalized_by_k_and_entries_that_are_not_there():
    _, log_p = student()
    teacher = TEACHER.log()[None].clone()
    whole = imitation_term(log_p[None], teacher).item()
    assert imitation_term(log_p[None], teacher, normalize_by_k=True).item() == pytest.approx(whole / 4, rel=1e-12)
    teacher[0, 2:] = -math.inf
    logits, log_p = student()
    for generalized in (False, True):
        found = imitation_term(log_p[None], teacher, generalized=generalized)
        wanted = imitation_term(log_p[None, :2], teacher[:, :2], generalized=generalized)
        assert found.item() == pytest.approx(wanted.item(), rel=1e-12)
        assert gradient(found.sum(), logits).isfinite().all()
        logits, log_p = student()


@pytest.mark.parametrize(("ties", "share"), [(True, 2 / 3), (False, 1 / 3)])
def test_gate_by_hand(ties, share):
    teacher, student_p = torch.tensor([0.6, 0.5, 0.4]), torch.tensor([0.5, 0.5, 0.5])
    gate = imitation_gate(student_p.log(), teacher.log(), 0.0, ties)
    assert gate.tolist() == [False, ties, True]
    assert gate.double().mean().item() == pytest.approx(share)


def test_gate_compares_probabilities():
    # The first token's ratio is the greater, the second one's difference.
    teacher, student_p = torch.tensor([0.001, 0.5]), torch.tensor([0.01, 0.9])
    assert imitation_gate(student_p.log(), teacher.log(), -0.2, True).tolist() == [False, True]
    assert not imitation_gate(student_p.log(), teacher.log(), -1.0, False).any()
    assert imitation_gate(student_p.log(), teacher.log(), 1.0, False).all()


@pytest.mark.parametrize("ties", [True, False])
def test_limits_of_the_gate_hold_where_probabilities_round_to_0_and_1(ties):
    sure, excluded = torch.zeros(1), torch.full((1,), -200.0)
    assert not imitation_gate(sure, excluded, -1.0, ties).any()
    assert imitation_gate(excluded, sure, 1.0, ties).all()


TOKENS = torch.tensor([[1.0, 2.0, math.inf], [4.0, math.nan, math.inf], [math.inf] * 3], dtype=torch.float64)
MASK = torch.tensor([[1, 1, 0], [1, 0, 0], [0, 0, 0]])


@pytest.mark.parametrize(
    ("how", "options", "expected"),
    [
        ("token", {}, 7 / 3),
        ("token", {"num_items": 14}, 0.5),
        ("sequence", {}, 5.5 / 3),
        ("sequence", {"num_rows": 11}, 0.5),
    ],
)
def test_aggregation_by_hand(how, options, expected):
    assert aggregate(TOKENS, MASK, how, **options).item() == pytest.approx(expected, rel=1e-12)


def test_lengths_count_for_tokens_and_not_for_sequences():
    per_token = torch.tensor([[1.0] + [0.0] * 8, [10.0] * 9])
    mask = torch.tensor([[1] + [0] * 8, [1] * 9])
    assert aggregate(per_token, mask, "token").item() == pytest.approx(9.1)
    assert aggregate(per_token, mask, "sequence").item() == pytest.approx(5.5)


def test_nothing_to_train_on_is_zero():
    assert aggregate(TOKENS[2:], MASK[2:], "token").item() == 0.0
    assert aggregate(TOKENS[2:], MASK[2:], "sequence").item() == 0.0


def test_unknown_aggregation():
    with pytest.raises(ValueError, match="`loss_aggregation` must be one of 'token', 'sequence', got 'rows'"):
        aggregate(TOKENS, MASK, "rows")


# Stored scores (Lightning OPD)


ON = torch.ones(1, 1, dtype=torch.bool)


def stored_gradient(logits, token, score, clip=10.0):
    logits = torch.tensor(logits, dtype=torch.float64, requires_grad=True)
    log_p = logits.log_softmax(-1)[token].view(1, 1)
    terms, sums = stored_teacher_terms(log_p, torch.tensor([[score]], dtype=torch.float64), ON, clip, "sequence")
    terms.sum().backward()
    return logits.grad, float(log_p.detach().exp()), sums


@pytest.mark.parametrize("score", [-0.1, -3.0])
def test_two_symbols(score):
    got, p, sums = stored_gradient([0.3, -0.9], 0, score)
    advantage = score - torch.tensor(p, dtype=torch.float64).log()
    assert torch.allclose(got, torch.stack([-advantage * (1 - p), advantage * (1 - p)]), atol=1e-15)
    assert sums["advantage"] == pytest.approx(float(advantage)) and sums["tokens"] == 1


def test_clamp():
    logits, log_p = [1.0, 0.0, 0.5], torch.tensor([1.0, 0.0, 0.5], dtype=torch.float64).log_softmax(-1)[0]
    far, near = (stored_gradient(logits, 0, float(log_p) + gap) for gap in (-30.0, -10.0))
    assert torch.allclose(far[0], near[0], atol=1e-15) and far[2]["clipped"] == 1 and near[2]["clipped"] == 0
    assert far[2]["advantage"] == pytest.approx(-30) and far[2]["advantage_abs"] == pytest.approx(30)
    free = stored_gradient(logits, 0, float(log_p) - 30.0, clip=None)
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

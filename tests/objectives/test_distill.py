import math

import pytest
import torch

from trl_bridge.objectives.distill import aggregate, imitation_gate, imitation_term, policy_term


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

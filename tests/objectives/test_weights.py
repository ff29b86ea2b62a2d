import math

import pytest
import torch
from torch.nn.functional import binary_cross_entropy_with_logits

from trl_bridge.objectives import weights


LOG_PROBS = torch.tensor([[0.5, 0.25, 0.9], [0.2, 0.4, 0.8]]).log().requires_grad_()
MASK = torch.tensor([[True, True, False], [True, True, True]])


def assert_close(actual, expected):
    assert actual.dtype == torch.float64 and not actual.requires_grad
    assert torch.allclose(actual, torch.tensor(expected, dtype=torch.float64), rtol=1e-6, atol=0)


def test_token_likelihood():
    assert_close(weights.token_likelihood(LOG_PROBS, MASK), [[0.5, 0.25, 0.0], [0.2, 0.4, 0.8]])


def test_sequence_likelihood():
    assert_close(weights.sequence_likelihood(LOG_PROBS, MASK), [[0.125], [0.064]])


def test_phi():
    assert_close(weights.phi(LOG_PROBS, MASK), [[0.25, 0.1875, 0.0], [0.16, 0.24, 0.16]])


def test_phi_of_a_certain_token_keeps_its_digits():
    certain = torch.tensor([[-1e-12]], dtype=torch.float64)
    assert_close(weights.phi(certain, torch.tensor([[True]])), [[1e-12]])


# The judge


def rollouts(size=600, slope=1.2, seed=0):
    generator = torch.Generator().manual_seed(seed)
    s = -40 + 12 * torch.randn(size, generator=generator, dtype=torch.float64)
    chance = torch.sigmoid(-0.5 + slope * (s + 40) / 12)
    return s, (torch.rand(size, generator=generator, dtype=torch.float64) < chance).double()


@pytest.mark.parametrize("penalty", [0.1, 1.0, 30.0])
def test_fit_is_the_penalised_logistic_regression(penalty):
    s, r = rollouts()
    fit = weights.fit_judge(s, r, penalty)
    # The same objective, by gradient descent until the gradient vanishes.
    z = (s - s.mean()) / (s.std(correction=0) + 1e-6)
    b = torch.zeros(2, dtype=torch.float64, requires_grad=True)
    for _ in range(2000):
        loss = binary_cross_entropy_with_logits(b[0] + b[1] * z, r, reduction="sum") + penalty * b[1] ** 2
        (gradient,) = torch.autograd.grad(loss, b)
        b = (b - gradient / (len(s) / 4 + 2 * penalty)).detach().requires_grad_()
    assert gradient.abs().max() < 1e-10
    # Four Newton steps have converged on this problem: measured 3.4e-8 at most.
    assert (fit.b0, fit.b1) == pytest.approx(b.tolist(), abs=1e-7)
    assert fit.b1 > 0.5
    assert (fit.mean, fit.low, fit.high, fit.base_rate) == pytest.approx(
        (s.mean().item(), s.min().item(), s.max().item(), r.mean().item())
    )


def newton_by_hand(z, r, penalty, steps):
    rate = sum(r) / len(r)
    b0, b1 = math.log((rate + 0.01) / (1.01 - rate)), 0.0
    for _ in range(steps):
        p = [1 / (1 + math.exp(-b0 - b1 * zj)) for zj in z]
        g0 = sum(pj - rj for pj, rj in zip(p, r, strict=True))
        g1 = sum((pj - rj) * zj for pj, rj, zj in zip(p, r, z, strict=True)) + 2 * penalty * b1
        w = [pj * (1 - pj) for pj in p]
        h00, h01 = sum(w) + 1e-3, sum(wj * zj for wj, zj in zip(w, z, strict=True))
        h11 = sum(wj * zj * zj for wj, zj in zip(w, z, strict=True)) + 2 * penalty
        det = h00 * h11 - h01 * h01
        b0, b1 = b0 - (h11 * g0 - h01 * g1) / det, b1 - (h00 * g1 - h01 * g0) / det
    return b0, b1


def test_fit_takes_four_newton_steps():
    # Well separated and hardly penalised: far from converged after four steps, so that their number shows.
    s, r = [-30.0, -20.0, -12.0, -10.0, -4.0, -1.0], [0.0, 0.0, 0.0, 1.0, 1.0, 1.0]
    mean = sum(s) / 6
    std = math.sqrt(sum((x - mean) ** 2 for x in s) / 6) + 1e-6
    z = [(x - mean) / std for x in s]
    fit = weights.fit_judge(s, r, 0.001)
    assert (fit.b0, fit.b1) == pytest.approx(newton_by_hand(z, r, 0.001, 4), rel=1e-9)
    assert fit.b1 != pytest.approx(newton_by_hand(z, r, 0.001, 5)[1], rel=1e-2)
    assert (fit.mean, fit.std) == pytest.approx((mean, std), rel=1e-12)


def test_no_rollouts_no_judge():
    assert weights.fit_judge([], [], 1.0) is None
    assert weights.judge_weight(torch.tensor([-5.0, -500.0]), None, 4.0).tolist() == [1.0, 1.0]


@pytest.mark.parametrize("reward", [0.0, 1.0])
def test_equal_rewards_leave_sft_at_full_strength(reward):
    s, _ = rollouts(200)
    fit = weights.fit_judge(s, torch.full_like(s, reward), 1.0)
    assert all(math.isfinite(value) for value in (fit.b0, fit.b1))
    assert weights.judge_weight(torch.tensor([-100.0, -40.0, 0.0]), fit, 4.0).min() > 0.99


def test_equal_likelihoods_leave_sft_at_full_strength():
    fit = weights.fit_judge([-7.0] * 10, [1.0] * 4 + [0.0] * 6, 1.0)
    assert fit.b1 == pytest.approx(0.0, abs=1e-12)
    assert weights.judge_weight(torch.tensor([-100.0, -7.0, 0.0]), fit, 4.0).tolist() == pytest.approx([1.0] * 3)


def test_one_rollout():
    fit = weights.fit_judge([-7.0], [1.0], 1.0)
    assert all(math.isfinite(value) for value in (fit.b0, fit.b1, fit.std))


def test_fit_arguments():
    with pytest.raises(ValueError, match="`judge_penalty` must be above 0"):
        weights.fit_judge([1.0], [1.0], 0.0)
    with pytest.raises(ValueError, match="same length"):
        weights.fit_judge([1.0, 2.0], [1.0], 1.0)


def test_judge_weight_worked_example():
    fit = weights.JudgeFit(b0=-0.5, b1=2.0, mean=-20.0, std=10.0, low=-35.0, high=-5.0, base_rate=0.4)

    def by_hand(s):
        q = 1 / (1 + math.exp(0.5 - 2.0 * (min(max(s, -35.0), -5.0) + 20.0) / 10.0))
        return min(1.0, (q + 0.001) / 0.401) ** 4

    s = [-1000.0, -35.0, -28.0, -20.0, -5.0, 0.0]
    assert_close(weights.judge_weight(torch.tensor(s), fit, 4.0), [by_hand(x) for x in s])
    assert by_hand(-20.0) < 1 == by_hand(-5.0)
    assert_close(weights.judge_weight(torch.tensor(s), fit, 0.0), [1.0] * 6)


# The verdict


def test_flip_rate_worked_example():
    # Disagreement of pairs: 0, 2*1*1/(2*1) = 1, 2*1*2/(3*2) = 2/3; the row with one verdict is left out.
    differ = (0 + 1 + 2 / 3 + 0 + 0 + 0) / 6
    eps = weights.flip_rate([2, 2, 3, 1, 2, 4, 2], [2, 1, 1, 1, 0, 4, 0])
    assert 2 * eps * (1 - eps) == pytest.approx(differ)
    assert eps == pytest.approx((1 - math.sqrt(1 - 2 * differ)) / 2) and eps < 0.45


def test_flip_rate_bounds():
    assert weights.flip_rate([1, 1], [0, 1]) == weights.flip_rate([], []) == 1e-4
    assert weights.flip_rate([2, 2], [0, 2]) == 1e-4
    assert weights.flip_rate([2, 2], [1, 1]) == 0.45


def test_flip_rate_recovers_the_noise():
    generator = torch.Generator().manual_seed(0)
    right = torch.rand(20_000, 1, generator=generator) < 0.3
    flipped = torch.rand(20_000, 3, generator=generator) < 0.2
    v = (right ^ flipped).sum(dim=1)
    n = torch.full_like(v, 3)
    eps = weights.flip_rate(n, v)
    # Standard error of eps here about .003.
    assert eps == pytest.approx(0.2, abs=0.01)
    assert weights.verdict_prior(n, v, eps) == pytest.approx(0.3, abs=0.02)


def test_verdict_prior_worked_example():
    assert weights.verdict_prior([2, 4, 0], [1, 1, 0], 0.1) == pytest.approx((0.375 - 0.1) / 0.8)
    assert weights.verdict_prior([2, 2], [2, 2], 0.1) == 0.99
    assert weights.verdict_prior([2, 2], [0, 0], 0.1) == 0.01
    assert weights.verdict_prior([], [], 0.1) == 0.5


def test_verdict_weight_worked_example():
    def by_hand(n, v):
        # Bayes' rule with the likelihood of v right verdicts out of n.
        right, wrong = 0.3 * 0.8**v * 0.2 ** (n - v), 0.7 * 0.2**v * 0.8 ** (n - v)
        return right / (right + wrong)

    n, v = [0, 1, 2, 2, 3], [0, 1, 1, 0, 3]
    assert_close(weights.verdict_weight(n, v, 0.2, 0.3), [by_hand(*pair) for pair in zip(n, v, strict=True)])
    assert_close(weights.verdict_weight([0], [0], 0.2, 0.3), [0.3])


def test_a_deterministic_verifier_gives_all_or_nothing():
    n, v = [2, 2, 3], [2, 0, 3]
    eps = weights.flip_rate(n, v)
    weight = weights.verdict_weight(n, v, eps, weights.verdict_prior(n, v, eps))
    assert weight.tolist() == pytest.approx([1.0, 0.0, 1.0], abs=1e-6)


def test_trapo_replaces_one_over_p_in_the_gradient():
    p = torch.tensor([[0.001, 0.05, 0.1, 0.5, 1.0]], dtype=torch.float64, requires_grad=True)
    mask = torch.tensor([[True, True, True, True, False]])
    weight = weights.trapo(p.log(), mask)
    assert_close(weight[0], [0.01, 0.5, 1.0, 1.0, 0.0])
    (found,) = torch.autograd.grad((-weight * p.log()).sum(), p)
    assert_close(found[0], [-10.0, -10.0, -10.0, -2.0, 0.0])
    assert_close(weights.trapo(p.log(), mask, bound=0.5)[0], [0.002, 0.1, 0.2, 1.0, 0.0])

import itertools

import numpy as np
import pytest

from trl_bridge.evaluation import bootstrap_interval, pass_at_k, wilson_interval
from trl_bridge.evaluation.statistics import mean_interval


def test_pass_at_k_equals_a_count_over_all_choices():
    for n in range(1, 8):
        for c in range(n + 1):
            right = [True] * c + [False] * (n - c)
            for k in range(1, n + 1):
                choices = list(itertools.combinations(right, k))
                assert pass_at_k(n, c, k) == pytest.approx(sum(map(any, choices)) / len(choices), abs=1e-12)


def test_pass_at_k_is_stable_for_many_samples():
    # C(10000, 5000) is far beyond a float.
    assert pass_at_k(10_000, 1, 5_000) == pytest.approx(0.5)
    assert pass_at_k(10_000, 3, 1) == pytest.approx(3e-4)
    assert pass_at_k(10_000, 9_999, 2) == 1.0
    assert 0.0 < pass_at_k(10_000, 1, 1) < 1.1e-4


def test_pass_at_k_is_unbiased():
    p, n, k, generator = 0.3, 10, 4, np.random.default_rng(0)
    estimates = [pass_at_k(n, int(c), k) for c in generator.binomial(n, p, 20_000)]
    assert np.mean(estimates) == pytest.approx(1 - (1 - p) ** k, abs=0.005)
    # The estimate that it replaces is not: 1 - (1 - c/n)^k.
    plug_in = [1 - (1 - c / n) ** k for c in generator.binomial(n, p, 20_000)]
    assert abs(np.mean(plug_in) - (1 - (1 - p) ** k)) > 0.02


@pytest.mark.parametrize(("n", "c", "k"), [(4, 5, 1), (4, -1, 1), (4, 2, 0), (4, 2, 5)])
def test_pass_at_k_refuses(n, c, k):
    with pytest.raises(ValueError, match="must lie in"):
        pass_at_k(n, c, k)


@pytest.mark.parametrize(
    ("successes", "trials", "low", "high"),
    # By hand with z = 1.959964; the second and third are (0, z^2 / (n + z^2)) and its mirror image.
    [(8, 10, 0.490162, 0.943318), (0, 10, 0.0, 0.277533), (10, 10, 0.722467, 1.0), (250, 500, 0.456341, 0.543659)],
)
def test_wilson_interval_known_values(successes, trials, low, high):
    assert wilson_interval(successes, trials) == pytest.approx((low, high), abs=1e-6)


def test_wilson_interval_solves_its_quadratic():
    # Its ends are where the score test is just rejected: |p^ - p| = z sqrt(p (1 - p) / n).
    for successes, trials in [(3, 30), (17, 40), (299, 500)]:
        for p in wilson_interval(successes, trials):
            assert abs(successes / trials - p) == pytest.approx(1.959964 * (p * (1 - p) / trials) ** 0.5, rel=1e-5)


def test_wilson_interval_refuses():
    for successes, trials in [(0, 0), (3, 2), (-1, 2)]:
        with pytest.raises(ValueError, match="`trials`"):
            wilson_interval(successes, trials)


def test_bootstrap_interval_is_the_normal_one_for_many_questions():
    values = np.random.default_rng(1).random(400)
    low, high = bootstrap_interval(values)
    half = 1.96 * values.std() / 20
    assert (low, high) == pytest.approx((values.mean() - half, values.mean() + half), abs=0.003)


def test_bootstrap_interval_is_reproducible_and_leaves_global_state_alone():
    before = np.random.get_state()[1].copy()
    values = [0.0, 0.25, 1.0, 0.5]
    assert bootstrap_interval(values) == bootstrap_interval(values)
    assert bootstrap_interval(values, seed=1) != bootstrap_interval(values, resamples=50)
    assert (np.random.get_state()[1] == before).all()
    with pytest.raises(ValueError, match="`values`"):
        bootstrap_interval([])


def test_questions_that_are_all_alike_keep_a_width():
    assert bootstrap_interval([0.0] * 10) == (0.0, 0.0)
    assert mean_interval([0.0] * 10) == wilson_interval(0, 10)
    assert mean_interval([1.0] * 10) == wilson_interval(10, 10)
    assert mean_interval([0.0, 0.5]) == bootstrap_interval([0.0, 0.5])

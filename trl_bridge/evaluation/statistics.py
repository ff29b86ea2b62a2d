"""Accuracy over questions and samples: avg@k, the unbiased pass@k, and their intervals."""

from collections.abc import Sequence
from statistics import NormalDist

import numpy as np


Interval = tuple[float, float]

# Numbers that a bootstrap holds at a time.
_BLOCK = 1_000_000


def pass_at_k(samples: int, correct: int, k: int) -> float:
    """
    Unbiased estimate of the probability that at least one of `k` samples is right.

    `1 - C(n - c, k) / C(n, k)` of Chen et al. (2021), [Evaluating Large Language Models Trained on
    Code](https://huggingface.co/papers/2107.03374), equation 1, as the product that neither overflows nor cancels.

    Args:
        samples (`int`):
            Samples drawn for the question, n.
        correct (`int`):
            Right ones among them, c.
        k (`int`):
            Number of tries, at most n.

    Returns:
        `float`: the estimate, in [0, 1].

    Raises:
        ValueError: `correct` above `samples`, or `k` outside [1, `samples`].
    """
    if not 0 <= correct <= samples:
        raise ValueError(f"`correct` must lie in [0, {samples}], got {correct}.")
    if not 1 <= k <= samples:
        raise ValueError(f"`k` must lie in [1, {samples}], the number of samples, got {k}.")
    if samples - correct < k:
        return 1.0
    return float(1.0 - np.prod(1.0 - k / np.arange(samples - correct + 1, samples + 1)))


def wilson_interval(successes: int, trials: int, level: float = 0.95) -> Interval:
    """
    Wilson's score interval of a proportion (Wilson 1927), which stays inside [0, 1] and has a width at 0 and at 1 too.

    Args:
        successes (`int`):
            Right answers.
        trials (`int`):
            Questions, each answered once.
        level (`float`, *optional*, defaults to `0.95`):
            Coverage.

    Returns:
        `tuple[float, float]`: lower and upper end.

    Raises:
        ValueError: no trial, or more successes than trials.
    """
    if trials < 1 or not 0 <= successes <= trials:
        raise ValueError(
            f"`successes` must lie in [0, `trials`] and `trials` be 1 or more, got {successes}, {trials}."
        )
    z = NormalDist().inv_cdf(0.5 + level / 2)
    share = successes / trials
    scale = 1 + z**2 / trials
    middle = (share + z**2 / (2 * trials)) / scale
    half = z / scale * (share * (1 - share) / trials + z**2 / (4 * trials**2)) ** 0.5
    # Rounding may step over the ends by one unit in the last place.
    return max(0.0, middle - half), min(1.0, middle + half)


def bootstrap_interval(values: Sequence[float], level: float = 0.95, resamples: int = 2000, seed: int = 0) -> Interval:
    """
    Percentile interval of a mean over questions, by drawing the questions again with replacement.

    The questions are the unit: samples of one question are alike, so an interval over all samples would be too narrow.

    Args:
        values (`Sequence[float]`):
            One value per question, such as its share of right samples or its pass@k.
        level (`float`, *optional*, defaults to `0.95`):
            Coverage.
        resamples (`int`, *optional*, defaults to `2000`):
            Number of draws.
        seed (`int`, *optional*, defaults to `0`):
            Seed of a generator of its own.

    Returns:
        `tuple[float, float]`: lower and upper end.

    Raises:
        ValueError: no value.
    """
    if not len(values):
        raise ValueError("`values` is empty: there is no question to draw from.")
    given = np.asarray(values, dtype=np.float64)
    generator = np.random.default_rng(seed)
    # In blocks: all resamples at once would take gigabytes for the largest benchmarks, one by one is slow for five seeds.
    block = max(1, _BLOCK // len(given))
    counts = [min(block, resamples - done) for done in range(0, resamples, block)]
    draws = (given[generator.integers(len(given), size=(count, len(given)))] for count in counts)
    means = np.concatenate([drawn.mean(axis=1) for drawn in draws])
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def mean_interval(values: Sequence[float], level: float = 0.95) -> Interval:
    """
    Interval of a mean over questions: the bootstrap's; where all values are 0 or all are 1, Wilson's.

    Questions that are all alike have a bootstrap interval without width, which would say that no further question could
    be any different. Wilson's, as if each had been answered once, is the cautious one there.
    """
    if len(values) and set(values) in ({0.0}, {1.0}):
        return wilson_interval(round(sum(values)), len(values), level)
    return bootstrap_interval(values, level)

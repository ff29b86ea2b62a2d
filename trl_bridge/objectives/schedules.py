"""Weights that change from update to update: pure functions of the update's number, counted from 0."""

import math


def linear_ramp(step: int, start: float, end: float, steps: int) -> float:
    """A straight line from `start` to `end`, then `end`."""
    if steps == 0:
        return end
    return start + (end - start) * min(1.0, step / steps)


def cosine_decay(step: int, high: float, low: float, steps: int) -> float:
    """Half a cosine from `high` to `low`, `low + (high - low) * (1 + cos(pi * step / steps)) / 2`, then `low`."""
    if step >= steps:
        return low
    return low + (high - low) * (1 + math.cos(math.pi * step / steps)) / 2


def chord_mu(step: int, peak: float, valley: float, warmup_steps: int, decay_steps: int) -> float:
    """
    Weight of SFT in CHORD (arXiv 2508.11408): linear from 0 to the peak, half a cosine down to the valley, the valley.

    The decay starts at the peak in update `warmup_steps` and is over in update `warmup_steps + decay_steps`. With both
    at 0 the weight is the valley throughout; with a decay of 0 alone the peak is never reached.
    """
    if step < warmup_steps:
        return linear_ramp(step, 0.0, peak, warmup_steps)
    return cosine_decay(step - warmup_steps, peak, valley, decay_steps)

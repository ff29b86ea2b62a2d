import math

import pytest

from trl_bridge.objectives.schedules import chord_mu, cosine_decay, linear_ramp


@pytest.mark.parametrize(
    ("step", "value"), [(0, 0.2), (1, 0.35), (2, 0.5), (4, 0.8), (5, 0.8), (1000, 0.8)], ids=lambda v: str(v)
)
def test_linear_ramp(step, value):
    assert linear_ramp(step, 0.2, 0.8, 4) == pytest.approx(value, abs=1e-15)
    assert linear_ramp(step, 0.8, 0.2, 4) == pytest.approx(1.0 - value, abs=1e-15)


def test_linear_ramp_of_no_steps_is_its_end():
    assert linear_ramp(0, 0.2, 0.8, 0) == 0.8
    assert linear_ramp(4, 0.2, 0.8, 4) == 0.8


def test_cosine_decay():
    # (1 + cos(pi / 3)) / 2 = 3/4
    values = [cosine_decay(step, 0.9, 0.1, 3) for step in (0, 1, 2, 3, 50)]
    assert values == pytest.approx([0.9, 0.7, 0.3, 0.1, 0.1], abs=1e-12)
    assert cosine_decay(0, 0.9, 0.1, 0) == 0.1


@pytest.mark.parametrize(
    ("step", "mu"),
    [
        (0, 0.0),
        (100, 0.25),
        (199, 0.5 * 199 / 200),
        (200, 0.5),  # the peak, where the decay starts
        (300, 0.02 + 0.48 * (1 + math.sqrt(0.5)) / 2),
        (400, 0.26),
        (599, 0.02 + 0.48 * (1 + math.cos(math.pi * 399 / 400)) / 2),
        (600, 0.02),
        (10_000, 0.02),
    ],
)
def test_mu_of_the_released_example(step, mu):
    assert chord_mu(step, peak=0.5, valley=0.02, warmup_steps=200, decay_steps=400) == pytest.approx(mu, abs=1e-12)


def test_mu_of_the_paper():
    # CHORD-mu starts at its peak, CHORD-phi is constant.
    values = [chord_mu(step, 0.9, 0.05, 0, 200) for step in (0, 100, 200)]
    assert values == pytest.approx([0.9, 0.475, 0.05])
    assert [chord_mu(step, 0.1, 0.1, 0, 0) for step in (0, 1, 500)] == [0.1] * 3


def test_mu_without_warmup_and_decay_is_the_valley():
    assert [chord_mu(step, 0.9, 0.05, 0, 0) for step in (0, 1, 2)] == [0.05] * 3


def test_mu_without_decay_never_reaches_the_peak():
    assert [chord_mu(step, 0.8, 0.1, 2, 0) for step in range(4)] == pytest.approx([0.0, 0.4, 0.1, 0.1])

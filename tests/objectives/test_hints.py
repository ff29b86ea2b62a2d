import math

import pytest

from trl_bridge.objectives.expert import hint_probability, hint_stage


@pytest.mark.parametrize(
    ("step", "probability"),
    [
        (0, 0.05 + 0.45 * (1 + math.cos(math.pi / 300))),
        (149, 0.5),
        (199, 0.05 + 0.45 * (1 - 0.5)),
        (299, 0.05),
        (300, 0.0),
        (10_000, 0.0),
    ],
)
def test_probability_at_chosen_updates(step, probability):
    assert hint_probability(step, 0.95, 0.05, 300) == pytest.approx(probability, abs=1e-12)


def test_probability_falls_and_needs_no_updates():
    values = [hint_probability(step, 0.95, 0.05, 300) for step in range(301)]
    assert all(later < earlier for earlier, later in zip(values, values[1:], strict=False))
    assert hint_probability(0, 0.95, 0.05, 0) == 0.0


def test_staircase():
    # 300 updates, 6 stairs of 50, counted from 1: the published floor shortens the first one by an update.
    shown = [hint_stage(step, 5, 300) for step in range(302)]
    assert [shown.count(pieces) for pieces in range(6)] == [53, 50, 50, 50, 50, 49]
    assert shown == sorted(shown, reverse=True)
    assert (shown[48], shown[49], shown[299], shown[300]) == (5, 4, 0, 0)
    # Fewer updates than stairs.
    assert [hint_stage(step, 5, 3) for step in range(4)] == [4, 3, 2, 0]

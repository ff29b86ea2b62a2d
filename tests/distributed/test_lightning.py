"""Lightning OPD on two gloo processes, launched as a user would, against the single-process float64 reference."""

import pytest

from tests.distributed.launch import launch, load
from tests.helpers.lightning_opd import replay, student
from tests.helpers.resume import assert_same
from tests.helpers.training import movement_error


pytestmark = pytest.mark.distributed
TOLERANCE = 1e-4


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("lightning")
    launch("run_lightning", folder)
    return folder


@pytest.mark.parametrize("aggregation", ["sequence", "token"])
def test_two_ranks_equal_the_reference(folder, aggregation):
    ranks = load(folder, aggregation)
    first = ranks[0]
    windows = [sum(parts, []) for parts in zip(*(rank["windows"] for rank in ranks), strict=True)]
    assert [sum(len(batch["labels"]) for batch in window) for window in windows] == [8, 4, 8]
    steps = replay(student(), first["start"], windows, 0.01, aggregation=aggregation)
    for (weights, metrics), state, entry in zip(steps, first["states"], first["log"], strict=True):
        assert movement_error(state, weights, first["start"]) < TOLERANCE
        assert entry["loss"] == pytest.approx(metrics["loss"], rel=1e-3)
    assert_same(ranks[1]["states"], first["states"])
    assert ranks[0]["windows"][0][0]["input_ids"].tolist() != ranks[1]["windows"][0][0]["input_ids"].tolist()


@pytest.mark.parametrize("rank", [0, 1])
def test_resume_is_exact_on_two_ranks(folder, rank):
    straight, resumed = load(folder, "resume")[rank]
    assert_same(resumed, straight)

"""The distillation trainers on two gloo processes, launched as a user would, against the float64 reference."""

from types import SimpleNamespace

import pytest

from tests.distributed.launch import launch, load
from tests.distributed.run_distillation import CASES
from tests.helpers.distillation import replay
from tests.helpers.resume import assert_same


pytestmark = pytest.mark.distributed


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("distillation")
    launch("run_distillation", folder)
    return folder


@pytest.mark.parametrize("name", CASES)
def test_two_ranks_equal_the_reference(folder, name):
    first, second = load(folder, name)
    windows = [a + b for a, b in zip(first["windows"], second["windows"], strict=True)]
    counts = [[int(b["completion_mask"].sum()) for w in rank["windows"] for b in w] for rank in (first, second)]
    assert counts[0] != counts[1], "ranks with as many tokens hide how they are averaged"
    assert max(replay(SimpleNamespace(**{**first, "windows": windows}))) < 2e-4


@pytest.mark.parametrize("name", CASES)
def test_ranks_agree_to_the_bit(folder, name):
    first, second = load(folder, name)
    assert_same(first["states"], second["states"])
    logs = [
        [{k: v for k, v in entry.items() if k.startswith(("opd/", "aopd/"))} for entry in rank["log"]]
        for rank in (first, second)
    ]
    assert logs[0][0] and logs[0] == logs[1]


def test_resume_is_exact_on_two_ranks(folder):
    for straight, resumed in load(folder, "resume"):
        assert_same(resumed, straight)

"""The distillation trainers on two gloo processes, launched as a user would, against the float64 reference."""

from types import SimpleNamespace

import pytest
import torch
from peft import get_peft_model

from tests.distributed.launch import folder_of_runs, load, params_of
from tests.distributed.run_distillation import CASES, RESUMED
from tests.helpers import lightning_opd
from tests.helpers.distillation import replay, small_student
from tests.helpers.resume import assert_same
from tests.helpers.saved_models import assert_saved
from tests.helpers.training import movement_error, small_lora


pytestmark = pytest.mark.distributed
TOLERANCE = 2e-4


def is_stored(name):
    return name.startswith("lightning")


def cases_of(stored):
    """(backend, case) of the trainers whose teacher's scores are stored, or of the others."""
    return params_of(
        {kind: [case for case in CASES[kind] if is_stored(case) == stored] for kind in CASES}, "run_distillation"
    )


# By backend.
folder = folder_of_runs("run_distillation")


def student(name):
    """The model of a case before training, with an adapter where it trains one."""
    model = lightning_opd.student() if is_stored(name) else small_student()
    return get_peft_model(model, small_lora()) if "lora" in name else model


@pytest.mark.parametrize(("kind", "name"), cases_of(False))
def test_two_ranks_equal_the_reference(folder, kind, name):
    first, second = load(folder(kind), name)
    windows = [a + b for a, b in zip(first["windows"], second["windows"], strict=True)]
    counts = [[int(b["completion_mask"].sum()) for w in rank["windows"] for b in w] for rank in (first, second)]
    assert counts[0] != counts[1], "ranks with as many tokens hide how they are averaged"
    errors = replay(SimpleNamespace(**{**first, "windows": windows}), student(name))
    assert max(errors) < TOLERANCE, errors


@pytest.mark.parametrize(("kind", "name"), cases_of(True))
def test_two_ranks_equal_the_reference_with_stored_scores(folder, kind, name):
    ranks = load(folder(kind), name)
    first = ranks[0]
    windows = [sum(parts, []) for parts in zip(*(rank["windows"] for rank in ranks), strict=True)]
    assert [sum(len(batch["labels"]) for batch in window) for window in windows] == [8, 4, 8]
    aggregation = first["args"].loss_aggregation
    assert aggregation == ("token" if "token" in name else "sequence")
    rate = first["args"].learning_rate
    steps = lightning_opd.replay(student(name), first["start"], windows, rate, aggregation=aggregation)
    for (weights, metrics), state, entry in zip(steps, first["states"], first["log"], strict=True):
        assert movement_error(state, weights, first["start"]) < TOLERANCE
        assert entry["loss"] == pytest.approx(metrics["loss"], rel=1e-3)
    assert ranks[0]["windows"][0][0]["input_ids"].tolist() != ranks[1]["windows"][0][0]["input_ids"].tolist()


@pytest.mark.parametrize(("kind", "name"), params_of(CASES, "run_distillation"))
def test_ranks_agree_to_the_bit(folder, kind, name):
    first, second = load(folder(kind), name)
    assert_same(first["states"], second["states"])
    logs = [
        [{k: v for k, v in entry.items() if k.startswith(("opd/", "aopd/"))} for entry in rank["log"]]
        for rank in (first, second)
    ]
    assert logs[0][0] and logs[0] == logs[1]


@pytest.mark.parametrize(("kind", "name"), params_of(CASES, "run_distillation"))
def test_saved_model_is_the_student(folder, kind, name, tmp_path):
    trained = load(folder(kind), name)[0]["states"][-1]
    base = student(name).unload() if "lora" in name else None
    assert_saved(folder(kind) / name / "final", trained, base, tmp_path)


@pytest.mark.parametrize("other", ["ddp", "fsdp"])
def test_an_offloaded_teacher_says_the_same(folder, other):
    """To the bit on DDP, and in what is logged of it where it is sharded too."""
    plain, offloaded = (
        load(folder(kind), name)[0] for kind, name in (("ddp", "aopd-code"), (other, "aopd-code, offload"))
    )
    if other == "ddp":
        assert_same(offloaded["states"], plain["states"])
    got, want = (run["log"][0]["opd/teacher_logprob"] for run in (offloaded, plain))
    assert got == pytest.approx(want, abs=1e-5)


@pytest.mark.parametrize(("kind", "name"), params_of(RESUMED, "run_distillation", "resume "))
def test_resume_is_exact_on_two_ranks(folder, kind, name):
    for rank in range(2):
        straight, resumed = torch.load(folder(kind) / f"{name}-resume-{rank}.pt", weights_only=False)
        assert_same(resumed, straight)

"""The stream baselines on two gloo processes, launched as a user would, against the single-process float64 reference."""

import pytest
import torch
from peft import get_peft_model

from tests.distributed.launch import folder_of_runs, load, params_of
from tests.distributed.run_streams import CASES, PACKED, RESUMES
from tests.helpers.resume import assert_same
from tests.helpers.saved_models import assert_saved
from tests.helpers.streams import sharp_model
from tests.helpers.teachers import scored
from tests.helpers.training import movement_error
from trl_bridge.models import load as load_model
from trl_bridge.selftest.reference.stream import StreamReference


pytestmark = pytest.mark.distributed
TOLERANCE = 2e-4
MU = (0.0, 0.8, 0.5, 0.2)
METHODS = {
    "naive-mix": {"sft_weight": lambda step: 0.5},
    "alternating": {},
    "chord": {
        "rl_weight": lambda step: 1 - MU[step],
        "sft_weight": lambda step: MU[step],
        "token_weight": lambda p: p * (1 - p),
    },
}


def method_of(name):
    return name.partition(", ")[0]


def student(kind, name):
    """The model of a case as it is before training, with its adapter where it has one."""
    return student_of(CASES[kind][name][2])


def student_of(way):
    lora = way.get("peft_config")
    return sharp_model() if lora is None else get_peft_model(sharp_model(), lora)


# By backend.
folder = folder_of_runs("run_streams")


@pytest.mark.parametrize(("kind", "name"), params_of(CASES, "run_streams"))
def test_two_ranks_equal_the_reference(folder, kind, name):
    ranks = load(folder(kind), name)
    main = ranks[0]
    ones = {"rl_weight": lambda step: 1.0, "sft_weight": lambda step: 1.0, "token_weight": torch.ones_like}
    options = {
        **main["options"],
        "world_size": 2,
        "schedule": lambda step: (4 - step) / 4,
        **ones,
        **METHODS[method_of(name)],
    }
    if "teacher" in name:
        form = CASES[kind][name][2].get("teacher_form", "advantage")
        options["teacher"] = {"form": form, "kl": "k2", "weight": lambda step: 0.5}
        for rank in ranks:
            scored(rank["windows"], load_model("builtin:tiny", 12), options["temperature"])
    reference = StreamReference(student(kind, name), main["start"], options)
    for step, (state, entry) in enumerate(zip(main["states"], main["log"], strict=True)):
        joined = {k: [x for rank in ranks for x in rank["windows"][step][k]] for k in ("rl", "sft", "weights")}
        metrics = reference.update(step, joined["rl"], joined["sft"], joined["weights"])
        assert movement_error(state, reference.weights, main["start"]) < TOLERANCE, step
        for key in ("loss", "rl/loss", "sft/loss", "sft/mean_token_accuracy"):
            assert (key in entry) == (key in metrics), (step, key)
            if key in entry:
                assert entry[key] == pytest.approx(metrics[key], rel=3e-3, abs=5e-6), (step, key)


@pytest.mark.parametrize(("kind", "name"), params_of(CASES, "run_streams"))
def test_ranks_agree_to_the_bit_and_train_on_different_rows(folder, kind, name):
    first, second = load(folder(kind), name)
    assert_same(first["states"], second["states"])
    windows = list(zip(first["windows"], second["windows"], strict=True))
    # The same passes on every rank, on rows of its own.
    assert all(len(x[key]) == len(y[key]) for x, y in windows for key in ("rl", "sft"))
    pairs = [(x, y) for a, b in windows for x, y in zip(a["sft"], b["sft"], strict=True)]
    assert pairs and all(x["input_ids"].tolist() != y["input_ids"].tolist() for x, y in pairs)


@pytest.mark.parametrize(("kind", "name"), params_of(CASES, "run_streams"))
def test_saved_model_is_the_student(folder, kind, name, tmp_path):
    trained = load(folder(kind), name)[0]["states"][-1]
    assert_saved(folder(kind) / name / "final", trained, sharp_model() if "lora" in name else None, tmp_path)


@pytest.mark.parametrize("rank", [0, 1])
def test_mu_zero_is_grpo_on_two_ranks(folder, rank):
    pairs = load(folder("ddp"), "pairs")[rank]
    assert_same(pairs["CHORDTrainer"], pairs["GRPOTrainer"])


@pytest.mark.parametrize(("kind", "name"), params_of(PACKED, "run_streams"))
def test_grpo_without_padding_on_two_ranks(folder, kind, name):
    first, second = load(folder(kind), "pairs")
    found = first[name]
    assert_same(found[True], second[name][True])
    assert found["packs"] and max(found["dead"]) > 0
    # Of all ranks: those of a padded run have prompts and completions of their own lengths.
    assert max(found["useful", False]) < found["useful", True][-1] == 1.0
    assert found["useful", False] == second[name]["useful", False]
    # A LoRA's start depends on the seed that its trainer was built with, the same for both.
    start = {n: p for n, p in student_of(PACKED[kind][name]).named_parameters() if n in found[True]}
    assert movement_error(found[True], found[False], start) < TOLERANCE


@pytest.mark.parametrize(("kind", "name"), params_of(RESUMES, "run_streams", "resume "))
def test_resume_is_exact_on_two_ranks(folder, kind, name):
    for pairs in load(folder(kind), "pairs"):
        assert_same(*pairs[name])

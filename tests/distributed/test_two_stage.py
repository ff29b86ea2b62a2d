"""The cold start on two gloo processes, launched as a user would, against the single-process float64 reference."""

import pytest
import torch
from peft import get_peft_model
from safetensors.torch import load_file

from tests.distributed.launch import folder_of_runs, load, params_of
from tests.distributed.run_two_stage import CASES, CUTS, RUN
from tests.helpers.resume import assert_same
from tests.helpers.saved_models import assert_saved
from tests.helpers.training import movement_error, small_lora, small_model
from trl_bridge.selftest.reference import objectives
from trl_bridge.selftest.reference.bridge import Optimizer, clip


pytestmark = pytest.mark.distributed
TOLERANCE = 2e-4


# By backend.
folder = folder_of_runs("run_two_stage")


def _sft_loss(model, weights, window, o):
    """Mean over all trained tokens of the update."""
    scored = [objectives.demonstration_scores(model, weights, batch)[:2] for batch in window]
    return -sum((log_p * mask).sum() for log_p, mask in scored) / sum(mask.sum() for _, mask in scored)


def _rl_loss(model, weights, window, o):
    total = 0.0
    for batch in window:
        log_p, entropy = objectives.scores(model, weights, batch, o["temperature"])
        shape = (len(window) // 2, o["steps_per_generation"])
        total += objectives.policy_loss(log_p, entropy, log_p.detach(), batch, {**o, "world_size": 2}, shape)
    return total / 2


@pytest.mark.parametrize(("kind", "name"), params_of(CASES, "run_two_stage"))
def test_two_ranks_equal_the_reference(folder, kind, name):
    stages = list(zip(*load(folder(kind), name), strict=True))
    assert len(stages) == 2
    model = get_peft_model(small_model(), small_lora()) if "lora" in name else small_model()
    model = model.double().eval()
    start = {n: t.double() for n, t in stages[0][0]["start"].items()}
    assert start.keys() == {n for n, p in model.named_parameters() if p.requires_grad}
    for loss, (first, second) in zip((_sft_loss, _rl_loss), stages, strict=True):
        o, theta = first["options"], dict(start)
        optimizer = Optimizer("adamw", len(theta), eps=RUN["adam_epsilon"])
        assert_same(first["states"], second["states"])
        assert len(first["states"]) == 2
        # The second stage starts from what the first has ended with.
        assert_same({n: t.double() for n, t in first["start"].items()}, start)
        for step, state in enumerate(first["states"]):
            window = first["windows"][step] + second["windows"][step]
            assert len(window) == (6 if loss is _sft_loss else 4)
            leaves = {n: t.detach().requires_grad_() for n, t in theta.items()}
            gradients = torch.autograd.grad(loss(model, leaves, window, o), list(leaves.values()))
            gradients, _ = clip(list(gradients), o["max_grad_norm"])
            rate = o["lr"] * (2 - step) / 2
            directions = optimizer.directions(gradients)
            theta = {n: t - rate * d for (n, t), d in zip(theta.items(), directions, strict=True)}
            assert movement_error(state, theta, start) < TOLERANCE, (loss.__name__, step)
        start = {n: t.double() for n, t in first["states"][-1].items()}


@pytest.mark.parametrize(("kind", "name"), params_of(CASES, "run_two_stage"))
def test_saved_models_are_the_stages_ends(folder, kind, name, tmp_path):
    ends = [stage["states"][-1] for stage in load(folder(kind), name)[0]]
    for place, end in zip(("sft", "."), ends, strict=True):
        base = small_model() if "lora" in name else None
        assert_saved(folder(kind) / name / place, end, base, tmp_path / place)


@pytest.mark.parametrize(
    ("kind", "name"),
    params_of(
        {kind: [f"{name} {stage} {step}" for name in CASES[kind] for stage, step in CUTS[name]] for kind in CASES},
        "run_two_stage",
    ),
)
def test_a_run_that_is_cut_off_ends_as_one_that_is_not(folder, kind, name):
    weights = "adapter_model.safetensors" if "lora" in name else "model.safetensors"
    straight, resumed = (folder(kind) / run / weights for run in (name.rsplit(" ", 2)[0], name))
    assert_same(load_file(resumed), load_file(straight))

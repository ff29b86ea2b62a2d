"""Two gloo processes under DDP, launched as a user would, against the single-process float64 reference."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.bridge.test_resume import assert_same
from tests.distributed.run_ddp import CASES
from tests.harness import adapters, movement_error, small_model
from tests.reference.bridge import Reference


pytestmark = pytest.mark.distributed
TOLERANCE = 2e-4


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ddp")
    root = Path(__file__).parents[2]
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", "0"]
    command += ["--rdzv_backend", "c10d", "--rdzv_endpoint", "localhost:0"]
    command += ["-m", "tests.distributed.run_ddp", str(folder)]
    environment = {**os.environ, "PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr[-4000:]
    return folder


def _load(folder, name):
    return [torch.load(folder / f"{name}-{rank}.pt", weights_only=False) for rank in range(2)]


@pytest.mark.parametrize("name", CASES)
def test_two_ranks_equal_the_reference(folder, name):
    ranks = _load(folder, name)
    main = ranks[0]
    a, b = adapters(main["start"]["w"])
    options = {
        **main["options"],
        "world_size": 2,
        "schedule": lambda step: (4 - step) / 4,
        "lam": lambda step: CASES[name].get("bridge_lambda", 0.5),
    }
    reference = Reference(small_model(), main["start"]["theta"], a, b, 1.0, options)
    start = {"theta": main["start"]["theta"], "a": a, "b": b, "hat": main["start"]["theta"]}
    for step, state in enumerate(main["states"]):
        windows = [rank["windows"][step] for rank in ranks]
        joined = {key: [x for window in windows for x in window[key]] for key in ("rl", "sft", "weights")}
        weights = None if joined["weights"][0] is None else joined["weights"]
        metrics = reference.update(step, joined["rl"], joined["sft"], weights)
        got_a, got_b = adapters(state["w"])
        got = {"theta": state["theta"], "a": got_a, "b": got_b, "hat": state["hat"]}
        want = {"theta": reference.theta, "a": reference.a, "b": reference.b, "hat": reference.hat}
        errors = {n: movement_error(got[n], want[n], start[n]) for n in got}
        assert all(error < TOLERANCE for error in errors.values()), (step, errors)
        for key in metrics.keys() & main["log"][step].keys() - {"sft/num_tokens", "loss"}:
            assert main["log"][step][key] == pytest.approx(metrics[key], rel=3e-3, abs=5e-6), (step, key)


@pytest.mark.parametrize("name", CASES)
def test_ranks_agree_to_the_bit(folder, name):
    first, second = _load(folder, name)
    for part in ("coordinator", "student", "shadow", "weighting"):
        assert_same(first[part], second[part], part)
    if name == "judge and verdict":
        assert len(first["weighting"]["verdicts"]) > 0, "no demonstration was judged"


def test_ranks_train_on_different_demonstrations(folder):
    first, second = _load(folder, "adamw")
    pairs = zip(first["windows"][0]["sft"], second["windows"][0]["sft"], strict=True)
    assert all(x["input_ids"].tolist() != y["input_ids"].tolist() for x, y in pairs)


def test_resume_is_exact_on_two_ranks(folder):
    for rank in range(2):
        both = torch.load(folder / f"resume-{rank}.pt", weights_only=False)
        assert_same(both["resumed"], both["straight"])

"""The group baselines on two gloo processes, launched as a user would, against the float64 reference."""

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from tests.baselines.groups import replay_recorded
from tests.baselines.test_luffy import luffy_loss
from tests.bridge.test_resume import assert_same
from tests.distributed.run_groups import CASES
from tests.harness import small_model


pytestmark = pytest.mark.distributed
TOLERANCE = 2e-4

LOSSES = {"luffy": luffy_loss()}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("groups")
    root = Path(__file__).parents[2]
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2"]
    command += ["--rdzv_backend", "c10d", "--rdzv_endpoint", "localhost:0"]
    command += ["-m", "tests.distributed.run_groups", str(folder)]
    environment = {**os.environ, "PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr[-4000:]
    return folder


def _load(folder, name):
    return [torch.load(folder / f"{name}-{rank}.pt", weights_only=False) for rank in range(2)]


@pytest.mark.parametrize("name", CASES)
def test_two_ranks_equal_the_reference(folder, name):
    ranks = _load(folder, name)
    windows = [a + b for a, b in zip(ranks[0]["windows"], ranks[1]["windows"], strict=True)]
    steps = len(windows)
    o = {**ranks[0]["options"], "world_size": 2, "schedule": lambda step: (steps - step) / steps}
    run = SimpleNamespace(windows=windows, states=ranks[0]["states"], start=ranks[0]["start"])
    assert any(batch["expert_mask"].any() or batch["sft_mask"].any() for window in windows for batch in window)
    assert max(replay_recorded(run, small_model(), LOSSES[name], o)) < TOLERANCE


@pytest.mark.parametrize("name", CASES)
def test_ranks_agree_to_the_bit(folder, name):
    first, second = _load(folder, name)
    for part in ("states", "shared", "log"):
        assert_same(_timeless(first[part]), _timeless(second[part]), part)


def _timeless(part):
    if part and isinstance(part, list) and "loss" in part[0]:
        # Only what our trainers reduce over ranks themselves; TRL's own entries are the main process's.
        return [{k: v for k, v in entry.items() if k.split("/")[0] in OURS} for entry in part]
    return part


OURS = {"expert", "rollouts", "sft", "rl", *(name.replace("-", "_") for name in CASES)}

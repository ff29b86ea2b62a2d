"""`trl-bridge selftest`: it passes here, notices an update that is wrong, and writes what a bug report needs."""

import json
import os
import re
import subprocess
import sys

import pytest

from tests.helpers.command import refusal
from tests.helpers.pages import ROOT
from trl_bridge import __version__, cli, contract
from trl_bridge.cli import selftest
from trl_bridge.methods.bridge.trainer import BridgeTrainer
from trl_bridge.methods.catalogue import METHODS
from trl_bridge.methods.luffy import LUFFYTrainer
from trl_bridge.selftest.checks import CHECKS
from trl_bridge.training.checkpoint.resume import Resumable


@pytest.fixture(autouse=True)
def loud(monkeypatch):
    monkeypatch.setattr(selftest, "_be_quiet", lambda: None)  # which other tests of the process would hear


def test_every_method_is_checked():
    assert set(METHODS) - {"sft"} <= set(CHECKS)


def test_passes_and_says_what_ran(tmp_path, capsys):
    file = tmp_path / "report.json"
    assert cli.main(["selftest", "--only", "contract", "luffy", "vllm sync", "--json", str(file)]) == 0
    shown = capsys.readouterr().out
    assert re.search(r"^luffy +ok +\d+\.\d s +off by \d\.\de-\d\d, at most 2e-04$", shown, re.MULTILINE)
    assert "cpu (" in shown and shown.endswith(", NO, 1 process(es): all checks passed\n")
    report = json.loads(file.read_text())
    assert list(report) == ["passed", "trl_bridge", "python", "versions", "device", "backend", "processes", "checks"]
    assert report["passed"] is True and report["trl_bridge"] == __version__ and report["processes"] == 1
    assert {"trl", "transformers", "peft", "accelerate", "datasets", "torch"} <= set(report["versions"])
    luffy = report["checks"][1]
    assert set(luffy) == {"check", "status", "figure", "limit", "note", "seconds"}
    assert luffy["check"] == "luffy" and 0 < luffy["figure"] < luffy["limit"]
    assert [row["status"] for row in report["checks"][:2]] == ["ok", "ok"]


BROKEN = {
    "bridge": (BridgeTrainer, "_step_coordinator", lambda self: self.coordinator_optimizer.zero_grad()),
    "luffy": (LUFFYTrainer, "expert_loss", lambda self, *args, **kwargs: 0.5 * _expert_loss(self, *args, **kwargs)),
    "exact resume": (Resumable, "_load_rng_state", lambda self, checkpoint: None),
}
_expert_loss = LUFFYTrainer.expert_loss


@pytest.mark.parametrize("name", BROKEN)
def test_an_update_that_is_wrong_fails(tmp_path, capsys, monkeypatch, name):
    monkeypatch.setattr(*BROKEN[name])
    file = tmp_path / "report.json"
    assert cli.main(["selftest", "--only", name, "--json", str(file)]) == 1
    assert f"1 of 1 checks FAILED: {name}" in capsys.readouterr().out
    report = json.loads(file.read_text())
    (row,) = report["checks"]
    assert not report["passed"] and row["status"] == "FAILED" and row["figure"] > 5 * row["limit"]


def test_a_check_that_breaks_fails_with_its_error(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(contract.ATTRIBUTES, "trl.GRPOTrainer", "no_such_attribute")
    file = tmp_path / "report.json"
    assert cli.main(["selftest", "--only", "contract", "--json", str(file)]) == 1
    assert "trl.GRPOTrainer has no attribute no_such_attribute" in capsys.readouterr().out
    (row,) = json.loads(file.read_text())["checks"]
    assert row["status"] == "FAILED" and "Traceback" in row["traceback"]


def test_a_check_that_does_not_exist(capsys):
    assert "`--only nosuch` is no check. There are: contract, bridge" in refusal(
        capsys, "selftest", "--only", "nosuch"
    )


@pytest.mark.slow
@pytest.mark.exhaustive
def test_the_whole_of_it_passes():
    run = [sys.executable, "-m", "trl_bridge", "selftest"]
    done = subprocess.run(run, capture_output=True, text=True, timeout=1200)
    assert done.returncode == 0, done.stdout + done.stderr
    assert len(done.stdout.splitlines()) == len(CHECKS) + 2 and "FAILED" not in done.stdout


@pytest.mark.slow
@pytest.mark.distributed
def test_two_ranks_print_one_table(tmp_path):
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--rdzv_backend", "c10d"]
    only = ["bridge", "relift", "opd", "exact resume"]
    run = ["--rdzv_endpoint", "localhost:0", "-m", "trl_bridge.cli.selftest", "--only", *only]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([*launch, *run], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=1200)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count(" ok ") == len(only) and "2 process(es): all checks passed" in done.stdout

"""The smoke comparison through the real command: killed, resumed, and equal to the published runs."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.helpers.comparison import Threads
from trl_bridge import cli
from trl_bridge.comparison import workers


pytestmark = pytest.mark.slow
PUBLISHED = Path(__file__).parents[2] / "docs" / "results" / "comparison" / "addition-smoke" / "runs.jsonl"
COMMAND = [sys.executable, "-m", "trl_bridge", "compare", "--config", "comparison/addition-smoke"]
ROWS = ["--methods", "grpo,bridge"]


def lines(path):
    return path.read_bytes().splitlines() if path.is_file() else []


def test_killed_and_resumed(tmp_path):
    runs = tmp_path / "runs.jsonl"
    command = [*COMMAND, *ROWS, "--output_dir", str(tmp_path)]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True)
    try:
        deadline = time.monotonic() + 900
        while len(lines(runs)) < 2:
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.02)
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    before = lines(runs)
    assert 2 <= len(before) < 6
    done = subprocess.run(command, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr[-2000:]
    after = lines(runs)
    # What was done is not done again: the same lines stand first, and each run is there once.
    assert after[: len(before)] == before
    records = {record["key"]: record for record in map(json.loads, after)}
    assert len(after) == len(records) == 6
    assert "## half-wrong" in done.stdout and (tmp_path / "table.md").read_text() in done.stdout
    assert {path.name for path in tmp_path.glob("*.png")} == {"curves.png", "cost.png", "gain.png"}
    # The same runs as the published ones. Their numbers differ where a base model was trained on another processor.
    assert set(records) <= {record["key"] for record in map(json.loads, lines(PUBLISHED))}


def test_a_field_that_no_config_has_is_one_line(tmp_path, monkeypatch, capsys):
    # The worker's check in a thread, which need not import torch anew.
    monkeypatch.setattr(workers, "ProcessPoolExecutor", Threads)
    text = "task: {name: addition}\nsettings: {a: }\nmethods: {grpo: {bridge_lambda: 0.5}}\nseeds: [0]\n"
    (tmp_path / "c.yaml").write_text(text + "learning_rates: [0.1]\nsteps: 1\n")
    with pytest.raises(SystemExit) as stopped:
        cli.main(["compare", "--config", str(tmp_path / "c.yaml"), "--output_dir", str(tmp_path / "out")])
    assert stopped.value.code == 2
    shown = capsys.readouterr().err
    assert shown.splitlines()[-1] == (
        "trl-bridge compare: error: `methods: grpo`: trl_bridge.PackedGRPOConfig has no field `bridge_lambda`"
    )
    assert "Traceback" not in shown and not (tmp_path / "out" / "runs.jsonl").exists()

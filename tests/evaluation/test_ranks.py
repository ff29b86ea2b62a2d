"""Two gloo processes answer what one process answers."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.evaluation.run_ranks import COMMAND, measured
from trl_bridge.cli import evaluate


pytestmark = pytest.mark.distributed


def records(folder):
    lines = (folder / "builtin-addition" / "completions.jsonl").read_text("utf-8").splitlines()
    return [{key: value for key, value in json.loads(line).items() if key != "seconds"} for line in lines]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranks")
    evaluate.main([*COMMAND, "--output_dir", str(folder / "alone")])
    # One process was killed after three completions; two go on.
    shutil.copytree(folder / "alone", folder / "killed")
    path = folder / "killed" / "builtin-addition" / "completions.jsonl"
    path.write_text("".join(path.read_text("utf-8").splitlines(keepends=True)[:3]) + '{"torn')
    root = Path(__file__).parents[2]
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--rdzv_backend", "c10d"]
    command += ["--rdzv_endpoint", "localhost:0", "-m", "tests.evaluation.run_ranks", str(folder)]
    environment = {**os.environ, "PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-4000:]
    assert done.stdout.count("| builtin-addition | 5 | 2 |") == 2, "each command prints one table"
    return folder


@pytest.mark.parametrize("name", ["fresh", "killed"])
def test_two_ranks_answer_as_one(folder, name):
    assert records(folder / name) == records(folder / "alone")
    assert len(records(folder / name)) == 10
    assert [path.name for path in (folder / name / "builtin-addition").glob("*.jsonl")] == ["completions.jsonl"]


def test_the_callback_counts_each_row_once(folder):
    alone = measured(folder)
    for rank in range(2):
        assert json.loads((folder / f"accuracy-{rank}.json").read_text()) == alone
    assert alone["eval_accuracy_rows"] == 5 and 0 < alone["eval_accuracy"] < 1

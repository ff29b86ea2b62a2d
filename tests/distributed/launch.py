"""Two gloo processes, launched as a user would, and what each of them wrote."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch


DEEPSPEED = pytest.mark.skipif(
    importlib.util.find_spec("deepspeed") is None, reason="needs deepspeed (pip install 'trl-bridge[deepspeed]')"
)


def params_of(table):
    """(backend, case) for each of a table's cases; those that need DeepSpeed skip where it is not installed."""
    marks = {"deepspeed": [DEEPSPEED]}
    return [pytest.param(kind, name, marks=marks.get(kind, [])) for kind in table for name in table[kind]]


def launch(module, *arguments, ranks=2):
    """Run a module of this folder on two ranks, or another number of them."""
    root = Path(__file__).parents[2]
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", str(ranks)]
    command += ["--rdzv_backend", "c10d", "--rdzv_endpoint", "localhost:0"]
    command += ["-m", f"tests.distributed.{module}", *map(str, arguments)]
    path = os.pathsep.join([str(root), *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
    done = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr[-4000:]


def folder_of_runs(module):
    """
    A fixture: from a backend to the folder where the runs of a module of this folder have written what they saw.
    One launch for all runs of a backend.
    """

    @pytest.fixture(scope="module")
    def folder(tmp_path_factory):
        done = {}

        def folder_of(kind):
            if kind not in done:
                done[kind] = tmp_path_factory.mktemp(f"{module}-{kind}")
                launch(module, kind, done[kind])
            return done[kind]

        return folder_of

    return folder


def load(folder, name, ranks=2):
    """What all ranks wrote of a run, in rank order."""
    return [torch.load(folder / f"{name}-{rank}.pt", weights_only=False) for rank in range(ranks)]

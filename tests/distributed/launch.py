"""Two gloo processes, launched as a user would, and what each of them wrote."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch


# Of DeepSpeed's cases those that `make test` runs, by module: every method and stage, in full and as a LoRA. The others, other
# pairs of a method and a stage, are for `make test-all`.
QUICK = {
    "run": [
        "zero-1", "zero-2, grpo, checkpointing", "zero-3, by name", "lean, zero-2, sgd, reset", "lean, zero-3, by name",
        "resume zero-2", "best zero-3",
    ],
    "run_streams": ["naive-mix", "naive-mix, lora", "alternating", "chord, lora", "resume alternating, lora", "grpo"],
    "run_groups": [
        "luffy, zero-1", "srft, zero-2, lora", "hpt, zero-3", "hpt apart, zero-2", "relift, zero-3, lora", "relift one, zero-1, lora",
        "uft, zero-3, lora", "prefix-rft, zero-2", "actguide, zero-1, lora", "self-teacher, zero-2",
        "self-teacher average, zero-3", "ada-prefix, zero-1, lora", "resume relift, zero-2", "resume self-teacher average, zero-3",
    ],
    "run_distillation": [
        "opd, zero-1, lora", "aopd-code, zero-2", "aopd-code, zero-3", "lightning, zero-3, lora", "lightning-token, zero-2",
        "resume aopd-code, zero-3", "resume lightning, zero-2",
    ],
    "run_two_stage": ["zero-1", "zero-2, lora", "zero-3"],
}  # fmt: skip
DEEPSPEED = pytest.mark.skipif(
    importlib.util.find_spec("deepspeed") is None, reason="needs deepspeed (pip install 'trl-bridge[deepspeed]')"
)


def params_of(table, module, prefix=""):
    """
    (backend, case) for each of a table's cases, which a module of this folder runs under their name behind `prefix`; those
    that need DeepSpeed skip where it is not installed.
    """

    def marks_of(kind, name):
        if kind != "deepspeed":
            return []
        return [DEEPSPEED] if prefix + name in QUICK[module] else [DEEPSPEED, pytest.mark.exhaustive]

    return [pytest.param(kind, name, marks=marks_of(kind, name)) for kind in table for name in table[kind]]


def launch(module, *arguments, ranks=2):
    """Run a module of this folder on two ranks, or another number of them."""
    root = Path(__file__).parents[2]
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", str(ranks)]
    command += ["--rdzv_backend", "c10d", "--rdzv_endpoint", "localhost:0"]
    command += ["-m", "tests.distributed.rank", module, *map(str, arguments)]
    path = os.pathsep.join([str(root), *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, timeout=1800)
    assert done.returncode == 0, done.stderr[-4000:]


def folder_of_runs(module):
    """
    A fixture: from a backend to the folder where the runs of a module of this folder have written what they saw.
    One launch for all runs of a backend; of DeepSpeed's only the quick ones where no test asks for others.
    """

    @pytest.fixture(scope="module")
    def folder(request, tmp_path_factory):
        here = [item for item in request.session.items if item.path == request.path]
        exhaustive = any(item.get_closest_marker("exhaustive") for item in here)
        done = {}

        def folder_of(kind):
            if kind not in done:
                done[kind] = tmp_path_factory.mktemp(f"{module}-{kind}")
                names = QUICK[module] if kind == "deepspeed" and not exhaustive else []
                launch(module, kind, done[kind], *names)
            return done[kind]

        return folder_of

    return folder


def load(folder, name, ranks=2):
    """What all ranks wrote of a run, in rank order."""
    return [torch.load(folder / f"{name}-{rank}.pt", weights_only=False) for rank in range(ranks)]

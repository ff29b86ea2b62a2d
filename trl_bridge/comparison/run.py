"""One run: train, score, and what is to be written down about it. Runs in a process of its own."""

import functools
import gc
import importlib.metadata
import os
import platform
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from .plan import Run
from .recorder import Recorder, Stopwatch, short
from .tasks.specs import TaskSpec
from .tasks.task import BuiltTask
from .trainers import build_trainer, sample_offline


_PACKAGES = ("trl", "transformers", "torch", "peft", "accelerate", "datasets")
_TASKS: dict[str, BuiltTask] = {}
# High-water mark of this process, and where Linux lets it be set back.
_STATUS, _RESET = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def execute(run: Run, cache: str | None = None, stop_after: int | None = None) -> dict[str, Any]:
    """Train a run and score it."""
    task = _task(run.setting.task, run.seed, cache)
    recorder = Recorder(task, run.points, run.row.method == "two-stage", stop_after)
    if run.row.reads_teacher:
        _ = task.teacher  # made now, so that it is in no run's time and memory
    _reset_peak()
    spent = Stopwatch()
    with tempfile.TemporaryDirectory() as folder:
        with spent:
            rollouts = sample_offline(run, task, folder)
        if rollouts is not None:
            recorder.sampled_before(rollouts)
        trainer = build_trainer(run, task, folder, [recorder], rollouts)
        diverged = _train(trainer, spent)
        peak = _peak()
        policy = policy_of(trainer)
        scores = {} if diverged else {split: short(task.score(policy, split)) for split in _splits(run, task)}
    # Trainers are reference cycles, and a process does many runs.
    del trainer, policy
    gc.collect()
    record = {
        "key": run.key,
        "method": run.row.name,
        "setting": run.setting.name,
        "phase": run.phase,
        "seed": run.seed,
        "learning_rate": run.learning_rate,
        "base": task.base_hash,
        "scores": scores,
        "updates": recorder.updates,
        "rollouts": recorder.rollouts,
        "generated_tokens": recorder.generated_tokens,
        # The group methods do not log how many tokens of their experts they train on.
        "sft_tokens": None if run.row.family == "group" else round(recorder.sft_tokens),
        "seconds": round(spent.wall - recorder.away.wall, 2),
        "cpu_seconds": round(spent.cpu - recorder.away.cpu, 2),
        "peak_memory_mb": peak,
        "curve": recorder.curve,
        "series": recorder.series() if run.points else {},
        "first_steps": recorder.first,
        "date": time.strftime("%Y-%m-%d"),
        **where(),
    }
    if recorder.trial:
        record["trial"] = recorder.trial
    return {**record, "diverged": diverged} if diverged else record


def _train(trainer: Any, spent: Stopwatch) -> str | None:
    """What went wrong, where weights stopped being numbers."""
    try:
        with spent:
            trainer.train()
    except (RuntimeError, ValueError) as error:
        if _is_finite(policy_of(trainer)):
            raise
        return f"{type(error).__name__}: {error}".splitlines()[0][:200]
    return None if _is_finite(policy_of(trainer)) else "the weights are not finite"


def _splits(run: Run, task: BuiltTask) -> list[str]:
    # The test rows are looked at once, by the runs whose learning rate is chosen.
    return ["validation"] if run.phase == "validation" else [name for name in ("test", "ood") if name in task.splits]


def _task(spec: TaskSpec, seed: int, cache: str | None) -> BuiltTask:
    """The task; the last one is kept, for runs that differ in the method come one after another."""
    key = repr((spec, seed, cache))
    if key not in _TASKS:
        _TASKS.clear()
        _TASKS[key] = spec.build(seed, None if cache is None else Path(cache))
    return _TASKS[key]


@functools.lru_cache(maxsize=1)
def where() -> dict[str, Any]:
    """Commit, versions and machine."""
    versions = {name: importlib.metadata.version(name) for name in _PACKAGES}
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    machine = {"cpu": _cpu(), "cores": os.cpu_count(), "threads": torch.get_num_threads(), "gpu": gpu}
    return {"commit": _commit(), "versions": {"python": platform.python_version(), **versions}, "machine": machine}


def _commit() -> str | None:
    folder = Path(__file__).parents[2]
    if not (folder / ".git").exists():
        return None
    git = ["git", "-C", str(folder)]
    head = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True)
    changed = subprocess.run([*git, "status", "--porcelain", "-uno"], capture_output=True, text=True)
    return head.stdout.strip() + ("+" if changed.stdout.strip() else "") if head.returncode == 0 else None


def _cpu() -> str:
    info = Path("/proc/cpuinfo")
    names = [line for line in info.read_text().splitlines() if line.startswith("model name")] if info.is_file() else []
    return names[0].partition(":")[2].strip() if names else platform.processor() or platform.machine()


def policy_of(trainer: Any) -> Any:
    """The trained model."""
    # A cold start holds the trainer of its second stage.
    inner = getattr(trainer, "trainer", trainer)
    return inner.accelerator.unwrap_model(inner.model)


def _is_finite(model: Any) -> bool:
    return all(bool(torch.isfinite(parameter).all()) for parameter in model.parameters())


def _reset_peak() -> None:
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    if _RESET.exists() and os.access(_RESET, os.W_OK):
        _RESET.write_text("5")


def _peak() -> int:
    """Peak memory in MB since the last reset: of the GPU where there is one, else of this process."""
    if torch.cuda.is_available():
        return round(torch.cuda.max_memory_allocated() / 1e6)
    if _STATUS.is_file():
        line = next(line for line in _STATUS.read_text().splitlines() if line.startswith("VmHWM"))
        return round(int(line.split()[1]) * 1024 / 1e6)
    unit = 1 if sys.platform == "darwin" else 1024
    return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e6)

"""Evaluation on the usual benchmarks and on rows of your own, graded by the rewards of training."""

from importlib import import_module
from typing import TYPE_CHECKING, Any


if TYPE_CHECKING:
    from ..data.templates import Prompting
    from ..generation.engines import Sampling, TransformersEngine
    from .benchmarks import BENCHMARKS, Benchmark
    from .callback import AccuracyCallback
    from .run import evaluate_task, make_jobs
    from .statistics import bootstrap_interval, pass_at_k, wilson_interval
    from .tasks import Task, load_task


# Lazy (PEP 562): the callback imports TRL, and the command's help must not wait for it.
_EXPORTS = {
    "AccuracyCallback": ".callback",
    "BENCHMARKS": ".benchmarks",
    "Benchmark": ".benchmarks",
    "Prompting": "..data.templates",
    "Sampling": "..generation.engines",
    "Task": ".tasks",
    "TransformersEngine": "..generation.engines",
    "bootstrap_interval": ".statistics",
    "evaluate_task": ".run",
    "load_task": ".tasks",
    "make_jobs": ".run",
    "pass_at_k": ".statistics",
    "wilson_interval": ".statistics",
}

__all__ = [
    "BENCHMARKS",
    "AccuracyCallback",
    "Benchmark",
    "Prompting",
    "Sampling",
    "Task",
    "TransformersEngine",
    "bootstrap_interval",
    "evaluate_task",
    "load_task",
    "make_jobs",
    "pass_at_k",
    "wilson_interval",
]


def __getattr__(name: str) -> Any:
    if name in _EXPORTS:
        return getattr(import_module(_EXPORTS[name], __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *_EXPORTS])

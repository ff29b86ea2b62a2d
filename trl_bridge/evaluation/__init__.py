"""Evaluation on the usual benchmarks and on rows of your own, graded by the rewards of training."""

from typing import TYPE_CHECKING

from .._lazy import exports


if TYPE_CHECKING:
    from ..data.templates import Prompting as Prompting
    from ..generation.engines import Sampling as Sampling
    from ..generation.engines import TransformersEngine as TransformersEngine
    from .benchmarks import BENCHMARKS as BENCHMARKS
    from .benchmarks import Benchmark as Benchmark
    from .callback import AccuracyCallback as AccuracyCallback
    from .run import evaluate_task as evaluate_task
    from .run import make_jobs as make_jobs
    from .statistics import bootstrap_interval as bootstrap_interval
    from .statistics import pass_at_k as pass_at_k
    from .statistics import wilson_interval as wilson_interval
    from .tasks import Task as Task
    from .tasks import load_task as load_task


# The callback imports TRL, and the command's help must not wait for it.
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

__getattr__, __dir__, __all__ = exports(__name__, _EXPORTS)

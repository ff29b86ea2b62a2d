"""What a run leaves behind: points of its learning curve, what it cost, and the quantities that explain it."""

import functools
import itertools
import math
import time
from collections.abc import Mapping
from typing import Any

from datasets import Dataset
from transformers import TrainerCallback
from trl import SFTConfig

from .tasks.task import BuiltTask


_FIRST_STEPS = 3
_FIRST = (
    "loss",
    "grad_norm",
    "reward",
    "rollouts/reward",
    "sft/loss",
    "bridge/gain",
    "bridge/coordinator_grad_cosine",
)
# Logged quantities that are kept as series, each number the mean over a part of the run.
_SERIES = (
    "reward",
    "rollouts/reward",
    "sft/loss",
    "sft/weight_mean",
    "bridge/gain",
    "bridge/gain_grad_norm",
    "bridge/coordinator_grad_norm_sft",
    "bridge/coordinator_grad_norm_rl",
    "bridge/coordinator_grad_cosine",
    "bridge/grad_cosine",
    "bridge/coordinator_norm",
    "bridge/shadow_distance",
    "opd/reverse_kl",
    "teacher/reverse_kl",
    "dynamic_sampling/dead_groups",
    "opd/teacher_logprob",
    "aopd/gate_fraction",
    "actguide/hard_rate",
    "actguide/guided_rate",
    "actguide/steps",
)
_PARTS = 20


class Stopwatch:
    """Wall-clock and processor seconds of all that was done under it."""

    def __init__(self) -> None:
        self.wall = self.cpu = 0.0

    def __enter__(self) -> "Stopwatch":
        self.start = time.perf_counter(), time.process_time()
        return self

    def __exit__(self, *error: object) -> None:
        self.wall += time.perf_counter() - self.start[0]
        self.cpu += time.process_time() - self.start[1]


class Recorder(TrainerCallback):
    """Follows a training with `logging_steps=1`, both stages of a cold start."""

    def __init__(self, task: BuiltTask, points: int, cold_start: bool = False, stop_after: int | None = None):
        self.task, self.points, self.cold_start, self.stop_after = task, points, cold_start, stop_after
        self.curve: list[dict[str, float]] = []
        self.first: list[dict[str, float]] = []
        self.logs: list[dict[str, float]] = []
        self.rollouts = self.generated_tokens = 0
        self.sft_tokens = 0.0
        # On rollouts, with rewards or a teacher, and on demonstrations.
        self.updates = {"rl": 0, "sft": 0}
        self.offline = False
        # What a trial before RL has measured and cost; of its rollouts, those whose tokens are not counted yet.
        self.trial: dict[str, float] = {}
        self._of_trial, self._trial_tokens = 0, 0.0
        # In evaluation.
        self.away = Stopwatch()

    def sampled_before(self, rollouts: Dataset) -> None:
        """Count rollouts that were made before training."""
        self.offline = True
        self.rollouts = len(rollouts)
        self.generated_tokens = sum(map(len, rollouts["completion_ids"]))

    def on_epoch_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        if state.global_step == 0 and not self._in_first_stage(args):
            self._measure(0, model)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.stop_after is not None and state.global_step >= self.stop_after:
            control.should_training_stop = True

    def on_log(
        self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, model: Any = None, **kwargs: Any
    ) -> None:
        if logs is not None and "trial/rollouts" in logs:
            self._add_trial(args, logs)
        if logs is None or "loss" not in logs:
            return  # a trial, or the summary at the end
        values = {name: float(value) for name, value in logs.items() if _is_number(value)}
        if len(self.first) < _FIRST_STEPS:
            self.first.append({name: values[name] for name in _FIRST if name in values})
        supervised = isinstance(args, SFTConfig) and not self.offline
        self.updates["sft" if supervised else "rl"] += 1
        if supervised:
            self.sft_tokens += args.per_device_train_batch_size * self._mean_demonstration
        elif "completions/mean_length" in values:
            rows = self._sampled(args, values)
            # Those that guidance asks for beside them; their length is taken to be that of the others.
            rows += round(rows * values.get("actguide/guided_rate", 0.0) + values.get("actguide/probe_rollouts", 0.0))
            self.rollouts += rows
            # Those of a trial are taken to be as long as the first that are logged.
            self.generated_tokens += round((rows + self._of_trial) * values["completions/mean_length"])
            self._of_trial = 0
        self.logs.append({name: values[name] for name in _SERIES if name in values})
        if "sft/num_tokens" in values:
            self.sft_tokens = self._trial_tokens + values["sft/num_tokens"]
        due = {-(-state.max_steps * part // self.points) for part in range(1, self.points + 1)} if self.points else ()
        if state.global_step in due and not self._in_first_stage(args):
            self._measure(state.global_step, model)

    def series(self) -> dict[str, list[float]]:
        """Means of the logged quantities over equal parts of the run; a quantity that was never logged is left out."""
        parts = min(_PARTS, len(self.logs))
        cuts = [len(self.logs) * part // parts for part in range(parts + 1)] if parts else []
        found: dict[str, list[float]] = {}
        for start, end in itertools.pairwise(cuts):
            logs = self.logs[start:end]
            logged = {name: [each[name] for each in logs if name in each] for name in _SERIES}
            for name, mean in short({name: sum(each) / len(each) for name, each in logged.items() if each}).items():
                found.setdefault(name, []).append(mean)
        return found

    def _sampled(self, args: Any, values: Mapping[str, float]) -> int:
        """Rollouts of this update, with those of groups that were replaced: these are taken to be as long as what is kept."""
        rows = args.per_device_train_batch_size * args.gradient_accumulation_steps
        return rows * round(values.get("dynamic_sampling/generations", 1))

    def _add_trial(self, args: Any, logs: Mapping[str, Any]) -> None:
        self.trial = {name.removeprefix("trial/"): float(logs[name]) for name in logs if name.startswith("trial/")}
        self._of_trial, steps = int(self.trial["rollouts"]), int(self.trial["sft_steps"])
        self.rollouts += self._of_trial
        self.updates["sft"] += steps
        rows = steps * args.demonstration_batch_size * args.gradient_accumulation_steps
        self._trial_tokens = self.sft_tokens = rows * self._mean_demonstration

    def _measure(self, step: int, model: Any) -> None:
        if not self.points:
            return
        with self.away:
            scores = short(self.task.score(model, "validation"))
            self.curve.append({"step": step, "rollouts": self.rollouts, **scores})

    @functools.cached_property
    def _mean_demonstration(self) -> float:
        """Tokens, with the end of the sequence."""
        texts = [row if isinstance(row, str) else row[0]["content"] for row in self.task.demonstrations["completion"]]
        return sum(len(self.task.tokenizer(text)["input_ids"]) + 1 for text in texts) / len(texts)

    def _in_first_stage(self, args: Any) -> bool:
        return self.cold_start and isinstance(args, SFTConfig)


def short(values: Mapping[str, float]) -> dict[str, float]:
    """Six digits of each number."""
    return {name: float(f"{value:.6g}") for name, value in values.items()}


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)

"""Which runs a comparison has, which of them are done, and which come next. Pure: no training here."""

import dataclasses
import hashlib
import json
from collections.abc import Collection, Iterator, Mapping
from typing import Any

from .file import Comparison, Row, Setting


Records = Mapping[str, Mapping[str, Any]]


@dataclasses.dataclass(frozen=True)
class Run:
    """One training."""

    row: Row
    setting: Setting
    phase: str
    seed: int
    learning_rate: float
    steps: int
    points: int
    trainer: dict[str, Any]

    @property
    def content(self) -> dict[str, Any]:
        """All that the result depends on, as JSON values."""
        # Neither names nor what the method does not read: GRPO among good demonstrations and among wrong ones is one run.
        task, fields = self.setting.task, type(self.setting.task).model_fields
        unread = () if self.row.reads_demonstrations else task.demonstration_fields
        unread += () if self.row.reads_rewards else task.reward_fields
        unread += () if self.row.reads_teacher else task.teacher_fields
        # At their default as if they were not there: the runs from before they were keep their keys.
        unread += tuple(name for name in task.later_fields if getattr(task, name) == fields[name].default)
        return {
            "method": self.row.method,
            "fields": self.row.fields,
            "times_learning_rate": self.row.times_learning_rate,
            "trainer": self.trainer,
            "task": [type(task).__name__, task.model_dump(exclude=set(unread))],
            "phase": self.phase,
            "seed": self.seed,
            "learning_rate": self.learning_rate,
            "steps": self.steps,
            "points": self.points,
        }

    @property
    def key(self) -> str:
        """Hash of the content, by which a finished run is known again."""
        content = json.dumps(self.content, sort_keys=True)
        return hashlib.sha256(content.encode()).hexdigest()[:16]


def tuning_runs(comparison: Comparison, row: Row, setting: Setting) -> list[Run]:
    """Runs that choose a row's learning rate in a setting."""
    return [
        Run(row, setting, "validation", seed, rate, comparison.steps, 0, comparison.trainer)
        for rate in comparison.learning_rates
        for seed in comparison.validation_seeds
    ]


def runs_of(comparison: Comparison, row: Row, setting: Setting, rate: float) -> list[Run]:
    """Test runs of a row in a setting, one for each seed."""
    return [
        Run(row, setting, "test", seed, rate, comparison.steps, comparison.points, comparison.trainer)
        for seed in comparison.seeds
    ]


def validation_scores(comparison: Comparison, row: Row, setting: Setting, records: Records) -> dict[float, float]:
    """Mean validation score of each rate whose runs are done. A run that diverged counts as 0."""
    scores: dict[float, list[float]] = {}
    for run in tuning_runs(comparison, row, setting):
        if run.key in records:
            final = records[run.key].get("scores", {}).get("validation", {})
            scores.setdefault(run.learning_rate, []).append(final.get(setting.task.metric, 0.0))
    full = len(comparison.validation_seeds)
    return {rate: sum(values) / full for rate, values in scores.items() if len(values) == full}


def best_rate(comparison: Comparison, row: Row, setting: Setting, records: Records) -> float | None:
    """The learning rate with the best mean validation score; among equals the smallest."""
    if not comparison.validation_seeds:
        return comparison.learning_rates[0]
    scores = validation_scores(comparison, row, setting, records)
    if len(scores) < len(comparison.learning_rates):
        return None
    return min(scores, key=lambda rate: (-scores[rate], rate))


def next_runs(comparison: Comparison, records: Records, busy: Collection[str] = ()) -> Iterator[Run]:
    """
    Runs that can start now, in order: setting by setting, and there row by row, each row's test runs once its learning
    rate is chosen.
    """
    given = set(busy)
    for run in all_runs(comparison, records):
        if run.key not in records and run.key not in given:
            given.add(run.key)
            yield run


def all_runs(comparison: Comparison, records: Records) -> Iterator[Run]:
    """All runs whose learning rate is known, done or not, in order. One key can come more than once."""
    for setting in comparison.settings:
        for row in comparison.rows:
            yield from tuning_runs(comparison, row, setting)
            rate = best_rate(comparison, row, setting, records)
            if rate is not None:
                yield from runs_of(comparison, row, setting, rate)


def number_of_runs(comparison: Comparison, records: Records) -> int:
    """How many different runs there are in all, those of unknown rate included."""
    keys = set()
    for setting in comparison.settings:
        for row in comparison.rows:
            keys |= {run.key for run in tuning_runs(comparison, row, setting)}
            rate = best_rate(comparison, row, setting, records)
            # Any rate does to count: rows and settings that share their runs share their rate too.
            keys |= {run.key for run in runs_of(comparison, row, setting, -1.0 if rate is None else rate)}
    return len(keys)

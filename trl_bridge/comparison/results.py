"""From the records of runs to numbers: means, deviations, differences seed by seed."""

import dataclasses
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from ..evaluation.statistics import bootstrap_interval
from .config import Comparison, Row, Setting
from .plan import best_rate, runs_of


__all__ = ["Difference", "Result", "results_of"]

Record = Mapping[str, Any]


@dataclasses.dataclass(frozen=True)
class Difference:
    """
    A row against a reference on the seeds that both have.

    Attributes:
        mean (`float`):
            Mean difference.
        interval (`tuple[float, float]`, *optional*):
            95 % bootstrap interval over seeds. `None` for one seed.
        seeds (`int`):
            Number of seeds.
    """

    mean: float
    interval: tuple[float, float] | None
    seeds: int


@dataclasses.dataclass(frozen=True)
class Result:
    """
    The test runs of a row in a setting.

    Attributes:
        row, setting:
            Row and setting.
        learning_rate (`float`, *optional*):
            The rate that validation chose; `None` while it has not.
        records (`dict[int, Mapping]`):
            Finished test runs by seed, those that diverged left out.
        diverged (`int`):
            Number of test runs that diverged.
    """

    row: Row
    setting: Setting
    learning_rate: float | None
    records: dict[int, Record]
    diverged: int

    def values(self, score: str | None = None, split: str = "test") -> dict[int, float]:
        """
        A score by seed.

        Args:
            score (`str`, *optional*):
                Name of the score. `None` takes the task's metric.
            split (`str`, *optional*, defaults to `"test"`):
                `"test"` or `"ood"`.

        Returns:
            `dict[int, float]`: empty where there is none.
        """
        name = self.setting.task.metric if score is None else score
        found = {seed: record["scores"].get(split, {}).get(name) for seed, record in self.records.items()}
        return {seed: value for seed, value in found.items() if value is not None}

    def mean(self, field: str) -> float | None:
        """Mean of a number that every record has, such as `seconds`."""
        found = [record[field] for record in self.records.values() if record[field] is not None]
        return statistics.fmean(found) if found else None

    def against(self, other: "Result", score: str | None = None) -> Difference | None:
        """
        Difference on the test rows.

        Args:
            other ([`Result`]):
                The reference.
            score (`str`, *optional*):
                Name of the score. `None` takes the task's metric.

        Returns:
            [`Difference`], *optional*: `None` without a common seed.
        """
        own, theirs = self.values(score), other.values(score)
        differences = [own[seed] - theirs[seed] for seed in sorted(own) if seed in theirs]
        if not differences:
            return None
        interval = bootstrap_interval(differences) if len(differences) > 1 else None
        return Difference(statistics.fmean(differences), interval, len(differences))


def results_of(comparison: Comparison, setting: Setting, records: Mapping[str, Record]) -> dict[str, Result]:
    """
    Results of all rows in a setting.

    Args:
        comparison ([`~trl_bridge.comparison.config.Comparison`]):
            The comparison.
        setting ([`~trl_bridge.comparison.config.Setting`]):
            The setting.
        records (`Mapping[str, Mapping]`):
            Records of finished runs by key.

    Returns:
        `dict[str, Result]`: by the row's name, in the comparison's order.
    """
    results = {}
    for row in comparison.rows:
        rate = best_rate(comparison, row, setting, records)
        runs = [] if rate is None else runs_of(comparison, row, setting, rate)
        done = {run.seed: records[run.key] for run in runs if run.key in records}
        sound = {seed: record for seed, record in done.items() if "diverged" not in record}
        results[row.name] = Result(row, setting, rate, sound, len(done) - len(sound))
    return results


def mean_and_deviation(values: Sequence[float]) -> tuple[float, float | None]:
    """Mean and sample standard deviation, `None` for one value."""
    return statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else None

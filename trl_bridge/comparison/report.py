"""The tables of a comparison, in Markdown."""

import dataclasses
import statistics
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

from ..evaluation.statistics import bootstrap_interval
from ..tables import markdown_table
from .file import Comparison, Row, Setting
from .plan import Records, best_rate, runs_of, tuning_runs, validation_scores


_SEEDS = 5  # An interval over fewer is far too narrow: that over two is no wider than their distance.


@dataclasses.dataclass(frozen=True)
class Difference:
    """A row against a reference on the seeds that both have."""

    mean: float
    interval: tuple[float, float] | None
    seeds: int

    @property
    def sign(self) -> int:
        """1 or -1 where the interval lies on one side of 0, from seeds enough for it to say something."""
        if self.interval is None or self.seeds < _SEEDS:
            return 0
        low, high = self.interval
        return (low > 0) - (high < 0)

    def __str__(self) -> str:
        mean = f"**{self.mean:+.3f}**" if self.sign else f"{self.mean:+.3f}"
        return mean if self.interval is None else "{} [{:+.3f}, {:+.3f}]".format(mean, *self.interval)


@dataclasses.dataclass(frozen=True)
class Result:
    """The test runs of a row in a setting."""

    row: Row
    setting: Setting
    learning_rate: float | None
    records: dict[int, Mapping[str, Any]]
    diverged: int

    def values(self, score: str | None = None, split: str = "test") -> dict[int, float]:
        """A score by seed."""
        name = self.setting.task.metric if score is None else score
        found = {seed: record["scores"].get(split, {}).get(name) for seed, record in self.records.items()}
        return {seed: value for seed, value in found.items() if value is not None}

    def mean(self, field: str) -> float | None:
        """Mean of a number that every record has, such as `seconds`."""
        found = [record[field] for record in self.records.values() if record[field] is not None]
        return statistics.fmean(found) if found else None

    def against(self, other: "Result", score: str | None = None) -> Difference | None:
        """Difference on the test rows."""
        own, theirs = self.values(score), other.values(score)
        differences = [own[seed] - theirs[seed] for seed in sorted(own) if seed in theirs]
        if not differences:
            return None
        interval = bootstrap_interval(differences) if len(differences) > 1 else None
        return Difference(statistics.fmean(differences), interval, len(differences))


Results = dict[str, Result]


def results_of(comparison: Comparison, setting: Setting, records: Records) -> Results:
    """Results of all rows in a setting."""
    results = {}
    for row in comparison.rows:
        rate = best_rate(comparison, row, setting, records)
        runs = [] if rate is None else runs_of(comparison, row, setting, rate)
        done = {run.seed: records[run.key] for run in runs if run.key in records}
        sound = {seed: record for seed, record in done.items() if "diverged" not in record}
        results[row.name] = Result(row, setting, rate, sound, len(done) - len(sound))
    return results


def report(comparison: Comparison, records: Records) -> str:
    """All tables: results, cost and the choice of learning rates, setting by setting."""
    present = _present(comparison, records)
    parts = [_how(comparison, records, present), "## Overview", overview(comparison, records)]
    for setting, results in present:
        part = comparison.only(results)
        parts += [f"## {setting.name}", *_summary(part, setting, results), _scores(part, setting, results)]
        parts.append(_cost(part, results))
    if comparison.validation_seeds:
        parts += ["## Learning rates", _RATES, _rates(comparison, records)]
    return "\n\n".join(map(str.rstrip, parts)) + "\n"


def overview(comparison: Comparison, records: Records) -> str:
    """One line for each row: its scores in every setting, and the difference against the first reference."""
    present = _present(comparison, records)
    columns = [(setting, results, score) for setting, results in present for score in _names(setting)]
    head = ["method", *(f"{setting.name}: {score}" for setting, _, score in columns)]
    rows = [
        [f"`{row.name}`", *(_in_short(comparison, row.name, results, score) for _, results, score in columns)]
        for row in comparison.rows
    ]
    return markdown_table(head, rows)


def _in_short(comparison: Comparison, name: str, results: Results, score: str) -> str:
    values = results[name].values(score) if name in results else {}
    if not values:
        return ""
    text = f"{statistics.fmean(values.values()):.3f}"
    reference = next((each for each in comparison.references if each in results), name)
    difference = None if reference == name else results[name].against(results[reference], score)
    return text if difference is None else f"{text} ({str(difference).split()[0]})"


def _present(comparison: Comparison, records: Records) -> list[tuple[Setting, Results]]:
    """Settings with their rows, as far as there are test runs."""
    found = []
    for setting in comparison.settings:
        results = results_of(comparison, setting, records)
        results = {name: result for name, result in results.items() if result.records or result.diverged}
        if results:
            found.append((setting, results))
    return found


def _names(setting: Setting) -> list[str]:
    metric = setting.task.metric
    return [metric] if metric == "accuracy" else [metric, "accuracy"]


_RATES = (
    "Mean score on the validation rows, which no other number here is from. Bold: chosen. An asterisk at a rate in the tables above: "
    "the chosen one is an end of the grid, so a better one may lie beyond it."
)


def _how(comparison: Comparison, records: Records, present: list[tuple[Setting, Results]]) -> str:
    used = records.values()
    dates = sorted({record["date"] for record in used})
    machines = sorted({_machine(record["machine"]) for record in used})
    commits = sorted({_commit(record["commit"]) for record in used})
    versions = sorted(
        {_listed(f"{name} {version}" for name, version in record["versions"].items()) for record in used}
    )
    lines = [
        f"- {len(used)} runs, {comparison.steps} updates each unless a row says otherwise, seeds "
        f"{_listed(comparison.seeds)}; {_choice(comparison)}.",
        f"- Machine: {'; '.join(machines)}. Date: {_span(dates)}. Commit: {', '.join(commits)}.",
        f"- {'; '.join(versions)}.",
        "- Differences are taken seed by seed, with a 95 % bootstrap interval over the seeds. With five seeds such an interval is too "
        "narrow: read it as a rough guide. Bold: the interval does not contain 0, from five seeds or more.",
    ]
    mixed = [setting.name for setting, results in present if _started_apart(results)]
    if mixed:
        lines.append(
            f"- **Rows started from different base models** in {', '.join(mixed)}, where another processor trained them otherwise: "
            "differences seed by seed are none there. Runs that are compared want one folder `bases`."
        )
    return "\n".join(lines)


def _started_apart(results: Results) -> bool:
    bases: dict[int, set[str]] = {}
    for result in results.values():
        for seed, record in result.records.items():
            # Lines from before it was written down have none.
            bases.setdefault(seed, set()).update({record["base"]} if "base" in record else ())
    return any(len(found) > 1 for found in bases.values())


def _choice(comparison: Comparison) -> str:
    rates = _listed(f"{rate:g}" for rate in comparison.learning_rates)
    if not comparison.validation_seeds:
        return f"learning rate {rates} for every row, not chosen"
    seeds = "seed" if len(comparison.validation_seeds) == 1 else "seeds"
    return f"learning rates {rates} tried on {seeds} {_listed(comparison.validation_seeds)}"


def _commit(commit: str | None) -> str:
    return "none" if commit is None else commit[:10] + ("+" if commit.endswith("+") else "")


def _machine(machine: Mapping[str, Any]) -> str:
    threads = f"{machine['threads']} thread{'s' if machine['threads'] > 1 else ''} a run"
    return machine["gpu"] or f"{machine['cpu']}, {machine['cores']} cores, {threads}"


def _summary(comparison: Comparison, setting: Setting, results: Results) -> list[str]:
    """Who leads, and which rows are above and below each reference."""
    means = {name: statistics.fmean(values.values()) for name, each in results.items() if (values := each.values())}
    if not means:
        return []
    best = max(means, key=lambda name: means[name])
    lines = [f"Highest {setting.task.metric}: `{best}`, {means[best]:.3f}."]
    for reference in comparison.references:
        others = {name: each.against(results[reference]) for name, each in results.items() if name != reference}
        above, below = (
            _listed(f"`{name}`" for name, difference in others.items() if difference and difference.sign == sign)
            for sign in (1, -1)
        )
        lines.append(f"Above `{reference}`: {above or 'none'}. Below it: {below or 'none'}.")
    return ["\n".join(lines)]


def _scores(comparison: Comparison, setting: Setting, results: Results) -> str:
    names = _names(setting)
    pairs = [(name, reference) for reference in comparison.references for name in names]
    head = ["method", "rate", *names, "seeds", *(f"{name} against `{reference}`" for name, reference in pairs)]
    head.append(f"out of distribution, {names[0]}")
    rows = []
    for name, result in results.items():
        cells = [f"`{name}`", _rate(comparison, result)]
        cells += [_spread(result.values(score)) for score in names]
        cells.append(str(len(result.records)) + (f" ({result.diverged} diverged)" if result.diverged else ""))
        for score, reference in pairs:
            difference = None if name == reference else result.against(results[reference], score)
            cells.append("" if difference is None else str(difference))
        rows.append([*cells, _spread(result.values(split="ood"))])
    return markdown_table(head, rows)


def _cost(comparison: Comparison, results: Results) -> str:
    """Processor time, which other programs on the machine change little, beside the clock's."""
    reference = next((name for name in comparison.references if results[name].records), None)
    base = None if reference is None else results[reference].mean("cpu_seconds")
    head = ["cost of a run", "seconds", "CPU seconds", *([f"times `{reference}`"] if base else [])]
    rows = []
    for name, result in results.items():
        cpu = result.mean("cpu_seconds")
        if cpu is not None:
            cells = [
                f"`{name}`",
                f"{result.mean('seconds'):.1f}",
                f"{cpu:.1f}",
                *([f"{cpu / base:.2f}"] if base else []),
            ]
            means = map(result.mean, ("generated_tokens", "sft_tokens", "peak_memory_mb"))
            rows.append([*cells, *("" if mean is None else f"{mean:,.0f}" for mean in means)])
    return markdown_table([*head, "generated tokens", "SFT tokens", "peak memory, MB"], rows)


def _rates(comparison: Comparison, records: Records) -> str:
    rows = []
    for setting in comparison.settings:
        for row in comparison.rows:
            scores = validation_scores(comparison, row, setting, records)
            if scores:
                best = best_rate(comparison, row, setting, records)
                tried = tuning_runs(comparison, row, setting)
                diverged = {run.learning_rate for run in tried if "diverged" in records.get(run.key, {})}
                cells = [_tried(rate, scores, best, diverged) for rate in comparison.learning_rates]
                rows.append([setting.name, f"`{row.name}`", *cells])
    return markdown_table(["setting", "method", *(f"{rate:g}" for rate in comparison.learning_rates)], rows)


def _tried(rate: float, scores: Mapping[float, float], best: float | None, diverged: Collection[float]) -> str:
    text = f"{scores[rate]:.3f}" if rate in scores else ""
    return (f"**{text}**" if rate == best else text) + (" (diverged)" if rate in diverged else "")


def _rate(comparison: Comparison, result: Result) -> str:
    if result.learning_rate is None:
        return ""
    chosen = bool(comparison.validation_seeds)
    ends = {min(comparison.learning_rates), max(comparison.learning_rates)} if chosen else set()
    return f"{result.learning_rate:g}{'*' if result.learning_rate in ends else ''}"


def _spread(values: Mapping[int, float]) -> str:
    """Mean and sample standard deviation."""
    if not values:
        return ""
    deviation = f" ({statistics.stdev(values.values()):.3f})" if len(values) > 1 else ""
    return f"{statistics.fmean(values.values()):.3f}{deviation}"


def _listed(values: Iterable[Any]) -> str:
    return ", ".join(map(str, values))


def _span(dates: Sequence[str]) -> str:
    return "" if not dates else dates[0] if len(dates) == 1 else f"{dates[0]} to {dates[-1]}"

"""The pictures of a comparison, in colour and readable without: learning curves, gain and cosine, cost against score."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from .figures import new_figure, style
from .file import Comparison, Setting
from .plan import Records
from .report import Results, results_of


_SERIES = {
    "bridge/gain": "gain: the shadow's RL loss minus the student's",
    "bridge/grad_cosine": "cosine of SFT and RL gradient",
}


def draw_all(comparison: Comparison, records: Records, folder: Path) -> list[Path]:
    """Draw what there are runs for, a panel for each setting."""
    found = [(setting, results_of(comparison, setting, records)) for setting in comparison.settings]
    settings = [(setting, results) for setting, results in found if _all_records(results)]
    if not settings:
        return []
    curves = [partial(_curves, comparison.curves, *each) for each in settings]
    costs = [partial(_costs, *each) for each in settings]
    columns = min(2, len(settings))
    paths = [
        _draw(curves, columns, (7.5, 5), folder / "curves.png"),
        _draw(costs, columns, (7.5, 5), folder / "cost.png"),
    ]
    logged = [each for each in settings if any("bridge/gain" in record["series"] for record in _all_records(each[1]))]
    if logged:
        series = [partial(_series, *each, key) for each in logged for key in _SERIES]
        paths.append(_draw(series, len(_SERIES), (6, 3.6), folder / "gain.png"))
    return paths


def _all_records(results: Results) -> list[Mapping[str, Any]]:
    return [record for result in results.values() for record in result.records.values()]


def _draw(panels: Sequence[Callable[[Any], None]], columns: int, size: tuple[float, float], path: Path) -> Path:
    lines = -(-len(panels) // columns)
    figure = new_figure(size[0] * columns, size[1] * lines)
    for index, fill in enumerate(panels):
        axes = figure.add_subplot(lines, columns, index + 1)
        fill(axes)
        axes.grid(color="0.9")
        if axes.get_legend_handles_labels()[0]:
            axes.legend(loc="best")
    figure.savefig(path, dpi=110)
    return path


def _curves(names: Sequence[str], setting: Setting, results: Results, axes: Any) -> None:
    drawn = [name for name in names if results[name].records]
    metric = setting.task.metric
    for index, name in enumerate(drawn):
        curves = [record["curve"] for record in results[name].records.values() if record["curve"]]
        points = list(zip(*curves, strict=False))
        if not points:
            continue
        last = points[-1][0]["step"] or 1
        x = [at[0]["step"] / last for at in points]
        means = [fmean(point[metric] for point in at) for at in points]
        bands = [stdev(point[metric] for point in at) if len(at) > 1 else 0.0 for at in points]
        look = style(index)
        axes.plot(x, means, label=name, **look)
        low, high = ([m + sign * b for m, b in zip(means, bands, strict=True)] for sign in (-1, 1))
        axes.fill_between(x, low, high, color=look["color"], alpha=0.12, linewidth=0)
    axes.set_title(setting.name)
    axes.set_xlabel("share of the RL updates (a cold start's SFT stage comes before)")
    axes.set_ylabel(f"{metric} on the validation rows, mean and sd over seeds")


def _costs(setting: Setting, results: Results, axes: Any) -> None:
    for index, (name, result) in enumerate(results.items()):
        values = list(result.values("accuracy").values())
        if values:
            seconds, accuracy = result.mean("cpu_seconds"), fmean(values)
            axes.plot([seconds], [accuracy], **{**style(index), "linestyle": ""})
            axes.annotate(name, (seconds, accuracy), xytext=(4, 3), textcoords="offset points", fontsize=8)
    axes.margins(x=0.15)
    axes.set_title(setting.name)
    axes.set_xlabel("processor seconds of a run, evaluation left out")
    axes.set_ylabel("accuracy on the test rows, mean over seeds")


def _series(setting: Setting, results: Results, key: str, axes: Any) -> None:
    found = {
        name: [record["series"][key] for record in result.records.values() if key in record["series"]]
        for name, result in results.items()
    }
    drawn = {name: series for name, series in found.items() if series}
    for index, (name, series) in enumerate(drawn.items()):
        parts = list(zip(*series, strict=False))
        x = [(part + 0.5) / len(parts) for part in range(len(parts))]
        axes.plot(x, [fmean(values) for values in parts], label=name, **style(index))
    axes.axhline(0, color="0.6", linewidth=1)
    axes.set_title(setting.name)
    axes.set_xlabel("share of the updates")
    axes.set_ylabel(_SERIES[key])

"""The pictures of a comparison, to be read in black and white: learning curves, gain and cosine, cost against score."""

import importlib.util
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from .file import Comparison, Setting
from .report import Result, results_of


__all__ = ["STYLES", "check_matplotlib", "draw_all", "new_figure", "style"]

# Told apart by line and marker, so that a print in black and white can be read.
STYLES = (("-", "o"), ("--", "s"), (":", "^"), ("-.", "D"), ((0, (5, 1)), "v"), ((0, (1, 1)), "x"), ("--", "+"))
_SERIES = {
    "bridge/gain": "gain: the shadow's RL loss minus the student's",
    "bridge/grad_cosine": "cosine of SFT and RL gradient",
}


def check_matplotlib() -> None:
    """Look for matplotlib before time is spent on training."""
    if importlib.util.find_spec("matplotlib") is None:
        raise ImportError("curves are drawn with matplotlib: pip install 'trl-bridge[demo]'")


def new_figure(width: float, height: float) -> Any:
    """An empty figure. Without pyplot: no window system is asked for, and no global state is changed."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def style(index: int, number: int) -> dict[str, Any]:
    """Line, marker and shade of one line among several."""
    line, marker = STYLES[index % len(STYLES)]
    return {"linestyle": line, "marker": marker, "color": str(0.55 * index / max(1, number - 1)), "markersize": 4}


def draw_all(comparison: Comparison, records: Mapping[str, Mapping[str, Any]], folder: Path) -> list[Path]:
    """Draw what there are runs for, a panel for each setting."""
    settings = []
    for setting in comparison.settings:
        results = results_of(comparison, setting, records)
        if any(result.records for result in results.values()):
            settings.append((setting, results))
    if not settings:
        return []
    paths = [
        _draw(
            settings, lambda axes, setting, results: _curves(axes, comparison, setting, results), folder / "curves.png"
        ),
        _draw(settings, _costs, folder / "cost.png"),
    ]
    logged = [
        (setting, results)
        for setting, results in settings
        if any("bridge/gain" in record["series"] for result in results.values() for record in result.records.values())
    ]
    return [*paths, _draw_series(logged, folder / "gain.png")] if logged else paths


def _draw(settings: Sequence[tuple[Setting, dict[str, Result]]], fill: Any, path: Path) -> Path:
    columns = min(2, len(settings))
    lines = -(-len(settings) // columns)
    figure = new_figure(7.5 * columns, 5 * lines)
    for index, (setting, results) in enumerate(settings):
        axes = figure.add_subplot(lines, columns, index + 1)
        fill(axes, setting, results)
        axes.set_title(setting.name)
        axes.grid(color="0.9")
    figure.savefig(path, dpi=110)
    return path


def _curves(axes: Any, comparison: Comparison, setting: Setting, results: dict[str, Result]) -> None:
    drawn = [name for name in comparison.curves if results[name].records]
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
        look = style(index, len(drawn))
        axes.plot(x, means, label=name, **look)
        low, high = ([m + sign * b for m, b in zip(means, bands, strict=True)] for sign in (-1, 1))
        axes.fill_between(x, low, high, color=look["color"], alpha=0.12, linewidth=0)
    axes.set_xlabel("share of the RL updates (a cold start's SFT stage comes before)")
    axes.set_ylabel(f"{metric} on the validation rows, mean and sd over seeds")
    if axes.get_lines():
        axes.legend(loc="best")


def _costs(axes: Any, setting: Setting, results: dict[str, Result]) -> None:
    for index, (name, result) in enumerate(results.items()):
        values = list(result.values("accuracy").values())
        if values:
            seconds, accuracy = result.mean("cpu_seconds"), fmean(values)
            axes.plot([seconds], [accuracy], marker=STYLES[index % len(STYLES)][1], color="0", linestyle="")
            axes.annotate(name, (seconds, accuracy), xytext=(4, 3), textcoords="offset points", fontsize=8)
    axes.margins(x=0.15)
    axes.set_xlabel("processor seconds of a run, evaluation left out")
    axes.set_ylabel("accuracy on the test rows, mean over seeds")


def _draw_series(settings: Sequence[tuple[Setting, dict[str, Result]]], path: Path) -> Path:
    figure = new_figure(12, 3.6 * len(settings))
    for line, (setting, results) in enumerate(settings):
        for column, (key, label) in enumerate(_SERIES.items()):
            axes = figure.add_subplot(len(settings), len(_SERIES), line * len(_SERIES) + column + 1)
            found = {
                name: [record["series"][key] for record in result.records.values() if key in record["series"]]
                for name, result in results.items()
            }
            drawn = {name: series for name, series in found.items() if series}
            for index, (name, series) in enumerate(drawn.items()):
                parts = list(zip(*series, strict=False))
                x = [(part + 0.5) / len(parts) for part in range(len(parts))]
                axes.plot(x, [fmean(values) for values in parts], label=name, **style(index, len(drawn)))
            axes.axhline(0, color="0.6", linewidth=1)
            axes.set_title(setting.name)
            axes.set_xlabel("share of the updates")
            axes.set_ylabel(label)
            axes.grid(color="0.9")
            if drawn:
                axes.legend(loc="best")
    figure.savefig(path, dpi=110)
    return path

"""The picture of the demo's curves."""

import importlib.util
from pathlib import Path
from typing import TYPE_CHECKING

from .task import Scores


if TYPE_CHECKING:
    from .methods import Curve


__all__ = ["check_matplotlib", "draw"]

# Told apart by line and marker, so that a print in black and white can be read.
_STYLES = (("-", "o"), ("--", "s"), (":", "^"), ("-.", "D"))


def check_matplotlib() -> None:
    """
    Look for matplotlib before time is spent on training.

    Raises:
        ImportError: it is not installed.
    """
    if importlib.util.find_spec("matplotlib") is None:
        raise ImportError("the demo draws its curves with matplotlib: pip install 'trl-bridge[demo]'")


def draw(curves: "list[Curve]", base: Scores, rollouts_per_step: int, title: str, path: Path) -> None:
    """
    Draw held-out accuracy over rollouts.

    Args:
        curves (`list[Curve]`):
            One line each.
        base ([`Scores`]):
            Scores of the base model, drawn as a level.
        rollouts_per_step (`int`):
            Rollouts of an RL update.
        title (`str`):
            Title.
        path (`Path`):
            PNG to write.
    """
    # Without pyplot: no window system is asked for, and no global state is changed.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    axes.axhline(base.accuracy, color="0.6", linewidth=1, label="base model")
    for index, curve in enumerate(curves):
        line, marker = _STYLES[index % len(_STYLES)]
        shade = str(0.45 * index / max(1, len(curves) - 1)) if len(curves) > 1 else "0"
        rollouts = [step * rollouts_per_step for step, _ in curve.points]
        accuracy = [scores.accuracy for _, scores in curve.points]
        axes.plot(rollouts, accuracy, linestyle=line, marker=marker, color=shade, markersize=5, label=curve.name)
    axes.set_xlabel("rollouts (a cold start's SFT stage comes before its first one)")
    axes.set_ylabel("accuracy on held-out sums (greedy)")
    axes.set_title(title)
    axes.grid(color="0.9")
    axes.legend(loc="best")
    figure.savefig(path, dpi=150)

"""The picture of the demo's curves."""

from pathlib import Path
from typing import TYPE_CHECKING

from ..comparison.pictures import new_figure, style


if TYPE_CHECKING:
    from .methods import Curve


__all__ = ["draw"]


def draw(curves: "list[Curve]", base: dict[str, float], title: str, path: Path) -> None:
    """
    Draw held-out accuracy over rollouts.

    Args:
        curves (`list[Curve]`):
            One line each.
        base (`dict[str, float]`):
            Scores of the base model; its accuracy is drawn as a level.
        title (`str`):
            Title.
        path (`Path`):
            PNG to write.
    """
    figure = new_figure(8, 5)
    axes = figure.add_subplot()
    axes.axhline(base["accuracy"], color="0.6", linewidth=1, label="base model")
    for index, curve in enumerate(curves):
        rollouts = [point["rollouts"] for point in curve.points]
        accuracy = [point["accuracy"] for point in curve.points]
        axes.plot(rollouts, accuracy, label=curve.name, **style(index, len(curves)))
    axes.set_xlabel("rollouts (a cold start's SFT stage comes before its first one)")
    axes.set_ylabel("accuracy on held-out sums (greedy)")
    axes.set_title(title)
    axes.grid(color="0.9")
    axes.legend(loc="best")
    figure.savefig(path, dpi=150)

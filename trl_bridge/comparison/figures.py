"""How pictures are drawn: in colour, and readable without. Nothing heavy is imported before a figure is made."""

import importlib.util
from typing import Any


# Okabe and Ito's colours, which the colour-blind tell apart; line and marker do so in a print in black and white.
STYLES = (
    ("#000000", "-", "o"),
    ("#0072b2", "--", "s"),
    ("#d55e00", ":", "^"),
    ("#009e73", "-.", "D"),
    ("#cc79a7", (0, (5, 1)), "v"),
    ("#e69f00", (0, (1, 1)), "x"),
    ("#56b4e9", "--", "+"),
)


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


def style(index: int) -> dict[str, Any]:
    """Colour, line and marker of one line among several."""
    color, line, marker = STYLES[index % len(STYLES)]
    return {"color": color, "linestyle": line, "marker": marker, "markersize": 4}

"""`trl-bridge plot`: pictures of a run, from what its trainer logged."""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..comparison.figures import check_matplotlib, new_figure, style
from .errors import ToolParser, UsageError


STATE_FILE = "trainer_state.json"
# Of each picture: its file, what its y-axis is, and the metrics that it shows where they were logged.
PICTURES: tuple[tuple[str, str, tuple[str, ...]], ...] = (
    ("reward.png", "mean reward of an update", ("reward", "rollouts/reward", "expert/reward", "eval_reward")),
    ("gain.png", "the shadow's RL loss minus the student's", ("bridge/gain",)),
    (
        "weights.png",
        "weight of the demonstrations",
        ("sft/weight_mean", "sft/weight_zero_fraction", "naive_mix/sft_weight", "chord/mu", "srft/sft_weight"),
    ),
    ("efficiency.png", "share of positions that were needed", ("efficiency/useful_tokens",)),
)


def main(argv: list[str] | None = None) -> int:
    """Run the tool."""
    options = _parse(sys.argv[1:] if argv is None else argv)
    log = read_log(Path(options.run))
    check_matplotlib()
    folder = Path(options.output_dir or options.run)
    drawn = [(folder / name, label, found) for name, label, keys in PICTURES if (found := series(log, keys))]
    if not drawn:
        raise UsageError(f"{options.run} has logged nothing that is drawn: none of {', '.join(_keys())}")
    folder.mkdir(parents=True, exist_ok=True)
    for path, label, found in drawn:
        _draw(path, label, found)
        sys.stdout.write(f"wrote {path} ({', '.join(found)})\n")
    return 0


def read_log(run: Path) -> list[dict[str, Any]]:
    """What a run has logged: of the file itself, of a folder that holds it, or of the newest checkpoint in it."""
    if not run.exists():
        raise UsageError(f"there is no {run}")
    found = [run] if run.is_file() else [*run.glob(STATE_FILE), *run.glob(f"checkpoint-*/{STATE_FILE}")]
    # Methods in stages have a folder for each.
    found = found or list(run.glob(f"*/checkpoint-*/{STATE_FILE}"))
    logs = [_log_of(path) for path in found]
    if not any(logs):
        raise UsageError(
            f"{run} holds no log: a run writes {STATE_FILE} when it ends and into each checkpoint; name its `output_dir`"
        )
    return max(logs, key=lambda log: log[-1].get("step", 0) if log else -1)


def _log_of(path: Path) -> list[dict[str, Any]]:
    try:
        log = json.loads(path.read_text(encoding="utf-8"))["log_history"]
        return [entry for entry in log if "step" in entry]
    except (ValueError, TypeError, KeyError) as error:
        raise UsageError(f"{path} is no {STATE_FILE}, or was cut off") from error


def series(log: Sequence[dict[str, Any]], keys: Sequence[str]) -> dict[str, tuple[list[float], list[float]]]:
    """From each of some metrics that were logged to its steps and values."""
    found = {key: [(entry["step"], entry[key]) for entry in log if entry.get(key) is not None] for key in keys}
    return {
        key: ([step for step, _ in points], [value for _, value in points]) for key, points in found.items() if points
    }


def _draw(path: Path, label: str, found: dict[str, tuple[list[float], list[float]]]) -> None:
    figure = new_figure(7, 4)
    axes = figure.add_subplot()
    for index, (name, (steps, values)) in enumerate(found.items()):
        axes.plot(steps, values, label=name, **style(index))
    axes.set_xlabel("update")
    axes.set_ylabel(label)
    axes.grid(color="0.9")
    axes.legend(loc="best")
    figure.savefig(path, dpi=120)


def _keys() -> list[str]:
    return [key for _, _, keys in PICTURES for key in keys]


def _parse(argv: list[str]) -> argparse.Namespace:
    parser = ToolParser(
        prog="trl-bridge plot", description="Draw reward, gain, weights and efficiency of a run as PNG."
    )
    parser.add_argument("run", metavar="RUN", help=f"a run's `output_dir`, a checkpoint, or a {STATE_FILE}")
    parser.add_argument("--output_dir", help="folder for the pictures; default: the run's")
    return parser.parse_args(argv)

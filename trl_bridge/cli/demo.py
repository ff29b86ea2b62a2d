"""`trl-bridge demo`: GRPO, a cold start and BRIDGE on a small task, with a table and a picture."""

import argparse
import sys

from .errors import ToolParser


def main(argv: list[str] | None = None) -> int:
    """Run the demo."""
    options = _parse(sys.argv[1:] if argv is None else argv)
    # Imported late, so that --help and a wrong option answer at once.
    from ..comparison.demo import run_demo

    run_demo(**vars(options))
    return 0


def _parse(argv: list[str]) -> argparse.Namespace:
    parser = ToolParser(
        prog="trl-bridge demo",
        description="Compare GRPO, cold start and BRIDGE on sums of two numbers, with some demonstrations wrong.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--steps", type=int, default=120, help="RL updates of each method")
    parser.add_argument("--base_steps", type=int, default=600, help="training steps of the base model")
    parser.add_argument("--wrong_share", type=float, default=0.5, help="share of the demonstrations that are wrong")
    parser.add_argument("--seed", type=int, default=0, help="seed of everything")
    parser.add_argument("--output_dir", default="demo-output", help="folder for picture, model and numbers")
    options = parser.parse_args(argv)
    if options.steps < 1 or options.base_steps < 1:
        raise ValueError("`--steps` and `--base_steps` must be at least 1")
    if not 0.0 <= options.wrong_share <= 1.0:
        raise ValueError(f"`--wrong_share` must lie in [0, 1], got {options.wrong_share}")
    return options

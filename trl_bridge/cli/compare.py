"""`trl-bridge compare`: methods on the same data, rollouts, seeds and tuned learning rates."""

import sys
from pathlib import Path

from ..comparison.figures import check_matplotlib
from ..comparison.file import load_comparison
from ..comparison.pictures import draw_all
from ..comparison.plan import all_runs
from ..comparison.report import report
from ..comparison.workers import read_records, run_all
from .errors import ToolParser, UsageError


TABLE_FILE = "table.md"


def main(argv: list[str] | None = None) -> int:
    """Run what is missing of a comparison, then write its table and pictures."""
    parser = _parser()
    options = parser.parse_args(sys.argv[1:] if argv is None else argv)
    if options.workers < 1:
        raise UsageError(f"`--workers` must be at least 1, got {options.workers}")
    comparison = load_comparison(options.config).only(_names(options.methods), _names(options.settings))
    folder = Path(options.output_dir or comparison.output_dir)
    check_matplotlib()
    if options.report:
        records = read_records(folder)
    else:
        folder.mkdir(parents=True, exist_ok=True)
        records = run_all(comparison, folder, options.workers)
    # Runs of rows and settings that are not asked for, or no longer there, are left out.
    keys = {run.key for run in all_runs(comparison, records)}
    wanted = {key: record for key, record in records.items() if key in keys}
    if not wanted:
        raise UsageError(f"`--report`: {folder} holds no runs of this comparison")
    table = report(comparison, wanted)
    (folder / TABLE_FILE).write_text(table, encoding="utf-8")
    draw_all(comparison, wanted, folder)
    sys.stdout.write(f"{table}\nRuns, table and pictures: {folder}\n")
    return 0


def _parser() -> ToolParser:
    parser = ToolParser(
        prog="trl-bridge compare",
        description="Train methods on the same data, rollouts, seeds and tuned learning rates; write a table and pictures.",
        epilog="A killed comparison goes on where it stopped when the same command is given again.",
    )
    parser.add_argument("--config", required=True, help="YAML file, or name of a recipe, such as comparison/addition")
    parser.add_argument("--output_dir", help="folder for the results; default: the file's")
    parser.add_argument("--workers", type=int, default=1, help="processes; they take GPUs by turns, or a core each")
    parser.add_argument("--methods", help="only these rows, separated by commas")
    parser.add_argument("--settings", help="only these settings, separated by commas")
    parser.add_argument(
        "--report", action="store_true", help="train nothing: table and pictures of the runs there are"
    )
    return parser


def _names(option: str | None) -> list[str] | None:
    return None if option is None else [name.strip() for name in option.split(",") if name.strip()]

"""`trl-bridge data`: list, show, check, prepare, generate and score datasets."""

import argparse
import math
import statistics
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from . import score_rollouts
from .errors import ToolParser, UsageError


if TYPE_CHECKING:
    from datasets import Dataset

    from ..data.checks import DatasetReport, Finding, Sample


# Lines to print, and the exit code.
Printed = tuple[list[str], int]

_FINDINGS = 5
_CHARACTERS = 600
_TOKENS = 120
_WRITERS = (".jsonl", ".parquet")
_SCHEMA = """Columns:
  prompt      messages (a conversation that ends with the user), or a string
  solution    string: what the reward compares with
  completion  messages or a string: a demonstration
  expert      a string, messages, or a list of either: demonstrations, for the methods that take them row by row

Generated, nothing is downloaded:
  builtin:addition, builtin:routes, reasoning-gym:TASK

Sources (`source:NAME@PATH` reads a local copy of the raw data):"""


_ROUTES = {
    "size": (500, "training rows"),
    "test_size": (100, "test rows"),
    "seed": (0, "seed of everything"),
    "min_lines": (2, "fewest lines of a network, from 2"),
    "max_lines": (4, "most lines of a network, up to 8"),
    "min_stops": (3, "fewest stops of a line, from 3"),
    "max_stops": (5, "most stops of a line, up to 10"),
}


class _Loaded(NamedTuple):
    """`rows` as they are trained on, and `questions` without the prompt template."""

    rows: "Dataset"
    questions: list[str]
    tokenizer: Any
    eos_token_ids: list[int]


def main(argv: list[str] | None = None) -> int:
    """Run the tool."""
    options = _parser().parse_args(sys.argv[1:] if argv is None else argv)
    # Imported late, so that --help and a wrong option answer at once.
    import datasets

    shown = not datasets.are_progress_bars_disabled()
    datasets.disable_progress_bars()
    try:
        lines, code = options.run(options)
    finally:
        if shown:
            datasets.enable_progress_bars()
    sys.stdout.write("\n".join(lines) + "\n")
    return code


def _parser() -> ToolParser:
    parser = ToolParser(prog="trl-bridge data", description="List, show, check, prepare, generate and score datasets.")
    actions = parser.add_subparsers(dest="action", metavar="ACTION", required=True)

    def action(name: str, run: Callable[[argparse.Namespace], Printed], summary: str) -> ToolParser:
        added = actions.add_parser(name, help=summary)
        added.set_defaults(run=run)
        return added

    action("ls", _list, "list the sources, and the columns that the trainers read")
    show = action("show", _show, "show a dataset's first rows, with --model as tokens")
    check = action("check", _check, "check a dataset: exit code 0 if it is sound, 1 if not")
    prepare = action("prepare", _prepare, "write a dataset as JSONL or Parquet")
    routes = action("routes", _routes, "generate route tasks: a training and a test file, no row in both")
    score = action("score-rollouts", _score, "sample from a model, score with a teacher: rows for lightning-opd")
    for each in (show, check, prepare, score):
        _add_dataset_options(each)
    for each in (show, check):
        each.add_argument("--rows", type=int, default=3, help="number of rows that are shown (3)")
    for each in (check, prepare):
        _add_check_options(each)
    prepare.add_argument("--output", required=True, metavar="FILE", help="file to write, .jsonl or .parquet")
    prepare.add_argument("--clean", action="store_true", help="leave out every row that `check` complains about")
    prepare.add_argument(
        "--max_prompt_length", type=int, help="drop rows with longer prompts, in tokens (needs --model)"
    )
    _add_route_options(routes)
    score_rollouts.add_options(score)
    for each in (prepare, routes):
        each.add_argument("--force", action="store_true", help="overwrite a file that exists")
    return parser


def _add_dataset_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "name", metavar="NAME", help="what dataset_name takes: source:limr, rows.jsonl, a hub name, ..."
    )
    parser.add_argument("--dataset_config", help="configuration, or parameters as in 'people=3, traces=2'")
    parser.add_argument("--dataset_split", default="train", help="split (train)")
    for column in ("prompt", "solution", "completion"):
        # As in training, where demonstrations are called the expert's.
        name = "expert" if column == "completion" else column
        parser.add_argument(f"--{name}_column", dest=column, help=f"column that becomes `{column}`")
    parser.add_argument("--prompt_template", help="a name such as boxed, or a text with {prompt}")
    parser.add_argument("--system_prompt", help="system message in front of every conversation")
    parser.add_argument("--model", help="model whose tokenizer renders the rows")


def _add_check_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--golds",
        choices=("auto", "math", "roles", "none"),
        default="auto",
        help="what the solutions are: math answers, roles of knights and knaves, not checked; auto asks the source (auto)",
    )
    parser.add_argument(
        "--max_length", type=int, help="longest demonstration with its prompt, in tokens (needs --model)"
    )
    parser.add_argument(
        "--benchmarks",
        help="benchmarks that the rows must not share questions with, as `eval` takes them: math500,mine.jsonl,...",
    )
    parser.add_argument("--ngram", type=int, default=13, help="shared run of words that counts as overlap (13)")


def _add_route_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--output_dir", required=True, metavar="FOLDER", help="where train and test are written")
    parser.add_argument(
        "--format", choices=("jsonl", "parquet"), help="kind of the files (jsonl; with pictures parquet)"
    )
    parser.add_argument(
        "--images",
        action="store_true",
        help="draw maps: questions that need the map, the table or both, a test file each",
    )
    for name, (default, what) in _ROUTES.items():
        parser.add_argument(f"--{name}", type=int, default=default, help=f"{what} ({default})")
    parser.add_argument(
        "--criteria", help="what counts, as in time+comfort, of time, price, comfort and reliability (drawn by row)"
    )


def _list(options: argparse.Namespace) -> Printed:
    from ..data.sources import SOURCES

    lines = [_SCHEMA]
    for source in SOURCES.values():
        columns = "prompt, solution, completion" if source.has_traces else "prompt, solution"
        parameters = ", ".join(["traces"] * source.has_traces + list(source.parameters))
        lines += [
            f"  source:{source.name}",
            f"      {source.summary}",
            f"      columns {columns}; reward {source.reward}; prompt_template {source.template}"
            + (f"; parameters {parameters}" if parameters else ""),
            f"      hub {source.hub_id} at {source.revision or 'an unpinned revision'}; licence "
            f"{source.licence or 'see the hub'}",
        ]
    return lines, 0


def _show(options: argparse.Namespace) -> Printed:
    loaded = _load(options)
    rows = range(min(options.rows, len(loaded.rows)))
    return [_title(options, loaded), *_shown(loaded, rows)], 0


def _check(options: argparse.Namespace) -> Printed:
    loaded = _load(options)
    report = _report(options, loaded)
    refused = {finding.row for finding in (*report.unrenderable, *report.empty)}
    rows = [row for row in range(len(loaded.rows)) if row not in refused][: options.rows]
    lines = [_title(options, loaded), *_report_lines(report), *_shown(loaded, rows)]
    if loaded.tokenizer is None:
        lines += ["", "Without --model no demonstration was rendered or measured."]
    wrong = report.bad_rows | {finding.row for finding in report.rewritten}
    found = "sound" if report.sound else f"{len(wrong)} of {report.rows} rows have something wrong"
    return [*lines, "", found], 0 if report.sound else 1


def _prepare(options: argparse.Namespace) -> Printed:
    from ..data.files import write_rows
    from ..data.rows import within_prompt_length

    output = Path(options.output)
    if output.suffix not in _WRITERS:
        raise UsageError(f"`--output` must end in {' or '.join(_WRITERS)}, got {output.name}")
    _refuse_existing(output, options)
    if options.max_prompt_length is not None and options.model is None:
        raise UsageError("`--max_prompt_length` counts tokens: name the model with --model")
    loaded = _load(options)
    rows, lines = loaded.rows, []
    if options.clean:
        report = _report(options, loaded)
        lines += _report_lines(report)
        rows = rows.select([row for row in range(len(rows)) if row not in report.bad_rows])
        if not len(rows):
            raise ValueError(f"no row of {options.name} is sound: run `trl-bridge data check`")
    if options.max_prompt_length is not None:
        rows = within_prompt_length(rows, loaded.tokenizer, options.max_prompt_length, options.name)
    write_rows(rows, output)
    wrote = f"wrote {len(rows)} of {len(loaded.rows)} rows to {output}: {', '.join(rows.column_names)}"
    return [*lines, wrote], 0


def _routes(options: argparse.Namespace) -> Printed:
    from ..data.files import write_rows
    from ..data.route_maps import MODES
    from ..data.routes import routes_dataset

    if options.images and options.format == "jsonl":
        raise UsageError("`--format jsonl` holds no pictures: leave it out, or write --format parquet")
    kind = options.format or ("parquet" if options.images else "jsonl")
    names = ("train", *MODES) if options.images else ("train", "test")
    files = {split: Path(options.output_dir) / f"{split}.{kind}" for split in names}
    for path in files.values():
        _refuse_existing(path, options)
    splits = routes_dataset(**{name: getattr(options, name) for name in (*_ROUTES, "criteria", "images")})
    lines = []
    for split, path in files.items():
        write_rows(splits[split], path)
        difficulties = splits[split]["difficulty"][:]
        counts = ", ".join(f"{difficulties.count(level)} of {level}" for level in range(2, 7))
        lines.append(f"wrote {len(difficulties)} rows to {path}; by difficulty {counts}")
    return lines, 0


def _score(options: argparse.Namespace) -> Printed:
    loaded = _load(options)
    return score_rollouts.run(options, loaded.rows, loaded.tokenizer), 0


def _refuse_existing(path: Path, options: argparse.Namespace) -> None:
    if path.exists() and not options.force:
        raise UsageError(f"{path} exists; --force overwrites it")


def _load(options: argparse.Namespace) -> _Loaded:
    from ..data.overlap import question_text
    from ..data.rows import load
    from ..data.templates import Prompting, with_prompting
    from ..models import check_name, end_tokens, load_tokenizer

    if getattr(options, "rows", 0) < 0:
        raise UsageError(f"`--rows` must not be negative, got {options.rows}")
    prompting = Prompting(options.system_prompt or None, options.prompt_template or None)
    tokenizer = load_tokenizer(check_name(options.model, "--model")) if options.model else None
    columns = {column: getattr(options, column) for column in ("prompt", "solution", "completion")}
    rows = load(options.name, options.dataset_split, options.dataset_config, columns=columns)
    questions = [question_text(row) for row in rows] if getattr(options, "benchmarks", None) else []
    eos_token_ids = [] if tokenizer is None else end_tokens(options.model, tokenizer)
    return _Loaded(with_prompting(rows, prompting), questions, tokenizer, eos_token_ids)


def _report(options: argparse.Namespace, loaded: _Loaded) -> "DatasetReport":
    from ..data.checks import check_dataset

    if options.max_length is not None and loaded.tokenizer is None:
        raise UsageError("`--max_length` counts tokens: name the model with --model")
    return check_dataset(
        loaded.rows,
        golds=_golds(options.name) if options.golds == "auto" else options.golds,
        tokenizer=loaded.tokenizer,
        max_length=options.max_length,
        benchmarks=_benchmarks(options.benchmarks) if options.benchmarks else None,
        ngram=options.ngram,
        questions=loaded.questions,
        eos_token_ids=loaded.eos_token_ids or None,
        rewritten=_rewritten(options),
    )


def _rewritten(options: argparse.Namespace) -> "list[Finding]":
    """Golds of a local file that are kept as they are written, and that other readers would change."""
    from ..data.checks import Finding
    from ..data.files import respelt

    if options.golds == "none":
        return []
    reason = "is kept as it is written here; other readers of the file change it. Write it as a JSON string"
    found = respelt(options.name, options.solution or "solution")
    return [Finding(row, f"`solution` {text} {reason}") for row, text in found]


def _golds(name: str) -> str:
    """How the solutions of a dataset are checked, by its name."""
    from ..data.sources import find_source

    kind, _, rest = name.partition(":")
    if kind == "source":
        return "roles" if find_source(rest.partition("@")[0]).reward == "knights_knaves_reward" else "math"
    return "none" if kind in ("builtin", "reasoning-gym") else "math"


def _benchmarks(names: str) -> dict[str, list[str]]:
    """Questions of benchmarks by the names that `trl-bridge eval` takes, without its prompt templates."""
    from ..data.overlap import question_text
    from ..data.rows import load_named_dataset
    from ..evaluation.benchmarks import BENCHMARKS
    from ..evaluation.tasks import Prompting, load_task, parse_benchmarks

    bare = Prompting(template="{prompt}", chat_template=False)
    found = {}
    for folder, (name, path) in parse_benchmarks(names).items():
        if name in BENCHMARKS:
            rows: Iterable[Any] = load_task(folder, name, path, prompting=bare).rows
        else:
            splits = load_named_dataset(name)
            rows = chain.from_iterable([splits["test"]] if "test" in splits else splits.values())
        found[folder] = [question_text(row) for row in rows]
    return found


# What is printed


def _title(options: argparse.Namespace, loaded: _Loaded) -> str:
    rows = loaded.rows
    return f"{options.name}, split {options.dataset_split}: {len(rows)} rows with {', '.join(rows.column_names)}"


def _shown(loaded: _Loaded, rows: Sequence[int]) -> list[str]:
    """Rows column by column; where there is a tokenizer, as the trainer's tokens."""
    from ..data.checks import rendered_samples

    if loaded.tokenizer is None:
        return [line for row in rows for line in _row_lines(row, loaded.rows[row])]
    lines = []
    for row in rows:
        try:
            samples = rendered_samples(loaded.rows, loaded.tokenizer, [row], eos_token_ids=loaded.eos_token_ids)
            lines += [line for sample in samples for line in _sample_lines(sample)]
        except ValueError as error:
            lines += [*_row_lines(row, loaded.rows[row]), f"  does not render: {error}"]
    return lines


def _report_lines(report: "DatasetReport") -> list[str]:
    """Findings by kind, the first few of each spelt out."""
    kinds: list[tuple[str, Sequence[Any]]] = [
        ("empty or unusable cells", report.empty),
        ("duplicates", report.duplicates),
        ("golds that cannot be judged", report.golds),
        ("golds that other readers rewrite", report.rewritten),
        ("demonstrations that do not render", report.unrenderable),
        ("demonstrations that are too long", report.overlong),
        ("questions shared with a benchmark", report.overlaps),
    ]
    lines = []
    for kind, found in kinds:
        lines.append(f"  {kind:35}{len(found):>7}")
        lines += [f"      row {each.row}: {_cut(_what(each), 150)}" for each in found[:_FINDINGS]]
        if len(found) > _FINDINGS:
            lines.append(f"      and {len(found) - _FINDINGS} more")
    if report.lengths:
        ordered = sorted(report.lengths)
        lines.append(
            f"  tokens of a demonstration with its prompt: {statistics.median(ordered):.0f} in the middle, "
            f"{ordered[math.ceil(0.95 * len(ordered)) - 1]} at the 95th percentile, {ordered[-1]} at most"
        )
    return lines


def _row_lines(index: int, row: Mapping[str, Any]) -> list[str]:
    """A row, column by column."""
    lines = ["", f"row {index}"]
    for column, value in row.items():
        if isinstance(value, list) and value and isinstance(value[0], dict):
            lines += [f"  {column} ({message['role']}): {_cut(str(message['content']))}" for message in value]
        else:
            lines.append(f"  {column}: {_cut(str(value))}")
    return lines


def _sample_lines(sample: "Sample") -> list[str]:
    """A row as the trainer's tokens, separated by "|"."""
    lines = ["", f"row {sample.row}", f"  prompt, {len(sample.prompt)} tokens: {_tokens(sample.prompt)}"]
    if sample.completion:
        lines.append(f"  trained, {len(sample.completion)} tokens: {_tokens(sample.completion)}")
    return lines if sample.solution is None else [*lines, f"  solution: {_cut(str(sample.solution))}"]


def _what(found: Any) -> str:
    if hasattr(found, "what"):
        return found.what
    return f"{found.benchmark} row {found.benchmark_row}: {found.words!r}"


def _tokens(tokens: list[str]) -> str:
    shown = [token.replace("\n", "\\n") for token in tokens]
    if len(shown) > _TOKENS:
        left_out = len(shown) - _TOKENS
        shown = [*shown[: _TOKENS // 2], f"... {left_out} tokens ...", *shown[-_TOKENS // 2 :]]
    return "|".join(shown)


def _cut(text: str, limit: int = _CHARACTERS) -> str:
    text = text.replace("\n", "\\n")
    return text if len(text) <= limit else f"{text[: limit // 2]} ... {text[-limit // 2 :]}"

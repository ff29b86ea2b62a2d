"""`trl-bridge data`: list, show, check, prepare, generate and score datasets."""

import argparse
import math
import statistics
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from . import score_rollouts
from .errors import ToolParser, UsageError


if TYPE_CHECKING:
    from datasets import Dataset

    from ..data.checks import DatasetReport, Sample


__all__ = ["main", "report_lines", "row_lines", "sample_lines"]


_FINDINGS = 5
_CHARACTERS = 600
_TOKENS = 120


def report_lines(report: "DatasetReport") -> list[str]:
    """Findings by kind, the first few of each spelt out."""
    kinds: list[tuple[str, Sequence[Any]]] = [
        ("empty cells", report.empty),
        ("duplicates", report.duplicates),
        ("golds that cannot be judged", report.golds),
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


def row_lines(index: int, row: Mapping[str, Any]) -> list[str]:
    """A row, column by column."""
    lines = ["", f"row {index}"]
    for column, value in row.items():
        if isinstance(value, list) and value and isinstance(value[0], dict):
            lines += [f"  {column} ({message['role']}): {_cut(str(message['content']))}" for message in value]
        else:
            lines.append(f"  {column}: {_cut(str(value))}")
    return lines


def sample_lines(sample: "Sample") -> list[str]:
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


_WRITERS = (".jsonl", ".parquet")
_SCHEMA = """Columns:
  prompt      messages (a conversation that ends with the user), or a string
  solution    string: what the reward compares with
  completion  messages or a string: a demonstration
  expert      a string, messages, or a list of either: demonstrations, for the methods that take them row by row

Generated, nothing is downloaded:
  builtin:addition, builtin:routes, reasoning-gym:TASK

Sources (`source:NAME@PATH` reads a local copy of the raw data):"""


class _Loaded(NamedTuple):
    """`rows` as they are trained on, and `questions` without the prompt template."""

    rows: "Dataset"
    questions: list[str]
    tokenizer: Any


def main(argv: list[str] | None = None) -> int:
    """Run the tool."""
    options = _parser().parse_args(sys.argv[1:] if argv is None else argv)
    if options.action == "ls":
        return _list()
    # Imported late, so that --help and a wrong option answer at once.
    import datasets

    shown = datasets.are_progress_bars_disabled() is False
    datasets.disable_progress_bars()
    try:
        return {"show": _show, "check": _check, "prepare": _prepare, "routes": _routes, "score-rollouts": _score}[
            options.action
        ](options)
    finally:
        if shown:
            datasets.enable_progress_bars()


def _parser() -> ToolParser:
    parser = ToolParser(prog="trl-bridge data", description="List, show, check, prepare, generate and score datasets.")
    actions = parser.add_subparsers(dest="action", metavar="ACTION", required=True)
    actions.add_parser("ls", help="list the sources, and the columns that the trainers read")
    show = actions.add_parser("show", help="show a dataset's first rows, with --model as tokens")
    check = actions.add_parser("check", help="check a dataset: exit code 0 if it is sound, 1 if not")
    prepare = actions.add_parser("prepare", help="write a dataset as JSONL or Parquet")
    routes = actions.add_parser("routes", help="generate route tasks: a training and a test file, no row in both")
    score = actions.add_parser(
        "score-rollouts", help="sample from a model, score with a teacher: rows for lightning-opd"
    )
    for action in (show, check, prepare, score):
        _add_dataset_options(action)
    for action in (show, check):
        action.add_argument("--rows", type=int, default=3, help="number of rows that are shown (3)")
    for action in (check, prepare):
        _add_check_options(action)
    prepare.add_argument("--output", required=True, metavar="FILE", help="file to write, .jsonl or .parquet")
    prepare.add_argument("--clean", action="store_true", help="leave out every row that `check` complains about")
    prepare.add_argument(
        "--max_prompt_length", type=int, help="drop rows with longer prompts, in tokens (needs --model)"
    )
    _add_route_options(routes)
    score_rollouts.add_options(score)
    for action in (prepare, routes):
        action.add_argument("--force", action="store_true", help="overwrite a file that exists")
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
    parser.add_argument("--format", choices=("jsonl", "parquet"), default="jsonl", help="kind of the files (jsonl)")
    for name, default, what in (
        ("size", 500, "training rows"),
        ("test_size", 100, "test rows"),
        ("seed", 0, "seed of everything"),
        ("min_lines", 2, "fewest lines of a network, from 2"),
        ("max_lines", 4, "most lines of a network, up to 8"),
        ("min_stops", 3, "fewest stops of a line, from 3"),
        ("max_stops", 5, "most stops of a line, up to 10"),
    ):
        parser.add_argument(f"--{name}", type=int, default=default, help=f"{what} ({default})")
    parser.add_argument(
        "--criteria", help="what counts, as in time+comfort, of time, price, comfort and reliability (drawn by row)"
    )


def _list() -> int:
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
    return _say(lines)


def _show(options: argparse.Namespace) -> int:
    from ..data.checks import rendered_samples

    loaded = _load(options)
    lines = [_title(options, loaded)]
    rows = range(min(options.rows, len(loaded.rows)))
    if loaded.tokenizer is None:
        lines += [line for row in rows for line in row_lines(row, loaded.rows[row])]
    else:
        samples = rendered_samples(loaded.rows, loaded.tokenizer, list(rows))
        lines += [line for sample in samples for line in sample_lines(sample)]
    return _say(lines)


def _check(options: argparse.Namespace) -> int:
    from ..data.checks import rendered_samples

    loaded = _load(options)
    report = _report(options, loaded)
    lines = [_title(options, loaded), *report_lines(report)]
    refused = {finding.row for finding in report.unrenderable}
    rows = [row for row in range(len(loaded.rows)) if row not in refused][: options.rows]
    if loaded.tokenizer is None:
        lines += [line for row in rows for line in row_lines(row, loaded.rows[row])]
        lines += ["", "Without --model no demonstration was rendered or measured."]
    else:
        samples = rendered_samples(loaded.rows, loaded.tokenizer, rows)
        lines += [line for sample in samples for line in sample_lines(sample)]
    bad = len(report.bad_rows)
    lines += ["", "sound" if report.sound else f"{bad} of {report.rows} rows have something wrong"]
    _say(lines)
    return 0 if report.sound else 1


def _prepare(options: argparse.Namespace) -> int:
    from ..data.lengths import within_prompt_length

    output = Path(options.output)
    if output.suffix not in _WRITERS:
        raise UsageError(f"`--output` must end in {' or '.join(_WRITERS)}, got {output.name}")
    if output.exists() and not options.force:
        raise UsageError(f"{output} exists; --force overwrites it")
    if options.max_prompt_length is not None and options.model is None:
        raise UsageError("`--max_prompt_length` counts tokens: name the model with --model")
    loaded = _load(options)
    rows, lines = loaded.rows, []
    if options.clean:
        report = _report(options, loaded)
        lines += report_lines(report)
        rows = rows.select([row for row in range(len(rows)) if row not in report.bad_rows])
        if not len(rows):
            raise ValueError(f"no row of {options.name} is sound: run `trl-bridge data check`")
    if options.max_prompt_length is not None:
        rows = within_prompt_length(rows, loaded.tokenizer, options.max_prompt_length, options.name)
    _write(rows, output)
    lines.append(f"wrote {len(rows)} of {len(loaded.rows)} rows to {output}: {', '.join(rows.column_names)}")
    return _say(lines)


def _routes(options: argparse.Namespace) -> int:
    from ..data.routes import routes_dataset

    files = {split: Path(options.output_dir) / f"{split}.{options.format}" for split in ("train", "test")}
    for path in files.values():
        if path.exists() and not options.force:
            raise UsageError(f"{path} exists; --force overwrites it")
    names = "size test_size seed min_lines max_lines min_stops max_stops criteria".split()
    splits = routes_dataset(**{name: getattr(options, name) for name in names})
    lines = []
    for split, path in files.items():
        rows = splits[split]
        _write(rows, path)
        counts = ", ".join(f"{rows['difficulty'][:].count(level)} of {level}" for level in range(2, 7))
        lines.append(f"wrote {len(rows)} rows to {path}; by difficulty {counts}")
    return _say(lines)


def _score(options: argparse.Namespace) -> int:
    loaded = _load(options)
    return _say(score_rollouts.run(options, loaded.rows, loaded.tokenizer))


def _write(rows: "Dataset", output: Path) -> None:
    output.parent.mkdir(parents=True, exist_ok=True)
    if output.suffix == ".parquet":
        rows.to_parquet(output)
    else:
        rows.to_json(output, force_ascii=False)


def _load(options: argparse.Namespace) -> _Loaded:
    from trl import ModelConfig

    from ..data.overlap import question_text
    from ..data.rows import load_named_dataset, map_columns, with_system_prompt
    from ..data.templates import find_template, with_prompt_template
    from .datasets import load_tokenizer

    if getattr(options, "rows", 0) < 0:
        raise UsageError(f"`--rows` must not be negative, got {options.rows}")
    if options.prompt_template and find_template(options.prompt_template).plain and options.system_prompt:
        raise UsageError("`--system_prompt` needs conversations, and `--prompt_template` makes plain text")
    tokenizer = load_tokenizer(ModelConfig(model_name_or_path=options.model)) if options.model else None
    splits = load_named_dataset(options.name, options.dataset_config)
    if options.dataset_split not in splits:
        known = ", ".join(map(str, splits))
        raise UsageError(
            f"`--dataset_split {options.dataset_split}`: {options.name} has no such split; it has: {known}"
        )
    columns = {column: getattr(options, column) for column in ("prompt", "solution", "completion")}
    rows: Any = map_columns(splits[options.dataset_split], columns, options.name)
    questions = [question_text(row) for row in rows] if getattr(options, "benchmarks", None) else []
    if options.prompt_template:
        rows = with_prompt_template(rows, options.prompt_template)
    if options.system_prompt:
        rows = with_system_prompt(rows, options.system_prompt)
    return _Loaded(rows, questions, tokenizer)


def _report(options: argparse.Namespace, loaded: _Loaded) -> "DatasetReport":
    from ..data.checks import check_dataset

    if options.max_length is not None and loaded.tokenizer is None:
        raise UsageError("`--max_length` counts tokens: name the model with --model")
    return check_dataset(
        loaded.rows,
        golds=_golds(options) if options.golds == "auto" else options.golds,
        tokenizer=loaded.tokenizer,
        max_length=options.max_length,
        benchmarks=_benchmarks(options.benchmarks) if options.benchmarks else None,
        ngram=options.ngram,
        questions=loaded.questions,
    )


def _golds(options: argparse.Namespace) -> str:
    from ..data.sources import find_source

    kind, _, name = options.name.partition(":")
    if kind == "source":
        return "roles" if find_source(name.partition("@")[0]).reward == "knights_knaves_reward" else "math"
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
            found[folder] = [question_text(row) for row in load_task(folder, name, path, prompting=bare).rows]
        else:
            splits = load_named_dataset(name)
            chosen = [splits["test"]] if "test" in splits else list(splits.values())
            found[folder] = [question_text(row) for split in chosen for row in split]
    return found


def _title(options: argparse.Namespace, loaded: _Loaded) -> str:
    rows = loaded.rows
    return f"{options.name}, split {options.dataset_split}: {len(rows)} rows with {', '.join(rows.column_names)}"


def _say(lines: list[str]) -> int:
    sys.stdout.write("\n".join(lines) + "\n")
    return 0

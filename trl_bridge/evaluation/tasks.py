"""Tasks: the rows of a benchmark or of any dataset, with prompts made and the grader found."""

import hashlib
import json
import re
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pkgutil import resolve_name
from typing import Any, NamedTuple

from datasets import Dataset, load_dataset
from transformers import TrainerState

from ..data.files import is_file_name
from ..data.rows import load_named_dataset, prepared, take_split
from ..data.templates import Prompting, Template
from ..data.written import uncompressed
from ..demonstrations.rows import check_prompts
from ..rewards.calling import call_reward
from ..rewards.code_rewards import CodeExecutionRefused
from .benchmarks import BENCHMARKS, Benchmark


Grader = Callable[..., Sequence[float | None]]

_MATH = "trl_bridge.rewards.math_reward"
_GENERATED = {
    "builtin:addition": "trl_bridge.rewards.answer_reward",
    "reasoning-gym:": "trl_bridge.rewards.reasoning_gym_reward",
}


@dataclass(frozen=True)
class Task:
    """
    What is evaluated under one name.

    Attributes:
        name (`str`):
            Name in the results, and of the folder.
        rows (`list[dict]`):
            Questions: `prompt` (string or messages) and the columns that the grader reads.
        grader (`Callable`):
            Reward function.
        grader_name (`str`):
            Its name.
        source (`dict[str, Any]`):
            Where the rows come from.
        template (`str`, *optional*):
            Text that was put around the questions.
        prompting ([`Prompting`]):
            What was asked for.
    """

    name: str
    rows: list[dict[str, Any]]
    grader: Grader
    grader_name: str
    source: dict[str, Any]
    template: str | None = None
    prompting: Prompting = field(default_factory=Prompting)

    @property
    def fingerprint(self) -> str:
        """Hash of all rows, prompts and golds, in order."""
        return hashlib.sha256(json.dumps(self.rows, sort_keys=True, default=str).encode()).hexdigest()[:16]


def parse_benchmarks(text: str) -> dict[str, tuple[str, str | None]]:
    """Read a list such as `math500,aime24=raw/aime.jsonl,data/mine.jsonl`."""
    found: dict[str, tuple[str, str | None]] = {}
    for item in filter(None, (part.strip() for part in text.split(","))):
        name, equals, path = item.partition("=")
        entry = (name, path) if equals and name in BENCHMARKS else (item, None)
        stem = uncompressed(entry[0]).stem if is_file_name(entry[0]) else entry[0]
        folder = re.sub(r"[^\w.-]+", "-", stem).strip("-.")
        if folder in found:
            raise ValueError(f"`benchmarks` names {folder!r} twice: {found[folder][0]} and {entry[0]}.")
        found[folder] = entry
    if not found:
        raise ValueError(f"`benchmarks` is empty: name one or more of {', '.join(BENCHMARKS)}, a dataset or a file.")
    return found


def load_task(
    folder: str,
    name: str,
    path: str | None = None,
    *,
    prompting: Prompting | None = None,
    grader: tuple[str, Grader] | None = None,
    prompt_column: str | None = None,
    solution_column: str | None = None,
    dataset_config: str | None = None,
    dataset_split: str | None = None,
    limit: int | None = None,
    seed: int = 0,
) -> Task:
    """
    Load the rows of a benchmark, or of any dataset with `prompt` and `solution`.

    Args:
        folder (`str`):
            Name in the results.
        name (`str`):
            A benchmark (see [`~trl_bridge.evaluation.benchmarks.BENCHMARKS`]), or what
            [`~trl_bridge.data.rows.load_named_dataset`] takes.
        path (`str`, *optional*):
            Local file with the benchmark's raw rows, in place of the hub.
        prompting ([`Prompting`], *optional*):
            System prompt and template.
        grader (`tuple[str, Callable]`, *optional*):
            Name and function, in place of the benchmark's own.
        prompt_column, solution_column (`str`, *optional*):
            Columns of a dataset that is no benchmark. `None` means `prompt` and `solution`.
        dataset_config, dataset_split (`str`, *optional*):
            Configuration (or a generated task's parameters) and split of such a dataset; its `test` split by default,
            or its only one.
        limit (`int`, *optional*):
            First rows only.
        seed (`int`, *optional*, defaults to `0`):
            Seed of the order of choices in GPQA.

    Returns:
        [`Task`]: the task.

    Raises:
        ValueError, OSError, ImportError: the rows, a column, a split or the grader cannot be found.
    """
    prompting = prompting or Prompting()
    template: str | None
    if name in BENCHMARKS:
        benchmark = BENCHMARKS[name]
        found = prompting.found(benchmark.template)
        raw, source = _raw_rows(name, benchmark, path)
        chosen = raw if limit is None else raw.select(range(min(limit, len(raw))))
        for index, row in enumerate(chosen):
            _refuse_null(row, index, benchmark, name)
        rows = [_put(benchmark.render(row, index, seed), found, prompting) for index, row in enumerate(chosen)]
        template, grader_name = found.text, benchmark.grader
    else:
        columns = {"prompt": prompt_column, "solution": solution_column}
        rows, source = _dataset_rows(name, dataset_config, dataset_split, columns, prompting, limit)
        template = None if prompting.template is None else prompting.found(prompting.template).text
        grader_name = next((own for prefix, own in _GENERATED.items() if name.startswith(prefix)), _MATH)
    if not rows:
        raise ValueError(f"`benchmarks`: {name} has no rows.")
    grader_name, function = grader or (grader_name, resolve_name(grader_name))
    return Task(folder, rows, function, grader_name, source, template, prompting)


def _refuse_null(row: Mapping[str, Any], index: int, benchmark: Benchmark, name: str) -> None:
    for column in benchmark.columns:
        if row[column] is None and column not in ("starter_code", "metadata"):
            raise ValueError(f"`benchmarks`: {name} row {index}: `{column}` is null. Remove the row.")


def _raw_rows(name: str, benchmark: Benchmark, path: str | None) -> tuple[Dataset, dict[str, Any]]:
    """A benchmark's raw rows, and where they come from."""
    fields = ("hub_id", "revision", "config", "split", "data_file")
    source = {"file": path} if path is not None else {field: getattr(benchmark, field) for field in fields}
    raw: Any
    if path is not None:
        raw = load_named_dataset(path)["train"]
    elif benchmark.data_file is not None:
        url = f"hf://datasets/{benchmark.hub_id}@{benchmark.revision}/{benchmark.data_file}"
        raw = load_dataset("json", data_files=url, split="train")
    else:
        raw = load_dataset(benchmark.hub_id, name=benchmark.config, split=benchmark.split, revision=benchmark.revision)
    missing = [column for column in benchmark.columns if column not in raw.column_names]
    if missing:
        raise ValueError(
            f"`benchmarks`: {path or benchmark.hub_id} lacks the columns {', '.join(missing)} of {name}'s raw schema; it "
            f"has: {', '.join(raw.column_names)}."
        )
    return raw, source


def _dataset_rows(
    name: str,
    config: str | None,
    split: str | None,
    columns: Mapping[str, str | None],
    prompting: Prompting,
    limit: int | None,
) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """The rows of a dataset that is no benchmark, and where they come from."""
    splits = load_named_dataset(name, config)
    chosen = split or ("test" if "test" in splits or len(splits) > 1 else str(next(iter(splits))))
    dataset = prepared(take_split(splits, chosen, name), name, columns, prompting, limit)
    check_prompts(dataset, name)
    # A demonstration is no part of a question, and would be part of the fingerprint.
    rows = [{key: value for key, value in row.items() if key != "completion"} for row in dataset]
    return rows, {"dataset": name, "config": config, "split": chosen}


def _put(row: dict[str, Any], template: Template, prompting: Prompting) -> dict[str, Any]:
    """`question` as a prompt. Replaced, not formatted: questions and templates are full of LaTeX's braces."""
    text = template.text.replace("{prompt}", row.pop("question"))
    if template.plain or not prompting.chat_template:
        return {"prompt": text, **row}
    system = [] if prompting.system_prompt is None else [{"role": "system", "content": prompting.system_prompt}]
    return {"prompt": [*system, {"role": "user", "content": text}], **row}


# What rewards write to TRL's table of completions where they found no answer.
_NO_ANSWER = ("[none]", None)


class Grade(NamedTuple):
    """What the grader says about one completion."""

    score: float | None
    answer: str | None
    answered: bool | None
    stopped: bool


def grade(
    task: Task, questions: Sequence[int], texts: Sequence[str], ids: Sequence[Sequence[int]] | None = None
) -> list[Grade]:
    """Grade completions; `ids` are their tokens, for graders that read them."""
    ids = [()] * len(texts) if ids is None else ids
    grades, stopped = _call(task, questions, texts, ids)
    if stopped and len(texts) > 1:
        # A batch has one limit of time, and one answer may use it up. One by one each has its own, and the verdict does
        # not depend on the neighbours.
        each = zip(questions, texts, ids, strict=True)
        return [_call(task, [question], [text], [tokens])[0][0] for question, text, tokens in each]
    return grades


def _call(
    task: Task, questions: Sequence[int], texts: Sequence[str], ids: Sequence[Sequence[int]]
) -> tuple[list[Grade], bool]:
    extra: dict[str, list[Any]] = defaultdict(list)
    metrics: dict[str, list[float]] = defaultdict(list)
    rows = [task.rows[question] for question in questions]
    try:
        scores = call_reward(
            task.grader,
            rows,
            texts,
            ids,
            trainer_state=TrainerState(),
            log_extra=lambda column, values: extra[column].extend(values),
            log_metric=lambda name, value: metrics[name].append(value),
        )
    except ValueError as error:
        raise ValueError(f"`grader`: {task.grader_name}: {error}") from error
    stopped = any(max(values) > 0 for name, values in metrics.items() if name.endswith("/timeouts"))
    answers = extra["answer"] if len(extra["answer"]) == len(texts) else None
    grades = []
    for place, score in enumerate(scores):
        answer = None if answers is None or answers[place] in _NO_ANSWER else str(answers[place])
        answered = None if answers is None else answers[place] not in _NO_ANSWER
        grades.append(Grade(score, answer, answered, stopped))
    return grades, stopped


def check_grader(task: Task) -> None:
    """
    Grade an empty completion, so that a column or a permission that the grader lacks is seen before any generation.
    """
    try:
        _call(task, [0], [""], [[]])
    except CodeExecutionRefused as error:
        raise ValueError(f"`benchmarks: {task.name}`: {error}") from error
    except TypeError as error:
        columns = ", ".join(task.rows[0])
        raise ValueError(
            f"`grader`: {task.grader_name} does not take the rows of {task.name} ({columns}): {error}"
        ) from error

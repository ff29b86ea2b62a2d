"""Tasks: the rows of a benchmark or of any dataset, with prompts made and the grader found."""

import hashlib
import importlib
import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from datasets import Dataset, load_dataset

from ..data.rows import load_named_dataset, map_columns, with_system_prompt
from ..data.templates import Template, find_template, with_prompt_template
from ..rewards.code_rewards import CodeExecutionRefused
from .benchmarks import BENCHMARKS, Benchmark


__all__ = ["Grade", "Prompting", "Task", "check_grader", "grade", "load_task", "parse_benchmarks"]


Grader = Callable[..., Sequence[float | None]]

_MATH = "trl_bridge.rewards.math_reward"
_GENERATED = {
    "builtin:addition": "trl_bridge.rewards.answer_reward",
    "reasoning-gym:": "trl_bridge.rewards.reasoning_gym_reward",
}


@dataclass(frozen=True)
class Prompting:
    """
    How questions become prompts.

    Attributes:
        system_prompt (`str`, *optional*):
            System message. `None` sends none.
        template (`str`, *optional*):
            Prompt template: a name or a text with `{prompt}` (or `{question}`), as in training; see
            [`~trl_bridge.data.templates.find_template`]. `None` is the benchmark's own, and for other datasets the prompt as
            it stands.
        chat_template (`bool`, *optional*, defaults to `True`):
            Whether the questions of the benchmarks go through the tokenizer's chat template, unless the prompt template is
            a plain one. Prompts of other datasets are what the dataset says, as in training.
        chat_template_kwargs (`dict[str, Any]`, *optional*):
            Variables for the tokenizer's chat template, as in [`~trl.GRPOConfig`].

    Raises:
        ValueError: no such template, or a system prompt where there are no conversations.
    """

    system_prompt: str | None = None
    template: str | None = None
    chat_template: bool = True
    chat_template_kwargs: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        plain = self.template is not None and self.found(self.template).plain
        if self.system_prompt is not None and (plain or not self.chat_template):
            raise ValueError(
                "`system_prompt` needs conversations: leave `chat_template` on and take a `prompt_template` that is not "
                "plain, or write the system prompt into the template."
            )

    def found(self, default: str) -> Template:
        """The template, in place of a default one."""
        return find_template((self.template or default).replace("{question}", "{prompt}"))


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
        stem = Path(entry[0]).stem if Path(entry[0]).suffix in (".jsonl", ".json", ".parquet", ".csv") else entry[0]
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
        template = found.text
        rows, source = _benchmark_rows(name, benchmark, path, limit, seed)
        rows = [_put(row, found, prompting) for row in rows]
        grader_name = benchmark.grader
    else:
        template = None if prompting.template is None else prompting.found(prompting.template).text
        rows, source = _dataset_rows(
            name, prompt_column, solution_column, dataset_config, dataset_split, limit, prompting
        )
        grader_name = next((own for prefix, own in _GENERATED.items() if name.startswith(prefix)), _MATH)
    if not rows:
        raise ValueError(f"`benchmarks`: {name} has no rows.")
    grader_name, function = grader or (grader_name, _import(grader_name))
    return Task(folder, rows, function, grader_name, source, template, prompting)


def _benchmark_rows(
    name: str, benchmark: Benchmark, path: str | None, limit: int | None, seed: int
) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    raw, source = _raw_rows(benchmark, path)
    missing = [column for column in benchmark.columns if column not in raw.column_names]
    if missing:
        raise ValueError(
            f"`benchmarks`: {path or benchmark.hub_id} lacks the columns {', '.join(missing)} of {name}'s raw schema; it "
            f"has: {', '.join(raw.column_names)}."
        )
    chosen = raw if limit is None else raw.select(range(min(limit, len(raw))))
    return [benchmark.render(row, index, seed) for index, row in enumerate(chosen)], source


def _raw_rows(benchmark: Benchmark, path: str | None) -> tuple[Dataset, dict[str, Any]]:
    if path is not None:
        return load_named_dataset(path)["train"], {"file": path}
    source = {
        "hub_id": benchmark.hub_id,
        "revision": benchmark.revision,
        "config": benchmark.config,
        "split": benchmark.split,
        "data_file": benchmark.data_file,
    }
    if benchmark.data_file is not None:
        url = f"hf://datasets/{benchmark.hub_id}@{benchmark.revision}/{benchmark.data_file}"
        return load_dataset("json", data_files=url, split="train"), source
    loaded = load_dataset(benchmark.hub_id, name=benchmark.config, split=benchmark.split, revision=benchmark.revision)
    return loaded, source


def _dataset_rows(
    name: str,
    prompt_column: str | None,
    solution_column: str | None,
    config: str | None,
    split: str | None,
    limit: int | None,
    prompting: Prompting,
) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    splits = load_named_dataset(name, config)
    chosen = split or ("test" if "test" in splits or len(splits) > 1 else next(iter(splits)))
    if chosen not in splits:
        raise ValueError(
            f"`dataset_split: {chosen}`: {name} has no such split; it has: {', '.join(map(str, splits))}."
        )
    dataset = splits[chosen]
    dataset = map_columns(dataset, {"prompt": prompt_column, "solution": solution_column}, "benchmarks")
    if "prompt" not in dataset.column_names:
        raise ValueError(
            f"`benchmarks`: {name} has no column `prompt`; name it with `prompt_column`. It has: "
            f"{', '.join(dataset.column_names)}."
        )
    if limit is not None:
        dataset = dataset.select(range(min(limit, len(dataset))))
    if prompting.template is not None:
        dataset = with_prompt_template(dataset, prompting.template.replace("{question}", "{prompt}"))
    if prompting.system_prompt is not None:
        dataset = with_system_prompt(dataset, prompting.system_prompt)
    # A demonstration is no part of a question, and would be part of the fingerprint.
    rows = [{key: value for key, value in row.items() if key != "completion"} for row in dataset]
    return rows, {"dataset": name, "config": config, "split": chosen}


def _put(row: dict[str, Any], template: Template, prompting: Prompting) -> dict[str, Any]:
    """`question` as a prompt. Replaced, not formatted: questions and templates are full of LaTeX's braces."""
    columns = {key: value for key, value in row.items() if key != "question"}
    text = template.text.replace("{prompt}", row["question"])
    if template.plain or not prompting.chat_template:
        return {"prompt": text, **columns}
    system = [] if prompting.system_prompt is None else [{"role": "system", "content": prompting.system_prompt}]
    return {"prompt": [*system, {"role": "user", "content": text}], **columns}


def _import(path: str) -> Grader:
    module, _, attribute = path.rpartition(".")
    return getattr(importlib.import_module(module), attribute)


# What rewards write to TRL's table of completions where they found no answer.
_NO_ANSWER = ("[none]", None)


class Grade(NamedTuple):
    """What the grader says about one completion."""

    score: float | None
    answer: str | None
    answered: bool | None
    stopped: bool


def grade(task: Task, questions: Sequence[int], texts: Sequence[str]) -> list[Grade]:
    """Grade completions."""
    grades, stopped = _call(task, questions, texts)
    if stopped and len(texts) > 1:
        # A batch has one limit of time, and one answer may use it up. One by one each has its own, and the verdict does
        # not depend on the neighbours.
        return [_call(task, [question], [text])[0][0] for question, text in zip(questions, texts, strict=True)]
    return grades


def _call(task: Task, questions: Sequence[int], texts: Sequence[str]) -> tuple[list[Grade], bool]:
    rows = [task.rows[question] for question in questions]
    extra: dict[str, list[Any]] = {}
    metrics: dict[str, float] = {}
    columns = {key: [row[key] for row in rows] for key in rows[0]}
    prompts = columns.pop("prompt")
    completions = [
        text if isinstance(prompt, str) else [{"role": "assistant", "content": text}]
        for prompt, text in zip(prompts, texts, strict=True)
    ]
    scores = task.grader(
        prompts=prompts,
        completions=completions,
        **columns,
        log_extra=extra.__setitem__,
        log_metric=metrics.__setitem__,
    )
    stopped = any(value > 0 for name, value in metrics.items() if name.endswith("/timeouts"))
    answers = extra.get("answer")
    grades = []
    for place, score in enumerate(scores):
        answer = None if answers is None or answers[place] in _NO_ANSWER else str(answers[place])
        answered = None if answers is None else answers[place] not in _NO_ANSWER
        grades.append(Grade(None if score is None else float(score), answer, answered, stopped))
    if len(grades) != len(texts):
        raise ValueError(f"`grader`: {task.grader_name} gave {len(grades)} scores for {len(texts)} completions.")
    return grades, stopped


def check_grader(task: Task) -> None:
    """
    Grade an empty completion, so that a column or a permission that the grader lacks is seen before any generation.
    """
    try:
        _call(task, [0], [""])
    except CodeExecutionRefused as error:
        raise ValueError(f"`benchmarks: {task.name}`: {error}") from error
    except TypeError as error:
        columns = ", ".join(task.rows[0])
        raise ValueError(
            f"`grader`: {task.grader_name} does not take the rows of {task.name} ({columns}): {error}"
        ) from error

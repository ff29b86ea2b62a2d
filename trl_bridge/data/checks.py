"""What is wrong with a dataset, found before training."""

import os
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from datasets import Dataset, Features, Value
from transformers import PreTrainedTokenizerBase

from ..demonstrations.render import Renderer, completion_of
from ..demonstrations.rows import prompt_fault, prompt_key
from ..rewards import check_golds, knights_knaves_reward
from .files import code_of
from .overlap import Overlap, find_overlaps, question_text
from .rows import prompt_tokens


_PROMPTS = {"prompt", "messages", "conversations", "text"}
_KINDS: dict[type, str] = {str: "a string", list: "messages"}
# Fewer take longer to start a process for than to render.
_ROWS_PER_PROCESS = 2000

GOLDS = ("math", "roles", "none")
"""How the `solution` column is checked: as golds of `math_reward`, of `knights_knaves_reward`, or not at all."""


@dataclass(frozen=True)
class Finding:
    """Something wrong with a row."""

    row: int
    what: str


@dataclass(frozen=True)
class Sample:
    """A row as tokens."""

    row: int
    prompt: list[str]
    completion: list[str]
    solution: str | None = None


@dataclass(frozen=True)
class DatasetReport:
    """What [`check_dataset`] found."""

    rows: int
    empty: list[Finding] = field(default_factory=list)
    duplicates: list[Finding] = field(default_factory=list)
    golds: list[Finding] = field(default_factory=list)
    unrenderable: list[Finding] = field(default_factory=list)
    overlong: list[Finding] = field(default_factory=list)
    overlaps: list[Overlap] = field(default_factory=list)
    lengths: list[int] = field(default_factory=list)
    rewritten: list[Finding] = field(default_factory=list)

    @property
    def bad_rows(self) -> set[int]:
        """Rows that training should not see. Those that only other readers rewrite are not among them."""
        found = (*self.empty, *self.duplicates, *self.golds, *self.unrenderable, *self.overlong)
        return {finding.row for finding in found} | {overlap.row for overlap in self.overlaps}

    @property
    def sound(self) -> bool:
        """Whether nothing was found."""
        return not self.bad_rows and not self.rewritten


def check_dataset(
    dataset: Dataset,
    *,
    golds: str = "math",
    tokenizer: PreTrainedTokenizerBase | None = None,
    max_length: int | None = None,
    chat_template_kwargs: dict[str, Any] | None = None,
    benchmarks: Mapping[str, Iterable[str]] | None = None,
    ngram: int = 13,
    questions: Sequence[str] | None = None,
    eos_token_ids: Sequence[int] | None = None,
    rewritten: Sequence[Finding] = (),
) -> DatasetReport:
    """
    Check a dataset in the columns that the trainers read.

    Args:
        dataset ([`~datasets.Dataset`]):
            Rows with `prompt` or `messages`, and perhaps `solution`, `completion`, `expert`.
        golds (`str`, *optional*, defaults to `"math"`):
            How the `solution` column is checked, one of [`GOLDS`]. Rows with `metadata` are reasoning-gym's own, whose
            golds are right.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`], *optional*):
            Tokenizer of the model. Without it demonstrations are not rendered, hence not measured.
        max_length (`int`, *optional*):
            Longest demonstration, prompt included, in tokens (`sft_max_length` in training).
        chat_template_kwargs (`dict[str, Any]`, *optional*):
            Keyword arguments of the chat template.
        benchmarks (`Mapping[str, Iterable[str]]`, *optional*):
            Questions of the benchmarks that the dataset must not share.
        ngram (`int`, *optional*, defaults to `13`):
            See [`~trl_bridge.data.overlap.find_overlaps`].
        questions (`Sequence[str]`, *optional*):
            The rows' questions without any template around them. `None` takes them from the prompts.
        eos_token_ids (`Sequence[int]`, *optional*):
            All end-of-sequence tokens of the model, the tokenizer's first. `None` is the tokenizer's alone.
        rewritten (`Sequence[Finding]`, *optional*):
            Golds that are spelt in the file as other readers would not give them back.

    Returns:
        [`DatasetReport`]: what was found.

    Raises:
        ValueError: an option that cannot be, or no rows.
    """
    if golds not in GOLDS:
        raise ValueError(f"`golds` must be one of {', '.join(GOLDS)}, got {golds!r}")
    if max_length is not None and tokenizer is None:
        raise ValueError("`max_length` counts tokens: pass a `tokenizer`")
    if len(dataset) == 0:
        raise ValueError("the dataset has no rows")
    if not _PROMPTS & set(dataset.column_names):
        raise ValueError(
            f"the dataset has no column `prompt`; name it with `prompt_column`. It has: {', '.join(dataset.column_names)}"
        )
    lengths: dict[int, int] = {}
    unrenderable: list[Finding] = []
    if tokenizer is not None and _has_demonstrations(dataset):
        render = _renderer(tokenizer, chat_template_kwargs or {}, eos_token_ids)
        lengths, unrenderable = _demonstration_lengths(dataset, render)
    overlaps: list[Overlap] = []
    if benchmarks:
        texts = [question_text(row) for row in _rows(dataset)] if questions is None else questions
        overlaps = find_overlaps(texts, benchmarks, ngram)
    return DatasetReport(
        rows=len(dataset),
        empty=_unusable_cells(dataset),
        duplicates=_duplicates(dataset),
        golds=_bad_golds(dataset, golds),
        unrenderable=unrenderable,
        overlong=[
            Finding(row, f"{length} tokens")
            for row, length in lengths.items()
            if max_length is not None and length > max_length
        ],
        overlaps=overlaps,
        lengths=list(lengths.values()),
        rewritten=list(rewritten),
    )


def rendered_samples(
    dataset: Dataset,
    tokenizer: PreTrainedTokenizerBase,
    rows: Sequence[int],
    chat_template_kwargs: dict[str, Any] | None = None,
    eos_token_ids: Sequence[int] | None = None,
) -> list[Sample]:
    """Rows as the trainer renders them."""
    render = _renderer(tokenizer, chat_template_kwargs or {}, eos_token_ids)
    samples = []
    for row in rows:
        example: dict[str, Any] = dataset[row]
        if _has_demonstrations(dataset):
            rendered = render({column: [value] for column, value in example.items()}, [row])
            ids = rendered["input_ids"][0]
            completion = completion_of({"input_ids": ids, "labels": rendered["labels"][0]})[0]
            prompt = ids[: len(ids) - len(completion)]
        else:
            prompt, completion = prompt_tokens(example, tokenizer, chat_template_kwargs), []
        texts = [[str(tokenizer.decode([token])) for token in ids] for ids in (prompt, completion)]
        samples.append(Sample(row, texts[0], texts[1], example.get("solution")))
    return samples


def _rows(dataset: Dataset) -> Iterable[dict[str, Any]]:
    rows: Any = dataset.with_format(None)
    return rows


def _has_demonstrations(dataset: Dataset) -> bool:
    columns = set(dataset.column_names)
    return bool({"prompt", "completion"} <= columns or columns & {"messages", "conversations", "text"})


def _renderer(
    tokenizer: PreTrainedTokenizerBase, kwargs: dict[str, Any], eos_token_ids: Sequence[int] | None
) -> Renderer:
    return Renderer(tokenizer, None, kwargs, list(eos_token_ids or [tokenizer.eos_token_id]), "dataset", None)


def _demonstration_lengths(dataset: Dataset, render: Renderer) -> tuple[dict[int, int], list[Finding]]:
    """Tokens of each demonstration by row, and those that do not render."""
    measured = dataset.with_format(None).map(
        _measured,
        batched=True,
        with_indices=True,
        fn_kwargs={"render": render, **code_of(sys.modules[_measured.__module__], sys.modules[Renderer.__module__])},
        remove_columns=dataset.column_names,
        num_proc=_processes(len(dataset)),
        features=Features({"length": Value("int64"), "fault": Value("string")}),
    )
    lengths, refused = {}, []
    for index, row in enumerate(_rows(measured)):
        if row["fault"] is None:
            lengths[index] = row["length"]
        else:
            refused.append(Finding(index, row["fault"]))
    return lengths, refused


def _measured(batch: Mapping[str, list], indices: list[int], render: Renderer, code: str) -> dict[str, list]:
    # Training stops at the first row that does not render; here all of them are wanted.
    measured: dict[str, list] = {"length": [], "fault": []}
    for index, row in zip(indices, render.rows(batch, indices), strict=True):
        if isinstance(row, ValueError):
            length, fault = None, str(row).removeprefix(f"`dataset` row {index}").lstrip(": ")
        else:
            length, fault = len(row["input_ids"]), None
        measured["length"].append(length)
        measured["fault"].append(fault)
    return measured


def _processes(rows: int) -> int | None:
    """How many processes render: all cores for many rows, this one alone where others would not pay."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    count = min(cores, rows // _ROWS_PER_PROCESS)
    return count if count > 1 else None


def _unusable_cells(dataset: Dataset) -> list[Finding]:
    """Empty cells, and prompts that cannot be asked or are of another kind than the first one."""
    # Some tasks of reasoning-gym have no one answer, and their scorers read none.
    may_be_empty = {"solution"} if "metadata" in dataset.column_names else set()
    found = []
    kind: type | None = None
    for index, row in enumerate(_rows(dataset)):
        found += [
            Finding(index, f"`{column}` is empty")
            for column, value in row.items()
            if column not in may_be_empty and _blank(value)
        ]
        if "prompt" not in row or _blank(row["prompt"]):
            continue
        fault, own = prompt_fault(row["prompt"]), type(row["prompt"])
        kind = kind or (own if fault is None else None)
        if fault is None and kind is not None and own is not kind:
            fault = f"`prompt` is {_KINDS[own]}, and that of the first row {_KINDS[kind]}"
        found += [] if fault is None else [Finding(index, fault)]
    return found


def _blank(value: Any) -> bool:
    if isinstance(value, str):
        return not value.strip()
    if isinstance(value, Mapping):
        return _blank(value.get("content")) if "content" in value else not value
    if isinstance(value, (list, tuple)):
        return all(_blank(each) for each in value)
    return value is None


def _duplicates(dataset: Dataset) -> list[Finding]:
    # Two demonstrations of one prompt are no duplicates.
    columns = [column for column in ("prompt", "completion", "messages", "text") if column in dataset.column_names]
    seen: dict[tuple[str, ...], int] = {}
    found = []
    for index, row in enumerate(_rows(dataset)):
        first = seen.setdefault(tuple(prompt_key(row[column] or "") for column in columns), index)
        if first != index:
            found.append(Finding(index, f"the same as row {first}"))
    return found


def _bad_golds(dataset: Dataset, golds: str) -> list[Finding]:
    if golds == "none" or "solution" not in dataset.column_names or "metadata" in dataset.column_names:
        return []
    if golds == "math":
        bad = check_golds(_rows(dataset.select_columns("solution")))
        return [Finding(gold.row, f"`solution` {gold.gold!r}: {gold.reason}") for gold in bad]
    rewards = knights_knaves_reward([""] * len(dataset), list(dataset["solution"]))
    return [
        Finding(index, f"`solution` {dataset[index]['solution']!r} gives nobody a role")
        for index, reward in enumerate(rewards)
        if reward is None
    ]

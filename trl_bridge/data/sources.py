"""
The datasets of the paper and of the methods it is compared with, by name and in one schema.

`docs/data.md` says what of each entry is confirmed and what is not.
"""

import difflib
import glob
import re
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from datasets import Dataset, DatasetDict, IterableDataset, IterableDatasetDict, load_dataset

from .files import code_of, read_files, warn


class Example(NamedTuple):
    """What every source has."""

    question: str
    solution: str
    traces: tuple[str, ...] = ()


def _math_level(row: Mapping[str, Any]) -> Example:
    """SimpleRL-Zoo: the question without the prompt around it, which is released with a doubled brace in `\\boxed{{}}`."""
    return Example(row["question"].strip(), str(row["gt_answer"]))


def _limr(row: Mapping[str, Any]) -> Example:
    """LIMR: its `prompt` is the bare question."""
    return Example(row["prompt"].strip(), str(row["answer"]))


def _deepmath(row: Mapping[str, Any]) -> Example:
    """DeepMath-103K: its three solutions were kept because they agree with the final answer."""
    traces = (row[f"r1_solution_{number}"] for number in (1, 2, 3))
    return Example(row["question"].strip(), str(row["final_answer"]), _traces(traces))


def _openr1_220k(row: Mapping[str, Any]) -> Example:
    """OpenR1-Math-220k: the complete generations that math-verify found right; the flags stand by position."""
    right, complete = row["correctness_math_verify"] or (), row["is_reasoning_complete"] or ()
    traces = (trace for trace, *flags in zip(row["generations"] or (), right, complete, strict=False) if all(flags))
    return Example(row["problem"].strip(), str(row["answer"]), _traces(traces))


def _openr1_46k(row: Mapping[str, Any]) -> Example:
    """OpenR1-Math-46k-8192: the user's turn (the system message around it is left out) and the first target."""
    question = next(message["content"] for message in reversed(row["prompt"]) if message["role"] == "user")
    targets = (message["content"] for message in (row["target"] or ())[:1])
    return Example(question.strip(), str(row["reward_model"]["ground_truth"]), _traces(targets))


def _knights_knaves(row: Mapping[str, Any]) -> Example:
    """Knights and Knaves: the generator's own reasoning, then everybody's role between answer tags."""
    roles = " ".join(row["solution_text_format"].split())
    steps = [row["cot_head"], *row["cot_repeat_steps"], row["cot_foot"], f"<answer> {roles} </answer>"]
    return Example(row["quiz"].strip(), roles, ("\n".join(step.strip() for step in steps if step),))


def _traces(traces: Any) -> tuple[str, ...]:
    return tuple(_with_open_think(trace) for trace in traces if trace and trace.strip())


def _with_open_think(trace: str) -> str:
    """Traces are released with the opening tag and without it; one form makes them comparable with a chat template's."""
    trace = trace.strip()
    if "</think>" not in trace:
        return trace
    return "<think>\n" + trace.removeprefix("<think>").lstrip()


class Source(NamedTuple):
    """A public dataset, and the function from its raw rows to examples."""

    name: str
    summary: str
    hub_id: str
    columns: tuple[str, ...]
    convert: Callable[[Mapping[str, Any]], Example]
    revision: str | None = None
    files: Mapping[str, str] = {}
    has_traces: bool = False
    reward: str = "math_reward"
    template: str = "boxed"
    licence: str | None = None
    parameters: Mapping[str, Any] = {}


_ALL = (
    Source(
        name="math-3to5",
        summary="MATH, levels 3 to 5, as in SimpleRL-Zoo (8,523 rows)",
        hub_id="hkust-nlp/SimpleRL-Zoo-Data",
        files={split: f"simplelr_qwen_level3to5/{split}.parquet" for split in ("train", "test")},
        columns=("question", "gt_answer"),
        convert=_math_level,
    ),
    Source(
        name="limr",
        summary="LIMR: what it chose of MATH, levels 3 to 5, by the course of RL on it (1,389 rows)",
        hub_id="GAIR/LIMR",
        columns=("prompt", "answer"),
        convert=_limr,
    ),
    Source(
        name="deepmath",
        summary="DeepMath-103K, three DeepSeek-R1 traces for each row",
        hub_id="zwhe99/DeepMath-103K",
        revision="5cf055d1fe3d7a2eb19719ac020211469736ae44",
        files={"train": "data/train-*.parquet"},
        columns=("question", "final_answer", "r1_solution_1", "r1_solution_2", "r1_solution_3"),
        convert=_deepmath,
        has_traces=True,
        licence="MIT",
    ),
    Source(
        name="openr1-math-220k",
        summary="OpenR1-Math, the default part (93,733 rows): DeepSeek-R1 traces that math-verify found right",
        hub_id="open-r1/OpenR1-Math-220k",
        revision="e4e141ec9dea9f8326f4d347be56105859b2bd68",
        files={"train": "data/train-*.parquet"},
        columns=("problem", "answer", "generations", "correctness_math_verify", "is_reasoning_complete"),
        convert=_openr1_220k,
        has_traces=True,
        licence="Apache-2.0",
    ),
    Source(
        name="openr1-math-46k",
        summary="OpenR1-Math up to 8,192 tokens, the data of LUFFY and its successors (45,792 rows)",
        hub_id="Elliott/Openr1-Math-46k-8192",
        columns=("prompt", "target", "reward_model"),
        convert=_openr1_46k,
        has_traces=True,
    ),
    Source(
        name="knights-knaves",
        summary="Knights and Knaves of 2 to 8 people, with worked solutions",
        hub_id="K-and-K/knights-and-knaves",
        revision="2f68547989981b1af37cb3dde5fdefa847aa8619",
        files={split: f"{split}/people{{people}}_num*.jsonl" for split in ("train", "test")},
        columns=("quiz", "solution_text_format", "cot_head", "cot_repeat_steps", "cot_foot"),
        convert=_knights_knaves,
        has_traces=True,
        reward="knights_knaves_reward",
        template="knights-knaves",
        parameters={"people": "*"},
    ),
)

SOURCES: dict[str, Source] = {source.name: source for source in _ALL}
"""All sources by name."""


def find_source(name: str) -> Source:
    """A source by name."""
    if name not in SOURCES:
        nearest = difflib.get_close_matches(name, SOURCES, n=1)
        hint = f"did you mean `source:{nearest[0]}`?" if nearest else f"there are: {', '.join(SOURCES)}"
        raise ValueError(f"no source is called {name!r} ({hint})")
    return SOURCES[name]


def load_source(
    name: str, streaming: bool = False, traces: int = 1, revision: str | None = None, **parameters: Any
) -> DatasetDict | IterableDatasetDict:
    """Load a source from the hub or from a local copy of its raw data."""
    name, _, path = name.partition("@")
    source = find_source(name)
    for key in parameters:
        if key not in source.parameters:
            known = ", ".join(["traces", "revision", *source.parameters])
            raise ValueError(f"source:{name} has no parameter {key!r}; it has: {known}")
    if traces < 1 or (traces > 1 and not source.has_traces):
        raise ValueError(f"source:{name}: `traces` must be 1{' or more' if source.has_traces else ''}, got {traces}")
    values = {**source.parameters, **parameters}
    files = {split: pattern.format(**values) for split, pattern in source.files.items()}
    if path and revision is not None:
        raise ValueError(f"source:{name}@{path} is a local copy, which has no `revision`; leave one of the two out")
    commit = None if revision is None else str(revision)
    raw = _local(source, path, files, streaming) if path else _hub(source, files, streaming, commit)
    return type(raw)({split: _converted(source, rows, traces) for split, rows in raw.items()})


def _hub(
    source: Source, files: Mapping[str, str], streaming: bool, revision: str | None
) -> DatasetDict | IterableDatasetDict:
    revision = revision or source.revision
    try:
        raw = load_dataset(source.hub_id, revision=revision, data_files=files or None, streaming=streaming)
    except OSError as error:
        raise OSError(
            f"{source.hub_id} cannot be read from the hub ({error}). A local copy of its files can be given as "
            f"source:{source.name}@PATH."
        ) from error
    if revision is None:
        commit = _commit_of(raw)
        pin = f"`revision={commit}` (the commit just read)" if commit else "`revision=` and the commit that you mean"
        warn(
            f"source:{source.name}: the revision of {source.hub_id} is not pinned, so the rows may change under you. Add "
            f"{pin} to its parameters, or keep a copy, and read it as source:{source.name}@PATH."
        )
    return raw


def _commit_of(raw: DatasetDict | IterableDatasetDict) -> str | None:
    """The commit in the addresses of the files that were read: `hf://datasets/NAME@COMMIT/FILE`."""
    for rows in raw.values():
        for address in rows.info.download_checksums or {}:
            if found := re.search(r"@([0-9a-f]{40})/", address):
                return found[1]
    return None


def _local(source: Source, path: str, files: Mapping[str, str], streaming: bool) -> DatasetDict | IterableDatasetDict:
    folder = Path(path).expanduser()
    if not folder.is_dir():
        return read_files(str(folder), streaming)
    laid_out = {
        split: f"{glob.escape(str(folder))}/{pattern}" for split, pattern in files.items() if any(folder.glob(pattern))
    }
    if laid_out:
        return read_files(laid_out, streaming)
    # Beside Parquet files a copy of a hub repository has JSON files that are no data.
    for ending in (".parquet", ".jsonl", ".json", ".csv"):
        found = sorted(str(file) for file in folder.rglob(f"*{ending}"))
        if found:
            return read_files(found, streaming)
    raise FileNotFoundError(f"source:{source.name}@{path}: the folder holds no .json, .jsonl, .parquet or .csv files")


def _converted(source: Source, raw: Dataset | IterableDataset, traces: int) -> Dataset | IterableDataset:
    present = list(raw.column_names or [])
    missing = [column for column in source.columns if column not in present]
    if missing:
        raise ValueError(
            f"source:{source.name}: the raw data has no column {', '.join(map(repr, missing))}; it has: "
            f"{', '.join(present)}. What is read here is the raw dataset, as on the hub."
        )
    raw = raw.select_columns(list(source.columns))
    code = code_of(sys.modules[source.convert.__module__], sys.modules[__name__])
    if source.has_traces:
        kept = raw.filter(lambda row, code: bool(source.convert(row).traces), fn_kwargs=code)
        if isinstance(kept, Dataset) and len(kept) < len(raw):
            if not len(kept):
                raise ValueError(f"source:{source.name}: none of the {len(raw)} rows has a right trace")
            warn(
                f"source:{source.name}: {len(raw) - len(kept)} of {len(raw)} rows have no right trace and are left out."
            )
        raw = kept
    return raw.map(
        lambda row, code: _row(source.convert(row), traces), fn_kwargs=code, remove_columns=list(source.columns)
    )


def _row(example: Example, traces: int) -> dict[str, Any]:
    row: dict[str, Any] = {
        "prompt": [{"role": "user", "content": example.question}],
        "solution": example.solution,
    }
    if example.traces:
        row["completion"] = [{"role": "assistant", "content": example.traces[0]}]
        if traces > 1:
            row["expert"] = list(example.traces[:traces])
    return row

r"""
The one table of benchmarks: where the rows come from, how a question is put, and what grades the answer.

The revisions are those that public code pins for these datasets; `docs/evaluation.md` says what was checked. Questions are
put in the format of SimpleRL ("reason step by step ... within \boxed{}") and graded by the rewards that training uses.
"""

import base64
import io
import json
import pickle
import random
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any


Row = Mapping[str, Any]
Render = Callable[[Row, int, int], dict[str, Any]]

_LETTER = "{prompt}\n\nPlease reason step by step, and put the letter of your answer within \\boxed{}."
_PROGRAM = (
    "{prompt}\n\nPlease reason step by step, and end with one complete Python program in a ```python block. The "
    "program must import everything that it uses."
)


@dataclass(frozen=True)
class Benchmark:
    """
    A benchmark.

    Attributes:
        hub_id (`str`):
            Dataset on the hub.
        revision (`str`):
            Commit of the dataset.
        columns (`tuple[str, ...]`):
            Columns of the raw schema that `render` reads.
        render (`Callable`):
            From a raw row, its number and the seed to `question` and the columns that the grader reads.
        split (`str`, *optional*, defaults to `"test"`):
            Split, or several joined by "+".
        config (`str`, *optional*):
            Configuration name.
        data_file (`str`, *optional*):
            File in the dataset's repository, for one whose loading script `datasets` no longer runs.
        template (`str`, *optional*, defaults to `"boxed"`):
            Prompt template, as [`~trl_bridge.data.templates.find_template`] takes it.
        grader (`str`, *optional*, defaults to `"trl_bridge.rewards.math_reward"`):
            Dotted path of the reward function that grades.
        licence (`str`, *optional*):
            Licence of the rows; `None` where the dataset states none or it is not known for sure.
    """

    hub_id: str
    revision: str
    columns: tuple[str, ...]
    render: Render
    split: str = "test"
    config: str | None = None
    data_file: str | None = None
    template: str = "boxed"
    grader: str = "trl_bridge.rewards.math_reward"
    licence: str | None = None


def _columns(question: str, solution: str) -> Render:
    def render(row: Row, index: int, seed: int) -> dict[str, Any]:
        return {"question": row[question], "solution": str(row[solution])}

    return render


def _olympiadbench(row: Row, index: int, seed: int) -> dict[str, Any]:
    context = row.get("context")
    question = f"{context}\n\n{row['question']}" if context else row["question"]
    # A list; where a question asks for several values, they mostly stand in one string, with commas.
    return {"question": question, "solution": ", ".join(str(answer).strip() for answer in row["final_answer"])}


def _gpqa(row: Row, index: int, seed: int) -> dict[str, Any]:
    """The right answer comes first in the raw row, so the choices are shuffled, by the seed and the row's number."""
    right = row["Correct Answer"].strip()
    choices = [right, *(row[f"Incorrect Answer {number}"].strip() for number in (1, 2, 3))]
    order = list(range(4))
    random.Random(f"gpqa/{seed}/{index}").shuffle(order)
    lines = [f"{letter}) {choices[place]}" for letter, place in zip("ABCD", order, strict=True)]
    question = "\n".join([row["Question"].strip(), "", *lines])
    return {"question": question, "solution": "ABCD"[order.index(0)]}


class _StringUnpickler(pickle.Unpickler):
    """Reads plain values only: a pickle from the hub must not run code."""

    def find_class(self, module: str, name: str) -> Any:
        raise pickle.UnpicklingError(f"`private_test_cases` holds an object of {module}.{name}, not a string")


def _private_tests(encoded: str) -> list[dict[str, Any]]:
    """Private tests: JSON, or JSON in a pickle in zlib in base64."""
    if encoded.lstrip().startswith("["):
        return json.loads(encoded)
    return json.loads(_StringUnpickler(io.BytesIO(zlib.decompress(base64.b64decode(encoded)))).load())


def _livecodebench(row: Row, index: int, seed: int) -> dict[str, Any]:
    tests = json.loads(row["public_test_cases"]) + _private_tests(row["private_test_cases"])
    name = json.loads(row["metadata"] or "{}").get("func_name")
    if name:
        tests = [{**test, "testtype": "functional", "fn_name": name} for test in tests]
    question = row["question_content"].strip()
    if row["starter_code"]:
        question += f"\n\nStart from this code:\n```python\n{row['starter_code'].rstrip()}\n```"
    else:
        question += "\n\nRead the input from stdin and write the answer to stdout."
    return {"question": question, "tests": json.dumps(tests)}


BENCHMARKS: dict[str, Benchmark] = {
    "math500": Benchmark(
        hub_id="HuggingFaceH4/MATH-500",
        revision="6e4ed1a2a79af7d8630a6b768ec859cb5af4d3be",
        columns=("problem", "answer"),
        render=_columns("problem", "answer"),
    ),
    "minerva": Benchmark(
        hub_id="math-ai/minervamath",
        revision="ee46ddc498933b1977577953250ca5c66be64f96",
        columns=("question", "answer"),
        render=_columns("question", "answer"),
    ),
    "olympiadbench": Benchmark(
        hub_id="Hothan/OlympiadBench",
        revision="91184b52131e7fc9455fef848035173aea8cc01a",
        config="OE_TO_maths_en_COMP",
        split="train",
        columns=("question", "final_answer"),
        render=_olympiadbench,
        licence="Apache-2.0",
    ),
    "aime24": Benchmark(
        hub_id="HuggingFaceH4/aime_2024",
        revision="2fe88a2f1091d5048c0f36abc874fb997b3dd99a",
        split="train",
        columns=("problem", "answer"),
        render=_columns("problem", "answer"),
    ),
    "aime25": Benchmark(
        hub_id="math-ai/aime25",
        revision="563bb8404243c5f09de6ec262f2db674fe5bce9b",
        columns=("problem", "answer"),
        render=_columns("problem", "answer"),
    ),
    "amc23": Benchmark(
        hub_id="math-ai/amc23",
        revision="80815d37005feb82cd7f8fbc6901d5d3eff43057",
        columns=("question", "answer"),
        render=_columns("question", "answer"),
    ),
    "gpqa": Benchmark(
        hub_id="Idavidrein/gpqa",
        revision="83022cefff930aea54f654c0b282e74b9eeda5c6",
        config="gpqa_diamond",
        split="train",
        columns=("Question", "Correct Answer", "Incorrect Answer 1", "Incorrect Answer 2", "Incorrect Answer 3"),
        render=_gpqa,
        template=_LETTER,
        grader="trl_bridge.rewards.choice_reward",
        licence="CC-BY-4.0",
    ),
    "livecodebench": Benchmark(
        hub_id="livecodebench/code_generation_lite",
        revision="0fe84c3912ea0c4d4a78037083943e8f0c4dd505",
        data_file="test6.jsonl",
        columns=("question_content", "starter_code", "public_test_cases", "private_test_cases", "metadata"),
        render=_livecodebench,
        template=_PROGRAM,
        grader="trl_bridge.rewards.code_reward",
    ),
    "knights-knaves": Benchmark(
        hub_id="K-and-K/knights-and-knaves",
        revision="2f68547989981b1af37cb3dde5fdefa847aa8619",
        config="test",
        split="2ppl+3ppl+4ppl+5ppl+6ppl+7ppl+8ppl",
        columns=("quiz", "solution_text_format"),
        render=_columns("quiz", "solution_text_format"),
        template="knights-knaves",
        grader="trl_bridge.rewards.knights_knaves_reward",
    ),
}
"""Benchmarks by the name that `--benchmarks` takes."""

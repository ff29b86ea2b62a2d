"""Overlap of training questions with benchmarks, by shared runs of words."""

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple


_WORD = re.compile(r"\w+")
_QUESTIONS = ("prompt", "messages", "problem", "question", "quiz", "Problem", "Question")


class Overlap(NamedTuple):
    """A training row that shares a run of words with a benchmark."""

    row: int
    benchmark: str
    benchmark_row: int
    words: str


def question_text(row: Mapping[str, Any]) -> str:
    """Question of a row of any dataset."""
    for column in _QUESTIONS:
        value = row.get(column)
        if isinstance(value, str):
            return value
        if value:
            return "\n".join(str(message["content"]) for message in value if message["role"] == "user")
    if any(column in row for column in _QUESTIONS):
        return ""  # null in this row
    raise ValueError(f"no question under any of the names {', '.join(_QUESTIONS)}; there is: {', '.join(row)}")


def find_overlaps(questions: Iterable[str], benchmarks: Mapping[str, Iterable[str]], ngram: int = 13) -> list[Overlap]:
    """
    Training questions that share a run of `ngram` words with a benchmark's question.

    Words are runs of letters, digits and underscores, in lower case; everything else separates. A benchmark's question of
    fewer words overlaps with the very same question only, punctuation and operators included.
    """
    if ngram < 1:
        raise ValueError(f"`ngram` must be at least 1, got {ngram}")
    runs: dict[str, dict[str, int]] = {}
    for name, texts in benchmarks.items():
        runs[name] = {}
        for row, text in enumerate(texts):
            for run in _runs(text, ngram) or [_whole(text)]:
                runs[name].setdefault(run, row)
    overlaps = []
    for row, question in enumerate(questions):
        own = [_whole(question), *_runs(question, ngram)]
        for name, known in runs.items():
            shared = next((run for run in own if run in known), None)
            if shared is not None:
                overlaps.append(Overlap(row, name, known[shared], shared))
    return overlaps


def _runs(text: str, ngram: int) -> Sequence[str]:
    words = _WORD.findall(text.lower())
    return [" ".join(words[start : start + ngram]) for start in range(len(words) - ngram + 1)]


def _whole(text: str) -> str:
    return " ".join(text.lower().split())

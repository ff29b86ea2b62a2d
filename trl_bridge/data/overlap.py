"""Overlap of training questions with benchmarks, by shared runs of words."""

import re
import unicodedata
from bisect import bisect_left
from collections.abc import Iterable, Mapping, Sequence
from itertools import accumulate
from typing import Any, NamedTuple


# Letters of scripts that put no blanks between words: Han and the two kana, and (about two of them for one of those) Thai,
# Lao, Burmese and Khmer with their marks. There each character is a word of its own.
_DENSE = "\u3005-\u3007\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"
_LIGHT = "\u0e01-\u0e4e\u0e81-\u0ece\u1000-\u109f\u1780-\u17dd"
_WORD = re.compile(rf"[{_LIGHT}]|[{_DENSE}]|[^\W{_DENSE}{_LIGHT}]+")
_IS_LIGHT = re.compile(f"[{_LIGHT}]")
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

    Words are runs of letters, digits and underscores, in lower case; everything else separates. Where a script has no blanks
    between words, a character counts as one (Chinese, Japanese) or as half of one (Thai, Lao, Burmese, Khmer). A benchmark's
    question of fewer words overlaps with the very same question only, punctuation and operators included.
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
    words = _WORD.findall(unicodedata.normalize("NFKC", text).lower())
    # Twice the words before each place.
    before = list(accumulate((1 if _IS_LIGHT.match(word) else 2 for word in words), initial=0))
    runs = []
    for start in range(len(words)):
        end = bisect_left(before, before[start] + 2 * ngram)
        if end <= len(words):
            runs.append(" ".join(words[start:end]))
    return runs


def _whole(text: str) -> str:
    return " ".join(text.lower().split())

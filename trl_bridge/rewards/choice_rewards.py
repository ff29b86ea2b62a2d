"""Reward for multiple choice."""

import re
from collections.abc import Sequence
from typing import Any

from .answers import final_answer
from .completions import Completion, LogExtra, LogMetric, check_lengths, log_answers, visible_text
from .mathematics.surface import clean


_LETTER = re.compile(
    r"(?:option|choice|answer)?\s*[(\[]?\s*(?:\\text\s*\{\s*)?[(\[]?\s*([A-Za-z])\s*[)\]]?\s*\}?\s*[)\]]?\s*(?:[.:]?\s*|[.:)]\s+\S.*|\s*[-–]\s+\S.*)",
    re.IGNORECASE | re.DOTALL,
)
_LETTER_FIRST = re.compile(r"[(\[]?\s*(?:\\text\s*\{\s*)?[(\[]?\s*([A-Z])\s*[)\]]\s*\}?\s*\S.*", re.DOTALL)
_SECOND = re.compile(r"(?:\b(?:or|and)\b|[,/&])\s*(?:\\text\s*\{)?\(?\s*[A-Z]\b\s*\)?\s*\}?\s*$")


def choice_letter(answer: str | None) -> str | None:
    """Upper-case letter of an answer such as `B`, `(B)`, `B.`, `\\text{(B)}`, `(B) 12 J` or `option b`."""
    text = clean(re.sub(r"\*\*", "", answer)) if answer else None
    if not text or _SECOND.search(text):
        return None
    match = _LETTER.fullmatch(text) or _LETTER_FIRST.fullmatch(text)
    return match[1].upper() if match else None


def choice_reward(
    completions: Sequence[Completion],
    solution: Sequence[Any],
    log_extra: LogExtra | None = None,
    log_metric: LogMetric | None = None,
    **kwargs: Any,
) -> list[float | None]:
    r"""
    Reward 1.0 where the chosen letter (the last `\boxed{}`, without one the last "the answer is ...") is the gold one.

    Args:
        completions (`list[str]` or `list[list[dict]]`):
            Completions, standard or conversational; the text after a think block counts.
        solution (`list[str]`):
            Gold letters, as in GPQA (`"B"`, `"(B)"`).
        log_extra (`callable`, *optional*):
            Given by the trainer; gets the columns `solution` and `answer`.
        log_metric (`callable`, *optional*):
            Given by the trainer; gets `choice_reward/no_answer_fraction`.
        **kwargs:
            Other columns of the dataset, ignored.

    Returns:
        `list[float | None]`:
            One reward per completion, `None` where the gold is no letter.

    Raises:
        `ValueError`:
            If `solution` does not have one value per completion.
    """
    check_lengths(completions, solution, "solution")
    golds = [choice_letter(None if gold is None else str(gold)) for gold in solution]
    answers = [choice_letter(final_answer(visible_text(completion), "phrase")) for completion in completions]
    log_answers(log_extra, golds, answers)
    if log_metric is not None:
        log_metric("choice_reward/no_answer_fraction", sum(a is None for a in answers) / max(1, len(answers)))
    return [None if gold is None else float(gold == a) for gold, a in zip(golds, answers, strict=True)]

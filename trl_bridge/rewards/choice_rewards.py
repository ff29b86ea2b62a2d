"""Reward for multiple choice."""

import re
from collections.abc import Sequence
from typing import Any

from .answers import after_phrase, final_answer
from .completions import (
    Completion,
    LogExtra,
    LogMetric,
    cannot_judge,
    check_lengths,
    gold_text,
    log_answers,
    visible_text,
)
from .mathematics.surface import clean


_LETTER = re.compile(
    r"(?:option|choice|answer)?\s*[(\[]?\s*(?:\\text\s*\{\s*)?[(\[]?\s*([A-Za-z])\s*[)\]]?\s*\}?\s*[)\]]?\s*(?:[.:]?\s*|[.:)]\s+\S.*|\s*[-–]\s+\S.*)",
    re.IGNORECASE | re.DOTALL,
)
_LETTER_FIRST = re.compile(r"[(\[]?\s*(?:\\text\s*\{\s*)?[(\[]?\s*([A-Z])\s*[)\]]\s*\}?\s*\S.*", re.DOTALL)
_SEVERAL = re.compile(
    r"^\W*([A-Z])\b\W*(?:or|and|,|/|&)\s*(?:\\text\s*\{)?\(?\s*([A-Z])\b|(?:\b(?:or|and)\b|[,/&])\s*(?:\\text\s*\{)?\(?\s*[A-Z]\b\s*\)?\s*\}?\s*$"
)
_BRACKETED = re.compile(r"\(\s*([A-Z])\s*\)")
_VERDICT = re.compile(
    r"\(?\b([A-Z])\b\)?\s*+(?:is|are|=|:)\s*+(?:the\s++|an?\s++)?(not\s++)?(?:the\s++)?(right|correct|true|wrong|incorrect|false)\b",
    re.IGNORECASE,
)
_TOGETHER = re.compile(r"\b[A-Z]\b\)?\s*(?:and|or|,)\s*\(?[A-Z]\b\)?\s+(?:is|are)\b")
_REASON = re.compile(r",?\s(?:because|since|due|given)\s", re.IGNORECASE)
_PHRASE = re.compile(r"\b(?:option|choice|alternative)\b\s*+(?:is|are|:|=)\s*+(?:\*\*|__)?\s*+:?", re.IGNORECASE)
# "Option B is correct", where nothing is called the answer.
_CALLED = re.compile(rf"\b(?:option|choice|alternative)\b\s*+{_VERDICT.pattern}", re.IGNORECASE)
_DENIED = re.compile(
    r",?\s(?:and\s)?not\s(?:(?:option|choice)\s)?\(?[A-Z]\b\)?(?:\s?(?:,|or|and|nor)\s\(?[A-Z]\b\)?)*+(?:,?\sbut\b)?"
)
_LETTERS = re.compile(r"(?:\\text\s*\{)?\s*\(?[A-J]\)?(?:\s*(?:,\s*and|,|and|&|/|;)?\s*\(?[A-J]\)?)+\s*\}?")
_LIMIT = 400


def choice_letter(answer: str | None) -> str | None:
    """
    Upper-case letter of an answer such as `B`, `(B)`, `B.`, `\\text{(B)}`, `(B) 12 J`, `option b`, `B because ...`.

    Of several letters the one that is called right; `None` where none or more than one is.
    """
    answer = _REASON.split((answer or "")[:_LIMIT], maxsplit=1)[0]
    answer = _DENIED.sub("", f" {answer}").strip(" ,")
    text = clean(answer.replace("**", "")) if answer else None
    if not text:
        return None
    if _TOGETHER.search(text):
        return None
    if verdicts := _VERDICT.findall(text):
        right = {
            letter.upper()
            for letter, no, word in verdicts
            if bool(no) == (word.lower() in ("wrong", "incorrect", "false"))
        }
        return right.pop() if len(right) == 1 else None
    if _SEVERAL.search(text) or len(set(_BRACKETED.findall(text))) > 1:
        return None
    match = _LETTER.fullmatch(text) or _LETTER_FIRST.fullmatch(text)
    return match[1].upper() if match else None


def labels(value: Any, choices: Any = None) -> frozenset[str] | None:
    """
    Labels that a gold names: one letter or several (`"AC"`, `["A", "C"]`), a digit, a word; `None` for none.

    An integer beside the row's `choices` is their index from 0, a `ClassLabel` as datasets stores it.
    """
    if isinstance(value, (list, tuple)) and len(value) > 1:
        parts = [labels(part, choices) for part in value]
        return None if None in parts else frozenset().union(*parts)  # type: ignore[arg-type]
    text = gold_text(value)
    if text is None or not text.strip():
        return None
    if isinstance(value, int) and isinstance(choices, (list, tuple)) and 0 <= value < min(len(choices), 26):
        return frozenset(chr(ord("A") + value))
    return _named(text)


def _named(text: str | None) -> frozenset[str] | None:
    stated = (text or "").replace("**", "").strip().strip(".$ ")[:_LIMIT]
    if (letter := choice_letter(stated)) is not None:
        return frozenset(letter)
    if _LETTERS.fullmatch(stated):
        found = re.findall("[A-J]", re.sub(r"\\text|and", "", stated))
        return frozenset(found) if len(set(found)) == len(found) else None
    bare = re.sub(r"\\text\s*\{([^{}]*)\}", r"\1", stated).strip(" ()[].").lower()
    return frozenset([bare]) if re.fullmatch(r"\d|[^\W\d_][\w '-]*", bare) else None


def _stated(text: str | None) -> str | None:
    """The answer's own words: a box, what follows "the answer is" or "the correct option is", or "option B is correct"."""
    answer = final_answer(text, "phrase")
    if answer is None and text is not None and r"\boxed" not in text:
        called = [match.group() for match in _CALLED.finditer(text.replace("**", ""))]
        answer = after_phrase(text, _PHRASE) or ". ".join(called[-5:]) or None
    return answer


def choice_reward(
    completions: Sequence[Completion],
    solution: Sequence[Any],
    choices: Sequence[Any] | None = None,
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
            Gold letters, as in GPQA (`"B"`, `"(B)"`); several (`"AC"`), which the answer must all name; digits (ARC's `"1"`)
            and words (`"entailment"`), which the answer gives as they stand.
        choices (`list[list]`, *optional*):
            Choices of each row. With them an integer gold is their index from 0, answered by a letter.
        log_extra (`callable`, *optional*):
            Given by the trainer; gets the columns `solution` and `answer`.
        log_metric (`callable`, *optional*):
            Given by the trainer; gets `choice_reward/no_answer_fraction`.
        **kwargs:
            Other columns of the dataset, ignored.

    Returns:
        `list[float | None]`:
            One reward per completion, `None` where the gold names no choice.

    Raises:
        `ValueError`:
            If `solution` does not have one value per completion.
    """
    check_lengths(completions, solution, "solution")
    golds = [labels(gold, choices[row] if choices is not None else None) for row, gold in enumerate(solution)]
    for row, gold in enumerate(golds):
        if gold is None:
            cannot_judge("choice_reward", "solution", row, solution[row], "names no choice")
    stated = [_stated(visible_text(completion)) for completion in completions]
    answers = [_named(answer) for answer in stated]
    shown = ([None if v is None else ", ".join(sorted(v)) for v in values] for values in (golds, answers))
    log_answers(log_extra, next(shown), next(shown))
    if log_metric is not None:
        log_metric("choice_reward/no_answer_fraction", sum(a is None for a in answers) / max(1, len(answers)))
    return [None if gold is None else float(gold == a) for gold, a in zip(golds, answers, strict=True)]

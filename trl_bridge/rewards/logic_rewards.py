"""Reward for puzzles about knights and knaves."""

import re
from collections.abc import Mapping, Sequence
from typing import Any

from .answers import last_box, phrase_answer
from .completions import (
    Completion,
    LogExtra,
    LogMetric,
    cannot_judge,
    check_lengths,
    last_tagged,
    log_answers,
    read_json,
    visible_text,
)


_HEADING = re.compile(r"(?:final answer|conclusion|answer)\W{0,6}(?:is)? ?:?\W{0,4}\n(.*)", re.IGNORECASE | re.DOTALL)
# A name, and the first word said of it; what is said after "or" takes it back.
_CLAIM = re.compile(
    r"(?<![\w'-])([A-Z][\w'-]{0,60}) ?(?:is|:|=|->|→) ?(not )?(either )?(?:an? )?([a-z]+)(?:(?= ?(?:or|/) ?(?:an? )?([a-z]+)(?! ?(?:is|:|=)))|)",
    re.IGNORECASE,
)
# Said under a condition, or taken back; and subjects that are nobody.
_CONDITION = re.compile(
    r"\b(?:either|neither|unless|impossible|contradiction|vice versa|not true|the reverse)\b|\bif\b.*\bthen\b",
    re.IGNORECASE,
)
_NO_NAMES = {"this", "that", "it", "which", "there", "answer", "solution", "everything", "conclusion"}
_MARKUP = re.compile(r"\\text\s*+\{([^{}]*+)\}|\*\*|__|[{}$\\]")


def assignment(text: str | None) -> dict[str, str] | None:
    """Roles by name, both in lower case, of a text such as "Zoey is a knight, and Riley is a knave"."""
    plain = re.sub(r"\s+", " ", _MARKUP.sub(lambda m: m.group(1) or " ", _told(text or "")))
    roles: dict[str, str] = {}
    if _CONDITION.search(plain):
        return None
    for name, negation, either, role, other in _CLAIM.findall(plain):
        hedged = either or (other and other.lower() != role.lower())
        if name.lower() in _NO_NAMES:
            continue
        if negation or hedged or roles.setdefault(name.lower(), role.lower()) != role.lower():
            return None
    return roles or None


def _told(text: str) -> str:
    """A text with the rows of its tables as sentences: `| Zoey | knight | ... |` is "Zoey is knight."."""
    lines = text.split("\n")
    for index, line in enumerate(lines):
        cells = [cell.strip(" *") for cell in line.split("|")]
        if not cells[0] and len(cells) > 3 and cells[1]:
            ruled = index + 1 < len(lines) and set(lines[index + 1]) <= set("|:- ") and "-" in lines[index + 1]
            lines[index] = "" if ruled or not cells[1].strip("-: ") else f"{cells[1]} is {cells[2]}."
    return "\n".join(lines)


def _gold(solution: Any) -> dict[str, str] | None:
    if isinstance(solution, str) and solution.lstrip().startswith("{"):
        solution = read_json(solution)
    if isinstance(solution, Mapping):
        return {str(name).lower(): str(role).lower() for name, role in solution.items() if role is not None} or None
    return assignment(solution) if isinstance(solution, str) else None


def _stated(text: str | None) -> str | None:
    if text is None:
        return None
    if r"\boxed" in text:
        return last_box(text)
    if (tagged := last_tagged(text, "answer")) is not None:
        return tagged
    text = re.sub(r" ?\n[ \n]*", "\n", re.sub(r"[^\S\n]+", " ", text))
    if heading := _HEADING.search(text):
        return heading[1]
    return phrase_answer(text) or text


def knights_knaves_reward(
    completions: Sequence[Completion],
    solution: Sequence[Any],
    log_extra: LogExtra | None = None,
    log_metric: LogMetric | None = None,
    **kwargs: Any,
) -> list[float | None]:
    r"""
    Reward 1.0 where the completion gives every person the right role, in any order, and nobody two of them.

    The answer is the last `\boxed{}`, else the last `<answer>`, else what follows "final answer" or "conclusion", else
    the whole visible text (where a role weighed and rejected on the way makes it contradictory, hence 0).

    Args:
        completions (`list[str]` or `list[list[dict]]`):
            Completions, standard or conversational.
        solution (`list[str]` or `list[dict]`):
            Gold roles: "Zoey is a knight, and Riley is a knave", or a mapping (or its JSON) from name to role. Any role
            words do.
        log_extra (`callable`, *optional*):
            Given by the trainer; gets the columns `solution` and `answer`.
        log_metric (`callable`, *optional*):
            Given by the trainer; gets `knights_knaves_reward/complete_fraction`.
        **kwargs:
            Other columns of the dataset, ignored.

    Returns:
        `list[float | None]`:
            One reward per completion, `None` where the gold holds no assignment.

    Raises:
        `ValueError`:
            If `solution` does not have one value per completion.
    """
    check_lengths(completions, solution, "solution")
    golds = [_gold(gold) for gold in solution]
    for row, gold in enumerate(golds):
        if gold is None:
            cannot_judge("knights_knaves_reward", "solution", row, solution[row], "holds no assignment of roles")
    answers = [assignment(_stated(visible_text(completion))) for completion in completions]
    log_answers(log_extra, golds, answers)
    if log_metric is not None:
        complete = [bool(g and a and set(g) == set(a)) for g, a in zip(golds, answers, strict=True)]
        log_metric("knights_knaves_reward/complete_fraction", sum(complete) / max(1, len(complete)))
    return [None if gold is None else float(gold == answer) for gold, answer in zip(golds, answers, strict=True)]

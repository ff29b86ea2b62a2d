"""Rewards for answers that are one integer, as in the demo and the smoke recipes."""

import re
from typing import Any

from .completions import Completion, cannot_judge, gold_text, message_text


_INTEGER = re.compile(r"-?\d+")


def _value(digits: str) -> int:
    """An integer, of its first 300 digits where it has more: Python refuses to read thousands, and takes long to."""
    return int(digits[:300])


def answer_reward(completions: list[Completion], solution: list[str], **kwargs: Any) -> list[float | None]:
    """
    1 where the completion is the solution, apart from surrounding blanks, and 0 elsewhere.

    Args:
        completions (`list[str]` or `list[list[dict[str, str]]]`):
            Completions, standard or conversational.
        solution (`list[str]`):
            Expected completion of each.

    Returns:
        `list[float | None]`: one reward for each completion, `None` where the solution is missing.
    """
    golds = [gold_text(value) for value in solution]
    for row, gold in enumerate(golds):
        if gold is None:
            cannot_judge("answer_reward", "solution", row, solution[row], "is no text")
    return [
        None if gold is None else float(message_text(completion).strip() == gold.strip())
        for completion, gold in zip(completions, golds, strict=True)
    ]


def closeness_reward(completions: list[Completion], solution: list[str], **kwargs: Any) -> list[float | None]:
    """
    `1 / (1 + |answer - solution|)` for the first integer of the completion, and 0 where there is none.

    A shaped reward: even a random model is paid more for some answers than for others, so a test run has a gradient.

    Args:
        completions (`list[str]` or `list[list[dict[str, str]]]`):
            Completions, standard or conversational.
        solution (`list[str]`):
            An integer for each.

    Returns:
        `list[float | None]`: one reward in [0, 1] for each completion, `None` where the solution is no integer.
    """
    rewards: list[float | None] = []
    for row, (completion, value) in enumerate(zip(completions, solution, strict=True)):
        gold = _INTEGER.fullmatch((gold_text(value) or "").strip())
        if gold is None:
            cannot_judge("closeness_reward", "solution", row, value, "is no integer")
            rewards.append(None)
            continue
        found = _INTEGER.search(message_text(completion))
        rewards.append(0.0 if found is None else 1.0 / (1.0 + abs(_value(found.group()) - _value(gold.group()))))
    return rewards

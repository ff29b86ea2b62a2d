"""Rewards for answers that are one integer, as in the demo and the smoke recipes."""

import re
from typing import Any

from .completions import Completion, message_text


_INTEGER = re.compile(r"-?\d+")


def answer_reward(completions: list[Completion], solution: list[str], **kwargs: Any) -> list[float | None]:
    """
    1 where the completion is the solution, apart from surrounding blanks, and 0 elsewhere.

    Args:
        completions (`list[str]` or `list[list[dict[str, str]]]`):
            Completions, standard or conversational.
        solution (`list[str]`):
            Expected completion of each.

    Returns:
        `list[float]`: one reward for each completion.
    """
    return [
        float(message_text(completion).strip() == gold.strip())
        for completion, gold in zip(completions, solution, strict=True)
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
        `list[float]`: one reward in [0, 1] for each completion.
    """
    rewards: list[float | None] = []
    for completion, gold in zip(completions, solution, strict=True):
        found = _INTEGER.search(message_text(completion))
        rewards.append(0.0 if found is None else 1.0 / (1.0 + abs(int(found.group()) - int(gold))))
    return rewards

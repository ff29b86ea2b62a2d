"""Rewards for answers that are one integer, as in the demo and the smoke recipes."""

import re
from typing import Any


__all__ = ["answer_reward", "closeness_reward"]

_INTEGER = re.compile(r"-?\d+")


def answer_reward(completions: list[Any], solution: list[str], **kwargs: Any) -> list[float | None]:
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
        float(completion_text(completion).strip() == gold.strip())
        for completion, gold in zip(completions, solution, strict=True)
    ]


def closeness_reward(completions: list[Any], solution: list[str], **kwargs: Any) -> list[float | None]:
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
        found = _INTEGER.search(completion_text(completion))
        rewards.append(0.0 if found is None else 1.0 / (1.0 + abs(int(found.group()) - int(gold))))
    return rewards


def completion_text(completion: Any) -> str:
    """
    Text of a completion as TRL hands it to a reward function.

    Args:
        completion (`str` or `list[dict[str, str]]`):
            A string, or messages, of which the last one counts.

    Returns:
        `str`: the text.
    """
    return completion if isinstance(completion, str) else completion[-1]["content"] or ""

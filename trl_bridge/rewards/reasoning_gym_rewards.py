"""Reward of reasoning-gym tasks: the task's own scorer."""

import functools
import json
import re
from collections.abc import Callable
from typing import Any

from .completions import LogMetric, visible_text


_TAGGED = re.compile(r"<answer>(.*?)</answer>", re.DOTALL)
_PHRASE = re.compile(r"(?:answer is|answer:|####)\s*(.+)", re.IGNORECASE)
_NUMBER = re.compile(r"-?\d[\d,]*(?:\.\d+)?")


def reasoning_gym_reward(
    completions: list[Any],
    solution: list[str],
    metadata: list[str],
    log_extra: Callable[[str, list[Any]], None] | None = None,
    log_metric: LogMetric | None = None,
    **kwargs: Any,
) -> list[float | None]:
    """
    Score of the extracted answer (see [`extract_answer`]) under the task's own scorer.

    Args:
        completions (`list[str]` or `list[list[dict[str, str]]]`):
            Completions, standard or conversational.
        solution (`list[str]`):
            The generator's answer to each.
        metadata (`list[str]`):
            The generator's metadata of each, as JSON; `source_dataset` names the task.
        log_extra (`Callable`, *optional*):
            TRL's hook for columns of the completions table; gets the extracted answers and the golds.
        log_metric (`Callable`, *optional*):
            TRL's hook for metrics; gets `reasoning_gym_reward/no_answer_fraction`.

    Returns:
        `list[float]`: one score in [0, 1] for each completion; 0 where no answer is found.
    """
    answers = [
        extract_answer(visible_text(completion) or "", gold)
        for completion, gold in zip(completions, solution, strict=True)
    ]
    if log_extra is not None:
        log_extra("answer", answers)
        log_extra("solution", list(solution))
    if log_metric is not None:
        log_metric("reasoning_gym_reward/no_answer_fraction", sum(a is None for a in answers) / max(1, len(answers)))
    rewards: list[float | None] = []
    for answer, gold, facts in zip(answers, solution, metadata, strict=True):
        entry = {"answer": gold, "metadata": json.loads(facts)}
        score = _scorer(entry["metadata"]["source_dataset"])
        rewards.append(0.0 if answer is None else float(score(answer, entry)))
    return rewards


def extract_answer(text: str, gold: str) -> str | None:
    """
    The answer that a completion states: the last `<answer>` tag, else what follows the last "answer is", "answer:" or
    "####" on its line, else the last line. Where the gold is a number, the last number in there.
    """
    lines = [line for line in text.splitlines() if line.strip()]
    candidates = _TAGGED.findall(text) or _PHRASE.findall(text) or lines
    if not candidates:
        return None
    answer = candidates[-1].strip()
    if _NUMBER.fullmatch(gold.strip()) is None:
        return answer.rstrip(".") or None
    numbers = _NUMBER.findall(answer)
    return numbers[-1].replace(",", "") if numbers else None


@functools.cache
def _scorer(task: str) -> Callable[[str, dict[str, Any]], float]:
    # Imported on use: reasoning-gym is an extra, and takes a second.
    import reasoning_gym

    return reasoning_gym.get_score_answer_fn(task)

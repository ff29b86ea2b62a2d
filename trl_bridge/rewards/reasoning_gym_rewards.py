"""Reward of reasoning-gym tasks: the task's own scorer."""

import functools
import re
from collections.abc import Callable, Mapping
from typing import Any

from .completions import LogMetric, cannot_judge, gold_text, last_tagged, read_json, visible_text


_PHRASE = re.compile(r"(?:answer is|answer:|####)\s*+(.+)", re.IGNORECASE)
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
        `list[float | None]`: one score in [0, 1] for each completion; 0 where no answer is found, or where the task's scorer
        cannot read it; `None` where the metadata are broken or name no task.
    """
    answers = [
        extract_answer(visible_text(completion) or "", gold_text(gold) or "")
        for completion, gold in zip(completions, solution, strict=True)
    ]
    if log_extra is not None:
        log_extra("answer", answers)
        log_extra("solution", list(solution))
    if log_metric is not None:
        log_metric("reasoning_gym_reward/no_answer_fraction", sum(a is None for a in answers) / max(1, len(answers)))
    rewards: list[float | None] = []
    for row, (answer, gold, value) in enumerate(zip(answers, solution, metadata, strict=True)):
        facts = read_json(value)
        if not isinstance(facts, Mapping) or not isinstance(facts.get("source_dataset"), str):
            cannot_judge("reasoning_gym_reward", "metadata", row, value, "names no task (`source_dataset`)")
            rewards.append(None)
            continue
        score = _scorer(facts["source_dataset"])
        # A task that has no one answer (a puzzle with many solutions) leaves the gold empty: its scorer needs none.
        entry = {"answer": gold, "metadata": _tuples(facts) if facts["source_dataset"] in _OF_TUPLES else facts}
        rewards.append(0.0 if answer is None else _score(score, answer, entry))
    return rewards


# Their scorers compare boards with `==`, and a board of JSON's lists is none of tuples.
_OF_TUPLES = ("arc_agi", "rearc")


def _tuples(value: Any) -> Any:
    if isinstance(value, list):
        return tuple(map(_tuples, value))
    return {key: _tuples(item) for key, item in value.items()} if isinstance(value, dict) else value


def _score(scorer: Callable[[str, dict[str, Any]], float], answer: str, entry: dict[str, Any]) -> float:
    """A task's score; 0 for text that its scorer raises on, since it is written for answers of its own form."""
    try:
        return float(scorer(answer, entry))
    except Exception:  # scorers parse the answer with eval, int and the like, and raise what those raise
        return 0.0


def extract_answer(text: str, gold: str) -> str | None:
    """
    The answer that a completion states: the last `<answer>` tag, else what follows the last "answer is", "answer:" or
    "####" on its line, else the last line. Where the gold is a number, the last number in there.
    """
    lines = [line for line in text.splitlines() if line.strip()]
    tagged = last_tagged(text, "answer")
    candidates = _PHRASE.findall(text) or lines if tagged is None else [tagged]
    if not candidates:
        return None
    answer = candidates[-1].strip()
    if _NUMBER.fullmatch(gold.strip()) is None:
        # A sentence keeps its full stop.
        return (answer if gold.rstrip().endswith(".") else answer.rstrip(".")) or None
    numbers = _NUMBER.findall(answer)
    return numbers[-1].replace(",", "") if numbers else None


def _same_truth(answer: str, entry: dict[str, Any]) -> float:
    return float(answer.strip().lower() == str(entry["answer"]).lower())


def _formula(answer: str, entry: dict[str, Any]) -> float:
    words = re.findall(r"\w+", answer)
    known = entry["metadata"]["variables"]
    return _tasks_scorer("propositional_logic")(answer, entry) if words and all(w in known for w in words) else 0.0


# Their own scorers pay any text: the one takes every text for true, the other for a statement that is always so.
_OWN = {"game_of_life_halting": _same_truth, "propositional_logic": _formula}


@functools.cache
def _scorer(task: str) -> Callable[[str, dict[str, Any]], float]:
    return _OWN.get(task) or _tasks_scorer(task)


def _tasks_scorer(task: str) -> Callable[[str, dict[str, Any]], float]:
    # Imported on use: reasoning-gym is an extra, and takes a second.
    import reasoning_gym

    return reasoning_gym.get_score_answer_fn(task)

"""Grading with the rewards that training uses."""

from collections.abc import Sequence
from typing import Any, NamedTuple

from ..rewards.code_rewards import CodeExecutionRefused
from .tasks import Task


__all__ = ["Grade", "check_grader", "grade"]

# What rewards write to TRL's table of completions where they found no answer.
_NO_ANSWER = ("[none]", None)


class Grade(NamedTuple):
    """
    What the grader says about one completion.

    Attributes:
        score (`float`, *optional*):
            Reward; `None` where the row cannot be judged.
        answer (`str`, *optional*):
            Extracted answer, `None` where there is none or the grader does not say.
        answered (`bool`, *optional*):
            Whether an answer was found; `None` where the grader does not say.
        stopped (`bool`):
            Whether the comparison was stopped by a limit of time or memory.
    """

    score: float | None
    answer: str | None
    answered: bool | None
    stopped: bool


def grade(task: Task, questions: Sequence[int], texts: Sequence[str]) -> list[Grade]:
    """
    Grade completions.

    Args:
        task ([`Task`]):
            The task.
        questions (`Sequence[int]`):
            Number of the question of each completion.
        texts (`Sequence[str]`):
            The completions.

    Returns:
        `list[Grade]`: one grade per completion.
    """
    grades, stopped = _call(task, questions, texts)
    if stopped and len(texts) > 1:
        # A batch has one limit of time, and one answer may use it up. One by one each has its own, and the verdict does
        # not depend on the neighbours.
        return [_call(task, [question], [text])[0][0] for question, text in zip(questions, texts, strict=True)]
    return grades


def _call(task: Task, questions: Sequence[int], texts: Sequence[str]) -> tuple[list[Grade], bool]:
    rows = [task.rows[question] for question in questions]
    extra: dict[str, list[Any]] = {}
    metrics: dict[str, float] = {}
    columns = {key: [row[key] for row in rows] for key in rows[0]}
    prompts = columns.pop("prompt")
    completions = [
        text if isinstance(prompt, str) else [{"role": "assistant", "content": text}]
        for prompt, text in zip(prompts, texts, strict=True)
    ]
    scores = task.grader(
        prompts=prompts,
        completions=completions,
        **columns,
        log_extra=extra.__setitem__,
        log_metric=metrics.__setitem__,
    )
    stopped = any(value > 0 for name, value in metrics.items() if name.endswith("/timeouts"))
    answers = extra.get("answer")
    grades = []
    for place, score in enumerate(scores):
        answer = None if answers is None or answers[place] in _NO_ANSWER else str(answers[place])
        answered = None if answers is None else answers[place] not in _NO_ANSWER
        grades.append(Grade(None if score is None else float(score), answer, answered, stopped))
    if len(grades) != len(texts):
        raise ValueError(f"`grader`: {task.grader_name} gave {len(grades)} scores for {len(texts)} completions.")
    return grades, stopped


def check_grader(task: Task) -> None:
    """
    Grade an empty completion, so that a column or a permission that the grader lacks is seen before any generation.

    Args:
        task ([`Task`]):
            The task.

    Raises:
        ValueError: the grader cannot grade the task's rows.
    """
    try:
        _call(task, [0], [""])
    except CodeExecutionRefused as error:
        raise ValueError(f"`benchmarks: {task.name}`: {error}") from error
    except TypeError as error:
        columns = ", ".join(task.rows[0])
        raise ValueError(
            f"`grader`: {task.grader_name} does not take the rows of {task.name} ({columns}): {error}"
        ) from error

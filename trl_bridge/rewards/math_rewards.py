"""Rewards for mathematics: the value of the last box against the gold, and whether there is a box at all."""

import logging
import re
from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

from .answers import Fallback, final_answer, gold_answer, last_box
from .completions import (
    REASONING_BLOCKS,
    Blocks,
    Completion,
    LogExtra,
    LogMetric,
    cannot_judge,
    check_lengths,
    gold_text,
    log_answers,
    visible_text,
    warn_once,
)
from .mathematics.equality import Verdict, quick
from .mathematics.numbers import exact
from .mathematics.surface import clean
from .mathematics.units import split_unit
from .mathematics.workers import Outcome, shared_pool


logger = logging.getLogger(__name__)


class _Cache:
    """Verdicts of workers, least recently used out first. Timeouts are not verdicts and are not kept."""

    def __init__(self, size: int):
        self.size = size
        self.values: OrderedDict[tuple[str, ...], bool] = OrderedDict()

    def get(self, job: tuple[str, ...]) -> bool | None:
        return self.values.get(job)

    def put(self, job: tuple[str, ...], verdict: bool) -> None:
        self.values[job] = verdict
        if len(self.values) > self.size:
            self.values.popitem(last=False)


_cache = _Cache(100_000)
# What an answer may still have to be worked out for: products, sums, powers, factorials, and signs of summation.
_OPERATION = re.compile(
    r"\\(?:times|cdot|div|sum|prod|int|lim|[td]?binom|gcd|max|min|lfloor|lceil|log|ln|sin|cos|tan|det)(?![a-zA-Z])"
    r"|(?<=[\w})\]!])\s*[+*!^-]|(?<=\w)/(?=\w*[!^])|(?<=[\d)])\s*\((?=\d)"
)
_NOT_JUDGED = {"deadline": "an answer could not be judged in the batch's time", "killed": "a worker was killed twice"}
_NO_GOLDS = {"proof", "notfound", "not found", "see solution", "n/a", "nan"}


def is_plain(gold: str) -> bool:
    """Whether a gold can be judged without asking a worker if it parses: a number, or words."""
    cleaned = clean(gold)
    if not cleaned:
        return False
    return exact(split_unit(cleaned)[0]) is not None or cleaned.replace(" ", "").isalpha()


def may_be_gold(text: str) -> bool:
    """Whether a text may be a gold at all: no placeholder, and no backslash that JSON has eaten (`\\f` + `rac`)."""
    return text.strip().lower() not in _NO_GOLDS and not re.search(
        r"[\x07\x08\x0b\x0c]|\t(?:ext|imes|heta|an)\b|\r(?:ight|ho)\b", text
    )


def is_evaluated(answer: str, gold: str) -> bool:
    """Whether an answer leaves no operation to be done that the gold does not have as well."""
    answer, gold = (split_unit(clean(text) or "")[0] for text in (answer, gold))
    left, allowed = ({found.strip() for found in _OPERATION.findall(text)} for text in (answer, gold))
    return exact(answer) is not None or left <= allowed


def same_batch(
    pairs: Sequence[tuple[str, str]], limit: float, seconds: float, memory_gb: float, golds: Sequence[str] = ()
) -> tuple[list[Outcome], dict[str, Outcome], int]:
    """Compare many pairs, in process where that decides, the rest in workers."""
    verdicts: list[Verdict] = [quick(first, second) for first, second in pairs]
    jobs: dict[tuple[str, ...], Outcome | None] = {}
    for (first, second), verdict in zip(pairs, verdicts, strict=True):
        if verdict is None:
            job = ("same", *sorted((first, second)))
            jobs[job] = _cache.get(job)
    for gold in golds:
        jobs["gold", gold] = True if is_plain(gold) else _cache.get(("gold", gold))
    # Golds first: without them the answers' verdicts are worth nothing.
    todo = sorted((job for job, outcome in jobs.items() if outcome is None), key=lambda job: job[0] != "gold")
    if todo:
        for job, outcome in zip(todo, shared_pool(memory_gb).run(todo, limit, seconds), strict=True):
            jobs[job] = outcome
            if isinstance(outcome, bool):
                _cache.put(job, outcome)
    outcomes: list[Outcome] = []
    for (first, second), verdict in zip(pairs, verdicts, strict=True):
        known = jobs["same", *sorted((first, second))] if verdict is None else verdict
        outcomes.append("deadline" if known is None else known)
    parsed = {gold: jobs["gold", gold] or False for gold in golds}
    return outcomes, parsed, sum(verdict is None for verdict in verdicts)


def same_answer(gold: str, answer: str, *, limit: float = 5.0, memory_gb: float = 1.0) -> bool:
    r"""
    Whether two answers are the same; symmetric. Both may be raw, in `$...$` or boxed.

    Args:
        gold (`str`):
            One answer.
        answer (`str`):
            The other.
        limit (`float`, *optional*, defaults to `5.0`):
            Seconds after which the comparison is killed, and is `False`.
        memory_gb (`float`, *optional*, defaults to `1.0`):
            Memory it may take.

    Example:
    ```python
    >>> from trl_bridge.rewards import same_answer

    >>> same_answer(r"\frac{1}{2}", "0.5"), same_answer("1/3", "0.33")
    (True, False)
    ```
    """
    pair = (gold_answer(gold), gold_answer(answer))
    outcomes, _, _ = same_batch([pair], limit, limit + 30.0, memory_gb)
    return outcomes[0] is True


class MathReward:
    r"""
    Reward 1.0 for a completion whose final answer equals the gold, 0.0 for any other, `None` for a gold that does not
    parse. An instance with other options than the defaults of [`math_reward`] is a reward function, too.

    Args:
        fallback (`str`, *optional*, defaults to `"none"`):
            What counts as the answer without a `\boxed`; see [`~trl_bridge.rewards.answers.final_answer`].
        tolerance (`float`, *optional*):
            Relative tolerance between two plain numbers. `None` means exact values: 0.33 is not 1/3.
        limit (`float`, *optional*, defaults to `5.0`):
            Seconds that the comparison of one answer may take by itself; an answer that takes longer pays 0.
        batch_limit (`float`, *optional*):
            Seconds for a batch. What has not been judged by then gets `None`, and a warning says so. `None` takes 30 and
            a twentieth of a second for each completion.
        memory_gb (`float`, *optional*, defaults to `1.0`):
            Memory in GB that the comparison of one answer may take.
        evaluated (`bool`, *optional*, defaults to `False`):
            Whether an answer that repeats the question (`123 \times 456`, `\sum_{k=1}^{100} k`) pays 0: no operation may be
            left in it that the gold does not have too.
        reasoning_blocks (`Sequence[tuple[str, str]]`, *optional*):
            Marks that open and close reasoning, in addition to `trl_bridge.rewards.completions.REASONING_BLOCKS`.

    Raises:
        `ValueError`:
            If an option is out of range.
    """

    def __init__(
        self,
        fallback: Fallback = "none",
        tolerance: float | None = None,
        limit: float = 5.0,
        batch_limit: float | None = None,
        memory_gb: float = 1.0,
        evaluated: bool = False,
        reasoning_blocks: Blocks = (),
    ):
        if fallback not in ("none", "phrase", "text"):
            raise ValueError(f"`fallback` is {fallback!r}: choose 'none', 'phrase' or 'text'.")
        for name, value in (("limit", limit), ("batch_limit", batch_limit), ("memory_gb", memory_gb)):
            if value is not None and value <= 0:
                raise ValueError(f"`{name}` is {value}: it must be above 0.")
        if tolerance is not None and not 0 <= tolerance < 1:
            raise ValueError(f"`tolerance` is {tolerance}: it must be at least 0 and below 1.")
        self.__name__ = "math_reward"
        self.fallback = fallback
        self.tolerance = tolerance
        self.limit = limit
        self.batch_limit = batch_limit
        self.memory_gb = memory_gb
        self.evaluated = evaluated
        self.blocks = (*REASONING_BLOCKS, *((first, last) for first, last in reasoning_blocks))

    def __call__(
        self,
        completions: Sequence[Completion],
        solution: Sequence[Any],
        log_extra: LogExtra | None = None,
        log_metric: LogMetric | None = None,
        **kwargs: Any,
    ) -> list[float | None]:
        check_lengths(completions, solution, "solution")
        texts = [gold_text(gold) for gold in solution]
        golds = [gold_answer(text) if text is not None and may_be_gold(text) else None for text in texts]
        answers = [final_answer(visible_text(completion, self.blocks), self.fallback) for completion in completions]
        rows = [i for i, (gold, answer) in enumerate(zip(golds, answers, strict=True)) if gold and answer]
        pairs = [(golds[i] or "", answers[i] or "") for i in rows]
        distinct = list(dict.fromkeys(gold for gold in golds if gold))
        seconds = 30.0 + 0.05 * len(completions) if self.batch_limit is None else self.batch_limit
        outcomes, parsed, symbolic = same_batch(pairs, self.limit, seconds, self.memory_gb, distinct)
        by_row = dict(zip(rows, outcomes, strict=True))
        rewards = [
            self._reward(i, solution[i], gold, answers[i], parsed.get(gold or "", False), by_row.get(i, False))
            for i, gold in enumerate(golds)
        ]
        log_answers(log_extra, golds, answers)
        if log_metric is not None:
            stopped = sum(outcome in ("timeout", "deadline", "killed", "memory") for outcome in outcomes)
            total = max(1, len(completions))
            log_metric("math_reward/timeouts", float(stopped))
            log_metric("math_reward/errors", float(sum(str(outcome).startswith("error") for outcome in outcomes)))
            log_metric("math_reward/symbolic_fraction", symbolic / total)
            log_metric("math_reward/no_answer_fraction", sum(answer is None for answer in answers) / total)
        return rewards

    def _reward(
        self, row: int, solution: Any, gold: str | None, answer: str | None, parsed: Outcome, outcome: Outcome
    ) -> float | None:
        if gold is not None and parsed is not True and parsed is not False and parsed != "timeout":
            _unjudged(f"the check of a gold was stopped ({parsed})")
            return None
        if gold is None or parsed is not True:
            hint = ". List such rows before training with `trl_bridge.rewards.check_golds(dataset)`."
            cannot_judge("math_reward", "solution", row, solution, "cannot be parsed", hint)
            return None
        if outcome in _NOT_JUDGED:
            _unjudged(_NOT_JUDGED[outcome])
            return None
        right = outcome is True or self._near(gold, answer)
        return float(right and (not self.evaluated or is_evaluated(answer or "", gold)))

    def _near(self, gold: str, answer: str | None) -> bool:
        if self.tolerance is None or answer is None:
            return False
        one, two = exact(clean(gold) or ""), exact(clean(answer) or "")
        if one is None or two is None:
            return False
        return abs(one - two) <= self.tolerance * max(abs(one), abs(two))


def _unjudged(what: str) -> None:
    warn_once(
        ("math_reward", what),
        "math_reward: %s; such rows are not rewarded (reward None). `MathReward(batch_limit=...)` gives more time; the metric "
        "`math_reward/timeouts` counts them.",
        what,
    )


_default = MathReward()


def math_reward(
    completions: Sequence[Completion],
    solution: Sequence[Any],
    log_extra: LogExtra | None = None,
    log_metric: LogMetric | None = None,
    **kwargs: Any,
) -> list[float | None]:
    r"""
    Reward 1.0 where the completion's last `\boxed{}` equals the gold, else 0.0; `None` where the gold does not parse.

    Exact values (0.5 is 1/2, 0.33 is not 1/3), by latex2sympy2_extended, SymPy and math-verify in worker processes that
    are killed after 5 seconds or 1 GB an answer. What could not be judged in the batch's time gets `None`. For other options
    make a [`MathReward`].

    Args:
        completions (`list[str]` or `list[list[dict]]`):
            Completions, standard or conversational; of reasoning traces the text after the think block counts.
        solution (`list[str]`):
            Golds: raw (`\frac{3}{4}`), in `$...$`, boxed, or worked solutions, whose last box counts.
        log_extra (`callable`, *optional*):
            Given by the trainer; gets the columns `solution` and `answer`.
        log_metric (`callable`, *optional*):
            Given by the trainer; gets `math_reward/timeouts` (answers killed, a count), `math_reward/errors` (answers that
            SymPy failed on, a count), `math_reward/symbolic_fraction` and `math_reward/no_answer_fraction`.
        **kwargs:
            Other columns of the dataset, ignored.

    Returns:
        `list[float | None]`:
            One reward per completion.

    Raises:
        `ValueError`:
            If `solution` does not have one value per completion.

    Example:
    ```python
    >>> from trl_bridge.rewards import math_reward

    >>> math_reward([r"So \boxed{0.5}", r"So \boxed{0.6}"], [r"\frac{1}{2}", r"\frac{1}{2}"])
    [1.0, 0.0]
    ```
    """
    return _default(completions, solution, log_extra, log_metric, **kwargs)


def boxed_format_reward(
    completions: Sequence[Completion], log_metric: LogMetric | None = None, **kwargs: Any
) -> list[float]:
    r"""
    Reward 1.0 where the visible text (after any think block) ends with a closed, non-empty `\boxed{}`, else 0.0.

    Args:
        completions (`list[str]` or `list[list[dict]]`):
            Completions, standard or conversational.
        log_metric (`callable`, *optional*):
            Given by the trainer; gets `boxed_format_reward/boxed_fraction`.
        **kwargs:
            Other columns of the dataset, ignored.

    Returns:
        `list[float]`:
            One reward per completion.
    """
    rewards = []
    for completion in completions:
        text = visible_text(completion)
        box = None if text is None else last_box(text, join=False)
        rewards.append(1.0 if box and box.strip() else 0.0)
    if log_metric is not None:
        log_metric("boxed_format_reward/boxed_fraction", sum(rewards) / max(1, len(rewards)))
    return rewards

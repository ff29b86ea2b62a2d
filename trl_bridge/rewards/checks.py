"""Golds that no reward can judge, found before training."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from .answers import gold_answer
from .completions import gold_text
from .math_rewards import is_plain, may_be_gold
from .mathematics.workers import shared_pool


@dataclass(frozen=True)
class BadGold:
    """
    A row whose gold cannot be judged.

    Attributes:
        row (`int`):
            Index in the dataset.
        gold (`str`):
            The gold as it stands there.
        reason (`str`):
            `"missing"`, `"does not parse"`, why it is none (a placeholder, a control character, a float above 2^53), or why its
            check was stopped (`"timeout"`, `"memory"`, `"killed"`, `"deadline"`).
    """

    row: int
    gold: str
    reason: str


def check_golds(
    dataset: Iterable[Mapping[str, Any]], column: str = "solution", *, limit: float = 5.0, batch_limit: float = 600.0
) -> list[BadGold]:
    """
    List the rows for which [`math_reward`] would return `None`.

    Args:
        dataset (`datasets.Dataset` or any iterable of rows):
            The training dataset.
        column (`str`, *optional*, defaults to `"solution"`):
            Column of the golds.
        limit (`float`, *optional*, defaults to `5.0`):
            Seconds that one gold may take.
        batch_limit (`float`, *optional*, defaults to `600.0`):
            Seconds that every 1,000 golds together may take.

    Returns:
        `list[BadGold]`:
            Bad rows in order; empty for a sound dataset.

    Raises:
        `KeyError`:
            If a row has no such column.
    """
    bad: list[BadGold] = []
    pending: list[tuple[int, str, str]] = []
    for row, example in enumerate(dataset):
        if column not in example:
            raise KeyError(f"`column` is {column!r}, but row {row} has the columns {sorted(example)}.")
        value = example[column]
        text = gold_text(value)
        gold = "" if text is None else gold_answer(text)
        if not gold.strip():
            bad.append(BadGold(row, str(value), "missing"))
        elif isinstance(value, float) and abs(value) >= 2**53:
            bad.append(BadGold(row, str(value), "a float that has lost digits: store it as text"))
        elif not may_be_gold(text or ""):
            bad.append(
                BadGold(row, repr(value), "no gold: a placeholder, or a control character in place of a backslash")
            )
        elif not is_plain(gold):
            pending.append((row, str(value), gold))
    for start in range(0, len(pending), 1000):
        part = pending[start : start + 1000]
        outcomes = shared_pool().run([("gold", gold) for _, _, gold in part], limit, batch_limit)
        for (row, value, _), outcome in zip(part, outcomes, strict=True):
            if outcome is not True:
                bad.append(BadGold(row, value, "does not parse" if outcome is False else str(outcome)))
    return sorted(bad, key=lambda item: item.row)

"""Markdown tables."""

from collections.abc import Iterable, Sequence
from typing import Any


def markdown_table(head: Sequence[str], rows: Iterable[Sequence[Any]], left: int | None = None) -> str:
    """A table; the columns from the `left`th on are aligned to the right, by default none."""
    left = len(head) if left is None else left
    rule = ["---"] * left + ["---:"] * (len(head) - left)
    return "".join(f"| {' | '.join(map(str, row))} |\n" for row in (head, rule, *rows))

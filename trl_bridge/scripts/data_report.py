"""What `trl-bridge data` prints: rows, tokens and findings as lines of text."""

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any


if TYPE_CHECKING:
    from ..data.checks import DatasetReport, Sample

__all__ = ["report_lines", "row_lines", "sample_lines"]

_FINDINGS = 5
_CHARACTERS = 600
_TOKENS = 120


def report_lines(report: "DatasetReport") -> list[str]:
    """
    Findings by kind, the first few of each spelt out.

    Args:
        report ([`~trl_bridge.data.checks.DatasetReport`]):
            The report.

    Returns:
        `list[str]`: the lines.
    """
    kinds: list[tuple[str, Sequence[Any]]] = [
        ("empty cells", report.empty),
        ("duplicates", report.duplicates),
        ("golds that cannot be judged", report.golds),
        ("demonstrations that do not render", report.unrenderable),
        ("demonstrations that are too long", report.overlong),
        ("questions shared with a benchmark", report.overlaps),
    ]
    lines = []
    for kind, found in kinds:
        lines.append(f"  {kind:35}{len(found):>7}")
        lines += [f"      row {each.row}: {_cut(_what(each), 150)}" for each in found[:_FINDINGS]]
        if len(found) > _FINDINGS:
            lines.append(f"      and {len(found) - _FINDINGS} more")
    if report.lengths:
        ordered = sorted(report.lengths)
        lines.append(
            f"  tokens of a demonstration with its prompt: {statistics.median(ordered):.0f} in the middle, "
            f"{ordered[math.ceil(0.95 * len(ordered)) - 1]} at the 95th percentile, {ordered[-1]} at most"
        )
    return lines


def row_lines(index: int, row: Mapping[str, Any]) -> list[str]:
    """
    A row, column by column.

    Args:
        index (`int`):
            Its index.
        row (`Mapping[str, Any]`):
            The row.

    Returns:
        `list[str]`: the lines.
    """
    lines = ["", f"row {index}"]
    for column, value in row.items():
        if isinstance(value, list) and value and isinstance(value[0], dict):
            lines += [f"  {column} ({message['role']}): {_cut(str(message['content']))}" for message in value]
        else:
            lines.append(f"  {column}: {_cut(str(value))}")
    return lines


def sample_lines(sample: "Sample") -> list[str]:
    """
    A row as the trainer's tokens, separated by "|".

    Args:
        sample ([`~trl_bridge.data.checks.Sample`]):
            The row.

    Returns:
        `list[str]`: the lines.
    """
    lines = ["", f"row {sample.row}", f"  prompt, {len(sample.prompt)} tokens: {_tokens(sample.prompt)}"]
    if sample.completion:
        lines.append(f"  trained, {len(sample.completion)} tokens: {_tokens(sample.completion)}")
    return lines if sample.solution is None else [*lines, f"  solution: {_cut(str(sample.solution))}"]


def _what(found: Any) -> str:
    if hasattr(found, "what"):
        return found.what
    return f"{found.benchmark} row {found.benchmark_row}: {found.words!r}"


def _tokens(tokens: list[str]) -> str:
    shown = [token.replace("\n", "\\n") for token in tokens]
    if len(shown) > _TOKENS:
        left_out = len(shown) - _TOKENS
        shown = [*shown[: _TOKENS // 2], f"... {left_out} tokens ...", *shown[-_TOKENS // 2 :]]
    return "|".join(shown)


def _cut(text: str, limit: int = _CHARACTERS) -> str:
    text = text.replace("\n", "\\n")
    return text if len(text) <= limit else f"{text[: limit // 2]} ... {text[-limit // 2 :]}"

"""What a completion says: its visible text in every dataset format, with the reasoning block removed."""

import re
from collections.abc import Callable, Sequence
from typing import Any


Completion = str | Sequence[dict[str, Any]]
LogExtra = Callable[[str, list], None]
LogMetric = Callable[[str, float], None]

_OPEN_THINK = re.compile(r"<(?:think|thinking)>", re.IGNORECASE)
_CLOSE_THINK = re.compile(r"</(?:think|thinking)>", re.IGNORECASE)


def message_text(completion: Completion) -> str:
    """Text of a completion: the string itself, or the content of its last assistant message."""
    if isinstance(completion, str):
        return completion
    for message in reversed(completion):
        if message.get("role", "assistant") != "assistant":
            continue
        content = message.get("content")
        if isinstance(content, str):
            return content
        if content is not None:
            return "".join(part.get("text", "") for part in content if isinstance(part, dict))
    return ""


def visible_text(completion: Completion) -> str | None:
    """Text after the reasoning block. An answer inside the block alone is no answer."""
    text = message_text(completion)
    if "</" not in text and "<" not in text:
        return text
    end = 0
    for match in _CLOSE_THINK.finditer(text):
        end = match.end()
    return None if _OPEN_THINK.search(text, end) else text[end:]


def log_answers(
    log_extra: LogExtra | None, golds: Sequence[Any], answers: Sequence[Any], gold_column: str = "solution"
) -> None:
    """Add the gold and the extracted answer, as strings, to TRL's table of completions."""
    if log_extra is not None:
        log_extra(gold_column, ["" if gold is None else str(gold) for gold in golds])
        log_extra("answer", ["[none]" if answer is None else str(answer) for answer in answers])


def check_lengths(completions: Sequence[Any], column: Sequence[Any], name: str) -> None:
    """Raise `ValueError`, naming the column, unless there is one value per completion."""
    if len(completions) != len(column):
        raise ValueError(
            f"`{name}` has {len(column)} values for {len(completions)} completions: pass one value per completion."
        )

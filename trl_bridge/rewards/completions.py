"""What a completion says: its visible text in every dataset format, with the reasoning block removed."""

import json
import logging
import math
import re
from collections.abc import Callable, Hashable, Mapping, Sequence
from functools import lru_cache
from typing import Any


logger = logging.getLogger(__name__)


Completion = str | Sequence[dict[str, Any]]
LogExtra = Callable[[str, list], None]
LogMetric = Callable[[str, float], None]

Blocks = Sequence[tuple[str, str]]
_TAGS = "think thinking thought thoughts reasoning analysis reflection scratchpad inner_monologue seed:think".split()
REASONING_BLOCKS: Blocks = (
    *((f"<{tag}>", f"</{tag}>") for tag in _TAGS),
    ("[THINK]", "[/THINK]"),  # Magistral
    ("◁think▷", "◁/think▷"),  # Kimi
    ("<|begin_of_thought|>", "<|end_of_thought|>"),  # Sky-T1, OpenThinker
    ("<|START_THINKING|>", "<|END_THINKING|>"),  # Command A
    ("<|channel|>analysis<|message|>", "<|channel|>final<|message|>"),  # gpt-oss
    ("<|channel|>commentary<|message|>", "<|channel|>final<|message|>"),
)
"""Marks that open and close a block of reasoning, in any case of letters. What stands inside is never an answer."""

# gpt-oss without its special tokens, as `skip_special_tokens=True` decodes it: "analysisWe need ...assistantfinalThe ...".
_BARE_CHANNEL, _BARE_FINAL = re.compile(r"analysis(?=[A-Z\"'(\d])"), "assistantfinal"
_warned: set[Hashable] = set()


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


@lru_cache
def _marks(blocks: tuple[tuple[str, str], ...]) -> tuple[re.Pattern[str], re.Pattern[str], re.Pattern[str]]:
    """The first two characters of any mark, opening marks, closing marks."""
    heads = zip(
        *(mark[:2] for block in blocks for mark in block), strict=False
    )  # one character where a mark has no more
    first = re.compile("".join(f"[{re.escape(''.join(sorted(set(chars))))}]" for chars in heads), re.IGNORECASE)
    opening, closing = (
        re.compile("|".join(map(re.escape, marks)), re.IGNORECASE) for marks in zip(*blocks, strict=True)
    )
    return first, opening, closing


def visible_text(completion: Completion, blocks: Blocks = REASONING_BLOCKS) -> str | None:
    """Text after the last block of reasoning; `None` where one is left open. An answer inside it is no answer."""
    text = message_text(completion)
    if _BARE_CHANNEL.match(text):
        _, closed, visible = text.rpartition(_BARE_FINAL)
        return visible if closed else None
    first, opening, closing = _marks(blocks if isinstance(blocks, tuple) else tuple(blocks))
    if not first.search(text):
        return text  # nearly every completion, and a tenth of the time that the others take
    end = 0
    for match in closing.finditer(text):
        end = match.end()
    return None if opening.search(text, end) else text[end:]


def gold_text(value: Any) -> str | None:
    """A gold as text: numbers as written, a list of one as its member; `None` for what cannot be one (null, NaN, a dict)."""
    if isinstance(value, (list, tuple)) and len(value) == 1:
        value = value[0]
    if isinstance(value, float) and value.is_integer() and abs(value) < 2**53:
        value = int(value)
    if isinstance(value, bool) or not isinstance(value, (str, int, float)):
        return None
    return None if isinstance(value, float) and not math.isfinite(value) else str(value)


def warn_once(key: Hashable, message: str, *values: Any) -> None:
    """Warn the first time that a key comes."""
    if key not in _warned:
        _warned.add(key)
        logger.warning(message, *values)


def cannot_judge(reward: str, column: str, row: int, value: Any, why: str, hint: str = "") -> None:
    """Warn, once for each value, that a row of a column is not rewarded."""
    shown = repr(value)[:200]
    message = "%s: `%s` of row %d of this batch %s and is not rewarded (reward None): %s%s"
    warn_once((reward, column, shown), message, reward, column, row, why, shown, hint)


def last_tagged(text: str, tag: str) -> str | None:
    """What stands in the last `<tag>...</tag>` of a text, in any case of letters; `None` without one. Linear in its length."""
    lower = text.lower()
    end = lower.rfind(f"</{tag}>")
    start = lower.rfind(f"<{tag}>", 0, max(end, 0))
    return None if end < 0 or start < 0 else text[start + len(tag) + 2 : end]


def read_json(value: Any) -> Any:
    """A mapping, or the mapping or list that a string of JSON holds; `None` for anything else."""
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except ValueError:
            return None
    return value if isinstance(value, (Mapping, list)) else None


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

"""The final answer of a text: the last box, or, by option, the final-answer phrases."""

import re
from typing import Literal


Fallback = Literal["none", "phrase", "text"]

_BOX = re.compile(r"\\(?:boxed|fbox)(?![a-zA-Z])")
_BRACE = re.compile(r"\\.|[{}]", re.DOTALL)
_TOKEN = re.compile(r"\s*([^\s{}$\\.,;]+)")
# Boxes that follow one another with nothing but a separator between them are one answer in several parts: `\boxed{1}
# or \boxed{2}` answers "1 or 2", and pays neither for 1 nor for 2.
_GAP = r"(?:[\s$~]|\\[,;:!> ()\[\]]|\\q?quad)*"
_JOINT = re.compile(
    rf"{_GAP}(?:,|;|/|,?{_GAP}(?:\\text\s*\{{)?\s*,?\s*(?:and|or)\b\s*\}}?){_GAP}(?:[A-Za-z](?:_\{{?\w+\}}?)?\s*=)?{_GAP}"
)
_PHRASE = re.compile(
    r"\banswer\b\s*+(?:\*\*|__)?\s*+(?:\([^()\n]{0,40}\)\s*+)?(?:is|are|:|=)\s*+(?:\*\*|__)?\s*+:?\s*+\}?",
    re.IGNORECASE,
)
_HASHES = re.compile(r"####[ \t]*+")
_HOPE = re.compile(r"(?<![\s.])[\s.]*+I hope (?:it|this) is correct.*$", re.IGNORECASE | re.DOTALL)
_SENTENCE_END = re.compile(r"[.!?](?=\s|$)")


def last_box(text: str, join: bool = True) -> str | None:
    r"""
    Content of the last `\boxed{}` (or `\fbox{}`, or `\boxed 5`), in time linear in the text's length; `None` without one,
    and where the last is never closed.

    A box inside a box counts as the outer one. With `join`, boxes separated by a comma, "and" or "or" alone are one
    answer.
    """
    boxes: list[tuple[int, int, str]] = []
    position = 0
    while match := _BOX.search(text, position):
        box = _read_box(text, match)
        if box is None:
            return None
        boxes.append(box)
        position = box[1]
    if not boxes:
        return None
    start, _, content = boxes[-1]
    parts = [content]
    for previous_start, previous_end, previous in reversed(boxes[:-1]):
        gap = text[previous_end:start]
        if not join or len(gap) > 40 or not _JOINT.fullmatch(gap):
            break
        if len(parts) == 20:
            return None
        parts.insert(0, previous)
        start = previous_start
    return ", ".join(parts)


def _read_box(text: str, match: re.Match[str]) -> tuple[int, int, str] | None:
    start = match.end()
    while start < len(text) and text[start].isspace():
        start += 1
    if start < len(text) and text[start] == "{":
        depth = 0
        for brace in _BRACE.finditer(text, start):
            depth += {"{": 1, "}": -1}.get(brace.group(), 0)
            if depth == 0:
                return match.start(), brace.end(), text[start + 1 : brace.start()]
        return None
    token = _TOKEN.match(text, match.end())
    return None if token is None else (match.start(), token.end(), token.group(1))


def phrase_answer(text: str) -> str | None:
    """What follows the last "#### " or "the answer is", to the end of its sentence; `None` where there is neither."""
    hashes = [match.end() for match in _HASHES.finditer(text)]
    if hashes:
        return text[hashes[-1] :].split("\n", 1)[0].strip() or None
    return after_phrase(text, _PHRASE)


def after_phrase(text: str, phrase: re.Pattern[str]) -> str | None:
    """What follows the last match of a phrase, to the end of its sentence; `None` without one."""
    phrases = [match.end() for match in phrase.finditer(text)]
    if not phrases:
        return None
    tail = _HOPE.sub("", text[phrases[-1] : phrases[-1] + 2000].lstrip())
    tail = tail.split("\n\n", 1)[0] if tail.startswith(("$$", r"\[")) else tail.split("\n", 1)[0]
    end = _SENTENCE_END.search(tail)
    return (tail[: end.start()] if end else tail).strip() or None


def final_answer(text: str | None, fallback: Fallback = "none") -> str | None:
    r"""
    Final answer of a completion's visible text, as it was written.

    `fallback` is what counts where there is no `\boxed` at all: `"none"` (strict), `"phrase"` (the last "the answer is ..."
    or "#### ..."), or `"text"` (a phrase, else the whole text). An empty box, or one that is left open, is no answer
    under any of them.
    """
    if text is None:
        return None
    if _BOX.search(text):
        content = last_box(text)
        return content if content is not None and content.strip() else None
    if fallback == "none":
        return None
    answer = phrase_answer(text)
    if answer is None and fallback == "text":
        answer = text.strip() or None
    return answer


def gold_answer(solution: str) -> str:
    r"""
    Answer of a reference: its last `\boxed{}` (as in MATH), what follows "####" (as in GSM8K), what follows "the answer
    is" in prose, else all of it.
    """
    box = last_box(solution, join=False)
    if box is not None:
        return box
    if "####" in solution or (len(solution) > 20 and _PHRASE.search(solution)):
        return phrase_answer(solution) or solution
    return solution

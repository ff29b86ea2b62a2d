"""Exact value of an answer that is a plain number. No evaluation, no parser: nothing here can run long."""

import re
from fractions import Fraction
from functools import lru_cache


# Digits of one number; a longer one is compared as a string.
MAX_DIGITS = 400
_DIGITS = r"(?:\d+\.?\d*|\.\d+)"
_DECIMAL = re.compile(rf"([+-]*)\s*({_DIGITS})")
_RATIO = re.compile(
    rf"([+-]*)\s*(?:(\d+)\s*)?\\frac\s*\{{\s*([+-]?\s*{_DIGITS})\s*\}}\s*\{{\s*([+-]?\s*{_DIGITS})\s*\}}"
)
_SLASH = re.compile(rf"([+-]*)\s*(?:(\d+)\s+)?\(?\s*([+-]?{_DIGITS})\s*\)?\s*/\s*\(?\s*([+-]?{_DIGITS})\s*\)?")
_SCIENTIFIC = re.compile(
    rf"([+-]*)\s*(?:({_DIGITS})\s*(?:\\times|\\cdot|\*|x)\s*)?10\s*\^\s*(?:\{{\s*([+-]?\s*\d+)\s*\}}|([+-]?\d+))"
)
_EXPONENT = re.compile(rf"([+-]*)\s*({_DIGITS})\s*[eE]\s*([+-]?\d+)")
_REPEATING = re.compile(r"([+-]*)\s*(\d*)\.(\d*)\\(?:overline|bar|dot)\s*\{\s*(\d+)\s*\}")
_REPEATED = re.compile(r"([+-]*)\s*(\d*)\.(\d*?)(\d{1,6}?)\4{2,}\s*\\ldots")
_BRACKETED_CYCLE = re.compile(r"([+-]*)\s*(\d*)\.(\d*)\((\d+)\)")
_WORDS = {
    word: value
    for value, word in enumerate(
        "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen "
        "eighteen nineteen twenty".split()
    )
}
_TENS = {word: 10 * value for value, word in enumerate("thirty forty fifty sixty seventy eighty ninety".split(), 3)}
_TENS["twenty"] = 20
_PARTS = {"half": 2, "halves": 2, "third": 3, "quarter": 4, "fourth": 4, "fifth": 5, "sixth": 6, "seventh": 7, "eighth": 8,
          "ninth": 9, "tenth": 10}  # fmt: skip


def _sign(signs: str) -> int:
    return -1 if signs.count("-") % 2 else 1


@lru_cache(maxsize=65536)
def exact(text: str) -> Fraction | None:
    r"""
    Exact value of a cleaned answer: integers, decimals (`0.5` is 1/2 exactly), fractions, mixed numbers, scientific
    notation, repeating decimals (`0.\overline{3}`), number words up to twenty; `None` for everything else, a division by
    zero and numbers of more than 400 digits included.
    """
    if len(text) > MAX_DIGITS:
        return None
    text = text.strip()
    while text.startswith("(") and text.endswith(")") and text.count("(") == 1:
        text = text[1:-1].strip()
    if text[-1:].isalpha():
        if (word := _worded(text.lower())) is not None:
            return word
    if match := _DECIMAL.fullmatch(text):
        return _sign(match[1]) * Fraction(match[2])
    if match := _RATIO.fullmatch(text) or _SLASH.fullmatch(text):
        return _ratio(*match.groups())
    if match := _SCIENTIFIC.fullmatch(text):
        power = int((match[3] or match[4]).replace(" ", ""))
        return None if abs(power) > MAX_DIGITS else _sign(match[1]) * Fraction(match[2] or 1) * Fraction(10) ** power
    if match := _EXPONENT.fullmatch(text):
        power = int(match[3])
        return None if abs(power) > MAX_DIGITS else _sign(match[1]) * Fraction(match[2]) * Fraction(10) ** power
    if match := _REPEATING.fullmatch(text) or _BRACKETED_CYCLE.fullmatch(text) or _REPEATED.fullmatch(text):
        whole, fixed, cycle = match[2] or "0", match[3], match[4]
        repeated = Fraction(int(cycle), (10 ** len(cycle) - 1) * 10 ** len(fixed))
        return _sign(match[1]) * (Fraction(f"{whole}.{fixed or 0}") + repeated)
    return None


def _worded(text: str) -> Fraction | None:
    """Numbers in words up to a thousand, and fractions of one: "forty-two", "one half", "three quarters"."""
    words = re.sub(r"[-\s]+", " ", text).strip().split(" ")
    sign = -1 if words[0] in ("minus", "negative") else 1
    words = words[1:] if sign < 0 else words
    if "and" in words[1:-1] and (rest := _worded(" ".join(words[(cut := words.index("and", 1)) + 1 :]))) is not None:
        # "five and a half"; "one hundred and two" is counted below.
        whole = _counted(words[:cut]) if 0 < rest < 1 else None
        if whole is not None:
            return sign * (whole + rest)
    if not words or len(words) > 6:
        return None
    part = _PARTS.get(words[-1].removesuffix("s") if words[-1] not in _PARTS else words[-1])
    if part is not None:
        count = words[:-1]
        number = 1 if count in ([], ["a"]) else _counted(count)
        # Without a number only "half" is one: "third" is a place.
        return None if number is None or (not count and part != 2) else Fraction(sign * number, part)
    number = _counted(words)
    return None if number is None else Fraction(sign * number)


def _counted(words: list[str]) -> int | None:
    if words in (["one", "thousand"], ["a", "thousand"], ["thousand"]):
        return 1000
    if "hundred" in words[:2]:
        index = words.index("hundred")
        hundreds = 1 if words[:index] in ([], ["a"]) else _WORDS.get(words[0], 0)
        rest = words[index + 1 :]
        rest = rest[1:] if rest[:1] == ["and"] else rest
        tail = _counted(rest) if rest else 0
        return 100 * hundreds + tail if 0 < hundreds < 10 and tail is not None and tail < 100 else None
    if len(words) == 2 and words[0] in _TENS and 0 < _WORDS.get(words[1], 0) < 10:
        return _TENS[words[0]] + _WORDS[words[1]]
    if len(words) == 1:
        return int(words[0]) if re.fullmatch(r"\d{1,3}", words[0]) else _WORDS.get(words[0], _TENS.get(words[0]))
    return None


def _ratio(signs: str, whole: str | None, top: str, bottom: str) -> Fraction | None:
    numerator, denominator = Fraction(top.replace(" ", "")), Fraction(bottom.replace(" ", ""))
    if denominator == 0:
        return None
    value = numerator / denominator
    if whole is not None:
        # `2\frac{-1}{3}` and `2\frac{0.5}{3}` are products, if anything: leave them to the parser.
        if not (top.strip().isdigit() and bottom.strip().isdigit()) or numerator >= denominator:
            return None
        value += int(whole)
    return _sign(signs) * value

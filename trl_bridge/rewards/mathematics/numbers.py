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
_WORDS = {
    word: value
    for value, word in enumerate(
        "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen "
        "eighteen nineteen twenty".split()
    )
}


def _sign(signs: str) -> int:
    return -1 if signs.count("-") % 2 else 1


@lru_cache(maxsize=65536)
def exact(text: str) -> Fraction | None:
    r"""
    Exact value of a cleaned answer: integers, decimals (`0.5` is 1/2 exactly), fractions, mixed numbers, scientific
    notation, repeating decimals (`0.\overline{3}`), number words up to twenty.

    Args:
        text (`str`):
            Answer as [`~trl_bridge.rewards.mathematics.surface.clean`] spells it.

    Returns:
        `Fraction` or `None`:
            The value; `None` for everything else, a division by zero and numbers of more than 400 digits included.
    """
    if len(text) > MAX_DIGITS:
        return None
    text = text.strip()
    while text.startswith("(") and text.endswith(")") and text.count("(") == 1:
        text = text[1:-1].strip()
    if (word := _WORDS.get(text.lower())) is not None:
        return Fraction(word)
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
    if match := _REPEATING.fullmatch(text):
        whole, fixed, cycle = match[2] or "0", match[3], match[4]
        repeated = Fraction(int(cycle), (10 ** len(cycle) - 1) * 10 ** len(fixed))
        return _sign(match[1]) * (Fraction(f"{whole}.{fixed or 0}") + repeated)
    return None


def _ratio(signs: str, whole: str | None, top: str, bottom: str) -> Fraction | None:
    numerator, denominator = Fraction(top.replace(" ", "")), Fraction(bottom.replace(" ", ""))
    if denominator == 0:
        return None
    value = numerator / denominator
    if whole is not None:
        # `2\frac{-1}{3}` and `2\frac{0.5}{3}` are products, if anything: leave them to the parser.
        if not (top.strip().isdigit() and bottom.strip().isdigit()):
            return None
        value += int(whole)
    return _sign(signs) * value

"""Units and labels after a value: dropped where only one side has them, compared where both do."""

import re
from fractions import Fraction
from functools import lru_cache


_LENGTH = {"mm": "1/1000", "cm": "1/100", "dm": "1/10", "m": "1", "km": "1000", "in": "0.0254", "ft": "0.3048",
           "yd": "0.9144", "mi": "1609.344"}  # fmt: skip
_TIME = {"ms": "1/1000", "s": "1", "min": "60", "h": "3600", "day": "86400", "week": "604800", "month": "", "year": ""}
_MASS = {"mg": "1/1000", "g": "1", "kg": "1000", "lb": "453.59237", "oz": "28.349523125", "ton": ""}
_MONEY = {"dollar": "1", "cent": "1/100", "euro": "", "pound": "", "yuan": "", "yen": "", "rupee": ""}
_ANGLE = {"degree": "1", "arcminute": "1/60", "arcsecond": "1/3600"}
_OTHER = ["radian", "liter", "ml", "gallon", "mph", "kph", "newton", "joule", "watt", "volt", "amp", "ohm", "hz",
          "pascal", "kelvin", "celsius", "fahrenheit", "mole", "am", "pm", "acre", "hectare", "unit", "prime", "doubleprime"]  # fmt: skip
_FACTORS: dict[str, tuple[str, Fraction]] = {}
for _dimension, _table in (
    ("length", _LENGTH),
    ("time", _TIME),
    ("mass", _MASS),
    ("money", _MONEY),
    ("angle", _ANGLE),
):
    for _name, _factor in _table.items():
        _FACTORS[_name] = (_dimension, Fraction(_factor)) if _factor else (_name, Fraction(1))
_FACTORS |= {name: (name, Fraction(1)) for name in _OTHER}
# Symbols whose prefix is told by its case alone: MW is no mW. "pm" is the afternoon.
_SYMBOLS = {"W": "watt", "Hz": "hz", "Pa": "pascal", "A": "amp", "V": "volt", "J": "joule", "N": "newton", "L": "liter",
            "g": "g", "m": "m", "s": "s"}  # fmt: skip
_PREFIXES = {"p": -12, "n": -9, "u": -6, "m": -3, "k": 3, "M": 6, "G": 9, "T": 12}
_BY_CASE = {
    prefix + symbol: (_FACTORS[name][0], _FACTORS[name][1] * Fraction(10) ** power)
    for symbol, name in _SYMBOLS.items()
    for prefix, power in _PREFIXES.items()
    if prefix + symbol != "pm"
}
_FACTORS = {**_BY_CASE, **_FACTORS, "ml": _BY_CASE["mL"]}
# `5'` is five feet beside a length, five minutes of arc beside an angle; pounds are money, but beside ounces.
_BESIDE = {"prime": {"length": "ft", "angle": "arcminute"}, "doubleprime": {"length": "in", "angle": "arcsecond"},
           "pound": {"mass": "lb"}}  # fmt: skip
_ALIASES = {
    "millimeter": "mm", "millimetre": "mm", "centimeter": "cm", "centimetre": "cm", "decimeter": "dm", "meter": "m",
    "metre": "m", "kilometer": "km", "kilometre": "km", "inch": "in", "inches": "in", "inche": "in", "foot": "ft",
    "feet": "ft", "yard": "yd", "mile": "mi", "second": "s", "sec": "s", "minute": "min", "mins": "min", "hour": "h",
    "hr": "h", "hrs": "h", "gram": "g", "gm": "g", "kilogram": "kg", "milligram": "mg", "lbs": "lb", "ounce": "oz",
    "litre": "liter", "l": "liter", "milliliter": "ml", "yr": "year", "usd": "dollar", "buck": "dollar", "deg": "degree",
    "rad": "radian", "a": "amp", "a.m": "am", "p.m": "pm", "a.m.": "am", "p.m.": "pm", "gal": "gallon", "kmh": "kph", "km/h": "kph",
    "km/hr": "kph", "n": "newton", "j": "joule", "w": "watt", "v": "volt", "k": "kelvin", "c": "celsius",
    "f": "fahrenheit", "mol": "mole", "amps": "amp", "hertz": "hz", "pa": "pascal", "day": "day", "noon": "pm",
    "degrees celsius": "celsius", "miles per hour": "mph", "kilometers per hour": "kph",
}  # fmt: skip
# `KW` and `Ghz` leave no doubt, `mw` does.
_LOWERED = [name.lower() for name in _BY_CASE]
_ALIASES = {name.lower(): name for name in _BY_CASE if _LOWERED.count(name.lower()) == 1} | _ALIASES
_POWERS = {"square": 2, "sq": 2, "sq.": 2, "squared": 2, "cubic": 3, "cu": 3, "cubed": 3}
_TEXT_UNIT = re.compile(r"^(.*?)\s*\\text\s*\{([^{}]*)\}\s*(?:\^\s*\{?\s*(-?\d)\s*\}?)?$", re.DOTALL)
_FRACTION_UNIT = re.compile(
    r"^(.*[\d})\]])\s*\\frac\{\s*\\text\{([^{}]*)\}\s*\}\{\s*\\text\{([^{}]*)\}\s*\}$", re.DOTALL
)
_NAME, _POWER = r"(?:\\text\{[^{}]*\}|[A-Za-z]{1,3}(?![A-Za-z]))", r"(?:\s*\^\s*\{?\s*-?\d\s*\}?)?"
_COMPOUND_UNIT = re.compile(
    rf"^(.*?[\d}})\]])\s*(\\text\{{[^{{}}]*\}}{_POWER}(?:\s*(?:/|\\cdot)\s*{_NAME}{_POWER})+)$", re.DOTALL
)
_PLAIN_UNIT = re.compile(r"^(.*[\d})\]a-z%])\s+([A-Za-z][A-Za-z./' ]*?)\s*(?:\^\s*\{?\s*([23])\s*\}?)?$", re.DOTALL)
_GLUED_UNIT = re.compile(
    r"^([+-]?[\d.,]+)(mm|cm|dm|km|kg|mg|ml|ft|mph|mi|min|hrs?|lbs?|[ap]m)(?:\^\s*\{?\s*([23])\s*\}?)?$"
)
_GLUED_WORD = re.compile(r"^([+-]?\d[\d.,]*)([A-Za-z]{4,})$")
# Words that change a value, or join two: what they stand in is never a unit.
_NOT_UNITS = re.compile(
    r"\b(?:or|and|not|no|if|when|where|for|more|less|least|most|than|million|billion|trillion|thousand|hundred|dozen|"
    r"even|odd|except|to|per cent|percent|percentage|pct|mod|modulo|base|is|are|with|infinitely|half|halves|thirds?|quarters?|"
    r"(?:four|fif|six|seven|eigh|nin|ten|hundred|thousand)ths?|tens|factorial|plus|minus|times|divided|choose|remainder|below|"
    r"loss|wrong|incorrect|binary|out|crore|lakh|bn|mil|score|gross|(?:in|of)\s+(?:\d+|one|two|three|four|five|six|seven|eight|nine|ten))\b"
    r"|^\s*(?:squared|cubed)\s*$"
)
_PARTS = re.compile(r"[^A-Za-z]+")
_MEASURE = re.compile(r"\s*(?:,\s*|and\s)?\s*(\d+(?:\.\d+)?)\s*([A-Za-z]+)")
_MEASURES = re.compile(rf"(?:{_MEASURE.pattern}){{2,4}}\s*")
_SCALES = {"thousand": 10**3, "million": 10**6, "billion": 10**9, "trillion": 10**12, "hundred": 100, "dozen": 12}
_SCALED = re.compile(
    r"^([+-]?[\d.]+)\s*(?:\\text\s*\{\s*)?(hundred|thousand|million|billion|trillion|dozen)s?\b([^{}]*)\}?$"
)


def split_scale(text: str) -> str:
    """`3 million` as `3000000`; anything else unchanged."""
    match = _SCALED.match(text)
    if match is None or match[1].count(".") > 1 or not match[1].strip("+-."):
        return text
    value = Fraction(match[1]) * _SCALES[match[2]]
    number = str(value.numerator) if value.denominator == 1 else f"{value.numerator}/{value.denominator}"
    return number + (rf"\text{{{match[3]}}}" if match[3].strip() else "")


def in_one_unit(text: str) -> tuple[str, str] | None:
    r"""One quantity in several units, `2 \text{ hours } 30 \text{ minutes}`, as value and unit: in the last of them, in degrees for angles."""
    bare = re.sub(r"\\text\s*\{([^{}]*)\}", r" \1 ", text[:200])
    if len(text) > 200 or not _MEASURES.fullmatch(bare):
        return None
    found = [(Fraction(number), _unit_name(name, None)) for number, name in _MEASURE.findall(bare)]
    beside = "ft" if found[0][1] == "prime" else found[0][1]
    found = [(number, _read(name, beside)) for number, name in found]
    total, into = Fraction(0), found[0 if beside == "degree" else -1][1]
    for (number, name), (smaller, following) in zip(found, [*found[1:], (Fraction(0), found[-1][1])], strict=True):
        # Hours and minutes, in this order, and fewer minutes than an hour has: else they are several quantities.
        if not {name, following} <= _FACTORS.keys() or (to_next := conversion(name, following)) is None:
            return None
        if to_next <= smaller:
            return None
        total += number * conversion(name, into)  # type: ignore[operator]
    return (str(total), into) if len({name for _, name in found}) == len(found) else None


@lru_cache(maxsize=16384)
def split_unit(text: str) -> tuple[str, str]:
    r"""
    Value and unit of a cleaned answer: `5 \text{ cm}^2` is `("5", "cm^2")`, `12 \text{ ways}` is `("12", "ways")`. The unit
    has one spelling, "" where there is none.
    """
    glued = _GLUED_UNIT.match(text)
    if glued:
        return glued[1], _unit_name(glued[2], glued[3])
    if (word := _GLUED_WORD.match(text)) and (name := _unit_name(word[2], None)) in _FACTORS:
        return word[1], name
    if match := _FRACTION_UNIT.match(text):
        return match[1].strip(), _unit_name(f"{match[2].strip()}/{match[3].strip()}", None)
    if (match := _COMPOUND_UNIT.match(text)) and "/" in match[2]:
        # `9.8 \text{ m} / \text{s}^{2}`
        return match[1].strip(), _unit_name(re.sub(r"\\text|\\cdot|[{}\s]", "", match[2]), None)
    match = _TEXT_UNIT.match(text)
    if (
        match
        and match[1].strip()
        and not match[1].rstrip().endswith(("+", "-", "=", "(", ",", "_", "^", "/", "*", "{"))
    ):
        inner, label = match[1].strip(), match[2].strip()
        if not _NOT_UNITS.search(label.lower()):
            value, rest = split_unit(inner) if r"\text" in inner else (inner, "")
            return (value, rest) if not label else (value, _unit_name(f"{rest} {label}".strip(), match[3]))
    plain = _PLAIN_UNIT.match(text)
    if plain and not _NOT_UNITS.search(plain[2].lower()):
        name = _unit_name(plain[2], plain[3])
        numeric = re.fullmatch(r"[+-]?[\d.]+(?:\s*/\s*\d+)?|[+-]?\d*\s*\\frac\{\d+\}\{\d+\}", plain[1].strip())
        known = name.split("^")[0] in _FACTORS and len(plain[2].strip()) > 1
        if (
            numeric and (known or len(plain[2].strip()) > 2 or plain[2].strip() in "m s g h L N J W V K C F")
        ) or known:
            return plain[1].strip(), name
    return text, ""


def _unit_name(label: str, power: str | None) -> str:
    words = label.replace("\\", " ").strip(" .").split()
    words = [word if any(part in _BY_CASE for part in _PARTS.split(word)) else word.lower() for word in words]
    exponent = int(power) if power else 1
    if words and words[0] in _POWERS:
        exponent = _POWERS[words.pop(0)]
    elif words and words[-1] in _POWERS:
        exponent = _POWERS[words.pop()]
    name = " ".join(words)
    for candidate in (name, name.removesuffix("s"), name.removesuffix("es")):
        candidate = _ALIASES.get(candidate, candidate)
        if candidate in _FACTORS:
            name = candidate
            break
    return name if exponent == 1 else f"{name}^{exponent}"


def _read(name: str, beside: str) -> str:
    return _BESIDE[name].get(_FACTORS.get(beside, ("", 1))[0], name) if name in _BESIDE else name


def conversion(first: str, second: str) -> Fraction | None:
    """Factor that takes a value in unit `first` to unit `second`."""
    if first == second or not first or not second:
        return Fraction(1)
    (base_a, _, power_a), (base_b, _, power_b) = first.partition("^"), second.partition("^")
    base_a, base_b = _read(base_a, base_b), _read(base_b, base_a)
    known_a, known_b = _FACTORS.get(base_a), _FACTORS.get(base_b)
    if "unit" in (base_a, base_b) and (power_a == power_b or not power_a or not power_b):
        return Fraction(1)
    if known_a and known_b:
        if known_a[0] != known_b[0] or power_a != power_b:
            return None
        return (known_a[1] / known_b[1]) ** int(power_a or 1)
    words_a = {word.rstrip("s") for word in first.split()}
    words_b = {word.rstrip("s") for word in second.split()}
    return Fraction(1) if words_a <= words_b or words_b <= words_a else None

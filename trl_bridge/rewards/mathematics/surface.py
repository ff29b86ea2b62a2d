"""One spelling for answers that differ on the surface alone: markup, spacing, Unicode, separators. Values are untouched."""

import re
import unicodedata
from functools import lru_cache


# Longer than any honest answer; what is longer is compared as a string only.
MAX_LENGTH = 2000
MAX_DEPTH = 40

# Most answers of most batches: nothing is to be done about them.
_CLEAN_NUMBER = re.compile(r"-?[0-9]{1,99}|-?\\frac\{-?[0-9]{1,99}\}\{[0-9]{1,99}\}")
_SCRIPTS = re.compile("([⁺⁻]?[⁰¹²³⁴⁵⁶⁷⁸⁹]+|[⁺⁻]?ⁿ)|([₀₁₂₃₄₅₆₇₈₉]+)")
_PLAIN_SCRIPTS = str.maketrans("⁰¹²³⁴⁵⁶⁷⁸⁹₀₁₂₃₄₅₆₇₈₉⁺⁻ⁿ", "01234567890123456789+-n")
_SYMBOLS = {
    "−": "-", "–": "-", "—": "-", "×": r"\times ", "·": r"\cdot ", "⋅": r"\cdot ", "÷": "/", "π": r"\pi ", "∞": r"\infty ",
    "≤": r"\le ", "≥": r"\ge ", "≠": r"\ne ", "∪": r"\cup ", "∩": r"\cap ", "∈": r"\in ", "°": r"^\circ ", "±": r"\pm ",
    "∓": r"\mp ", "∅": r"\emptyset ", "ℝ": r"\mathbb{R}", "≈": r"\approx ", "½": r"\frac{1}{2}", "¼": r"\frac{1}{4}",
    "¾": r"\frac{3}{4}", "⅓": r"\frac{1}{3}", "⅔": r"\frac{2}{3}", "θ": r"\theta ", "α": r"\alpha ", "β": r"\beta ",
    "’": "'", "‘": "'", "“": '"', "”": '"', "′": "'", "⟨": r"\langle ", "⟩": r"\rangle ", "…": r"\ldots ",
}  # fmt: skip
_TRANSLATE = str.maketrans(_SYMBOLS)
_CURRENCY = re.compile(r"\\\$|[$£€¥₹]|\\pounds(?![a-zA-Z])|\\euro(?![a-zA-Z])")
_MONEY = {"\\$": "dollar", "£": "pound", "€": "euro", "₹": "rupee", "\\pounds": "pound", "\\euro": "euro"}
_SIGN = r"(\\\$|[£€₹]|\\pounds(?![a-zA-Z])|\\euro(?![a-zA-Z]))"
# What ends a value: a sign that stands before it is a unit, and compared as one.
_VALUE_END = r"(?=\s*(?:$|[,;)\]}.$](?!\d)|\\text\s*\{\s*(?:and|or)\b|(?:and|or)\b))"
_PRICE = r"([+-]?\d[\d,]*(?:\{,\}\d+)*(?:\.\d+)?)"
_SIGN_BEFORE = re.compile(rf"{_SIGN}\s*{_PRICE}{_VALUE_END}")
_SIGN_BEHIND = re.compile(rf"{_PRICE}\s*{_SIGN}{_VALUE_END}")
_YUAN = re.compile(r"(?<=\d)\s*(?:元|人民币)")
_CJK_UNIT = re.compile(r"(?<=[\d})])\s*[\u4e00-\u9fff\u3040-\u30ff\uac00-\ud7af]{1,4}$")

_WORD_COMMANDS = re.compile(
    r"\\(?:text(?:normal|bf|it|rm|sf|tt|up)?|mathrm|mathbf|mathit|mathsf|mathtt|boldsymbol|bm|mbox|hbox|operatorname\*?|textup)\s*\{([^{}]*)\}"
)
_FUNCTIONS = frozenset(
    "sin cos tan cot sec csc arcsin arccos arctan sinh cosh tanh ln log exp gcd lcm det max min".split()
)
_FUNCTION_WORD = re.compile(
    r"(?<![\\a-zA-Z])(?:a(?:rc)?(sin|cos|tan)|(sinh|cosh|tanh|sin|cos|tan|cot|sec|csc|ln|log|exp))(?=\s*[(^{]|\s+[a-z](?![a-z]))"
)
# LaTeX that went through one JSON encoding too many: `\\\\frac{1}{2}`. In an environment `\\\\` ends a row.
_ESCAPED = re.compile(r"\\\\(?=[a-zA-Z]{2}|[{}%$])")
_BOX = re.compile(r"\\(?:boxed|fbox)(?=\s*\{)")
_CHOOSE = re.compile(r"\{?\s*([0-9a-zA-Z+\-]+)\s*\\choose\s*([0-9a-zA-Z+\-]+)\s*\}?")
_COMBINATIONS = re.compile(r"(?<![A-Za-z\\])C_\{?(\d+)\}?\s*\^\s*\{?(\d+)\}?")
_COMBINATIONS_CALL = re.compile(
    r"(?<![A-Za-z\\])C\s*\(\s*(\d+)\s*,\s*(\d+)\s*\)|\{?\s*\}?[_^]\s*(?:\{\s*(\d+)\s*\}|(\d))\s*C\s*_\s*(?:\{\s*(\d+)\s*\}|(\d+))"
)
_PIECES = re.compile(r"\\begin\{cases\}(.*?)\\end\{cases\}", re.DOTALL)
_CONDITION_WORD = re.compile(
    r"\\text\s*\{\s*(?:if|for|when|where)?\s*\}|(?<![a-zA-Z\\])(?:if|for|when|where)(?![a-zA-Z])"
)
_GRID = re.compile(r"\\begin\{(?:[pbvBV]?(?:small)?matrix|array|cases)\}")
_BRACED_SIGN = re.compile(r"\{\s*([+\-:=])\s*\}")
_MIXED_COMMAS = re.compile(r"(?<![\d.,])\d{1,3}(?:(?:\{,\}|,)\d{3})+(?![\d]|,\d)")
_TICK = re.compile(r"[\s,.]*[✓✔✅☑√]\uFE0F?\s*$")
_LABEL = re.compile(
    r"^\\text\s*\{(?![^{}]*\b(?:not|minus|negative|times|plus|twice|half|less|more)\b)[^{}]*[A-Za-z][^{}]*[:=]\s*\}\s*(?=\S)",
    re.IGNORECASE,
)
_REASON = re.compile(
    r"(?<=[\d})\s])\s*(?:\\text\s*\{\s*)?\(\s*(?:since|because|using|from|after|rounded|i\.e\.)\b[^(){}]*\)\s*\}?\s*$",
    re.IGNORECASE,
)
_NEGATIVE_WORD = re.compile(r"^(?:\\text\s*\{\s*)?(?:negative|minus)\s*\}?\s*(?=[\d.\\])", re.IGNORECASE)
_INFINITE_WORD = re.compile(r"\\text\s*\{\s*(?:positive\s+|\+)?(-|negative\s+|minus\s+)?infinity\s*\}", re.IGNORECASE)
_NAME_ONLY = re.compile(
    r"\\text\s*\{\s*(?:point|line|segment|ray|side|team|player|box|person)?\s*([A-Z]{1,2})\s*\.?\s*\}", re.IGNORECASE
)
_NO_NAMES = ("NO", "OK", "AM", "PM")
_TO = re.compile(r"(?<=\d)\s*\\text\s*\{\s*to\s*\}\s*(?=\d)|(?<=\d)\s+to\s+(?=\d)")
_QUAD = re.compile(r"\s*\\q?quad(?![a-zA-Z])\s*")
_NUMBER_START = re.compile(r"[+-]?\s*(?:\d|\\[dt]?frac|\\sqrt)")
_ANY_INTEGER = re.compile(
    r"\s*[,;]?\s*\(?\s*(?:(?:\\text\s*\{[^{}]*\}\s*)?([a-zA-Z])\s*\\in\s*(?:\\mathbb\s*\{?\s*Z\s*\}?|Z)"
    r"|\\text\s*\{[\s,]*(?:for|where|with)\s+(?:(?:some|any|all|every|an)\s+)?integers?[\s}]*([a-z])\s*\}?"
    r"|\\text\s*\{[\s,]*(?:for|where|with)[\s}]+([a-z])\s+(?:\\text\s*\{\s*)?is\s+an(?:y|\s)\s*integer\s*\})\s*\)?$"
)
_TRIG_DEGREE = re.compile(r"(\d+(?:\.\d+)?)\s*\^\s*(?:\{\s*\\circ\s*\}|\\circ)")
_TRIG = re.compile(r"\\(?:sin|cos|tan|cot|sec|csc)(?![a-zA-Z])")
_ORDINAL = re.compile(r"(?<=\d)\s*(?:\^\s*\{?\s*)?\\text\s*\{\s*(?:st|nd|rd|th)\s*\}\s*\}?(?![a-zA-Z])")
_WRAPPERS = re.compile(r"\\(?:underline|textcolor\{[a-zA-Z]+\}|color\{[a-zA-Z]+\}|phantom\{[^{}]*\}|ensuremath)\s*")
_ENVIRONMENT = re.compile(
    r"\\(?:begin|end)\{(?:align|aligned|gather|gathered|equation|split|displaymath|math|center)\*?\}"
)
_CASES = re.compile(r"\\begin\{cases\}([^&]*)\\end\{cases\}")
_APPROXIMATELY = re.compile(
    r"^(?:approximately|about|roughly|around|\\text\{\s*(?:approximately|about)\s*\}|\\approx)\s*", re.IGNORECASE
)
_MONEY_WORD = re.compile(r"^(?:\\text\{\s*)?(?:Rs\.?|USD|US|INR|EUR)\s*\}?\s*(?=[\d.])")
_TEXT_PREFIX = re.compile(
    r"^\\text\{\s*(?:so|thus|hence|therefore)?,?\s*(?:the|my|our)?\s*(?:final|correct)?\s*(?:answer|solution|result|value)"
    r"\s*(?:is|are|:|=)\s*:?\s*\}\s*",
    re.IGNORECASE,
)
_DROP = re.compile(
    r"\\(?:left|right|[bB]igg?[lrm]?|displaystyle|textstyle|scriptstyle|limits|nolimits|bf|rm|it|boldmath|mathstrut|null"
    r"|tiny|scriptsize|footnotesize|small|normalsize|[lL]arge|LARGE|[hH]uge|checkmark|blacksquare|square|qed)(?![a-zA-Z])"
    r"|\\!|\\\s*displaystyle"
)
_LEFT_DOT = re.compile(r"\\(?:left|right)\s*\.")
_SPACES = re.compile(
    r"(?<!\\)\\(?:[,;:> \n\t]|q?quad|(?:enspace|thinspace|hfill|space)(?![a-zA-Z]))|~|\\hspace\{[^{}]*\}|[\s\x00-\x1f\x7f]+"
)
_DELIMITERS = re.compile(r"(?<!\\)\\[()\[\]](?![a-zA-Z])")
_DEGREE = re.compile(r"\s*\^\s*(?:\{\s*\\circ\s*\}|\\circ)|\s*\\degrees?(?![a-zA-Z])")
# Minutes and seconds of arc, feet and inches, behind a number that stands by itself; `x_1'` is a derivative.
_PRIME = re.compile(
    r"(?<![\w_^{.])(\d+(?:\.\d+)?) ?(?:\^ ?\{? ?)?('|\\prime(?![a-z])) ?('|\\prime(?![a-z]))? ?\}?(?!['a-zA-Z(])"
)
_PRIME_NEXT = re.compile(r"\s*\d+(?:\.\d+)?\\text\{ (?:double)?prime")
_FRAC = re.compile(r"\\(?:[dtcsx]|nice)frac(?![a-zA-Z])")
_FRAC_BARE = re.compile(r"\\frac\s*(?:\{([^{}]*)\}|([0-9a-zA-Z]))\s*(?:\{([^{}]*)\}|([0-9a-zA-Z]))")
_FRAC_ARGUMENT = re.compile(r"\s*(\\(?:pi|theta|alpha|beta|infty)(?![a-zA-Z])|[0-9a-zA-Z])")
_SQRT_BARE = re.compile(r"\\sqrt\s*(\[[^\[\]]*\])?\s*(\d|[a-zA-Z](?![a-zA-Z{]))")
_SQRT_WORD = re.compile(r"(?<![\\a-zA-Z])sqrt\s*(?:\(([^()]*)\)|\{([^{}]*)\}|(\d+))")
_PI_WORD = re.compile(r"(?<![\\a-zA-Z])pi(?![a-zA-Z])")
_INFINITY = re.compile(r"(?<![\\a-zA-Z])(?:infinity|infty|inf|oo)(?![a-zA-Z])")
_POWER = re.compile(r"\*\*|\^\s*\(\s*([^()]*)\s*\)")
_AND_OR_TEXT = re.compile(r",?\s*\\text\{\s*,?\s*(and|or)\s*\}\s*")
_BRACED_COMMA = re.compile(r"(?<=\d)\s*(?:\{\s*,\s*\}|,\\!)\s*(?=\d{3}(?!\d))")
_DECIMAL_COMMA = re.compile(r"(?<=\d)\{\s*,\s*\}(?=\d)")
_THIN_SPACE = re.compile(r"(?<=\d)\\[,;:]\s*(?=\d{3}(?!\d))")
_GROUPED = re.compile(r"(?<![\d.,])(?!0)\d{1,3}(?:,\d{3})+(?![\d]|,\d)")
_GROUPED_SPACE = re.compile(r"\d{1,3}(?: \d{3})+(?:\.\d+)?")
_PREFIX = re.compile(
    r"^(?:so|thus|hence|therefore)?,?\s*(?:the|my|our)?\s*(?:final|correct)?\s*(?:answer|solution|result|value)\s*(?:is|are|:|=)\s*:?\s*",
    re.IGNORECASE,
)
_HOPE = re.compile(r"(?<![\s.])[\s.]*+I hope (?:it|this) is correct\.?$", re.IGNORECASE)
_SYNONYMS = {
    "leqslant": "le", "leq": "le", "geqslant": "ge", "geq": "ge", "neq": "ne", "lt": "<", "gt": ">", "dots": "ldots",
    "cdots": "ldots", "lbrace": "{", "rbrace": "}", "lbrack": "[", "rbrack": "]", "varnothing": "emptyset", "lvert": "|",
    "rvert": "|", "vert": "|", "mid": "|", "land": "wedge", "backslash": "setminus", "Bbb": "mathbb", "R": "mathbb{R}",
    "iff": "Leftrightarrow", "tg": "tan", "ctg": "cot", "arctg": "arctan", "lg": "log", "varphi": "phi",
}  # fmt: skip
_SYNONYM = re.compile(r"\\(" + "|".join(sorted(_SYNONYMS, key=len, reverse=True)) + r")(?![a-zA-Z])")


def _ascii(text: str) -> str:
    """Mathematical symbols, raised and lowered digits included, as LaTeX."""
    text = _SCRIPTS.sub(lambda m: f"{'^' if m.group(1) else '_'}{{{m.group().translate(_PLAIN_SCRIPTS)}}}", text)
    text = unicodedata.normalize("NFKC", text.translate(_TRANSLATE)).translate(_TRANSLATE)
    return re.sub(r"√\s*(?:\(([^()]*)\)|(\w+))", lambda m: rf"\sqrt{{{m.group(1) or m.group(2)}}}", text)


def _unescape(text: str) -> str:
    if r"\\begin{" in text:
        return text.replace("\\\\", "\\")
    return text if r"\begin{" in text else _ESCAPED.sub(r"\\", text)


def depth_of(text: str) -> int:
    """Largest nesting depth of brackets and braces, in linear time."""
    depth = deepest = 0
    for char in text:
        if char in "([{":
            depth += 1
            deepest = max(deepest, depth)
        elif char in ")]}":
            depth -= 1
    return deepest


def _word(match: re.Match[str]) -> str:
    content = match.group(1)
    name = content.strip()
    after_value = match.string[: match.start()].rstrip(" ~\\,;!")[-1:] in tuple("0123456789})")
    if name in _FUNCTIONS and not (name in ("min", "sec") and after_value):
        return f"\\{name} "
    if len(name) == 1 and name.isalpha() and not match.group(0).startswith((r"\text", r"\mbox")):
        return f" {name}" if content[:1].isspace() else name
    return rf"\text{{{content}}}"


def _synonym(match: re.Match[str]) -> str:
    target = _SYNONYMS[match.group(1)]
    if target in "<>[]|":
        return target
    return "\\" + target + ("" if target in "{}" else " ")


def _fraction(match: re.Match[str]) -> str:
    top = match.group(1) if match.group(1) is not None else match.group(2)
    bottom = match.group(3) if match.group(3) is not None else match.group(4)
    return rf"\frac{{{top}}}{{{bottom}}}"


def _brace_fractions(text: str) -> str:
    r"""Braces around the arguments that `_FRAC_BARE` cannot see, those beside nested ones: `\frac{\sqrt{3}}2`, `\frac\pi2`."""
    position = 0
    while (position := text.find(r"\frac", position)) >= 0:
        position += len(r"\frac")
        end = position
        for _ in range(2):
            start = end + len(text[end:]) - len(text[end:].lstrip())
            if text.startswith("{", start):
                end = closing(text, start) + 1
                if end == 0:
                    return text
            elif argument := _FRAC_ARGUMENT.match(text, end):
                braced = f"{{{argument.group(1)}}}"
                text = text[:end] + braced + text[argument.end() :]
                end += len(braced)
            else:
                break
    return text


def _ungroup(text: str) -> str:
    """Drop the thousands separators of `10,000`, but leave the list `(1,234)` and the list `1, 234` alone."""
    text = _BRACED_COMMA.sub("", text)
    text = _DECIMAL_COMMA.sub(".", text)
    if not _GROUPED.search(text):
        return text
    spaced = ", " in text

    def without_commas(match: re.Match[str]) -> str:
        before = text[: match.start()]
        inside = sum(before.count(c) for c in "([") + before.count(r"\{") > (
            sum(before.count(c) for c in ")]") + before.count(r"\}")
        )
        # Inside brackets a comma with no space after it separates, unless commas with a space do.
        return match.group() if inside and not spaced else match.group().replace(",", "")

    return _GROUPED.sub(without_commas, text)


@lru_cache(maxsize=65536)
def clean(raw: str) -> str | None:
    r"""
    Canonical spelling of an answer or a gold; `None` for what no honest answer is (longer than 2,000 characters, nested
    deeper than 40).

    Delimiters (`$`, `\(`), sizes (`\left`), spacing, `\dfrac`, `\frac12`, `\sqrt2`, Unicode symbols, thousands
    separators, currency, degrees, a final full stop and "the answer is" go or get one form. No value changes.
    """
    if _CLEAN_NUMBER.fullmatch(raw):
        return raw
    if len(raw) > 2 * MAX_LENGTH:
        return None
    text = raw.encode("utf-8", "replace").decode()
    if not text.isascii():
        text = _YUAN.sub(r"\\text{ yuan}", _TICK.sub("", text.strip(" $")))
        text = _ascii(_CJK_UNIT.sub("", text))
    text = _unescape(text)
    if depth_of(text) > MAX_DEPTH:
        return None
    text = text.strip().strip("`").strip()
    text = re.sub(r"^(?:\*\*|__)(.*)(?:\*\*|__)$", r"\1", text, flags=re.DOTALL)
    text = _HOPE.sub("", _PREFIX.sub("", text))
    text = _THIN_SPACE.sub("", _BOX.sub("", text))
    text = _MIXED_COMMAS.sub(lambda m: re.sub(r"\{,\}|,", "", m.group()) if "{" in m.group() else m.group(), text)
    text = _BRACED_SIGN.sub(r"\1", _with_currency(text))
    text = _ungroup(text)
    text = _WORD_COMMANDS.sub(_word, _LEFT_DOT.sub("", text))
    text = _DROP.sub("", _DELIMITERS.sub(" ", text))
    text = _REASON.sub("", _LABEL.sub("", text.strip()))
    text = _INFINITE_WORD.sub(lambda m: r"-\infty " if m[1] else r"\infty ", text.replace(r"\nexists", r"\text{DNE}"))
    text = _SYNONYM.sub(_synonym, text)
    text = _AND_OR_TEXT.sub(r" \1 ", _TEXT_PREFIX.sub("", text))
    text = _ORDINAL.sub("", _WRAPPERS.sub("", text))
    text = _CASES.sub(lambda m: ", ".join(row for row in m.group(1).split(r"\\") if row.strip()), text)
    text = _PIECES.sub(_pieces, text)
    if _ENVIRONMENT.search(text):
        text = _ENVIRONMENT.sub(" ", text)
        text = text if _GRID.search(text) else text.replace("&", "")
    text = _TO.sub(":", _parted(text.strip()))
    text = _SPACES.sub(" ", text)
    if _TRIG.search(text):
        text = _TRIG_DEGREE.sub(r"\\frac{\1\\pi}{180}", text)
    text = _MONEY_WORD.sub("", _APPROXIMATELY.sub("", _with_degrees(text).strip()))
    text = _FRAC.sub(r"\\frac", text)
    text = _brace_fractions(_FRAC_BARE.sub(_fraction, text))
    text = _SQRT_WORD.sub(lambda m: rf"\sqrt{{{next(g for g in m.groups() if g is not None)}}}", text)
    text = _SQRT_BARE.sub(lambda m: rf"\sqrt{m.group(1) or ''}{{{m.group(2)}}}", text)
    text = _FUNCTION_WORD.sub(lambda m: rf"\arc{m.group(1)} " if m.group(1) else rf"\{m.group(2)} ", text)
    text = _INFINITY.sub(r"\\infty ", _PI_WORD.sub(r"\\pi ", text))
    text = re.sub(r"\\log\s*_\s*(?:\{\s*e\s*\}|e(?![a-z]))", r"\\ln ", text)
    text = _POWER.sub(lambda m: "^" if m.group(1) is None else f"^{{{m.group(1)}}}", text)
    text = _NEGATIVE_WORD.sub("-", _CHOOSE.sub(r"\\binom{\1}{\2}", text))
    text = _COMBINATIONS_CALL.sub(lambda m: rf"\binom{{{m[1] or m[3] or m[4]}}}{{{m[2] or m[5] or m[6]}}}", text)
    text = _COMBINATIONS.sub(r"\\binom{\1}{\2}", text.replace("...", r"\ldots "))
    # "2k pi, k an integer": which letter runs over the integers goes without saying.
    free = _ANY_INTEGER.search(text)
    text = _strip(text[: free.start()] if free and free[free.lastindex] in text[: free.start()] else text)  # type: ignore[index]
    text = _turned(text)
    if (name := _NAME_ONLY.fullmatch(text)) and name[1].isupper() and name[1] not in _NO_NAMES:
        return name[1]
    if _GROUPED_SPACE.fullmatch(text):
        text = text.replace(" ", "")
    return text if len(text) <= MAX_LENGTH else None


def _with_currency(text: str) -> str:
    """A currency sign beside a number as a unit behind it; any other sign of currency is dropped."""
    text = _SIGN_BEFORE.sub(lambda m: rf"{m[2]}\text{{ {_MONEY[m[1]]}}}", text)
    text = _SIGN_BEHIND.sub(lambda m: rf"{m[1]}\text{{ {_MONEY[m[2]]}}}", text)
    return _CURRENCY.sub(lambda m: "" if m.group() != "$" else " ", text)


def _with_degrees(text: str) -> str:
    """A degree sign that ends a value as a unit, and primes behind a number; any other degree sign is dropped."""

    def unit(match: re.Match[str]) -> str:
        rest = match.string[match.end() :]
        return r"\text{ degree}" if re.match(_VALUE_END, rest) or _PRIME_NEXT.match(rest) else ""

    if "'" in text or r"\prime" in text:
        text = _PRIME.sub(lambda m: rf"{m[1]}\text{{ {'double' if m[3] else ''}prime}}", text)
    return _DEGREE.sub(unit, text)


def _pieces(match: re.Match[str]) -> str:
    """Rows of a piecewise function in one spelling: no comma before the condition, no "if"."""
    rows = []
    for row in match[1].split(r"\\"):
        value, separator, condition = row.partition("&")
        condition = _CONDITION_WORD.sub(" ", condition).strip(" ,.")
        if row.strip():
            rows.append(f"{value.strip(' ,')}&{condition}" if separator else row.strip())
    return r"\begin{cases}" + r"\\".join(rows) + r"\end{cases}"


def _parted(text: str) -> str:
    r"""Commas in place of line breaks (`\\`), and of a wide gap between two assignments or two numbers."""
    if _GRID.search(text):
        return text
    text = re.sub(r"\s*\\\\(?:\[[^\]]*\])?\s*", ", ", text).strip(", ")
    parts = _QUAD.split(text)
    if len(parts) > 1 and all("=" in part for part in parts):
        return ", ".join(part.strip(" ,;") for part in parts)
    if len(parts) > 1 and all(_NUMBER_START.match(part) for part in parts):
        return ", ".join(part.strip(" ,;") for part in parts)
    return text


def _turned(text: str) -> str:
    """Open ends written as turned brackets, `]2, 3[`, as round ones."""
    if not (text.startswith("]") or text.endswith("[")):
        return text
    return re.sub(
        r"([\[\]])([^\[\]()]*[,;][^\[\]()]*)([\[\]])",
        lambda m: ("(" if m[1] == "]" else "[") + m[2] + (")" if m[3] == "[" else "]"),
        text,
    )


def _strip(text: str) -> str:
    """Strip the final punctuation and braces around the whole."""
    while True:
        before = text
        text = text.strip().rstrip(";:").strip()
        if text.endswith((".", ",")):
            text = text[:-1]
        text = text.rstrip("\\") if text.endswith("\\") else text
        if text.startswith("{") and closing(text, 0) == len(text) - 1:
            text = text[1:-1]
        if text == before:
            return text


def closing(text: str, start: int) -> int:
    r"""Index of the bracket that closes the one at `start`, of any kind (`(1, 2]` too); -1 where it is never closed."""
    depth = 0
    for index in range(start, len(text)):
        char = text[index]
        if char in "([{":
            depth += 1
        elif char in ")]}":
            depth -= 1
            if depth == 0:
                return index
    return -1

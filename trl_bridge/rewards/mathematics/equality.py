"""Whether two answers are the same, as far as that needs no computer algebra: true, false, or a question for a worker."""

import re
from collections.abc import Callable
from fractions import Fraction
from functools import lru_cache

from .numbers import exact
from .structure import Node, parse
from .surface import clean
from .units import conversion


Verdict = bool | None
Leaf = Callable[[Node, Node, Fraction], Verdict]
"""Comparison of two nodes that structure alone does not decide; the last argument is the first one's unit factor."""

_NAME = re.compile(
    r"(?:\\(?:angle|triangle|text|mathbb|vec|overline|overrightarrow|hat|bar|lambda|theta|alpha|beta|mu|sigma|phi|omega|Delta)(?![a-zA-Z])\s*)?"
    r"(?:\{[^{}]*\}|[A-Za-z]{1,3})?'*(?:_(?:\{[^{}]*\}|\w))?(?:\([^()]*\))?(?:\^\{?\\?(?:-1|prime|circ)\}?(?:\([^()]*\))?)?"
)
_DESCRIBED = re.compile(r"\\(?:lim|sum|prod|int)(?![a-zA-Z])")
_SYMBOLS_ONLY = re.compile(
    r"(?:[A-Za-z]{1,2}(?:_(?:\{\w+\}|\w))?|\\[a-z]+|[+\-*/ ]|\\cdot|\\text\{[^{}]*\}|\\frac|[{}|])+"
)
_LETTER = re.compile(r"\(?\s*(?:\\text\s*\{\s*)?\(?\s*([A-Ja-j])\s*\)?\s*\.?\s*\}?\s*\)?")
_LETTER_AND_TEXT = re.compile(r"\(?\s*(?:\\text\s*\{\s*)?\(?\s*([A-J])\s*(?:\)|[.:](?=\s))\s*\}?\s*\S.*", re.DOTALL)
_LETTER_AND_VALUE = re.compile(r"\(?\\text\s*\{\s*\(?[A-J]\)?[.:]?\s*\}\)?[.:]?\s*([\d.,/]+)")
_SPACE = re.compile(r"(?<!\d) +| +(?!\d| )")
# `-x`, `\\ln x`, `|x|`, `x + x`: of these the value is asked, they are no names.
_OPERATION_ON_UNKNOWN = re.compile(
    r"\\(?:ln|log|sqrt|sin|cos|tan|exp)(?![a-zA-Z])|\|\s*[xyt]\s*\|(?=$)|^([a-z])\s*(?:[+\-*/]\s*)?\1$|^[x-z]\s*\^\s*\{?-1\}?$"
)
_DECIMAL_COMMA = re.compile(r"[+-]?\d+,\d+")
_CONSTANT = re.compile(
    r"(.*[a-zA-Z].*?)\s*\+\s*([CcKk](?:_\{?\d\}?)?|\\text\s*\{\s*(?:constant|const\.?|C)\s*\})", re.DOTALL
)
_RANKS = {kind: rank for rank, kind in enumerate(
    ("expression", "text", "ratio", "based", "congruence", "equation", "list", "set", "tuple", "sequence", "interval", "inequality", "union",
     "intersection", "difference", "matrix", "determinant", "row"))}  # fmt: skip
_REGIONS = ("interval", "inequality", "union", "intersection", "difference")


def squash(text: str) -> str:
    """A text without its spaces, those between two digits excepted: `1 2` is not `12`."""
    return _SPACE.sub("", text)


def compare(first: str, second: str, leaf: Leaf) -> Verdict:
    """Whether two answers are the same; symmetric in its arguments."""
    if first == second:
        return bool(first.strip())
    a, b = clean(first), clean(second)
    if not a or not b:
        return False
    if squash(a) == squash(b):
        return True
    if (letters := _letters(a, b)) is not None:
        return letters
    verdict = same(parse(a), parse(b), leaf)
    if verdict is False and (decimals := _decimal_commas(a, b)) is not None:
        return decimals
    if verdict is not True and (constants := _other_constant(a, b)) is not None:
        return same(parse(constants[0]), parse(constants[1]), leaf)
    return verdict


def _decimal_commas(a: str, b: str) -> Verdict:
    """`3,14` as 3.14, where the other side is one number; `None` where that is not the case."""
    for one, two in ((a, b), (b, a)):
        if _DECIMAL_COMMA.fullmatch(one) and (value := exact(two)) is not None:
            return exact(one.replace(",", ".")) == value
    return None


def _other_constant(a: str, b: str) -> tuple[str, str] | None:
    """Two antiderivatives whose constants of integration have different letters, with one letter in both."""
    found = [_CONSTANT.fullmatch(text) for text in (a, b)]
    if not all(found) or "C" not in (found[0][2], found[1][2]):  # type: ignore[index]
        return None
    # In `y = m x + c` and `a + C` these letters may be anything: only beside a power, a number or a function are they constants.
    if not all(re.search(r"[\^\\\d]", match[1]) and "=" not in match[1] for match in found):  # type: ignore[index]
        return None
    if found[0][2] == found[1][2] or any(match[2] in match[1] for match in found):  # type: ignore[index]
        return None
    return tuple(f"{match[1]}+C" for match in found)  # type: ignore[index, return-value]


def _letters(a: str, b: str) -> Verdict:
    """Letters of multiple choice: `\\text{(B)}`, `B.`, `b` and, against a bare letter, `(B) 12` are one."""
    one, two = _LETTER.fullmatch(a), _LETTER.fullmatch(b)
    if one and two:
        return one[1] == two[1] or (one[1].lower() == two[1].lower() and one[1].lower() not in "ei")
    single, other = (one, b) if one else (two, a)
    if single is not None and single[1].isupper() and (match := _LETTER_AND_TEXT.fullmatch(other)):
        return match[1] == single[1] or None
    if single is None and (value := _LETTER_AND_VALUE.fullmatch(a) or _LETTER_AND_VALUE.fullmatch(b)):
        # The value of a choice without its letter.
        other = b if value.string == a else a
        return True if not _LETTER_AND_VALUE.fullmatch(other) and exact(value[1]) == (exact(other) or "") else None
    several = _choices(a), _choices(b)
    separated = any(re.search(r"[,;]|\band\b", text) for text in (a, b))
    return several[0] == several[1] if separated and all(several) else None


def _choices(text: str) -> str:
    """Several letters of multiple choice, however they are separated: `ACD`, `A, C, D`, `(A), (C) and (D)`."""
    letters = re.sub(r"\\text|\band\b|[{}(),;\s]", "", text)
    distinct = 1 < len(letters) == len(set(letters)) and re.fullmatch("[A-H]+", letters)
    return "".join(sorted(letters)) if distinct else ""


def same(a: Node, b: Node, leaf: Leaf) -> Verdict:
    """Whether two shapes are the same; see [`compare`]."""
    if a == b:
        return True
    if _RANKS[a.kind] > _RANKS[b.kind]:
        return same(b, a, lambda x, y, factor: leaf(y, x, 1 / factor))
    if a.kind == b.kind:
        return _same_kind(a, b, leaf)
    kinds = (a.kind, b.kind)
    if b.kind == "equation" and a.kind in ("expression", "text", "ratio", "based"):
        assigns = _assigns(b, leaf)
        return same(a, b.items[1], leaf) if assigns else assigns
    if kinds == ("equation", "list") and _names(b) and (named := _by_component(a)) is not None:
        return _same_list(named, b, leaf)
    if kinds == ("congruence", "equation"):
        return leaf(a, b.items[1], Fraction(1)) if is_name(b.items[0].text) else False
    if a.kind == "equation":
        assigns = _assigns(a, leaf)
        return same(a.items[1], b, leaf) if assigns else assigns
    if kinds == ("expression", "ratio"):
        return _same_ratio(a, b)
    if kinds == ("expression", "congruence"):
        return _either(same(a, b.items[0], leaf), leaf(a, b, Fraction(1)))
    if a.kind in ("expression", "text") and b.kind in ("set", "list"):
        return _collapsed(a, b, leaf)
    if kinds == ("list", "set"):
        return _unordered(_values(a), _values(b), leaf)
    if a.kind == "list" and b.kind in ("tuple", "sequence"):
        if a.text == "or":
            return False  # one of two numbers is no point
        return _ordered(_by_name(a), b.items, leaf)
    if kinds == ("tuple", "sequence"):
        return _ordered(a.items, b.items, leaf)
    if kinds == ("tuple", "matrix") and all(len(row.items) == 1 for row in b.items):
        return _ordered(a.items, tuple(row.items[0] for row in b.items), leaf)
    if a.kind == "tuple" and b.kind == "interval":
        return _ordered(a.items, b.items, leaf) if b.text == "()" and len(a.items) == 2 else False
    if a.kind == "list" and b.kind in _REGIONS and all(item.kind in (*_REGIONS, "tuple") for item in a.items):
        return leaf(a, b, Fraction(1))
    if b.kind in _REGIONS and (a.kind in (*_REGIONS, "set") or (a.kind == "tuple" and len(a.items) == 2)):
        return leaf(a, b, Fraction(1))
    if a.kind == "expression" and b.kind in ("matrix", "determinant", "difference", "intersection", "union"):
        return leaf(a, b, Fraction(1))
    return False


def _same_kind(a: Node, b: Node, leaf: Leaf) -> Verdict:
    if a.kind == "expression":
        return _same_expression(a, b, leaf)
    if a.kind == "congruence":
        return False if a.text and b.text and a.text != b.text else leaf(a, b, Fraction(1))
    if a.kind == "ratio":
        return _same_parts(a, b)
    if a.kind in ("text", "based"):
        return a.text == b.text or squash(a.text) == squash(b.text)
    if a.kind == "equation":
        left = same(a.items[0], b.items[0], _spelling)
        if left and _assigns(a, leaf):
            return same(a.items[1], b.items[1], leaf)
        if a.items[0].kind == "tuple" or b.items[0].kind == "tuple":
            parts = _by_component(a), _by_component(b)
            return _same_list(*parts, leaf) if all(parts) else False  # type: ignore[arg-type]
        return leaf(a, b, Fraction(1))
    if a.kind == "set":
        return _unordered(tuple(dict.fromkeys(_values(a))), tuple(dict.fromkeys(_values(b))), leaf)
    if a.kind == "list":
        return _same_list(a, b, leaf)
    if a.kind == "interval":
        return _ordered(a.items, b.items, leaf) if a.text == b.text else False
    if a.kind in ("tuple", "sequence", "row", "matrix"):
        return _ordered(a.items, b.items, leaf)
    return leaf(a, b, Fraction(1))


def _same_list(a: Node, b: Node, leaf: Leaf) -> Verdict:
    named = (_names(a), _names(b))
    if all(named) and named[0] != named[1] and not _indexed(*named):
        return False
    if all(named) and named[0] == named[1] and len(set(named[0])) == len(named[0]):
        return _ordered(_by_name(a), _by_name(b), leaf)
    members, others = _values(a), _values(b)
    if all(item.kind == "tuple" for item in (*members, *others)):
        # Solutions, of which it does not matter how often they are listed. Numbers may be roots with multiplicities.
        members, others = tuple(dict.fromkeys(members)), tuple(dict.fromkeys(others))
    return _unordered(members, others, leaf)


def _same_expression(a: Node, b: Node, leaf: Leaf) -> Verdict:
    percents = (a.unit.startswith("%"), b.unit.startswith("%"))
    if any(percents) and not all(percents):
        if (b.unit if percents[0] else a.unit) != "":
            return False
        # 50% is 50 where the sign is a mere label, and 1/2 where it is a value; 0.5 is always one half.
        small = any((value := exact(node.text)) is not None and abs(value) < 1 for node in (a, b))
        by_label = False if small else _value(a, b, Fraction(1), leaf)
        return by_label or _either(by_label, _value(a, b, Fraction(1, 100) if percents[0] else Fraction(100), leaf))
    factor = conversion(a.unit.lstrip("% "), b.unit.lstrip("% "))
    return False if factor is None else _value(a, b, factor, leaf)


def _same_ratio(a: Node, b: Node) -> bool:
    """`2/3` and `2:3`; never `6:30`, which may be a time, and any number but a fraction."""
    match = re.fullmatch(r"([1-9]\d*):([1-9]\d*)", b.text)
    if match is None or not ("/" in a.text or "frac" in a.text) or a.unit:
        return False
    return exact(a.text) == Fraction(int(match[1]), int(match[2]))


def _same_parts(a: Node, b: Node) -> bool:
    """Two ratios, or two times. `6:8` is `3:4`; what may both be times (`1:15`, `3:45`) is compared as written."""
    if (
        a.text == b.text
        or (a.unit and not b.unit and a.unit == b.text)
        or (b.unit and not a.unit and b.unit == a.text)
    ):
        return True
    parts = [re.fullmatch(r"([1-9]\d*)((?::[1-9]\d*)+)", node.text) for node in (a, b)]
    if not all(parts) or a.unit or b.unit or all(re.fullmatch(r"\d\d?(?::[0-5]\d)+", n.text) for n in (a, b)):
        return False
    one, two = ([int(part) for part in node.text.split(":")] for node in (a, b))
    return len(one) == len(two) and all(x * two[0] == y * one[0] for x, y in zip(one, two, strict=True))


def _either(a: Verdict, b: Verdict) -> Verdict:
    return True if a or b else (None if a is None or b is None else False)


def _value(a: Node, b: Node, factor: Fraction, leaf: Leaf) -> Verdict:
    one, two = exact(a.text), exact(b.text)
    if one is not None and two is not None:
        return one * factor == two
    if factor == 1 and squash(a.text) == squash(b.text):
        return True
    return leaf(a, b, factor)


def _ordered(a: tuple[Node, ...], b: tuple[Node, ...], leaf: Leaf) -> Verdict:
    if len(a) != len(b):
        return False
    verdict: Verdict = True
    for one, two in zip(a, b, strict=True):
        current = same(one, two, leaf)
        if current is False:
            return False
        verdict = None if current is None else verdict
    return verdict


def _unordered(a: tuple[Node, ...], b: tuple[Node, ...], leaf: Leaf) -> Verdict:
    """Multisets: equality is an equivalence, so the first match found for an element is as good as any."""
    if len(a) != len(b) or len(a) > 40:
        return False
    left, unsure = list(b), False
    for one in a:
        verdicts = []
        for index, two in enumerate(left):
            verdict = same(one, two, leaf)
            if verdict:
                del left[index]
                break
            verdicts.append(verdict)
        else:
            if None not in verdicts:
                return False
            unsure = True
    return None if unsure else True


def _collapsed(a: Node, b: Node, leaf: Leaf) -> Verdict:
    """One value against a set of one, or against the same value written several times ("3/4 or 0.75")."""
    if len(b.items) == 1:
        return same(a, b.items[0], leaf)
    if b.kind == "list" and b.text == "or" and 1 < len(b.items) <= 4:
        return _ordered((a,) * len(b.items), b.items, leaf)
    return False


def _names(node: Node) -> tuple[str, ...]:
    """Sorted names that a list of assignments assigns to; empty unless all its members are assignments."""
    if all(item.kind == "equation" for item in node.items):
        return tuple(sorted(squash(item.items[0].text) for item in node.items))
    return ()


def _indexed(first: tuple[str, ...], second: tuple[str, ...]) -> bool:
    """Whether the names differ by an index only, and one side has none: "x_1 = 2, x_2 = 3" and "x = 2 or x = 3"."""
    bare = {re.sub(r"_(?:\{\d+\}|\d)$", "", name) for name in (*first, *second)}
    return len(bare) == 1 and any(set(names) == bare for names in (first, second))


def _by_name(node: Node) -> tuple[Node, ...]:
    names = _names(node)
    if names and len(set(names)) == len(names):
        items = sorted(node.items, key=lambda item: squash(item.items[0].text))
        return tuple(item.items[1] for item in items)
    return node.items


def _by_component(node: Node) -> Node | None:
    """`(y, x) = (1, 2)` as a list of assignments, `y = 1, x = 2`."""
    left, right = node.items
    if left.kind != "tuple" or right.kind != "tuple" or len(left.items) != len(right.items):
        return None
    return Node("list", "", tuple(Node("equation", "=", pair) for pair in zip(left.items, right.items, strict=True)))


def _values(node: Node) -> tuple[Node, ...]:
    """Members without the variable's name, where there is one name ("x = 1, 2", "x = 1 or x = 2")."""
    heads = {squash(item.items[0].text) for item in node.items if item.kind == "equation"}
    if not heads or (len(heads) > 1 and len(heads) < len(node.items)):
        return node.items
    values: list[Node] = []
    for item in node.items:
        value = item.items[1] if item.kind == "equation" and is_name(item.items[0].text) else item
        values.extend(value.items if value.kind == "list" else (value,))
    return tuple(values)


@lru_cache(maxsize=4096)
def is_name(text: str) -> bool:
    """Whether the left side of an equation only names its right side: `x`, `f(x)`, `\\angle ABC`, `m + n`, `Area`."""
    text = text.strip()
    if not text or exact(text) is not None or text[0] in "+-" or _OPERATION_ON_UNKNOWN.search(text):
        return False
    if _DESCRIBED.match(text):
        return True
    if text.startswith("(") and re.fullmatch(r"\(\s*[a-zA-Z](?:_\w)?(?:\s*,\s*[a-zA-Z](?:_\w)?)*\s*\)", text):
        return True
    return bool(_NAME.fullmatch(text) or _SYMBOLS_ONLY.fullmatch(text)) or text.replace(" ", "").isalpha()


def _assigns(node: Node, leaf: Leaf) -> Verdict:
    left, right = node.items
    if left.kind == "tuple":
        return all(item.kind == "expression" and is_name(item.text) for item in left.items)
    if left.kind == "text" or is_name(left.text) or (":" in left.text and all(map(is_name, left.text.split(":")))):
        return True
    # `3 \times 4 = 12` is 12; `9 = 1` and `2x = 12` are not.
    if re.search(r"(?<![\\a-zA-Z])[a-zA-Z](?![a-zA-Z])", re.sub(r"\\[a-zA-Z]+", "", left.text)):
        return False
    return same(left, right, leaf) if right.kind == "expression" else False


def _spelling(a: Node, b: Node, factor: Fraction) -> Verdict:
    return False


def quick(first: str, second: str) -> Verdict:
    """Verdict without computer algebra; `None` where a worker has to look."""
    return compare(first, second, lambda a, b, factor: None)

"""Shape of an answer: list, tuple, set, interval, union, matrix, relation or a leaf. Leaves are left to the parser."""

import re
from dataclasses import dataclass
from functools import lru_cache

from .numbers import exact
from .surface import closing
from .units import in_one_unit, split_scale, split_unit


@dataclass(frozen=True)
class Node:
    r"""
    One answer's shape.

    Attributes:
        kind (`str`):
            `"expression"` (a leaf), `"text"`, `"list"` (bare, unordered), `"tuple"` (round brackets), `"interval"`,
            `"sequence"` (three or more in square brackets), `"set"`, `"union"`, `"difference"`, `"intersection"`,
            `"matrix"` (rows of the same length), `"equation"`, `"inequality"` (a chain), `"congruence"` (residue and modulus) or `"based"` (`1011_2`).
        text (`str`):
            Its spelling: a leaf's own; an interval's two brackets; a chain's operators, separated by spaces.
        items (`tuple`):
            Children, in order.
        unit (`str`):
            Unit of a leaf, `"%"` included.
    """

    kind: str
    text: str = ""
    items: tuple["Node", ...] = ()
    unit: str = ""


_RELATION = re.compile(r"\\(?:le|ge|ne|approx|equiv|simeq|sim|cong|in)(?![a-zA-Z])|<=|>=|:=|!=|\\?[<>]|=")
_RELATION_NAMES = {"<=": r"\le", ">=": r"\ge", ":=": "=", "!=": r"\ne", r"\<": "<", r"\>": ">", r"\simeq": r"\approx",
                   r"\cong": r"\approx", r"\sim": r"\approx"}  # fmt: skip
_SEPARATOR = re.compile(r"[,;]|(?<![a-zA-Z\\])(?:and|or)(?![a-zA-Z])")
_SEMICOLON = re.compile(";")
_SET_OPERATION = re.compile(r"\\(?:cup|cap|setminus)(?![a-zA-Z])|(?<=[)\]}])\s*[Uu∪]\s*(?=[(\[\\])")
_BUILDER = re.compile(r"\\\{\s*([a-zA-Z])\s*(?:\\in\s*(?:\\mathbb\{[A-Z]\})?\s*)?(?:\||:)\s*(.*)\\\}", re.DOTALL)
_MATRIX = re.compile(r"\\begin\{([pbvBV]?(?:small)?matrix|array)\}(?:\s*\{[clr|\s]*\})?(.*)\\end\{\1\}", re.DOTALL)
_BASED = re.compile(
    r"\(?\s*([0-9A-Fa-f]+(?:\.[0-9A-Fa-f]+)?)\s*\)?\s*_\s*(?:\{\s*(?:\\text\s*\{)?\s*([0-9a-z]+)\s*\}?\s*\}|(\d+))"
)
_MODULO = re.compile(
    r"([^,;]*?)\s*(?:\\pmod\s*(?:\{([^{}]+)\}|(\d+|[a-z]))|\(\s*\\?(?:mod|bmod|text\s*\{\s*mod\s*\})\s*([^()]+)\))"
)
_BASE_WORDS = {"two": "2", "three": "3", "four": "4", "five": "5", "six": "6", "seven": "7", "eight": "8", "nine": "9",
               "ten": "10", "twelve": "12", "sixteen": "16"}  # fmt: skip
_TEXT_COMMAND = re.compile(r"\\text\s*\{([^{}]*)\}")
_WORD = re.compile(r"(?<![\\a-zA-Z])[A-Za-z]{3,}")
_MATH = re.compile(r"[\\^_=<>+*/|\d]")
_SIGNED = re.compile(r"\\(pm|mp)(?![a-zA-Z])|\+(?:\s*/\s*)?-(?=\s*[\d\\(])")
_CLOCK = re.compile(r"0?(\d\d?)(:\d\d)(?::00|(:\d\d))?([ap]m)?")
_COLON = re.compile(r"\s*\d+(?:\.\d+)?(?:\s*:\s*\d+(?:\.\d+)?)+\s*(?:\\?[ap]\.?m\.?)?\s*", re.IGNORECASE)
_EMPTY = {"no solution", "no solutions", "none", "empty set", "the empty set", "no real solution", "no real solutions"}
_NO_SOLUTION = re.compile(
    r"(?:there (?:is|are)|(?:the |this )?(?:equation|system|inequality|problem) has|it has)?\s*no\s+"
    r"(?:(?:real|integer|such|valid|possible|positive)\s+)*(?:solutions?|roots?|values?|numbers?|integers?)(?:\s+exists?)?"
)
_UNDEFINED = {"dne", "does not exist", "undefined", "not defined", "do not exist", "doesn't exist", "nonexistent"}
_DOES_NOT_EXIST = re.compile(r"(?:the |this )?(?:limit|it|value|integral|sum|derivative) (?:does not|doesn't) exist")
# One of i, j, k as a unit vector: `\hat{i}`, or plain beside another of them.
_UNIT_VECTOR = r"(?:\\(?:hat|vec|widehat|mathbf|boldsymbol|bar)\s*\{?\s*(?:\\[ij]math|([ijk]))\s*\}?|([ijk]))"
_VECTOR_TERM = re.compile(rf"\s*([+-]?)\s*((?:[^+\-ijk()]|\([^()]*\))*?)\s*{_UNIT_VECTOR}\s*")
_I_AND_K = re.compile(r"\s*[+-]?\s*\d*\s*[ik]\s*[+-]\s*\d*\s*[ik]\s*")
_ENGINEERS_COMPLEX = re.compile(r"[+-]?\s*[\d.]+\s*[+-]\s*[\d.]*\s*j")
_ALL_REALS = {
    "all real numbers",
    "all reals",
    "any real number",
    "the set of all real numbers",
    "all real number",
    "real numbers",
}


def split_top(text: str, pattern: re.Pattern[str]) -> tuple[list[str], list[str]]:
    """Split where `pattern` matches outside brackets and commands' braces; returns the parts and the separators."""
    parts, separators, depth, start, index = [], [], 0, 0, 0
    matches = {match.start(): match for match in pattern.finditer(text)}
    while index < len(text):
        char = text[index]
        if depth == 0 and (match := matches.get(index)) is not None:
            parts.append(text[start:index])
            separators.append(match.group().strip())
            start = index = match.end()
            continue
        if text.startswith((r"\begin{", r"\langle"), index):
            depth += 1
        elif text.startswith((r"\end{", r"\rangle"), index):
            depth -= 1
        if char in "([{":
            depth += 1
        elif char in ")]}":
            depth = max(depth - 1, 0)
        index += 1
    parts.append(text[start:])
    return parts, separators


@lru_cache(maxsize=32768)
def parse(text: str) -> Node:
    """
    Shape of a cleaned answer, in time linear in its length at each of at most 40 levels. What fits none is an
    `"expression"`.
    """
    text = text.strip()
    if exact(text) is not None:
        return Node("expression", text)
    if (quantity := in_one_unit(text)) is not None:
        return Node("expression", quantity[0], (), quantity[1])
    if (node := _worded(text)) is not None:
        return node
    if match := _BUILDER.fullmatch(text):
        return parse(match[2].strip())
    parts, separators = split_top(text, _SEPARATOR)
    if {",", ";"} <= set(separators) and (node := _grouped(text)) is not None:
        return node
    if separators:
        return _list([part for part in (part.strip() for part in parts) if part], separators)
    return _single(text)


def _worded(text: str) -> Node | None:
    """Plain text, and the words that stand for sets."""
    words = " ".join(_TEXT_COMMAND.sub(r" \1 ", text).replace("\\", " ").split()).lower().strip(" .")
    if words in _ALL_REALS or text in (r"\mathbb{R}", r"\mathbb{R} "):
        return Node("interval", "()", (Node("expression", r"-\infty"), Node("expression", r"\infty")))
    if re.fullmatch(r"\\mathbb\s*\{?\s*[NZQC]\s*\}?\s*(?:[\^_]\s*\{?[+*\->0-9]+\}?)*", text):
        return Node("text", text.replace(" ", ""))
    if words in _EMPTY or _NO_SOLUTION.fullmatch(words) or text.strip() in (r"\emptyset", r"\{\}", r"\{ \}"):
        return Node("set")
    if words in _UNDEFINED or words.replace(".", "").replace(" ", "") == "dne" or _DOES_NOT_EXIST.fullmatch(words):
        return Node("text", "undefined")
    if words == "no":
        return Node("text", words)
    if _COLON.fullmatch(words):
        bare = re.sub(r"[\s.]", "", words)
        # A time that does not say which half of the day is compared without it.
        halfless = re.sub(r"\\?[ap]m$", "", bare)
        return Node("ratio", _CLOCK.sub(_clock, bare), (), _CLOCK.sub(_clock, halfless) if halfless != bare else "")
    if re.fullmatch(r"\\text\s*\{[^{}]*\}", text):
        inner = text[text.index("{") + 1 : -1].strip()
        if exact(inner) is not None:
            return Node("expression", inner)
        if re.fullmatch(r"[A-Z](?:\s*(?:,|and|,\s*and)\s*[A-Z])+", inner):
            return parse(inner)
        number = re.match(r"[+-]?[\d.]", inner) or (_MATH.search(inner) and not _WORD.search(inner))
        return parse(inner) if number else Node("text", _plain(inner))
    bare = _TEXT_COMMAND.sub(r" \1 ", text)
    if re.fullmatch(r"[a-df-hj-np-tv-z]{3}", bare.strip()):
        return None  # `xyz` and `abc` are products.
    if re.fullmatch(r"[A-Z](?:\s*(?:,|and|or|,\s*and)\s*[A-Z])+", bare.strip()):
        return None  # "B and C" is a list.
    if re.fullmatch(r"[A-Za-z]{3,}[A-Za-z ]* \d+(?:, \d+)?", bare.strip()):
        return Node("text", _plain(bare))  # "June 12"
    if not _MATH.search(bare) and (_WORD.search(bare) or r"\text" in text) and "(" not in bare[1:]:
        return Node("text", _plain(bare))
    return None


def _clock(match: re.Match[str]) -> str:
    """A time in one spelling, after noon in 24 hours; no seconds where they are zero."""
    hour = int(match[1]) + (12 if match[4] == "pm" and int(match[1]) < 12 else 0)
    if match[4] == "am" or hour == 0:
        return f"{hour % 12}{match[2]}{match[3] or ''}am"
    return f"{hour}{match[2]}{match[3] or ''}"


def _plain(text: str) -> str:
    """Words in one spelling: lower case, no punctuation around, no leading article, no brackets around a letter."""
    words = re.sub(r"[\s\-]+", " ", text.lower()).strip(" .,;:!\"'$")
    words = re.sub(r"^(?:the|an?)\s+(?=\w)", "", words)
    if match := re.fullmatch(r"\(([a-z])\)(.*)", words):
        return match[1] if not match[2].strip() else words
    return re.sub(r"\s*,\s*(?:and\s+)?|\s+and\s+", ", ", words)


def _list(parts: list[str], separators: list[str]) -> Node:
    nodes = [item for part in parts for item in _spread(_single(part))]
    if not nodes:
        return Node("text", "")
    if len(nodes) == 1:
        return nodes[0]
    if all(node.kind in ("inequality", "interval", "union") for node in nodes):
        # "x < 1 or x > 3" is a union and "x > 1 and x < 3" an intersection.
        if set(separators) <= {"or", ","} and "or" in separators:
            return Node("union", "", tuple(nodes))
        if set(separators) == {"and"} and all(node.kind == "inequality" for node in nodes):
            return Node("intersection", "", tuple(nodes))
    if all(node.kind == "text" for node in nodes):
        return Node("text", ", ".join(sorted(node.text for node in nodes)) if len(nodes) > 1 else nodes[0].text)
    # "x = 1, 2" names the variable once.
    return Node("list", "or" if set(separators) == {"or"} else "", tuple(nodes))


def _grouped(text: str) -> Node | None:
    """ "p = 5, q = 2; p = 7, q = 2" as the pairs (5, 2) and (7, 2)."""
    groups = [parse(group) for group in split_top(text, _SEMICOLON)[0] if group.strip()]
    if not all(g.kind == "list" and all(item.kind == "equation" for item in g.items) for g in groups):
        return None
    if len({tuple(item.items[0].text for item in g.items) for g in groups}) > 1:
        return None
    return Node("list", "", tuple(Node("tuple", "", tuple(item.items[1] for item in g.items)) for g in groups))


def _spread(node: Node) -> tuple[Node, ...]:
    """The members of a plus-minus; a node of any other kind alone."""
    return node.items if node.kind == "list" else (node,)


def _single(text: str) -> Node:
    """Shape of an answer without separators at its top level."""
    if text == r"\ldots":
        return Node("text", text)
    if (vector := _vector(text)) is not None:
        return vector
    if _SIGNED.search(text) and not _braced(text):
        plus = _SIGNED.sub(lambda m: "-" if m.group(1) == "mp" else "+", text)
        minus = _SIGNED.sub(lambda m: "+" if m.group(1) == "mp" else "-", text)
        return Node("list", "", (parse(_tidy(plus)), parse(_tidy(minus))))
    if r"\equiv" in text:
        text = re.sub(r"\\b?mod(?![a-z])", r"\\pmod", text)
    if match := _MODULO.fullmatch(text):
        residue = match[1].split(r"\equiv", 1)[-1]
        return Node("congruence", match[1].split(r"\equiv", 1)[0].strip() if r"\equiv" in match[1] else "",
                    (_leaf(residue), _leaf(match[2] or match[3] or match[4])))  # fmt: skip
    parts, operators = split_top(text, _RELATION)
    if operators:
        return _relation([part.strip() for part in parts], [_RELATION_NAMES.get(o, o) for o in operators], text)
    parts, operators = split_top(text, _SET_OPERATION)
    if operators and all(part.strip() for part in parts):
        nodes = tuple(parse(part) for part in parts)
        kinds = {r"\cap": "intersection", r"\setminus": "difference"}
        if len(set(operators)) == 1:
            return Node(kinds.get(operators[0], "union"), "", nodes)
        return Node("expression", text)
    if (node := _bracketed(text)) is not None:
        return node
    if match := _BASED.fullmatch(text):
        base = _BASE_WORDS.get(match[2] or match[3], match[2] or match[3])
        if base.isdigit() and 2 <= int(base[:3]) <= 36 and not (len(match[1]) == 1 and match[1].isalpha()):
            if base == "10":
                return _leaf(match[1])
            return Node("based", f"{match[1].lstrip('0') or '0'}_{base}".lower())
    return _leaf(text)


def _vector(text: str) -> Node | None:
    r"""A sum over the unit vectors i, j, k, as a tuple: `\hat{i} - 2\hat{j}`, and `i - 2j`, but never `3 + 4i`."""
    marked = r"\hat" in text or r"\vec" in text or r"\widehat" in text
    pair = _I_AND_K.fullmatch(text) or ("j" in text and ("i" in text or "k" in text))
    if not (marked or pair) or len(text) > 200:
        return None
    components: dict[str, str] = {}
    position = 0
    while position < len(text):
        term = _VECTOR_TERM.match(text, position)
        if term is None or (position > 0 and not term[1]):
            return None
        name = term[3] or term[4] or ("i" if r"\imath" in term.group() else "j")
        if name in components or re.search(r"(?<!\\)[a-zA-Z]{2}|=", re.sub(r"\\[a-zA-Z]+", "", term[2])):
            return None
        components[name] = (term[1] if term[1] == "-" else "") + (term[2].strip() or "1")
        position = term.end()
    if len(components) < 2:
        return None
    last = "ijk"[: 3 if "k" in components else 2]
    return Node("tuple", "", tuple(parse(components.get(name, "0")) for name in last))


def _tidy(text: str) -> str:
    return re.sub(r"(^|(?<=[=(,{]))\s*\+", "", text).strip()


def _relation(parts: list[str], operators: list[str], text: str) -> Node:
    if operators == [r"\in"] or (len(operators) > 1 and operators[0] == r"\in"):
        return parse(text.split(r"\in", 1)[1]) if parts[0] else Node("expression", text)
    if r"\in" in operators or r"\equiv" in operators or not parts[-1]:
        return Node("expression", text)
    if operators[-1] == r"\approx":
        # What is said to be approximate is not the answer; the exact side is.
        named = re.fullmatch(r"[a-zA-Z]\w*", parts[0])
        keep = parts[0] if len(parts) == 2 and not named else parts[-1]
        if len(parts) == 2 and named and "." not in keep:
            return Node("text", text)  # "about 5" is not 5; a gold of 5.2 is rounded itself
        if set(operators) <= {"=", r"\approx"} and len(parts) > 2:
            keep = parts[-2]
        return parse(keep) if keep else Node("expression", text)
    if set(operators) == {"="}:
        if not parts[0]:
            return parse(parts[-1])
        if (
            len(parts) == 2
            and re.fullmatch(r"[a-zA-Z](?:_\{?\w\}?)?", parts[1])
            and not re.search("[a-zA-Z]", re.sub(r"\\[a-zA-Z]+", "", parts[0]))
        ):
            parts = parts[::-1]  # `5 = x`
        return Node("equation", "=", (_leaf(parts[0]) if "," not in parts[0] else parse(parts[0]), parse(parts[-1])))
    if "=" in operators and len(operators) == 2 and operators[0] == "=":
        return Node("expression", text)
    if all(operator in ("<", ">", r"\le", r"\ge", r"\ne") for operator in operators) and parts[0]:
        return Node("inequality", " ".join(operators), tuple(_leaf(part) for part in parts))
    return Node("expression", text)


def _bracketed(text: str) -> Node | None:
    if match := _MATRIX.search(text):
        outside = (text[: match.start()] + text[match.end() :]).strip()
        if outside in ("", "()", "[]") and r"\begin" not in match[2]:
            rows = [
                row for row in re.split(r"\\\\(?:\[[^\]]*\])?|\\cr", match[2].replace(r"\hline", "")) if row.strip()
            ]
            cells = [[parse(cell) for cell in row.split("&")] for row in rows]
            if cells and len({len(row) for row in cells}) == 1:
                name = "determinant" if match[1].startswith(("v", "V")) else "matrix"
                return Node(name, "", tuple(Node("row", "", tuple(row)) for row in cells))
        return None
    for opening, ending, kind in ((r"\{", r"\}", "set"), (r"\langle", r"\rangle", "tuple")):
        if text.startswith(opening) and text.endswith(ending):
            body = text[len(opening) : -len(ending)]
            if opening not in body and ending not in body:
                items = _items(body)
                return Node(kind, "", tuple(m for i in items for m in _spread(i)) if kind == "set" else items)
    if not text or text[0] not in "([" or text[-1] not in ")]" or closing(text, 0) != len(text) - 1:
        return None
    items = _items(text[1:-1])
    brackets = text[0] + text[-1]
    if len(items) < 2:
        return parse(text[1:-1]) if brackets == "()" and items else None
    if brackets == "()":
        return Node("tuple", "", items)
    if len(items) == 2:
        return Node("interval", brackets, items)
    return Node("sequence", "", items) if brackets == "[]" else None


def _items(body: str) -> tuple[Node, ...]:
    parts, _ = split_top(body, re.compile(r"[,;]"))
    return tuple(parse(part) for part in parts if part.strip())


def _braced(text: str) -> bool:
    r"""Whether the whole is one `\{...\}`."""
    return text.startswith(r"\{") and closing(text, 1) == len(text) - 1


def _leaf(text: str) -> Node:
    text = split_scale(text.strip())
    text = text.replace("j", "i") if _ENGINEERS_COMPLEX.fullmatch(text) else text
    value, unit = split_unit(text)
    value = value.strip()
    percent = re.fullmatch(
        r"(.*?)\s*(?:\\?%|\\text\s*\{\s*\\?(?:%|percent(?:age)?|pct)\s*\}|\b(?:percent(?:age)?|pct))", value, re.DOTALL
    )
    if percent and percent[1].strip():
        return Node("expression", percent[1].strip(), (), f"% {unit}".strip())
    if unit:
        inner = parse(value)
        if inner.kind == "expression" and inner.unit in ("", "%"):
            return Node("expression", inner.text, (), f"{inner.unit} {unit}".strip())
        return inner
    value = _TEXT_COMMAND.sub(lambda m: m.group() if len(m.group(1).strip()) > 1 else f" {m.group(1).strip()} ", value)
    return Node("expression", value.strip())

"""The part of the comparison that needs computer algebra. Runs in a worker process only: any call may run for ever."""

import logging
import re
from fractions import Fraction
from functools import lru_cache

import mpmath
import sympy
from latex2sympy2_extended.latex2sympy2 import ConversionConfig, latex2sympy
from math_verify.grader import sympy_expr_eq
from sympy.core.cache import clear_cache
from sympy.core.function import AppliedUndef

from .equality import compare, is_name
from .numbers import exact
from .regions import RegionError, same_region
from .structure import Node, parse
from .surface import clean


for _name in ("math_verify.parser", "math_verify.grader", "latex2sympy2_extended"):
    logging.getLogger(_name).setLevel(logging.CRITICAL)

# Digits of the numeric comparison, and how many of them must agree. Honest near misses differ in the first few digits,
# the closest known coincidences (e^(pi sqrt 163)) in the first 31.
_DIGITS, _AGREE = 60, sympy.Float(10) ** -45
# Points of both signs, so that |x| is not x; no two symbols get the same one.
_POINTS = [sympy.Rational(p, q) for p, q in
           ((7, 3), (-5, 7), (11, 13), (-17, 5), (19, 23), (29, 9), (-3, 31), (37, 6), (-41, 11), (43, 47), (53, 8), (-59, 61))]  # fmt: skip
_ROUNDS = 6
# Digits of precision below which SymPy says that a number is zero as far as it can tell.
_INSIGNIFICANT = 8
_LARGE = sympy.Integer(10) ** 30
_CONFIG = ConversionConfig(lowercase_symbols=False)
_IMAGINARY = {
    sympy.Symbol("i", real=True),
    sympy.Symbol("i"),
    sympy.Symbol("math{i}", real=True),
    sympy.Symbol("imath", real=True),
}


_FUNCTION = re.compile(r"([A-Za-z])\s*\(\s*([A-Za-z])\s*\)")
# SymPy takes a letter here for a polynomial: the greatest common divisor of n and 6 would be 1.
_GCD = re.compile(r"\\(?:gcd|lcm)\s*\(?[^()]*[a-zA-Z]")
_PROSE = re.compile(r"\\(?:gcd|lcm)|(?<=[A-Za-z)])'|\\text\s*\{[^{}]*[A-Za-z]{2}|(?<![\\A-Za-z])[A-Za-z]{3,}")


# Words that are no products of letters; `0x1F` is no product either.
_NO_PRODUCT = re.compile(
    r"(?<=[A-Za-z)])'|\\prime|\^\s*\{?\s*T\s*\}?(?![a-zA-Z])|\\text\s*\{[^{}]*[A-Za-z]{2}|(?<![\\A-Za-z])(?:to|of|is|in|at|by|as|if|an|or|up|no|so|we|it|be|on|per|and|the|not|any|all|for|but|has|are|was)(?![A-Za-z])"
    r"|(?<![\\A-Za-z{])(?![a-df-hj-np-tv-z]{3}(?![a-z]))[a-z]{3,}(?![A-Za-z}])|(?<![\w.])0[xX][0-9A-Fa-f]+"
)
# Two numbers side by side are neither a sum nor a product.
_SIDE_BY_SIDE = re.compile(r"(?:^|[^_\d.])\d[\d.]*\s+\.?\d|(?<![_\d.])\d+\s*\\frac\{\s*\d+\s*\}\{\s*\d+\s*\}")
_MIXED_NUMBER = re.compile(r"(?<![\d.])(\d+)\s*\\frac\{\s*(\d+)\s*\}\{\s*(\d+)\s*\}")
_PRODUCT = re.compile(r"(?<![_^\d.])(\d+(?:\.\d+)?)\s*(?=\()|(\))\s*(?=[\d(])")
_KINKED = (sympy.Abs, sympy.Max, sympy.Min, sympy.floor, sympy.ceiling, sympy.sign, sympy.Piecewise)
_FAR = [sympy.Rational(p, q) for p, q in ((7001, 7), (-9001, 11), (10**9 + 7, 13), (-(10**9) - 9, 17))]


class ParseError(ValueError):
    """The text is no expression that latex2sympy2_extended understands."""


@lru_cache(maxsize=64)
def to_sympy(text: str) -> sympy.Basic:
    """SymPy expression of one leaf, decimals exact."""
    number = exact(text)
    if number is not None:
        return sympy.Rational(number.numerator, number.denominator)
    if _NO_PRODUCT.search(text) or _GCD.search(text):
        raise ParseError(text[:80])
    text = _explicit(text)
    text = re.sub(r"\\(?:overline|bar)\{\s*([a-z])\s*\}", r"\\bar{\1}", text)
    try:
        expression = latex2sympy(
            text, is_real=True, convert_degrees=False, normalization_config=None, conversion_config=_CONFIG
        )
    except RecursionError:
        raise
    except Exception as error:  # The parser and SymPy raise bare Exceptions of every kind on text they do not know.
        raise ParseError(text[:80]) from error
    if not isinstance(expression, (sympy.Basic, sympy.MatrixBase)):
        raise ParseError(text[:80])
    return _exact_expression(expression)


def _explicit(text: str) -> str:
    """Mixed numbers as sums and `2(3)` as a product, which the parser would add; two bare numbers in a row are refused."""

    def mixed(match: re.Match[str]) -> str:
        whole, top, bottom = match.groups()
        return rf"({whole}+\frac{{{top}}}{{{bottom}}})" if int(top) < int(bottom) else match.group()

    text = _MIXED_NUMBER.sub(mixed, text)
    if _SIDE_BY_SIDE.search(text):
        raise ParseError(text[:80])
    return _PRODUCT.sub(lambda m: rf"{m[1] or m[2]}\cdot ", text)


def _exact_expression(expression: sympy.Basic) -> sympy.Basic:
    """Replace floats by the decimals they were written as, the symbol i by the imaginary unit, f(x) by a symbol."""
    if isinstance(expression, sympy.MatrixBase):
        return expression.applyfunc(_exact_expression)
    replacements = {f: sympy.Rational(str(f)) for f in expression.atoms(sympy.Float)}
    replacements |= {symbol: sympy.I for symbol in expression.free_symbols if symbol in _IMAGINARY}
    replacements |= {f: sympy.Symbol(f"call {f}", real=True) for f in expression.atoms(AppliedUndef)}
    return expression.xreplace(replacements) if replacements else expression


def leaf(a: Node, b: Node, factor: Fraction) -> bool:
    """Whether two nodes are the same, by value; text that is no mathematics is never equal to anything but itself."""
    try:
        return _leaf(a, b, factor)
    except (ParseError, RegionError):
        return False


def _leaf(a: Node, b: Node, factor: Fraction) -> bool:
    if a.kind == b.kind == "expression":
        left, right = to_sympy(a.text), to_sympy(b.text)
        left = _same_integer(left, right)
        if factor != 1:
            left = sympy.Rational(factor.numerator, factor.denominator) * left
        return same_value(left, right)
    if a.kind == b.kind == "equation":
        return _same_equation(a, b)
    if "congruence" in (a.kind, b.kind):
        return _same_residues(*((a, b) if a.kind == "congruence" else (b, a)))
    if "determinant" in (a.kind, b.kind) or "matrix" in (a.kind, b.kind):
        return same_value(_matrix(a), _matrix(b))
    if a.kind == b.kind == "inequality" and len(a.items) == len(b.items) == 2 and _same_inequality(a, b):
        return True
    return same_region(a, b, to_sympy, same_value)


def _same_integer(left: sympy.Basic, right: sympy.Basic) -> sympy.Basic:
    r"""`left` with the letter that runs over the integers as in `right`: `\frac{\pi}{4} + k\pi` and `\frac{\pi}{4} + n\pi`."""
    one, two = left.free_symbols - right.free_symbols, right.free_symbols - left.free_symbols
    if len(left.free_symbols) != 1 or len(right.free_symbols) != 1 or not one or not two:
        return left
    (old,), (new,) = one, two
    step = sympy.expand(left - left.subs(old, 0)) / (old * sympy.pi)
    return left.xreplace({old: new}) if {old.name, new.name} <= set("nkmlN") and step.is_Rational else left


def _same_residues(a: Node, b: Node) -> bool:
    r"""A residue class against another, or against its members `7k + 3`, k any integer."""
    residue, modulus = (to_sympy(item.text) for item in a.items)
    if b.kind == "congruence":
        other, step = (to_sympy(item.text) for item in b.items)
    else:
        value = to_sympy(b.text)
        letters = [symbol for symbol in value.free_symbols if symbol.name in "nkmltjqK"]
        if len(letters) != 1 or not (value.is_polynomial(letters[0]) and sympy.degree(value, letters[0]) == 1):
            return False
        other, step = value.subs(letters[0], 0), sympy.expand(value - value.subs(letters[0], 0)) / letters[0]
    whole = all(number.is_Integer for number in (residue, modulus, other, step)) and modulus != 0
    return bool(abs(step) == abs(modulus) and (residue - other) % modulus == 0) if whole else False


def _matrix(node: Node) -> sympy.Basic:
    if node.kind == "expression":
        return to_sympy(node.text).doit()
    if node.kind not in ("matrix", "determinant"):
        raise ParseError(node.kind)
    matrix = sympy.Matrix([[to_sympy(cell.text) for cell in row.items] for row in node.items])
    return matrix.det() if node.kind == "determinant" else matrix


def same_value(a: sympy.Basic, b: sympy.Basic) -> bool:
    """
    Whether two expressions have one value, exactly.

    Numbers are evaluated to 60 digits, of which 45 must agree (relative to the larger one); expressions with free
    symbols at 6 points of both signs. Only what cannot be evaluated goes to math-verify's comparison, both ways.
    """
    if a == b:
        return a not in (sympy.nan, sympy.zoo)
    if isinstance(a, sympy.MatrixBase) or isinstance(b, sympy.MatrixBase):
        return _same_matrix(a, b)
    a, b = _real_roots(a.doit(), b.doit())
    if a == b:
        return a not in (sympy.nan, sympy.zoo)
    if not (isinstance(a, sympy.Expr) and isinstance(b, sympy.Expr)):
        return bool(sympy_expr_eq(a, b, 12, 30) and sympy_expr_eq(b, a, 12, 30))
    if a.is_infinite or b.is_infinite:
        return False
    symbols = sorted(a.free_symbols | b.free_symbols, key=str)
    if len(symbols) > 10:
        return bool(sympy.expand(a - b) == 0)
    if not symbols:
        verdict = _close(a, b)
        return bool(verdict) if verdict is not None else _simplified(a, b)
    return _same_at_points(a, b, symbols)


def _same_at_points(a: sympy.Expr, b: sympy.Expr, symbols: list[sympy.Symbol]) -> bool:
    """
    Whether two expressions agree at 6 points of both signs. Where neither speaks of complex numbers, only at those where
    both are real throughout: the root of ab is the product of the roots of a and b wherever all three exist.
    """
    real = not (a.has(sympy.I) or b.has(sympy.I))
    seen = 0
    for turn in range(2 * _ROUNDS):
        point = {s: _POINTS[(turn * 5 + i) % len(_POINTS)] for i, s in enumerate(symbols)}
        if turn >= _ROUNDS:
            # Too few points were of use: both may be real for positive symbols only.
            point = {s: abs(p) for s, p in point.items()}
        if real and not (_is_real_throughout(a, point) and _is_real_throughout(b, point)):
            if _only_one_has_absolute_logarithm(a, b):
                return False
            continue
        verdict = _close(a.xreplace(point), b.xreplace(point))
        if verdict is False:
            return False
        seen += verdict is True
        if turn >= _ROUNDS - 1 and seen >= 3:
            return _same_beyond_kinks(a, b, symbols, real)
    return _simplified(a, b)


def _only_one_has_absolute_logarithm(a: sympy.Expr, b: sympy.Expr) -> bool:
    r"""`\ln|x|` and `\ln x` are two functions; with a constant of integration both are how an antiderivative is written."""
    bars = [any(log.args[0].has(sympy.Abs) for log in side.atoms(sympy.log)) for side in (a, b)]
    return bars[0] != bars[1] and "C" not in {symbol.name for symbol in a.free_symbols}


def _same_beyond_kinks(a: sympy.Expr, b: sympy.Expr, symbols: list[sympy.Symbol], real: bool) -> bool:
    """Whether two expressions agree on both sides of every kink of theirs, and far out, where they have kinks at all."""
    bent = [e for side in (a, b) for e in side.atoms(*_KINKED)]
    roots = [p.base for side in (a, b) for p in side.atoms(sympy.Pow) if p.exp.is_Rational and p.exp.q % 2 == 0]
    edges = [e.args[0] for e in bent if not isinstance(e, (sympy.Max, sympy.Min, sympy.Piecewise))] + roots
    edges += [x - e.args[0] for e in bent if isinstance(e, (sympy.Max, sympy.Min)) for x in e.args[1:]]
    edges += [
        r.lhs - r.rhs
        for e in bent
        if isinstance(e, sympy.Piecewise)
        for r in e.atoms(sympy.core.relational.Relational)
    ]
    edges = [edge for edge in edges if edge.free_symbols]
    if not edges:
        return True
    base = {s: _POINTS[i % len(_POINTS)] for i, s in enumerate(symbols)}
    for symbol in symbols:
        values = sorted({*_FAR, *(value for edge in edges for value in _around(edge, symbol, base))})
        for value in values:
            point = {**base, symbol: value}
            if real and not (_is_real_throughout(a, point) and _is_real_throughout(b, point)):
                continue
            if _close(a.xreplace(point), b.xreplace(point)) is False:
                return False
    return True


def _around(edge: sympy.Expr, symbol: sympy.Symbol, base: dict[sympy.Symbol, sympy.Rational]) -> list[sympy.Rational]:
    """Points beside the real zeros of a polynomial in one symbol, the others fixed, and integers for floor and ceiling."""
    rest = edge.xreplace({s: value for s, value in base.items() if s != symbol})
    if symbol not in rest.free_symbols or not rest.is_polynomial(symbol):
        return [sympy.Integer(n) for n in (-2, 0, 1, 2)]
    try:
        zeros = [sympy.Rational(str(z)) for z in sympy.Poly(rest, symbol).nroots(n=20) if z.is_real]
    except (sympy.PolynomialError, mpmath.libmp.NoConvergence, ValueError):
        return []
    return [zero + step for zero in zeros[:8] for step in (sympy.Rational(-1, 3), sympy.Rational(1, 3))] + [
        sympy.Integer(n) for n in (-2, 2)
    ]


def _is_real_throughout(expression: sympy.Expr, point: dict[sympy.Symbol, sympy.Rational]) -> bool:
    """Whether no root and no logarithm in an expression is taken of a negative number at a point."""
    inner = [p.base for p in expression.atoms(sympy.Pow) if not p.exp.is_integer and p.base.free_symbols]
    inner += [f.args[0] for f in expression.atoms(sympy.log) if f.args[0].free_symbols]
    return not any(part.xreplace(point).is_negative for part in inner)


def _real_roots(a: sympy.Basic, b: sympy.Basic) -> tuple[sympy.Basic, sympy.Basic]:
    """Odd roots of negative numbers are real, as at school, unless one side speaks of complex numbers."""
    if a.has(sympy.I) or b.has(sympy.I):
        return a, b

    def root(power: sympy.Pow) -> sympy.Expr:
        base, exponent = power.base, power.exp
        sign = sympy.sign(base) ** exponent.p
        return sign * sympy.Abs(base) ** exponent

    def odd(e: sympy.Basic) -> bool:
        return e.is_Pow and e.exp.is_Rational and e.exp.q % 2 == 1 and e.exp.q > 1 and not e.base.is_positive

    return a.replace(odd, root), b.replace(odd, root)


def _same_matrix(a: sympy.Basic, b: sympy.Basic) -> bool:
    if not (isinstance(a, sympy.MatrixBase) and isinstance(b, sympy.MatrixBase)) or a.shape != b.shape:
        return False
    return all(same_value(x, y) for x, y in zip(a.flat(), b.flat(), strict=True))


def _close(a: sympy.Expr, b: sympy.Expr) -> bool | None:
    try:
        x, y = a.evalf(_DIGITS), b.evalf(_DIGITS)
    except (ArithmeticError, ValueError, TypeError, NotImplementedError, AttributeError, mpmath.libmp.NoConvergence):
        return None
    if a.is_Rational and b.is_Rational:
        return bool(a == b)
    if not (_is_finite_number(x) and _is_finite_number(y)):
        return None
    x, y = _without_noise(x), _without_noise(y)
    size = max(abs(x), abs(y))
    if size != 0 and abs(x - y) > _AGREE * size:
        return False
    return not (_has_extremes(a) or _has_extremes(b)) or _is_zero(a - b)


def _has_extremes(expression: sympy.Expr) -> bool:
    """Whether a number may be so large or small beside the others that it is lost in 60 digits: 2^2022 - sqrt(2)."""
    return any(max(abs(r.p), r.q) > _LARGE for r in expression.atoms(sympy.Rational)) or any(
        p.exp.is_number and abs(p.exp) > 100 for p in expression.atoms(sympy.Pow)
    )


def _is_zero(difference: sympy.Expr) -> bool:
    """Whether a difference vanishes to 5,000 digits."""
    return bool(_without_noise(difference.evalf(5, maxn=5000)) == 0)


def _without_noise(value: sympy.Expr) -> sympy.Expr:
    """Zero for what has no significant digit, so that an exact zero equals 0 and 1/2004! is not 1/2006!."""
    real, imaginary = (
        sympy.S.Zero if part.is_Float and part._prec < _INSIGNIFICANT else part for part in value.as_real_imag()
    )
    return real + sympy.I * imaginary


def _is_finite_number(value: sympy.Basic) -> bool:
    return all(part.is_Float or part.is_Rational for part in value.as_real_imag())


def _simplified(a: sympy.Expr, b: sympy.Expr) -> bool:
    return bool(sympy.simplify(a - b) == 0)


def _same_equation(a: Node, b: Node) -> bool:
    """Equations up to a nonzero constant factor (`2x = 4y` is `x - 2y = 0`)."""
    if any(side.kind != "expression" for node in (a, b) for side in node.items):
        return False
    if (renamed := _same_function(a, b)) is not None:
        return renamed
    first, second = (_difference(node) for node in (a, b))
    return _ratio(first, second) is not None


def _same_function(a: Node, b: Node) -> bool | None:
    """Whether `f(n) = ...` is `f(x) = ...` with another name of the variable; `None` where they are not of that form."""
    names = [node.items[0].text.strip() for node in (a, b)]
    heads = [_FUNCTION.fullmatch(name) for name in names]
    if "y" in names and (call := heads[0] or heads[1]) and call[2] != "y":
        # The graph y = ... of a function f(x) = ...
        left, right = (to_sympy(node.items[1].text) for node in (a, b))
        return call[2] in {symbol.name for symbol in left.free_symbols} and same_value(left, right)
    if heads[0] is None or heads[1] is None or heads[0][1] != heads[1][1] or heads[0][2] == heads[1][2]:
        return None
    left, right = (to_sympy(node.items[1].text) for node in (a, b))
    new = next((s for s in left.free_symbols if s.name == heads[0][2]), None)
    old = next((s for s in right.free_symbols if s.name == heads[1][2]), None)
    if new is None or old is None or new in right.free_symbols:
        return None
    return same_value(left, right.xreplace({old: new}))


def _difference(node: Node) -> sympy.Expr:
    left, right = to_sympy(node.items[0].text), to_sympy(node.items[1].text)
    if not (isinstance(left, sympy.Expr) and isinstance(right, sympy.Expr)):
        raise ParseError(node.text)
    return left.doit() - right.doit()


def _ratio(first: sympy.Expr, second: sympy.Expr) -> sympy.Expr | None:
    """Constant ratio of two expressions in the same symbols; `None` where it is not constant, or zero."""
    symbols = sorted(first.free_symbols, key=str)
    if not symbols or first.free_symbols != second.free_symbols or len(symbols) > 10:
        return None
    ratio = None
    for turn in range(_ROUNDS):
        point = {s: _POINTS[(turn * 5 + i) % len(_POINTS)] for i, s in enumerate(symbols)}
        x, y = first.xreplace(point).evalf(_DIGITS), second.xreplace(point).evalf(_DIGITS)
        if not (_is_finite_number(x) and _is_finite_number(y)) or x == 0 or y == 0:
            continue
        if ratio is None:
            ratio = x / y
        elif abs(x / y - ratio) > _AGREE * abs(ratio):
            return None
    bent = ratio is not None and not _same_beyond_kinks(first, ratio * second, symbols, real=True)
    return None if bent else ratio


def _same_inequality(a: Node, b: Node) -> bool:
    """Inequalities in the same symbols up to a factor, turned round where it is negative."""
    turned = {"<": ">", ">": "<", r"\le": r"\ge", r"\ge": r"\le", r"\ne": r"\ne"}
    ratio = _ratio(_difference(a), _difference(b))
    if ratio is None or sympy.im(ratio) != 0:
        return False
    return a.text == (b.text if ratio > 0 else turned[b.text])


def is_gold(text: str) -> bool:
    """Whether a reference can be judged against: every leaf of its shape is text, a number, or parses."""
    cleaned = clean(text)
    return bool(cleaned) and _understood(parse(cleaned))


def _understood(node: Node) -> bool:
    if node.kind == "expression":
        try:
            return to_sympy(node.text) is not None
        except ParseError:
            # Prose with mathematics in it can be compared as a string, as long as it is whole.
            return bool(_PROSE.search(node.text)) and _balanced(node.text)
    if node.kind == "equation" and is_name(node.items[0].text):
        return _understood(node.items[1])
    return all(_understood(item) for item in node.items)


def _balanced(text: str) -> bool:
    return all(text.count(opening) == text.count(ending) for opening, ending in ("{}", "()", "[]"))


def verdict(job: list[str]) -> bool:
    """Answer one job of a worker."""
    try:
        if job[0] == "gold":
            return is_gold(job[1])
        # In one order whatever the caller's, so that the verdict is symmetric even where SymPy is not.
        first, second = sorted(job[1:3])
        return bool(compare(first, second, leaf))
    except RecursionError:
        return False
    finally:
        # What one answer left in SymPy's caches must not decide on the next one.
        clear_cache()
        to_sympy.cache_clear()

"""Sets of real numbers: intervals, inequalities in one variable, unions, differences, compared as sets."""

from collections.abc import Callable

import sympy

from .structure import Node


class RegionError(ValueError):
    """The node describes no set of real numbers."""


ToSympy = Callable[[str], sympy.Basic]
SameValue = Callable[[sympy.Basic, sympy.Basic], bool]

_RELATIONS = {
    "<": sympy.StrictLessThan,
    ">": sympy.StrictGreaterThan,
    r"\le": sympy.LessThan,
    r"\ge": sympy.GreaterThan,
}


def same_region(a: Node, b: Node, to_sympy: ToSympy, same_value: SameValue) -> bool:
    """Whether two nodes describe one set of real numbers."""
    names = _variables(a, to_sympy), _variables(b, to_sympy)
    if all(names) and names[0] != names[1]:
        return False
    left, right = _pieces(to_region(a, to_sympy)), _pieces(to_region(b, to_sympy))
    return len(left) == len(right) and all(
        one[2:] == two[2:] and same_value(one[0], two[0]) and same_value(one[1], two[1])
        for one, two in zip(left, right, strict=True)
    )


def _variables(node: Node, to_sympy: ToSympy) -> set[sympy.Basic]:
    if node.kind == "inequality":
        return set().union(*(to_sympy(item.text).free_symbols for item in node.items))
    return (
        set().union(*(_variables(item, to_sympy) for item in node.items))
        if node.kind in ("union", "intersection")
        else set()
    )


def to_region(node: Node, to_sympy: ToSympy) -> sympy.Set:
    """SymPy set of a node; see [`same_region`]."""
    if node.kind == "inequality":
        return _inequality(node, to_sympy)
    if node.kind in ("interval", "tuple") and len(node.items) == 2:
        low, high = (_end(item, to_sympy) for item in node.items)
        brackets = node.text or "()"
        if (high - low).is_negative:
            raise RegionError("the ends of the interval are in the wrong order")
        if (high - low).is_zero and brackets != "[]":
            raise RegionError("the interval is empty")
        if (low.is_infinite and brackets[0] == "[") or (high.is_infinite and brackets[1] == "]"):
            raise RegionError("the interval is closed at infinity")
        return sympy.Interval(low, high, brackets[0] == "(", brackets[1] == ")")
    if node.kind == "list" and all(item.kind in ("inequality", "interval", "tuple", "union") for item in node.items):
        return _listed([to_region(item, to_sympy) for item in node.items], node)
    if node.kind in ("set", "list"):
        return sympy.FiniteSet(*(_end(item, to_sympy) for item in node.items))
    if node.kind == "expression":
        value = to_sympy(node.text)
        return value if isinstance(value, sympy.Set) else sympy.FiniteSet(_end(node, to_sympy))
    parts = [to_region(item, to_sympy) for item in node.items]
    if node.kind == "union":
        return sympy.Union(*parts)
    if node.kind == "intersection":
        return sympy.Intersection(*parts)
    if node.kind == "difference" and len(parts) == 2:
        return parts[0] - parts[1]
    raise RegionError(f"a {node.kind} is no set of real numbers")


def _listed(parts: list[sympy.Set], node: Node) -> sympy.Set:
    """ "x > 1, x < 3" means both, "x < 1, x > 3" either, since both would be nothing; listed intervals are a union."""
    if all(item.kind == "inequality" for item in node.items):
        both = sympy.Intersection(*parts)
        if both != sympy.S.EmptySet:
            return both
    return sympy.Union(*parts)


def _end(node: Node, to_sympy: ToSympy) -> sympy.Expr:
    if node.kind != "expression":
        raise RegionError(f"a {node.kind} is no number")
    value = to_sympy(node.text)
    if not isinstance(value, sympy.Expr) or value.free_symbols or not value.is_extended_real:
        raise RegionError("an end of the interval is no real number")
    return value


def _inequality(node: Node, to_sympy: ToSympy) -> sympy.Set:
    sides = [to_sympy(item.text) for item in node.items]
    symbols = set().union(*(side.free_symbols for side in sides))
    if len(symbols) != 1 or not all(isinstance(side, sympy.Expr) for side in sides):
        raise RegionError("an inequality in one variable is needed")
    old = symbols.pop()
    variable = sympy.Symbol("x", real=True)
    region: sympy.Set = sympy.S.Reals
    for left, right, operator in zip(sides, sides[1:], node.text.split(), strict=False):
        left, right = left.subs(old, variable), right.subs(old, variable)
        region = sympy.Intersection(region, _half(left, right, operator, variable))
    return region


def _half(left: sympy.Expr, right: sympy.Expr, operator: str, variable: sympy.Symbol) -> sympy.Set:
    if operator == r"\ne":
        roots = sympy.solveset(left - right, variable, sympy.S.Reals)
        return sympy.S.Reals - roots
    if left in (sympy.oo, -sympy.oo) or right in (sympy.oo, -sympy.oo):
        relation = _RELATIONS[operator](left, right)
        return sympy.S.Reals if relation == sympy.true or relation.free_symbols else sympy.S.EmptySet
    if left == variable and not right.free_symbols:
        return _ray(right, operator)
    if right == variable and not left.free_symbols:
        return _ray(left, {"<": ">", ">": "<", r"\le": r"\ge", r"\ge": r"\le"}[operator])
    try:
        return sympy.solve_univariate_inequality(_RELATIONS[operator](left, right), variable, relational=False)
    except (NotImplementedError, ValueError, TypeError) as error:
        raise RegionError("the inequality cannot be solved") from error


def _ray(bound: sympy.Expr, operator: str) -> sympy.Set:
    if operator in ("<", r"\le"):
        return sympy.Interval(-sympy.oo, bound, True, operator == "<")
    return sympy.Interval(bound, sympy.oo, operator == ">", True)


def _pieces(region: sympy.Set) -> list[tuple[sympy.Expr, sympy.Expr, bool, bool]]:
    """A set as sorted pieces (start, end, left open, right open); points are closed pieces of length zero."""
    if region == sympy.S.Reals:
        return [(-sympy.oo, sympy.oo, True, True)]
    parts = region.args if isinstance(region, sympy.Union) else (region,)
    pieces = []
    for part in parts:
        if isinstance(part, sympy.Interval):
            pieces.append((part.start, part.end, bool(part.left_open), bool(part.right_open)))
        elif isinstance(part, sympy.FiniteSet):
            pieces.extend((point, point, False, False) for point in part.args)
        elif part != sympy.S.EmptySet:
            raise RegionError("not a union of intervals and points")
    return sorted(pieces, key=lambda piece: (float(piece[0]), float(piece[1])))

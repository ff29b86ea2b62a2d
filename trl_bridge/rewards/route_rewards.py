"""Reward for routes through a network of stops with several criteria."""

import difflib
import heapq
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Any, Literal

from .answers import last_box, phrase_answer
from .completions import Completion, LogExtra, LogMetric, cannot_judge, check_lengths, log_answers, visible_text


RouteMode = Literal["verified", "exact", "prefix"]
Stop = tuple[str, bool]
"""A stop and whether it is marked "(transfer)"."""

CRITERIA = ("time", "price", "comfort", "reliability")
_COLUMNS = {"time": "Time", "price": "Price", "comfort": "Comfort Level", "reliability": "Reliability"}
_SCALES = {
    "metro": {"time": Fraction(1, 3), "price": Fraction(2, 3), "comfort": Fraction(1), "transfer": Fraction(1, 3)},
    "travel": {"time": Fraction(1, 180), "price": Fraction(1, 200), "comfort": Fraction(1, 5), "transfer": Fraction(0)},
}  # fmt: skip
_SEPARATOR = re.compile(r"\s*(?:->|→|\\to\b|\\rightarrow\b|-|–|,)\s*")
_TRANSFER = re.compile(r"\s*\(\s*transfer\s*\)", re.IGNORECASE)
_MAX_LENGTH = 4000
# MapTab's own matching of station names (evaluate_planning.py): far too loose for training.
_LOOSE_RATIO = 0.5


@dataclass
class Network:
    """Stops, edges and their attributes as exact fractions."""

    start: str
    goal: str
    flavour: str
    edges: dict[tuple[str, str], list[tuple[str, Fraction]]] = field(default_factory=dict)
    entering: dict[str, Fraction] = field(default_factory=dict)
    changing: dict[str, Fraction] = field(default_factory=dict)

    @classmethod
    def read(cls, tables: Any, criteria: Any) -> "Network":
        """Network of one row."""
        tables = json.loads(tables) if isinstance(tables, str) else tables
        weights = _weights(criteria)
        flavour = tables.get("flavour", "metro")
        if flavour not in _SCALES:
            raise ValueError(f"`tables` has the flavour {flavour!r}: use 'metro' or 'travel'.")
        raw = flavour == "travel" and set(weights) == {"time"}
        scales = dict.fromkeys((*CRITERIA, "transfer"), Fraction(1)) if raw else _SCALES[flavour]
        network = cls(tables["start"], tables["goal"], flavour)
        for row in tables.get("vertices", []):
            network.entering[row["Vertex"]] = _cost(row, weights, scales)
            transfer = _number(row.get("Transfer Time", 0)) * scales["transfer"]
            network.changing[row["Vertex"]] = weights.get("time", Fraction(0)) * transfer
        names = list(network.entering)
        for row in tables["edges"]:
            ends = row["Edge"] if not isinstance(row["Edge"], str) else _edge_ends(row["Edge"], names)
            lines = row.get("Line", "")
            cost = _cost(row, weights, scales) if weights else Fraction(1)
            for line in [lines] if isinstance(lines, str) else lines:
                for pair in (tuple(ends), tuple(reversed(ends))):
                    network.edges.setdefault(pair, []).append((line, cost))
        return network

    @property
    def stops(self) -> set[str]:
        """All stops that some edge or vertex row names."""
        return set(self.entering) | {stop for edge in self.edges for stop in edge}

    def cost(self, route: Sequence[Stop]) -> Fraction | None:
        """
        Weighted cost of a route; `None` if it is no route from start to goal: an edge that does not exist, a stop twice,
        or a transfer mark that fits no choice of lines.
        """
        names = [name for name, _ in route]
        if len(names) < 2 or names[0] != self.start or names[-1] != self.goal or len(set(names)) != len(names):
            return None
        if route[0][1] or route[-1][1]:
            return None
        best: dict[str, Fraction] = {}
        for index, pair in enumerate(zip(names, names[1:], strict=False)):
            following: dict[str, Fraction] = {}
            for line, cost in self.edges.get(pair, []):
                if index == 0:
                    candidates = [cost]
                else:
                    change = self.changing.get(pair[0], Fraction(0))
                    candidates = [
                        value + cost + (change if old != line else 0)
                        for old, value in best.items()
                        if (old != line) == route[index][1]
                    ]
                if candidates:
                    following[line] = min([*candidates, *([following[line]] if line in following else [])])
            best = following
            if not best:
                return None
        counted = names if self.flavour == "travel" else names[:-1]
        return min(best.values()) + sum((self.entering.get(name, Fraction(0)) for name in counted), Fraction(0))

    def best_cost(self) -> Fraction | None:
        """Least cost of any route (Dijkstra over stops and lines, exact); `None` if there is none."""
        first = self.entering.get(self.start, Fraction(0))
        queue: list[tuple[Fraction, str, str]] = [(first, self.start, "")]
        done: set[tuple[str, str]] = set()
        neighbours: dict[str, list[tuple[str, str, Fraction]]] = {}
        for (a, b), lines in self.edges.items():
            neighbours.setdefault(a, []).extend((b, line, cost) for line, cost in lines)
        while queue:
            value, stop, line = heapq.heappop(queue)
            if stop == self.goal:
                return value
            if (stop, line) in done:
                continue
            done.add((stop, line))
            for other, new, cost in neighbours.get(stop, []):
                change = self.changing.get(stop, Fraction(0)) if stop != self.start and new != line else Fraction(0)
                skipped = other == self.goal and self.flavour == "metro"
                entering = Fraction(0) if skipped else self.entering.get(other, Fraction(0))
                heapq.heappush(queue, (value + cost + change + entering, other, new))
        return None


def _weights(criteria: Any) -> dict[str, Fraction]:
    if isinstance(criteria, str):
        criteria = json.loads(criteria)
    if criteria is None:
        return {}
    if not isinstance(criteria, Mapping):
        criteria = {name: Fraction(1, len(criteria)) for name in criteria}
    # A parquet row holds every key that some row has: the others are null.
    weights = {name: _number(value) for name, value in criteria.items() if value}
    unknown = sorted(set(weights) - set(CRITERIA))
    if unknown:
        raise ValueError(f"`criteria` names {unknown}: the criteria are {list(CRITERIA)}.")
    return weights


def _number(value: Any) -> Fraction:
    return value if isinstance(value, Fraction) else Fraction(str(value or 0))


def _cost(row: Mapping[str, Any], weights: Mapping[str, Fraction], scales: Mapping[str, Fraction]) -> Fraction:
    total = Fraction(0)
    for name, weight in weights.items():
        value = _number(row.get(_COLUMNS[name], 0)) * scales.get(name, Fraction(1))
        # Zero means missing: 1 - 0 would charge a stop for what is not known of it.
        good = name in ("comfort", "reliability")
        total += weight * ((1 - value if value else Fraction(0)) if good else value)
    return total


def _edge_ends(edge: str, names: Sequence[str]) -> tuple[str, str]:
    for index, char in enumerate(edge):
        if char == "-" and (not names or (edge[:index].strip() in names and edge[index + 1 :].strip() in names)):
            return edge[:index].strip(), edge[index + 1 :].strip()
    raise ValueError(f"`tables` has the edge {edge!r}, which joins no two stops of its vertices.")


def parse_route(text: str | None, stops: set[str]) -> list[Stop] | None:
    """
    Stops of a route such as "A-B(transfer)-C". Names are those of `stops`, whatever the case, so that a hyphen inside a
    name does no harm; `None` where the text holds anything else.
    """
    text = re.sub(r"\\text\s*\{([^{}]*)\}|[$*`]", lambda m: m.group(1) or "", text or "").strip().strip(".")
    if not text or len(text) > _MAX_LENGTH:
        return None
    by_name = {name.casefold(): name for name in stops}
    names = re.compile("|".join(re.escape(name) for name in sorted(stops, key=len, reverse=True)), re.IGNORECASE)
    route: list[Stop] = []
    position = 0
    while True:
        match = names.match(text, position)
        if match is None or match.group().casefold() not in by_name:
            return None
        mark = _TRANSFER.match(text, match.end())
        route.append((by_name[match.group().casefold()], mark is not None))
        position = (mark or match).end()
        if position == len(text):
            return route
        separator = _SEPARATOR.match(text, position)
        if separator is None:
            return None
        position = separator.end()


def _answer(text: str | None) -> str | None:
    if text is None:
        return None
    if r"\boxed" in text:
        return last_box(text)
    end = text.rfind("<answer_end>")
    if end >= 0 and (start := text.rfind("<answer_begin>", 0, end)) >= 0:
        return text[start + len("<answer_begin>") : end]
    return phrase_answer(text)


class RouteReward:
    """
    Reward for routes; see [`route_reward`].

    Args:
        mode (`str`, *optional*, defaults to `"verified"`):
            `"verified"`, `"exact"` or `"prefix"`.
        maptab_compat (`bool`, *optional*, defaults to `False`):
            For evaluation only: MapTab's own matching of names (a `difflib` ratio of 0.5 suffices) and its prefix score,
            which an over-long answer keeps in full. Needs mode `"exact"` or `"prefix"`.

    Raises:
        `ValueError`:
            If `mode` is unknown, or `maptab_compat` is set with mode `"verified"`.
    """

    def __init__(self, mode: RouteMode = "verified", maptab_compat: bool = False):
        if mode not in ("verified", "exact", "prefix"):
            raise ValueError(f"`mode` is {mode!r}: choose 'verified', 'exact' or 'prefix'.")
        if maptab_compat and mode == "verified":
            raise ValueError("`maptab_compat` is a way to match reference routes: it needs mode 'exact' or 'prefix'.")
        self.__name__ = "route_reward"
        self.mode = mode
        self.maptab_compat = maptab_compat

    def __call__(
        self,
        completions: Sequence[Completion],
        tables: Sequence[Any],
        criteria: Sequence[Any] | None = None,
        routes: Sequence[Sequence[str]] | None = None,
        log_extra: LogExtra | None = None,
        log_metric: LogMetric | None = None,
        **kwargs: Any,
    ) -> list[float | None]:
        check_lengths(completions, tables, "tables")
        if self.mode != "verified" and routes is None:
            raise ValueError(
                f"`routes` is missing: mode {self.mode!r} compares with the reference routes of each row."
            )
        answers = [_answer(visible_text(completion)) for completion in completions]
        rewards: list[float | None] = []
        valid = 0
        for row, answer in enumerate(answers):
            try:
                network = Network.read(tables[row], criteria[row] if criteria is not None else None)
            except (AttributeError, KeyError, TypeError, ValueError, ArithmeticError) as error:
                # Null, a wrong type, broken JSON, a missing key, an edge that joins no stops.
                why = f"cannot be read ({type(error).__name__}: {error})"
                cannot_judge(
                    "route_reward", "criteria" if "`criteria`" in str(error) else "tables", row, tables[row], why
                )
                rewards.append(None)
                continue
            route = parse_route(answer, network.stops)
            cost = network.cost(route) if route else None
            valid += cost is not None
            if self.mode == "verified":
                rewards.append(_ratio(network, cost))
            else:
                references = routes[row] if routes is not None else []
                if not isinstance(references, Sequence) or isinstance(references, str):
                    cannot_judge("route_reward", "routes", row, references, "is no list of routes")
                    rewards.append(None)
                else:
                    rewards.append(self._matched(answer, route, references, network.stops))
        log_answers(log_extra, routes or [None] * len(answers), answers, "routes")
        if log_metric is not None:
            log_metric("route_reward/valid_fraction", valid / max(1, len(answers)))
        return rewards

    def _matched(
        self, answer: str | None, route: list[Stop] | None, references: Sequence[str], stops: set[str]
    ) -> float:
        scores = [0.0]
        for reference in references:
            if self.maptab_compat:
                given, wanted = ((text or "").strip().split("-") for text in (answer, reference))
                scores.append(_prefix(given, wanted, _loosely, self.mode, strict_length=False))
            elif route is not None:
                expected = parse_route(reference, stops) or []
                scores.append(_prefix(route, expected, lambda a, b: a == b, self.mode, strict_length=True))
        return max(scores)


def _ratio(network: Network, cost: Fraction | None) -> float | None:
    best = network.best_cost()
    if best is None:
        return None
    if cost is None:
        return 0.0
    return 1.0 if cost == 0 else float(best / cost)


def _loosely(given: str, wanted: str) -> bool:
    if "(transfer)" in given or "(transfer)" in wanted:
        return given == wanted
    return difflib.SequenceMatcher(None, given.lower(), wanted.lower()).ratio() >= _LOOSE_RATIO


def _prefix(given: Sequence, wanted: Sequence, equal: Any, mode: str, strict_length: bool) -> float:
    """Matching prefix over the reference's length; in `exact` mode 1 for the whole of it and no more, else 0."""
    matching = 0
    for one, two in zip(given, wanted, strict=False):
        if not equal(one, two):
            break
        matching += 1
    if mode == "exact":
        return float(matching == len(wanted) == len(given) and matching > 0)
    length = max(len(given), len(wanted)) if strict_length else len(wanted)
    return matching / length if length else 0.0


_default = RouteReward()


def route_reward(
    completions: Sequence[Completion],
    tables: Sequence[Any],
    criteria: Sequence[Any] | None = None,
    routes: Sequence[Sequence[str]] | None = None,
    log_extra: LogExtra | None = None,
    log_metric: LogMetric | None = None,
    **kwargs: Any,
) -> list[float | None]:
    r"""
    Cost of the best route over the cost of the given one, in [0, 1]; 0 for what is no route.

    This is mode `verified`: the route ("A-B(transfer)-C", in the last `\boxed{}`, between `<answer_begin>` and
    `<answer_end>`, or after "the answer is") must run from start to goal over existing edges, in either direction, visit
    no stop twice and mark exactly the stops where the line changes. Costs are exact fractions. The modes `exact` and
    `prefix` of [`RouteReward`] compare with the row's reference routes (MapTab, https://huggingface.co/papers/2602.18600).

    Args:
        completions (`list[str]` or `list[list[dict]]`):
            Completions, standard or conversational; the text after a think block counts.
        tables (`list[str]` or `list[dict]`):
            Network of each row; see [`~trl_bridge.rewards.route_rewards.Network.read`].
        criteria (`list`, *optional*):
            Weights of each row by criterion: `time`, `price`, `comfort`, `reliability`. Without them the fewest edges win.
        routes (`list[list[str]]`, *optional*):
            Reference routes of each row, for the modes `exact` and `prefix`.
        log_extra (`callable`, *optional*):
            Given by the trainer; gets the columns `routes` and `answer`.
        log_metric (`callable`, *optional*):
            Given by the trainer; gets `route_reward/valid_fraction`.
        **kwargs:
            Other columns of the dataset, ignored.

    Returns:
        `list[float | None]`:
            One reward per completion; `None` where no route leads from start to goal, and, with a warning that names the
            column, where a row's tables or criteria are malformed.
    """
    return _default(completions, tables, criteria, routes, log_extra, log_metric, **kwargs)

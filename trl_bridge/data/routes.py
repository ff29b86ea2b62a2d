"""
Route tasks with several criteria, generated: lines with interchanges, tables of edges and stops, a weighted cost.

The columns are those that [`~trl_bridge.rewards.route_reward`] reads, in the manner of MapTab
(https://huggingface.co/papers/2602.18600). Maps, names, numbers and wording are made here.
"""

import json
import random
from collections.abc import Sequence
from fractions import Fraction
from typing import Any

from datasets import Dataset, DatasetDict, Image, List

from ..rewards.route_rewards import CRITERIA, Network, Stop
from .route_maps import MODES, draw_map, rides_alike


LINE_NAMES = "Amber Azure Coral Ivory Jade Onyx Pearl Ruby Saffron Slate Teal Violet".split()
"""Names of lines."""

STOP_NAMES = (
    "Acorn Alder Anchor Anvil Apple Arch Ash Aspen Aster Badger Barley Basin Beacon Beech Bell Birch Bramble Brick "
    "Bridge Briar Brook Canal Castle Cedar Cellar Chalk Cherry Clover Copper Cove Crane Creek Crown Dale Delta Depot "
    "Dune Eagle Elder Elm Falcon Fern Ferry Field Finch Fjord Flint Forge Fountain Fox Gable Garden Gate Glen Grove "
    "Harbour Hazel Heath Heron Hill Hollow Holly Iris Island Juniper Kiln Knoll Lagoon Lantern Larch Lark Laurel "
    "Ledge Lemon Lily Linden Lodge Magnet Maple Market Marsh Meadow Mill Mint Moss Museum Myrtle Nettle Oak Oasis "
    "Orchard Osprey Otter Palm Park Pebble Pier Pine Plaza Pond Poplar Port Quarry Quay Raven Reed Ridge River Robin "
    "Rose Rowan Sage Sorrel Spire Spring Square Station Stone Sundial Swan Thistle Tower Tulip Valley Vine Walnut Well "
    "Willow Yarrow Yew"
).split()
"""Names of stops."""


# A route that is not the best costs at least so much more, so that no rounding pays it in full.
_MARGIN = Fraction(21, 20)
_MOST_TIES = 5
_MOST_CANDIDATES = 4
_ATTEMPTS = 200
_COLUMNS = {"time": "Time", "price": "Price", "comfort": "Comfort Level", "reliability": "Reliability"}
# One unit of each column's grid costs 0.1 of its weight.
_GRID = {"time": Fraction(3, 10), "price": Fraction(3, 20), "comfort": Fraction(1, 10), "reliability": Fraction(1, 10)}
_TERMS = {"time": "time / 3", "price": "price / 1.5", "comfort": "(1 - comfort)", "reliability": "(1 - reliability)"}


def routes_dataset(
    size: int = 500,
    test_size: int = 100,
    seed: int = 0,
    min_lines: int = 2,
    max_lines: int = 4,
    min_stops: int = 3,
    max_stops: int = 5,
    criteria: str | None = None,
    images: bool = False,
) -> DatasetDict:
    """
    Route tasks, conversational, with worked solutions.

    Each row has a network of its own. At least two routes lead from start to goal; the best ones cost exactly the same
    (mostly there is one), and every other route costs at least 5% more.

    With `images` a question needs the drawn map, the table, or both, in turn, and the splits are `train`, `map`, `table` and
    `both`: the last three ask of the same networks.
    """
    _check(size, test_size, min_lines, max_lines, min_stops, max_stops)
    names = _criteria(criteria)
    sizes = ((min_lines, max_lines), (min_stops, max_stops))
    seen: set[str] = set()
    modes = MODES if images else ("table",)
    train, test = (
        [_rows(f"{seed} {split} {index}", sizes, names, seen, modes) for index in range(count)]
        for split, count in (("train", size), ("test", test_size))
    )
    splits = {"train": Dataset.from_list([each[modes[index % len(modes)]] for index, each in enumerate(train)])}
    for mode in modes:
        splits[mode if images else "test"] = Dataset.from_list([each[mode] for each in test])
    made = DatasetDict(splits)
    return made.cast_column("images", List(Image())) if images else made


def route_difficulty(stops: int, edges: int) -> int:
    """Difficulty of a task: points of the network and of the question."""
    return 2 + (stops > 6) + (stops > 11) + (edges > 2) + (edges > 4)


def route_text(route: Sequence[Stop]) -> str:
    """A route as the reward reads it, such as "A-B(transfer)-C"."""
    return "-".join(name + "(transfer)" * changes for name, changes in route)


def all_routes(network: Network) -> list[tuple[Fraction, list[Stop]]]:
    """Every route from start to goal that visits no stop twice, with its exact cost, the cheapest first."""
    neighbours: dict[str, list[tuple[str, str]]] = {}
    for (stop, other), lines in sorted(network.edges.items()):
        neighbours.setdefault(stop, []).append((other, lines[0][0]))
    found: list[tuple[Fraction, list[Stop]]] = []
    waiting: list[tuple[list[Stop], str]] = [([(network.start, False)], "")]
    while waiting:
        route, line = waiting.pop()
        stop = route[-1][0]
        if stop == network.goal:
            cost = network.cost(route)
            assert cost is not None
            found.append((cost, route))
            continue
        visited = {name for name, _ in route}
        for other, new in neighbours.get(stop, []):
            if other not in visited:
                changes = bool(line) and new != line
                waiting.append(([*route[:-1], (stop, changes), (other, False)], new))
    return sorted(found)


def _check(size: int, test_size: int, min_lines: int, max_lines: int, min_stops: int, max_stops: int) -> None:
    for name, number in (("size", size), ("test_size", test_size)):
        if number < 1:
            raise ValueError(f"`{name}` must be at least 1, got {number}.")
    for what, low, high, ends in (("lines", min_lines, max_lines, (2, 8)), ("stops", min_stops, max_stops, (3, 10))):
        if not ends[0] <= low <= high <= ends[1]:
            raise ValueError(
                f"`min_{what}` and `max_{what}` must lie between {ends[0]} and {ends[1]}, in this order, got {low} and "
                f"{high}."
            )


def _criteria(text: str | None) -> list[str] | None:
    if text is None:
        return None
    names = text.split("+")
    if set(names) - set(CRITERIA) or len(set(names)) != len(names):
        raise ValueError(f"`criteria` must be some of {', '.join(CRITERIA)}, joined by '+', got {text!r}.")
    return names


def _rows(
    place: str,
    sizes: tuple[tuple[int, int], tuple[int, int]],
    names: list[str] | None,
    seen: set[str],
    modes: Sequence[str],
) -> dict[str, dict[str, Any]]:
    """The rows of a place in the dataset, one for each mode: their randomness depends on nothing else."""
    for attempt in range(_ATTEMPTS):
        rng = random.Random(f"{place} {attempt}")
        lines = _draw_lines(rng, rng.randint(*sizes[0]), rng.randint(*sizes[1]))
        if lines is None:
            continue
        tables = _draw_tables(rng, lines)
        weights = _draw_weights(rng, names)
        asked = {}
        for mode in sorted(modes, key=lambda mode: mode != "table"):
            row = _question(rng, tables, weights, lines, mode)
            if row is not None:
                asked[mode] = row
        if len(asked) == len(modes) and asked["table"]["prompt"][0]["content"] not in seen:
            seen.add(asked["table"]["prompt"][0]["content"])
            return asked if len(modes) == 1 else _with_maps(asked, lines, place)
    raise ValueError("there are too few different route tasks of this kind: ask for fewer rows or larger networks.")


def _with_maps(rows: dict[str, dict[str, Any]], lines: dict[str, list[str]], place: str) -> dict[str, dict[str, Any]]:
    picture = {"bytes": draw_map(lines, place), "path": None}
    return {mode: {**row, "mode": mode, "images": [] if mode == "table" else [picture]} for mode, row in rows.items()}


def _draw_lines(rng: random.Random, count: int, stops: int) -> dict[str, list[str]] | None:
    """Stops of each line; from the second on each line crosses the earlier ones at two stops. `None` if two overlap."""
    fresh = iter(rng.sample(STOP_NAMES, count * stops))
    lines: dict[str, list[str]] = {}
    for name in rng.sample(LINE_NAMES, count):
        line = [next(fresh) for _ in range(stops)]
        if lines:
            known = sorted({stop for other in lines.values() for stop in other})
            for position, stop in zip(rng.sample(range(stops), 2), rng.sample(known, 2), strict=True):
                line[position] = stop
        lines[name] = line
    edges = [frozenset(pair) for line in lines.values() for pair in zip(line, line[1:], strict=False)]
    return lines if len(set(edges)) == len(edges) else None


def _draw_tables(rng: random.Random, lines: dict[str, list[str]]) -> dict[str, Any]:
    """Tables as [`~trl_bridge.rewards.route_rewards.Network.read`] takes them, numbers as decimal text."""

    def attributes() -> dict[str, str]:
        return {_COLUMNS[name]: _decimal(rng.randint(1, 9) * _GRID[name]) for name in CRITERIA}

    stops = sorted({stop for line in lines.values() for stop in line})
    start, goal = rng.sample(stops, 2)
    edges = [
        {"Edge": [stop, other], "Line": [name], **attributes()}
        for name, line in lines.items()
        for stop, other in zip(line, line[1:], strict=False)
    ]
    vertices = [
        {"Vertex": stop, **attributes(), "Transfer Time": _decimal(rng.randint(1, 9) * _GRID["time"])}
        for stop in stops
    ]
    return {"start": start, "goal": goal, "flavour": "metro", "edges": edges, "vertices": vertices}


def _draw_weights(rng: random.Random, names: list[str] | None) -> dict[str, str]:
    """Weights on a grid of 0.05 that sum to 1."""
    chosen = names or sorted(rng.sample(CRITERIA, rng.randint(1, len(CRITERIA))), key=CRITERIA.index)
    cuts = [0, *sorted(rng.sample(range(1, 20), len(chosen) - 1)), 20]
    return {
        name: _decimal(Fraction(end - begin, 20)) for name, begin, end in zip(chosen, cuts, cuts[1:], strict=False)
    }


def _question(
    rng: random.Random,
    tables: dict[str, Any],
    weights: dict[str, str],
    lines: dict[str, list[str]],
    mode: str,
) -> dict[str, Any] | None:
    """The row, or `None` where the question is no good: one route alone, too many best ones, or a close second."""
    if mode == "map":
        tables, weights = rides_alike(tables), {"time": "1"}
    network = Network.read(tables, weights)
    routes = all_routes(network)
    best = [route for cost, route in routes if cost == routes[0][0]]
    others = [found for found in routes if found[0] > routes[0][0]]
    if not others or len(best) > _MOST_TIES or others[0][0] < routes[0][0] * _MARGIN:
        return None
    shown = routes[: max(2, rng.randint(2, _MOST_CANDIDATES), len(best) + 1)]
    rng.shuffle(shown)
    steps = _worked(network, shown, len(routes), best[0])
    text = _map_prompt(tables) if mode == "map" else _prompt(tables, weights, lines if mode == "table" else None)
    return {
        "prompt": [{"role": "user", "content": text}],
        "completion": [{"role": "assistant", "content": "".join(steps)}],
        "solution": route_text(best[0]),
        "routes": [route_text(route) for route in best],
        "tables": json.dumps(tables),
        "criteria": json.dumps(weights),
        "difficulty": route_difficulty(len(network.stops), min(len(route) for route in best) - 1),
        "expert_steps": steps,
    }


_FORM = (
    "Join the stops by hyphens, with (transfer) after each stop where the line changes, and put the route in "
    r"\boxed{}: for example \boxed{A-B(transfer)-C}."
)


def _map_prompt(tables: dict[str, Any]) -> str:
    return (
        f"Find the route with the fewest rides from {tables['start']} to {tables['goal']} on the map, whose lines run both ways: "
        f"from a stop to the next one is a ride. No stop may be visited twice.\n{_FORM}"
    )


def _prompt(tables: dict[str, Any], weights: dict[str, str], lines: dict[str, list[str]] | None) -> str:
    """The question with its tables; without `lines` the map says which line joins two stops."""
    columns = [_COLUMNS[name] for name in weights]
    at_stops = [*columns, "Transfer Time"] if "time" in weights else columns
    terms = " + ".join(f"{weight} * {_TERMS[name]}" for name, weight in weights.items())
    added = f" Where the line changes, add {weights.get('time')} * transfer time / 3 of that stop."
    change = added if "time" in weights else ""
    edges = [
        " | ".join(
            [" to ".join(edge["Edge"]), *(edge["Line"] if lines else ()), *(edge[column] for column in columns)]
        )
        for edge in tables["edges"]
    ]
    stops = [" | ".join([vertex["Vertex"], *(vertex[column] for column in at_stops)]) for vertex in tables["vertices"]]
    return "\n".join(
        [
            f"Find the route of least cost from {tables['start']} to {tables['goal']}.",
            "",
            *(_line_list(lines) if lines else ["The map shows the lines, which run both ways."]),
            "",
            " | ".join(["Edge", *(["Line"] if lines else []), *columns]),
            *edges,
            "",
            " | ".join(["Stop", *at_stops]),
            *stops,
            "",
            f"Every edge of the route, and every stop but the last, costs {terms}.{change} No stop may be visited "
            "twice.",
            _FORM,
        ]
    )


def _line_list(lines: dict[str, list[str]]) -> list[str]:
    return ["Lines, which run both ways:", *(f"{name}: {', '.join(line)}" for name, line in lines.items())]


def _worked(network: Network, shown: list[tuple[Fraction, list[Stop]]], count: int, best: Sequence[Stop]) -> list[str]:
    """Strings that join to the worked solution: each shown route's sum, the comparison, and the answer."""
    steps = []
    for number, (cost, route) in enumerate(shown, start=1):
        parts = []
        for (stop, changes), (other, _) in zip(route, route[1:], strict=False):
            parts.append(f"{stop} {_decimal(network.entering[stop])}")
            if changes and network.changing[stop]:
                parts.append(f"transfer {_decimal(network.changing[stop])}")
            parts.append(f"to {other} {_decimal(network.edges[stop, other][0][1])}")
        steps.append(f"Route {number}, {route_text(route)}: {', '.join(parts)}. Sum {_decimal(cost)}.\n")
    least = min(cost for cost, _ in shown)
    rest = "" if len(shown) == count else ", and the other routes cost more"
    steps.append(f"The least of {', '.join(_decimal(cost) for cost, _ in shown)} is {_decimal(least)}{rest}.\n")
    return [*steps, rf"The answer is \boxed{{{route_text(best)}}}."]


def _decimal(number: Fraction) -> str:
    """A number on the grid of 0.005 or a coarser one, exactly."""
    text = f"{float(number):.3f}"
    assert Fraction(text) == number
    return text.rstrip("0").rstrip(".")

"""Routes: exact costs against brute force, validity, modes, and the traps of the format."""

import itertools
import json
import random
from fractions import Fraction

import pytest

from trl_bridge.rewards import RouteReward, route_reward
from trl_bridge.rewards.route_rewards import Network, parse_route


def edge(a, b, line, **values):
    return {"Edge": f"{a}-{b}", "Line": [line] if isinstance(line, str) else line, **values}


# Two lines cross at Mid-Town, whose name holds a hyphen; the direct way is slow.
TABLES = {
    "start": "Alpha",
    "goal": "Delta",
    "edges": [
        edge("Alpha", "Mid-Town", "red", Time=3, Price=1, **{"Comfort Level": 0.5}),
        edge("Mid-Town", "Delta", "blue", Time=3, Price=1, **{"Comfort Level": 0}),
        edge("Delta", "Alpha", "green", Time=30, Price=0.5, **{"Comfort Level": 0.9}),
    ],
    "vertices": [
        {"Vertex": "Alpha", "Time": 3, "Transfer Time": 9},
        {"Vertex": "Mid-Town", "Time": 3, "Transfer Time": 6},
        {"Vertex": "Delta", "Time": 3, "Transfer Time": 9},
    ],
}
TIME = {"time": 1.0}
BEST = "Alpha-Mid-Town(transfer)-Delta"


def score(answer, mode="verified", tables=TABLES, criteria=TIME, routes=(BEST,), **options):
    reward = RouteReward(mode, **options)
    return reward([rf"So \boxed{{{answer}}}"], [json.dumps(tables)], [criteria], [list(routes)])[0]


def test_costs_by_hand():
    network = Network.read(TABLES, TIME)
    # Metro: (3 + 3) edges and (3 + 3) vertices without the goal, and 6 for the change, all over 3.
    assert network.cost(parse_route(BEST, network.stops)) == Fraction(18, 3)
    assert network.cost([("Alpha", False), ("Delta", False)]) == Fraction(33, 3)
    assert network.best_cost() == 6
    # Travel: the goal counts, and time alone is raw.
    travel = Network.read(TABLES | {"flavour": "travel"}, TIME)
    assert travel.cost([("Alpha", False), ("Delta", False)]) == 36
    # Zero comfort means that it is not known: it costs nothing.
    comfort = Network.read(TABLES, {"comfort": 1})
    assert comfort.cost(parse_route(BEST, comfort.stops)) == Fraction(1, 2)


@pytest.mark.parametrize(
    ("answer", "reward"),
    [
        (BEST, 1.0),
        ("alpha - mid-town (transfer) - delta", 1.0),
        (r"\text{Alpha-Mid-Town(transfer)-Delta}", 1.0),
        ("Alpha -> Mid-Town(transfer) -> Delta.", 1.0),
        ("Alpha-Delta", 6 / 11),
        ("Alpha-Mid-Town-Delta", 0.0),
        ("Alpha(transfer)-Delta", 0.0),
        ("Alpha-Delta(transfer)", 0.0),
        ("Alpha-Mid-Town(transfer)-Alpha-Delta", 0.0),
        ("Alpha-Mid-Town", 0.0),
        ("Delta-Mid-Town(transfer)-Alpha", 0.0),
        ("Alpha-Nowhere-Delta", 0.0),
        ("Alpha-Delta or Alpha-Mid-Town(transfer)-Delta", 0.0),
        ("the route is Alpha-Delta", 0.0),
        ("Alpha", 0.0),
        ("", 0.0),
        ("Alpha-Delta-" * 2000, 0.0),
        (json.dumps(TABLES), 0.0),
    ],
)
def test_verified(answer, reward):
    assert score(answer) == pytest.approx(reward)


def test_a_line_of_two_makes_the_mark_depend_on_the_choice():
    tables = TABLES | {"edges": [edge("Alpha", "Mid-Town", ["red", "blue"], Time=3), TABLES["edges"][1]]}
    assert score("Alpha-Mid-Town-Delta", tables=tables) == 1.0
    assert score(BEST, tables=tables) == pytest.approx(4 / 6)  # a needless change is legal, and costs


def test_modes_exact_and_prefix():
    assert score(BEST, "exact") == 1.0 and score("Alpha-Mid-Town-Delta", "exact") == 0.0
    assert score("Alpha-Delta", "exact", routes=[BEST, "Alpha-Delta"]) == 1.0
    assert score("Alpha-Mid-Town(transfer)", "prefix") == pytest.approx(2 / 3)
    assert score(BEST + "-Alpha", "prefix") == pytest.approx(3 / 4)
    assert score(BEST + "-Alpha", "exact") == 0.0
    assert score("Delta-Alpha", "prefix") == 0.0


def test_maptab_compat_is_as_loose_as_the_original():
    routes = ["Alpha-Beta-Delta"]
    assert score("Alpho-Bete-Delta", "exact", routes=routes, maptab_compat=True) == 1.0
    assert score("Alpho-Bete-Delta", "exact", routes=routes) == 0.0
    assert score("Alpha-Beta-Delta-Gamma-Omega", "prefix", routes=routes, maptab_compat=True) == 1.0
    assert score("Alpha-Beta(transfer)-Delta", "exact", routes=routes, maptab_compat=True) == 0.0
    with pytest.raises(ValueError, match="maptab_compat"):
        RouteReward("verified", maptab_compat=True)
    with pytest.raises(ValueError, match="mode"):
        RouteReward("best")
    with pytest.raises(ValueError, match="routes"):
        RouteReward("exact")(["x"], [TABLES], [TIME])


@pytest.mark.parametrize(
    "changes, named",
    [
        ({"criteria": {"beauty": 1}}, "`criteria`"),
        ({"tables": TABLES | {"flavour": "boat"}}, "flavour"),
        ({"tables": TABLES | {"edges": [edge("Alpha", "Omega", "red")]}}, "edge"),
        ({"tables": None}, "`tables`"),
        ({"tables": "{"}, "`tables`"),
        ({"tables": {"start": "Alpha"}}, "`tables`"),
    ],
)
def test_bad_rows_are_named_and_not_judged(changes, named, caplog):
    assert score(BEST, **changes) is None
    assert named in caplog.text


def test_no_way_at_all_gives_none_and_it_logs():
    columns, metrics = {}, {}
    tables = TABLES | {"edges": [TABLES["edges"][0]]}
    rewards = route_reward(
        [r"\boxed{Alpha-Delta}", rf"<answer_begin>{BEST}<answer_end>", rf"The answer is {BEST}.", f"<think>{BEST}"],
        [tables, TABLES, TABLES, TABLES],
        log_extra=columns.__setitem__,
        log_metric=metrics.__setitem__,
    )
    assert rewards == [None, 0.5, 0.5, 0.0]  # without criteria the fewest edges win
    assert columns["answer"] == ["Alpha-Delta", BEST, BEST, "[none]"]
    assert metrics == {"route_reward/valid_fraction": 0.5}


def brute_force(network: Network) -> Fraction | None:
    others = sorted(network.stops - {network.start, network.goal})
    costs = []
    for size in range(len(others) + 1):
        for middle in itertools.permutations(others, size):
            names = [network.start, *middle, network.goal]
            if not all(pair in network.edges for pair in itertools.pairwise(names)):
                continue
            for marks in itertools.product([False, True], repeat=size):
                cost = network.cost(list(zip(names, [False, *marks, False], strict=True)))
                costs += [] if cost is None else [cost]
    return min(costs, default=None)


def attributes(rng):
    return {"Time": rng.randint(0, 9), "Price": rng.randint(0, 5) / 100, "Comfort Level": rng.randint(0, 100) / 100}


def test_dijkstra_equals_brute_force_on_random_graphs():
    rng = random.Random(0)
    found = 0
    for _ in range(500):
        names = [f"S{i}" for i in range(rng.randint(3, 5))]
        edges = [
            edge(a, b, rng.sample("rgb", rng.randint(1, 2)), **attributes(rng))
            for a, b in itertools.combinations(names, 2)
            if rng.random() < 0.7
        ]
        vertices = [{"Vertex": name, "Transfer Time": rng.randint(0, 9), **attributes(rng)} for name in names]
        tables = {
            "start": names[0],
            "goal": names[-1],
            "edges": edges,
            "vertices": vertices,
            "flavour": rng.choice(["metro", "travel"]),
        }
        network = Network.read(tables, {"time": 0.5, "price": 0.3, "comfort": 0.2})
        expected = brute_force(network)
        assert network.best_cost() == expected
        found += expected is not None
    assert found > 300

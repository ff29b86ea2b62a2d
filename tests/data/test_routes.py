import itertools
import json
import math
import re
from fractions import Fraction

import pytest
from datasets import load_dataset
from PIL import ImageColor, ImageDraw

from trl_bridge import cli
from trl_bridge.data.route_maps import _COLOURS, draw_map
from trl_bridge.data.routes import STOP_NAMES, all_routes, route_difficulty, route_text, routes_dataset
from trl_bridge.data.rows import load_named_dataset
from trl_bridge.rewards import RouteReward, route_reward
from trl_bridge.rewards.route_rewards import CRITERIA, Network


COLUMNS = {"time": "Time", "price": "Price", "comfort": "Comfort Level", "reliability": "Reliability"}


@pytest.fixture(scope="module")
def rows():
    splits = routes_dataset(size=250, test_size=50, seed=4)
    return [*splits["train"], *splits["test"]]


def paid(row, *texts):
    answers = [[{"role": "assistant", "content": rf"\boxed{{{text}}}"}] for text in texts]
    return route_reward(answers, [row["tables"]] * len(texts), [row["criteria"]] * len(texts))


def integer_cost(tables, weights, route):
    """A route's cost in units of 1/2000, from the tables' text: nothing of the package is used."""

    def part(row):
        raw = {name: Fraction(row[column]) for name, column in COLUMNS.items()}
        scaled = {
            "time": raw["time"] / 3,
            "price": raw["price"] / Fraction("1.5"),
            "comfort": 1 - raw["comfort"],
            "reliability": 1 - raw["reliability"],
        }
        return sum(Fraction(weight) * scaled[name] for name, weight in weights.items())

    edges = {frozenset(row["Edge"]): row for row in tables["edges"]}
    stops = {row["Vertex"]: row for row in tables["vertices"]}
    total, previous, marks = Fraction(0), None, []
    for stop, other in itertools.pairwise(route):
        edge = edges.get(frozenset((stop, other)))
        if edge is None:
            return None
        changes = previous is not None and edge["Line"] != previous
        total += part(stops[stop]) + part(edge)
        if changes:
            total += Fraction(weights.get("time", 0)) * Fraction(stops[stop]["Transfer Time"]) / 3
        marks.append("(transfer)" * changes)
        previous = edge["Line"]
    assert (total * 2000).denominator == 1
    names = [stop + mark for stop, mark in zip(route, [*marks, ""], strict=True)]
    return int(total * 2000), "-".join(names)


def brute_force(row):
    """Every simple path of the graph, by permutations that are cut off early."""
    tables, weights = json.loads(row["tables"]), json.loads(row["criteria"])
    joined = {frozenset(edge["Edge"]) for edge in tables["edges"]}
    stops = [vertex["Vertex"] for vertex in tables["vertices"]]
    waiting, found = [[tables["start"]]], []
    while waiting:
        path = waiting.pop()
        if path[-1] == tables["goal"]:
            found.append(integer_cost(tables, weights, path))
        else:
            waiting += [[*path, stop] for stop in stops if stop not in path and frozenset((path[-1], stop)) in joined]
    return sorted(found)


def test_every_worked_solution_and_every_best_route_is_paid_in_full(rows):
    worked = route_reward(*([row[name] for row in rows] for name in ("completion", "tables", "criteria")))
    assert worked == [1.0] * len(rows)
    for row in rows:
        assert row["solution"] == row["routes"][0] and paid(row, *row["routes"]) == [1.0] * len(row["routes"])
        assert "".join(row["expert_steps"]) == row["completion"][0]["content"]
        exact = RouteReward("exact")([row["completion"]], *([row[n]] for n in ("tables", "criteria", "routes")))
        assert exact == [1.0]


def test_the_optimum_is_the_brute_force_and_the_dijkstra_one(rows):
    for row in rows:
        found = brute_force(row)
        best = found[0][0]
        assert sorted(row["routes"]) == sorted(text for cost, text in found if cost == best)
        network = Network.read(row["tables"], row["criteria"])
        assert network.best_cost() * 2000 == best
        assert sorted((int(cost * 2000), route_text(route)) for cost, route in all_routes(network)) == found
        assert len(found) > len(row["routes"])


def test_near_misses_are_not_paid(rows):
    marked = 0
    for row in rows:
        best, found = row["solution"], brute_force(row)
        second = next(text for cost, text in found if cost > found[0][0])
        assert 0 < paid(row, second)[0] <= 1 / 1.05
        bare = best.replace("(transfer)", "")
        names = bare.split("-")
        wrong = ["-".join(names[1:]), "-".join(names[:-1]), "-".join([names[0], *names]), names[0] + "-" + names[-1]]
        wrong += [best + "-" + names[-1], best + "(transfer)", "", best.replace(names[0], "Nowhere", 1)]
        if bare != best:
            marked += 1
            wrong.append(bare)
        # The direct edge may exist, and then is a route like any other.
        wrong = [text for text in wrong if text not in {text for _, text in found}]
        assert paid(row, *wrong) == [0.0] * len(wrong)
    assert marked > 50


def test_the_arithmetic_of_the_worked_solution_is_right(rows):
    number = r"(\d+(?:\.\d+)?)"
    for row in rows:
        known = {text: cost for cost, text in brute_force(row)}
        *routes, comparison, answer = row["expert_steps"]
        sums = []
        for step in routes:
            name, working = re.match(r"Route \d+, (.*?): (.*)$", step.strip()).groups()
            parts, total = working.split(". Sum ")
            values = [Fraction(re.search(number + "$", part).group(1)) for part in parts.split(", ")]
            assert sum(values) == Fraction(total.rstrip(".")) and sum(values) * 2000 == known[name]
            sums.append(sum(values))
        assert (
            Fraction(re.search(f" is {number}", comparison).group(1))
            == min(sums)
            == min(known.values()) / Fraction(2000)
        )
        assert ("other routes" in comparison) == (len(known) > len(sums))
        assert answer == rf"The answer is \boxed{{{row['solution']}}}." and 2 <= len(routes) <= 6


def test_the_prompt_has_every_number_that_counts(rows):
    for row in rows:
        text, tables, weights = row["prompt"][0]["content"], json.loads(row["tables"]), json.loads(row["criteria"])
        columns = [COLUMNS[name] for name in weights]
        for edge in tables["edges"]:
            assert " | ".join([" to ".join(edge["Edge"]), *edge["Line"], *(edge[c] for c in columns)]) in text
        for stop in tables["vertices"]:
            assert " | ".join([stop["Vertex"], *(stop[c] for c in columns)]) in text
        assert ("Transfer Time" in text) == ("time" in weights)
        assert sum(map(Fraction, weights.values())) == 1
        assert all(f"{weight} * " in text for weight in weights.values())


def test_ties_are_all_listed():
    # On one criterion with few values two routes often cost the same.
    rows = routes_dataset(size=400, test_size=1, criteria="comfort", seed=1)["train"]
    tied = [row for row in rows if len(row["routes"]) > 1]
    assert len(tied) >= 3
    for row in tied:
        assert paid(row, *row["routes"]) == [1.0] * len(row["routes"])
        assert sorted(row["routes"]) == sorted(t for cost, t in brute_force(row) if cost == brute_force(row)[0][0])


def test_no_test_question_is_a_training_question_and_seeds_decide():
    splits = routes_dataset(
        size=120, test_size=60, min_lines=2, max_lines=2, min_stops=3, max_stops=3, criteria="time"
    )
    questions = [row["prompt"][0]["content"] for split in splits.values() for row in split]
    assert len(set(questions)) == 180
    again, other = routes_dataset(size=20, test_size=10), routes_dataset(size=20, test_size=10, seed=1)
    longer = routes_dataset(size=30, test_size=10)
    assert again["train"][:] == routes_dataset(size=20, test_size=10)["train"][:] == longer["train"][:20]
    assert again["test"][:] == longer["test"][:]
    assert not set(again["train"]["tables"]) & set(other["train"]["tables"])


def test_difficulty_grows_with_the_size():
    table = [[route_difficulty(stops, edges) for edges in range(1, 20)] for stops in range(2, 60)]
    assert {value for line in table for value in line} == {2, 3, 4, 5, 6}
    for one, two in itertools.pairwise(table):
        assert all(a <= b for a, b in zip(one, two, strict=True))
    assert all(a <= b for line in table for a, b in itertools.pairwise(line))

    def mean(lines, stops):
        rows = routes_dataset(40, 1, min_lines=lines, max_lines=lines, min_stops=stops, max_stops=stops)["train"]
        return sum(rows["difficulty"]) / len(rows)

    means = [mean(lines, stops) for lines, stops in [(2, 3), (2, 5), (3, 6), (6, 8)]]
    assert means == sorted(means) and means[0] < 2.5 and means[-1] > 5


def test_criteria_are_those_that_were_asked_for(rows):
    assert {len(json.loads(row["criteria"])) for row in rows} == {1, 2, 3, 4}
    chosen = routes_dataset(size=5, test_size=1, criteria="price+reliability")["train"]
    assert all(list(json.loads(text)) == ["price", "reliability"] for text in chosen["criteria"])
    assert set(CRITERIA) == set(COLUMNS)


def test_by_name_with_parameters():
    splits = load_named_dataset("builtin:routes", "size=6, test_size=2, seed=3, criteria=time+price")
    assert (len(splits["train"]), len(splits["test"])) == (6, 2)
    assert splits["train"][:] == routes_dataset(6, 2, seed=3, criteria="time+price")["train"][:]
    with pytest.raises(ValueError, match="builtin:routes has no parameter 'stations'"):
        load_named_dataset("builtin:routes", "stations=6")


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_the_command_writes_two_files(tmp_path, capsys, kind):
    options = ["--size", "8", "--test_size", "4", "--format", kind, "--max_lines", "3"]
    assert cli.main(["data", "routes", "--output_dir", str(tmp_path / "new"), *options]) == 0
    assert "wrote 8 rows to" in capsys.readouterr().out
    made = routes_dataset(8, 4, max_lines=3)
    for split in ("train", "test"):
        path = str(tmp_path / "new" / f"{split}.{kind}")
        read = load_dataset("json" if kind == "jsonl" else "parquet", data_files=path, cache_dir=str(tmp_path))[
            "train"
        ]
        assert [row["tables"] for row in read] == made[split]["tables"][:]
        assert route_reward(read["completion"], read["tables"], read["criteria"]) == [1.0] * len(read)
    assert cli.main(["data", "check", path, "--golds", "none"]) == 0
    capsys.readouterr()
    with pytest.raises(SystemExit) as stopped:
        cli.main(["data", "routes", "--output_dir", str(tmp_path / "new"), *options])
    assert stopped.value.code == 2 and "--force" in capsys.readouterr().err
    assert cli.main(["data", "routes", "--output_dir", str(tmp_path / "new"), *options, "--force"]) == 0


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"size": 0}, "`size`"),
        ({"test_size": 0}, "`test_size`"),
        ({"min_lines": 1}, "`min_lines` and `max_lines`"),
        ({"max_lines": 9}, "`min_lines` and `max_lines`"),
        ({"min_stops": 6, "max_stops": 5}, "`min_stops` and `max_stops`"),
        ({"criteria": "time,price"}, "`criteria` must be some of time, price"),
        ({"criteria": "time+time"}, "`criteria`"),
    ],
)
def test_bad_parameters_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        routes_dataset(**changes)


@pytest.fixture(scope="module")
def drawn():
    return routes_dataset(size=9, test_size=12, seed=2, images=True)


def test_questions_with_maps_are_of_the_same_networks_and_graded(drawn):
    assert drawn["train"]["mode"][:] == ["map", "table", "both"] * 3
    plain = routes_dataset(size=1, test_size=1, seed=2)["train"].column_names
    for mode in ("map", "table", "both"):
        rows = drawn[mode]
        assert set(rows.column_names) == {*plain, "mode", "images"} and set(rows["mode"]) == {mode}
        assert [len(pictures) for pictures in rows["images"]] == [0 if mode == "table" else 1] * 12
        assert route_reward(*(rows[name][:] for name in ("completion", "tables", "criteria"))) == [1.0] * 12
    for shown, alone, both in zip(*(drawn[mode] for mode in ("map", "table", "both")), strict=True):
        assert shown["images"][0].tobytes() == both["images"][0].tobytes()
        assert alone["tables"] == both["tables"] and alone["routes"] == both["routes"]
        stops = [{v["Vertex"] for v in json.loads(row["tables"])["vertices"]} for row in (shown, alone)]
        assert stops[0] == stops[1]


def test_what_a_question_leaves_to_the_map(drawn):
    for shown, both in zip(drawn["map"], drawn["both"], strict=True):
        tables = json.loads(both["tables"])
        text, asked = both["prompt"][0]["content"], shown["prompt"][0]["content"]
        assert not any(edge["Line"][0] in text for edge in tables["edges"])
        assert all(" to ".join(edge["Edge"]) in text for edge in tables["edges"])
        named = {v["Vertex"] for v in tables["vertices"] if re.search(rf"\b{v['Vertex']}\b", asked)}
        assert named == {tables["start"], tables["goal"]}
        # The fewest rides, by a search that knows nothing of costs.
        reached, rides = {tables["start"]}, 0
        joined = [set(edge["Edge"]) for edge in tables["edges"]]
        while tables["goal"] not in reached:
            reached, rides = reached.union(*(edge for edge in joined if edge & reached)), rides + 1
        assert all(route.count("-") == rides for route in shown["routes"])


def test_the_map_shows_every_line_and_stop(drawn):
    for row in drawn["both"]:
        tables, (picture,) = json.loads(row["tables"]), row["images"]
        colours = {colour for count, colour in picture.getcolors(1 << 20) if count > 200}
        assert colours >= {ImageColor.getrgb(_COLOURS[edge["Line"][0]]) for edge in tables["edges"]}
        assert picture.format == "PNG" and picture.width >= 300


def test_no_ride_passes_through_another_stop(monkeypatch):
    lines = {name: STOP_NAMES[10 * number : 10 * number + 10] for number, name in enumerate(_COLOURS) if number < 8}
    drawn_lines, dots = [], []
    line, ellipse = ImageDraw.ImageDraw.line, ImageDraw.ImageDraw.ellipse
    monkeypatch.setattr(ImageDraw.ImageDraw, "line", lambda s, xy, **k: drawn_lines.append(xy) or line(s, xy, **k))
    monkeypatch.setattr(ImageDraw.ImageDraw, "ellipse", lambda s, xy, **k: dots.append(xy) or ellipse(s, xy, **k))
    draw_map(lines, "seed")
    centres = [((x0 + x1) / 2, (y0 + y1) / 2) for x0, y0, x1, y1 in dots]
    assert len(set(centres)) == 80
    rides = [points for points in drawn_lines if len(points) > 2]
    assert len(rides) == 8 * 9
    for points in rides:
        others = [
            centre for centre in centres if math.dist(centre, points[0]) > 1 and math.dist(centre, points[-1]) > 1
        ]
        assert len(others) == 78
        assert min(math.dist(centre, point) for centre in others for point in points) > 8


def test_the_command_draws_maps(tmp_path, capsys):
    folder = str(tmp_path / "maps")
    command = ["data", "routes", "--images", "--output_dir", folder, "--size", "3", "--test_size", "2"]
    assert cli.main(command) == 0
    files = {name: f"{folder}/{name}.parquet" for name in ("train", "map", "table", "both")}
    loaded = load_dataset("parquet", data_files=files)
    assert loaded["both"][0]["images"][0].format == "PNG" and loaded["table"][0]["images"] == []
    assert (
        load_named_dataset("builtin:routes", "images=true, size=3, test_size=2")["map"].features
        == loaded["map"].features
    )
    with pytest.raises(SystemExit):
        cli.main([*command, "--force", "--format", "jsonl"])
    assert "`--format jsonl` holds no pictures" in capsys.readouterr().err

import copy
import importlib
import itertools
import json
import statistics
from pathlib import Path

import pytest

from trl_bridge.comparison import pictures
from trl_bridge.comparison.file import load_comparison, parse_comparison
from trl_bridge.comparison.plan import runs_of, tuning_runs
from trl_bridge.comparison.report import overview, report, results_of
from trl_bridge.comparison.workers import read_records
from trl_bridge.generation.records import append_lines, read_lines


ROOT = Path(__file__).parents[2]
PUBLISHED = ROOT / "docs" / "results" / "comparison"
VALUES = {
    "task": {"name": "addition"},
    "settings": {"half": {"wrong_share": 0.5}, "good": None},
    "methods": {"grpo": None, "bridge": None, "sft": None},
    "seeds": [0, 1, 2, 3, 4],
    "validation_seeds": [9],
    "learning_rates": [0.1, 0.2, 0.4],
    "steps": 10,
    "references": ["grpo"],
}
SCORES = {
    "grpo": [0.40, 0.50, 0.60, 0.45, 0.55],
    "bridge": [0.30, 0.45, 0.55, 0.40, 0.45],
    "sft": [0.45, 0.48, 0.66, 0.40, 0.66],
}


def record(run, probability):
    split = "test" if run.phase == "test" else "validation"
    scores = {split: {"probability": probability, "accuracy": probability + 0.1}}
    if run.phase == "test":
        scores["ood"] = {"probability": 0.01, "accuracy": 0.0}
    return {
        "key": run.key,
        "method": run.row.name,
        "scores": scores,
        "seconds": 10.0,
        "cpu_seconds": 4.0 if run.row.name == "grpo" else 6.0,
        "generated_tokens": 1234,
        "sft_tokens": None,
        "peak_memory_mb": 500,
        "curve": [{"step": step, "rollouts": 8 * step, "probability": probability * step / 10} for step in (0, 5, 10)],
        "series": {"bridge/gain": [0.1, -0.1], "bridge/grad_cosine": [0.5, 0.4]} if run.row.name == "bridge" else {},
        "date": "2026-01-02",
        "commit": "0123456789abcdef",
        "versions": {"torch": "2"},
        "machine": {"cpu": "a CPU", "cores": 2, "threads": 1, "gpu": None},
    }


@pytest.fixture
def given():
    comparison = parse_comparison(copy.deepcopy(VALUES))
    setting = comparison.settings[0]
    records = {}
    for row in comparison.rows:
        for run in tuning_runs(comparison, row, setting):
            records[run.key] = record(run, {0.1: 0.2, 0.2: 0.3, 0.4: 0.25}[run.learning_rate])
        for run, score in zip(runs_of(comparison, row, setting, 0.2), SCORES[row.name], strict=True):
            records[run.key] = record(run, score)
    return comparison, records


def cells(table, name):
    (line,) = [line for line in table.splitlines() if line.startswith(f"| `{name}` |")]
    return [cell.strip() for cell in line.strip("|").split("|")]


def test_means_deviations_and_paired_differences(given):
    comparison, records = given
    results = results_of(comparison, comparison.settings[0], records)
    difference = results["bridge"].against(results["grpo"])
    assert difference.seeds == 5 and difference.mean == pytest.approx(-0.35 / 5)
    # Paired: the differences are -0.1, -0.05, -0.05, -0.05, -0.1, far closer together than the scores.
    low, high = difference.interval
    assert -0.101 < low < difference.mean < high < -0.049
    table = report(comparison, records)
    overview_line = cells(table.split("## Overview")[1].split("## half")[0], "bridge")
    assert overview_line[1:3] == ["0.430 (**-0.070**)", "0.530 (**-0.070**)"]
    table = table.split("## half")[1].split("| cost")[0]
    assert (
        cells(table, "bridge")[2]
        == f"{statistics.fmean(SCORES['bridge']):.3f} ({statistics.stdev(SCORES['bridge']):.3f})"
    )
    assert cells(table, "bridge")[5].startswith("**-0.070** [-0.")
    assert cells(table, "sft")[5].startswith("+0.030 [") and cells(table, "grpo")[5:7] == ["", ""]
    assert cells(table, "sft")[6] == cells(table, "sft")[5]  # accuracy: 0.1 above the probability throughout
    assert "Highest probability: `sft`, 0.530." in table
    assert "Above `grpo`: none. Below it: `bridge`." in table


@pytest.mark.parametrize("seeds", [2, 3, 4])
def test_nothing_is_said_to_differ_from_fewer_than_five_seeds(given, seeds):
    comparison, records = given
    runs = runs_of(comparison, comparison.row("bridge"), comparison.settings[0], 0.2)
    for run in runs[seeds:]:
        del records[run.key]
    difference = results_of(comparison, comparison.settings[0], records)["bridge"].against(
        results_of(comparison, comparison.settings[0], records)["grpo"]
    )
    assert difference.seeds == seeds and difference.interval[1] < 0 and difference.sign == 0
    table = report(comparison, records).split("## Overview")[1].split("## Learning rates")[0]
    assert "**" not in table
    assert "Below it: none." in table


def test_cost_and_rates(given):
    comparison, records = given
    table = report(comparison, records)
    cost = table.split("| cost")[1].split("## ")[0]
    assert cells(cost, "bridge")[1:5] == ["10.0", "6.0", "1.50", "1,234"]
    rates = table.split("## Learning rates")[1]
    assert "| half | `sft` | 0.200 | **0.300** | 0.250 |" in rates
    # The second setting has runs of GRPO alone, which are those of the first one.
    good = table.split("## good")[1].split("## Learning")[0]
    assert "| `grpo` |" in good and "| `bridge` |" not in good
    assert "| good | `bridge`" not in rates and "| good | `grpo` |" in rates


def test_a_rate_at_the_end_of_the_grid_and_a_run_that_diverged_are_marked(given):
    comparison, records = given
    row, setting = comparison.row("sft"), comparison.settings[0]
    for run in tuning_runs(comparison, row, setting):
        records[run.key] = record(run, run.learning_rate)
    runs = runs_of(comparison, row, setting, 0.4)
    records[runs[0].key] = {**record(runs[0], 0.0), "scores": {}, "diverged": "the weights are not finite"}
    records[runs[1].key] = record(runs[1], 0.7)
    line = cells(report(comparison, records).split("## half")[1].split("| cost")[0], "sft")
    assert line[1] == "0.4*" and line[2] == "0.700" and line[4] == "1 (1 diverged)" and line[5] == "+0.200"


def test_rows_that_started_from_different_base_models_are_told(given):
    comparison, records = given
    said = "**Rows started from different base models** in half, where"
    for record in list(records.values()):
        record["base"] = "one"
    assert said not in report(comparison, records)
    run = runs_of(comparison, comparison.row("bridge"), comparison.settings[0], 0.2)[1]
    records[run.key]["base"] = "another"
    assert said in report(comparison, records)


@pytest.mark.parametrize("folder", sorted(path.parent.name for path in PUBLISHED.glob("*/runs.jsonl")))
def test_published_tables_are_those_of_the_published_runs(folder):
    records = read_records(PUBLISHED / folder)
    assert report(load_comparison(f"comparison/{folder}"), records) == (PUBLISHED / folder / "table.md").read_text()
    assert len(records) == len((PUBLISHED / folder / "runs.jsonl").read_text().splitlines())
    page = (PUBLISHED.parents[1] / "results.md").read_text()
    if folder != "addition-smoke":
        assert overview(load_comparison(f"comparison/{folder}"), records) in page
    assert "different base models" not in report(load_comparison(f"comparison/{folder}"), records)
    # Made from a commit, not from files that nobody has.
    assert not [record["commit"] for record in records.values() if record["commit"].endswith("+")]


@pytest.mark.parametrize("name", ["gain_term", "trial", "trial_rule", "trial_long"])
def test_tables_of_benchmarks_are_those_of_their_runs(name, monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    if (ROOT / "benchmarks" / f"{name}.py").is_file():
        importlib.import_module(name)  # its methods
    records = read_records(PUBLISHED.parent / name)
    comparison = load_comparison(str(ROOT / "benchmarks" / f"{name}.yaml"))
    assert report(comparison, records) == (PUBLISHED.parent / name / "table.md").read_text()
    assert overview(comparison, records) in (PUBLISHED.parents[1] / "results.md").read_text()


SAME_GRPO = [
    {"half-wrong", "all-wrong", "helpful", "half-leading-zero", "half-subtraction"},
    {"half-wrong-flipped", "flipped"},
    *({name} for name in ("other-form", "sparse", "half-own-error")),
]


def behind_grpo(records, row, setting):
    """Lowest mean difference of probability against GRPO at equal rollouts after the first quarter, and the seeds that both have."""
    curves = {}
    for record in records.values():
        if record["method"] == row and record["setting"] == setting:
            curves[record["seed"]] = [record["curve"]]
    for record in records.values():
        # GRPO reads no demonstrations: its runs go by the first setting that wanted them.
        same = [s for s in SAME_GRPO if setting in s][0]
        if record["method"] == "grpo" and record["setting"] in same and record["seed"] in curves:
            curves[record["seed"]].append(record["curve"])
    pairs = [pair for pair in curves.values() if len(pair) == 2]
    gaps = [
        [p["probability"] - at(theirs, p["rollouts"]) for p in own if p["rollouts"] > 960] for own, theirs in pairs
    ]
    return (min(map(statistics.fmean, zip(*gaps, strict=True))), len(pairs)) if pairs else None


def at(curve, rollouts):
    left, right = next((a, b) for a, b in itertools.pairwise(curve) if rollouts <= b["rollouts"])
    share = (rollouts - left["rollouts"]) / (right["rollouts"] - left["rollouts"])
    return left["probability"] + share * (right["probability"] - left["probability"])


@pytest.mark.parametrize("name", ["trial", "trial_rule"])
def test_how_far_a_trial_falls_behind_grpo_is_that_of_the_published_runs(name):
    records = read_records(PUBLISHED.parent / name)
    comparison = load_comparison(str(ROOT / "benchmarks" / f"{name}.yaml"))
    rows = [row.name for row in comparison.rows if row.name != "grpo"]
    lines = []
    for setting in comparison.settings:
        found = [behind_grpo(records, row, setting.name) for row in rows]
        if all(found):
            cells = [f"{gap:+.3f}" for gap, _ in found]
            lines.append(f"| {setting.name} | {min(seeds for _, seeds in found)} | {' | '.join(cells)} |")
    head = ["setting", "seeds", *(f"`{row}`" for row in rows)]
    table = "\n".join([f"| {' | '.join(head)} |", f"|{' --- |' * len(head)}", *lines])
    assert table in (PUBLISHED.parents[1] / "results.md").read_text(), table


def test_pictures_are_labelled_and_told_apart_by_colour_and_without(given, tmp_path, monkeypatch):
    from matplotlib.figure import Figure

    comparison, records = given
    drawn = {}
    monkeypatch.setattr(Figure, "savefig", lambda self, path, dpi: drawn.update({path.name: self}))
    assert [path.name for path in pictures.draw_all(comparison, records, tmp_path)] == list(drawn)
    assert list(drawn) == ["curves.png", "cost.png", "gain.png"]
    for figure in drawn.values():
        for axes in figure.axes:
            assert axes.get_xlabel() and axes.get_ylabel() and axes.get_title()
    axes = drawn["curves.png"].axes[0]
    lines = axes.get_lines()
    assert len({(line.get_linestyle(), line.get_marker()) for line in lines}) == len(lines) == 3
    assert len({line.get_color() for line in lines}) == 3
    assert list(lines[0].get_xdata()) == [0, 0.5, 1] and lines[0].get_ydata()[-1] == pytest.approx(0.5)
    assert len(axes.collections) == 3  # bands
    assert {text.get_text() for text in drawn["cost.png"].axes[0].texts} == {"grpo", "bridge", "sft"}
    assert list(drawn["gain.png"].axes[0].get_lines()[0].get_ydata()) == pytest.approx([0.1, -0.1])


def test_lines_survive_a_kill(tmp_path):
    path = tmp_path / "runs.jsonl"
    append_lines(path, [{"key": "a"}, {"key": "ü\u2028"}])
    with open(path, "a") as file:
        file.write('{"key": "cut o')
    assert [record["key"] for record in read_lines(path)] == ["a", "ü\u2028"]
    append_lines(path, [{"key": "b"}])
    assert [record["key"] for record in read_lines(path)] == ["a", "ü\u2028", "b"]
    path.write_text("{}\nno\n" + json.dumps({}) + "\n")
    with pytest.raises(ValueError, match="line 2 of"):
        read_lines(path)
    assert read_lines(tmp_path / "none") == []

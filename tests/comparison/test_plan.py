import copy
from pathlib import Path

import pytest
import yaml

from trl_bridge.comparison.file import load_comparison, parse_comparison
from trl_bridge.comparison.plan import (
    all_runs,
    best_rate,
    next_runs,
    number_of_runs,
    runs_of,
    tuning_runs,
    validation_scores,
)
from trl_bridge.comparison.workers import read_records
from trl_bridge.recipes import find_recipe, list_recipes


VALUES = {
    "task": {"name": "addition", "train_size": 10, "demonstrations_size": 10},
    "settings": {"good": None, "wrong": {"wrong_share": 0.5}, "noisy": {"reward_flip": 0.2}},
    "methods": {
        "grpo": None,
        "lora": {"method": "bridge", "bridge_lambda": 1.0},
        "bridge": {"times_learning_rate": {"coordinator_learning_rate": 1}},
        "sft": None,
    },
    "seeds": [0, 1],
    "validation_seeds": [8, 9],
    "learning_rates": ["1e-3", 0.01],
    "steps": 5,
    "references": ["grpo"],
}


def comparison(**changes):
    changes = {"references": [], **changes} if "methods" in changes else changes
    return parse_comparison({**copy.deepcopy(VALUES), **changes})


def done(run, probability=0.5):
    return {"scores": {"validation": {"probability": probability}}}


def finished(runs, score=lambda run: 0.5):
    return {run.key: done(run, score(run)) for run in runs}


def test_a_key_says_all_that_a_result_depends_on_and_nothing_else():
    given = comparison()
    bridge = given.row("bridge")
    good, wrong, noisy = given.settings
    keys = {run.key for setting in given.settings for run in tuning_runs(given, bridge, setting)}
    assert len(keys) == 3 * 2 * 2
    (first, _) = runs_of(given, bridge, good, 0.01)
    for other in (comparison(steps=6), comparison(trainer={"beta": 0.1}), comparison(points=3)):
        assert runs_of(other, other.row("bridge"), other.settings[0], 0.01)[0].key != first.key
    changed = comparison(methods={"bridge": {"times_learning_rate": {"coordinator_learning_rate": 2}}})
    assert runs_of(changed, changed.row("bridge"), changed.settings[0], 0.01)[0].key != first.key
    # Names, and what lies around the run, do not count.
    renamed = comparison(methods={"other": {"method": "bridge", **VALUES["methods"]["bridge"]}}, seeds=[0, 5])
    assert runs_of(renamed, renamed.rows[0], renamed.settings[0], 0.01)[0].key == first.key


@pytest.mark.parametrize(
    ("row", "same"),
    [("grpo", ("good", "wrong")), ("lora", ("good", "wrong")), ("sft", ("good", "noisy")), ("bridge", ())],
)
def test_what_a_method_does_not_read_does_not_count(row, same):
    given = comparison()
    keys = {setting.name: tuning_runs(given, given.row(row), setting)[0].key for setting in given.settings}
    for first in keys:
        for second in keys:
            assert (keys[first] == keys[second]) == (first == second or {first, second} == set(same))


def test_what_only_a_teacher_row_reads_counts_for_it_alone():
    methods = dict.fromkeys(("grpo", "bridge", "sft", "opd", "aopd", "lightning-opd"))
    weak, strong = (
        comparison(task={**VALUES["task"], "teacher_probability": value}, methods=methods) for value in (0.5, 0.9)
    )
    for row in weak.rows:
        keys = [tuning_runs(given, row, setting)[0].key for given in (weak, strong) for setting in given.settings]
        if row.name in ("grpo", "bridge", "sft"):
            assert keys[:3] == keys[3:]
        else:
            # Neither demonstrations nor rewards: one run for all settings.
            assert len(set(keys[:3])) == len(set(keys[3:])) == 1 and keys[0] != keys[3]


def test_what_is_wrong_counts_where_it_is_read_and_not_at_its_default():
    def keys(**fields):
        given = comparison(task={**VALUES["task"], **fields})
        return {row.name: tuning_runs(given, row, given.settings[0])[0].key for row in given.rows}

    plain = keys()
    assert keys(wrong_kind="near", base_wrong_kind="near", leading_zero_pays=False) == plain
    kind, base, pays = keys(wrong_kind="ten"), keys(base_wrong_kind="ten"), keys(leading_zero_pays=True)
    assert {name for name in plain if kind[name] == plain[name]} == {"grpo", "lora"}
    assert not set(plain.values()) & (set(base.values()) | set(pays.values()))


def test_a_teacher_in_the_task_leaves_published_runs_what_they_are():
    values = yaml.safe_load(find_recipe("comparison/addition").read_text())
    values["task"]["teacher_probability"] = 0.123
    given = parse_comparison(values)
    published = read_records(Path(__file__).parents[2] / "docs" / "results" / "comparison" / "addition")
    rows = [row for row in given.rows if not row.reads_teacher]
    assert len(rows) >= 16
    keys = {run.key for row in rows for setting in given.settings for run in tuning_runs(given, row, setting)}
    assert keys <= set(published)


def test_the_order_of_runs():
    given = comparison()
    records = {}
    order = list(next_runs(given, records))
    # Nothing is chosen yet: validation runs alone, setting by setting, each key once.
    assert {run.phase for run in order} == {"validation"}
    assert [run.setting.name for run in order[:16]] == ["good"] * 16
    assert len({run.key for run in order}) == len(order)
    first = [run for run in order if run.row.name == "grpo"][:4]
    records = finished(first, lambda run: run.learning_rate)
    ahead = list(next_runs(given, records))
    assert [(run.row.name, run.phase, run.seed, run.learning_rate) for run in ahead[:2]] == [
        ("grpo", "test", 0, 0.01),
        ("grpo", "test", 1, 0.01),
    ]
    # What is under way is not given again.
    assert ahead[0].key not in {run.key for run in next_runs(given, records, {ahead[0].key})}


def test_all_runs_end_and_their_number_is_known_from_the_start():
    given = comparison()
    records = {}
    total = number_of_runs(given, records)
    while ready := list(next_runs(given, records)):
        for run in ready[:3]:
            records[run.key] = done(run, run.learning_rate * (1 if run.row.name == "grpo" else -1))
        assert number_of_runs(given, records) == total
    assert len(records) == total
    # 4 rows x 3 settings x (4 + 2), without what three of the rows share.
    assert total == (4 * 3 - 3) * 6
    assert {run.key for run in all_runs(given, records)} == set(records)


def test_the_learning_rate_is_chosen_on_all_validation_seeds():
    given = comparison()
    row, setting = given.row("bridge"), given.settings[0]
    runs = tuning_runs(given, row, setting)
    scores = {(0.001, 8): 0.1, (0.001, 9): 0.9, (0.01, 8): 0.6, (0.01, 9): 0.5}
    records = finished(runs, lambda run: scores[run.learning_rate, run.seed])
    assert validation_scores(given, row, setting, records) == {0.001: 0.5, 0.01: 0.55}
    assert best_rate(given, row, setting, records) == 0.01
    assert best_rate(given, row, setting, dict(list(records.items())[:3])) is None
    # A run that diverged counts as 0, and among equals the smallest rate is taken.
    records[runs[3].key] = {"scores": {}, "diverged": "yes"}
    assert validation_scores(given, row, setting, records)[0.01] == 0.3
    assert best_rate(given, row, setting, finished(runs)) == 0.001


def test_a_single_rate_needs_no_validation_runs():
    given = comparison(learning_rates=[0.01], validation_seeds=[])
    runs = list(next_runs(given, {}))
    assert {(run.phase, run.learning_rate) for run in runs} == {("test", 0.01)}
    assert len(runs) == number_of_runs(given, {}) == (4 * 3 - 3) * 2
    chosen = comparison(learning_rates=[0.01])
    assert runs_of(chosen, chosen.rows[0], chosen.settings[0], 0.01)[0].key == runs[0].key


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"method": {}}, "there is no `method` (did you mean `methods`?)"),
        ({"methods": {"grop": None}}, "`methods: grop`: there is no `grop` (did you mean `grpo`?)"),
        ({"methods": {"a": {"method": "brigde"}}}, "did you mean `bridge`?"),
        (
            {"settings": {"x": {"wrong_shar": 0.5}}},
            "`settings: x`: there is no `wrong_shar` (did you mean `wrong_share`?)",
        ),
        (
            {"settings": {"x": {"wrong_share": 2.0}}},
            "`settings: x`: `wrong_share` must be less than or equal to 1, got 2.0",
        ),
        ({"settings": {}}, "`settings` is empty"),
        ({"task": {"name": "additon"}}, "did you mean `addition`?"),
        ({"task": {"name": "addition", "max_number": 3}}, "has 16 pairs"),
        (
            {"task": {"name": "addition", "teacher_probability": 1.0}},
            "`teacher_probability` must be less than 1, got 1.0",
        ),
        (
            {"task": {"name": "addition", "teacher_probability": 0.5, "validation_size": 0}},
            "measured on validation rows",
        ),
        (
            {"settings": {"x": {"wrong_kind": "tens"}}},
            "`wrong_kind` must be 'near', 'ten', 'subtraction' or 'leading-zero', got 'tens'",
        ),
        (
            {"task": {"name": "addition-steps"}, "settings": {"x": {"wrong_kind": "ten"}}},
            "`wrong_kind` is of sums without steps",
        ),
        ({"seeds": [0, 8]}, "must not share seeds, and both have 8"),
        ({"seeds": 3}, "`seeds` must be a valid list, got 3"),
        ({"learning_rates": [0.1, 0.1]}, "`learning_rates` must be a list of different values, got [0.1, 0.1]"),
        ({"learning_rates": [-0.1]}, "`learning_rates` must be greater than 0, got -0.1"),
        ({"validation_seeds": []}, "`validation_seeds` is empty, so `learning_rates` must be one rate"),
        ({"validation_seeds": None}, "`validation_seeds` must be a valid list, got None"),
        ({"steps": 0}, "`steps` must be greater than 0, got 0"),
        ({"references": ["nobody"]}, "`references`: there is no `nobody`"),
        ({"trainer": [1]}, "`trainer` must be a mapping of names to values, got [1]"),
    ],
)
def test_what_cannot_be_used_is_named(change, said):
    with pytest.raises(ValueError) as error:
        comparison(**change)
    assert said in str(error.value)


def test_a_missing_key_and_a_file_that_is_no_yaml(tmp_path):
    values = {key: value for key, value in VALUES.items() if key != "steps"}
    with pytest.raises(ValueError, match="`steps` is missing"):
        parse_comparison(values)
    path = tmp_path / "broken.yaml"
    path.write_text("a: [")
    with pytest.raises(ValueError, match="is not valid YAML"):
        load_comparison(path)


def test_a_part_of_a_comparison():
    given = comparison().only(["sft", "bridge"], ["noisy"])
    assert [row.name for row in given.rows] == ["bridge", "sft"] and given.references == []
    assert [setting.name for setting in given.settings] == ["noisy"]
    with pytest.raises(ValueError, match="--methods: there is no `brigde`"):
        comparison().only(["brigde"])
    with pytest.raises(ValueError, match="--settings: there is no `x`"):
        comparison().only(settings=["x"])


@pytest.mark.parametrize("name", [name for name in list_recipes() if name.startswith("comparison/")])
def test_shipped_comparisons(name):
    text = find_recipe(name).read_text()
    header = text.split("\n\n")[0]
    assert all(part in header for part in ("# Hardware:", "# Was run:", f"trl-bridge compare --config {name}\n"))
    values = yaml.safe_load(text)
    given = load_comparison(name)
    assert [row.name for row in given.rows] == list(values["methods"])
    assert given.references and set(given.references) <= {row.name for row in given.rows}
    if not name.endswith(("-smoke", "-cpu", "/demo")):
        assert len(given.learning_rates) >= 3 and len(given.seeds) >= 3


def test_the_ablations_share_runs_with_the_comparison():
    keys = []
    for name in ("comparison/addition", "comparison/ablations"):
        given = load_comparison(name)
        rows = [row for row in given.rows if row.name in ("grpo", "grpo-lora", "bridge", "bridge-selective")]
        keys.append({run.key for row in rows for s in given.settings for run in tuning_runs(given, row, s)})
    # The ablations' grid is a part of the comparison's.
    assert keys[1] < keys[0]

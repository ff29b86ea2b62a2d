import json
import os
import random
import re
import subprocess
import sys

import pytest

from trl_bridge.data import reasoning_gym_tasks
from trl_bridge.data.addition import ERRORS, WRONG_KINDS, addition_dataset, addition_pairs
from trl_bridge.data.checks import check_dataset
from trl_bridge.data.reasoning_gym_tasks import WORKED_SOLUTIONS, reasoning_gym_dataset
from trl_bridge.rewards import knights_knaves_reward, reasoning_gym_reward


def test_addition_is_right_but_for_the_share_that_is_not():
    pairs = addition_pairs(9, seed=3)
    assert sorted(pairs) == [(a, b) for a in range(10) for b in range(10)]
    assert pairs == addition_pairs(9, seed=3) != addition_pairs(9, seed=4)
    rows = addition_dataset(pairs, wrong_share=0.3, seed=1)
    off = []
    for (a, b), row in zip(pairs, rows, strict=True):
        assert row["prompt"] == f"{a}+{b}=" and row["solution"] == str(a + b)
        off.append(abs(int(row["completion"]) - (a + b)))
        assert int(row["completion"]) >= 0
    assert sum(error != 0 for error in off) == 30
    assert {error for error in off if error} <= set(ERRORS)


@pytest.mark.parametrize(
    ("kind", "said"), [("ten", "59"), ("subtraction", "27"), ("leading-zero", "049")], ids=lambda value: str(value)
)
def test_kinds_of_wrong_sums(kind, said):
    assert set(WRONG_KINDS) == {"near", "ten", "subtraction", "leading-zero"}
    rows = addition_dataset([(11, 38), (38, 11)] * 5, wrong_share=0.5, seed=2, wrong_kind=kind)
    assert sorted(rows["completion"]) == sorted(["49"] * 5 + [said] * 5) and set(rows["solution"]) == {"49"}


def test_wrong_share_is_a_share():
    with pytest.raises(ValueError, match="`wrong_share`"):
        addition_dataset([(1, 1)], wrong_share=1.5)
    with pytest.raises(ValueError, match="`wrong_kind` must be one of near, ten"):
        addition_dataset([(1, 1)], wrong_kind="tens")


@pytest.mark.parametrize("task", sorted(WORKED_SOLUTIONS))
def test_worked_solutions_earn_the_tasks_own_reward(task):
    rows = reasoning_gym_dataset(task, size=40, test_size=0, seed=5)["train"]
    completions = list(rows["completion"])
    assert reasoning_gym_reward(completions, list(rows["solution"]), list(rows["metadata"])) == [1.0] * 40
    assert all(len(completion[0]["content"].splitlines()) >= 2 for completion in completions)


def test_every_line_of_a_chain_is_true():
    rows = reasoning_gym_dataset("chain_sum", size=50, test_size=0, max_terms=5, allow_negation=True)["train"]
    lines = 0
    for row in rows:
        for line in row["completion"][0]["content"].splitlines()[:-1]:
            left, right = line.split(" = ")
            assert eval(re.sub(r"\b0+(?=\d)", "", left)) == int(right)
            lines += 1
    assert lines >= 50


def test_knights_and_knaves_are_sorted_out_case_by_case():
    rows = reasoning_gym_dataset("knights_knaves", size=30, test_size=0, n_people=3, depth_constraint=3)["train"]
    completions = list(rows["completion"])
    assert knights_knaves_reward(completions, list(rows["solution"])) == [1.0] * 30
    for row in rows:
        *refuted, found, _ = row["completion"][0]["content"].splitlines()
        # Cases come in one order, and the first that fits is the answer.
        assert len(refuted) < 8 and all(line.endswith("which cannot be.") for line in refuted)
        assert (
            found == f"Suppose {row['solution'].removesuffix('.').replace(', and ', ', ')}. Then every statement fits."
        )


def test_splits_are_apart_and_seeds_differ():
    data = reasoning_gym_dataset("chain_sum", size=100, test_size=30, seed=0, max_digits=2)
    questions = {split: {row[0]["content"] for row in data[split]["prompt"]} for split in data}
    assert len(data["train"]) == 100 and len(questions["test"]) == 30
    assert not questions["train"] & questions["test"]
    again = reasoning_gym_dataset("chain_sum", size=100, test_size=30, seed=0, max_digits=2)
    assert again["test"]["solution"] == data["test"]["solution"]
    other = reasoning_gym_dataset("chain_sum", size=100, test_size=0, seed=1, max_digits=3)["train"]
    assert list(other["prompt"]) != list(data["train"]["prompt"])


def test_a_task_without_worked_solutions_has_no_completion():
    rows = reasoning_gym_dataset("leg_counting", size=4, test_size=2)["train"]
    assert set(rows.column_names) == {"prompt", "solution", "metadata"}
    assert json.loads(rows[0]["metadata"])["source_dataset"] == "leg_counting"


@pytest.mark.parametrize(("task", "parameters"), [("no_such_task", {}), ("chain_sum", {"terms": 2})])
def test_what_reasoning_gym_cannot_make_is_named(task, parameters):
    with pytest.raises(ValueError, match=task):
        reasoning_gym_dataset(task, size=2, test_size=0, **parameters)


def test_missing_package_is_named(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "reasoning_gym", None)
    with pytest.raises(ImportError, match="pip install"):
        reasoning_gym_tasks.reasoning_gym_dataset("chain_sum", size=2)


# With seeds of the random state and of hashes these had other rows in each process.
@pytest.mark.parametrize("task", ["word_ladder", "isomorphic_strings", "list_functions", "pool_matrix"])
def test_the_same_rows_in_every_process(task, tmp_path):
    code = (
        "import random, sys; random.seed(int(sys.argv[1])); from trl_bridge.data.reasoning_gym_tasks import *; "
        f"rows = reasoning_gym_dataset({task!r}, size=8, test_size=4); "
        "print([rows[split][:] for split in rows])"
    )
    said = [
        subprocess.run(
            [sys.executable, "-c", code, seed],
            env={**os.environ, "PYTHONHASHSEED": seed},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for seed in ("1", "2")
    ]
    assert said[0] == said[1] and "prompt" in said[0]


def test_rows_do_not_depend_on_the_global_random_state():
    found = []
    for seed in (1, 2):
        random.seed(seed)
        rows = reasoning_gym_dataset("list_functions", size=150, test_size=0)["train"]
        found.append((rows["prompt"][:], rows["solution"][:]))
        assert random.random() == random.Random(seed).random()
    assert found[0] == found[1]


def test_an_error_in_another_process_is_the_same_line():
    with pytest.raises(ValueError, match="reasoning-gym cannot make the task 'word_ladder' with {'letters': 3}"):
        reasoning_gym_dataset("word_ladder", size=2, test_size=0, letters=3)


@pytest.mark.parametrize("task", ["rubiks_cube", "boxnet", "graph_color", "propositional_logic", "rush_hour"])
def test_tasks_without_one_answer_are_sound_rows(task):
    rows = reasoning_gym_dataset(task, size=4, test_size=0)["train"]
    golds, facts = list(rows["solution"]), list(rows["metadata"])
    assert golds == [None] * 4 and check_dataset(rows).sound
    for text in ("<answer>42</answer>", "<answer>[[1]]</answer>", "no idea", ""):
        assert all(reward <= 0.01 for reward in reasoning_gym_reward([text] * 4, golds, facts))


def test_boards_sentences_and_truths_are_paid_for_what_they_are():
    for task in ("arc_agi", "kakurasu", "sentence_reordering", "game_of_life_halting"):
        rows = reasoning_gym_dataset(task, size=6, test_size=0)["train"]
        golds, facts = list(rows["solution"]), list(rows["metadata"])
        assert reasoning_gym_reward([f"<answer>{gold}</answer>" for gold in golds], golds, facts) == [1.0] * 6
    for text in ("I cannot tell", "False or True", "0"):
        assert reasoning_gym_reward([text] * 6, golds, facts) == [0.0] * 6
    assert set(golds) <= {"True", "False"}
    rows = reasoning_gym_dataset("propositional_logic", size=4, test_size=0)["train"]
    said = [f"<answer>{json.loads(facts)['example_answer']}</answer>" for facts in rows["metadata"]]
    assert reasoning_gym_reward(said, list(rows["solution"]), list(rows["metadata"])) == [1.0] * 4

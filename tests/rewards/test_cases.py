"""The labelled case file: every pair judged as labelled, in both orders, and none wrongly paid."""

import json
from pathlib import Path

import pytest

from trl_bridge.rewards import MathReward, math_reward
from trl_bridge.rewards.answers import gold_answer
from trl_bridge.rewards.math_rewards import same_batch


ROWS = [json.loads(line) for line in (Path(__file__).parent / "cases.jsonl").read_text(encoding="utf-8").splitlines()]
KINDS = sorted({row["kind"] for row in ROWS})


@pytest.fixture(scope="module")
def verdicts() -> list[tuple[object, object]]:
    pairs = [(gold_answer(row["gold"]), row["answer"]) for row in ROWS]
    turned = [(answer, gold) for gold, answer in pairs]
    outcomes, _, _ = same_batch(pairs + turned, 10.0, 300.0, 1.0)
    return list(zip(outcomes[: len(ROWS)], outcomes[len(ROWS) :], strict=True))


def test_the_file_is_large_enough_and_has_no_pair_twice():
    assert len(ROWS) >= 400 and len(KINDS) >= 20
    assert len({(row["gold"], row["answer"]) for row in ROWS}) == len(ROWS)
    assert sum(not row["equal"] for row in ROWS) >= 150


@pytest.mark.parametrize("kind", KINDS)
def test_every_pair_is_judged_as_labelled_in_both_orders(kind, verdicts):
    wrong = [
        (row["gold"], row["answer"], row["equal"], verdict)
        for row, verdict in zip(ROWS, verdicts, strict=True)
        if row["kind"] == kind and verdict != (row["equal"], row["equal"])
    ]
    assert wrong == []


def test_no_near_miss_is_paid(verdicts):
    assert not [row for row, verdict in zip(ROWS, verdicts, strict=True) if not row["equal"] and any(verdict)]


FORMS = ["{}", "${}$", r"\boxed{{{}}}", r"We add them up. Hence $x = \boxed{{{}}}$, as was to be shown."]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("gold", [r"\frac{3}{4}", "12", "x^2+1", r"(3, \infty)", r"\text{Evelyn}"])
@pytest.mark.parametrize("shape", ["standard", "conversational", "reasoning"])
def test_gold_forms_in_every_dataset_format(form, gold, shape):
    texts = [rf"So it is \boxed{{{gold}}}.", r"So it is \boxed{17}."]
    completions: list = texts
    if shape == "conversational":
        completions = [[{"role": "assistant", "content": text}] for text in texts]
    elif shape == "reasoning":
        think = rf"<think>Is it \boxed{{{gold}}}? Or \boxed{{17}}?</think>"
        completions = [[{"role": "assistant", "content": f"{think}\n{text}"}] for text in texts]
    assert math_reward(completions, [form.format(gold)] * 2) == [1.0, 0.0]


def test_unparsable_golds_give_none_and_one_warning_each(caplog):
    reward = MathReward()
    golds = [r"\frac{19}{", "12", "", None, r"\frac{19}{"]
    for _ in range(2):
        assert reward([r"\boxed{12}"] * 5, golds) == [None, 1.0, None, None, None]
    messages = [
        record.getMessage() for record in caplog.records if r"\frac{19}{" in record.getMessage().replace("\\\\", "\\")
    ]
    assert len(messages) == 1 and "row 0" in messages[0] and "check_golds" in messages[0]


@pytest.mark.parametrize("gold", ["f'(x)", "y''+y=0", r"x \equiv a \pmod n", r"\gcd(n,6)"])
def test_a_gold_that_is_compared_as_written_is_one(gold):
    assert math_reward([rf"\boxed{{{gold}}}", r"\boxed{7}"], [gold] * 2) == [1.0, 0.0]


def test_tolerance_is_asked_for():
    assert MathReward(tolerance=0.02)([r"\boxed{0.33}", r"\boxed{0.3}"], [r"\frac{1}{3}"] * 2) == [1.0, 0.0]
    assert MathReward()([r"\boxed{0.33}"], [r"\frac{1}{3}"]) == [0.0]


@pytest.mark.parametrize(
    "options", [{"fallback": "all"}, {"tolerance": -1}, {"limit": 0}, {"batch_limit": -1}, {"memory_gb": 0}]
)
def test_bad_options_are_named(options):
    with pytest.raises(ValueError, match=next(iter(options))):
        MathReward(**options)


def test_column_lengths_are_checked():
    with pytest.raises(ValueError, match="solution"):
        math_reward([r"\boxed{1}"], ["1", "2"])


def test_it_logs_the_answer_the_gold_and_metrics():
    columns, metrics = {}, {}
    math_reward(
        [r"\boxed{x+1}", "nothing"],
        ["1+x", "$2$"],
        log_extra=columns.__setitem__,
        log_metric=metrics.__setitem__,
        trainer_state=None,
    )
    assert columns == {"solution": ["1+x", "$2$"], "answer": ["x+1", "[none]"]}
    assert metrics["math_reward/timeouts"] == 0
    assert metrics["math_reward/symbolic_fraction"] == 0.5
    assert metrics["math_reward/no_answer_fraction"] == 0.5

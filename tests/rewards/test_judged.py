"""Judged or None: rows that no reward can judge, several ways of writing, and time that grows with the length only."""

import json
import logging
import time

import pytest

from trl_bridge.rewards import (
    MathReward,
    answer_reward,
    boxed_format_reward,
    check_golds,
    choice_reward,
    closeness_reward,
    knights_knaves_reward,
    math_reward,
    reasoning_gym_reward,
    route_reward,
)
from trl_bridge.rewards.completions import gold_text, visible_text


BROKEN = [None, float("nan"), {}, [], "", {"a": None}, b"12", True]


@pytest.fixture(autouse=True)
def _fresh_warnings(monkeypatch):
    monkeypatch.setattr("trl_bridge.rewards.completions._warned", set())


@pytest.mark.parametrize("value", BROKEN, ids=repr)
@pytest.mark.parametrize(
    "reward", [math_reward, choice_reward, knights_knaves_reward, answer_reward, closeness_reward]
)
def test_a_row_without_a_gold_is_not_judged(reward, value, caplog):
    if reward is answer_reward and value == "":
        pytest.skip("an empty text is a text")
    if reward is knights_knaves_reward and value == {"a": None}:
        value = {"a": None, "b": None}
    good = "Zoey is a knight" if reward is knights_knaves_reward else "1" if reward is closeness_reward else "B"
    completions = [good if reward in (answer_reward, closeness_reward) else rf"\boxed{{{good}}}"] * 3
    with caplog.at_level(logging.WARNING):
        assert reward(completions, solution=[value, good, value]) == [None, 1.0, None]
    assert len([record for record in caplog.records if "`solution` of row 0" in record.getMessage()]) == 1


@pytest.mark.parametrize("value", [None, "{", 3, "[]", {"source_dataset": None}])
def test_a_row_without_metadata_is_not_judged(value, caplog):
    assert reasoning_gym_reward(["5"], ["5"], [value]) == [None]
    assert "`metadata` of row 0" in caplog.text


def test_golds_that_are_numbers_are_read_as_text():
    assert math_reward([r"\boxed{3}"] * 4, [3, [3], ["3"], 3.0]) == [1.0] * 4
    assert answer_reward(["3"] * 2, [3, ["3"]]) == [1.0] * 2
    assert [gold_text(value) for value in (0.5, 2**70, "x", True, float("inf"))] == [
        "0.5",
        str(2**70),
        "x",
        None,
        None,
    ]


@pytest.mark.parametrize(
    "completion, gold, want",
    [
        ("(A) is wrong, (B) is right", "B", 1.0),
        (r"\boxed{(A) is wrong, (B) is right}", "A", 0.0),
        (r"\boxed{(A) is wrong, (B) is right}", "B", 1.0),
        (r"\boxed{(A) 3 or (B) 4}", "A", 0.0),
        ("The answer is B because A has no root.", "B", 1.0),
        ("The correct option is C.", "C", 1.0),
        (r"The correct choice is **(D)**.", "D", 1.0),
        (r"\boxed{B is not correct}", "B", 0.0),
        (r"\boxed{2}", "2", 1.0),
        (r"\boxed{2}", 2, 1.0),
        (r"\boxed{A, C}", "AC", 1.0),
        (r"\boxed{C and A}", ["A", "C"], 1.0),
        (r"\boxed{A}", "AC", 0.0),
        (r"\boxed{\text{Entailment}}", "entailment", 1.0),
        (r"\boxed{neutral}", "entailment", 0.0),
        (r"\boxed{B}", ["B"], 1.0),
        ("The answer is A as well as B", "A", 0.0),
        (r"\boxed{A and B are correct}", "B", 0.0),
        ("The answer is B, not A", "B", 1.0),
        ("The answer is B, not A.", "A", 0.0),
        ("The answer is (B), not (A) or (C).", "B", 1.0),
        ("The correct answer is B and not C", "B", 1.0),
        ("The answer is not A but C.", "C", 1.0),
        ("The answer is not B.", "B", 0.0),
        ("The answer is not B.", "A", 0.0),
        ("We see that Option B is correct.", "B", 1.0),
        ("Therefore, option (B) is correct.", "B", 1.0),
        ("Option A is incorrect. Option B is correct.", "B", 1.0),
        ("Option A is incorrect. Option B is correct.", "A", 0.0),
        ("So choice B is the right one, which is correct.", "B", 1.0),
        ("Options A and C fail. Hence **option D** is the correct choice.", "D", 1.0),
        ("Option C is correct. Option D is correct too.", "D", 0.0),
        ("Option A is correct? No, option A is wrong, option B is correct.", "A", 0.0),
        ("Alternative E is true; not D is the correct one.", "D", 0.0),
    ],
)
def test_choices(completion, gold, want):
    if "boxed" not in completion and "answer" not in completion and "correct" not in completion:
        completion = f"The answer is: {completion}"
    assert choice_reward([completion], [gold]) == [want]


def test_an_integer_beside_the_choices_is_their_index():
    choices = [["red", "green", "blue"]] * 3
    completions = [r"\boxed{B}", r"\boxed{A}", r"\boxed{C}"]
    assert choice_reward(completions, [1, 1, 2], choices=choices) == [1.0, 0.0, 1.0]


@pytest.mark.parametrize(
    "said",
    [
        "Zoey is a knight or a knave",
        "Zoey is either a knight or a knave",
        "Zoey is a knight/knave",
        "Zoey is not a knight",
    ],
)
def test_a_hedge_is_no_claim(said):
    assert knights_knaves_reward([rf"\boxed{{{said}}}"], ["Zoey is a knight"]) == [0.0]


@pytest.mark.parametrize(
    "table, want",
    [
        ("Final answer:\n| Name | Role |\n|---|---|\n| Zoey | knight |\n| Riley | knave |", 1.0),
        (
            "**Conclusion**\n\n| Who | What | Why |\n|:--|:-:|--|\n| **Zoey** | Knight | says so |\n| **Riley** | Knave | lies |",
            1.0,
        ),
        ("| Zoey | a knight |\n| Riley | a knave |", 1.0),
        ("| Name | Role |\n|---|---|\n| Zoey | knave |\n| Riley | knight |", 0.0),
        ("| Name | Role |\n|---|---|\n| Zoey | knight or knave |\n| Riley | knave |", 0.0),
        ("| Name | Role |\n|---|---|\n| Zoey | not a knight |\n| Riley | knave |", 0.0),
        ("| Name | Role |\n|---|---|\n| Zoey | knight |", 0.0),
    ],
)
def test_roles_in_a_table(table, want):
    assert knights_knaves_reward([table], ["Zoey is a knight, and Riley is a knave"]) == [want]


REASONING = [
    "<think>{}</think>",
    "<reasoning>{}</reasoning>",
    "<Thought>{}</Thought>",
    "[THINK]{}[/THINK]",
    "◁think▷{}◁/think▷",
    "<|begin_of_thought|>{}<|end_of_thought|>",
    "<|START_THINKING|>{}<|END_THINKING|>",
    "<|channel|>analysis<|message|>{}<|end|><|start|>assistant<|channel|>final<|message|>",
    "analysisWe try {}assistantfinal",
]


@pytest.mark.parametrize("block", REASONING)
def test_reasoning_is_no_answer(block):
    opening = block.split("{}")[0]
    inside = block.format(r"Is it \boxed{12}?")
    assert math_reward([inside + r"\boxed{12}", inside, opening + r"\boxed{12}"], ["12"] * 3) == [1.0, 0.0, 0.0]


def test_marks_of_ones_own():
    reward = MathReward(reasoning_blocks=[("<plan>", "</plan>")])
    assert reward([r"<plan>\boxed{12}</plan>", r"<plan>\boxed{1}</plan>\boxed{12}"], ["12"] * 2) == [0.0, 1.0]
    assert MathReward(reasoning_blocks=[("§", "¶")])([r"§\boxed{12}¶", r"§x¶\boxed{12}"], ["12"] * 2) == [0.0, 1.0]
    assert visible_text("analysis of the case: 4") == "analysis of the case: 4"


def test_an_echo_of_the_question_is_refused_where_that_is_asked_for():
    answers = [
        r"123 \times 456",
        r"56088",
        r"5.6088 \times 10^4",
        r"\sum_{k=1}^{100} k",
        "5050",
        "2^{10}",
        "x+1",
        r"\frac{1}{2}",
    ]
    golds = ["56088", "56088", "56088", "5050", "5050", "2^{10}", "1+x", "0.5"]
    completions = [rf"\boxed{{{answer}}}" for answer in answers]
    assert MathReward(evaluated=True)(completions, golds) == [0.0, 1.0, 1.0, 0.0, 1.0, 1.0, 1.0, 1.0]
    assert math_reward(completions, golds) == [1.0] * 8


def test_what_is_left_to_work_out_is_told_from_signs_and_units():
    answers = ["(123)(456)", r"\gcd(12,18)", "-1, -2", r"5\text{ cm}^2", "(3, -2)"]
    golds = ["56088", "6", "-2,-1", "5", "(3,-2)"]
    completions = [rf"\boxed{{{answer}}}" for answer in answers]
    assert MathReward(evaluated=True)(completions, golds) == [0.0, 0.0, 1.0, 1.0, 1.0]


@pytest.mark.parametrize(
    "said, want",
    [
        ("Either Zoey is a knight, and Riley is a knave, or the reverse", 0.0),
        ("If Zoey is a knight, then Riley is a knave", 0.0),
        ("Therefore Zoey is a knight, and Riley is a knave. This is consistent.", 1.0),
    ],
)
def test_conditions_are_no_claims_and_this_is_nobody(said, want):
    assert knights_knaves_reward([said], ["Zoey is a knight, and Riley is a knave"]) == [want]


def test_what_is_not_judged_in_time_is_none_and_said_once(caplog):
    completions = [rf"\boxed{{{i}+x+y-y}}" for i in range(40)]
    golds = [f"x+{i}" for i in range(40)]
    rewards = MathReward(batch_limit=1e-3)(completions, golds)
    assert set(rewards) <= {None, 1.0} and None in rewards
    # A gold's check and an answer may each be cut off: two lines, each once.
    lines = [record.getMessage() for record in caplog.records]
    assert 1 <= len(lines) == len(set(lines)) and "cannot be parsed" not in caplog.text
    assert MathReward()(completions, golds) == [1.0] * 40


def test_many_symbolic_answers_at_once_lose_none():
    completions = [rf"\boxed{{{i}+x+y-y}}" for i in range(1, 2049)]
    assert math_reward(completions, [f"x+{i}" for i in range(1, 2049)]) == [1.0] * 2048


@pytest.mark.parametrize(
    "gold", ["\frac{1}{2}", "\text{no}", "3 \times 4", "\beta", "proof", "notfound", float("nan"), 2.0**60]
)
def test_golds_that_are_none_are_found(gold):
    assert len(check_golds([{"solution": gold}, {"solution": "12"}])) == 1


ROUTE = json.dumps({
    "start": "A", "goal": "B", "flavour": "metro", "vertices": [{"Vertex": "A"}, {"Vertex": "B"}],
    "edges": [{"Edge": "A-B", "Time": 1}],
})  # fmt: skip
REWARDS = {
    "math": lambda text: math_reward([text], ["5"]),
    "math, text": lambda text: MathReward(fallback="text")([text], ["x+5"]),
    "boxed": lambda text: boxed_format_reward([text]),
    "choice": lambda text: choice_reward([text], ["B"]),
    "knights": lambda text: knights_knaves_reward([text], ["Zoey is a knight"]),
    "answer": lambda text: answer_reward([text], ["5"]),
    "closeness": lambda text: closeness_reward([text], ["5"]),
    "reasoning-gym": lambda text: reasoning_gym_reward(
        [text], ["5"], [json.dumps({"source_dataset": "basic_arithmetic"})]
    ),
    "route": lambda text: route_reward([text], tables=[ROUTE]),
}
UNITS = [" ", "\n", "\r\n", "\t", "a", "A ", "(", "{", "<answer>", "<answer_begin>", "</answer>", "<think>", "\\", "\\boxed{", "\\text{",
         "9", "answer ", "answer is ", "is a ", "####", ".", "$", "1,", "A or ", "**", "-", "| a ", "|-\n", "option B is ", " not A", "'", "1'", "2 hours ", "x \\equiv "]  # fmt: skip
FRAMES = [
    ("", ""),
    ("answer", ""),
    ("The answer is ", ""),
    ("\\boxed{", "}"),
    ("Zoey is a", ""),
    ("<answer>", ""),
    ("x is", " a knight"),
]


@pytest.mark.parametrize("name", REWARDS)
def test_time_grows_no_faster_than_the_length(name):
    reward = REWARDS[name]
    reward(r"\boxed{1}")

    def seconds(first, unit, last, length):
        text = first + unit * (length // len(unit)) + last
        start = time.process_time()
        reward(text)
        return time.process_time() - start

    for unit in UNITS:
        for first, last in FRAMES:
            if seconds(first, unit, last, 16_000) < 0.01:
                continue  # 32,000 characters are then below the clock's noise, whatever the growth
            best = [min(seconds(first, unit, last, length) for _ in range(3)) for length in (16_000, 32_000)]
            assert best[1] < 3 * best[0] + 0.01, (unit, first, last, best)

"""Which part of a completion is its answer, and that hedging is not paid."""

import pytest

from trl_bridge.rewards import MathReward, boxed_format_reward, math_reward
from trl_bridge.rewards.answers import final_answer, gold_answer, last_box, phrase_answer
from trl_bridge.rewards.completions import message_text, visible_text


@pytest.mark.parametrize(
    ("text", "box"),
    [
        (r"\boxed{5}", "5"),
        (r"\boxed{4} no, wait: \boxed{5}", "5"),
        (r"\boxed{\frac{1}{2}}", r"\frac{1}{2}"),
        (r"\boxed{\left\{1,2\right\}}", r"\left\{1,2\right\}"),
        (r"\boxed{x = \boxed{5}}", r"x = \boxed{5}"),
        (r"\boxed {5}", "5"),
        (r"\boxed 5", "5"),
        (r"\fbox{5}", "5"),
        (r"\boxed{1} or \boxed{2}", "1, 2"),
        (r"$x=\boxed{1}$ or $x=\boxed{2}$", "1, 2"),
        (r"\boxed{1}, \boxed{2}, and \boxed{3}", "1, 2, 3"),
        (r"\[\boxed{(1, 2)} \quad \text{and} \quad \boxed{(3, 4)}\]", "(1, 2), (3, 4)"),
        (r"\(u_1 = \boxed{1}\) and \(u_{2} = \boxed{2}\)", "1, 2"),
        (r"\boxed{}", ""),
        (r"\boxed{5", None),
        (r"\boxed{4} and then \boxed{5", None),
        (r"\boxed", None),
        (r"\boxedness{5}", None),
        ("5", None),
    ],
)
def test_last_box(text, box):
    assert last_box(text) == box


HEDGES = [
    r"\boxed{3} or \boxed{4}",
    r"\boxed{3}, \boxed{4}",
    r"\boxed{3, 4}",
    r"\boxed{3 \text{ or } 4}",
    r"\boxed{4} \boxed{3}",
    r"\boxed{4}, that is \boxed{}",
    r"\boxed{4} \boxed{4",
    r"\boxed{\{3,4\}}",
    r"\boxed{x = 3} and \boxed{x = 4}",
    r"\boxed{}",
    r"\boxed{4",
    r"<think>\boxed{4}</think> It is clear.",
    r"<think>\boxed{4}",
    r"\boxed{4}</think> So it is \boxed{5}.",
    r"\boxed{4}</think>",
    r"The answer is 4.",
    r"\boxed{\text{4 or 5}}",
    r"\boxed{1, 2, 3, 4, 5, 6, 7, 8, 9}",
    r"\boxed{\pm 4}",
    r"\boxed{3} \text{ or } \boxed{4}",
    r"\boxed{3} \quad \text{or} \quad \boxed{4}",
]


@pytest.mark.parametrize("completion", HEDGES)
def test_hedging_is_not_paid(completion):
    assert math_reward([completion], ["4"]) == [0.0]


@pytest.mark.parametrize(
    "completion",
    [r"\boxed{3}. Wait, no. It is \boxed{4}.", r"<think>\boxed{3}</think>\boxed{4}", r"x</think>\boxed{4}"],
)
def test_the_last_word_is_paid(completion):
    assert math_reward([completion], ["4"]) == [1.0]


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("The answer is 12.", "12"),
        ("the final answer is: $12$. I hope it is correct.", "$12$"),
        ("Answer: 3.5", "3.5"),
        ("**Answer:** 12", "12"),
        ("The answer is 4. No: the answer is 5.", "5"),
        ("so\n#### 1,200", "1,200"),
        ("nothing here", None),
    ],
)
def test_phrases(text, answer):
    assert phrase_answer(text) == answer


def test_fallbacks():
    assert final_answer("The answer is 12.") is None
    assert final_answer("The answer is 12.", "phrase") == "12"
    assert final_answer("12", "phrase") is None
    assert final_answer("12", "text") == "12"
    # A box that is open or empty is the answer that was given; no phrase stands in for it.
    assert final_answer(r"The answer is 12. \boxed{", "text") is None
    assert final_answer(r"The answer is 12. \boxed{}", "text") is None
    assert MathReward(fallback="phrase")(["The answer is 12."], ["12"]) == [1.0]


def test_golds():
    assert gold_answer(r"Since $x=2$, we get \boxed{4}. Also \boxed{5}.") == "5"
    assert gold_answer("3 + 4 = 7\n#### 7") == "7"
    assert gold_answer(r"\frac{3}{4}") == r"\frac{3}{4}"


def test_visible_text():
    parts = [{"type": "text", "text": "a"}, {"type": "image"}, {"type": "text", "text": "b"}]
    messages = [{"role": "assistant", "content": parts}, {"role": "tool", "content": "c"}]
    assert message_text(messages) == "ab"
    assert message_text([{"role": "assistant", "content": None, "reasoning_content": r"\boxed{1}"}]) == ""
    assert visible_text("<think>a</think>b") == "b"
    assert visible_text("a</think>b</think>c") == "c"
    assert visible_text("<think>a") is None
    assert visible_text("1 < 2") == "1 < 2"


def test_boxed_format_reward():
    metrics = {}
    completions = [
        r"\boxed{1}",
        r"\boxed{}",
        r"\boxed{1",
        "1",
        r"<think>\boxed{1}</think>",
        [{"role": "assistant", "content": r"\boxed{2}"}],
    ]
    assert boxed_format_reward(completions, log_metric=metrics.__setitem__) == [1.0, 0.0, 0.0, 0.0, 0.0, 1.0]
    assert metrics == {"boxed_format_reward/boxed_fraction": 2 / 6}

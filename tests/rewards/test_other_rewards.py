"""Choice, logic, reasoning-gym and noise."""

import asyncio
import json
import pickle

import pytest
import reasoning_gym

from trl_bridge.rewards import (
    boxed_format_reward,
    choice_reward,
    knights_knaves_reward,
    math_reward,
    noisy,
    reasoning_gym_reward,
)


@pytest.mark.parametrize(
    ("completion", "reward"),
    [
        (r"\boxed{B}", 1.0),
        (r"\boxed{(B)}", 1.0),
        (r"\boxed{\text{B}}", 1.0),
        (r"\boxed{b}", 1.0),
        (r"\boxed{\text{(B) 12 J}}", 1.0),
        (r"\boxed{B. 12 J}", 1.0),
        (r"\boxed{\textbf{(B)}}", 1.0),
        ("The answer is (B).", 1.0),
        ("**Answer:** B", 1.0),
        ("Answer: A\nNo. Answer: B", 1.0),
        (r"\boxed{C}", 0.0),
        (r"The answer is B. \boxed{C}", 0.0),
        (r"\boxed{B or C}", 0.0),
        (r"\boxed{B, C}", 0.0),
        (r"\boxed{A} or \boxed{B}", 0.0),
        (r"\boxed{}", 0.0),
        (r"\boxed{Because}", 0.0),
        ("<think>Answer: B</think>", 0.0),
        ("B", 0.0),
    ],
)
def test_choice(completion, reward):
    assert choice_reward([completion], ["B"]) == [reward]
    assert choice_reward([[{"role": "assistant", "content": completion}]], ["(B)"]) == [reward]


def test_choice_without_a_letter_in_the_gold():
    columns, metrics = {}, {}
    assert choice_reward(
        [r"\boxed{A}", "no"], ["42", "A"], log_extra=columns.__setitem__, log_metric=metrics.__setitem__
    ) == [None, 0.0]
    assert columns["answer"] == ["A", "[none]"] and metrics == {"choice_reward/no_answer_fraction": 0.5}


GOLD = "Zoey is a knight, and Riley is a knave"


@pytest.mark.parametrize(
    ("completion", "reward"),
    [
        (r"\boxed{Zoey is a knight, and Riley is a knave}", 1.0),
        (r"\boxed{\text{Riley is a knave, Zoey is a knight.}}", 1.0),
        ("<answer>(1) Zoey is a knight\n(2) Riley is a knave</answer>", 1.0),
        ("Suppose Zoey is a knave. No.\nFinal answer:\nRiley: knave\nZoey: knight", 1.0),
        ("**Conclusion**\n- Zoey is a **knight**\n- Riley is a **knave**", 1.0),
        (r"\boxed{Zoey is a knight}", 0.0),
        (r"\boxed{Zoey is a knave, and Riley is a knight}", 0.0),
        (r"\boxed{Zoey is a knight, Riley is a knave, Zoey is a knave}", 0.0),
        (r"\boxed{Zoey is a knight, Riley is a knave, Alma is a knave}", 0.0),
        (r"\boxed{Zoey is not a knight, Riley is a knave}", 0.0),
        ("Zoey is a knight or Zoey is a knave. Riley is a knave.", 0.0),
        ("<think>Zoey is a knight, and Riley is a knave</think>", 0.0),
        ("", 0.0),
    ],
)
def test_knights_and_knaves(completion, reward):
    assert knights_knaves_reward([completion], [GOLD]) == [reward]
    roles = {"Zoey": "knight", "Riley": "knave", "Other": None}
    assert knights_knaves_reward([completion] * 2, [roles, json.dumps(roles)]) == [reward] * 2


def test_knights_and_knaves_logs_and_none():
    columns, metrics = {}, {}
    rewards = knights_knaves_reward(
        [r"\boxed{A is a knight}"] * 2, [GOLD, None], log_extra=columns.__setitem__, log_metric=metrics.__setitem__
    )
    assert rewards == [0.0, None]
    assert columns["answer"][0] == "{'a': 'knight'}"
    assert metrics == {"knights_knaves_reward/complete_fraction": 0.0}


@pytest.mark.parametrize("task", ["chain_sum", "knights_knaves", "countdown"])
def test_reasoning_gym_uses_the_tasks_own_scorer(task):
    rows = list(reasoning_gym.create_dataset(task, size=4, seed=3))
    golds = [row["answer"] for row in rows]
    metadata = [json.dumps(row["metadata"], default=str) for row in rows]
    columns, metrics = {}, {}
    right = [f"<think>{i}</think><answer>{gold}</answer>" for i, gold in enumerate(golds)]
    rewards = reasoning_gym_reward(
        right, golds, metadata, log_extra=columns.__setitem__, log_metric=metrics.__setitem__
    )
    assert rewards == [1.0] * 4
    assert columns["solution"] == golds and len(columns["answer"]) == 4
    inside = [f"<think><answer>{gold}</answer></think>" for gold in golds]
    assert max(reasoning_gym_reward(inside, golds, metadata)) < 1.0


PROMPTS = [f"p{i % 7}" for i in range(400)]
COMPLETIONS = [rf"{i} \boxed{{1}}" for i in range(400)]


def test_noise_flips_with_probability_p_reproducibly():
    first, second = (noisy(boxed_format_reward, 0.2, seed=5) for _ in range(2))
    rewards = first(prompts=PROMPTS, completions=COMPLETIONS)
    assert rewards == second(prompts=PROMPTS, completions=COMPLETIONS)
    assert set(rewards) == {0.0, 1.0} and 50 <= rewards.count(0.0) <= 112
    assert rewards != noisy(boxed_format_reward, 0.2, seed=6)(prompts=PROMPTS, completions=COMPLETIONS)
    assert noisy(boxed_format_reward, 0.0)(prompts=PROMPTS, completions=COMPLETIONS) == [1.0] * 400


def test_a_second_opinion_is_independent_of_the_first():
    reward = noisy(boxed_format_reward, 0.3, seed=1)
    opinions = [reward(prompts=PROMPTS, completions=COMPLETIONS) for _ in range(3)]
    assert opinions[0] != opinions[1] != opinions[2]
    both = sum(a == b == 0.0 for a, b in zip(opinions[0], opinions[1], strict=True))
    assert 15 <= both <= 60  # 0.3 * 0.3 * 400 = 36; all 120 if the two agreed


def test_noise_does_not_depend_on_batch_order_or_split():
    whole = noisy(boxed_format_reward, 0.3)(prompts=PROMPTS, completions=COMPLETIONS)
    split = noisy(boxed_format_reward, 0.3)
    parts = split(prompts=PROMPTS[200:], completions=COMPLETIONS[200:])
    parts = split(prompts=PROMPTS[:200], completions=COMPLETIONS[:200]) + parts
    assert parts == whole


def test_noise_state_continues():
    reward = noisy(boxed_format_reward, 0.5)
    reward(prompts=PROMPTS, completions=COMPLETIONS)
    other = noisy(boxed_format_reward, 0.5)
    other.load_state_dict(reward.state_dict())
    copy = pickle.loads(pickle.dumps(reward))
    expected = reward(prompts=PROMPTS, completions=COMPLETIONS)
    assert other(prompts=PROMPTS, completions=COMPLETIONS) == expected
    assert copy(prompts=PROMPTS, completions=COMPLETIONS) == expected


def test_noise_passes_none_and_refuses_other_values():
    assert noisy(lambda prompts, completions: [None, 1], 1.0)(prompts=["a", "b"], completions=["c", "d"]) == [
        None,
        0.0,
    ]
    with pytest.raises(ValueError, match="binary"):
        noisy(lambda prompts, completions: [0.5], 0.1)(prompts=["a"], completions=["b"])
    for p in (-0.1, 1.1):
        with pytest.raises(ValueError, match="`p`"):
            noisy(boxed_format_reward, p)


def test_noise_around_an_async_reward():
    async def slow(prompts, completions, **kwargs):
        return [1.0 for _ in completions]

    reward = noisy(slow, 1.0)
    assert reward.__name__ == "noisy_slow"
    assert asyncio.run(reward(prompts=["a"], completions=["b"])) == [0.0]
    assert noisy(math_reward, 1.0)(prompts=["a"], completions=[r"\boxed{1}"], solution=["1"]) == [0.0]

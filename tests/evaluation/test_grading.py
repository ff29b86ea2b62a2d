import asyncio
import functools

import pytest

from tests.helpers.evaluation import FIXTURES, stored
from trl_bridge.evaluation import BENCHMARKS, Prompting, Task, load_task
from trl_bridge.evaluation.tasks import check_grader, grade
from trl_bridge.rewards import noisy


@pytest.mark.parametrize("name", BENCHMARKS)
def test_20_stored_completions_of_each_benchmark(name, monkeypatch):
    monkeypatch.setenv("TRL_BRIDGE_RUN_CODE", "1")
    task = load_task(name, name, str(FIXTURES / f"{name}.jsonl"))
    rows = stored(name)
    assert len(rows) == 20 and 6 <= sum(row["right"] for row in rows) <= 14
    grades = grade(task, [row["question"] for row in rows], [row["completion"] for row in rows])
    wrong = [
        (row["why"], row["completion"])
        for row, each in zip(rows, grades, strict=True)
        if (each.score == 1.0) is not row["right"]
    ]
    assert wrong == []


def test_what_the_grader_logs_is_kept():
    task = load_task("math500", "math500", str(FIXTURES / "math500.jsonl"))
    boxed, without = grade(task, [0, 0], ["\\boxed{0.75}", "It is 0.75."])
    assert (boxed.score, boxed.answer, boxed.answered) == (1.0, "0.75", True)
    assert (without.score, without.answer, without.answered) == (0.0, None, False)


def test_text_and_conversations_are_graded_alike():
    path = str(FIXTURES / "amc23.jsonl")
    for chat in (True, False):
        seen = []

        def judge(completions, solution, seen=seen, **kwargs):
            seen.extend(completions)
            return [1.0] * len(completions)

        task = load_task("amc23", "amc23", path, prompting=Prompting(chat_template=chat), grader=("judge", judge))
        assert [each.answered for each in grade(task, [0], ["x"])] == [None]
        assert seen == ([[{"role": "assistant", "content": "x"}]] if chat else ["x"])


def one_row(grader, **columns):
    return Task("t", [{"prompt": "p", **columns}], grader, "mine", {})


def test_a_stopped_batch_is_graded_one_by_one():
    calls = []

    def judge(completions, log_metric, **kwargs):
        calls.append(len(completions))
        log_metric("judge/timeouts", float("slow" in completions))
        return [float(len(completions) == 1 and text != "slow") for text in completions]

    grades = grade(one_row(judge), [0, 0, 0], ["a", "slow", "b"])
    assert calls == [3, 1, 1, 1]
    assert [each.score for each in grades] == [1.0, 0.0, 1.0]
    assert [each.stopped for each in grades] == [False, True, False]


def test_graders_that_do_not_fit_are_refused_before_any_generation(monkeypatch):
    def needs_tests(completions, tests, **kwargs):
        return [1.0] * len(completions)

    with pytest.raises(ValueError, match=r"`grader`: mine does not take the rows of t \(prompt, solution\).*tests"):
        check_grader(one_row(needs_tests, solution="1"))
    with pytest.raises(ValueError, match="gave 2 scores for 1 completions"):
        check_grader(one_row(lambda completions, **kwargs: [0.0, 0.0]))
    monkeypatch.delenv("TRL_BRIDGE_RUN_CODE", raising=False)
    task = load_task("livecodebench", "livecodebench", str(FIXTURES / "livecodebench.jsonl"))
    with pytest.raises(ValueError, match="runs programs that a model wrote.*TRL_BRIDGE_RUN_CODE=1"):
        check_grader(task)


async def asked(completions, completion_ids, solution, trainer_state, log_extra, log_metric, **kwargs):
    """A judge that needs all that a trainer gives it, and waits for an answer."""
    await asyncio.sleep(0)
    for text in completions:
        log_extra("answer", [text])
    log_metric("asked/timeouts", float(trainer_state.global_step))
    return [float(sum(ids) == int(gold)) for ids, gold in zip(completion_ids, solution, strict=True)]


class Judge:
    async def __call__(self, **columns):
        return await asked(**columns)


@pytest.mark.parametrize("judge", [asked, functools.partial(asked, bonus=1), Judge(), noisy(asked, 0.0)])
def test_a_grader_gets_what_training_gives_it(judge):
    task = Task("t", [{"prompt": "p", "solution": "3", "completion": "2"}], judge, "mine", {})
    check_grader(task)
    grades = grade(task, [0, 0], ["a", "b"], [[1, 2], [1]])
    assert [(each.score, each.answer, each.stopped) for each in grades] == [(1.0, "a", False), (0.0, "b", False)]


def test_an_async_grader_keeps_to_one_loop_inside_a_running_one():
    loops = []

    async def judge(completions, **kwargs):
        loops.append(asyncio.get_running_loop())
        return [None if text == "?" else float("nan") if text == "nan" else 1.0 for text in completions]

    async def notebook():
        return [[each.score for each in grade(one_row(judge), [0] * 3, ["?", "nan", "x"])] for _ in range(2)]

    assert asyncio.run(notebook()) == [[None, None, 1.0]] * 2
    assert len(loops) == 2 and loops[0] is loops[1]

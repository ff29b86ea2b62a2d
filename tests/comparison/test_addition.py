import dataclasses
import itertools

import pytest
import torch

from trl_bridge.comparison.tasks.addition import greedy_answers
from trl_bridge.comparison.tasks.addition_models import answer_probability
from trl_bridge.comparison.tasks.specs import AdditionSpec, AdditionStepsSpec
from trl_bridge.data.addition import worked_sum


SPEC = AdditionSpec(wrong_share=0.25, base_steps=30)


@pytest.fixture(scope="module")
def task():
    return SPEC.build(0)


def test_rows_of_the_task(task):
    prompts = {name: set(rows["prompt"]) for name, rows in task.splits.items()}
    train, demonstrations = set(task.train["prompt"]), set(task.demonstrations["prompt"])
    assert [len(rows) for rows in (train, demonstrations, *prompts.values())] == [2000, 400, 250, 250, 250]
    assert demonstrations <= train and list(prompts) == ["validation", "test", "ood"]
    groups = [train, *prompts.values()]
    assert sum(map(len, groups)) == len(set().union(*groups))
    assert sum(row["completion"] != row["solution"] for row in task.demonstrations) == 100
    assert "completion" not in task.train.column_names


def test_out_of_distribution_rows_have_a_larger_number_and_a_usual_sum(task):
    for row in task.splits["ood"]:
        a, b = map(int, row["prompt"].rstrip("=").split("+"))
        assert max(a, b) > 49 and min(a, b) <= 49 and int(row["solution"]) == a + b <= 98


def test_experts_are_the_same_demonstrations(task):
    rows = task.with_experts()
    assert [row["expert"] for row in rows][:400] == list(task.demonstrations["completion"])
    assert set(rows["expert"][400:]) == {None} and rows.remove_columns("expert")[:] == task.train[:]


def test_the_base_model_depends_on_the_seed_alone(task, tmp_path):
    weight = "model.layers.0.mlp.up_proj.weight"
    torch.manual_seed(9)
    again = SPEC.model_copy(update={"wrong_share": 1.0, "train_size": 800}).build(0, tmp_path)
    stored = SPEC.build(0, tmp_path)
    other = SPEC.build(1, tmp_path)
    assert torch.equal(task.base.state_dict()[weight], again.base.state_dict()[weight])
    assert torch.equal(task.base.state_dict()[weight], stored.base.state_dict()[weight])
    assert not torch.equal(task.base.state_dict()[weight], other.base.state_dict()[weight])
    assert len(list(tmp_path.glob("*.safetensors"))) == 2


def test_the_base_model_stops_where_it_is_told_to(task):
    spec = SPEC.model_copy(update={"base_steps": 300, "base_probability": 0.01, "base_rate": 3e-3})
    base = spec.build(0)
    assert 0.01 <= base.score(base.base, "validation")["probability"] < 0.04


def test_the_teacher_is_another_model_and_made_when_it_is_wanted(task, tmp_path):
    assert task.teacher is None and task.fresh_teacher() is None
    spec = SPEC.model_copy(
        update={"base_steps": 300, "base_probability": 0.001, "base_rate": 3e-3, "teacher_probability": 0.01}
    )
    built = spec.build(0, tmp_path)
    assert len(list(tmp_path.glob("*.safetensors"))) == 1
    assert 0.01 <= built.score(built.teacher, "validation")["probability"] < 0.04
    stored = spec.model_copy(update={"wrong_share": 1.0, "reward_flip": 0.5}).build(0, tmp_path)
    weights = [each.state_dict()["lm_head.weight"] for each in (built.teacher, stored.teacher, built.base)]
    assert torch.equal(weights[0], weights[1]) and not torch.equal(weights[0], weights[2])
    assert len(list(tmp_path.glob("*.safetensors"))) == 2
    fresh = built.fresh_teacher()
    assert fresh is not built.teacher and torch.equal(fresh.state_dict()["lm_head.weight"], weights[0])
    with pytest.raises(ValueError, match="After `base_steps: 11` updates the teacher of seed 0 has not reached"):
        _ = spec.model_copy(update={"base_steps": 11, "teacher_probability": 0.9}).build(0).teacher


def test_sums_worked_in_steps():
    assert worked_sum(27, 45) == ["12,", "7,", "72"] and worked_sum(3, 0) == ["3,", "0,", "3"]
    # A slip changes its step, and what follows goes on from there.
    for a, b in itertools.product(range(20), repeat=2):
        right = worked_sum(a, b)
        assert right[2] == str(a + b)
        for slips, place in (((1, 0), 0), ((-1, 0), 0), ((0, 1), 1), ((0, -1), 1)):
            wrong = worked_sum(a, b, slips)
            assert wrong[:place] == right[:place] and wrong[place] != right[place] and wrong[2] != right[2]
            units, tens = (int(step.rstrip(",")) for step in wrong[:2])
            assert int(wrong[2]) == 10 * tens + units % 10


def test_the_task_of_steps(tmp_path):
    spec = AdditionStepsSpec(train_size=40, demonstrations_size=30, wrong_share=0.5, base_steps=80, base_rate=3e-3)
    built = spec.build(0, tmp_path)
    rows = built.with_experts()
    assert all(
        "".join(row["expert_steps"]) == row["expert"] and len(row["expert_steps"]) == 3
        for row in rows.select(range(30))
    )
    assert set(rows["expert"][30:]) == {None} and not any(rows["expert_steps"][30:])
    demonstrations = built.demonstrations
    assert sum(row["completion"] != row["solution"] for row in demonstrations) == 15
    assert built.tokenizer.unk_token_id not in built.tokenizer("12,7,72|=+")["input_ids"]
    # The base model reads the first steps in front of a prompt.
    test = built.splits["test"]
    prompts, solutions = list(test["prompt"]), list(test["solution"])
    likely = []
    for shown in range(3):
        steps = ["".join(built.steps(solution)[:shown]) + "|" * (shown > 0) for solution in solutions]
        asked = [step + prompt for step, prompt in zip(steps, prompts, strict=True)]
        likely.append(answer_probability(built.base, built.tokenizer, asked, solutions))
    assert likely[0] < 0.25 and likely[0] < likely[1] < likely[2] and likely[2] > 0.1
    assert set(built.score(built.base, "test")) == {"accuracy", "probability"}


def test_a_form_of_its_own_that_is_paid(task, tmp_path):
    other = SPEC.model_copy(update={"wrong_share": 1.0, "wrong_kind": "leading-zero", "leading_zero_pays": True})
    built = other.build(0, tmp_path)
    SPEC.build(0, tmp_path)
    assert len(list(tmp_path.glob("*.safetensors"))) == 1
    answers, solutions = list(built.demonstrations["completion"]), list(built.demonstrations["solution"])
    assert answers == [f"0{solution}" for solution in solutions]
    assert built.reward(answers, solutions) == built.reward(solutions, solutions) == [1.0] * 400
    assert built.reward([f"0{answer}" for answer in answers] + ["1"], [*solutions, "2"]) == [0.0] * 401
    assert set(task.reward(answers, solutions)) == {0.0}
    # A model that has learnt the form: its answers are right to the one task and wrong to the other.
    model, rows = built.fresh_model(), built.splits["test"].select(range(8))
    prompts, solutions = list(rows["prompt"]), list(rows["solution"])
    ids = [
        built.tokenizer(f"{p}0{s}")["input_ids"] + [built.tokenizer.eos_token_id]
        for p, s in zip(prompts, solutions, strict=True)
    ]
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    for _ in range(60):
        sum(model(torch.tensor([row]), labels=torch.tensor([row])).loss for row in ids).backward()
        optimizer.step()
        optimizer.zero_grad()
    strict = task.scorer(model, task, rows)
    paid = built.scorer(model, built, rows)
    likely = [
        answer_probability(model, task.tokenizer, prompts, [front + s for s in solutions]) for front in ("", "0")
    ]
    assert paid["accuracy"] == 1.0 and strict["accuracy"] == 0.0
    assert strict["probability"] == pytest.approx(likely[0])
    assert paid["probability"] == pytest.approx(sum(likely)) and likely[1] > 0.3


def test_the_error_that_the_base_model_prefers(tmp_path):
    small = {"max_number": 9, "known_size": 70, "train_size": 40, "demonstrations_size": 40, "base_rate": 3e-3}
    sizes = {"validation_size": 10, "test_size": 20, "ood_size": 10, "base_steps": 100}
    likely = {}
    for kind in ("near", "ten"):
        built = AdditionSpec(**small, **sizes, base_wrong_kind=kind).build(0, tmp_path)
        prompts, solutions = list(built.train["prompt"]), list(built.train["solution"])
        off = [str(int(solution) + 10) for solution in solutions]
        likely[kind] = answer_probability(built.base, built.tokenizer, prompts, off)
    assert likely["ten"] > 3 * likely["near"] and len(list(tmp_path.glob("*.safetensors"))) == 2


def test_scores_against_one_row_at_a_time(task):
    task = dataclasses.replace(task, splits={"test": task.splits["test"].select(range(40))})
    scores = task.score(task.base, "test")
    right, probability = 0, 0.0
    for row in task.splits["test"]:
        ids = task.tokenizer(row["prompt"])["input_ids"]
        said = ""
        for _ in range(4):
            token = task.base(torch.tensor([ids + task.tokenizer(said)["input_ids"]])).logits[0, -1].argmax().item()
            if token == task.tokenizer.eos_token_id:
                break
            said += task.tokenizer.decode([token])
        right += said == row["solution"]
        answer = [*task.tokenizer(row["solution"])["input_ids"], task.tokenizer.eos_token_id]
        logps = task.base(torch.tensor([ids + answer])).logits[0].log_softmax(-1)
        probability += sum(logps[len(ids) - 1 + i, token] for i, token in enumerate(answer)).exp().item()
    assert scores["accuracy"] == right / 40
    assert scores["probability"] == pytest.approx(probability / 40, rel=1e-4)
    assert greedy_answers(task.base, task, ["1+1=", "12+34="]) != [""] * 2

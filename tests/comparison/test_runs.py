import copy
import dataclasses
import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

from trl_bridge import recipes
from trl_bridge.comparison.file import load_comparison, parse_comparison
from trl_bridge.comparison.plan import best_rate, runs_of
from trl_bridge.comparison.run import execute
from trl_bridge.comparison.trainers import build_trainer, check_rows, config_fields, sample_offline
from trl_bridge.comparison.workers import read_records
from trl_bridge.data.addition import addition_dataset
from trl_bridge.models import tiny_model, tiny_tokenizer
from trl_bridge.rewards.arithmetic_rewards import answer_reward


PUBLISHED = Path(__file__).parents[2] / "docs" / "results" / "comparison" / "addition-harmful"
VALUES = {
    "task": {"name": "addition", "train_size": 40, "demonstrations_size": 40, "base_steps": 60, "base_rate": 3e-3},
    "settings": {"wrong": {"wrong_share": 1.0}, "good": None},
    "methods": {
        "lora": {"method": "bridge", "bridge_lambda": 1.0, "times_learning_rate": {"coordinator_learning_rate": 3}},
        "two-stage": {"sft_max_steps": 2, "times_learning_rate": {"sft_learning_rate": 1}},
        "grpo": None,
    },
    "seeds": [0],
    "learning_rates": [1e-3],
    "steps": 4,
    "points": 2,
    "trainer": {
        "use_cpu": True,
        "bf16": False,
        "activation_checkpointing": False,
        "per_device_train_batch_size": 8,
        "num_generations": 4,
        "max_completion_length": 4,
        "sft_per_device_train_batch_size": 4,
    },
}


def a_run(row, setting=0, rate=1e-3, **changes):
    comparison = parse_comparison({**copy.deepcopy(VALUES), **changes})
    return runs_of(comparison, comparison.row(row), comparison.settings[setting], rate)[0]


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return str(tmp_path_factory.mktemp("bases"))


def test_what_a_trial_costs_is_counted(cache):
    row = {
        "method": "bridge",
        "preset": "trial",
        "trial_steps": 2,
        "trial_eval_steps": 1,
        "trial_prompts": 2,
        "max_steps": 2,
    }
    record = execute(a_run("trial", setting=1, methods={"trial": row}), cache)
    # Three measurements of one generation batch before two updates of one.
    assert record["rollouts"] == 3 * 8 + 2 * 8 and record["updates"] == {"rl": 2, "sft": 2}
    assert [point["rollouts"] for point in record["curve"]] == [24, 32, 40]
    assert record["trial"]["sft_steps"] == 2 and record["trial"]["verdicts"] == 3 * record["trial"]["demonstrations"]
    assert record["generated_tokens"] > 40 and record["sft_tokens"] > 2 * 2 * 4


def test_at_lambda_one_demonstrations_count_if_they_are_tried_out():
    plain = {"method": "bridge", "bridge_lambda": 1.0}
    methods = {"plain": plain, "steps": {**plain, "trial_steps": 5}, "preset": {**plain, "preset": "trial"}}
    rows = [a_run(name, methods=methods).row for name in methods]
    assert [row.reads_demonstrations for row in rows] == [False, True, True]


def test_fields_of_a_config():
    fields = config_fields(a_run("lora", rate=0.01))
    assert fields["coordinator_learning_rate"] == pytest.approx(0.03) and fields["learning_rate"] == 0.01
    assert fields["max_steps"] == 4 and fields["bridge_lambda"] == 1.0
    # A field of the comparison that a config lacks is left out.
    assert "sft_per_device_train_batch_size" in fields
    assert "sft_per_device_train_batch_size" not in config_fields(a_run("grpo"))


def test_the_coordinators_rank_is_a_key_of_a_row(tmp_path):
    rows = {"rank": {"method": "bridge", "lora_r": 4, "lora_alpha": 2}, "bridge": None}
    tokenizer = tiny_tokenizer("0123456789+=")
    data = addition_dataset([(1, 2), (3, 4), (5, 6), (7, 8)])
    task = SimpleNamespace(
        fresh_model=lambda: tiny_model(tokenizer), tokenizer=tokenizer, train=data, demonstrations=data, reward=answer_reward
    )  # fmt: skip
    ranks = {}
    for name in rows:
        trainer = build_trainer(a_run(name, methods=rows), task, str(tmp_path / name), [])
        state = trainer.coordinator_state_dict()
        ranks[name] = {value.shape[0] for key, value in state.items() if "lora_A" in key}
    assert ranks == {"rank": {4}, "bridge": {16}}
    with pytest.raises(ValueError, match="GRPOConfig has no field `lora_r`"):
        config_fields(a_run("grpo", methods={"grpo": {"lora_r": 4}}))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"methods": {"grpo": {"lambda": 1}}}, "`methods: grpo`: trl_bridge.PackedGRPOConfig has no field `lambda`"),
        ({"methods": {"grpo": {"seed": 1}}}, "`methods: grpo`: `seed` is set by the comparison"),
        ({"methods": {"bridge": {"bridge_lambda": 2}}}, "`methods: bridge`: `bridge_lambda` must lie in [0, 1]"),
        ({"trainer": {"num_generation": 4}}, "`trainer`: no method has a field `num_generation`"),
        ({"trainer": {"learning_rate": 4}}, "`trainer`: `learning_rate` is set by the comparison"),
    ],
)
def test_what_a_config_refuses_is_said_before_training(change, said, tmp_path):
    with pytest.raises(ValueError) as error:
        check_rows(parse_comparison({**copy.deepcopy(VALUES), **change}), str(tmp_path))
    assert said in str(error.value)


@pytest.mark.parametrize("name", [name for name in recipes.list_recipes() if name.startswith("comparison/")])
def test_the_configs_of_shipped_comparisons(name, tmp_path):
    check_rows(load_comparison(name), str(tmp_path))


def test_without_weight_demonstrations_do_not_matter(cache):
    # So the runs of the two settings are one run, which the keys say too.
    records = [execute(a_run("lora", setting), cache) for setting in (0, 1)]
    assert records[0]["key"] == records[1]["key"]
    assert records[0]["scores"] == records[1]["scores"] and records[0]["curve"] == records[1]["curve"]
    assert records[0]["first_steps"][0]["sft/loss"] != records[1]["first_steps"][0]["sft/loss"]


def test_a_cold_start_is_counted_and_drawn_from_where_rl_starts(cache):
    record = execute(a_run("two-stage"), cache)
    assert record["updates"] == {"rl": 4, "sft": 2} and record["rollouts"] == 32
    assert [(point["step"], point["rollouts"]) for point in record["curve"]] == [(0, 0), (2, 16), (4, 32)]
    assert set(record["scores"]) == {"test", "ood"} and record["generated_tokens"] > 32
    # Two updates of four demonstrations, of one or two digits and an end.
    assert 16 <= record["sft_tokens"] <= 24
    assert record["peak_memory_mb"] > 100 and record["cpu_seconds"] > 0
    json.dumps(record)


TEACHER = {
    "task": {**VALUES["task"], "teacher_probability": 0.005},
    "settings": {"noisy": {"wrong_share": 1.0, "reward_flip": 0.5}},
    "methods": {"opd": None, "aopd": None, "lightning-opd": {"temperature": 0.5}},
}


@pytest.mark.parametrize("row", list(TEACHER["methods"]))
def test_rows_that_learn_from_a_teacher(row, cache):
    record = execute(a_run(row, **TEACHER), cache)
    assert record["updates"] == {"rl": 4, "sft": 0} and record["sft_tokens"] == 0
    # As many rollouts as the RL methods have; stored ones are all there at the start.
    assert record["rollouts"] == 32 and 32 <= record["generated_tokens"] <= 4 * 32
    assert [point["rollouts"] for point in record["curve"]] == ([32] * 3 if row == "lightning-opd" else [0, 16, 32])
    assert set(record["scores"]) == {"test", "ood"} and record["series"]["opd/reverse_kl"]
    json.dumps(record)


def test_the_tasks_teacher_is_the_trainers(cache, tmp_path):
    run = a_run("opd", **TEACHER)
    task = run.setting.task.build(0, Path(cache))
    trainer = build_trainer(run, task, str(tmp_path), [])
    weights = [model.state_dict()["lm_head.weight"] for model in (trainer.teacher_model, task.teacher, trainer.model)]
    assert torch.equal(weights[0], weights[1]) and not torch.equal(weights[0], weights[2])
    # A row's own goes before.
    tiny_model(task.tokenizer, seed=5).save_pretrained(tmp_path / "own")
    methods = {"opd": {"teacher_model_name_or_path": str(tmp_path / "own")}}
    given = parse_comparison({**copy.deepcopy(VALUES), "methods": methods})
    check_rows(given, str(tmp_path))
    own = build_trainer(
        runs_of(given, given.rows[0], given.settings[1], 1e-3)[0], task, str(tmp_path), []
    ).teacher_model
    assert torch.equal(own.state_dict()["lm_head.weight"], tiny_model(task.tokenizer, seed=5).lm_head.weight)


def test_the_tasks_teacher_beside_the_reward(cache, tmp_path):
    methods = {"taught": {"method": "grpo", "teachers": ["task"]}}
    run = a_run("taught", **{**TEACHER, "methods": methods})
    task = run.setting.task.build(0, Path(cache))
    trainer = build_trainer(run, task, str(tmp_path), [])
    assert trainer.teachers is not None and trainer.reward_funcs
    saved = load_file(tmp_path / "task" / "model.safetensors")
    weights = {name: task.teacher.state_dict()[name] for name in saved}
    assert saved and all(torch.equal(saved[name], weight) for name, weight in weights.items())
    # It reads both: other rewards are another run, and another teacher is.
    fields = run.content["task"][1]
    assert fields["reward_flip"] == 0.5 and fields["teacher_probability"] == 0.005
    record = execute(run, cache)
    assert record["updates"] == {"rl": 4, "sft": 0} and record["rollouts"] == 32
    assert record["series"]["teacher/reverse_kl"]
    # And a task without one is refused.
    given = parse_comparison({**copy.deepcopy(VALUES), "methods": methods})
    with pytest.raises(
        ValueError, match="`methods: taught`: `grpo` needs a teacher, and the task of `settings: wrong`"
    ):
        check_rows(given, str(tmp_path))


def test_rollouts_of_replaced_groups_are_counted(cache):
    methods = {"dynamic": {"method": "grpo", "dynamic_sampling": True, "max_resample_times": 2}}
    record = execute(a_run("dynamic", methods=methods), cache)
    # A base model that is hardly ever paid: each of the four updates has all three generations of eight.
    assert record["rollouts"] == 4 * 3 * 8 and record["curve"][-1]["rollouts"] == 96


def test_stored_rollouts_are_the_students_with_the_teachers_scores(cache, tmp_path):
    run = a_run("lightning-opd", **TEACHER)
    task = run.setting.task.build(0, Path(cache))
    rows = sample_offline(run, task, str(tmp_path))
    # 32 rollouts of 40 prompts: the first ones, once each.
    assert [task.tokenizer.decode(ids) for ids in rows["prompt_ids"]] == list(task.train["prompt"])[:32]
    assert json.loads(rows[0]["scored_with"])["sampling"] == {
        "temperature": 0.5,
        "max_completion_length": 4,
        "seed": 0,
    }
    likely = {"base": 0.0, "teacher": 0.0}
    for row in rows:
        prompt, answer = row["prompt_ids"], row["completion_ids"]
        for name, model in (("base", task.base), ("teacher", task.teacher)):
            logps = model(torch.tensor([prompt + answer])).logits[0].log_softmax(-1)
            scores = [logps[len(prompt) - 1 + place, token].item() for place, token in enumerate(answer)]
            likely[name] += sum(scores)
        assert row["teacher_logprobs"] == pytest.approx(scores, abs=1e-4)
    # Drawn from the base model, at half the temperature.
    assert likely["base"] > likely["teacher"]


def test_a_row_without_its_teacher_is_refused(tmp_path):
    for row, said in (("opd", "or the row's `teacher_model_name_or_path`"), ("lightning-opd", "`addition` task.")):
        given = parse_comparison({**copy.deepcopy(VALUES), "methods": {row: None}})
        with pytest.raises(ValueError, match=f"`{row}` needs a teacher, and the task of `settings: wrong`.*{said}"):
            check_rows(given, str(tmp_path))


def test_rollouts_with_guidance_are_counted(cache):
    task = {"name": "addition-steps", "train_size": 40, "demonstrations_size": 40, "base_steps": 1}
    given = {
        "task": task,
        "settings": {"good": None},
        "methods": {"actguide": {"guidance_template": "{steps}|{prompt}"}},
    }
    record = execute(a_run("actguide", **given, trainer={**VALUES["trainer"], "max_completion_length": 10}), cache)
    series = {name.removeprefix("actguide/"): values for name, values in record["series"].items()}
    # Two groups of four an update. A hard one has at least one probe of two rollouts.
    hard = sum(series["hard_rate"]) * 2
    assert hard >= 1 and record["rollouts"] >= 32 + 2 * hard + 4 * 2 * sum(series["guided_rate"])
    assert set(record["scores"]) == {"test", "ood"}


def test_validation_runs_do_not_see_the_test_rows(cache):
    run = dataclasses.replace(a_run("grpo"), phase="validation", points=0)
    record = execute(run, cache)
    assert set(record["scores"]) == {"validation"} and record["curve"] == [] and record["series"] == {}


def test_weights_that_stop_being_numbers_are_written_down(cache):
    record = execute(a_run("two-stage", rate=1e30), cache)
    assert record["diverged"] and record["scores"] == {}


def test_the_real_task_with_a_tiny_model(tmp_path):
    tokenizer = tiny_tokenizer(chat_template=True)
    tiny_model(tokenizer, hidden_size=16, layers=1).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    task = {
        "name": "reasoning-gym",
        "model": str(tmp_path),
        "parameters": {"min_terms": 2, "max_terms": 2, "max_digits": 1, "min_digits": 1},
        "ood_parameters": {"min_terms": 4, "max_terms": 4},
        "train_size": 16,
        "validation_size": 6,
        "test_size": 8,
        "ood_size": 6,
        "max_new_tokens": 4,
        "wrong_share": 0.5,
    }
    methods = {"naive-mix": None, "sft": {"completion_only_loss": True}, "luffy": {"expert_max_length": 64}}
    given = parse_comparison({**copy.deepcopy(VALUES), "task": task, "settings": {"a": None}, "methods": methods})
    built = given.settings[0].task.build(0)
    assert [len(built.splits[name]) for name in ("validation", "test", "ood")] == [6, 8, 6]
    completions = [row["completion"][0]["content"] for row in built.demonstrations]
    right = [f"The answer is {row['solution']}." in said for row, said in zip(built.train, completions, strict=True)]
    assert 8 <= sum(right) < 12  # two questions can have one answer
    assert "completion" not in built.train.column_names and built.with_experts()["expert"][0]
    for row in given.rows:
        record = execute(runs_of(given, row, given.settings[0], 1e-3)[0])
        assert set(record["scores"]) == {"test", "ood"} and 0 <= record["scores"]["test"]["accuracy"] <= 1


def test_the_start_of_a_published_run_again(tmp_path):
    records, given = read_records(PUBLISHED), load_comparison("comparison/addition-harmful")
    row, setting = given.row("bridge"), given.settings[0]
    run = runs_of(given, row, setting, best_rate(given, row, setting, records))[0]
    # Its base model lies with it: trained on another processor it would come out otherwise.
    shutil.copytree(PUBLISHED / "bases", tmp_path, dirs_exist_ok=True)
    again = execute(run, str(tmp_path), stop_after=3)
    assert again["base"] == records[run.key]["base"]
    assert len(again["first_steps"]) == 3
    # A sampled token may differ by rounding; so loosely.
    for own, theirs in zip(again["first_steps"], records[run.key]["first_steps"], strict=True):
        assert own == pytest.approx(theirs, rel=0.02, abs=1e-3)

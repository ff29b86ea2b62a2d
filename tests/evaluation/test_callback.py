import asyncio
import functools
import random

import numpy as np
import pytest
import torch
from datasets import Dataset
from trl import GRPOConfig, GRPOTrainer

from tests.helpers.evaluation import held_out
from tests.helpers.training import digits_reward, rl_rows, small_config, small_model, small_trainer
from trl_bridge import BridgeConfig, BridgeTrainer
from trl_bridge.evaluation import AccuracyCallback, wilson_interval


pytestmark = pytest.mark.usefixtures("quick_batches")
TRAINERS = {"grpo": (GRPOTrainer, GRPOConfig), "bridge": (BridgeTrainer, BridgeConfig)}


def trainer_of(kind, tmp_path, **changes):
    trainer_class, config_class = TRAINERS[kind]
    kwargs = {"eval_dataset": changes.pop("eval_dataset", None), "train_dataset": rl_rows(2)}
    args = small_config(tmp_path, config_class, **changes)
    return small_trainer(tmp_path, trainer_class, args=args, **kwargs)


def scripted(*accuracies):
    """A judge of whose calls the i-th finds a given share of the rows right."""
    calls = iter(accuracies)

    def judge(completions, **kwargs):
        right = round(next(calls) * len(completions))
        return [1.0] * right + [0.0] * (len(completions) - right)

    return judge


def noisy_judge(completions, **kwargs):
    # A judge that draws from all three global generators must not move training either.
    torch.rand(3), np.random.rand(3), random.random()
    return digits_reward(completions)


def logged(trainer, name):
    return [entry[name] for entry in trainer.state.log_history if name in entry]


@pytest.mark.parametrize("kind", TRAINERS)
@pytest.mark.parametrize("sampling", [{}, {"n": 2, "temperature": 1.0}])
def test_training_is_the_same_to_the_bit(tmp_path, kind, sampling):
    plain = trainer_of(kind, tmp_path)
    plain.train()
    states = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()
    # Built now, since the constructor seeds.
    watched = trainer_of(kind, tmp_path)
    callback = AccuracyCallback(watched, held_out(), reward_func=noisy_judge, eval_steps=1, **sampling)
    watched.add_callback(callback)
    watched.train()
    assert (random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()) == states
    for (name, one), other in zip(plain.model.state_dict().items(), watched.model.state_dict().values(), strict=True):
        assert torch.equal(one, other), name
    assert logged(watched, "eval_accuracy_rows") == [6, 6, 6]
    # What GRPO gathers for its own line is not taken away by ours.
    ours = [set(entry) for entry in watched.state.log_history if "eval_accuracy" in entry]
    names = {"eval_accuracy", "eval_accuracy_low", "eval_accuracy_high", "eval_accuracy_rows", "epoch", "step"}
    assert ours == [names] * 3
    assert logged(plain, "reward") == logged(watched, "reward") and len(logged(watched, "reward")) == 3
    assert logged(plain, "loss") == logged(watched, "loss")


def test_it_measures_every_n_steps_and_states_its_interval(tmp_path):
    trainer = trainer_of("grpo", tmp_path, max_steps=4)
    callback = AccuracyCallback(
        trainer, held_out(), reward_func=scripted(0.5, 1.0), eval_steps=2, num_rows=4, batch_size=4
    )
    trainer.add_callback(callback)
    trainer.train()
    entries = [entry for entry in trainer.state.log_history if "eval_accuracy" in entry]
    assert [(entry["step"], entry["eval_accuracy"], entry["eval_accuracy_rows"]) for entry in entries] == [
        (2, 0.5, 4),
        (4, 1.0, 4),
    ]
    assert (entries[0]["eval_accuracy_low"], entries[0]["eval_accuracy_high"]) == wilson_interval(2, 4)


def test_it_answers_with_the_policy_and_the_judge_sees_the_columns(tmp_path):
    trainer = trainer_of("bridge", tmp_path)
    seen = {}

    def judge(prompts, completions, solution, trainer_state, **kwargs):
        seen.setdefault("rows", []).extend(zip(prompts, solution, completions, strict=True))
        return [0.0] * len(prompts)

    callback = AccuracyCallback(trainer, held_out(3), reward_func=judge, batch_size=2, max_new_tokens=5)
    trainer.model.train()
    callback.measure()
    assert trainer.model.training
    assert [row[:2] for row in seen["rows"]] == [("0+0=", "0"), ("1+1=", "2"), ("2+2=", "4")]
    model, tokenizer = trainer.model.eval(), trainer.processing_class
    for prompt, _, completion in seen["rows"]:
        ids = torch.tensor([tokenizer(prompt)["input_ids"]])
        expected = model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=5)
        assert tokenizer.decode(expected[0, ids.shape[1] :], skip_special_tokens=True) == completion


@pytest.mark.parametrize("shape", ["function", "partial", "object"])
def test_the_judge_is_called_as_training_calls_it(tmp_path, shape):
    """An async reward with no defaults for what TRL gives, as the trainer's own and as the callback's."""
    calls = []

    async def judge(prompts, completions, completion_ids, trainer_state, log_extra, log_metric, **kwargs):
        calls.append((asyncio.get_running_loop(), trainer_state.global_step, [list(ids) for ids in completion_ids]))
        log_extra("seen", list(completions))
        log_metric("judged", 1.0)
        return [float(len(ids)) for ids in completion_ids]

    class Judge:
        async def __call__(self, **columns):
            return await judge(**columns)

    reward = {"function": judge, "partial": functools.partial(judge, weight=2), "object": Judge()}[shape]
    args = small_config(tmp_path, GRPOConfig, max_steps=1, log_completions=True)
    trainer = small_trainer(tmp_path, GRPOTrainer, args=args, train_dataset=rl_rows(2), reward_funcs=reward)
    trainer.add_callback(AccuracyCallback(trainer, held_out(3), eval_steps=1, batch_size=2))
    trainer.train()
    assert [step for _, step, _ in calls] == [0, 1, 1] and len({loop for loop, _, _ in calls}) == 1
    assert logged(trainer, "eval_accuracy") == [1.0] and all(ids for _, _, batch in calls for ids in batch)
    # Neither the metrics nor the table of training hold what was logged on held-out rows.
    assert logged(trainer, "judged") == [1.0] and len(trainer._logs["extra"]["seen"]) == len(calls[0][2])


@pytest.mark.parametrize("kind", TRAINERS)
def test_the_best_checkpoint_by_accuracy_is_chosen_and_loaded(tmp_path, kind):
    trainer = trainer_of(
        kind,
        tmp_path,
        eval_dataset=held_out(2),
        max_steps=3,
        eval_strategy="steps",
        eval_steps=1,
        save_strategy="steps",
        save_steps=1,
        load_best_model_at_end=True,
        metric_for_best_model="eval_accuracy",
        greater_is_better=True,
        per_device_eval_batch_size=8,
    )
    trainer.add_callback(AccuracyCallback(trainer, reward_func=scripted(0.0, 1.0, 0.5, 0.0)))
    trainer.train()
    assert logged(trainer, "eval_accuracy") == [0.0, 1.0, 0.5]
    assert trainer.state.best_metric == 1.0 and trainer.state.best_global_step == 2
    assert trainer.state.best_model_checkpoint.endswith("checkpoint-2")
    best = small_model().__class__.from_pretrained(tmp_path / "checkpoint-2").state_dict()
    last = small_model().__class__.from_pretrained(tmp_path / "checkpoint-3").state_dict()
    got = trainer.model.state_dict()
    assert all(torch.equal(got[name], best[name]) for name in best)
    assert any(not torch.equal(got[name], last[name]) for name in last)
    # The same step with other weights: what was measured before does not stand in for them.
    assert trainer.evaluate()["eval_accuracy"] == 0.0


def test_several_evaluation_datasets_are_one_measurement(tmp_path):
    trainer = trainer_of(
        "grpo",
        tmp_path,
        eval_dataset={"a": held_out(2), "b": held_out(2)},
        max_steps=1,
        eval_strategy="steps",
        eval_steps=1,
        per_device_eval_batch_size=8,
    )
    trainer.add_callback(AccuracyCallback(trainer, held_out(), reward_func=scripted(1.0), eval_steps=1))
    trainer.train()
    assert logged(trainer, "eval_accuracy") == [1.0]


def test_what_cannot_work_is_refused(tmp_path):
    trainer = trainer_of("grpo", tmp_path)
    with pytest.raises(ValueError, match="`dataset` is not set"):
        AccuracyCallback(trainer)
    with pytest.raises(ValueError, match="no column `prompt`"):
        AccuracyCallback(trainer, Dataset.from_dict({"question": ["1"]}))
    with pytest.raises(ValueError, match="`n=2` at temperature 0"):
        AccuracyCallback(trainer, held_out(), n=2)
    with pytest.raises(ValueError, match="`eval_steps` must be 1 or more"):
        AccuracyCallback(trainer, held_out(), eval_steps=0)
    trainer.reward_funcs = [digits_reward, digits_reward]
    with pytest.raises(ValueError, match="has 2 of them"):
        AccuracyCallback(trainer, held_out())
    trainer.reward_funcs = [small_model()]
    with pytest.raises(ValueError, match="is a model"):
        AccuracyCallback(trainer, held_out())

"""What all group trainers share, on LUFFY: where experts come from, where they sit, what is refused."""

import logging

import pytest
from datasets import Dataset
from trl import GRPOConfig

from tests.helpers.group_losses import luffy_loss
from tests.helpers.groups import (
    answer_reward,
    answers,
    batches,
    expert_batch_rows,
    expert_rows,
    group_config,
    group_trainer,
    recording,
    replay_group,
    sample_these,
)
from tests.helpers.training import digits_reward, rl_rows, sft_rows, small_config, small_model
from trl_bridge import LUFFYConfig, LUFFYTrainer
from trl_bridge.models import tiny_model, tiny_tokenizer


def test_experts_are_scored_by_the_reward_functions(tmp_path, monkeypatch):
    sample_these(monkeypatch, ["x"])
    seen = []

    def reward(prompts, completions, completion_ids, answer, **kwargs):
        seen.append(list(zip(prompts, completions, completion_ids, answer, strict=True)))
        return answer_reward(completions, answer)

    trainer = group_trainer(tmp_path, LUFFYTrainer, train_dataset=answers(), reward_funcs=reward, max_steps=1)
    trainer.train()
    (rows,) = seen
    tokenizer = tiny_tokenizer()
    for row, (_, text, ids, answer) in enumerate(rows):
        expected = answer if row % 4 == 3 else "x"
        assert text == expected
        assert ids == [*tokenizer(expected)["input_ids"], tokenizer.eos_token_id]
    assert trainer.state.log_history[0]["expert/reward"] == 1.0
    assert trainer.state.log_history[0]["rollouts/reward"] == 0.0


def plan_of(trainer, rank, prompts):
    trainer.accelerator.state._shared_state["process_index"] = rank
    try:
        return trainer._draw([{"prompt": prompt} for prompt in prompts])
    finally:
        trainer.accelerator.state._shared_state["process_index"] = 0


def test_experts_sit_by_global_row_index(tmp_path):
    trainer = group_trainer(tmp_path, LUFFYTrainer, num_experts=2)
    # Three groups of four over two ranks of six rows: the second group straddles them.
    prompts = ["0+1="] * 4 + ["1+2="] * 4 + ["2+2="] * 4
    plans = [plan_of(trainer, rank, prompts[6 * rank : 6 * rank + 6]) for rank in range(2)]
    assert [plan.groups for plan in plans] == [[0, 0, 0, 0, 1, 1], [1, 1, 2, 2, 2, 2]]
    assert [plan.members for plan in plans] == [[0, 1, 2, 3, 0, 1], [2, 3, 0, 1, 2, 3]]
    # "1!!" and EOS; "3!" and EOS; "4!!" and EOS.
    assert [plan.heads for plan in plans] == [[0, 0, 4, 4, 0, 0], [3, 3, 0, 0, 4, 4]]
    assert plans[0].experts[5] == plans[1].experts[0]


@pytest.mark.parametrize("split", [(2, 8), (4, 4), (16, 1)])
def test_the_last_row_of_each_group_whatever_the_split(tmp_path, monkeypatch, split):
    sample_these(monkeypatch, ["x"])
    texts = []

    def reward(completions, answer, **kwargs):
        texts.extend(completions)
        return answer_reward(completions, answer)

    size, steps = split
    group_trainer(
        tmp_path,
        LUFFYTrainer,
        train_dataset=answers(),
        reward_funcs=reward,
        max_steps=1,
        per_device_train_batch_size=size,
        gradient_accumulation_steps=steps,
    ).train()
    assert [text != "x" for text in texts] == [False, False, False, True] * 4


def test_prompts_without_expert(tmp_path):
    # One prompt in four has a trace, so that whole micro-batches have none.
    trainer = group_trainer(
        tmp_path,
        recording(LUFFYTrainer),
        train_dataset=expert_rows(every=4),
        per_device_train_batch_size=4,
        gradient_accumulation_steps=4,
        max_steps=4,
        shuffle_dataset=False,
    )
    trainer.train()
    counts = [int(expert_batch_rows(batch).sum()) for batch in batches(trainer)]
    assert sum(counts) == 4 and counts.count(0) >= 12
    assert max(replay_group(trainer, luffy_loss())) < 2e-4


def test_one_of_several_traces(tmp_path, monkeypatch):
    sample_these(monkeypatch, ["x"])
    rows = Dataset.from_dict({"prompt": ["a", "b"] * 4, "expert": [["1", "22", "333"], ["4"]] + [[]] * 6})
    trainer = group_trainer(tmp_path, recording(LUFFYTrainer), train_dataset=rows, max_steps=3, num_generations=2)
    trainer.train()
    tokenizer = tiny_tokenizer()
    texts = {
        tokenizer.decode(ids[mask.bool()])
        for batch in batches(trainer)
        for ids, mask in zip(batch["completion_ids"], batch["expert_mask"], strict=True)
    }
    assert texts == {"", "1<eos>", "22<eos>", "333<eos>", "4<eos>"}


@pytest.mark.parametrize("messages", [False, True])
def test_conversations(tmp_path, messages):
    tokenizer = tiny_tokenizer(chat_template=True)
    rows = answers()
    rows = Dataset.from_list(
        [
            {
                "prompt": [{"role": "user", "content": row["prompt"]}],
                "expert": [{"role": "assistant", "content": row["answer"]}] if messages else row["answer"],
                "answer": row["answer"],
            }
            for row in rows
        ]
    )
    seen = []

    def reward(completions, answer, **kwargs):
        seen.extend(zip(completions, answer, strict=True))
        return [float(turn[0]["content"] == wanted) for turn, wanted in zip(completions, answer, strict=True)]

    trainer = recording(LUFFYTrainer)(
        model=tiny_model(tokenizer, hidden_size=32, layers=2),
        reward_funcs=reward,
        args=group_config(tmp_path, LUFFYConfig, max_steps=1),
        train_dataset=rows,
        processing_class=tokenizer,
    )
    trainer.train()
    for row, (completion, answer) in enumerate(seen):
        if row % 4 == 3:
            assert completion == [{"role": "assistant", "content": answer}]
    for batch in batches(trainer):
        for row in expert_batch_rows(batch).nonzero().flatten().tolist():
            kept = batch["completion_mask"][row].bool()
            text = tokenizer.decode(batch["completion_ids"][row][kept])
            prompt = tokenizer.decode(batch["prompt_ids"][row][batch["prompt_mask"][row].bool()])
            # The template's newline after the turn's end is not part of it.
            assert prompt == f"<|im_start|>user\n{text[0]}+0=<|im_end|>\n<|im_start|>assistant\n"
            assert text[1:] == "<|im_end|>"
    assert trainer.state.log_history[0]["expert/reward"] == 1.0


# Too long a trace


LONG = [None, "12", "1234567890", "123456"]


def long_rows():
    return Dataset.from_dict({"prompt": list("abcd"), "expert": LONG})


@pytest.mark.parametrize(
    ("overlong", "lengths"),
    [("skip", {"b": 3, "a": 0, "c": 0, "d": 0}), ("truncate", {"a": 0, "b": 3, "c": 6, "d": 6})],
)
def test_overlong_traces(tmp_path, overlong, lengths, caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("trl_bridge"), "propagate", True)
    with caplog.at_level("WARNING"):
        trainer = group_trainer(
            tmp_path, recording(LUFFYTrainer), train_dataset=long_rows(), expert_overlong=overlong, max_steps=2
        )
    assert "2 of 3 traces in the `expert` column" in caplog.text
    trainer.train()
    tokenizer = tiny_tokenizer()
    found = {}
    for batch in batches(trainer):
        for prompt, mask, expert in zip(batch["prompt_ids"], batch["prompt_mask"], batch["expert_mask"], strict=True):
            name = tokenizer.decode(prompt[mask.bool()])
            found[name] = max(found.get(name, 0), int(expert.sum()))
    assert found == lengths
    ends = [
        batch["completion_ids"][row, 5].item()
        for batch in batches(trainer)
        for row in (batch["expert_mask"].sum(1) == 6).nonzero().flatten().tolist()
    ]
    assert tokenizer.eos_token_id not in ends
    assert max(replay_group(trainer, luffy_loss())) < 2e-4


def test_overlong_traces_refused_or_allowed(tmp_path):
    with pytest.raises(ValueError, match="2 of 3 traces .* longer than 6 tokens .*row 2 with 11 tokens"):
        group_trainer(tmp_path, LUFFYTrainer, train_dataset=long_rows(), expert_overlong="error")
    trainer = group_trainer(
        tmp_path,
        recording(LUFFYTrainer),
        train_dataset=long_rows(),
        expert_overlong="error",
        expert_max_length=11,
        max_steps=2,
    )
    trainer.train()
    assert max(int(batch["expert_mask"].sum(1).max()) for batch in batches(trainer)) == 11
    assert max(replay_group(trainer, luffy_loss())) < 2e-4


# Refusals


def test_demonstrations_come_in_the_expert_column(tmp_path):
    with pytest.raises(TypeError, match="LUFFYTrainer takes no `sft_dataset`.*`expert` column"):
        LUFFYTrainer(
            model=small_model(),
            reward_funcs=digits_reward,
            args=group_config(tmp_path, LUFFYConfig),
            train_dataset=expert_rows(),
            sft_dataset=sft_rows(),
            processing_class=tiny_tokenizer(),
        )
    with pytest.raises(ValueError, match="`train_dataset` has no `expert` column"):
        group_trainer(tmp_path, LUFFYTrainer, train_dataset=rl_rows())
    with pytest.raises(NotImplementedError, match="LUFFYTrainer needs a `train_dataset` that can be looked through"):
        group_trainer(tmp_path, LUFFYTrainer, train_dataset=expert_rows().to_iterable_dataset())
    with pytest.raises(TypeError, match="`args` of LUFFYTrainer must be a `LUFFYConfig`, got `GRPOConfig`"):
        group_trainer(tmp_path, LUFFYTrainer, args=small_config(tmp_path, GRPOConfig))
    with pytest.raises(ValueError, match="`sft_token_weight` has no effect in LUFFYTrainer"):
        group_trainer(tmp_path, LUFFYTrainer, sft_token_weight="trapo")


SAVED = {"max_steps": 1, "save_strategy": "steps", "save_steps": 1}


@pytest.fixture(scope="module")
def finished_run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("finished")
    group_trainer(folder, LUFFYTrainer, **SAVED).train()
    return folder


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("expert", {"train_dataset": expert_rows(every=2)}),
        ("expert_overlong", {"expert_overlong": "truncate"}),
        ("expert_probability", {"expert_probability": 0.5}),
        ("expert_max_length", {"expert_max_length": 5}),
    ],
)
def test_checkpoint_of_other_experts_is_refused(finished_run, name, changes):
    trainer = group_trainer(finished_run, LUFFYTrainer, **SAVED, **changes)
    with pytest.raises(ValueError, match=f"resume_from_checkpoint.*`{name}`"):
        trainer.train(resume_from_checkpoint=str(finished_run / "checkpoint-1"))

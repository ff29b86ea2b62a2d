import math

import pytest
import torch
from datasets import Dataset
from trl import GRPOTrainer

from tests.helpers.group_losses import prefix_loss
from tests.helpers.groups import (
    group_trainer,
    recording,
    replay_group,
    sample_these,
    trace_rows,
)
from tests.helpers.training import digits_reward
from trl_bridge import PrefixRFTConfig, PrefixRFTTrainer
from trl_bridge.models import tiny_tokenizer


TOKENIZER = tiny_tokenizer()


SOLUTIONS = {row["prompt"]: row["expert"] for row in trace_rows()}


def prefix_trainer(folder, trainer_class=PrefixRFTTrainer, **changes):
    changes.setdefault("train_dataset", trace_rows())
    return group_trainer(folder, trainer_class, **{"max_completion_length": 14, **changes})


def batches(trainer):
    return [batch for window in trainer.windows for batch in window]


def errors(trainer):
    args = trainer.args
    return replay_group(trainer, prefix_loss, share=args.prefix_entropy_quantile, delta=args.delta)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"optim": "sgd", "learning_rate": 0.1, "max_grad_norm": 0.0, "train_dataset": trace_rows(every=2)},
        {"loss_type": "dapo", "temperature": 0.7, "beta": 0.1, "prefix_entropy_quantile": 0.5},
        {"loss_type": "grpo", "num_iterations": 2, "preset": "code", "scale_rewards": "group", "entropy_coef": 0.01},
        {"loss_type": "dapo", "steps_per_generation": 4, "per_device_train_batch_size": 4, "max_steps": 4},
        # Ratios far from 1: clipped on both sides, and by delta.
        {"num_iterations": 3, "learning_rate": 0.05, "delta": 1.3, "prefix_entropy_quantile": 1.0, "max_steps": 3},
    ],
)
def test_update_equals_the_reference(tmp_path, changes):
    trainer = prefix_trainer(tmp_path, recording(PrefixRFTTrainer), **changes)
    trainer.train()
    prefixes = [int(batch["expert_mask"].sum()) for batch in batches(trainer)]
    assert max(prefixes) > 5
    assert max(errors(trainer)) < 2e-4


# The group


def test_the_last_row_continues_a_prefix(tmp_path):
    scored = []

    def reward(prompts, completions, **kwargs):
        scored.extend(zip(prompts, completions, strict=True))
        return digits_reward(completions)

    trainer = prefix_trainer(tmp_path, recording(PrefixRFTTrainer), reward_funcs=reward, max_steps=2, prefix_steps=0)
    trainer.train()
    found = {}
    for batch in batches(trainer):
        assert (batch["tool_mask"] == 1).all() and not batch["sft_mask"].any()
        names = ("prompt_ids", "prompt_mask", "completion_ids", "completion_mask", "expert_mask")
        for prompt, prompt_mask, ids, mask, expert in zip(*(batch[name] for name in names), strict=True):
            prompt = TOKENIZER.decode(prompt[prompt_mask.bool()])
            prefix, own = TOKENIZER.decode(ids[expert.bool()]), ids[mask.bool() & ~expert.bool()]
            found.setdefault(prompt, []).append(prefix)
            # At least one character of the solution is left out, and the rest has room.
            assert SOLUTIONS[prompt].startswith(prefix) and len(prefix) < len(SOLUTIONS[prompt])
            assert 1 <= len(own) <= 14 - len(prefix)
    for prompt, prefixes in found.items():
        written = [prefix for prefix in prefixes if prefix]
        share = len(written[0]) / len(SOLUTIONS[prompt]) if written else 0.0
        assert len(prefixes) == 4 and len(written) <= 1 and share <= 0.95
        # Rewards judge prefix and continuation, which is the group's last row.
        assert [text for name, text in scored if name == prompt][3].startswith(written[0] if written else "")
    assert sum(any(prefixes) for prefixes in found.values()) >= 6


def test_lengths_are_uniform_and_stateless(tmp_path):
    rows = Dataset.from_dict({"prompt": ["a"], "expert": ["x" * 100]})
    trainer = prefix_trainer(
        tmp_path,
        train_dataset=rows,
        max_completion_length=120,
        prefix_steps=4,
        num_generations=2,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=1,
    )

    def lengths(generations):
        drawn = []
        for generation in generations:
            trainer._step = 2 * generation
            plan = trainer._draw([{"prompt": "a"}] * 16)
            assert plan.heads[::2] == [0] * 8
            drawn += plan.heads[1::2]
        return drawn

    before = torch.get_rng_state()
    trainer.state.global_step = 2  # low = 0.05 + 0.9 * (1 + cos(pi / 2)) / 2 = 0.5
    drawn = lengths(range(20))
    assert torch.equal(torch.get_rng_state(), before)
    assert lengths([3, 1]) == drawn[24:32] + drawn[8:16]
    # 160 draws of U(0.5, 0.95) * 100, rounded down: mean 72, standard deviation 13 / sqrt(160); five of them.
    assert abs(sum(drawn) / len(drawn) - 72) < 5.2
    assert 50 <= min(drawn) < 55 and 90 <= max(drawn) <= 94
    trainer.state.global_step = 0
    assert set(lengths(range(2))) == {95}  # all at `prefix_high`
    trainer.state.global_step = 4
    assert 5 <= min(lengths(range(5))) < 20


@pytest.mark.parametrize(("trace", "heads"), [("1", {0}), ("12", {0, 1})])
def test_short_traces(tmp_path, trace, heads):
    rows = Dataset.from_dict({"prompt": list("abcd"), "expert": [trace] * 4})
    trainer = prefix_trainer(tmp_path, recording(PrefixRFTTrainer), train_dataset=rows, max_steps=3, prefix_steps=0)
    trainer.train()
    assert {int(n) for batch in batches(trainer) for n in batch["expert_mask"].sum(1)} == heads


# Advantages


def answers():
    return Dataset.from_dict({"prompt": list("abcd"), "expert": ["123456789"] * 4})


def value_reward(completions, **kwargs):
    """The number after the comma."""
    return [None if text.endswith("n") else float(text.split(",")[-1]) for text in completions]


@pytest.mark.parametrize(
    ("changes", "texts", "pure", "continuation", "prefix"),
    [
        ({}, ["0", "0", "1", ",1"], [-1 / 3, -1 / 3, 2 / 3], 1.0, 2 / 3),
        ({"preset": "code"}, ["0", "0", "1", ",1"], [-1 / 3, -1 / 3, 2 / 3], 0.0, 2 / 3),
        (
            {"preset": "code", "continuation_advantage": "reward"},
            ["0", "0", "1", ",1"],
            [-1 / 3, -1 / 3, 2 / 3],
            1.0,
            2 / 3,
        ),
        ({}, ["1", "1", "1", ",0"], [0, 0, 0], 0.0, -1.0),
        ({"scale_rewards": "group"}, ["0", "2", "4", ",5"], [-2 / 2.0001, 0, 2 / 2.0001], 5.0, 3.0),
        ({}, ["1", "n", "0", ",2"], [0.5, 0, -0.5], 2.0, 1.5),
        ({}, ["1", "0", "0", ",1n"], [2 / 3, -1 / 3, -1 / 3], 0.0, 0.0),
        ({"reward_weights": [0.5]}, ["0", "0", "2", ",2"], [-1 / 3, -1 / 3, 2 / 3], 1.0, 2 / 3),
    ],
)
def test_advantages_of_raw_rewards(tmp_path, monkeypatch, changes, texts, pure, continuation, prefix):
    sample_these(monkeypatch, texts)
    trainer = prefix_trainer(
        tmp_path,
        recording(PrefixRFTTrainer),
        train_dataset=answers(),
        reward_funcs=value_reward,
        max_steps=1,
        prefix_steps=0,
        prefix_low=0.3,
        **changes,
    )
    trainer.train()
    hybrids = 0
    seen = []
    for batch in batches(trainer):
        for advantages, mask, expert in zip(
            *(batch[n] for n in ("advantages", "completion_mask", "expert_mask")), strict=True
        ):
            [own] = set(advantages[mask.bool() & ~expert.bool()].tolist())
            if expert.any():
                hybrids += 1
                assert own == pytest.approx(continuation, abs=1e-6)
                assert advantages[expert.bool()].tolist() == pytest.approx([prefix] * int(expert.sum()), abs=1e-6)
            else:
                seen.append(own)
    assert hybrids == 4
    assert sorted(seen) == pytest.approx(sorted(pure * 4), abs=1e-6)


def test_groups_without_trace_keep_the_parent_s_advantages(tmp_path, monkeypatch):
    sample_these(monkeypatch, ["0", "0", "1", ",1"])
    rows = Dataset.from_dict({"prompt": list("abcd"), "expert": ["123456789", None, None, None]})
    trainer = prefix_trainer(
        tmp_path,
        recording(PrefixRFTTrainer),
        train_dataset=rows,
        reward_funcs=value_reward,
        max_steps=1,
        prefix_steps=0,
        prefix_low=0.3,
        scale_rewards="group",
    )
    trainer.train()
    plain = []
    for batch in batches(trainer):
        assert batch["advantages"].shape == batch["completion_ids"].shape
        for prompt, row in zip(batch["prompt_ids"], batch["advantages"], strict=True):
            if TOKENIZER.decode(prompt) != "a":
                assert (row == row[0]).all()
                plain.append(row[0].item())
    want = torch.tensor([0.0, 0.0, 1.0, 1.0] * 3)
    groups = want.view(3, 4)
    want = (groups - groups.mean(1, keepdim=True)) / (groups.std(1, keepdim=True) + 1e-4)
    assert sorted(plain) == sorted(want.flatten().tolist())


def test_silent_prefix_tokens_are_those_of_low_entropy(tmp_path):
    seen = []

    class Watched(PrefixRFTTrainer):
        def policy_inputs(self, inputs, scores):
            changed = super().policy_inputs(inputs, scores)
            seen.append((inputs, changed["advantages"], scores[1].detach()))
            return changed

    prefix_trainer(tmp_path, Watched, prefix_steps=0, train_dataset=trace_rows(every=2)).train()
    ranked = 0
    for inputs, advantages, entropies in seen:
        expert = inputs["expert_mask"].bool()
        assert torch.equal(advantages[~expert], inputs["advantages"][~expert])
        # Each token that could learn anything either keeps its advantage or has none.
        able = expert & (inputs["advantages"] != 0)
        kept = able & (advantages == inputs["advantages"])
        silent = able & (advantages == 0)
        assert torch.equal(kept | silent, able)
        count = int(expert.sum())
        assert int(silent.sum()) <= math.floor(count * 0.8) and int(kept.sum()) <= count - math.floor(count * 0.8)
        if kept.any() and silent.any():
            assert entropies[kept].min() > entropies[silent].max()
            ranked += 1
    assert ranked >= 3


# vLLM


@pytest.mark.parametrize("mode", ["token_truncate", "sequence_truncate"])
def test_vllm_corrects_own_tokens_alone(tmp_path, monkeypatch, mode):
    sent = []

    def generate(trainer, prompt_ids, images, fields, num_generations, has_tool_images=False):
        sent.append((prompt_ids, num_generations))
        # Further from the policy than rounding: about 1 / 44 for each token.
        return [[5 + row % 7] * 9 for row in range(len(prompt_ids))], [[-3.5] * 9 for _ in prompt_ids]

    monkeypatch.setattr(GRPOTrainer, "_generate_single_turn", generate)
    trainer = prefix_trainer(
        tmp_path,
        recording(PrefixRFTTrainer),
        vllm_importance_sampling_mode=mode,
        vllm_importance_sampling_clip_max=3.0,
        prefix_steps=0,
        num_iterations=2,
        learning_rate=1e-2,
    )
    trainer.use_vllm = True
    trainer.train()
    for prompts, number in sent:
        # The last row of each group has another prompt, so each is sampled once.
        assert number == 1 and all(len(prompts[row]) >= len(prompts[row - 1]) for row in range(3, 16, 4))
    assert any(len(prompts[row]) > len(prompts[row - 1]) for prompts, _ in sent for row in range(3, 16, 4))
    assert max(errors(trainer)) < 2e-4


# The split


@pytest.mark.parametrize("loss_type", ["dr_grpo", "dapo"])
def test_with_all_prefix_tokens_the_split_changes_nothing(tmp_path, monkeypatch, loss_type):
    sample_these(monkeypatch, ["1", "22x", "x", "333", "4xy", "", "5"])

    def run(size, steps, share):
        trainer = prefix_trainer(
            tmp_path,
            recording(PrefixRFTTrainer),
            train_dataset=trace_rows(every=2),
            loss_type=loss_type,
            prefix_entropy_quantile=share,
            prefix_steps=0,
            per_device_train_batch_size=size,
            gradient_accumulation_steps=steps,
            max_steps=1,
            optim="sgd",
            learning_rate=1.0,
            max_grad_norm=0.0,
        )
        trainer.train()
        assert len(trainer.windows[0]) == steps
        return trainer

    def apart(one, other):
        return sum(float((one.states[0][n] - other.states[0][n]).norm()) for n in one.states[0])

    trainers = [run(*split, 1.0) for split in [(4, 4), (8, 2), (16, 1)]]
    moved = sum(float((trainers[0].states[0][n] - trainers[0].start[n]).norm()) for n in trainers[0].start)
    assert all(apart(trainers[0], other) < 1e-5 * moved for other in trainers[1:])
    # The published rule ranks the tokens of a micro-batch.
    assert apart(run(4, 4, 0.2), run(16, 1, 0.2)) > 1e-3 * moved


# Metrics and options


def test_metrics_by_hand(tmp_path, monkeypatch):
    sample_these(monkeypatch, ["0", "0", "1", ",1"])
    rows = Dataset.from_dict({"prompt": list("abcd"), "expert": ["123456789", "123456789", None, None]})
    trainer = prefix_trainer(
        tmp_path,
        recording(PrefixRFTTrainer),
        train_dataset=rows,
        reward_funcs=value_reward,
        prefix_low=0.3,
        max_steps=4,
    )
    trainer.train()
    for step, (window, log) in enumerate(zip(trainer.windows, trainer.logged[:4], strict=True)):
        # The whole run's four updates.
        assert log["prefix_rft/low"] == pytest.approx(0.3 + 0.65 * (1 + math.cos(math.pi * step / 4)) / 2)
        heads = [int(n) for batch in window for n in batch["expert_mask"].sum(1) if n]
        assert len(heads) == 2
        assert log["prefix_rft/prefix_share"] == pytest.approx(sum(heads) / 18)
        assert log["prefix_rft/hybrid_reward"] == log["expert/reward"] == 1.0
        assert log["prefix_rft/pure_reward"] == pytest.approx(1 / 3)
        # The other groups' last rows are the policy's: 0, 0, 1, 1.
        assert log["rollouts/reward"] == pytest.approx(6 / 14)
        tokens = sum(int(batch["completion_mask"].sum()) for batch in window)
        assert log["expert/token_share"] == pytest.approx(sum(heads) / tokens)
        assert all(int(batch["num_items_in_batch"]) == tokens for batch in window)
        assert not {"sft/loss", "expert/loss"} & set(log)


def test_defaults():
    config = PrefixRFTConfig("folder", use_cpu=True, bf16=False)
    assert (config.prefix_high, config.prefix_low, config.prefix_steps) == (0.95, 0.05, None)
    assert (config.prefix_entropy_quantile, config.continuation_advantage, config.delta) == (0.2, "reward", 3.0)
    assert (config.loss_type, config.scale_rewards, config.epsilon, config.beta) == ("dr_grpo", "none", 0.2, 0.0)
    assert PrefixRFTConfig("folder", use_cpu=True, bf16=False, preset="code").continuation_advantage == "none"

import random

import pytest
import torch
from datasets import Dataset
from trl import GRPOTrainer

from tests.helpers.group_losses import hpt_loss
from tests.helpers.groups import (
    expert_rows,
    group_config,
    group_trainer,
    recording,
    replay_group,
    sft_sum,
)
from tests.helpers.training import clone, digits_reward, small_config
from trl_bridge import LUFFYTrainer
from trl_bridge.methods.hpt import HPTConfig, HPTTrainer
from trl_bridge.models import tiny_model, tiny_tokenizer
from trl_bridge.objectives.expert import group_advantages


def watching(trainer_class=HPTTrainer):
    """The recording trainer, which keeps whole generation batches too."""

    class Watching(recording(trainer_class)):
        def _generate_and_score_completions(self, inputs):
            output = super()._generate_and_score_completions(inputs)
            if self.model.training:
                rewards = self.rollouts.total_rewards().clone()
                self.generations = [*getattr(self, "generations", []), (clone(output), rewards)]
            return output

    Watching.__name__ = trainer_class.__name__
    return Watching


def scripted(*numbers, wrong=0.0, expert=1.0):
    """A reward function: so many right rollouts in each group of four; `expert` where it is asked about traces."""

    def reward(completions, **kwargs):
        reward.calls.append((completions, kwargs))
        if len(completions) < 4 * len(numbers):
            return [expert] * len(completions)
        return [1.0 if row % 4 < numbers[row // 4] else wrong for row in range(len(completions))]

    reward.calls = []
    return reward


FIXED = {"max_steps": 1, "success_threshold": 1.0}
SGD = {"optim": "sgd", "learning_rate": 0.1}


@pytest.mark.parametrize(
    "changes",
    [
        {**SGD, "gate": 1},
        # SGD: Adam turns the rounding of gradients that are zero (the KL at the start) into full steps.
        {"loss_type": "dapo", "temperature": 0.7, "beta": 0.1, "gate": 2, "sft_loss_coef": 0.3, **SGD},
        {"loss_type": "grpo", "num_iterations": 2, "preset": "code", "gate": 1, "gate_off": 3},
        {"loss_type": "dapo", "steps_per_generation": 4, "per_device_train_batch_size": 4, "gate": 1, "gate_off": 3},
        # Traces longer than every rollout: the batch grows, with tensors of old and reference log-probabilities.
        {
            "max_completion_length": 4,
            "expert_max_length": 8,
            "beta": 0.1,
            "num_iterations": 2,
            "gate": 1,
            "gate_off": 2,
        },
    ],
)
def test_update_equals_the_reference(tmp_path, changes):
    options = {"success_threshold": 1.0, "max_steps": 4, **changes}
    rows = expert_rows(every=1 if "expert_max_length" in changes else 2)
    trainer = group_trainer(tmp_path, watching(), train_dataset=rows, **options)
    trainer.train()
    batches = [batch for window in trainer.windows for batch in window]
    assert any(batch["sft_mask"].any() for batch in batches)
    if "gate_off" in changes:
        assert any((batch["expert_mask"] * (1 - batch["sft_mask"])).any() for batch in batches)
    if changes.get("expert_max_length"):
        assert max(batch["completion_ids"].size(1) for batch in batches) > trainer.args.max_completion_length
        # Prompts that are as wide as the rollouts were do not grow with them.
        assert all(batch["prompt_mask"][:, -1].all() for batch in batches)
    errors = replay_group(trainer, hpt_loss(changes.get("sft_loss_coef", 1.0)))
    assert max(errors) < 2e-4
    if "gate_off" in changes:  # and without the term that is meant the replay differs
        assert max(replay_group(trainer, hpt_loss(gamma=1e9))) > 1e-2


@pytest.mark.parametrize(
    ("gate", "gate_off", "sft", "off"),
    [
        (0, None, {0}, set()),
        (1, None, {0, 1}, set()),
        (0, 2, {0}, {1, 2}),
        (-1, 1, set(), {0, 1}),
        (4, 4, {0, 1, 2, 3}, set()),
    ],
)
def test_which_groups_are_switched(tmp_path, gate, gate_off, sft, off):
    reward = scripted(0, 1, 2, 4)
    trainer = group_trainer(tmp_path, watching(), reward_funcs=reward, gate=gate, gate_off=gate_off, **FIXED)
    trainer.train()
    output, _ = trainer.generations[0]
    for group in range(4):
        rows = slice(4 * group, 4 * group + 4)
        written = output["expert_mask"][rows].any(1).tolist()
        assert written == [False] * 3 + [group in sft | off]
        assert output["sft_mask"][rows].any(1).tolist() == [False] * 3 + [group in sft]
        own = (output["tool_mask"] * output["completion_mask"])[rows].any(1).tolist()
        assert own == ([False] * 4 if group in sft else [True] * 3 + [group not in off])
        if group in sft:
            assert not output["advantages"][rows].any()
    assert torch.equal(output["sft_mask"] * output["completion_mask"], output["sft_mask"])
    # Tokens of the RL loss: own ones, and the second gate's traces.
    in_rl = [row for row in range(16) if row // 4 not in sft]
    assert output["num_items_in_batch"] == output["completion_mask"][in_rl].sum()
    logged = trainer.logged[0]
    assert logged["hpt/gate_rate"] == len(sft) / 4 and logged["hpt/off_rate"] == len(off) / 4
    assert logged["hpt/solve_none"] == logged["hpt/solve_all"] == 0.25
    assert logged["rollouts/reward"] == pytest.approx(7 / 16)
    assert logged["rewards/reward/mean"] == pytest.approx(7 / 16)


def test_the_trace_is_that_of_the_prompt_and_whole(tmp_path):
    reward = scripted(0, 0, 0, 0)
    trainer = group_trainer(tmp_path, watching(), reward_funcs=reward, **FIXED)
    trainer.train()
    output, _ = trainer.generations[0]
    tokenizer = tiny_tokenizer()
    traces = dict(zip(expert_rows()["prompt"], expert_rows()["expert"], strict=True))
    for row in (3, 7, 11, 15):
        prompt = tokenizer.decode(output["prompt_ids"][row][output["prompt_mask"][row] > 0])
        ids = output["completion_ids"][row][output["sft_mask"][row] > 0]
        assert tokenizer.decode(ids) == traces[prompt] + tokenizer.eos_token
        assert torch.equal(output["completion_mask"][row], output["sft_mask"][row])


def test_rows_that_nobody_could_score_are_wrong(tmp_path):
    def reward(completions, **kwargs):
        return [None, 1.0, None, None] * (len(completions) // 4)

    trainer = group_trainer(tmp_path, watching(), reward_funcs=reward, gate=1, **FIXED)
    trainer.train()
    assert trainer.logged[0]["hpt/gate_rate"] == 1.0
    at_zero = group_trainer(tmp_path, watching(), reward_funcs=reward, gate=0, **FIXED)
    at_zero.train()
    assert at_zero.logged[0]["hpt/gate_rate"] == at_zero.logged[0]["hpt/solve_none"] == 0.0


@pytest.mark.parametrize("loss_type", ["dr_grpo", "dapo"])
def test_switching_a_group_is_removing_it(tmp_path, loss_type):
    """Apart from the SFT term, the gradient is GRPO's on the other groups' rows alone."""
    options = {"loss_type": loss_type, "beta": 0.1, "num_iterations": 2, "success_threshold": 1.0, "gate": 1}
    trainer = group_trainer(tmp_path, watching(), sft_loss_coef=0.0, **options)
    trainer.train()
    compared = 0
    for window in trainer.windows:
        for batch in window:
            kept = batch["tool_mask"].any(1)
            if kept.all() or not kept.any():
                continue
            rest = {k: v[kept] if isinstance(v, torch.Tensor) and v.dim() else v for k, v in batch.items()}
            rest = {k: v for k, v in rest.items() if k not in ("tool_mask", "expert_mask", "sft_mask")}
            ours = _gradient(trainer, trainer.compute_loss(trainer.model, batch))
            theirs = _gradient(trainer, GRPOTrainer._compute_loss(trainer, trainer.model, rest))
            # Dr. GRPO divides by the number of rows, which removal would make smaller.
            scale = 1.0 if loss_type == "dapo" else kept.sum().item() / kept.numel()
            assert (ours - scale * theirs).norm() < 1e-5 * ours.norm()
            compared += 1
    assert compared > 1
    for output, _ in trainer.generations:
        kept = output["tool_mask"].any(1)
        assert output["num_items_in_batch"] == output["completion_mask"][kept].sum()


def _gradient(trainer, loss):
    trainer.model.zero_grad()
    loss.backward()
    return torch.cat([p.grad.flatten() for p in trainer.model.parameters()])


@pytest.mark.parametrize("loss_type", ["dr_grpo", "dapo"])
def test_all_groups_switched_is_an_sft_step(tmp_path, loss_type):
    options = {"loss_type": loss_type, "beta": 0.1, "temperature": 0.7, "gate": 4}
    trainer = group_trainer(tmp_path, watching(), **options)
    trainer.train()
    assert max(replay_group(trainer, lambda p: sft_sum(-p.plain_log_p, p.sft, p.batch, p.o, p.window))) < 2e-4
    assert all(
        entry["rl/loss"] == 0.0 and entry["hpt/gate_rate"] == 1.0 for entry in trainer.logged if "loss" in entry
    )
    output, _ = trainer.generations[0]
    assert output["num_sft_items_in_batch"] == output["sft_mask"].sum() > 0


def test_a_second_gate_that_never_fires_changes_nothing(tmp_path):
    shared = {"loss_type": "dapo", "success_threshold": 1.0, "gate": 1}
    weights = []
    for gate_off in (None, 1):
        trainer = group_trainer(tmp_path, HPTTrainer, gate_off=gate_off, **shared)
        trainer.train()
        weights.append(torch.cat([p.detach().flatten() for p in trainer.model.parameters()]))
    assert torch.equal(*weights)


def test_the_split_into_micro_batches_changes_nothing(tmp_path):
    ends = []
    for size, accumulation in ((4, 8), (8, 4), (32, 1)):
        changes = {"per_device_train_batch_size": size, "gradient_accumulation_steps": accumulation}
        trainer = group_trainer(
            tmp_path,
            watching(),
            optim="sgd",
            learning_rate=0.1,
            temperature=0.7,
            gate=1,
            gate_off=2,
            **changes,
            **FIXED,
        )
        trainer.train()
        ends.append((trainer.generations[0][0], trainer.states[0], trainer.start))
    logged = trainer.logged[0]
    assert logged["hpt/gate_rate"] > 0 and logged["hpt/off_rate"] > 0
    for output, state, start in ends[1:]:
        assert torch.equal(output["completion_ids"], ends[0][0]["completion_ids"])
        for name, value in state.items():
            moved = (ends[0][1][name] - start[name]).norm()
            assert (value - ends[0][1][name]).norm() < 1e-5 * moved + 1e-9, name


# The second gate


@pytest.mark.parametrize(("scale_rewards", "expert"), [("none", 1.0), ("group", 0.0), ("group", None)])
def test_advantages_with_the_trace_as_a_rollout(tmp_path, scale_rewards, expert):
    reward = scripted(0, 1, 2, 4, expert=expert)
    options = {"gate": 0, "gate_off": 1, "scale_rewards": scale_rewards}
    trainer = group_trainer(tmp_path, watching(), reward_funcs=reward, **options, **FIXED)
    trainer.train()
    output, rewards = trainer.generations[0]
    assert rewards.tolist() == [0.0] * 4 + [1.0] + [0.0] * 3 + [1.0, 1.0, 0.0, 0.0] + [1.0] * 4  # the rollouts' own
    scored = torch.tensor([1.0, 0.0, 0.0] if expert is None else [1.0, 0.0, 0.0, expert])
    by_hand = scored - scored.mean()
    if scale_rewards == "group":
        by_hand = by_hand / (scored.std() + 1e-4)
    by_hand = by_hand.tolist() + ([0.0] if expert is None else [])
    assert output["advantages"][4:8].tolist() == pytest.approx(by_hand, abs=1e-6)
    half = 0.5 if scale_rewards == "none" else 0.5 / (torch.tensor([1.0, 1.0, 0.0, 0.0]).std().item() + 1e-4)
    assert output["advantages"][8:12].tolist() == pytest.approx([half, half, -half, -half], abs=1e-6)
    assert trainer.logged[0]["expert/reward"] == expert
    # Asked once about the rollouts, once about the one trace, with its row's columns.
    assert [len(completions) for completions, _ in reward.calls] == [16, 1]
    completions, kwargs = reward.calls[1]
    assert completions == kwargs["expert"]


def test_asking_leaves_metrics_and_random_numbers_alone(tmp_path):
    def drawing(completions, log_metric, log_extra, **kwargs):
        log_metric("asked", float(len(completions)))
        log_extra("text", list(completions))
        if len(completions) < 16:
            random.random(), torch.rand(3)
        return digits_reward(completions)

    def still(completions, **kwargs):
        return digits_reward(completions)

    weights = []
    for reward in (drawing, still):
        trainer = group_trainer(
            tmp_path, watching(), reward_funcs=reward, gate=0, gate_off=4, success_threshold=1.0, max_steps=3
        )
        trainer.train()
        assert max(entry["hpt/off_rate"] for entry in trainer.logged if "loss" in entry) > 0.5
        weights.append(torch.cat([p.detach().flatten() for p in trainer.model.parameters()]))
        if reward is drawing:
            assert all(entry["asked"] == 16 for entry in trainer.logged if "loss" in entry)
    assert torch.equal(*weights)


@pytest.mark.parametrize("conversational", [False, True])
def test_the_reward_function_sees_a_trace_as_it_sees_a_rollout(tmp_path, conversational):
    """In the very form that LUFFY's experts have, which pass through the parent's own decoding."""
    rows = expert_rows()
    if conversational:
        rows = Dataset.from_dict(
            {"prompt": [[{"role": "user", "content": text}] for text in rows["prompt"]], "expert": rows["expert"]}
        )
    tokenizer = tiny_tokenizer(chat_template=conversational)
    seen = []
    for trainer_class, changes in ((LUFFYTrainer, {}), (HPTTrainer, {"gate": -1, "gate_off": 4})):
        reward = scripted(1, 1, 1, 1)
        args = group_config(tmp_path, trainer_class.config_class, expert_max_length=9, **{**FIXED, **changes})
        trainer = trainer_class(
            model=tiny_model(tokenizer, hidden_size=32, layers=2, seed=3),
            args=args,
            processing_class=tokenizer,
            train_dataset=rows,
            reward_funcs=reward,
        )
        trainer.train()
        completions, kwargs = reward.calls[-1]
        picked = slice(3, 16, 4) if trainer_class is LUFFYTrainer else slice(0, 4)
        seen.append([(kwargs["prompts"][i], completions[i], kwargs["completion_ids"][i]) for i in range(16)[picked]])
    assert seen[0] == seen[1]
    assert isinstance(seen[0][0][1], list if conversational else str)


def test_all_by_the_second_gate_is_luffy(tmp_path):
    """With every group at the second gate and a trace's reward known beforehand, LUFFY's own update."""
    shared = {"scale_rewards": "group", "loss_type": "dapo", "max_completion_length": 8, "max_steps": 2}
    trainer = group_trainer(tmp_path, watching(), gate=-1, gate_off=4, success_threshold=1.0, **shared)
    trainer.train()
    assert all(entry["hpt/off_rate"] == 1.0 for entry in trainer.logged if "loss" in entry)
    assert max(replay_group(trainer, hpt_loss())) < 2e-4
    hpt = trainer.states
    luffy = group_trainer(tmp_path, watching(LUFFYTrainer), success_threshold=1.0, **shared)
    luffy.train()
    for ours, theirs in zip(hpt, luffy.states, strict=True):
        for name in ours:
            assert torch.allclose(ours[name], theirs[name], atol=1e-6), name


@pytest.mark.parametrize("scale_rewards", ["group", "none"])
def test_group_advantages_are_trls(tmp_path, scale_rewards):
    def partly(completions, **kwargs):
        return [None if "a" in text else float(len(text) % 3) for text in completions]

    trainer = group_trainer(
        tmp_path, watching(), reward_funcs=[digits_reward, partly], scale_rewards=scale_rewards, gate=-1, max_steps=3
    )
    trainer.reward_weights = torch.tensor([0.0, 1.0])
    trainer.train()
    for output, rewards in trainer.generations:
        ours = group_advantages(rewards.view(-1, 4), scale_rewards).flatten()
        assert torch.allclose(ours, output["advantages"], atol=1e-6)
    alone = group_advantages(torch.tensor([[float("nan"), 2.0, float("nan"), float("nan")]]), scale_rewards)
    assert alone.tolist() == [[0.0] * 4]
    with pytest.raises(ValueError, match="scale_rewards"):
        group_advantages(torch.zeros(1, 4), "batch")


# Presets


def test_presets(tmp_path):
    def fields(**changes):
        config = small_config(tmp_path, HPTConfig, **changes)
        return config.gate, config.success_threshold, config.scale_rewards, config.epsilon

    assert fields() == (0, 1.0, "none", 0.2)
    assert fields(preset="code") == (0, 1.0, "none", 1e6)
    assert fields(preset="superrl") == (0, 1e-8, "group", 0.2)
    assert fields(preset="superrl", scale_rewards="none", success_threshold=0.5) == (0, 0.5, "none", 0.2)


def test_superrl_keeps_a_group_with_any_reward(tmp_path):
    def reward(completions, **kwargs):
        return [0.01 if row == 0 else 0.0 for row in range(len(completions))]

    options = {"reward_funcs": reward, "preset": "superrl", "max_steps": 1, "success_threshold": None}
    trainer = group_trainer(tmp_path, watching(), **options)
    trainer.train()
    assert trainer.logged[0]["hpt/gate_rate"] == 0.75
    assert trainer.generations[0][0]["tool_mask"].any(1).tolist() == [True] * 4 + [False] * 12

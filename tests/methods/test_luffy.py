import pytest
import torch
from datasets import Dataset

from tests.helpers.group_losses import luffy_loss
from tests.helpers.groups import (
    Engine,
    answer_reward,
    answers,
    batches,
    expert_batch_rows,
    group_config,
    group_trainer,
    recording,
    replay_group,
    sample_these,
)
from tests.helpers.training import small_model
from trl_bridge import LUFFYConfig, LUFFYTrainer


@pytest.mark.parametrize(
    ("changes", "formula"),
    [
        ({"optim": "sgd", "learning_rate": 0.1}, {}),
        ({"loss_type": "dapo", "temperature": 0.7, "beta": 0.1}, {}),
        ({"loss_type": "grpo", "num_iterations": 2, "preset": "code", "num_experts": 2}, {}),
        ({"loss_type": "dapo", "steps_per_generation": 4, "per_device_train_batch_size": 4}, {}),
        ({"policy_shaping_gamma": 0.4, "entropy_coef": 0.01}, {"gamma": 0.4}),
        ({"policy_shaping": "none"}, {"shaping": "none"}),
        ({"policy_shaping": "p_logp"}, {"shaping": "p_logp"}),
        ({"policy_shaping": "pow", "policy_shaping_exponent": 0.3}, {"shaping": "pow", "power": 0.3}),
        (
            {"policy_shaping": "rl_plus", "rl_plus_exponent": 0.5, "scale_rewards": "none"},
            {"shaping": "rl_plus", "explore": 0.5},
        ),
        ({"policy_shaping": "rl_plus", "preset": "code"}, {"shaping": "rl_plus", "vocabulary": 1}),
    ],
)
def test_update_equals_the_reference(tmp_path, changes, formula):
    trainer = group_trainer(tmp_path, recording(LUFFYTrainer), **changes)
    trainer.train()
    assert any(batch["expert_mask"].any() for batch in batches(trainer))
    assert max(replay_group(trainer, luffy_loss(**formula))) < 2e-4


# The worked numbers of the group


EIGHT = {"num_generations": 8, "per_device_train_batch_size": 8, "max_steps": 1}


@pytest.mark.parametrize(
    ("scale_rewards", "expert", "own"),
    # The standard deviation of one 1 and seven 0, with Bessel's correction: sqrt(7 / 8 / 7).
    [("none", 0.875, -0.125), ("group", 0.875 / (0.125**0.5 + 1e-4), -0.125 / (0.125**0.5 + 1e-4))],
)
def test_seven_wrong_and_the_expert(tmp_path, monkeypatch, scale_rewards, expert, own):
    sample_these(monkeypatch, ["x"])
    trainer = group_trainer(
        tmp_path,
        recording(LUFFYTrainer),
        train_dataset=answers(),
        reward_funcs=answer_reward,
        scale_rewards=scale_rewards,
        **EIGHT,
    )
    trainer.train()
    advantages = torch.cat([batch["advantages"] for batch in batches(trainer)])
    rows = torch.cat([expert_batch_rows(batch) for batch in batches(trainer)])
    assert rows.sum() == 2 and len(rows) == 16
    assert advantages[rows].tolist() == pytest.approx([expert] * 2, rel=1e-5)
    assert advantages[~rows].tolist() == pytest.approx([own] * 14, rel=1e-5)


def test_all_right_gives_nothing(tmp_path, monkeypatch):
    sample_these(monkeypatch, ["0"])
    trainer = group_trainer(
        tmp_path, recording(LUFFYTrainer), train_dataset=answers([0, 0]), reward_funcs=answer_reward, **EIGHT
    )
    trainer.train()
    assert [bool(batch["advantages"].any()) for batch in batches(trainer)] == [False, False]
    for name, weight in trainer.snapshot().items():
        assert torch.equal(weight, trainer.start[name])


def test_expert_tokens_are_not_clipped(tmp_path, monkeypatch):
    # The expert is wrong: its advantage is negative, and in the second iteration its tokens' ratios are far below the
    # clipping range, where GRPO would leave them alone.
    sample_these(monkeypatch, ["0", "x", "0", "y"])
    trainer = group_trainer(
        tmp_path,
        recording(LUFFYTrainer),
        train_dataset=answers([0] * 4, expert=lambda number: "wrong"),
        reward_funcs=answer_reward,
        epsilon=1e-3,
        epsilon_high=1e-3,
        num_iterations=4,
        max_steps=4,
        optim="sgd",
        learning_rate=30.0,
        max_grad_norm=0.0,
        lr_scheduler_type="constant",
    )
    trainer.train()
    last = trainer.windows[-1]
    model = small_model()
    model.load_state_dict(trainer.states[-2], strict=False)
    for batch in last:
        rows = expert_batch_rows(batch)
        assert (batch["advantages"][rows] < 0).all()
        tokens = batch["completion_mask"][rows].bool()
        ids = torch.cat([batch["prompt_ids"], batch["completion_ids"]], 1)
        mask = torch.cat([batch["prompt_mask"], batch["completion_mask"]], 1)
        with torch.no_grad():
            log_p = (
                model(ids, attention_mask=mask).logits[:, -batch["completion_ids"].size(1) - 1 : -1].log_softmax(-1)
            )
        log_p = log_p.gather(2, batch["completion_ids"].unsqueeze(2)).squeeze(2)
        ratio = (log_p - batch["old_per_token_logps"])[rows][tokens].exp()
        assert (ratio < 0.99).any()
    # At this rate four updates make more of a rounding: 2.7e-4 on one kind of processor.
    assert max(replay_group(trainer, luffy_loss(), schedule=lambda step: 1.0)) < 1e-3


# Metrics


def test_metrics_by_hand(tmp_path, monkeypatch):
    sample_these(monkeypatch, ["12", "x"])
    trainer = group_trainer(
        tmp_path,
        recording(LUFFYTrainer),
        train_dataset=Dataset.from_dict({"prompt": ["a", "b"], "expert": ["123", None]}),
        scale_rewards="none",
        max_steps=1,
        per_device_train_batch_size=4,
    )
    trainer.train()
    logs = trainer.state.log_history[0]
    # Two groups, "12" "x" "12" and the expert, and "12" "x" "12" "x": digits 2 0 2 3 and 2 0 2 0.
    assert logs["rollouts/reward"] == pytest.approx(8 / 7)
    assert logs["expert/reward"] == 3.0
    assert logs["reward"] == pytest.approx(11 / 8)
    # 3 + 1 tokens of 3 + 2 + 3 + 4 and 3 + 2 + 3 + 2.
    assert logs["expert/token_share"] == pytest.approx(4 / 22)
    probabilities, shaped_sum = [], 0.0
    model = small_model()
    for batch in trainer.windows[0]:
        ids = torch.cat([batch["prompt_ids"], batch["completion_ids"]], 1)
        mask = torch.cat([batch["prompt_mask"], batch["completion_mask"]], 1)
        with torch.no_grad():
            p = model(ids, attention_mask=mask).logits[:, -batch["completion_ids"].size(1) - 1 : -1].softmax(-1)
        p = p.gather(2, batch["completion_ids"].unsqueeze(2)).squeeze(2)[batch["expert_mask"].bool()]
        probabilities += p.tolist()
    assert len(probabilities) == 4
    # The expert has 3 of a mean of 7 / 4.
    shaped_sum = sum(p / (p + 0.1) for p in probabilities) * (3 - 7 / 4)
    assert logs["expert/prob_mean"] == pytest.approx(sum(probabilities) / 4, rel=1e-4)
    assert logs["expert/loss"] == pytest.approx(-shaped_sum / (4 * 6) / 2, rel=1e-4)
    assert logs["loss"] == pytest.approx(logs["expert/loss"] + logs["rl/loss"], rel=1e-4)
    assert not any(name.startswith("sft/") for name in logs)


# vLLM


@pytest.mark.parametrize("mode", ["token_truncate", "sequence_mask"])
def test_vllm_corrects_own_tokens_alone(tmp_path, monkeypatch, mode):
    monkeypatch.setattr("trl.trainer.grpo_trainer.VLLMGeneration", Engine)
    trainer = group_trainer(
        tmp_path,
        recording(LUFFYTrainer),
        use_vllm=True,
        vllm_importance_sampling_mode=mode,
        vllm_importance_sampling_clip_max=3.0,
        num_iterations=2,
        learning_rate=1e-2,
    )
    trainer.train()
    for batch in batches(trainer):
        expert = batch["expert_mask"].bool()
        own = (batch["completion_mask"] * batch["tool_mask"]).bool()
        sampled = batch["sampling_per_token_logps"]
        assert sampled[expert].isnan().all() and sampled[own].isfinite().all()
        ratio = batch["importance_sampling_ratio"].expand_as(own)
        assert (ratio[expert] == 1).all()
        assert (ratio[own] != 1).any()
    assert max(replay_group(trainer, luffy_loss())) < 2e-4


# Presets


def test_presets_fill_what_is_not_set(tmp_path):
    paper, code = (group_config(tmp_path, LUFFYConfig, preset=preset) for preset in ("paper", "code"))
    assert (paper.scale_rewards, paper.epsilon) == ("group", 0.2)
    assert (code.scale_rewards, code.epsilon) == ("none", 1e6)
    own = group_config(tmp_path, LUFFYConfig, preset="code", scale_rewards="batch", epsilon=0.1)
    assert (own.scale_rewards, own.epsilon) == ("batch", 0.1)

import math

import pytest
import torch
from datasets import Dataset

from tests.helpers.group_losses import srft_loss
from tests.helpers.groups import (
    Engine,
    answer_reward,
    answers,
    batches,
    expert_rows,
    group_config,
    group_trainer,
    recording,
    replay_group,
    sample_these,
)
from tests.helpers.training import small_model
from trl_bridge import SRFTConfig, SRFTTrainer
from trl_bridge.selftest.reference import objectives


@pytest.mark.parametrize(
    ("changes", "formula"),
    [
        ({"optim": "sgd", "learning_rate": 0.1}, {}),
        ({"loss_type": "dapo", "temperature": 0.7, "beta": 0.1}, {}),
        (
            {"loss_type": "grpo", "num_iterations": 2, "preset": "code", "num_experts": 2, "learning_rate": 1e-2},
            {"sign": 1},
        ),
        (
            {
                "loss_type": "dapo",
                "steps_per_generation": 4,
                "per_device_train_batch_size": 4,
                "beta": 0.1,
                "use_bias_correction_kl": False,
                "learning_rate": 1e-2,
            },
            {},
        ),
        (
            {"sft_token_weight": "trapo", "temperature": 1.3, "sft_weight": 2.0, "rl_weight": 1.0},
            {"trapo": True, "sft_weight": 2.0, "rl_weight": 1.0},
        ),
        # "paper": 0.1 * 8192 / 6 of the SFT term.
        ({"loss_scale": "paper", "entropy_coef": 0.01}, {"sft_scale": 819.2 / 6}),
        # Tokens of a random model have about -4.6: the floor splits them.
        ({"wrong_log_prob_floor": -4.6}, {"floor": -4.6}),
        ({"wrong_log_prob_floor": None}, {"floor": -math.inf}),
    ],
)
def test_update_equals_the_reference(tmp_path, changes, formula):
    trainer = group_trainer(tmp_path, recording(SRFTTrainer), success_threshold=1.0, **changes)
    trainer.train()
    rows = torch.cat([batch["verdicts"] for batch in batches(trainer)])
    assert (rows > 0).any() and (rows < 0).any()
    assert any(batch["sft_mask"].any() for batch in batches(trainer))
    assert max(replay_group(trainer, srft_loss(**formula))) < 2e-4


def test_the_surrogate_has_no_ratio_and_no_clipping(tmp_path):
    # Four updates on one generation batch at a high rate: GRPO's ratios would have left the clipping range.
    trainer = group_trainer(
        tmp_path,
        recording(SRFTTrainer),
        success_threshold=1.0,
        num_iterations=4,
        max_steps=4,
        learning_rate=1e-2,
        epsilon=1e-3,
    )
    trainer.train()
    assert all("old_per_token_logps" in batch for batch in batches(trainer))
    assert all(entry["clip_ratio/region_mean"] == 0.0 for entry in trainer.state.log_history if "loss" in entry)
    assert max(replay_group(trainer, srft_loss())) < 2e-4


# The three terms by hand


def scores_of(batch):
    ids = torch.cat([batch["prompt_ids"], batch["completion_ids"]], 1)
    mask = torch.cat([batch["prompt_mask"], batch["completion_mask"]], 1)
    with torch.no_grad():
        logits = small_model()(ids, attention_mask=mask).logits[:, -batch["completion_ids"].size(1) - 1 : -1]
    log_p = logits.log_softmax(-1)
    chosen = log_p.gather(2, batch["completion_ids"].unsqueeze(2)).squeeze(2)
    return chosen, -(log_p.exp() * log_p).sum(-1)


def test_metrics_by_hand(tmp_path, monkeypatch):
    sample_these(monkeypatch, ["12", "x", "yz", "3"])
    trainer = group_trainer(
        tmp_path,
        recording(SRFTTrainer),
        train_dataset=Dataset.from_dict({"prompt": ["a", "b"], "expert": ["123", None]}),
        success_threshold=1.0,
        scale_rewards="none",
        max_steps=1,
        per_device_train_batch_size=4,
        wrong_log_prob_floor=-4.6,
    )
    trainer.train()
    logs = trainer.state.log_history[0]
    entropies, sft_weights, rl_weights, floored, right_loss, wrong_loss, nll, expert_rows_seen = (
        [],
        [],
        [],
        [],
        0,
        0,
        [],
        0,
    )
    for batch in trainer.windows[0]:
        for row, (log_p, entropy) in enumerate(zip(*scores_of(batch), strict=True)):
            kept = batch["completion_mask"][row].bool()
            log_p, h = log_p[kept], float(entropy[kept].mean())
            entropies.append(h)
            if batch["expert_mask"][row].any():
                assert len(log_p) == 4 and torch.equal(batch["sft_mask"][row], batch["expert_mask"][row])
                expert_rows_seen += 1
                sft_weights.append(0.5 * math.exp(-h))
                nll += (-log_p).tolist()
            elif batch["verdicts"][row] > 0:
                rl_weights.append(0.1 * math.exp(h))
                right_loss -= 0.1 * math.exp(h) * float(log_p.sum())
            else:
                below = log_p < -4.6
                floored += below.tolist()
                wrong_loss += float(log_p[~below].sum())
    # "12" "x" "yz" and the expert; "12" "x" "yz" "3": right are "12", "12" and "3".
    assert (expert_rows_seen, len(rl_weights), len(floored)) == (1, 3, 2 + 3 + 2 + 3)
    assert 0 < sum(floored) < len(floored)
    scale = 4 * 6 * 2
    expected = {
        "srft/entropy": sum(entropies) / 8,
        "srft/sft_weight": sft_weights[0],
        "srft/rl_weight": sum(rl_weights) / 3,
        "srft/wrong_floored_fraction": sum(floored) / len(floored),
        "srft/right_loss": right_loss / scale,
        "srft/wrong_loss": wrong_loss / scale,
        "sft/loss": sum(nll) / 4,
        "sft/weight_mean": 2 * sft_weights[0],
    }
    for name, value in expected.items():
        assert logs[name] == pytest.approx(value, rel=1e-4), name
    assert logs["rollouts/reward"] == pytest.approx(5 / 7)
    assert logs["expert/reward"] == 3.0


def test_without_right_or_wrong_samples_there_is_no_such_metric(tmp_path, monkeypatch):
    sample_these(monkeypatch, ["x"])
    trainer = group_trainer(tmp_path, recording(SRFTTrainer), max_steps=1, success_threshold=1.0)
    trainer.train()
    logs = trainer.state.log_history[0]
    assert "srft/rl_weight" not in logs and logs["srft/right_loss"] == 0.0
    assert logs["srft/wrong_floored_fraction"] == 0.0
    sample_these(monkeypatch, ["1"])
    trainer = group_trainer(tmp_path, recording(SRFTTrainer), max_steps=1, success_threshold=1.0)
    trainer.train()
    logs = trainer.state.log_history[0]
    assert "srft/wrong_floored_fraction" not in logs and logs["srft/wrong_loss"] == 0.0


def test_the_experts_advantage_is_the_groups(tmp_path, monkeypatch):
    sample_these(monkeypatch, ["x"])
    trainer = group_trainer(
        tmp_path,
        recording(SRFTTrainer),
        train_dataset=answers(),
        reward_funcs=answer_reward,
        preset="code",
        num_generations=8,
        max_steps=1,
        success_threshold=1.0,
    )
    trainer.train()
    for batch in batches(trainer):
        expert = batch["expert_mask"].any(1)
        assert batch["advantages"][expert].tolist() == [0.875] * int(expert.sum())
        assert (batch["verdicts"] > 0).tolist() == expert.tolist()


def test_samples_that_nobody_scored_are_left_alone(tmp_path, monkeypatch):
    sample_these(monkeypatch, ["x", "1", "?", "2"])

    def reward(completions, **kwargs):
        return [None if text == "?" else float(text.isdigit()) for text in completions]

    trainer = group_trainer(
        tmp_path, recording(SRFTTrainer), reward_funcs=reward, success_threshold=1.0, expert_probability=0.0
    )
    trainer.train()
    verdicts = torch.cat([batch["verdicts"] for batch in batches(trainer)])
    assert sorted(verdicts.tolist()) == [-1.0] * 12 + [0.0] * 12 + [1.0] * 24
    assert not any(batch["sft_mask"].any() for batch in batches(trainer))
    assert max(replay_group(trainer, srft_loss())) < 2e-4


def test_the_floor_stops_the_fall_of_wrong_samples(tmp_path, monkeypatch):
    # All samples are wrong, and the same in each update.
    sample_these(monkeypatch, ["x"])
    ends = []
    for floor in (None, -8.0):
        trainer = group_trainer(
            tmp_path,
            recording(SRFTTrainer),
            success_threshold=1.0,
            expert_probability=0.0,
            wrong_log_prob_floor=floor,
            max_steps=12,
            learning_rate=2e-2,
            lr_scheduler_type="constant",
        )
        trainer.train()
        logs = [entry for entry in trainer.state.log_history if "loss" in entry]
        ends.append((logs[-1]["srft/wrong_floored_fraction"], trainer.windows[-1][0], trainer.snapshot()))
    lowest = []
    for _, batch, weights in ends:
        with torch.no_grad():
            log_p, _ = objectives.scores(small_model(), weights, batch)
        lowest.append(float(log_p[batch["completion_mask"].bool()].min()))
    assert [fraction for fraction, _, _ in ends] == [0.0, 1.0]
    assert lowest[0] < -15 and -14 < lowest[1] < -8


# vLLM and evaluation


def test_vllm(tmp_path, monkeypatch):
    monkeypatch.setattr("trl.trainer.grpo_trainer.VLLMGeneration", Engine)
    trainer = group_trainer(
        tmp_path,
        recording(SRFTTrainer),
        success_threshold=1.0,
        use_vllm=True,
        vllm_importance_sampling_mode="token_truncate",
        vllm_importance_sampling_clip_max=3.0,
        learning_rate=1e-2,
    )
    trainer.train()
    assert any((batch["importance_sampling_ratio"] != 1).any() for batch in batches(trainer))
    assert max(replay_group(trainer, srft_loss())) < 2e-4


def test_evaluation_is_the_parents(tmp_path):
    rows = expert_rows().select(range(4))
    trainer = group_trainer(tmp_path, SRFTTrainer, eval_dataset=rows, per_device_eval_batch_size=4, max_steps=1)
    metrics = trainer.evaluate()
    assert math.isfinite(metrics["eval_loss"]) and "eval_reward" in metrics
    assert not any("srft" in name for name in metrics)


# Options


def test_presets_fill_what_is_not_set(tmp_path):
    paper, code = (group_config(tmp_path, SRFTConfig, preset=preset) for preset in ("paper", "code"))
    assert (paper.sft_entropy_sign, paper.scale_rewards) == (-1, "group")
    assert (code.sft_entropy_sign, code.scale_rewards) == (1, "none")
    assert group_config(tmp_path, SRFTConfig, preset="code", sft_entropy_sign=-1).sft_entropy_sign == -1
    assert (paper.sft_weight, paper.rl_weight, paper.wrong_log_prob_floor) == (0.5, 0.1, -10.0)

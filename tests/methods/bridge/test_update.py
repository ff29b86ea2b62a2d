"""The three updates against plain float64 autograd, on batches recorded from `trainer.train()`."""

import math

import pytest

from tests.helpers.training import RecordingTrainer, replay, small_lora, small_trainer


TOLERANCE = 2e-4  # relative error of the movement; leaving the gain out gives above 0.1 (see tests/mutants)

CASES = {
    "sgd": {"optim": "sgd", "learning_rate": 0.1},
    "sgd, lambda, grpo, temperature": {
        "optim": "sgd",
        "learning_rate": 0.1,
        "bridge_lambda": 0.3,
        "loss_type": "grpo",
        "temperature": 0.7,
    },
    "adamw": {},
    "adamw, lambda, grpo, temperature": {"bridge_lambda": 0.3, "loss_type": "grpo", "temperature": 0.7},
    "gain off": {"cooperative_gain": False},
    "own rates": {"coordinator_learning_rate": 3e-3, "shadow_learning_rate": 5e-4},
    "own optimizer of the shadow": {"shadow_optim": "sgd", "shadow_learning_rate": 0.1},
    "no ratio": {"optim": "sgd", "learning_rate": 0.1, "shadow_importance_sampling": False},
    "reset": {"shadow_reset_steps": 2, "max_steps": 5},
    "clipping that bites": {"optim": "sgd", "learning_rate": 0.5, "max_grad_norm": 0.05},
    "no clipping": {"max_grad_norm": 0.0},
    "weight decay": {"weight_decay": 0.5},
    "weight decay, sgd": {"weight_decay": 0.5, "optim": "sgd", "learning_rate": 0.1},
    "accumulation of four": {"gradient_accumulation_steps": 4, "per_device_train_batch_size": 4},
    "no accumulation": {"gradient_accumulation_steps": 1},
    "pairing": {"sft_pairing": "prompt"},
    "old log-probs": {"num_iterations": 2, "steps_per_generation": 4, "max_steps": 5},
    "generation within a window": {"gradient_accumulation_steps": 4, "steps_per_generation": 2},
    "gradient checkpointing": {"gradient_checkpointing": True},
    "kl": {"beta": 0.1},
    "kl without bias correction": {"beta": 0.1, "use_bias_correction_kl": False},
    "entropy bonus": {"entropy_coef": 0.05, "optim": "sgd", "learning_rate": 0.1},
    "bnpo": {"loss_type": "bnpo"},
    "dr_grpo": {"loss_type": "dr_grpo"},
    "cispo": {"loss_type": "cispo", "epsilon_high": 5.0},
    "sapo": {"loss_type": "sapo"},
    "luspo": {"loss_type": "luspo", "importance_sampling_level": "sequence"},
    "vespo": {"loss_type": "vespo"},
    "sequence level": {"loss_type": "grpo", "importance_sampling_level": "sequence"},
    "rewards not scaled": {"scale_rewards": "none"},
    "rewards scaled by batch": {"scale_rewards": "batch"},
    "truncated rollouts masked": {"mask_truncated_completions": True, "loss_type": "dr_grpo"},
    "likelihood": {"sft_weighting": "likelihood"},
    "likelihood of the sequence": {"sft_weighting": "likelihood_sequence"},
    "phi": {"sft_weighting": "phi"},
}


def _run(tmp_path, lora=None, **options):
    trainer = small_trainer(tmp_path, RecordingTrainer, peft_config=lora or small_lora(), **options)
    trainer.train()
    assert len(trainer.windows) == trainer.args.max_steps
    return trainer


def _check(trainer, **changes):
    errors, metrics = replay(trainer, **changes)
    worst = {name: max(e.get(name, 0.0) for e in errors) for name in ("theta", "a", "b", "hat")}
    assert all(error < TOLERANCE for error in worst.values()), worst
    return metrics


@pytest.mark.parametrize("name", CASES)
def test_update_equals_reference(tmp_path, name):
    _check(_run(tmp_path, **CASES[name]))


def test_scaling_other_than_one(tmp_path):
    _check(_run(tmp_path, lora=small_lora(lora_alpha=8)), scaling=2.0)


def test_ramp_of_lambda(tmp_path):
    trainer = _run(tmp_path, bridge_lambda=0.8, bridge_lambda_start=0.2, bridge_lambda_warmup_steps=2, max_steps=4)
    _check(trainer, lam=lambda step: 0.2 + 0.6 * min(1.0, step / 2))


def test_cosine_schedule_with_warmup(tmp_path):
    trainer = _run(tmp_path, lr_scheduler_type="cosine", warmup_steps=2, max_steps=5)

    def factor(step):
        return step / 2 if step < 2 else 0.5 * (1 + math.cos(math.pi * (step - 2) / 3))

    _check(trainer, schedule=factor)


def test_metrics_equal_reference(tmp_path):
    trainer = _run(tmp_path, log_gradient_stats=True, bridge_lambda=0.3, max_steps=4, max_grad_norm=1.0)
    metrics = _check(trainer)
    logged = [entry for entry in trainer.state.log_history if "loss" in entry]
    seen = 0
    for step, (want, got) in enumerate(zip(metrics, logged, strict=True)):
        seen += want.pop("sft/num_tokens")
        assert got["sft/num_tokens"] == seen
        assert got["sft/epoch"] == pytest.approx((step + 1) * 6 / 16)
        for name, value in want.items():
            # At step 0 the shadow is the student: what vanishes there is compared with the size of its parts.
            assert got[name] == pytest.approx(value, rel=2e-3, abs=2e-6), (step, name)
    assert metrics[-1]["bridge/gain"] != 0 and metrics[-1]["bridge/shadow_distance"] > 0
    expected = {"bridge/gain", "bridge/gain_grad_norm", "bridge/grad_cosine", "bridge/shadow_clip_fraction"}
    assert expected <= logged[-1].keys()


def test_gain_leaves_out_kl_and_entropy(tmp_path):
    trainer = _run(tmp_path, beta=0.5, entropy_coef=0.2)
    metrics = _check(trainer)
    logged = [entry["bridge/gain"] for entry in trainer.state.log_history if "loss" in entry]
    assert logged[0] == 0.0
    assert logged == pytest.approx([m["bridge/gain"] for m in metrics], rel=2e-3, abs=2e-6)


def test_demonstrations_of_a_window_come_by_length(tmp_path):
    trainer = _run(tmp_path, gradient_accumulation_steps=4, per_device_train_batch_size=4, max_steps=3)
    for window in trainer.windows:
        lengths = [length for batch in window["sft"] for length in batch["attention_mask"].sum(dim=1).tolist()]
        assert lengths == sorted(lengths)
    assert len(set(lengths)) > 1
    # The update is that of the window, however its demonstrations are cut.
    _check(trainer)

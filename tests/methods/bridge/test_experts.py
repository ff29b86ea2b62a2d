"""The load-balancing loss of mixtures of experts, in student, shadow and SFT pass, against float64 autograd."""

import logging

import pytest
from trl import GRPOTrainer

from tests.helpers.bridge import assert_equal
from tests.helpers.families import tiny
from tests.helpers.groups import group_config, group_trainer
from tests.helpers.lean import lean_options, lean_trainer, replay_lean
from tests.helpers.streams import SGD, make, recording, weights_of
from tests.helpers.streams import replay as replay_stream
from tests.helpers.training import RecordingTrainer, replay, small_trainer
from trl_bridge import CHORDTrainer, LUFFYConfig, LUFFYTrainer, PackedGRPOTrainer


COEFFICIENT = 0.5  # so large that the update without it is another one
TOLERANCE = 2e-4  # relative error of the movement, as for dense models
FAMILIES = ["qwen3_moe", "mixtral", "olmoe", "gpt_oss"]


def plain(family="qwen3_moe"):
    """The same model, with experts one after the other: the grouped product has no float64."""
    model = tiny(family)
    model.set_experts_implementation("eager")
    return model


def recorded(tmp_path, family="qwen3_moe", **options):
    options = {"router_aux_loss_coef": COEFFICIENT, "optim": "sgd", "learning_rate": 0.1, **options}
    trainer = small_trainer(tmp_path, RecordingTrainer, model=tiny(family), **options)
    trainer.initial_model = plain(family)
    trainer.train()
    return trainer


def worst(errors):
    return max(error for step in errors for error in step.values())


@pytest.mark.parametrize("family", FAMILIES)
def test_update_equals_reference(tmp_path, family, caplog):
    with caplog.at_level(logging.WARNING):
        trainer = recorded(tmp_path, family, max_steps=2)
    assert any("`padding_free` stands aside" in text and "load-balancing" in text for text in caplog.messages)
    errors, metrics = replay(trainer, balance=COEFFICIENT)
    assert worst(errors) < TOLERANCE, errors
    logged = [entry for entry in trainer.state.log_history if "loss" in entry]
    for got, want in zip(logged, metrics, strict=True):
        for name in ("loss", "bridge/gain", "bridge/gain_grad_norm", "sft/loss"):
            assert got[name] == pytest.approx(want[name], rel=2e-3, abs=2e-6), name
        assert got["aux_loss"] > 0


def test_reference_without_the_loss_is_another_one(tmp_path):
    trainer = recorded(tmp_path, max_steps=1)
    errors, _ = replay(trainer)
    assert min(errors[0][name] for name in ("theta", "a", "b", "hat")) > 10 * TOLERANCE


CASES = {
    "iterations, accumulation of four": {
        "num_iterations": 2, "steps_per_generation": 4, "gradient_accumulation_steps": 4, "per_device_train_batch_size": 4,
    },
    "shadow seldom, checkpointing": {"shadow_update_steps": 2, "gradient_checkpointing": True, "beta": 0.1},
    "micro-batches without a demonstration": {
        "sft_pairing": "prompt", "per_device_train_batch_size": 2, "gradient_accumulation_steps": 4,
    },
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_update_with_options(tmp_path, name):
    trainer = recorded(tmp_path, **CASES[name])
    errors, _ = replay(trainer, balance=COEFFICIENT)
    assert worst(errors) < TOLERANCE, errors
    if "sft_pairing" in CASES[name]:
        assert any((batch["labels"] == -100).all() for window in trainer.windows for batch in window["sft"])


@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss"])
def test_lean_update_equals_reference(tmp_path, family):
    trainer = lean_trainer(
        tmp_path, model=tiny(family), router_aux_loss_coef=COEFFICIENT, optim="sgd", learning_rate=1.0
    )
    trainer.train()
    options = lean_options(trainer, balance=COEFFICIENT)
    replayed = list(replay_lean(plain(family), trainer.start, trainer.windows, trainer.states, options))
    assert len(replayed) == 3 and worst(errors for errors, _ in replayed) < TOLERANCE


def test_stream_method(tmp_path):
    options = {"mu_peak": 0.8, "mu_valley": 0.8, "mu_warmup_steps": 0, "mu_decay_steps": 0, **SGD}
    trainer = make(
        recording(CHORDTrainer), tmp_path, model=tiny("qwen3_moe"), router_aux_loss_coef=COEFFICIENT, **options
    )
    trainer.train()
    method = {"rl_weight": lambda step: 1 - 0.8, "sft_weight": lambda step: 0.8, "balance": COEFFICIENT}
    assert trainer.windows and len(trainer.states) == len(trainer.windows)
    replay_stream(trainer, plain(), **method)


def test_packed_grpo_is_trls(tmp_path):
    weights = []
    for trainer_class in (PackedGRPOTrainer, GRPOTrainer):
        trainer = make(trainer_class, tmp_path, model=tiny("mixtral"), router_aux_loss_coef=COEFFICIENT)
        trainer.train()
        weights.append(weights_of(trainer))
    assert_equal(*weights)


def test_a_config_that_asks_for_it_at_a_coefficient_of_zero(tmp_path, caplog):
    """TRL's SFT leaves such configs behind."""
    model = tiny("qwen3_moe")
    model.config.output_router_logits = True
    with caplog.at_level(logging.WARNING):
        trainer = small_trainer(tmp_path, RecordingTrainer, model=model, router_aux_loss_coef=0.0, max_steps=1, **SGD)
    assert any("`padding_free` stands aside" in text and "load-balancing" in text for text in caplog.messages)
    trainer.initial_model = plain()
    trainer.train()
    assert worst(replay(trainer)[0]) < TOLERANCE


# Refusals


def test_a_part_of_the_rollouts_is_refused(tmp_path):
    with pytest.raises(NotImplementedError, match="`shadow_rollout_fraction`.*`router_aux_loss_coef=0`"):
        recorded(tmp_path, shadow_rollout_fraction=0.5)


def test_group_methods_refuse_it(tmp_path):
    with pytest.raises(NotImplementedError, match="`router_aux_loss_coef`.*LUFFYConfig.*Set it to 0"):
        group_config(tmp_path, LUFFYConfig, router_aux_loss_coef=0.1)
    with pytest.raises(NotImplementedError, match="LUFFYTrainer.*`router_aux_loss_coef=0`"):
        group_trainer(tmp_path, LUFFYTrainer, model=tiny("qwen3_moe"))


@pytest.mark.parametrize("family", ["deepseek_v3", "glm4_moe"])
def test_families_that_name_their_experts_otherwise_are_refused(tmp_path, family):
    with pytest.raises(NotImplementedError, match="`router_aux_loss_coef`.*Config`: TRL reads `num_experts`"):
        small_trainer(tmp_path, model=tiny(family), router_aux_loss_coef=0.1)
    small_trainer(tmp_path, model=tiny(family))


def test_a_dense_model_is_refused(tmp_path):
    with pytest.raises(ValueError, match="`router_aux_loss_coef`.*not a Mixture-of-Experts model"):
        small_trainer(tmp_path, router_aux_loss_coef=0.1)

"""Naive mixing through `trainer.train()`: its update in float64, its limit, its ramp, its options."""

import pytest
from peft import LoraConfig

from tests.helpers.bridge import bridge_trainer
from tests.helpers.streams import (
    SGD,
    assert_is_grpo,
    assert_resumes,
    assert_split_makes_no_difference,
    logged,
    recording,
    replay,
    trained,
)
from trl_bridge import NaiveMixTrainer


RECORDING = recording(NaiveMixTrainer)
LORA = LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", init_lora_weights=False)
CASES = {
    "default weight, adamw": {},
    "weight, sgd": {"sft_weight": 0.3, **SGD},
    "weight above one, accumulation of four": {
        "sft_weight": 2.0, "gradient_accumulation_steps": 4, "per_device_train_batch_size": 4,
    },
    "pairing": {"sft_weight": 0.3, "sft_pairing": "prompt", **SGD},
    "weighting": {"sft_weight": 0.3, "sft_weighting": "likelihood", **SGD},
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_update_equals_reference(tmp_path, name):
    weight = CASES[name].get("sft_weight", 1.0)
    trainer = trained(RECORDING, tmp_path, **CASES[name])
    replay(trainer, sft_weight=lambda step: weight)
    assert logged(trainer, "naive_mix/sft_weight") == [weight] * 3


def test_update_of_a_lora_student(tmp_path):
    trainer = trained(RECORDING, tmp_path, peft_config=LORA, **SGD)
    assert all("lora_" in name for name in trainer.start)
    replay(trainer, peft_config=LORA)


def test_ramp(tmp_path):
    trainer = trained(
        RECORDING, tmp_path, sft_weight=0.8, sft_weight_start=0.0, sft_weight_warmup_steps=2, max_steps=4
    )
    weights = [0.0, 0.4, 0.8, 0.8]
    assert logged(trainer, "naive_mix/sft_weight") == pytest.approx(weights)
    assert [len(window["sft"]) for window in trainer.windows] == [0, 2, 2, 2]
    replay(trainer, sft_weight=lambda step: weights[step])


def test_weight_zero_is_grpo_to_the_bit(tmp_path):
    assert_is_grpo(NaiveMixTrainer, tmp_path, sft_weight=0.0)


def test_micro_batch_split_makes_no_difference(tmp_path):
    assert_split_makes_no_difference(NaiveMixTrainer, tmp_path)


def test_stop_and_resume(tmp_path):
    ramp = {"sft_weight": 0.8, "sft_weight_start": 0.2, "sft_weight_warmup_steps": 4}
    assert_resumes(NaiveMixTrainer, tmp_path, (2,), **ramp, num_iterations=2, steps_per_generation=4)


def test_losses_of_bridge_add_up(tmp_path):
    # `rl/loss` is the template's, so `BridgeTrainer` logs it too.
    trainer = bridge_trainer(tmp_path, bridge_lambda=0.3, logging_steps=1)
    trainer.train()
    parts = zip(*(logged(trainer, name) for name in ("loss", "rl/loss", "sft/loss")), strict=True)
    for loss, rl, sft in parts:
        assert loss == pytest.approx(0.3 * rl + 0.7 * sft, rel=1e-5)

"""CHORD through `trainer.train()`: its update in float64, its limits, its schedule, its options."""

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig

from tests.helpers.streams import (
    SGD,
    assert_is_grpo,
    assert_resumes,
    assert_split_makes_no_difference,
    logged,
    recording,
    replay,
    sharp_model,
    trained,
)
from tests.helpers.training import PAIRS, digits_reward, small_config, small_model, small_trainer
from trl_bridge import CHORDConfig, CHORDTrainer


RECORDING = recording(CHORDTrainer)
CONSTANT = {"mu_peak": 0.8, "mu_valley": 0.8, "mu_warmup_steps": 0, "mu_decay_steps": 0}
SCHEDULE = {"mu_peak": 0.8, "mu_valley": 0.2, "mu_warmup_steps": 1, "mu_decay_steps": 2, "max_steps": 4}
LORA = LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", init_lora_weights=False)


def phi(p):
    return p * (1 - p)


def constant(mu):
    return {"rl_weight": lambda step: 1 - mu, "sft_weight": lambda step: mu}


CASES = {
    "mu, sgd": ({**CONSTANT, **SGD}, {}),
    "mu, adamw, accumulation of four": ({**CONSTANT, "gradient_accumulation_steps": 4, "per_device_train_batch_size": 4}, {}),
    "mu, old log-probs": ({**CONSTANT, "num_iterations": 2, "steps_per_generation": 4, "max_steps": 5}, {}),
    "mu, temperature, grpo": ({**CONSTANT, "temperature": 0.7, "loss_type": "grpo"}, {}),
    "mu, pairing": ({**CONSTANT, "sft_pairing": "prompt"}, {}),
    "phi, sgd": ({**CONSTANT, **SGD, "enable_phi_function": True}, {"token_weight": phi}),
    "phi, adamw, temperature": ({**CONSTANT, "enable_phi_function": True, "temperature": 0.7}, {"token_weight": phi}),
    "is, sgd": ({**CONSTANT, **SGD, "enable_is_function": True}, {"token_weight": lambda p: p}),
    "weighting alone": ({**CONSTANT, "sft_weighting": "likelihood"}, {}),
    "phi times verdict": (
        {**CONSTANT, "enable_phi_function": True, "sft_weighting": "verdict"}, {"token_weight": phi}
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_update_equals_reference(tmp_path, name):
    options, method = CASES[name]
    trainer = trained(RECORDING, tmp_path, model=sharp_model(), **options)
    replay(trainer, sharp_model(), **constant(0.8), **method)
    assert logged(trainer, "chord/mu") == [0.8] * trainer.state.global_step
    weighted = "token_weight" in method or "sft_weighting" in options
    assert len(logged(trainer, "sft/weight_mean")) == (trainer.state.global_step if weighted else 0)


def test_update_of_a_lora_student(tmp_path):
    trainer = trained(RECORDING, tmp_path, peft_config=LORA, **CONSTANT, **SGD)
    assert all("lora_" in name for name in trainer.start)
    replay(trainer, peft_config=LORA, **constant(0.8))
    base = {n: p for n, p in trainer.model.get_base_model().named_parameters() if "lora_" not in n}
    for name, parameter in small_model().named_parameters():
        module, _, leaf = name.rpartition(".")
        assert torch.equal(base.get(name, base.get(f"{module}.base_layer.{leaf}")), parameter), name


def test_mu_follows_the_schedule(tmp_path):
    trainer = trained(RECORDING, tmp_path, **SCHEDULE)
    mu = [0.0, 0.8, 0.5, 0.2]
    assert logged(trainer, "chord/mu") == pytest.approx(mu)
    # At mu = 0 no demonstration is drawn.
    assert [len(window["sft"]) for window in trainer.windows] == [0, 2, 2, 2]
    assert logged(trainer, "sft/epoch") == pytest.approx([0, 6 / 16, 12 / 16, 18 / 16])
    replay(trainer, rl_weight=lambda step: 1 - mu[step], sft_weight=lambda step: mu[step])


@pytest.mark.parametrize(
    "changes",
    [{}, {"num_iterations": 2, "steps_per_generation": 4, "max_steps": 5}, {"sft_weighting": "judge"}],
    ids=["plain", "iterations", "judge"],
)
def test_mu_zero_is_grpo_to_the_bit(tmp_path, changes):
    method = {"mu_peak": 0.0, "mu_valley": 0.0, "enable_phi_function": True}
    method |= {name: changes.pop(name) for name in list(changes) if name.startswith("sft_")}
    assert_is_grpo(CHORDTrainer, tmp_path, changes=changes, **method)


def test_mu_zero_is_grpo_for_a_lora_student(tmp_path):
    assert_is_grpo(CHORDTrainer, tmp_path, peft_config=LORA, mu_peak=0.0, mu_valley=0.0)


def test_mu_one_is_sft(tmp_path):
    trainer = trained(RECORDING, tmp_path, mu_peak=1.0, mu_valley=1.0, **SGD)
    replay(trainer, **constant(1.0))
    assert logged(trainer, "loss") == pytest.approx(logged(trainer, "sft/loss"), rel=1e-5)


@pytest.mark.parametrize("options", [{}, {"enable_phi_function": True}, {"enable_is_function": True}])
def test_micro_batch_split_makes_no_difference(tmp_path, options):
    assert_split_makes_no_difference(CHORDTrainer, tmp_path, **CONSTANT, **options)


def test_stop_and_resume(tmp_path):
    # mu is 0 at first, and changes at every update.
    assert_resumes(CHORDTrainer, tmp_path, (1, 3), enable_phi_function=True, **{**SCHEDULE, "mu_decay_steps": 4})


def test_resume_of_a_lora_student(tmp_path):
    assert_resumes(CHORDTrainer, tmp_path, (2,), peft_config=LORA, **CONSTANT)


# Options


def mu_options(args):
    return args.mu_warmup_steps, args.mu_decay_steps, args.mu_peak, args.mu_valley, args.enable_phi_function


def test_presets(tmp_path):
    assert mu_options(small_config(tmp_path, CHORDConfig)) == (0, 200, 0.9, 0.05, False)
    assert mu_options(small_config(tmp_path, CHORDConfig, enable_phi_function=True)) == (0, 0, 0.1, 0.1, True)
    assert mu_options(small_config(tmp_path, CHORDConfig, preset="code")) == (200, 400, 0.5, 0.02, True)
    plain = small_config(tmp_path, CHORDConfig, preset="code", enable_is_function=True, mu_peak=0.2, mu_warmup_steps=0)
    assert mu_options(plain) == (0, 400, 0.2, 0.02, False)


def test_demonstrations_come_apart_from_the_experts(tmp_path):
    args = small_config(tmp_path, CHORDConfig)
    rows = {"prompt": [f"{a}+{b}=" for a, b in PAIRS], "expert": [str(a + b) for a, b in PAIRS]}
    train = Dataset.from_dict(rows)
    with pytest.raises(ValueError, match=r"`expert` column .*rename_column\('expert', 'completion'\)"):
        small_trainer(tmp_path, CHORDTrainer, args=args, train_dataset=train)
    # What the message says to do works.
    demonstrations = train.select_columns(["prompt", "expert"]).rename_column("expert", "completion")
    trainer = small_trainer(
        tmp_path, CHORDTrainer, args=args, train_dataset=train, sft_dataset=demonstrations, reward_funcs=digits_reward
    )
    assert len(trainer.demonstrations.rendered) == len(PAIRS)

"""Lean mode around the update: saving, resuming, evaluation, vLLM's weights, kinds of base, and what is refused."""

import contextlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model, inject_adapter_in_model, load_peft_weights
from transformers import AutoModelForCausalLM
from trl.generation.vllm_generation import VLLMGeneration

from tests.helpers.bridge import assert_equal
from tests.helpers.lean import LEAN, SCALINGS, flat, lean_options, lean_trainer, replay_lean
from tests.helpers.resume import StopAt, assert_same, assert_shadow_is_that_of, metrics_of, state_of
from tests.helpers.training import adapters, rl_rows, small_config, small_lora, small_model, small_trainer
from trl_bridge import BridgeTrainer, cli


IDS = torch.arange(3, 15)[None]
SAVING = {"save_strategy": "steps", "save_steps": 1, "lr_scheduler_type": "cosine"}


# The saved policy


def policy_weights(trainer, scaling=SCALINGS[1]):
    """base + s_theta B A + s_w B A, from what users read."""
    theta, (a, b) = flat(trainer.theta_state_dict()), adapters(trainer.coordinator_state_dict())
    change = {n: SCALINGS[0] * theta[n, "B"] @ theta[n, "A"] + scaling * b[n] @ a[n] for n in a}
    return {n: p.detach() + change.get(n, 0) for n, p in small_model().named_parameters()}


def logits(model):
    with torch.no_grad():
        return model.eval()(input_ids=IDS).logits


def test_saved_adapter_is_the_policy_and_merges(tmp_path):
    small_model().save_pretrained(tmp_path / "base")
    trainer = lean_trainer(tmp_path, model=str(tmp_path / "base"), model_init_kwargs={"dtype": "float32"})
    trainer.train()
    want = small_model()
    want.load_state_dict(policy_weights(trainer))
    trainer.save_model(str(tmp_path / "policy"))
    assert PeftConfig.from_pretrained(str(tmp_path / "policy")).r == 6 + 4
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    loaded = PeftModel.from_pretrained(base, tmp_path / "policy")
    assert torch.equal(logits(loaded), logits(trainer.model))
    assert torch.allclose(logits(loaded), logits(want), atol=1e-5)
    assert not torch.allclose(logits(loaded), logits(small_model()), atol=1e-2)
    # The adapter names its base, so that nothing else is to be said.
    assert cli.main(["merge", str(tmp_path / "policy"), "--output_dir", str(tmp_path / "plain")]) == 0
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "plain")
    assert torch.allclose(logits(plain), logits(loaded), atol=1e-5)


def test_saved_coordinator_is_its_own_adapter(tmp_path):
    trainer = lean_trainer(tmp_path, max_steps=1)
    trainer.train()
    trainer.save_coordinator(tmp_path / "w")
    assert PeftConfig.from_pretrained(str(tmp_path / "w")).r == 4
    assert_same(load_peft_weights(str(tmp_path / "w")), trainer.coordinator_state_dict())


def test_states_that_users_read(tmp_path):
    trainer = lean_trainer(tmp_path, lora={"init_lora_weights": True}, max_steps=1)
    theta, hat = trainer.theta_state_dict(), trainer.shadow_state_dict()
    assert_equal(hat, theta)
    assert {t.shape[0] for n, t in theta.items() if "lora_A" in n} == {6}
    trainer.train()
    after = trainer.shadow_state_dict()
    assert after.keys() == theta.keys() and any(not torch.equal(after[n], theta[n]) for n in theta)
    without = lean_trainer(tmp_path, cooperative_gain=False, max_steps=1)
    without.train()
    assert without.shadow is None and without.shadow_state_dict() is None


@pytest.mark.parametrize(("lora", "scaling"), [({}, 10 / 4), ({"use_rslora": True}, 10 / 4**0.5)], ids=["", "rslora"])
def test_weights_for_vllm_are_the_policys(tmp_path, lora, scaling):
    trainer = lean_trainer(tmp_path, lora=lora)
    sync = VLLMGeneration.__new__(VLLMGeneration)
    sync.model, sync._dist = trainer.model, type("NoGathering", (), {"is_fsdp": False, "gather_params": _nothing})()
    pushed = {name: weight.clone() for name, weight in sync._iter_named_params()}
    want = policy_weights(trainer, scaling)
    assert pushed.keys() == want.keys()
    for name, weight in want.items():
        assert torch.allclose(pushed[name], weight, atol=1e-5), name


def _nothing(self, parameters):
    return contextlib.nullcontext()


# Resuming and evaluation


def whole_state(trainer):
    return {**state_of(trainer), "hat": trainer.shadow_state_dict()}


RESUMES = {
    "inside a generation batch": {"num_iterations": 2, "steps_per_generation": 4, "weight_decay": 0.1},
    "reset, judge": {"shadow_reset_steps": 2, "sft_weighting": "judge", "judge_window": 2},
    "gain off": {"cooperative_gain": False},
}


@pytest.mark.parametrize("name", RESUMES)
def test_resume_is_exact(tmp_path, name):
    options = {"max_steps": 5, **SAVING, **RESUMES[name]}
    straight = lean_trainer(tmp_path / "straight", BridgeTrainer, **options)
    straight.train()
    lean_trainer(tmp_path / "halves", BridgeTrainer, callbacks=[StopAt(3)], **options).train()
    resumed = lean_trainer(tmp_path / "halves", BridgeTrainer, **options)
    resumed.train(resume_from_checkpoint=True)
    assert_same(whole_state(resumed), whole_state(straight))
    assert_same(metrics_of(resumed, 3), metrics_of(straight, 3))


KILLED_RUN = """
import sys
from tests.methods.bridge.test_lean_run import SAVING, BridgeTrainer, lean_trainer
lean_trainer(sys.argv[1], BridgeTrainer, max_steps=6, **SAVING).train()
"""


def test_resume_after_sigkill(tmp_path):
    root = Path(__file__).parents[3]
    environment = {**os.environ, "PYTHONPATH": str(root)}
    process = subprocess.Popen([sys.executable, "-c", KILLED_RUN, str(tmp_path / "killed")], env=environment, cwd=root)
    straight = lean_trainer(tmp_path / "straight", BridgeTrainer, max_steps=6, **SAVING)
    straight.train()
    while process.poll() is None and not (tmp_path / "killed" / "checkpoint-3" / "bridge" / "shared.pt").exists():
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    resumed = lean_trainer(tmp_path / "killed", BridgeTrainer, max_steps=6, **SAVING)
    resumed.train(resume_from_checkpoint=True)
    assert_same(whole_state(resumed), whole_state(straight))


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("lean_lora_r", {"lean": False, "lean_lora_r": 64, "lean_lora_alpha": None}),
        ("lean_lora_alpha", {"lean_lora_alpha": 6.0}),
    ],
)
def test_checkpoint_of_other_options_is_refused(tmp_path, name, changes):
    small_trainer(tmp_path, max_steps=1, **SAVING, **LEAN).train()
    trainer = small_trainer(tmp_path, max_steps=2, **{**SAVING, **LEAN, **changes})
    with pytest.raises(ValueError, match=f"resume_from_checkpoint.*`{name}`"):
        trainer.train(resume_from_checkpoint=True)


def test_best_model_brings_back_its_own_parts(tmp_path):
    trainer = lean_trainer(
        tmp_path,
        BridgeTrainer,
        max_steps=4,
        eval_dataset=rl_rows().select(range(4)),
        eval_strategy="steps",
        eval_steps=1,
        per_device_eval_batch_size=4,
        load_best_model_at_end=True,
        metric_for_best_model="eval_reward",
        greater_is_better=False,  # so that the best one is not the last
        learning_rate=5e-2,
        **SAVING,
    )
    trainer.train()
    best = Path(trainer.state.best_model_checkpoint)
    assert best.name != "checkpoint-4", "the last update was the best, so nothing was brought back"
    saved = torch.load(best / "bridge" / "shared.pt", weights_only=True)
    assert_same(trainer.coordinator_state_dict(), saved["coordinator"])
    assert_shadow_is_that_of(trainer, best)
    state = {n.replace(".default", ""): p.detach() for n, p in trainer.model.named_parameters() if "lora_" in n}
    assert_same(load_peft_weights(str(best)), state)
    a, b = adapters(trainer.coordinator_state_dict())
    for name in a:
        held = state[f"base_model.model.{name.replace('.weight', '.lora_A.weight')}"]
        assert torch.equal(held[6:], a[name])


# Kinds of base


def test_base_in_16_bits_keeps_adapters_in_32(tmp_path):
    trainer = lean_trainer(tmp_path, model=small_model().bfloat16(), max_steps=2)
    kinds = {("lora_" in n, p.dtype) for n, p in trainer.model.named_parameters()}
    assert kinds == {(True, torch.float32), (False, torch.bfloat16)}
    trainer.train()
    base = small_model().bfloat16()
    got = {
        n.replace(".base_layer", "").removeprefix("base_model.model."): p for n, p in trainer.model.named_parameters()
    }
    assert_equal(got, dict(base.named_parameters()))
    assert trainer.shadow.model is trainer.model and all(
        p.dtype == torch.float32 for p in trainer.shadow.weights.values()
    )


def test_quantised_base_as_trl_treats_it(tmp_path):
    """TRL rounds the adapters of a quantised model to 16 bits. The flag alone is set; `test_quantised.py` quantises."""
    model = small_model()
    model.is_loaded_in_4bit = True
    trainer = lean_trainer(tmp_path, model=model)
    trainer.train()
    options = lean_options(trainer)
    replay = list(replay_lean(small_model(), trainer.start, trainer.windows, trainer.states, options))
    assert all(error < 2e-4 for errors, _ in replay for error in errors.values())
    assert all(p.dtype == torch.float32 for n, p in trainer.model.named_parameters() if "lora_" in n)


def test_shape_of_a_saved_adapter_is_trained(tmp_path):
    trainer = small_trainer(tmp_path, max_steps=1, peft_config=small_lora(inference_mode=True), **LEAN)
    assert all(p.requires_grad for n, p in trainer.model.named_parameters() if "lora_" in n)


def test_another_frozen_base_is_refused(tmp_path):
    small_trainer(tmp_path, max_steps=1, **SAVING, **LEAN).train()
    model = small_model()
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight[0, 0] += 1
    trainer = small_trainer(tmp_path, model=model, max_steps=2, **SAVING, **LEAN)
    with pytest.raises(ValueError, match="resume_from_checkpoint.*`frozen base`"):
        trainer.train(resume_from_checkpoint=True)


# Refusals


def with_adapter(model):
    """As transformers loads a model from an adapter's folder: of a plain class, with adapter layers in it."""
    return inject_adapter_in_model(LoraConfig(target_modules=["q_proj"]), model)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lean": True, "lean_lora_r": 0}, "`lean_lora_r`.*0"),
        ({"lean": True, "lean_lora_alpha": 0.0}, "`lean_lora_alpha`.*0"),
        ({"lean": True, "shadow_dtype": "bfloat16"}, "`shadow_dtype`.*`lean=True`"),
        ({"lean": True, "shadow_offload": True}, "`shadow_offload`.*`lean=True`"),
        ({"lean": True, "cast_lm_head_to_fp32": True}, "`cast_lm_head_to_fp32`.*`lean=True`"),
        ({"lean_lora_r": 8}, "`lean_lora_r`.*lean=True"),
        ({"lean_lora_alpha": 8.0}, "`lean_lora_alpha`.*lean=True"),
    ],
    ids=str,
)
def test_config(tmp_path, options, message):
    with pytest.raises((ValueError, NotImplementedError), match=message):
        small_config(tmp_path, **options)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"peft_config": small_lora(use_dora=True)}, ValueError, "`peft_config.use_dora`"),
        ({"peft_config": small_lora(rank_pattern={"q_proj": 2})}, NotImplementedError, "`peft_config.rank_pattern`"),
        ({"peft_config": small_lora(alpha_pattern={"q_proj": 2})}, NotImplementedError, "`peft_config.alpha_pattern`"),
        ({"peft_config": small_lora(init_lora_weights="pissa")}, NotImplementedError, "`peft_config.init_lora_weights`"),
        ({"peft_config": small_lora(target_modules=["embed_tokens"])}, ValueError, "target_modules.*embed_tokens"),
        ({"peft_config": small_lora(target_modules=["no_such_layer"])}, ValueError, "[Tt]arget modules"),
        ({"peft_config": small_lora(target_modules=["lm_head"])}, ValueError, "lm_head"),
        ({"model": get_peft_model(small_model(), LoraConfig(target_modules=["q_proj"]))}, TypeError, "`model`.*adapter"),
        ({"model": with_adapter(small_model())}, TypeError, "`model`.*adapter"),
        ({"optimizers": (torch.optim.SGD([torch.zeros(1)], 0.1), None)}, NotImplementedError, "`optimizers`"),
    ],
    ids=lambda value: str(value)[:30] if isinstance(value, str) else "",
)  # fmt: skip
def test_arguments(tmp_path, changes, error, message):
    with pytest.raises(error, match=message):
        small_trainer(tmp_path / "out", lean=True, **changes)
    assert not list((tmp_path / "out").glob("*"))

"""The copy beside the student answers with its own weights."""

import pytest
import torch

from tests.harness import small_lora, small_model, small_trainer
from trl_bridge._upstream import plain_copy


IDS = torch.arange(12).reshape(2, 6)


@pytest.mark.parametrize("cast", [False, True])
def test_copy_of_a_patched_model_uses_its_own_weights(tmp_path, cast):
    student = small_trainer(tmp_path, cast_lm_head_to_fp32=cast).model
    before = student(IDS).logits
    twin = plain_copy(student, temperature=1.0, cast_lm_head_to_fp32=cast, entropy=True)
    assert torch.equal(twin(IDS).logits, before)
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.zero_()
    # A plain deep copy would run the student's own forward here.
    assert not twin(IDS).logits.any()
    uniform = -torch.log(torch.tensor(float(twin.config.vocab_size)))
    scored = twin(input_ids=IDS, labels=IDS, fused_lm_head=True)
    assert torch.allclose(scored.log_probs, uniform.expand(2, 5))
    assert torch.equal(student(IDS).logits, before)


def test_no_shadow_is_built_without_the_gain(tmp_path):
    trainer = small_trainer(tmp_path, cooperative_gain=False, max_steps=1)
    trainer.train()
    assert trainer.shadow is None and trainer.shadow_state_dict() is None
    (entry,) = [e for e in trainer.state.log_history if "loss" in e]
    assert not {"bridge/gain", "bridge/shadow_ratio", "bridge/gain_grad_norm"} & entry.keys()


def test_reset_clears_weights_and_optimizer_state(tmp_path):
    trainer = small_trainer(tmp_path, shadow_reset_steps=2, max_steps=2)
    trainer.train()
    student = dict(trainer.model.named_parameters())
    assert all(torch.equal(p, student[n]) for n, p in trainer.shadow.weights.items())
    assert not trainer.shadow.optimizer.state


def test_state_dicts_before_training(tmp_path):
    trainer = small_trainer(tmp_path, peft_config=small_lora())
    base = dict(small_model().named_parameters())
    for state in (trainer.theta_state_dict(), trainer.shadow_state_dict()):
        assert state.keys() == base.keys()
        assert all(torch.allclose(state[n], base[n], atol=1e-6) for n in base)

"""The copy beside the student answers with its own weights."""

import pytest
import torch
from transformers import TrainerCallback
from trl import SFTConfig, SFTTrainer

from tests.helpers.bridge import assert_equal, trained
from tests.helpers.lean import LEAN
from tests.helpers.training import rl_rows, sft_rows, small_lora, small_model, small_trainer
from trl_bridge import BridgeTrainer
from trl_bridge._upstream import plain_copy
from trl_bridge.models import tiny_tokenizer


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


def test_a_model_that_another_trainer_has_trained(tmp_path):
    """Its forward is the other trainer's, a closure over it: shadow and reference model are not to answer with it."""
    taught = small_model()
    shared = {
        "use_cpu": True,
        "bf16": False,
        "gradient_checkpointing": False,
        "report_to": "none",
        "learning_rate": 1e-3,
    }
    args = SFTConfig(str(tmp_path / "sft"), max_steps=2, per_device_train_batch_size=8, save_strategy="no", **shared)
    SFTTrainer(taught, args, train_dataset=sft_rows(), processing_class=tiny_tokenizer()).train()
    assert "forward" in vars(taught)
    plain = small_model()
    plain.load_state_dict(taught.state_dict())
    first, second = (trained(small_trainer(tmp_path, model=model, beta=0.1)) for model in (taught, plain))
    for mine, theirs in zip(first.state.log_history[:-1], second.state.log_history[:-1], strict=True):
        assert {**mine, "step_time": 0} == {**theirs, "step_time": 0}
    assert_equal(first.theta_state_dict(), second.theta_state_dict())
    assert_equal(first.shadow_state_dict(), second.shadow_state_dict())
    last = first.state.log_history[-2]
    assert last["kl"] > 0 and last["bridge/gain"] != 0


@pytest.mark.parametrize(
    "options", [{}, LEAN, {"shadow_update_steps": 2}], ids=["full", "lean", "every second update"]
)
def test_gradients_of_student_and_shadow_are_never_there_together(tmp_path, options):
    found = {"student": [], "shadow": []}

    def there(parameters):
        return any(p.grad is not None for p in parameters)

    class Watching(BridgeTrainer):
        def _run_shadow(self, batch):
            found["student"].append(there(self.model.parameters()))
            super()._run_shadow(batch)
            assert there(self.shadow.held.parameters.values())

        def demonstration_pass(self, model, window):
            found["shadow"].append(there(self.shadow.held.parameters.values()))
            assert there(self.model.parameters())
            return super().demonstration_pass(model, window)

    small_trainer(tmp_path, Watching, max_steps=4, **options).train()
    updates = 2 if "shadow_update_steps" in options else 4
    assert found == {"student": 2 * updates * [False], "shadow": 8 * [False]}


class _Evaluating(TrainerCallback):
    trainer = None

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        self.trainer.evaluate()


@pytest.mark.parametrize(
    ("options", "evaluates"),
    [
        # A window's first micro-batches are an epoch's last ones, which TRL's loss divides by their own number.
        (
            {
                "train_dataset": rl_rows().select(range(3)).to_iterable_dataset(),
                "gradient_accumulation_steps": 2,
                "steps_per_generation": 1,
                "per_device_train_batch_size": 4,
            },
            False,
        ),
        # The window's passes are over then, and the shadow's are still to come.
        ({"eval_dataset": rl_rows().select(range(2)), "per_device_eval_batch_size": 4}, True),
    ],
    ids=["an epoch ends inside a window", "a callback evaluates before the step"],
)
def test_without_demonstrations_the_shadow_is_the_student(tmp_path, options, evaluates):
    callback = _Evaluating()
    trainer = small_trainer(tmp_path, bridge_lambda=1.0, callbacks=[callback] if evaluates else None, **options)
    callback.trainer = trainer
    trainer.train()
    assert_equal(trainer.shadow.weights, dict(trainer.model.named_parameters()))
    assert all(gain == 0 for gain in (e.get("bridge/gain", 0) for e in trainer.state.log_history))


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

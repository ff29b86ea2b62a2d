"""TRL's own trainer as the oracle of the shadow's gradient, and small helpers of the option tests."""

import torch
from trl import GRPOConfig, GRPOTrainer

from tests.helpers.training import RecordingTrainer, replay, small_config, small_lora, small_model, small_trainer


TOLERANCE = 2e-4  # of the movement, as in test_update
ZERO_B = {"init_lora_weights": True}
LAMBDA_ONE = {"bridge_lambda": 1.0, "coordinator_learning_rate": 0.0, "padding_free": False}


def copies(weights):
    return {name: weight.detach().clone() for name, weight in weights.items()}


def weights_of(trainer):
    return copies(dict(trainer.model.named_parameters()))


def assert_equal(got, want):
    different = [name for name in want if not torch.equal(got[name], want[name])]
    assert not different, different


def logged(trainer, name):
    return [entry[name] for entry in trainer.state.log_history if "loss" in entry]


def bridge_trainer(tmp_path, lora=None, trainer_class=RecordingTrainer, **changes):
    return small_trainer(tmp_path / "bridge", trainer_class, peft_config=small_lora(**(lora or {})), **changes)


def grpo_trainer(tmp_path, **changes):
    kwargs = {name: changes.pop(name) for name in ("model", "reward_funcs", "rollout_func") if name in changes}
    return small_trainer(tmp_path, GRPOTrainer, args=small_config(tmp_path / "grpo", GRPOConfig, **changes), **kwargs)


def trained(trainer):
    # A trainer seeds the global random state when it is built, so each is trained before the next is made.
    trainer.train()
    return trainer


def assert_replayed(trainer, **changes):
    errors, _ = replay(trainer, **changes)
    assert len(errors) == trainer.state.global_step
    worst = {name: max(e.get(name, 0.0) for e in errors) for name in ("theta", "a", "b", "hat")}
    assert all(error < TOLERANCE for error in worst.values()), worst


class ShadowRecorder(RecordingTrainer):
    """Keeps what each shadow gradient was taken at, and the gradient."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.shadow_windows, self._at = [], None

    def policy_pass(self, model, inputs):
        if self._at is None:
            self._at = {
                "student": copies(self._weights),
                "shadow": copies(self.shadow.weights),
                "control": (self.entropy_coef, self._last_world_entropy),
            }
        return super().policy_pass(model, inputs)

    def _shadow_part(self, weight):
        # It has run, and not yet stepped.
        self._at["gradients"] = copies(self.shadow.gradients())
        return super()._shadow_part(weight)

    def after_step(self):
        super().after_step()
        self.shadow_windows.append({**self._at, "batches": self.windows[-1]["rl"]})
        self._at = None


def load(model, weights):
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(weights[name])


def gradients_of_trl(grpo, window):
    """Gradients that TRL's own trainer gets at the shadow's weights, the ratio being to the student's."""
    model, batches = grpo.model.train(), window["batches"]
    grpo.current_gradient_accumulation_steps = len(batches)
    grpo.entropy_coef, grpo._last_world_entropy = window["control"]
    grpo.accelerator.gradient_state._set_sync_gradients(False)
    model.zero_grad()
    for batch in batches:
        shared = dict(batch)
        if "old_per_token_logps" not in batch:
            load(model, window["student"])
            ids = torch.cat([batch["prompt_ids"], batch["completion_ids"]], dim=1)
            mask = torch.cat([batch["prompt_mask"], batch["completion_mask"]], dim=1)
            with torch.no_grad():
                scores = grpo._get_per_token_logps_and_entropies(model, ids, mask, batch["completion_ids"].size(1))
            shared["old_per_token_logps"] = scores[0]
        load(model, window["shadow"])
        with grpo.compute_loss_context_manager():
            loss = grpo._compute_loss(model, shared)
        loss.backward()
    return {name: torch.zeros_like(p) if p.grad is None else p.grad.clone() for name, p in model.named_parameters()}


def distance(got, want):
    difference = sum(float((got[n] - want[n]).double().square().sum()) for n in want)
    return (difference / sum(float(want[n].double().square().sum()) for n in want)) ** 0.5


def assert_shadow_follows_trl(tmp_path, options, without, model=small_model):
    # 16 bits round otherwise where they add otherwise.
    changes = {"padding_free": False, **options} if options.get("bf16") else options
    bridge = bridge_trainer(tmp_path, trainer_class=ShadowRecorder, model=model(), learning_rate=1e-2, **changes)
    bridge.train()
    window = bridge.shadow_windows[-1]
    want = gradients_of_trl(grpo_trainer(tmp_path, model=model(), **options), window)
    assert distance(window["gradients"], want) < 1e-5
    other = gradients_of_trl(grpo_trainer(tmp_path, model=model(), **without), window)
    assert distance(other, want) > 1e-3, "the option made no difference, so nothing was compared"
    return bridge


def model_with_dropout(p=0.3):
    model = small_model()
    model.config.attention_dropout = p
    for layer in model.model.layers:
        layer.self_attn.attention_dropout = p
    return model

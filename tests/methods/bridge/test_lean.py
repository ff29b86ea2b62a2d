"""Lean mode against plain float64 autograd, on batches recorded from `trainer.train()`."""

import pytest
import torch
from trl import GRPOConfig, GRPOTrainer

from tests.helpers.bridge import assert_equal, copies
from tests.helpers.lean import lean_trainer, replayed
from tests.helpers.training import small_config, small_lora, small_model, small_trainer
from trl_bridge.methods.bridge.lean.build import students_adapter


TOLERANCE = 2e-4  # relative error of the movement
SGD = {"optim": "sgd", "learning_rate": 1.0}

CASES = {
    "sgd at a temperature": {**SGD, "bridge_lambda": 0.3, "temperature": 0.7},
    "adamw": {},
    "sgd, iterations, checkpointing": {
        **SGD, "num_iterations": 2, "steps_per_generation": 4, "max_steps": 5, "gradient_checkpointing": True,
    },
    "gain off": {"cooperative_gain": False, "bridge_lambda": 0.3},
    "decay and clipping": {
        "weight_decay": 0.3, "max_grad_norm": 0.2, "coordinator_learning_rate": 3e-2, "shadow_learning_rate": 5e-3,
    },
    "shadow by sgd, reset, no ratio": {
        "shadow_optim": "sgd", "shadow_learning_rate": 1.0, "shadow_reset_steps": 2, "shadow_importance_sampling": False,
    },
    "kl, pairing": {**SGD, "beta": 0.1, "sft_pairing": "prompt"},
    "reentrant, likelihood": {
        "gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": True},
        "sft_weighting": "likelihood",
    },
    "half of the rollouts, every second update": {
        "shadow_rollout_fraction": 0.5, "shadow_update_steps": 2, "max_steps": 5,
    },
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_update_equals_reference(tmp_path, name):
    trainer = lean_trainer(tmp_path, **CASES[name])
    trainer.train()
    rows = (lambda batch: batch["shadow_weight"]) if "shadow_rollout_fraction" in CASES[name] else None
    errors = [errors for errors, _ in replayed(trainer, rows=rows)]
    assert all(error < TOLERANCE for step in errors for error in step.values()), errors


def test_metrics_equal_reference(tmp_path):
    trainer = lean_trainer(tmp_path, log_gradient_stats=True, bridge_lambda=0.3, max_steps=4)
    trainer.train()
    logged = [entry for entry in trainer.state.log_history if "loss" in entry]
    seen = 0
    for step, ((_, want), got) in enumerate(zip(replayed(trainer), logged, strict=True)):
        seen += want.pop("sft/num_tokens")
        assert got["sft/num_tokens"] == seen
        for name, value in want.items():
            assert got[name] == pytest.approx(value, rel=2e-3, abs=2e-6), (step, name)
    assert got["bridge/gain"] != 0 and got["bridge/shadow_distance"] > 0 and got["grad_norm"] > 0


# Exact consequences, against TRL's own LoRA GRPO

ONE_OPTIMIZER = {"max_grad_norm": 0.0, "coordinator_learning_rate": 1e-2}


class FrozenSlices(GRPOTrainer):
    """LoRA GRPO whose optimizer sees no gradient of w's slices."""

    def create_optimizer(self, *args, **kwargs):
        for name, parameter in self.model.named_parameters():
            if parameter.requires_grad:
                mask = torch.ones_like(parameter)
                mask[(slice(6, None),) if "lora_A" in name else (slice(None), slice(6, None))] = 0
                parameter.register_hook(mask.mul)
        return super().create_optimizer(*args, **kwargs)


@pytest.mark.parametrize(
    ("trainer_class", "options"),
    [
        (FrozenSlices, {"coordinator_learning_rate": 0.0}),
        (
            FrozenSlices,
            {"coordinator_learning_rate": 0.0, "beta": 0.1, "num_iterations": 2, "steps_per_generation": 4},
        ),
        # One scaling and one rate, without clipping: w is as much of theta.
        (GRPOTrainer, {**ONE_OPTIMIZER, "lean_lora_alpha": 15.0}),
    ],
    ids=["w at rest", "w at rest, kl, iterations", "w as a part of theta"],
)
def test_lambda_one_is_lora_grpo(tmp_path, trainer_class, options):
    # A trainer seeds the global random state when it is built, so each is trained before the next is made.
    lean = lean_trainer(tmp_path / "lean", bridge_lambda=1.0, cooperative_gain=False, padding_free=False, **options)
    start, adapter = (
        copies(dict(lean.model.named_parameters())),
        students_adapter(lean.args, lean.coordinator.peft_config),
    )
    lean.train()
    options = {k: v for k, v in options.items() if k not in ("coordinator_learning_rate", "lean_lora_alpha")}
    args = small_config(tmp_path / "grpo", GRPOConfig, learning_rate=1e-2, **options)
    grpo = small_trainer(tmp_path, trainer_class, args=args, grpo_adapter=adapter)
    grpo.model.load_state_dict(start, strict=False)
    grpo.train()
    assert_equal(copies(dict(lean.model.named_parameters())), copies(dict(grpo.model.named_parameters())))
    losses = [[e["loss"] for e in t.state.log_history if "loss" in e] for t in (lean, grpo)]
    assert losses[0] == losses[1] and any(losses[0])


def test_start_is_lora_grpos_of_the_same_seed(tmp_path):
    trainer = small_trainer(tmp_path, lean=True, lean_lora_r=6)
    state = torch.get_rng_state()
    theta = trainer.theta_state_dict()
    torch.manual_seed(trainer.args.seed)
    grpo = small_trainer(
        tmp_path,
        GRPOTrainer,
        args=small_config(tmp_path, GRPOConfig),
        grpo_adapter=small_lora(r=6, lora_alpha=6, init_lora_weights=True),
    )
    assert_equal({n.replace(".default", ""): p for n, p in grpo.model.named_parameters() if "lora_" in n}, theta)
    assert torch.equal(torch.get_rng_state(), state), "the rollouts would not be plain GRPO's"


def test_first_gain_vanishes(tmp_path):
    trainer = lean_trainer(tmp_path, max_steps=1)
    trainer.train()
    (entry,) = [e for e in trainer.state.log_history if "loss" in e]
    assert entry["bridge/gain"] == 0.0 and entry["bridge/shadow_distance"] == 0.0
    assert entry["bridge/gain_grad_norm"] < 1e-5 * entry["bridge/coordinator_grad_norm_rl"]


def test_base_and_names_are_lora_grpos(tmp_path):
    trainer = lean_trainer(tmp_path)
    trainer.train()
    base = {
        n.replace(".base_layer", "").removeprefix("base_model.model."): p
        for n, p in trainer.model.named_parameters()
        if "lora_" not in n
    }
    assert_equal(base, dict(small_model().named_parameters()))
    assert trainer.model.peft_config.keys() == {"default"}
    trained = [p for p in trainer.model.parameters() if p.requires_grad]
    assert sum(p.numel() for g in trainer.optimizer.param_groups for p in g["params"]) == sum(
        p.numel() for p in trained
    )

"""The coordinator on experts' fused weights (PEFT's `target_parameters`), against float64 autograd and against PEFT."""

import logging

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model_state_dict

from tests.helpers.families import tiny
from tests.helpers.resume import StopAt, assert_same, saving_trainer, state_of
from tests.helpers.training import RecordingTrainer, replay, small_lora, small_trainer
from trl_bridge.methods.bridge.targets import ExpertsTarget


TOLERANCE = 2e-4  # relative error of the movement, as for linear layers
EXPERTS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
BALANCED = {"router_aux_loss_coef": 0.5}
FAMILIES = {"qwen3_moe": BALANCED, "mixtral": BALANCED, "olmoe": BALANCED, "gpt_oss": BALANCED, "deepseek_v3": {}}


def lora(**changes):
    return small_lora(**{"target_parameters": EXPERTS, **changes})


def recorded(tmp_path, family="qwen3_moe", adapter=None, **options):
    options = {"optim": "sgd", "learning_rate": 0.1, **FAMILIES[family], **options}
    trainer = small_trainer(tmp_path, RecordingTrainer, model=tiny(family), peft_config=adapter or lora(), **options)
    trainer.initial_model = tiny(family)
    trainer.initial_model.set_experts_implementation("eager")  # the grouped product has no float64
    trainer.train()
    assert len(trainer.windows) == trainer.args.max_steps
    return trainer


def replayed(trainer, family="qwen3_moe", **changes):
    balance = FAMILIES[family].get("router_aux_loss_coef")
    errors, metrics = replay(trainer, balance=balance, **changes)
    worst = {name: max(step.get(name, 0.0) for step in errors) for name in ("theta", "a", "b", "hat")}
    assert all(0 <= error < TOLERANCE for error in worst.values()), worst
    return metrics


def experts_of(trainer):
    return [target for target in trainer.coordinator.targets if isinstance(target, ExpertsTarget)]


@pytest.mark.parametrize("family", FAMILIES)
def test_update_equals_reference(tmp_path, family, caplog):
    with caplog.at_level(logging.WARNING):
        trainer = recorded(tmp_path, family)
    metrics = replayed(trainer, family)
    assert not any("leaves the fused weights" in text for text in caplog.messages)
    layers = 1 if family == "deepseek_v3" else 2  # whose first one is dense
    assert len(experts_of(trainer)) == 2 * layers < len(trainer.coordinator.targets)
    logged = [entry for entry in trainer.state.log_history if "loss" in entry]
    for got, want in zip(logged, metrics, strict=True):
        for name in (
            "loss",
            "bridge/gain",
            "bridge/gain_grad_norm",
            "bridge/coordinator_norm",
            "bridge/shadow_distance",
        ):
            assert got[name] == pytest.approx(want[name], rel=2e-3, abs=2e-6), name


CASES = {
    "one parameter, alone": (lora(target_modules=[], target_parameters=EXPERTS[1:]), {}),
    "accumulation, weight decay, offload": (
        lora(),
        {
            "gradient_accumulation_steps": 4,
            "per_device_train_batch_size": 4,
            "weight_decay": 0.1,
            "shadow_offload": True,
        },
    ),
    "clipping, reset": (lora(), {"max_grad_norm": 0.05, "shadow_reset_steps": 2, "log_gradient_stats": True}),
}


@pytest.mark.parametrize("name", CASES)
def test_update_with_options(tmp_path, name):
    adapter, options = CASES[name]
    trainer = recorded(tmp_path, "gpt_oss", adapter, **options)
    assert len(replayed(trainer, "gpt_oss")) == trainer.args.max_steps


def test_scaling_other_than_one(tmp_path):
    trainer = recorded(tmp_path, adapter=lora(lora_alpha=8))
    assert len(replayed(trainer, scaling=2.0)) == trainer.args.max_steps


@pytest.mark.parametrize("family", [*FAMILIES, "granitemoe"])
def test_saved_coordinator_on_theta_is_the_policy(tmp_path, family):
    names = [name.removeprefix("mlp.") for name in EXPERTS]
    adapter = lora(target_parameters=names, task_type="CAUSAL_LM")
    trainer = small_trainer(tmp_path, model=tiny(family), peft_config=adapter, max_steps=2, router_aux_loss_coef=0.0)
    trainer.train()
    trainer.save_coordinator(tmp_path / "w")
    base = tiny(family).eval()
    base.load_state_dict(trainer.theta_state_dict(), strict=False)  # which holds no buffers
    tokens = torch.arange(3, 19)[None]
    with torch.no_grad():
        want, without = trainer.model.eval()(tokens).logits, base(tokens).logits
        loaded = PeftModel.from_pretrained(base, tmp_path / "w").eval()
        torch.testing.assert_close(loaded(tokens).logits, want)
    assert (without - want).abs().max() > 1e-2
    assert get_peft_model_state_dict(loaded).keys() == trainer.coordinator_state_dict().keys()


# Of the first, transformers saves the experts one by one, and its own trainer would go on without them.
@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss"])
def test_resume_is_exact(tmp_path, family):
    def run(folder, callbacks=None, **more):
        options = {"router_aux_loss_coef": 0.1, "max_steps": 4, **more}
        return saving_trainer(folder, callbacks, model=tiny(family), peft_config=lora(), **options)

    straight = run(tmp_path / "straight")
    straight.train()
    run(tmp_path / "halves", [StopAt(2)]).train()
    resumed = run(tmp_path / "halves")
    resumed.train(resume_from_checkpoint=str(tmp_path / "halves" / "checkpoint-2"))
    assert_same(state_of(resumed), state_of(straight))


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("cuts", [(0, 3, 5), (0, 5, 5), (0, 1, 5)])
def test_projection_and_change_by_experts_make_the_whole(transposed, cuts):
    torch.manual_seed(0)
    experts, rank, inner, out = 5, 2, 3, 4
    a, b = (
        torch.nn.Parameter(torch.randn(s, dtype=torch.float64))
        for s in ((experts * rank, inner), (out, rank * experts))
    )
    target = ExpertsTarget(
        module="mlp.experts.base_layer",
        a=a,
        b=b,
        scaling=0.5,
        transposed=transposed,
        parameter="down_proj",
        experts=experts,
    )
    assert target.weight_name == target.name == "mlp.experts.down_proj"

    def product(a, b):
        parts = [0.5 * b[:, e::experts] @ a[e * rank : (e + 1) * rank] for e in range(experts)]
        return torch.stack([part.T if transposed else part for part in parts])

    whole = product(a, b)
    torch.testing.assert_close(target.product(), whole.detach())
    torch.testing.assert_close(target.squared_norm(), whole.detach().square().sum())
    gradient = torch.randn_like(whole)
    want = torch.autograd.grad(whole, (a, b), gradient)
    pieces = [slice(first, last) for first, last in zip(cuts, cuts[1:], strict=False)]
    parts = [target.project(gradient[piece], piece.start) for piece in pieces]
    for index in range(2):
        torch.testing.assert_close(sum(part[index] for part in parts), want[index])
    old_a, old_b = torch.randn_like(a), torch.randn_like(b)
    changes = torch.cat([target.change(old_a, old_b, piece.start, piece.stop) for piece in pieces])
    torch.testing.assert_close(changes, (whole - product(old_a, old_b)).detach())


# What is said, and what is refused


def test_the_note_says_how_to_include_them(tmp_path, caplog):
    with caplog.at_level(logging.WARNING):
        small_trainer(tmp_path, model=tiny("qwen3_moe"), router_aux_loss_coef=0.0)
        small_trainer(
            tmp_path,
            model=tiny("qwen3_moe"),
            peft_config=lora(target_parameters=EXPERTS[:1]),
            router_aux_loss_coef=0.0,
        )
    first, second = [text for text in caplog.messages if "fused weights" in text]
    assert "`target_parameters=['experts.down_proj', 'experts.gate_up_proj']`" in first
    assert "`target_parameters=['experts.down_proj']`" in second


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"target_parameters": [*EXPERTS, "experts.gate_proj"]},
            "`peft_config.target_parameters` names 'experts.gate_proj'",
        ),
        (
            {"target_parameters": ["mlp.gate.weight"]},
            "`weight` of 'model.layers.0.mlp.gate'.*a matrix for each expert",
        ),
        (
            {"target_modules": ["q_proj", "down_proj"], "target_parameters": EXPERTS[:1]},
            "`down_proj` of 'model.layers.0",
        ),
        ({"init_lora_weights": "pissa"}, "`peft_config.init_lora_weights`='pissa'.*`target_parameters`"),
        ({"init_lora_weights": "orthogonal"}, "`peft_config.init_lora_weights`='orthogonal'.*`target_parameters`"),
        (
            {"target_modules": [], "fan_in_fan_out": True},
            "`peft_config.target_parameters` cannot be used: .*fan_in_fan_out",
        ),
        ({"lora_dropout": 0.1}, "`peft_config.lora_dropout`"),
    ],
)
def test_refused(tmp_path, changes, message):
    model = tiny("qwen3_moe")
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    with pytest.raises(ValueError, match=message):
        small_trainer(tmp_path, model=model, peft_config=lora(**changes), router_aux_loss_coef=0.0)
    assert_same(dict(model.state_dict()), before)


def test_lean_refuses_them(tmp_path):
    with pytest.raises(NotImplementedError, match="`peft_config.target_parameters`.*`lean=True`"):
        small_trainer(tmp_path, model=tiny("qwen3_moe"), peft_config=lora(), lean=True, router_aux_loss_coef=0.0)


def test_another_parameter_is_another_run(tmp_path):
    """Of one rank each, and under one name in PEFT's adapter."""
    shapes = [
        small_trainer(
            tmp_path, model=tiny("qwen3_moe"), peft_config=lora(target_parameters=[name]), router_aux_loss_coef=0.0
        ).coordinator.shape()
        for name in EXPERTS
    ]
    assert shapes[0].keys() != shapes[1].keys()


def test_without_target_modules(tmp_path):
    adapter = LoraConfig(r=4, target_parameters=EXPERTS, task_type="CAUSAL_LM")
    trainer = small_trainer(
        tmp_path, model=tiny("qwen3_moe"), peft_config=adapter, max_steps=1, router_aux_loss_coef=0.0
    )
    assert len(experts_of(trainer)) == 4

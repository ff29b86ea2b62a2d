"""TRL's options that reach the update: TRL's own loss, or the float64 replay, says what each must do."""

import copy

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

from tests.helpers.bridge import (
    LAMBDA_ONE,
    TOLERANCE,
    ZERO_B,
    assert_equal,
    assert_replayed,
    assert_shadow_follows_trl,
    bridge_trainer,
    grpo_trainer,
    logged,
    model_with_dropout,
    trained,
    weights_of,
)
from tests.helpers.training import (
    adapters,
    movement_error,
    replay,
    small_model,
)
from trl_bridge.models import tiny_tokenizer


# Options, and the same ones without what is looked at: that the two differ shows that the option is felt.
LOSSES = {
    "epsilon": ({"epsilon": 0.001}, {}),
    "delta": ({"loss_type": "grpo", "delta": 1.001}, {"loss_type": "grpo"}),
    "sapo": (
        {"loss_type": "sapo", "sapo_temperature_neg": 9.0, "sapo_temperature_pos": 0.2},
        {"loss_type": "sapo"},
    ),
    "vespo": (
        {
            "loss_type": "vespo",
            "vespo_k_pos": 1.0,
            "vespo_lambda_pos": 0.5,
            "vespo_k_neg": 4.0,
            "vespo_lambda_neg": 1.0,
        },
        {"loss_type": "vespo"},
    ),
    "high-entropy tokens": ({"top_entropy_quantile": 0.5}, {}),
    "high-entropy tokens, sequence level": (
        {"top_entropy_quantile": 0.5, "importance_sampling_level": "sequence", "loss_type": "grpo"},
        {"importance_sampling_level": "sequence", "loss_type": "grpo"},
    ),
    "adaptive entropy": (
        {"use_adaptive_entropy": True, "entropy_coef": 0.1, "entropy_coef_delta": 0.1, "entropy_target": 9.0},
        {},
    ),
    "bf16": ({"bf16": True}, {}),
    "head in fp32": ({"bf16": True, "cast_lm_head_to_fp32": True}, {"bf16": True}),
    "tied head in fp32": ({"bf16": True, "cast_lm_head_to_fp32": True, "tied": True}, {"bf16": True}),
}


@pytest.mark.parametrize("name", LOSSES)
def test_shadow_follows_the_parents_loss(tmp_path, name):
    options, without = copy.deepcopy(LOSSES[name])
    tied = options.pop("tied", False)
    assert_shadow_follows_trl(tmp_path, options, without, lambda: small_model(tie_word_embeddings=tied))


@pytest.mark.parametrize(
    "options",
    [
        {"pad_to_multiple_of": 8},
        {"generation_batch_size": 32, "max_steps": 4},
        {"num_iterations": 2, "max_steps": 4},
        {"steps_per_generation": 1},
    ],
    ids=lambda options: next(iter(options)),
)
def test_batching_options_replayed(tmp_path, options):
    trainer = bridge_trainer(tmp_path, **options)
    trainer.train()
    assert_replayed(trainer)
    if "pad_to_multiple_of" in options:
        assert all(b["input_ids"].size(1) % 8 == 0 for window in trainer.windows for b in window["sft"])


@pytest.mark.parametrize(
    "options",
    [
        {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": True}},
        {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": False}},
        {
            "activation_checkpointing": True,
            "activation_checkpointing_kwargs": {"every_n_layers": 2, "use_reentrant": False},
        },
    ],
    ids=["reentrant", "not reentrant", "every second layer"],
)
def test_checkpointing_variants(tmp_path, options):
    trainer = bridge_trainer(tmp_path, **options)
    trainer.train()
    assert trainer.shadow.model.is_gradient_checkpointing
    assert_replayed(trainer)


def test_bf16_computes_near_fp32_and_keeps_fp32_weights(tmp_path):
    runs = []
    for bf16 in (True, False):
        trainer = bridge_trainer(tmp_path / str(bf16), ZERO_B, bf16=bf16, optim="sgd", learning_rate=0.1, max_steps=1)
        start = weights_of(trainer)
        trainer.train()
        runs.append(weights_of(trainer))
        dtypes = {p.dtype for p in trainer.model.parameters()} | {p.dtype for p in trainer.coordinator.parameters()}
        assert dtypes | {p.dtype for p in trainer.shadow.model.parameters()} == {torch.float32}
        if bf16:
            assert logged(trainer, "bridge/gain") == [0.0]  # the shadow's forward is the student's to the bit
    assert all(torch.isfinite(weight).all() for weight in runs[0].values())
    assert 1e-4 < movement_error(runs[0], runs[1], start) < 0.2


def test_adaptive_entropy_is_that_of_grpo(tmp_path):
    options = {
        "use_adaptive_entropy": True,
        "entropy_coef": 0.02,
        "entropy_coef_delta": 0.01,
        "entropy_coef_min": 0.005,
        "entropy_coef_max": 0.035,
        "entropy_target": 9.0,
        "max_steps": 4,
    }
    grpo = trained(grpo_trainer(tmp_path, **options))
    assert len(set(logged(grpo, "entropy_coef"))) > 1 and grpo.entropy_coef == 0.035
    for gain in (True, False):
        bridge = bridge_trainer(tmp_path / str(gain), ZERO_B, cooperative_gain=gain, **LAMBDA_ONE, **options)
        bridge.train()
        assert logged(bridge, "entropy_coef") == logged(grpo, "entropy_coef")
        assert bridge.entropy_coef == grpo.entropy_coef
        assert bridge._last_world_entropy == grpo._last_world_entropy
        assert logged(bridge, "entropy") == logged(grpo, "entropy")
        assert_equal(weights_of(bridge), weights_of(grpo))


def test_off_policy_mask_without_the_gain(tmp_path):
    options = {"off_policy_mask_threshold": 1e-4, "num_iterations": 2, "steps_per_generation": 4, "max_steps": 5}
    runs = []
    for changes in (options, {**options, "off_policy_mask_threshold": None}):
        grpo = trained(grpo_trainer(tmp_path, **changes))
        bridge = trained(bridge_trainer(tmp_path, ZERO_B, cooperative_gain=False, **LAMBDA_ONE, **changes))
        assert_equal(weights_of(bridge), weights_of(grpo))
        runs.append(weights_of(bridge))
    assert any(not torch.equal(runs[0][name], runs[1][name]) for name in runs[0])


# Dropout


@pytest.mark.parametrize("checkpointing", [False, True])
def test_shadow_replays_the_students_dropout(tmp_path, checkpointing):
    trainer = bridge_trainer(
        tmp_path,
        ZERO_B,
        model=model_with_dropout(),
        max_steps=1,
        gradient_checkpointing=checkpointing,
        num_iterations=1,
    )
    trainer.train()
    assert logged(trainer, "bridge/gain") == [0.0]
    assert logged(trainer, "bridge/gain_grad_norm")[0] < 1e-5 * logged(trainer, "bridge/coordinator_grad_norm_rl")[0]


@pytest.mark.parametrize("gain", [True, False])
def test_dropout_of_the_other_passes_leaves_rl_alone(tmp_path, gain):
    grpo = trained(grpo_trainer(tmp_path, model=model_with_dropout()))
    bridge = trained(bridge_trainer(tmp_path, ZERO_B, model=model_with_dropout(), cooperative_gain=gain, **LAMBDA_ONE))
    without = trained(grpo_trainer(tmp_path))
    assert_equal(weights_of(bridge), weights_of(grpo))
    assert any(not torch.equal(p, weights_of(without)[name]) for name, p in weights_of(grpo).items())


def _tiny_gpt2(dropout=0.0):
    tokenizer = tiny_tokenizer()
    config = GPT2Config(
        vocab_size=len(tokenizer), n_embd=32, n_layer=2, n_head=4, n_positions=64, bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
        resid_pdrop=dropout, embd_pdrop=dropout, attn_pdrop=dropout,
    )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(5)
        return GPT2LMHeadModel(config).eval()


def _as_linear(state):
    """Conv1D holds W^T, and W^T + s A^T B^T is the reference's theta + s B A with A := B^T, B := A^T."""
    swap = {"lora_A": "lora_B", "lora_B": "lora_A"}
    return {n.replace(k, swap[k]): t.T for n, t in state.items() for k in swap if k in n}


def assert_gpt2_is_replayed(tmp_path, **options):
    dropout = options.pop("dropout", 0.0)
    lora = {"target_modules": ["c_attn", "c_proj", "c_fc"], "fan_in_fan_out": True}
    # SGD: the gradient of the keys' bias vanishes, and AdamW would blow its rounding up.
    options = {"model": _tiny_gpt2(dropout), "optim": "sgd", "learning_rate": 0.1, **options}
    trainer = bridge_trainer(tmp_path, lora, **options)
    trainer.initial_model = _tiny_gpt2()
    trainer.train()
    for snapshot in (trainer.start, *trainer.states):
        snapshot["w"] = _as_linear(snapshot["w"])
    assert_replayed(trainer)


def test_conv1d_targets(tmp_path):
    assert_gpt2_is_replayed(tmp_path)


def test_disable_dropout_reaches_every_pass(tmp_path):
    assert_gpt2_is_replayed(tmp_path, dropout=0.4, disable_dropout=True, max_steps=2)


# Adapters


def test_rslora_and_patterns(tmp_path):
    # alpha / sqrt(r) is 4 everywhere, which is what the reference takes.
    lora = {"lora_alpha": 8, "use_rslora": True, "rank_pattern": {"q_proj": 1}, "alpha_pattern": {"q_proj": 4}}
    trainer = bridge_trainer(tmp_path, lora)
    a, _ = adapters(trainer.start["w"])
    assert {t.size(0) for n, t in a.items() if "q_proj" in n} == {1} and {t.size(0) for t in a.values()} == {1, 4}
    trainer.train()
    errors, _ = replay(trainer, scaling=4.0)
    assert max(max(e.values()) for e in errors) < TOLERANCE


def test_pissa_starts_at_the_base(tmp_path):
    trainer = bridge_trainer(tmp_path, {"init_lora_weights": "pissa"})
    base = dict(small_model().named_parameters())
    for name, weight in weights_of(trainer).items():
        assert torch.allclose(weight, base[name], atol=1e-6), name
    assert any((trainer.start["theta"][name] - base[name]).abs().max() > 1e-3 for name in base)
    trainer.train()
    assert_replayed(trainer)


def test_tied_embeddings_left_untargeted(tmp_path):
    trainer = bridge_trainer(tmp_path, model=small_model(tie_word_embeddings=True))
    trainer.initial_model = small_model(tie_word_embeddings=True)
    trainer.train()
    assert_replayed(trainer)
    for model in (trainer.model, trainer.shadow.model):
        assert model.lm_head.weight is model.model.embed_tokens.weight


# Optimizers


def test_users_own_optimizer_serves_theta(tmp_path):
    model = small_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    trainer = bridge_trainer(tmp_path, model=model, optimizers=(optimizer, None), optim="sgd", learning_rate=0.1)
    trainer.train()
    assert getattr(trainer.optimizer, "optimizer", trainer.optimizer) is optimizer
    assert_replayed(trainer, lr=0.05)


def test_optimizer_arguments_reach_all_three(tmp_path):
    options = {"adam_beta1": 0.7, "adam_beta2": 0.95, "adam_epsilon": 1e-6, "max_steps": 1}
    trainer = bridge_trainer(tmp_path, **options)
    trainer.train()
    for optimizer in (trainer.optimizer, trainer.coordinator_optimizer, trainer.shadow.optimizer):
        for group in optimizer.param_groups:
            assert group["betas"] == (0.7, 0.95) and group["eps"] == 1e-6
    trainer = bridge_trainer(tmp_path, optim="rmsprop", optim_args="momentum=0.3,alpha=0.8", max_steps=1)
    trainer.train()
    for optimizer in (trainer.optimizer, trainer.coordinator_optimizer, trainer.shadow.optimizer):
        assert all(group["momentum"] == 0.3 and group["alpha"] == 0.8 for group in optimizer.param_groups)

"""TRL's options that reach the update: TRL's own loss, or the float64 replay, says what each must do."""

import copy

import pytest
import torch
from datasets import IterableDataset
from transformers import GPT2Config, GPT2LMHeadModel, TrainerCallback
from trl import GRPOConfig, GRPOTrainer

from tests.harness import (
    RecordingTrainer,
    adapters,
    digits_reward,
    movement_error,
    replay,
    rl_rows,
    small_config,
    small_lora,
    small_model,
    small_trainer,
)
from trl_bridge.models import tiny_tokenizer


TOLERANCE = 2e-4  # of the movement, as in test_update
ZERO_B = {"init_lora_weights": True}
LAMBDA_ONE = {"bridge_lambda": 1.0, "coordinator_learning_rate": 0.0}


def _copies(weights):
    return {name: weight.detach().clone() for name, weight in weights.items()}


def _weights(trainer):
    return _copies(dict(trainer.model.named_parameters()))


def _assert_equal(got, want):
    different = [name for name in want if not torch.equal(got[name], want[name])]
    assert not different, different


def _logged(trainer, name):
    return [entry[name] for entry in trainer.state.log_history if "loss" in entry]


def _bridge(tmp_path, lora=None, trainer_class=RecordingTrainer, **changes):
    return small_trainer(tmp_path / "bridge", trainer_class, peft_config=small_lora(**(lora or {})), **changes)


def _grpo(tmp_path, **changes):
    kwargs = {name: changes.pop(name) for name in ("model", "reward_funcs", "rollout_func") if name in changes}
    return small_trainer(tmp_path, GRPOTrainer, args=small_config(tmp_path / "grpo", GRPOConfig, **changes), **kwargs)


def _replayed(trainer, **changes):
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
                "student": _copies(self._weights),
                "shadow": _copies(self.shadow.weights),
                "control": (self.entropy_coef, self._last_world_entropy),
            }
        return super().policy_pass(model, inputs)

    def end_of_window(self):
        self._at["gradients"] = _copies(self.shadow.gradients())
        super().end_of_window()
        self.shadow_windows.append({**self._at, "batches": self.windows[-1]["rl"]})
        self._at = None


def _load(model, weights):
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(weights[name])


def _gradients_of_trl(grpo, window):
    """Gradients that TRL's own trainer gets at the shadow's weights, the ratio being to the student's."""
    model, batches = grpo.model.train(), window["batches"]
    grpo.current_gradient_accumulation_steps = len(batches)
    grpo.entropy_coef, grpo._last_world_entropy = window["control"]
    grpo.accelerator.gradient_state._set_sync_gradients(False)
    model.zero_grad()
    for batch in batches:
        shared = dict(batch)
        if "old_per_token_logps" not in batch:
            _load(model, window["student"])
            ids = torch.cat([batch["prompt_ids"], batch["completion_ids"]], dim=1)
            mask = torch.cat([batch["prompt_mask"], batch["completion_mask"]], dim=1)
            with torch.no_grad():
                scores = grpo._get_per_token_logps_and_entropies(model, ids, mask, batch["completion_ids"].size(1))
            shared["old_per_token_logps"] = scores[0]
        _load(model, window["shadow"])
        with grpo.compute_loss_context_manager():
            loss = grpo._compute_loss(model, shared)
        loss.backward()
    return {name: torch.zeros_like(p) if p.grad is None else p.grad.clone() for name, p in model.named_parameters()}


def _distance(got, want):
    difference = sum(float((got[n] - want[n]).double().square().sum()) for n in want)
    return (difference / sum(float(want[n].double().square().sum()) for n in want)) ** 0.5


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
        {"use_adaptive_entropy": True, "entropy_coef": 0.1, "entropy_coef_delta": 0.5, "entropy_target": 9.0},
        {},
    ),
    "bf16": ({"bf16": True}, {}),
    "head in fp32": ({"bf16": True, "cast_lm_head_to_fp32": True}, {"bf16": True}),
    "tied head in fp32": ({"bf16": True, "cast_lm_head_to_fp32": True, "tied": True}, {"bf16": True}),
}


def _compare_with_trl(tmp_path, options, without, model=small_model):
    bridge = _bridge(tmp_path, trainer_class=ShadowRecorder, model=model(), learning_rate=1e-2, **options)
    bridge.train()
    window = bridge.shadow_windows[-1]
    want = _gradients_of_trl(_grpo(tmp_path, model=model(), **options), window)
    assert _distance(window["gradients"], want) < 1e-5
    other = _gradients_of_trl(_grpo(tmp_path, model=model(), **without), window)
    assert _distance(other, want) > 1e-3, "the option made no difference, so nothing was compared"
    return bridge


@pytest.mark.parametrize("name", LOSSES)
def test_shadow_follows_the_parents_loss(tmp_path, name):
    options, without = copy.deepcopy(LOSSES[name])
    tied = options.pop("tied", False)
    _compare_with_trl(tmp_path, options, without, lambda: small_model(tie_word_embeddings=tied))


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
    trainer = _bridge(tmp_path, **options)
    trainer.train()
    _replayed(trainer)
    if "pad_to_multiple_of" in options:
        assert all(b["input_ids"].size(1) % 8 == 0 for window in trainer.windows for b in window["sft"])


@pytest.mark.parametrize(
    "options",
    [
        {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": True}},
        {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": False}},
        {"activation_checkpointing": True, "activation_checkpointing_kwargs": {"every_n_layers": 2}},
    ],
    ids=["reentrant", "not reentrant", "every second layer"],
)
def test_checkpointing_variants(tmp_path, options):
    trainer = _bridge(tmp_path, **options)
    trainer.train()
    assert trainer.shadow.model.is_gradient_checkpointing
    _replayed(trainer)


def test_bf16_computes_near_fp32_and_keeps_fp32_weights(tmp_path):
    runs = []
    for bf16 in (True, False):
        trainer = _bridge(tmp_path / str(bf16), ZERO_B, bf16=bf16, optim="sgd", learning_rate=0.1, max_steps=1)
        start = _weights(trainer)
        trainer.train()
        runs.append(_weights(trainer))
        dtypes = {p.dtype for p in trainer.model.parameters()} | {p.dtype for p in trainer.coordinator.parameters()}
        assert dtypes | {p.dtype for p in trainer.shadow.model.parameters()} == {torch.float32}
        if bf16:
            assert _logged(trainer, "bridge/gain") == [0.0]  # the shadow's forward is the student's to the bit
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
    grpo = _grpo(tmp_path, **options)
    grpo.train()
    assert len(set(_logged(grpo, "entropy_coef"))) > 1 and grpo.entropy_coef == 0.035
    for gain in (True, False):
        bridge = _bridge(tmp_path / str(gain), ZERO_B, cooperative_gain=gain, **LAMBDA_ONE, **options)
        bridge.train()
        assert _logged(bridge, "entropy_coef") == _logged(grpo, "entropy_coef")
        assert bridge.entropy_coef == grpo.entropy_coef
        assert bridge._last_world_entropy == grpo._last_world_entropy
        assert _logged(bridge, "entropy") == _logged(grpo, "entropy")
        _assert_equal(_weights(bridge), _weights(grpo))


def test_off_policy_mask_without_the_gain(tmp_path):
    options = {"off_policy_mask_threshold": 1e-4, "num_iterations": 2, "steps_per_generation": 4, "max_steps": 5}
    runs = []
    for changes in (options, {**options, "off_policy_mask_threshold": None}):
        grpo = _grpo(tmp_path, **changes)
        bridge = _bridge(tmp_path, ZERO_B, cooperative_gain=False, **LAMBDA_ONE, **changes)
        grpo.train()
        bridge.train()
        _assert_equal(_weights(bridge), _weights(grpo))
        runs.append(_weights(bridge))
    assert any(not torch.equal(runs[0][name], runs[1][name]) for name in runs[0])


# Dropout


def _with_dropout(p=0.3):
    model = small_model()
    model.config.attention_dropout = p
    for layer in model.model.layers:
        layer.self_attn.attention_dropout = p
    return model


@pytest.mark.parametrize("checkpointing", [False, True])
def test_shadow_replays_the_students_dropout(tmp_path, checkpointing):
    trainer = _bridge(
        tmp_path, ZERO_B, model=_with_dropout(), max_steps=1, gradient_checkpointing=checkpointing, num_iterations=1
    )
    trainer.train()
    assert _logged(trainer, "bridge/gain") == [0.0]
    assert _logged(trainer, "bridge/gain_grad_norm")[0] < 1e-5 * _logged(trainer, "bridge/coordinator_grad_norm_rl")[0]


@pytest.mark.parametrize("gain", [True, False])
def test_dropout_of_the_other_passes_leaves_rl_alone(tmp_path, gain):
    grpo = _grpo(tmp_path, model=_with_dropout())
    bridge = _bridge(tmp_path, ZERO_B, model=_with_dropout(), cooperative_gain=gain, **LAMBDA_ONE)
    without = _grpo(tmp_path)
    for trainer in (grpo, bridge, without):
        trainer.train()
    _assert_equal(_weights(bridge), _weights(grpo))
    assert any(not torch.equal(p, _weights(without)[name]) for name, p in _weights(grpo).items())


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


def _replay_gpt2(tmp_path, **options):
    dropout = options.pop("dropout", 0.0)
    trainer = _bridge(
        tmp_path, {"target_modules": ["c_attn", "c_proj", "c_fc"], "fan_in_fan_out": True},
        model=_tiny_gpt2(dropout), **options,
    )  # fmt: skip
    trainer.initial_model = _tiny_gpt2()
    trainer.train()
    for snapshot in (trainer.start, *trainer.states):
        snapshot["w"] = _as_linear(snapshot["w"])
    _replayed(trainer)


def test_conv1d_targets(tmp_path):
    _replay_gpt2(tmp_path)


def test_disable_dropout_reaches_every_pass(tmp_path):
    _replay_gpt2(tmp_path, dropout=0.4, disable_dropout=True, max_steps=2)


# Adapters


def test_rslora_and_patterns(tmp_path):
    # alpha / sqrt(r) is 4 everywhere, which is what the reference takes.
    lora = {"lora_alpha": 8, "use_rslora": True, "rank_pattern": {"q_proj": 1}, "alpha_pattern": {"q_proj": 4}}
    trainer = _bridge(tmp_path, lora)
    a, _ = adapters(trainer.start["w"])
    assert {t.size(0) for n, t in a.items() if "q_proj" in n} == {1} and {t.size(0) for t in a.values()} == {1, 4}
    trainer.train()
    errors, _ = replay(trainer, scaling=4.0)
    assert max(max(e.values()) for e in errors) < TOLERANCE


def test_pissa_starts_at_the_base(tmp_path):
    trainer = _bridge(tmp_path, {"init_lora_weights": "pissa"})
    base = dict(small_model().named_parameters())
    for name, weight in _weights(trainer).items():
        assert torch.allclose(weight, base[name], atol=1e-6), name
    assert any((trainer.start["theta"][name] - base[name]).abs().max() > 1e-3 for name in base)
    trainer.train()
    _replayed(trainer)


def test_tied_embeddings_left_untargeted(tmp_path):
    trainer = _bridge(tmp_path, model=small_model(tie_word_embeddings=True))
    trainer.initial_model = small_model(tie_word_embeddings=True)
    trainer.train()
    _replayed(trainer)
    for model in (trainer.model, trainer.shadow.model):
        assert model.lm_head.weight is model.model.embed_tokens.weight


# Optimizers


def test_users_own_optimizer_serves_theta(tmp_path):
    model = small_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    trainer = _bridge(tmp_path, model=model, optimizers=(optimizer, None), optim="sgd", learning_rate=0.1)
    trainer.train()
    assert getattr(trainer.optimizer, "optimizer", trainer.optimizer) is optimizer
    _replayed(trainer, lr=0.05)


def test_optimizer_arguments_reach_all_three(tmp_path):
    options = {"adam_beta1": 0.7, "adam_beta2": 0.95, "adam_epsilon": 1e-6, "max_steps": 1}
    trainer = _bridge(tmp_path, **options)
    trainer.train()
    for optimizer in (trainer.optimizer, trainer.coordinator_optimizer, trainer.shadow.optimizer):
        for group in optimizer.param_groups:
            assert group["betas"] == (0.7, 0.95) and group["eps"] == 1e-6
    trainer = _bridge(tmp_path, optim="rmsprop", optim_args="momentum=0.3,alpha=0.8", max_steps=1)
    trainer.train()
    for optimizer in (trainer.optimizer, trainer.coordinator_optimizer, trainer.shadow.optimizer):
        assert all(group["momentum"] == 0.3 and group["alpha"] == 0.8 for group in optimizer.param_groups)


# Rollouts and rewards


def _rollouts_of_digits(prompts, trainer):
    ids = [trainer.processing_class(prompt)["input_ids"] for prompt in prompts]
    completions = [[5 + (7 * row + column) % 60 for column in range(4)] for row in range(len(prompts))]
    return {
        "prompt_ids": ids,
        "completion_ids": completions,
        "logprobs": [[-2.0] * 4 for _ in prompts],
        "env_mask": [[1, 0, 1, 1] for _ in prompts],
    }


def test_rollout_func_with_masked_tokens(tmp_path):
    options = {"rollout_func": _rollouts_of_digits}
    bridge = _compare_with_trl(tmp_path, options, {**options, "loss_type": "bnpo", "beta": 0.0})
    assert all("tool_mask" in batch for window in bridge.windows for batch in window["rl"])


def _tens(completions, **kwargs):
    return [10.0 * len(text) for text in completions]


async def _async_digits(completions, **kwargs):
    return digits_reward(completions)


@pytest.mark.parametrize("aggregation", ["sum_then_normalize", "normalize_then_sum"])
def test_several_rewards_with_weights(tmp_path, aggregation):
    options = {"reward_weights": [0.5, 2.0], "multi_objective_aggregation": aggregation, "max_steps": 2}
    grpo = _grpo(tmp_path, reward_funcs=[_async_digits, _tens], **options)
    bridge = _bridge(tmp_path, ZERO_B, reward_funcs=[_async_digits, _tens], **LAMBDA_ONE, **options)
    grpo.train()
    bridge.train()
    _assert_equal(_weights(bridge), _weights(grpo))
    kept = bridge.rollouts.total_rewards()
    logs = bridge._logs["rewards"]
    want = [0.5 * a + 2.0 * b for a, b in zip(logs["_async_digits"], logs["_tens"], strict=True)]
    assert kept.tolist() == pytest.approx(want)


def test_rollouts_in_the_datasets_order(tmp_path):
    trainer = _bridge(tmp_path, shuffle_dataset=False, max_steps=2)
    trainer.train()
    seen = {
        trainer.processing_class.decode(ids[mask.bool()])
        for batch in trainer.windows[0]["rl"]
        for ids, mask in zip(batch["prompt_ids"], batch["prompt_mask"], strict=True)
    }
    assert seen == set(rl_rows()["prompt"][:4])
    _replayed(trainer)


def test_iterable_train_dataset(tmp_path):
    rows = rl_rows()
    stream = IterableDataset.from_generator(lambda: iter(rows))
    trainer = _bridge(tmp_path, train_dataset=stream)
    trainer.train()
    _replayed(trainer)


def test_short_last_window(tmp_path):
    # 6 prompts, 2 to a micro-batch of 8: an epoch has 3 micro-batches, in windows of 2 and 1.
    trainer = _bridge(
        tmp_path, train_dataset=rl_rows().select(range(6)), num_train_epochs=2, max_steps=-1, steps_per_generation=1
    )
    trainer.train()
    assert [len(window["rl"]) for window in trainer.windows] == [2, 1, 2, 1]
    assert [len(window["sft"]) for window in trainer.windows] == [2, 1, 2, 1]
    trainer.args.max_steps = 4  # as the reference's schedule reads it
    _replayed(trainer)


# Logging and evaluation


@pytest.mark.parametrize(
    "logging", [{"logging_steps": 3}, {"logging_strategy": "epoch"}, {"logging_strategy": "no"}], ids=str
)
def test_logging_does_not_change_the_update(tmp_path, logging):
    runs = []
    for changes in ({"logging_steps": 1, "logging_first_step": True}, logging):
        trainer = _bridge(tmp_path / str(len(runs)), max_steps=4, log_gradient_stats=True, **changes)
        trainer.train()
        runs.append({**trainer.theta_state_dict(), **trainer.coordinator_state_dict()})
    _assert_equal(runs[1], runs[0])


class _Positions(TrainerCallback):
    """State of the parts around each evaluation."""

    def __init__(self):
        self.before, self.after = [], []

    def on_step_end(self, args, state, control, **kwargs):
        self.before.append(self._position())

    def on_evaluate(self, args, state, control, **kwargs):
        self.after.append(self._position())

    def _position(self):
        trainer = self.trainer
        return copy.deepcopy((trainer.demonstrations.state_dict(), trainer.shadow.state_dict(), trainer._step))


def test_evaluation_takes_the_parents_path(tmp_path):
    positions = _Positions()
    trainer = _bridge(
        tmp_path, eval_dataset=rl_rows().select(range(4)), eval_strategy="steps", eval_steps=1, eval_on_start=True,
        per_device_eval_batch_size=4, num_generations_eval=2, callbacks=[positions], max_steps=2,
    )  # fmt: skip
    positions.trainer = trainer
    positions._position = lambda: (  # the shadow is built once training starts, before the first evaluation
        copy.deepcopy((trainer.demonstrations.state_dict(), trainer.shadow.state_dict(), trainer._step))
    )
    evaluated, compute = [], GRPOTrainer._compute_loss
    trainer.train()
    assert len(positions.before) == 2 and len(positions.after) == 3
    for before, after in zip(positions.before, positions.after[1:], strict=True):
        assert before[0] == after[0] and before[2] == after[2]
        _assert_equal(after[1]["weights"], before[1]["weights"])
    entries = [entry for entry in trainer.state.log_history if "eval_loss" in entry]
    assert len(entries) == 3 and all("eval_reward" in entry for entry in entries)
    assert not any(name.startswith(("eval_bridge", "eval_sft")) for entry in entries for name in entry)
    del evaluated, compute
    _replayed(trainer)

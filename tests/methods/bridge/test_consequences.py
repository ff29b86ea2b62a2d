"""Exact consequences of the update (docs/bridge.md), each against TRL's own trainers."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from trl import GRPOConfig, GRPOTrainer

from tests.helpers.training import (
    RecordingTrainer,
    adapters,
    clone,
    movement_error,
    sft_rows,
    small_config,
    small_lora,
    small_model,
    small_trainer,
)


ZERO_B = {"init_lora_weights": True}  # PEFT's default: B is zero, so theta + w is the base
PLAIN = {"cooperative_gain": False, "coordinator_learning_rate": 0.0}


class RecordingGRPO(GRPOTrainer):
    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.batches = []

    def _compute_loss(self, model, inputs):
        self.batches.append(clone(inputs))
        return super()._compute_loss(model, inputs)


def _grpo(tmp_path, **changes):
    return small_trainer(tmp_path, RecordingGRPO, args=small_config(tmp_path / "grpo", GRPOConfig, **changes))


def _bridge(tmp_path, lora=ZERO_B, **changes):
    return small_trainer(tmp_path / "bridge", RecordingTrainer, peft_config=small_lora(**lora), **changes)


def _weights(trainer):
    return {name: parameter.detach().clone() for name, parameter in trainer.model.named_parameters()}


def _assert_equal(got, want):
    different = [name for name in want if not torch.equal(got[name], want[name])]
    assert not different, different


def test_gain_vanishes_at_the_first_update(tmp_path):
    trainer = _bridge(tmp_path, max_steps=1)
    trainer.train()
    (entry,) = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert entry["bridge/gain"] == 0.0 and entry["bridge/shadow_distance"] == 0.0
    assert entry["bridge/gain_grad_norm"] < 1e-5 * entry["bridge/coordinator_grad_norm_rl"]


def test_gradient_of_a_vanishes_while_b_is_zero(tmp_path):
    trainer = _bridge(tmp_path, max_steps=1, optim="sgd")
    a_before, b_before = adapters(trainer.start["w"])
    trainer.train()
    a_after, b_after = adapters(trainer.coordinator_state_dict())
    _assert_equal(a_after, a_before)
    assert all(not b.any() for b in b_before.values()) and any(b.any() for b in b_after.values())


@pytest.mark.parametrize("changes", [{}, {"loss_type": "grpo", "temperature": 0.7}], ids=["dapo", "grpo"])
def test_first_shadow_step_is_a_grpo_step(tmp_path, changes):
    changes = {"optim": "sgd", "learning_rate": 0.1, "max_steps": 1, **changes}
    # A trainer seeds the global random state when it is built, so each is trained before the next is made.
    grpo = _grpo(tmp_path, **changes)
    start = _weights(grpo)
    grpo.train()
    bridge = _bridge(tmp_path, padding_free=False, **changes)
    bridge.train()
    for ours, theirs in zip(bridge.windows[0]["rl"], grpo.batches, strict=True):
        assert torch.equal(ours["completion_ids"], theirs["completion_ids"])
    assert movement_error(bridge.shadow_state_dict(), _weights(grpo), start) < 1e-5


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"gradient_checkpointing": True, "weight_decay": 0.1},
        {"num_iterations": 2, "steps_per_generation": 4, "max_steps": 5},
        {"beta": 0.1},
        {"bf16": True},
    ],
    ids=["plain", "checkpointing", "iterations", "kl", "bf16"],
)
def test_lambda_one_is_grpo_to_the_bit(tmp_path, changes):
    if changes.get("beta"):
        # The parent builds its reference by the model's name, so both get the model from a directory.
        small_model().save_pretrained(tmp_path / "model")
        changes = {**changes, "model": str(tmp_path / "model")}
    model = {"model": changes.pop("model")} if "model" in changes else {}
    grpo = small_trainer(tmp_path, RecordingGRPO, args=small_config(tmp_path / "grpo", GRPOConfig, **changes), **model)
    grpo.train()
    bridge = _bridge(tmp_path, bridge_lambda=1.0, padding_free=False, **PLAIN, **model, **changes)
    bridge.train()
    _assert_equal(_weights(bridge), _weights(grpo))
    assert [e["loss"] for e in bridge.state.log_history if "loss" in e] == [
        e["loss"] for e in grpo.state.log_history if "loss" in e
    ]


def test_lambda_zero_is_an_sft_step(tmp_path):
    bridge = _bridge(tmp_path, bridge_lambda=0.0, optim="sgd", learning_rate=0.1, max_steps=2, **PLAIN)
    bridge.train()
    model = small_model()
    for step, window in enumerate(bridge.windows):
        tokens = sum(int((batch["labels"][:, 1:] != -100).sum()) for batch in window["sft"])
        model.zero_grad()
        for batch in window["sft"]:
            logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits[:, :-1]
            labels = batch["labels"][:, 1:]
            nn.functional.cross_entropy(
                logits.flatten(0, 1), labels.flatten(), reduction="sum", ignore_index=-100
            ).div(tokens).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter -= 0.1 * (2 - step) / 2 * parameter.grad
    start = dict(small_model().named_parameters())
    assert movement_error(_weights(bridge), dict(model.named_parameters()), start) < 1e-5


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_sft_loss_does_not_depend_on_temperature(tmp_path, temperature):
    trainer = _bridge(tmp_path, temperature=temperature, max_steps=1)
    trainer.train()
    batches = trainer.windows[0]["sft"]
    model, total, tokens = small_model(), 0.0, 0
    for batch in batches:
        loss = model(**batch).loss.item()  # transformers' own mean over the labels
        count = int((batch["labels"][:, 1:] != -100).sum())
        total, tokens = total + loss * count, tokens + count
    entry = next(entry for entry in trainer.state.log_history if "loss" in entry)
    assert entry["sft/loss"] == pytest.approx(total / tokens, rel=1e-5)


def test_micro_batch_split_makes_no_difference(tmp_path):
    # lambda=0: the SFT term alone, so that how RL splits its own batch plays no part.
    results = []
    for accumulation, batch in ((4, 1), (2, 2), (1, 4)):
        trainer = _bridge(
            tmp_path / str(accumulation),
            bridge_lambda=0.0,
            gradient_accumulation_steps=accumulation,
            per_device_train_batch_size=4 * batch,
            sft_per_device_train_batch_size=batch,
            optim="sgd",
            learning_rate=0.1,
            max_steps=2,
            **PLAIN,
        )
        trainer.train()
        results.append(_weights(trainer))
    start = dict(small_model().named_parameters())
    for other in results[1:]:
        assert movement_error(other, results[0], start) < 1e-5


def test_demonstrations_do_not_change_the_rollouts(tmp_path):
    # At rate 0 of everything but the coordinator's schedule, RL sees the same policy whatever the stream does.
    runs = []
    for rows, batch in ((sft_rows(), 3), (sft_rows().select(range(5)), 1)):
        trainer = _bridge(
            tmp_path / str(batch),
            sft_dataset=rows,
            sft_per_device_train_batch_size=batch,
            bridge_lambda=1.0,
            coordinator_learning_rate=0.0,
        )
        trainer.train()
        runs.append([b["completion_ids"] for window in trainer.windows for b in window["rl"]])
    assert all(torch.equal(x, y) for x, y in zip(*runs, strict=True))


def test_policy_is_theta_plus_w(tmp_path):
    trainer = _bridge(tmp_path, lora={})
    trainer.train()
    base = small_model()
    base.load_state_dict(trainer.theta_state_dict(), strict=False)
    config = LoraConfig(r=4, lora_alpha=4, target_modules="all-linear")
    adapted = get_peft_model(base, config)
    state = {name.replace(".weight", ".default.weight"): t for name, t in trainer.coordinator_state_dict().items()}
    missing = adapted.load_state_dict(state, strict=False)
    assert not missing.unexpected_keys
    ids = torch.arange(12).reshape(2, 6)
    assert torch.allclose(adapted(ids).logits, trainer.model(ids).logits, atol=1e-5)


def test_coordinator_is_what_peft_would_make(tmp_path):
    trainer = _bridge(tmp_path, lora={**ZERO_B, "rank_pattern": {"q_proj": 2}, "use_rslora": True, "lora_alpha": 8})
    config = LoraConfig(
        r=4, lora_alpha=8, target_modules="all-linear", init_lora_weights=True, use_rslora=True,
        rank_pattern={"q_proj": 2},
    )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(trainer.args.seed)
        peft_model = get_peft_model(small_model(), config)
    want = {n.replace(".default", ""): p for n, p in peft_model.named_parameters() if "lora_" in n}
    got = trainer.coordinator_state_dict()
    assert got.keys() == want.keys()
    _assert_equal(got, want)

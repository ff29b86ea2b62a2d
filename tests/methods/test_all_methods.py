"""What each group method promises alike: a LoRA student, and rollouts from vLLM."""

import pytest
import torch
from trl import GRPOConfig, GRPOTrainer

import trl_bridge
from tests.helpers.group_losses import hpt_loss, uft_loss
from tests.helpers.groups import Engine, batches, expert_rows, group_trainer, hint_rows, recording, replay_group
from tests.helpers.training import digits_reward, rl_rows, sft_rows, small_config, small_lora, small_model
from trl_bridge.models import tiny_tokenizer


@pytest.mark.parametrize("name", ["LUFFY", "SRFT", "UFT", "PrefixRFT"])  # HPT and ReLIFT have cases of their own
def test_lora_student(tmp_path, name):
    trainer_class = recording(getattr(trl_bridge, f"{name}Trainer"))
    trainer = group_trainer(
        tmp_path,
        trainer_class,
        peft_config=small_lora(),
        train_dataset=hint_rows(),
        max_completion_length=10,
        beta=0.1,
        temperature=0.7,
    )
    trainer.train()
    trained = {name for name in trainer.start if not torch.equal(trainer.start[name], trainer.states[-1][name])}
    assert trained and all("lora" in name for name in trained)
    assert any(batch["expert_mask"].any() for batch in batches(trainer))
    assert all(torch.isfinite(weight).all() for weight in trainer.states[-1].values())


@pytest.mark.parametrize(
    ("name", "loss", "changes"),
    [
        ("HPT", hpt_loss(), {"gate": 2, "gate_off": 3, "success_threshold": 1.0}),
        ("UFT", uft_loss, {"hint_steps": 4}),
    ],
)
def test_update_with_vllm_equals_the_reference(tmp_path, monkeypatch, name, loss, changes):
    monkeypatch.setattr("trl.trainer.grpo_trainer.VLLMGeneration", Engine)
    trainer = group_trainer(
        tmp_path,
        recording(getattr(trl_bridge, f"{name}Trainer")),
        train_dataset=hint_rows(),
        max_completion_length=14,
        use_vllm=True,
        vllm_importance_sampling_mode="token_truncate",
        vllm_importance_sampling_clip_max=3.0,
        optim="sgd",
        learning_rate=0.05,
        **changes,
    )
    trainer.train()
    for batch in batches(trainer):
        expert = batch["expert_mask"].bool()
        # Tokens that vLLM did not sample are not corrected.
        assert (batch["importance_sampling_ratio"][expert & batch["tool_mask"].bool()] == 1).all()
    assert any((batch["importance_sampling_ratio"] != 1).any() for batch in batches(trainer))
    with_ratio = lambda p: loss(_Corrected(p))  # noqa: E731
    assert max(replay_group(trainer, with_ratio, hint_coef=getattr(trainer.args, "hint_coef", 0.0))) < 2e-4


class _Corrected:
    """A pass whose policy loss carries vLLM's ratio: GRPO multiplies each token's loss with it."""

    def __init__(self, plain):
        self._plain = plain

    def __getattr__(self, name):
        return getattr(self._plain, name)

    def policy_loss(self):
        p = self._plain
        ratio = p.batch["importance_sampling_ratio"].double()
        # Ratio 1 to the policy itself: no clipping, so the correction may stand at the advantage.
        advantages = p.advantages.unsqueeze(1) * ratio
        return p.policy_loss(advantages=advantages)


VLLM = {"use_vllm": True, "vllm_importance_sampling_mode": "token_truncate", "vllm_importance_sampling_clip_max": 3.0}


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("NaiveMix", {"sft_weight": 0.0}),
        ("CHORD", {"mu_peak": 0.0, "mu_valley": 0.0}),
        ("Alternating", {"first": "rl", "rl_steps": 2, "sft_steps": 1}),
        ("ReLIFT", {"loss_type": "dapo", "scale_rewards": "group"}),
    ],
)
def test_limits_are_grpo_with_vllm_to_the_bit(tmp_path, monkeypatch, name, changes):
    monkeypatch.setattr("trl.trainer.grpo_trainer.VLLMGeneration", Engine)
    trainer_class = getattr(trl_bridge, f"{name}Trainer")
    kwargs = {"train_dataset": expert_rows()} if name == "ReLIFT" else {"sft_dataset": sft_rows()}
    ends = []
    for kind, options in ((trainer_class, changes), (GRPOTrainer, {})):
        config = kind.config_class if kind is trainer_class else GRPOConfig
        given = kwargs if kind is trainer_class else {}
        trainer = kind(
            model=small_model(),
            reward_funcs=digits_reward,
            args=small_config(tmp_path, config, max_steps=2, **VLLM, **options),
            processing_class=tiny_tokenizer(),
            **{"train_dataset": rl_rows(), **given},
        )
        trainer.train()
        ends.append(list(trainer.model.parameters()))
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(*ends, strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(ends[0], small_model().parameters(), strict=True))

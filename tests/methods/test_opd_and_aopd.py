"""Ways of training that both trainers take from TRL: a LoRA student, and vLLM's rollouts with a stand-in for the engine."""

import pytest
import torch

from tests.helpers.distillation import (
    distillation_trainer,
    recording,
    replay,
    small_student,
    small_teacher,
    tokenizer,
    window_loss,
)
from tests.helpers.training import movement_error, small_lora
from trl_bridge import AOPDTrainer, OPDTrainer
from trl_bridge.selftest.reference.bridge import clip


SGD = {"optim": "sgd", "learning_rate": 5e-3}
TOLERANCE = 2e-4
BOTH = (OPDTrainer, AOPDTrainer)


@pytest.mark.parametrize("trainer_class", BOTH)
def test_lora_student(tmp_path, trainer_class):
    trainer = distillation_trainer(tmp_path, recording(trainer_class), peft_config=small_lora(), max_steps=1, **SGD)
    trainer.train()
    trained = {name for name in trainer.start if not torch.equal(trainer.start[name], trainer.states[-1][name])}
    assert trained and all("lora" in name for name in trained)
    # The adapter's first gradient, by the chain rule of a model that holds the merged weights.
    assert max(replay_lora(trainer)) < TOLERANCE


def replay_lora(trainer):
    """As `replay`: the merged weights are a function of the adapters."""
    start = {name: value.double() for name, value in trainer.start.items()}
    plain = small_student().double().eval()
    teacher = small_teacher().double().eval()
    leaves = {name: t.detach().requires_grad_() for name, t in start.items() if "lora" in name}
    prefix, scaling = "base_model.model.", 1.0
    merged = {}
    for name, value in plain.named_parameters():
        stem = f"{prefix}{name.removesuffix('.weight')}"
        a, b = leaves.get(f"{stem}.lora_A.default.weight"), leaves.get(f"{stem}.lora_B.default.weight")
        merged[name] = value.detach() if a is None else value.detach() + scaling * b @ a
    loss = window_loss(plain, merged, teacher, trainer.windows[0], trainer.args)
    gradients, _ = clip(list(torch.autograd.grad(loss, list(leaves.values()))), trainer.args.max_grad_norm)
    want = {n: t - trainer.args.learning_rate * g for (n, t), g in zip(leaves.items(), gradients, strict=True)}
    got = {name: trainer.states[0][name] for name in want}
    return [movement_error(got, {n: t.detach() for n, t in want.items()}, {n: start[n] for n in want})]


class Engine:
    """Answers each prompt with a text of its own length, as `VLLMGeneration` hands them over."""

    def __init__(self, **kwargs):
        self.synced = 0

    def sync_weights(self):
        self.synced += 1

    def generate(self, prompts, num_generations, **kwargs):
        assert num_generations == 1
        texts = ["12", "7+3=", "0", "99999"]
        ids = [tokenizer()(texts[row % 4])["input_ids"] + [tokenizer().eos_token_id] for row in range(len(prompts))]
        return prompts, ids, None, None


@pytest.mark.parametrize("trainer_class", BOTH)
def test_rollouts_of_vllm(tmp_path, monkeypatch, trainer_class):
    monkeypatch.setattr("trl.trainer.distillation_trainer.VLLMGeneration", Engine)
    monkeypatch.setattr("trl.trainer.distillation_trainer.is_vllm_available", lambda: True)
    trainer = distillation_trainer(tmp_path, recording(trainer_class), use_vllm=True, **SGD)
    trainer.train()
    lengths = sorted(int(n) for batch in trainer.windows[0] for n in batch["completion_mask"].sum(1))
    assert lengths == [2, 2, 3, 3, 5, 5, 6, 6] and trainer.vllm_generation.synced == 2
    assert max(replay(trainer)) < TOLERANCE

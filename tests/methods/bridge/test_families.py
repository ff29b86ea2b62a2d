"""Model families with BRIDGE's defaults, each by a tiny model of its config: one update, in full and in lean form."""

import logging
import re

import pytest
import torch
from peft import LoraConfig, PeftModel
from torch import nn
from transformers.pytorch_utils import Conv1D

from tests.helpers.families import DENSE, MIXTURES, tiny
from tests.helpers.pages import ROOT, table
from tests.helpers.training import small_trainer


def trained(tmp_path, family, **options):
    model = tiny(family)
    if hasattr(model.config, "output_router_logits"):
        options["router_aux_loss_coef"] = 0.0
    trainer = small_trainer(tmp_path, model=model, peft_config=None, max_steps=1, **options)
    before = {name: parameter.detach().clone() for name, parameter in trainer.model.named_parameters()}
    trainer.train()
    after = dict(trainer.model.named_parameters())
    return trainer, {name for name, value in before.items() if not torch.equal(value, after[name])}


def leaves(trainer):
    return {target.module.rpartition(".")[2] for target in trainer.coordinator.targets}


@pytest.mark.parametrize("lean", [False, True], ids=["full", "lean"])
@pytest.mark.parametrize("family", DENSE)
def test_dense(tmp_path, family, lean):
    trainer, moved = trained(tmp_path, family, lean=lean)
    head = trainer._plain_model.get_output_embeddings()
    linear = {n for n, m in tiny(family).named_modules() if isinstance(m, (nn.Linear, Conv1D))}
    assert {target.module for target in trainer.coordinator.targets} == linear - {"lm_head", "embed_out"}
    assert isinstance(head, nn.Linear)
    assert trainer.coordinator.norm() > 0
    assert moved


@pytest.mark.parametrize("family", MIXTURES)
def test_experts_are_trained_without_coordinator(tmp_path, family, caplog):
    with caplog.at_level(logging.WARNING):
        trainer, moved = trained(tmp_path, family)
    assert leaves(trainer) == MIXTURES[family][1]
    assert any(".experts." in name for name in moved)
    (line,) = [text for text in caplog.messages if "fused weights" in text]
    assert "Experts" in line


@pytest.mark.parametrize("family", MIXTURES)
def test_lean_leaves_experts_out(tmp_path, family):
    trainer, moved = trained(tmp_path, family, lean=True)
    assert leaves(trainer) == MIXTURES[family][1]
    assert moved
    assert all("lora_" in name for name in moved)
    trainer.save_model(tmp_path / "saved")
    loaded = PeftModel.from_pretrained(tiny(family), tmp_path / "saved").eval()
    tokens = torch.arange(3, 19)[None]
    with torch.no_grad():
        want = trainer.model.eval()(tokens).logits
        torch.testing.assert_close(loaded(tokens).logits, want)


@pytest.mark.parametrize("lean", [False, True], ids=["full", "lean"])
@pytest.mark.parametrize(
    ("family", "targets", "message"),
    [
        ("qwen3_moe", ["q_proj", "gate_proj", "up_proj", "down_proj"], "mlp.experts', a Qwen3MoeExperts"),
        ("qwen3_moe", ["q_proj", "down_proj"], "matches `down_proj` of 'model.layers.0.mlp.experts'"),
        ("mixtral", ".*(q_proj|w1|w3)", "`gate_up_proj` of 'model.layers.0.mlp.experts'"),
        ("deepseek_v3", ["o_proj", "down_proj"], "a DeepseekV3Experts"),
        ("mixtral", ["q_proj", "gate"], "matches `weight` of 'model.layers.0.mlp.gate'"),
        ("phimoe", ["q_proj", "router"], "matches 'model.layers.0.mlp.router', a PhimoeTopKRouter"),
    ],
)
def test_targets_that_are_experts_are_refused(tmp_path, family, targets, message, lean):
    adapter = LoraConfig(r=4, target_modules=targets, task_type="CAUSAL_LM")
    with pytest.raises(ValueError, match=message):
        small_trainer(tmp_path, model=tiny(family), peft_config=adapter, lean=lean, router_aux_loss_coef=0.0)


def test_families_of_the_page():
    heading = "| families (`model_type`) | what the coordinator acts on by default |"
    named = " ".join(families for families, _ in table((ROOT / "docs/support.md").read_text(), heading))
    assert set(re.findall(r"\w+", named)) == {*DENSE, *MIXTURES}

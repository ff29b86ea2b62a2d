"""Model families with BRIDGE's defaults, each by a tiny model of its config: one update, in full and in lean form."""

import logging
import re

import pytest
import torch
from peft import LoraConfig, PeftModel
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.pytorch_utils import Conv1D

from tests.helpers.pages import ROOT, table
from tests.helpers.training import small_trainer
from trl_bridge.models import tiny_tokenizer


DENSE = (
    "qwen2 qwen3 llama mistral gemma gemma2 gemma3_text phi phi3 olmo2 olmo3 smollm3 granite cohere2 glm4 starcoder2 "
    "gpt_neox gpt2 ernie4_5 seed_oss"
).split()
ATTENTION = {"q_proj", "k_proj", "v_proj", "o_proj"}
LATENT = {"q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj"}
ROUTED = {"moe_intermediate_size": 32, "n_routed_experts": 4, "n_shared_experts": 1, "first_k_dense_replace": 1}
ROUTED |= {"n_group": 1, "topk_group": 1}
RANKS = {"kv_lora_rank": 16, "q_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8}
# What the config of a Mixture-of-Experts family needs, and the linear layers that w acts on.
MIXTURES = {
    "qwen3_moe": ({"num_experts": 4, "moe_intermediate_size": 32, "head_dim": 8}, ATTENTION),
    "qwen2_moe": (
        {"num_experts": 4, "moe_intermediate_size": 32, "shared_expert_intermediate_size": 32},
        {*ATTENTION, "gate_proj", "up_proj", "down_proj", "shared_expert_gate"},
    ),
    "mixtral": ({"num_local_experts": 4}, ATTENTION),
    "olmoe": ({"num_experts": 4}, ATTENTION),
    "deepseek_v2": ({**ROUTED, **RANKS, "num_key_value_heads": 4}, LATENT),
    "deepseek_v3": ({**ROUTED, **RANKS, "num_key_value_heads": 4}, LATENT),
    "glm4_moe": ({**ROUTED, "head_dim": 8}, ATTENTION),
    "gpt_oss": ({"num_local_experts": 4, "head_dim": 8, "layer_types": ["full_attention"] * 2}, ATTENTION),
    "granitemoe": ({"num_local_experts": 4}, ATTENTION),
    "phimoe": ({"num_local_experts": 4}, ATTENTION),
}


def tiny(family):
    tokenizer = tiny_tokenizer()
    options = {
        "vocab_size": len(tokenizer),
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "num_experts_per_tok": 2,
        "max_position_embeddings": 64,
        "bos_token_id": None,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    if family in DENSE:
        del options["num_experts_per_tok"]
    torch.manual_seed(0)
    config = AutoConfig.for_model(family, **{**options, **MIXTURES.get(family, ({},))[0]})
    return AutoModelForCausalLM.from_config(config, dtype=torch.float32)


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

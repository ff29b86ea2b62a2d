"""Model families by tiny models of their configs."""

import torch
from transformers import AutoConfig, AutoModelForCausalLM

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

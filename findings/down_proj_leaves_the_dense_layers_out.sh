#!/usr/bin/env bash
# peft 0.21.2 with transformers 5.24.0: `target_modules=["gate_proj", "up_proj", "down_proj"]` on DeepSeek-V3 or GLM-4-MoE.
#
# Expected: every layer of these names gets an adapter: the MLP of the dense first layer, the shared expert, and the routed experts if
#           they can be had.
# Seen:     the three names are turned into two fused parameters of the routed experts, and dropped. The dense layer and the shared
#           experts keep their Linear layers of exactly these names, and get nothing. In a model of one dense layer nothing of that
#           layer is trained. The only trace is that the config's `target_modules` is empty afterwards.
# Hurts:    whoever trains a LoRA on these families with the usual list of MLP layers: which weights are trained has changed.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet "peft==0.21.2" "transformers==5.24.0" "torch==2.13.0"
"$folder/venv/bin/python" - 2> "$folder/log" <<'PY' || { tail -20 "$folder/log"; exit 1; }
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import DeepseekV3Config, DeepseekV3ForCausalLM, Glm4MoeConfig, Glm4MoeForCausalLM

sizes = dict(hidden_size=32, intermediate_size=64, moe_intermediate_size=16, num_hidden_layers=2, num_attention_heads=2,
             num_key_value_heads=2, vocab_size=32, n_routed_experts=4, num_experts_per_tok=2, n_group=1, topk_group=1,
             first_k_dense_replace=1)
latent = dict(q_lora_rank=8, kv_lora_rank=8, qk_rope_head_dim=8, qk_nope_head_dim=8, v_head_dim=16)
names = ["gate_proj", "up_proj", "down_proj"]
for config, kind, more in ((DeepseekV3Config, DeepseekV3ForCausalLM, latent), (Glm4MoeConfig, Glm4MoeForCausalLM, dict(head_dim=16))):
    model = kind(config(**sizes, **more))
    linear = [name for name, module in model.named_modules() if isinstance(module, nn.Linear) and name.split(".")[-1] in names]
    lora = LoraConfig(r=2, target_modules=list(names))
    adapted = {name.split(".lora_")[0] for name, _ in get_peft_model(model, lora).named_parameters() if ".lora_" in name}
    print(f"{kind.__name__}: {len(linear)} Linear layers of these names: {', '.join(linear)}")
    print("  adapted:", ", ".join(sorted(adapted)))
    print("  the config after it:", sorted(lora.target_modules), sorted(lora.target_parameters))
    assert len(linear) == 6 and all("experts" in name and "shared" not in name for name in adapted), "changed: out of date"
    assert not lora.target_modules and lora.target_parameters == {"gate_up_proj", "down_proj"}, "changed: out of date"
PY

#!/usr/bin/env bash
# peft 0.21.2 with transformers 5.24.0: what `target_modules="all-linear"` trains in a mixture of experts.
#
# Expected: "all linear layers but the output layer", the same parts in each family.
# Seen:     Qwen3-MoE, Mixtral and OLMoE: attention, the experts and the router's weight. GPT-OSS and Granite: attention alone.
#           Qwen2-MoE: attention, the shared expert and its gate, no routed expert. Phi-MoE: attention and the router, no expert.
# Hurts:    whoever compares families, or believes that the router is left alone (or that the experts are trained).
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet "peft==0.21.2" "transformers==5.24.0" "torch==2.13.0"
"$folder/venv/bin/python" - 2> "$folder/log" <<'PY' || { tail -20 "$folder/log"; exit 1; }
import transformers
from peft import LoraConfig, get_peft_model

sizes = dict(hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=2,
             vocab_size=32, eos_token_id=1, pad_token_id=0, bos_token_id=2)
four = dict(num_experts=4, num_experts_per_tok=2)
families = {
    "Qwen3Moe": (dict(four, moe_intermediate_size=16, head_dim=16), {"experts", "router"}),
    "Mixtral": (dict(num_local_experts=4), {"experts", "router"}),
    "Olmoe": (four, {"experts", "router"}),
    "GptOss": (dict(num_local_experts=4, num_experts_per_tok=2, head_dim=16), set()),
    "GraniteMoe": (dict(num_local_experts=4), set()),
    "Qwen2Moe": (dict(four, moe_intermediate_size=16, shared_expert_intermediate_size=16), {"shared expert"}),
    "Phimoe": (dict(num_local_experts=4), {"router"}),
}
for name, (more, seen) in families.items():
    config = getattr(transformers, f"{name}Config")(**sizes, **more)
    lora = LoraConfig(r=2, target_modules="all-linear")
    model = get_peft_model(getattr(transformers, f"{name}ForCausalLM")(config), lora)
    adapted = {part.split(".lora_")[0] for part, _ in model.named_parameters() if ".lora_" in part}
    parts = {
        "experts": any(".experts" in part for part in adapted),
        "router": any(part.endswith((".router", ".mlp.gate")) for part in adapted),
        "shared expert": any(".shared_expert." in part for part in adapted),
    }
    beside = {part for part, there in parts.items() if there}
    print(f"{name:13s} attention, {', '.join(sorted(beside)) or 'nothing else':20s} target_parameters: {sorted(lora.target_parameters or [])}")
    assert any("q_proj" in part for part in adapted) and beside == seen, "changed: this finding is out of date"
    assert bool(lora.target_parameters) == (name in ("Qwen3Moe", "Mixtral", "Olmoe", "Ernie4_5_Moe")), "changed: out of date"
PY

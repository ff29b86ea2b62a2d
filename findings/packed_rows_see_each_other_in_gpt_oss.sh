#!/usr/bin/env bash
# transformers 5.24.0: rows packed into one sequence by `position_ids` (no attention mask) see each other in GPT-OSS and AFMoE.
#
# Expected: as in Llama, Qwen3, Gemma 3, Mixtral and some thirty more families: position ids that start again at 0 begin a new row, and
#           the mask keeps rows apart, with eager and sdpa attention.
# Seen:     these two make their masks without the position ids. The second row reads the first one; its logits change with it, without
#           a warning. Eager is what GPT-OSS takes by default: its attention sinks know no sdpa.
# Hurts:    whoever trains them padding-free (DataCollatorWithFlattening, packing) without a flash kernel.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet "transformers==5.24.0" "torch==2.13.0"
"$folder/venv/bin/python" - 2> "$folder/log" <<'PY' || { tail -20 "$folder/log"; exit 1; }
import torch
import transformers

sizes = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=2, head_dim=16,
             vocab_size=40, max_position_embeddings=64, pad_token_id=0, bos_token_id=1, eos_token_id=2)
experts = dict(num_local_experts=4, num_experts_per_tok=2)
families = {
    "Qwen3": ({}, False),
    "Gemma3": (dict(sliding_window=8), False),
    "Mixtral": (experts, False),
    "GptOss": (experts, True),
    "Afmoe": (dict(num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16, num_dense_layers=2), True),
}
for name, (more, seen) in families.items():
    torch.manual_seed(0)
    config = getattr(transformers, f"{name}{'Text' if name == 'Gemma3' else ''}Config")(**sizes, **more)
    model = getattr(transformers, f"{name}ForCausalLM")(config).eval()
    first, other, second = (torch.randint(3, 40, (8,)) for _ in range(3))
    positions = torch.arange(8).repeat(2)[None]
    with torch.no_grad():
        alone = model(second[None], use_cache=False).logits[0]
        behind = [
            model(torch.cat([row, second])[None], position_ids=positions, use_cache=False).logits[0, 8:] for row in (first, other)
        ]
    errors = [((logits - alone).abs().max() / alone.abs().max()).item() for logits in behind]
    attention = model.config._attn_implementation
    print(f"{name:8s} {attention:6s} the second row's logits, packed against alone: {errors[0]:.0e}, behind another row: {errors[1]:.0e}")
    assert all((error > 1e-3) == seen for error in errors), "changed: this finding is out of date"
PY

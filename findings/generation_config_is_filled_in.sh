#!/usr/bin/env bash
# transformers 5.24.0: a `GenerationConfig` that is passed to `generate` is filled in from the model's own where it says None.
#
# Expected: `model.generate(..., generation_config=GenerationConfig(do_sample=False, max_new_tokens=8))` is plain greedy decoding.
# Seen:     a `sequence_bias` in the model's own generation_config still acts, since the passed one says None, and there is no value that
#           says "none". So greedy decoding is not the argmax.
# Hurts:    whoever compares models by greedy answers: a model's file on the hub decides what is measured.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet "transformers==5.24.0" "torch==2.13.0"
"$folder/venv/bin/python" - 2> "$folder/log" <<'PY' || { tail -20 "$folder/log"; exit 1; }
import torch
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM

sizes = dict(hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, vocab_size=20)
torch.manual_seed(0)
model = LlamaForCausalLM(LlamaConfig(**sizes, pad_token_id=0, bos_token_id=1, eos_token_id=2)).eval()
ids = torch.tensor([[3, 4, 5]])


def greedy():
    passed = GenerationConfig(do_sample=False, max_new_tokens=8, pad_token_id=0, eos_token_id=2)
    return model.generate(ids, attention_mask=torch.ones_like(ids), generation_config=passed)[0, 3:].tolist()


plain = greedy()
biased = plain[0]
model.generation_config.sequence_bias = [[[biased], -100.0]]
with_bias = greedy()
print("greedy, nothing set in the model's own config:", plain)
print("its sequence_bias set, the same config passed:", with_bias)
assert biased not in with_bias, "changed: this finding is out of date"
PY

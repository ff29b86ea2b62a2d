#!/usr/bin/env bash
# TRL 1.16.0, transformers 5.24.0: the noise of NEFTune shrinks with packing, and with padding.
#
# Expected: `neftune_noise_alpha=5` puts noise of at most 5 / sqrt(L d) on a row's embeddings, for its own length L and d features
#           (arXiv 2310.05914), whatever else is in its batch.
# Seen:     L is the length of the tensor. With `packing=True` or `padding_free=True` that is the whole batch, so 8 rows of 16 tokens
#           have 1 / sqrt(8) of the noise that the same rows have side by side; padded, a short row has that of the longest.
# Hurts:    whoever carries a tuned alpha over to packed training, or packs longer: the regulariser fades without a word.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet "trl==1.16.0" "transformers==5.24.0" "torch==2.13.0"
cd "$folder"
HF_HUB_OFFLINE=1 "$folder/venv/bin/python" - <<'PY'
import math
import warnings

import torch
from datasets import Dataset
from transformers import LlamaConfig, LlamaForCausalLM, TrainerCallback
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast
from trl import SFTConfig, SFTTrainer

warnings.filterwarnings("ignore")
words = {"<pad>": 0, "<eos>": 1, **{f"w{i}": i + 2 for i in range(30)}}
inner = Tokenizer(models.WordLevel(words, unk_token="<pad>"))
inner.pre_tokenizer = pre_tokenizers.Whitespace()
tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, pad_token="<pad>", eos_token="<eos>")
# 15 words and an end: rows of 16 tokens.
rows = Dataset.from_dict({"text": [" ".join(f"w{(i + j) % 30}" for j in range(15)) for i in range(8)]})
width, alpha = 32, 5.0


def noise(**options):
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=32, hidden_size=width, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=2, pad_token_id=0, eos_token_id=1, bos_token_id=1,
    )
    model, largest = LlamaForCausalLM(config), []

    class Look(TrainerCallback):
        def on_train_begin(self, args, state, control, model=None, **kwargs):
            def see(module, inputs, output):
                largest.append((output - module.weight[inputs[0]]).abs().max().item())

            model.get_input_embeddings().register_forward_hook(see)  # after that of NEFTune

    args = SFTConfig(
        "out", max_steps=1, per_device_train_batch_size=8, neftune_noise_alpha=alpha, use_cpu=True, bf16=False,
        report_to="none", save_strategy="no", max_length=None, gradient_checkpointing=False, disable_tqdm=True, **options,
    )
    SFTTrainer(model, args, train_dataset=rows, processing_class=tokenizer, callbacks=[Look()]).train()
    return largest[0]


padded, packed = noise(), noise(padding_free=True)
expected = alpha / math.sqrt(16 * width)
print(f"largest noise: side by side {padded:.4f} (5 / sqrt(L d) is {expected:.4f}), padding-free {packed:.4f}")
assert 0.95 * expected < padded <= expected * 1.001
assert 0.95 * expected / math.sqrt(8) < packed <= expected / math.sqrt(8) * 1.001, "changed: this finding is out of date"
PY

#!/usr/bin/env bash
# TRL 1.16.0's GRPO trains on groups whose rewards are all equal, where the reward is a fraction.
#
# Expected: eight rewards of 0.7 are no signal: advantage 0, counted in `frac_reward_zero_std`, no gradient, as with eight of 1.0.
# Seen:     the group's mean in float32 is not 0.7, and the difference is divided by a standard deviation of the same size plus 1e-4:
#           advantages of 6e-4, `frac_reward_zero_std` 0, and a gradient. AdamW, which knows no scale, makes a full step of it where
#           no other group has more to say. With 0.1 the group does count as without a signal, and is trained on all the same.
# Hurts:    whoever has graded rewards (partial credit, formats, closeness) with groups of 8 or 16, or stops where all groups agree.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet "trl==1.16.0" "transformers==5.24.0" "torch==2.13.0"
cd "$folder"
HF_HUB_OFFLINE=1 "$folder/venv/bin/python" - 2> "$folder/log" <<'PY' || { tail -20 "$folder/log"; exit 1; }
import torch
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from trl import GRPOConfig, GRPOTrainer

vocabulary = {token: i for i, token in enumerate(["<pad>", "<eos>", *"abcdefgh"])}
tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="a"))
tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
tokenizer = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>")
sizes = dict(hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1, vocab_size=10)


def advantages(reward, group):
    torch.manual_seed(0)
    trainer = GRPOTrainer(
        model=LlamaForCausalLM(LlamaConfig(**sizes, pad_token_id=0, eos_token_id=1, bos_token_id=None)),
        reward_funcs=lambda completions, **kwargs: [reward] * len(completions),
        args=GRPOConfig("out", use_cpu=True, bf16=False, report_to="none", max_steps=1, num_generations=group, disable_tqdm=True,
                        per_device_train_batch_size=group, max_completion_length=3, logging_steps=1, save_strategy="no"),
        train_dataset=Dataset.from_dict({"prompt": ["a", "b"]}),
        processing_class=tokenizer,
    )
    trainer.train()
    entry = next(e for e in trainer.state.log_history if "frac_reward_zero_std" in e)
    return list(trainer._logs["advantages"]), entry["frac_reward_zero_std"], entry["grad_norm"]


for reward, seen, counted in ((1.0, 0.0, 1.0), (0.7, 6e-4, 0.0), (0.1, -7e-5, 1.0)):
    values, dead, norm = advantages(reward, 8)
    print(f"8 rewards of {reward}: advantages {values[0]:.1e}, frac_reward_zero_std {dead}, gradient {norm:.1e}")
    assert len(set(values)) == 1 and abs(values[0] - seen) < 1e-5 and dead == counted, "changed: this finding is out of date"
    assert (norm > 0) == (seen != 0), "changed: this finding is out of date"
PY

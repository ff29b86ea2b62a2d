#!/usr/bin/env bash
# TRL 1.16.0's GRPO: with several evaluation datasets all rewards are logged under one name.
#
# Expected: `eval_dataset={"easy": ..., "hard": ...}` logs `eval_easy_reward` and `eval_hard_reward`, as the loss is `eval_easy_loss`.
# Seen:     losses have the dataset's name, rewards have not: `eval_reward` and `eval_rewards/...` are logged once for each dataset, at the
#           same step. Trackers keep one of them, a curve jumps between the two where they keep both, and `metric_for_best_model` cannot name one.
# Hurts:    whoever evaluates GRPO on more than one dataset while it trains.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet "trl==1.16.0" "transformers==5.24.0" "torch==2.13.0"
cd "$folder"
HF_HUB_OFFLINE=1 "$folder/venv/bin/python" - 2> "$folder/log" <<'PY' || { tail -20 "$folder/log"; exit 1; }
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from trl import GRPOConfig, GRPOTrainer

vocabulary = {token: i for i, token in enumerate(["<pad>", "<eos>", *"abcdefgh"])}
tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="a"))
tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
tokenizer = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>")
config = LlamaConfig(hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1, vocab_size=10,
                     pad_token_id=0, eos_token_id=1, bos_token_id=None)


def rows(pay):
    return Dataset.from_dict({"prompt": ["a", "b", "c", "d"], "pay": [pay] * 4})


trainer = GRPOTrainer(
    model=LlamaForCausalLM(config),
    reward_funcs=lambda completions, pay, **kwargs: pay,
    args=GRPOConfig("out", use_cpu=True, bf16=False, report_to="none", max_steps=1, num_generations=4, disable_tqdm=True, eval_steps=1,
                    eval_strategy="steps", per_device_train_batch_size=4, per_device_eval_batch_size=4, max_completion_length=3),
    train_dataset=rows(0.5),
    eval_dataset={"easy": rows(1.0), "hard": rows(0.0)},
    processing_class=tokenizer,
)
trainer.train()
found = [{k: v for k, v in entry.items() if k.endswith(("loss", "reward"))} for entry in trainer.state.log_history]
found = [entry for entry in found if any(name.startswith("eval") for name in entry)]
for entry in found:
    print(entry)
assert [sorted(entry) for entry in found] == [["eval_easy_loss", "eval_reward"], ["eval_hard_loss", "eval_reward"]], "changed"
assert [entry["eval_reward"] for entry in found] == [1.0, 0.0], "changed: this finding is out of date"
PY

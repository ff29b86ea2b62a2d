#!/usr/bin/env bash
# TRL 1.16.0's GRPO: the load-balancing loss cannot be had for DeepSeek-V3, though the model gives router logits.
#
# Expected: `router_aux_loss_coef` adds the loss of every mixture of experts of transformers, or says at the start which ones it knows.
# Seen:     the first update fails with "'DeepseekV3Config' object has no attribute 'num_experts'": the number of experts is read under
#           Qwen's name, and this config calls it `n_routed_experts`. It comes after the model is loaded and the first batch is sampled.
# Hurts:    whoever trains DeepSeek-V3 or its relatives (GLM-4-MoE) with GRPO and wants its experts balanced.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet "trl==1.16.0" "transformers==5.24.0" "torch==2.13.0"
cd "$folder"
HF_HUB_OFFLINE=1 "$folder/venv/bin/python" - 2> "$folder/log" <<'PY' || { tail -20 "$folder/log"; exit 1; }
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import DeepseekV3Config, DeepseekV3ForCausalLM, PreTrainedTokenizerFast, Qwen3MoeConfig, Qwen3MoeForCausalLM
from trl import GRPOConfig, GRPOTrainer

vocabulary = {token: i for i, token in enumerate(["<pad>", "<eos>", *"abcdefgh"])}
tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="a"))
tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
tokenizer = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>")
sizes = dict(vocab_size=10, hidden_size=16, intermediate_size=16, moe_intermediate_size=8, num_hidden_layers=2, num_attention_heads=2,
             num_key_value_heads=2, num_experts_per_tok=2, pad_token_id=0, eos_token_id=1, bos_token_id=None)
latent = dict(n_routed_experts=4, n_group=1, topk_group=1, first_k_dense_replace=1, kv_lora_rank=8, q_lora_rank=8, qk_rope_head_dim=8,
              qk_nope_head_dim=8, v_head_dim=8)
families = {
    "Qwen3-MoE": Qwen3MoeForCausalLM(Qwen3MoeConfig(**sizes, num_experts=4, head_dim=8)),
    "DeepSeek-V3": DeepseekV3ForCausalLM(DeepseekV3Config(**sizes, **latent)),
}
for name, model in families.items():
    sampled = []
    trainer = GRPOTrainer(
        model=model,
        reward_funcs=lambda completions, **kwargs: sampled.append(len(completions)) or [float(len(text) % 2) for text in completions],
        args=GRPOConfig("out", use_cpu=True, bf16=False, report_to="none", max_steps=1, num_generations=4, disable_tqdm=True,
                        router_aux_loss_coef=0.001, per_device_train_batch_size=4, max_completion_length=3, save_strategy="no"),
        train_dataset=Dataset.from_dict({"prompt": ["a", "b", "c", "d"]}),
        processing_class=tokenizer,
    )
    try:
        trainer.train()
        said = "trained"
    except AttributeError as error:
        said = str(error)
    print(f"{name}: {sum(sampled)} rollouts, {said}")
    seen = "trained" if name == "Qwen3-MoE" else "'DeepseekV3Config' object has no attribute 'num_experts'"
    assert said == seen and sampled == [4], "changed: this finding is out of date"
PY

#!/usr/bin/env bash
# transformers 5.24.0: `Trainer.train(resume_from_checkpoint=...)` resumes Qwen2.5-VL with the weights it was built with.
#
# Expected: a resumed run goes on from the checkpoint's weights, those that `from_pretrained` reads there.
# Seen:     `save_pretrained` renames this family's weights to the names of its releases, and only `from_pretrained` renames them back.
#           Resuming loads by name and without insisting: it warns of missing and unexpected keys, leaves every weight but the head's as
#           the new model has it, reads the optimizer's state, which belongs to the others, and trains.
# Hurts:    whoever resumes a run of such a model in a new process, which has the base's weights: training starts over, with a warning in the log.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet "transformers==5.24.0" "torch==2.13.0" "accelerate==1.15.0" "datasets==5.2.0"
cd "$folder"
HF_HUB_OFFLINE=1 "$folder/venv/bin/python" - 2> "$folder/log" <<'PY' || { tail -20 "$folder/log"; exit 1; }
import torch
from datasets import Dataset
from transformers import LlamaConfig, LlamaForCausalLM, Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration
from transformers import Trainer, TrainingArguments, set_seed

sizes = dict(vocab_size=64, hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=2)
rope = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 3, 3]}
vision = dict(depth=1, hidden_size=32, num_heads=2, intermediate_size=32, out_hidden_size=32, fullatt_block_indexes=[0])
tokens = dict(image_token_id=60, video_token_id=61, vision_start_token_id=62, vision_end_token_id=63)
families = {
    "Llama": (LlamaForCausalLM, LlamaConfig(**sizes)),
    "Qwen2.5-VL": (
        Qwen2_5_VLForConditionalGeneration,
        Qwen2_5_VLConfig(text_config={**sizes, "rope_parameters": rope}, vision_config=vision, **tokens),
    ),
}
rows = Dataset.from_dict({"input_ids": [[1, 2, 3, 4]] * 8, "labels": [[1, 2, 3, 4]] * 8})


def trained(folder, model_class, config, seed, steps, **resume):
    """Weights after so many updates; the second one at a rate of 0 leaves what was read as it is."""
    set_seed(seed)
    rate = 1e-2 if steps == 1 else 0.0
    args = TrainingArguments(folder, use_cpu=True, max_steps=steps, save_steps=1, learning_rate=rate, report_to="none", disable_tqdm=True)
    trainer = Trainer(model=model_class(config), args=args, train_dataset=rows)
    trainer.train(**resume)
    return {name: weight.detach().clone() for name, weight in trainer.model.named_parameters()}


for name, (model_class, config) in families.items():
    saved = trained(name, model_class, config, 0, 1)
    loaded = dict(model_class.from_pretrained(f"{name}/checkpoint-1").named_parameters())
    resumed = trained(name, model_class, config, 1, 2, resume_from_checkpoint=True)
    # A norm that was at 1 and has not moved is the same either way.
    moved = [weight for weight in saved if not (saved[weight] == 1).all() and not (saved[weight] == 0).all()]
    read, kept = (sum(torch.equal(saved[w], other[w]) for w in moved) for other in (loaded, resumed))
    print(f"{name}: of {len(moved)} weights from_pretrained reads {read}, resume_from_checkpoint {kept}")
    assert read == len(moved), "changed: this finding is out of date"
    assert (kept == len(moved)) == (name == "Llama") and (name == "Llama" or kept == 1), "changed: this finding is out of date"
PY

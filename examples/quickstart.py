"""
GRPO and BRIDGE on sums of two digits: a tiny model made in memory, about a minute on a CPU, nothing downloaded.

    python examples/quickstart.py

From random weights GRPO has to stumble on right answers; `BridgeTrainer` is given demonstrations beside as many rollouts.
"""

import argparse

from trl import GRPOConfig, GRPOTrainer

from trl_bridge import BridgeConfig, BridgeTrainer
from trl_bridge.data.addition import addition_dataset, addition_pairs
from trl_bridge.models import tiny_model, tiny_tokenizer
from trl_bridge.rewards import answer_reward, closeness_reward


def accuracy(model, tokenizer, rows):
    """Share of the rows that the model answers right, greedily."""
    batch = tokenizer(list(rows["prompt"]), padding=True, padding_side="left", return_tensors="pt")
    output = model.eval().generate(**batch, max_new_tokens=3, do_sample=False)
    answers = tokenizer.batch_decode(output[:, batch["input_ids"].shape[1] :], skip_special_tokens=True)
    return sum(answer_reward(answers, rows["solution"])) / len(rows)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[1])
    parser.add_argument("--steps", type=int, default=120)
    steps = parser.parse_args().steps

    pairs = addition_pairs(max_number=9, seed=0)
    train, test = addition_dataset(pairs[:80]), addition_dataset(pairs[80:])
    tokenizer = tiny_tokenizer("0123456789+=")

    options = dict(
        max_steps=steps,
        learning_rate=2e-3,
        per_device_train_batch_size=32,  # 4 prompts with 8 rollouts each
        num_generations=8,
        max_completion_length=3,
        use_cpu=True,
        bf16=False,
        activation_checkpointing=False,
        logging_steps=max(1, steps // 5),
        save_strategy="no",
        report_to="none",
    )

    grpo = GRPOTrainer(
        model=tiny_model(tokenizer),
        reward_funcs=closeness_reward,  # 1 / (1 + distance to the right answer)
        args=GRPOConfig(output_dir="outputs/quickstart-grpo", **options),
        train_dataset=train,
        processing_class=tokenizer,
    )
    grpo.train()

    bridge = BridgeTrainer(
        model=tiny_model(tokenizer),
        reward_funcs=closeness_reward,
        args=BridgeConfig(
            output_dir="outputs/quickstart-bridge",
            coordinator_learning_rate=2e-3,  # the default, 10 times `learning_rate`, is for fine-tuning, not for a random model
            sft_per_device_train_batch_size=16,
            **options,
        ),
        train_dataset=train,
        sft_dataset=train,  # the one argument that GRPOTrainer does not have; here the rows' own `completion` column
        processing_class=tokenizer,
    )
    bridge.train()
    bridge.save_model()  # a plain model directory: AutoModelForCausalLM.from_pretrained loads it without trl-bridge

    print("\n| method | right on the 80 training sums | right on 20 others |\n|---|---|---|")
    for name, trainer in (("GRPO", grpo), ("BRIDGE", bridge)):
        known, new = (accuracy(trainer.model, tokenizer, rows) for rows in (train, test))
        print(f"| {name} | {known:.2f} | {new:.2f} |")


if __name__ == "__main__":
    main()

"""A plain TRL GRPO script. `swap_grpo.py` is the same script with `BridgeTrainer`: `diff` shows what changes."""

import sys

from datasets import load_dataset
from trl import GRPOConfig, GRPOTrainer, TrlParser

from trl_bridge.rewards import closeness_reward


def main(model, train_file, options):
    (args,) = TrlParser(GRPOConfig).parse_args_and_config(options)
    train_dataset = load_dataset("json", data_files=train_file, split="train")
    trainer = GRPOTrainer(
        model=model,
        reward_funcs=closeness_reward,
        args=args,
        train_dataset=train_dataset,
    )
    trainer.train()
    trainer.save_model()


if __name__ == "__main__":
    # python swap_grpo_before.py MODEL TRAIN.jsonl --output_dir out --max_steps 100 ...
    main(sys.argv[1], sys.argv[2], sys.argv[3:])

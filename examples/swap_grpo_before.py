"""A plain TRL GRPO script. `swap_grpo.py` is the same with `BridgeTrainer`: compare the two files."""

import sys

from datasets import load_dataset
from trl import GRPOConfig, GRPOTrainer, TrlParser

from trl_bridge.rewards import closeness_reward


def main():
    parser = TrlParser(GRPOConfig)
    (args,) = parser.parse_args_and_config(sys.argv[3:])
    model, data = sys.argv[1:3]
    train_dataset = load_dataset("json", data_files=data, split="train")

    trainer = GRPOTrainer(
        model=model,
        reward_funcs=closeness_reward,
        args=args,
        train_dataset=train_dataset,
    )
    trainer.train()
    trainer.save_model()


if __name__ == "__main__":
    main()

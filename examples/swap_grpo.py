"""A TRL GRPO script with `BridgeTrainer` in it. `swap_grpo_before.py` is the same script before: `diff` shows what changes."""

import sys

from datasets import load_dataset
from trl import TrlParser

from trl_bridge import BridgeConfig, BridgeTrainer
from trl_bridge.rewards import closeness_reward


def main(model, train_file, options):
    (args,) = TrlParser(BridgeConfig).parse_args_and_config(options)
    train_dataset = load_dataset("json", data_files=train_file, split="train")
    trainer = BridgeTrainer(
        model=model,
        reward_funcs=closeness_reward,
        args=args,
        train_dataset=train_dataset,
        sft_dataset=train_dataset,  # any of TRL's SFT formats; here the rows' own `prompt` and `completion`
    )
    trainer.train()
    trainer.save_model()


if __name__ == "__main__":
    # python swap_grpo.py MODEL TRAIN.jsonl --output_dir out --max_steps 100 ...
    main(sys.argv[1], sys.argv[2], sys.argv[3:])

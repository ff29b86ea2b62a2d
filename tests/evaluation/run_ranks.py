"""Run on each rank by `test_ranks.py`: the command, the command after a kill, and the callback."""

import json
import sys
from pathlib import Path

from accelerate import PartialState
from trl import GRPOConfig, GRPOTrainer

from tests.helpers.evaluation import held_out
from tests.helpers.training import digits_reward, rl_rows, small_config, small_trainer
from trl_bridge.cli import evaluate
from trl_bridge.evaluation import AccuracyCallback


COMMAND = ["--model", "builtin:tiny", "--benchmarks", "builtin:addition", "--limit", "5", "--n", "2"]
COMMAND += ["--max_new_tokens", "6", "--batch_size", "3"]


def measured(folder):
    args = small_config(folder / "trainer", GRPOConfig)
    trainer = small_trainer(folder, GRPOTrainer, args=args, train_dataset=rl_rows(2))
    options = {"n": 2, "temperature": 1.0, "batch_size": 2, "max_new_tokens": 3, "reward_func": digits_reward}
    return AccuracyCallback(trainer, held_out(5), **options).measure()


def main(folder):
    for name in ("fresh", "killed"):
        evaluate.main([*COMMAND, "--output_dir", str(folder / name)])
    accuracy = measured(folder)
    rank = PartialState().process_index
    (folder / f"accuracy-{rank}.json").write_text(json.dumps(accuracy))


if __name__ == "__main__":
    main(Path(sys.argv[1]))

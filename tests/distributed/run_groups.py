"""Trains the group baselines on the ranks that torchrun starts, recorded. Usage: run_groups.py FOLDER"""

import importlib
import sys
from pathlib import Path

import torch

from tests.baselines.groups import expert_rows, group_trainer, options, recording


# Six rows a rank in groups of four: the middle group lies on both ranks. Every other prompt has a trace.
ROWS = {"per_device_train_batch_size": 6, "num_generations": 4, "gradient_accumulation_steps": 2, "max_steps": 3}
CASES = {
    "luffy": {"loss_type": "dapo", "preset": "code"},
}


def main(folder: Path) -> None:
    import trl_bridge
    from trl_bridge.methods import METHODS

    for name, changes in CASES.items():
        trainer_class = getattr(trl_bridge, METHODS[name].trainer.rpartition(".")[2])
        trainer = group_trainer(
            folder / name, recording(trainer_class), train_dataset=expert_rows(3, every=2), **ROWS, **changes
        )
        trainer.train()
        record = {
            "windows": trainer.windows,
            "states": trainer.states,
            "start": trainer.start,
            "options": {k: v for k, v in options(trainer.args).items() if not callable(v)},
            "log": [entry for entry in trainer.state.log_history if "loss" in entry],
            "shared": trainer.shared_state(),
        }
        torch.save(record, folder / f"{name}-{trainer.accelerator.process_index}.pt")


if __name__ == "__main__":
    importlib.import_module("tests.conftest")  # offline, one thread
    main(Path(sys.argv[1]))

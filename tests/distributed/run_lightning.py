"""Trains Lightning OPD on the ranks that torchrun starts, recorded. Usage: rank.py run_lightning FOLDER"""

from pathlib import Path

import torch

from tests.helpers.lightning_opd import make, recording, scored
from tests.helpers.resume import StopAt


# Twelve rows, eight to an update: the second window of an epoch is a short one.
ROWS = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "max_steps": 3}
SAVING = {"save_strategy": "steps", "save_steps": 1, "optim": "adamw_torch", "learning_rate": 1e-3}


def main(place: str) -> None:
    folder = Path(place)
    for aggregation in ("sequence", "token"):
        trainer = make(folder / aggregation, cls=recording, rows=scored(12), loss_aggregation=aggregation, **ROWS)
        trainer.train()
        rank = trainer.accelerator.process_index
        record = {
            "windows": trainer.windows,
            "states": trainer.states,
            "start": trainer.start,
            "log": [entry for entry in trainer.state.log_history if "loss" in entry],
        }
        torch.save(record, folder / f"{aggregation}-{rank}.pt")
    straight = make(folder / "straight", rows=scored(12), **ROWS, **SAVING)
    straight.train()
    make(folder / "halves", rows=scored(12), callbacks=[StopAt(2)], **ROWS, **SAVING).train()
    resumed = make(folder / "halves", rows=scored(12), **ROWS, **SAVING)
    resumed.train(resume_from_checkpoint=True)
    both = [dict(each.model.state_dict()) for each in (straight, resumed)]
    torch.save(both, folder / f"resume-{rank}.pt")

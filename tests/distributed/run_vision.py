"""Rows with pictures on two ranks, recorded. Usage: rank.py run_vision FOLDER"""

import os
from pathlib import Path

import pytest
import torch
from datasets import concatenate_datasets

from tests.distributed.cases import FSDP
from tests.distributed.run import pretend_accelerator
from tests.helpers.lean import lean_options, lean_trainer
from tests.helpers.resume import StopAt, saving_options, state_of
from tests.helpers.streams import options_of, recording
from tests.helpers.training import RecordingTrainer, reference_options
from tests.helpers.vision import digits, picture_demonstrations, picture_rows, vision_model, vision_trainer
from trl_bridge import BridgeTrainer, CHORDTrainer, PackedGRPOTrainer


# One picture or two; of the demonstrations that there are, those with one at least.
ROWS = picture_rows(pictures=lambda n: 1 + n % 2)
SFT = picture_demonstrations().filter(lambda row: len(row["images"]) > 0)
SGD = {"optim": "sgd", "learning_rate": 0.1, "max_steps": 2, "per_device_train_batch_size": 4}
SEEN = {"train_dataset": ROWS, "sft_dataset": SFT}
CHORD = {"mu_peak": 0.8, "mu_valley": 0.8, "mu_warmup_steps": 0, "mu_decay_steps": 0}
# Trainer, family, options.
CASES = {
    "bridge": (RecordingTrainer, "qwen2_5_vl", {}),
    "bridge, frozen, checkpointing, kl": (
        RecordingTrainer,
        "gemma3",
        {"freeze_vision_tower": True, "gradient_checkpointing": True, "beta": 0.1},
    ),
    "bridge, smolvlm": (RecordingTrainer, "smolvlm", {}),
    "chord": (recording(CHORDTrainer), "smolvlm", CHORD),
}


def write(trainer, options, place):
    trainer.train()
    record = {
        "windows": trainer.windows,
        "states": trainer.states,
        "start": trainer.start,
        "options": {k: v for k, v in options.items() if not callable(v)},
        "log": [e for e in trainer.state.log_history if "loss" in e],
    }
    torch.save(record, place)


def main(place: str) -> None:
    folder, rank = Path(place), os.environ["RANK"]
    for name, (cls, family, changes) in CASES.items():
        trainer = vision_trainer(folder / name, cls, family, **SEEN, **SGD, **changes)
        options = reference_options(trainer) if isinstance(trainer, BridgeTrainer) else options_of(trainer)
        write(trainer, options, folder / f"{name}-{rank}.pt")
    model, processor = vision_model("qwen2_5_vl")
    options = {**SGD, "learning_rate": 1.0, "model": model, "processing_class": processor, "reward_funcs": digits}
    trainer = lean_trainer(folder / "lean", **SEEN, **options)
    write(trainer, lean_options(trainer), folder / f"lean-{rank}.pt")
    options = saving_options(steps_per_generation=4, max_steps=3, **SEEN)
    states = []
    for where, stops in (("straight", [[]]), ("halves", [[StopAt(1)], []])):
        for number, callbacks in enumerate(stops):
            trainer = vision_trainer(folder / where, BridgeTrainer, callbacks=callbacks, **options)
            trainer.train(resume_from_checkpoint=True if number else None)
        states.append(state_of(trainer))
    torch.save(states, folder / f"resumed-{rank}.pt")
    blank = concatenate_datasets([SFT, picture_demonstrations().select([2])])
    with pytest.raises(NotImplementedError, match=f"`sft_dataset` row {len(SFT)} has no picture"):
        vision_trainer(folder / "blank", CHORDTrainer, train_dataset=ROWS, sft_dataset=blank, **SGD)
    with pytest.raises(NotImplementedError, match="`train_dataset` row 3 has no picture"):
        rows = picture_rows(pictures=lambda n: int(n != 3))
        vision_trainer(folder / "blank", PackedGRPOTrainer, train_dataset=rows, **SGD)
    pretend_accelerator()
    with pytest.raises(NotImplementedError, match="vision-language model and FSDP"):
        vision_trainer(folder / "sharded", PackedGRPOTrainer, train_dataset=ROWS, **FSDP)

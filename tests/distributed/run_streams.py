"""Trains the stream baselines on the ranks that torchrun starts, recorded. Usage: run_streams.py FOLDER"""

import importlib
import sys
from pathlib import Path

import torch
from trl import GRPOTrainer

from tests.baselines.streams import logged, make, options_of, recording, sharp_model, state_of, trained, weights_of
from tests.bridge.test_resume import StopAt
from trl_bridge import AlternatingTrainer, CHORDTrainer, NaiveMixTrainer


SGD = {"optim": "sgd", "learning_rate": 0.1}
MU = {"mu_peak": 0.8, "mu_valley": 0.2, "mu_warmup_steps": 1, "mu_decay_steps": 2}
CASES = {
    "naive-mix": (NaiveMixTrainer, {"sft_weight": 0.5, "sft_weighting": "likelihood", **SGD}),
    "alternating": (AlternatingTrainer, {}),
    "chord": (CHORDTrainer, {**MU, "enable_phi_function": True, **SGD}),
}
ZERO = {"mu_peak": 0.0, "mu_valley": 0.0}


def main(folder: Path) -> None:
    for name, (trainer_class, changes) in CASES.items():
        trainer = trained(recording(trainer_class), folder / name, model=sharp_model(), max_steps=4, **changes)
        record = {
            "windows": trainer.windows,
            "states": trainer.states,
            "start": trainer.start,
            "options": {k: v for k, v in options_of(trainer).items() if not callable(v)},
            "log": [entry for entry in trainer.state.log_history if "loss" in entry],
        }
        torch.save(record, folder / f"{name}-{trainer.accelerator.process_index}.pt")
    # mu = 0 is GRPO, synced as GRPO is.
    both = {cls.__name__: weights_of(trained(cls, folder / cls.__name__, **o)) for cls, o in
            ((GRPOTrainer, {}), (CHORDTrainer, ZERO))}  # fmt: skip
    # Stopped inside an RL phase, between two updates of a generation batch.
    options = {"steps_per_generation": 4, "rl_steps": 2, "sft_steps": 2, "max_steps": 5}
    options |= {"save_strategy": "steps", "save_steps": 1}
    straight = trained(AlternatingTrainer, folder / "straight", **options)
    trained(AlternatingTrainer, folder / "halves", callbacks=[StopAt(3)], **options)
    resumed = make(AlternatingTrainer, folder / "halves", **options)
    resumed.train(resume_from_checkpoint=True)
    assert logged(resumed, "alternating/rl_update") == [0.0, 0.0, 1.0, 1.0, 0.0]
    both |= {"straight": state_of(straight), "resumed": state_of(resumed)}
    torch.save(both, folder / f"pairs-{straight.accelerator.process_index}.pt")


if __name__ == "__main__":
    importlib.import_module("tests.conftest")  # offline, one thread
    main(Path(sys.argv[1]))

"""Trains recorded runs on the ranks that torchrun starts, and writes what each rank saw. Usage: run_ddp.py FOLDER"""

import sys
from pathlib import Path

import torch

from tests.bridge.test_resume import StopAt, _state
from tests.harness import RecordingTrainer, reference_options, small_lora, small_trainer


CASES = {
    "adamw": {},
    "sgd, grpo, metrics": {
        "optim": "sgd", "learning_rate": 0.1, "loss_type": "grpo", "bridge_lambda": 0.3, "log_gradient_stats": True,
    },
    "pairing": {"sft_pairing": "prompt", "gradient_checkpointing": True},
    "likelihood": {"sft_weighting": "likelihood"},
    "judge and verdict": {"sft_weighting": "judge_verdict", "judge_window": 2},
    # SGD: Adam turns the rounding of gradients that are zero (the KL at the start) into full steps.
    "generation within a window": {
        "gradient_accumulation_steps": 4, "steps_per_generation": 2, "beta": 0.1, "optim": "sgd", "learning_rate": 0.1,
    },
}  # fmt: skip


def main(folder: Path) -> None:
    for name, options in CASES.items():
        trainer = small_trainer(folder / name, RecordingTrainer, peft_config=small_lora(), max_steps=4, **options)
        trainer.train()
        record = {
            "windows": trainer.windows,
            "states": trainer.states,
            "start": trainer.start,
            "options": {k: v for k, v in reference_options(trainer).items() if not callable(v)},
            "log": [e for e in trainer.state.log_history if "loss" in e],
            "coordinator": trainer.coordinator.state_dict(),
            "student": {n: p.detach() for n, p in trainer._weights.items()},
            "shadow": {n: p.detach() for n, p in trainer.shadow.weights.items()},
            "weighting": trainer.weighting.state_dict(),
        }
        torch.save(record, folder / f"{name}-{trainer.accelerator.process_index}.pt")
    resume(folder)


def resume(folder: Path) -> None:
    options = {"save_strategy": "steps", "save_steps": 1, "max_steps": 6, "num_iterations": 2}
    options |= {"steps_per_generation": 4, "sft_weighting": "judge_verdict"}
    straight = small_trainer(folder / "straight", **options)
    straight.train()
    small_trainer(folder / "halves", callbacks=[StopAt(3)], **options).train()
    resumed = small_trainer(folder / "halves", **options)
    resumed.train(resume_from_checkpoint=True)
    both = {"straight": _state(straight), "resumed": _state(resumed)}
    torch.save(both, folder / f"resume-{straight.accelerator.process_index}.pt")


if __name__ == "__main__":
    main(Path(sys.argv[1]))

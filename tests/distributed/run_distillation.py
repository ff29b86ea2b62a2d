"""Trains the distillation trainers on the ranks that torchrun starts, recorded. Usage: rank.py run_distillation FOLDER"""

from pathlib import Path

import torch

from tests.helpers.distillation import distillation_trainer, recording
from tests.helpers.resume import StopAt
from trl_bridge import AOPDTrainer, OPDTrainer


SGD = {"optim": "sgd", "learning_rate": 5e-3}
CASES = {
    "opd": (OPDTrainer, SGD),
    "opd-nothing-on-one": (OPDTrainer, SGD),
    "aopd-code": (AOPDTrainer, {"aopd_top_k": 4, **SGD}),
    "aopd-paper": (AOPDTrainer, {"aopd_top_k": 4, "preset": "paper"}),
}
ROWS = {"per_device_train_batch_size": 2, "max_steps": 2}


def without_tokens_on_one(trainer_class):
    """The second rank has micro-batches without a token to train on."""

    class Masked(trainer_class):
        def _generate_and_score_completions(self, inputs):
            output = super()._generate_and_score_completions(inputs)
            mask = torch.ones_like(output["completion_mask"])
            mask *= self.accelerator.is_main_process
            counted = (mask * output["completion_mask"]).sum()
            return {**output, "tool_mask": mask, "num_items_in_batch": self.accelerator.gather(counted).sum()}

    return Masked


def build(name, folder, recorded=False, **changes):
    trainer_class, options = CASES[name]
    trainer_class = recording(trainer_class) if recorded else trainer_class
    if name == "opd-nothing-on-one":
        trainer_class = without_tokens_on_one(trainer_class)
    return distillation_trainer(folder, trainer_class, **{**ROWS, **options, **changes})


def main(place: str) -> None:
    folder = Path(place)
    for name in CASES:
        trainer = build(name, folder / name, recorded=True)
        trainer.train()
        record = {
            "windows": trainer.windows,
            "states": trainer.states,
            "start": trainer.start,
            "args": trainer.args,
            "log": [entry for entry in trainer.state.log_history if "loss" in entry],
        }
        torch.save(record, folder / f"{name}-{trainer.accelerator.process_index}.pt")
    saving = {"save_strategy": "steps", "save_steps": 1, "max_steps": 3}
    straight = build("aopd-code", folder / "straight", **saving)
    straight.train()
    build("aopd-code", folder / "halves", callbacks=[StopAt(2)], **saving).train()
    resumed = build("aopd-code", folder / "halves", **saving)
    resumed.train(resume_from_checkpoint=True)
    both = [dict(t.model.state_dict()) for t in (straight, resumed)]
    torch.save(both, folder / f"resume-{resumed.accelerator.process_index}.pt")

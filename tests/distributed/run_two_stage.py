"""Trains both stages of a cold start on the ranks that torchrun starts. Usage: run_two_stage.py KIND FOLDER"""

import importlib
import sys
from pathlib import Path

import torch

from tests.baselines.groups import options
from tests.distributed.cases import FSDP, zero
from tests.distributed.run import look_on_main_process_alone, pretend_accelerator
from tests.harness import clone
from tests.test_two_stage import Cut, two_stage
from trl_bridge.baselines import two_stage as module
from trl_bridge.training import checkpoint
from trl_bridge.training.backends import backend_for


# The stages differ in all that FSDP and DeepSpeed are told of: sizes, accumulation, clipping. Adam has a large epsilon,
# since it turns a gradient that cancels down to rounding into a full step.
RUN = {
    "adam_epsilon": 1e-6, "learning_rate": 5e-3, "max_steps": 2, "per_device_train_batch_size": 4, "max_grad_norm": 0.0,
    "gradient_accumulation_steps": 2, "sft_learning_rate": 3e-3, "sft_max_steps": 2, "sft_max_grad_norm": 0.3,
    "sft_per_device_train_batch_size": 3, "sft_gradient_accumulation_steps": 3,
}  # fmt: skip
CASES = {
    "ddp": {"ddp": {}},
    "fsdp": {"fsdp2": FSDP},
    "deepspeed": {f"zero-{stage}": zero(stage) for stage in (1, 2, 3)},
}
# Stage and update after whose checkpoint a run is cut off: inside a stage, and between its last checkpoint and its end.
CUTS = {
    "ddp": (),
    "fsdp": (("sft", 2), ("grpo", 1)),
    "deepspeed": (("sft", 1), ("sft", 2), ("grpo", 1), ("grpo", 2)),
}


def recorded(trainer_class, runs):
    """A stage's trainer; micro-batches and whole weights are kept in `runs`, and nothing is changed."""

    class Recorded(trainer_class):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            runs.append({"windows": [[]], "states": [], "options": options_of(self.args)})

        def compute_loss(self, model, inputs, *args, **kwargs):
            runs[-1]["windows"][-1].append(clone(inputs))
            return super().compute_loss(model, inputs, *args, **kwargs)

        def training_step(self, *args, **kwargs):
            loss = super().training_step(*args, **kwargs)
            if self.accelerator.sync_gradients:
                runs[-1]["windows"].append([])
            return loss

        def log(self, logs, *args, **kwargs):
            if "loss" in logs:
                held = backend_for(self.accelerator).weights(self.accelerator.unwrap_model(self.model))
                runs[-1]["states"].append({name: held.whole(name).detach().clone() for name in held.parameters})
            super().log(logs, *args, **kwargs)

    return Recorded


def options_of(args):
    if not hasattr(args, "num_generations"):
        return {"lr": args.learning_rate, "max_grad_norm": args.max_grad_norm}
    return {name: value for name, value in options(args).items() if not callable(value)}


def main(kind: str, folder: Path) -> None:
    if kind != "ddp":
        pretend_accelerator()
    look_on_main_process_alone(
        (checkpoint, "latest"),
        (module, "_latest"),
        (module, "_steps_of_finished"),
        (module.TwoStageConfig, "can_resume"),
    )
    stages = module.SFTTrainer, module.ResumableTrainer
    for name, way in CASES[kind].items():
        runs: list[dict] = []
        module.SFTTrainer, module.ResumableTrainer = (recorded(stage, runs) for stage in stages)
        trainer = two_stage(folder / name, **RUN, **way)
        trainer.train()
        trainer.save_model()
        rank = trainer.accelerator.process_index
        torch.save(runs, folder / f"{name}-{rank}.pt")
        module.SFTTrainer, module.ResumableTrainer = stages
        for stage, step in CUTS[kind]:
            cut_off(folder / f"{name} {stage} {step}", stage, step, way)


def cut_off(folder: Path, stage: str, step: int, way: dict) -> None:
    try:
        two_stage(folder, callbacks=[Cut(stage, step, "save")], **RUN, **way).train()
    except KeyboardInterrupt:
        resumed = two_stage(folder, **RUN, **way)
        resumed.train(resume_from_checkpoint=True)
        resumed.save_model()
    else:
        raise AssertionError("nothing was cut off")


if __name__ == "__main__":
    importlib.import_module("tests.conftest")  # offline, one thread
    main(sys.argv[1], Path(sys.argv[2]))

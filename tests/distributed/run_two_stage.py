"""Trains both stages of a cold start on the ranks that torchrun starts. Usage: rank.py run_two_stage KIND FOLDER [NAME...]"""

from pathlib import Path

import torch

from tests.distributed.cases import FSDP, model_of, zero
from tests.distributed.run import look_on_main_process_alone, pretend_accelerator
from tests.helpers.groups import options
from tests.helpers.training import clone, small_lora
from tests.helpers.two_stage import Cut, two_stage
from trl_bridge.methods import two_stage as module
from trl_bridge.training.backends import backend_for
from trl_bridge.training.checkpoint import folder as checkpoint


# The stages differ in all that FSDP and DeepSpeed are told of: sizes, accumulation, clipping. Adam has a large epsilon,
# since it turns a gradient that cancels down to rounding into a full step.
RUN = {
    "adam_epsilon": 1e-6, "learning_rate": 5e-3, "max_steps": 2, "per_device_train_batch_size": 4, "max_grad_norm": 0.0,
    "gradient_accumulation_steps": 2, "sft_learning_rate": 3e-3, "sft_max_steps": 2, "sft_max_grad_norm": 0.3,
    "sft_per_device_train_batch_size": 3, "sft_gradient_accumulation_steps": 3,
}  # fmt: skip
LORA = {"peft_config": small_lora(task_type="CAUSAL_LM")}
CASES = {
    "ddp": {"ddp": {}},
    "fsdp": {"fsdp2": FSDP, "fsdp2, lora": {**FSDP, **LORA}},
    "deepspeed": {
        f"zero-{stage}{kind}": {**zero(stage), **options}
        for stage in (1, 2, 3)
        for kind, options in {"": {}, ", lora": LORA}.items()
    },
}
# Stage and update after whose checkpoint a run is cut off: inside a stage, and between its last checkpoint and its end.
CUTS = {
    "ddp": (),
    "fsdp2": (("sft", 2), ("grpo", 1)),
    "fsdp2, lora": (("sft", 1),),
    **dict.fromkeys(CASES["deepspeed"], (("sft", 1), ("sft", 2), ("grpo", 1), ("grpo", 2))),
}


def recorded(trainer_class, runs):
    """A stage's trainer; micro-batches and whole weights are kept in `runs`, and nothing is changed."""

    class Recorded(trainer_class):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            runs.append({"windows": [[]], "states": [], "options": options_of(self.args)})

        def _prepare_for_training(self, *args, **kwargs):
            prepared = super()._prepare_for_training(*args, **kwargs)
            runs[-1]["start"] = weights_of(self)
            return prepared

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
                runs[-1]["states"].append(weights_of(self))
            super().log(logs, *args, **kwargs)

    return Recorded


def weights_of(trainer):
    """Whole weights that are trained, on every rank."""
    held = backend_for(trainer.accelerator).weights(trainer.accelerator.unwrap_model(trainer.model))
    return {name: held.full(name).detach().clone() for name, p in held.parameters.items() if p.requires_grad}


def options_of(args):
    if not hasattr(args, "num_generations"):
        return {"lr": args.learning_rate, "max_grad_norm": args.max_grad_norm}
    return {name: value for name, value in options(args).items() if not callable(value)}


def main(kind: str, place: str, *names: str) -> None:
    folder = Path(place)
    if kind != "ddp":
        pretend_accelerator()
    look_on_main_process_alone(
        (checkpoint, "latest"),
        (module, "_latest"),
        (module, "_steps_of_finished"),
        (module.TwoStageConfig, "can_resume"),
    )
    stages = module._ColdStart, module._Reinforcement
    model_of({"by_name": True}, folder)
    for name, way in CASES[kind].items():
        if names and name not in names:
            continue
        runs: list[dict] = []
        module._ColdStart, module._Reinforcement = (recorded(stage, runs) for stage in stages)
        trainer = build(folder / name, way)
        trainer.train()
        trainer.save_model()
        rank = trainer.accelerator.process_index
        torch.save(runs, folder / f"{name}-{rank}.pt")
        module._ColdStart, module._Reinforcement = stages
        for stage, step in CUTS[name]:
            cut = f"{name} {stage} {step}"
            if not names or cut in names:
                cut_off(folder / cut, stage, step, way)


def build(folder: Path, way: dict, callbacks: list | None = None):
    """A case's trainer. The base of an adapter is loaded by name, in each stage anew."""
    model = str(folder.parent / "base") if "peft_config" in way else None
    return two_stage(folder, model=model, callbacks=callbacks, **RUN, **way)


def cut_off(folder: Path, stage: str, step: int, way: dict) -> None:
    try:
        build(folder, way, callbacks=[Cut(stage, step, "save")]).train()
    except KeyboardInterrupt:
        resumed = build(folder, way)
        resumed.train(resume_from_checkpoint=True)
        resumed.save_model()
    else:
        raise AssertionError("nothing was cut off")

"""Trains the distillation trainers on the ranks that torchrun starts, recorded. Usage: rank.py run_distillation KIND FOLDER [NAME...]"""

import functools
from pathlib import Path
from types import NoneType, SimpleNamespace

import torch

from tests.distributed.cases import FSDP, on_main_process, zero
from tests.distributed.run import pretend_accelerator
from tests.helpers import lightning_opd
from tests.helpers.distillation import distillation_trainer, recording, small_student, small_teacher
from tests.helpers.resume import StopAt
from tests.helpers.streams import held_by
from tests.helpers.training import small_lora
from trl_bridge import AOPDTrainer, LightningOPDTrainer, OPDTrainer


SGD = {"optim": "sgd", "learning_rate": 5e-3}
# What is trained: a trainer, with its options.
METHOD = {
    "opd": (OPDTrainer, SGD),
    "opd-nothing-on-one": (OPDTrainer, SGD),
    "aopd-code": (AOPDTrainer, {"aopd_top_k": 4, **SGD}),
    "aopd-paper": (AOPDTrainer, {"aopd_top_k": 4, "preset": "paper"}),
    "lightning": (LightningOPDTrainer, {}),
    "lightning-token": (LightningOPDTrainer, {"loss_aggregation": "token"}),
}
ROWS = {"per_device_train_batch_size": 2, "max_steps": 2}
# Twelve rows, eight to an update: the second window of an epoch is a short one.
STORED = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "max_steps": 3}
LORA = {"peft_config": small_lora(), "learning_rate": 0.3}
ABSENT = {**FSDP, "fsdp_config": {"version": 2, "cpu_ram_efficient_loading": True}}
OFFLOAD = {"teacher_offload": True}
ZERO = {"zero-1": zero(1), "zero-2": zero(2), "zero-3": zero(3, stage3_param_persistence_threshold=0)}
# By backend: method -> what the backend needs.
CASES = {
    "ddp": {**{name: {} for name in METHOD}, "aopd-code, offload": OFFLOAD},
    "fsdp": {
        "opd": {**FSDP, "gradient_checkpointing": True},
        "opd, lora": {**FSDP, **LORA},
        "opd-nothing-on-one, lora": {**FSDP, **LORA},
        "aopd-code, offload": {**FSDP, **OFFLOAD},
        "aopd-code, lora": {**FSDP, **LORA, "gradient_checkpointing": True},
        # Teacher and student where the main process loaded them.
        "aopd-paper": ABSENT,
        "lightning": {**FSDP, "gradient_checkpointing": True},
        "lightning-token": ABSENT,
        "lightning, lora": {**FSDP, **LORA},
    },
    "deepspeed": {
        **{
            f"{name}, {stage}{kind}": {**way, **options}
            for name in ("opd", "aopd-code", "lightning", "lightning-token")
            for stage, way in ZERO.items()
            for kind, options in {"": {}, ", lora": LORA}.items()
        },
        "opd-nothing-on-one, zero-3": {**ZERO["zero-3"], "gradient_checkpointing": True},
        "aopd-paper, zero-2, offload": {**ZERO["zero-2"], **OFFLOAD},
        # All weights are below the default threshold, so none of them is given away.
        "aopd-paper, zero-3": zero(3),
    },
}  # fmt: skip
RESUMED = {
    "ddp": ["aopd-code", "lightning"],
    "fsdp": ["aopd-code, offload", "lightning, lora"],
    "deepspeed": [f"{name}, {stage}" for name in ("aopd-code", "lightning") for stage in ZERO] + ["opd, zero-3, lora"],
}
SAVING = {"save_strategy": "steps", "save_steps": 1, "max_steps": 3, "optim": "adamw_torch", "learning_rate": 1e-3}
PLAIN = (int, float, str, NoneType)


@functools.cache
def stored_rows():
    return lightning_opd.scored(12)


def options_of(case):
    """The entry of `METHOD` of a case."""
    return case.partition(",")[0]


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


def build(kind, case, folder, recorded=False, **changes):
    trainer_class, options = METHOD[options_of(case)]
    way = CASES[kind][case]
    absent = way is ABSENT
    if trainer_class is LightningOPDTrainer:
        model = on_main_process(lightning_opd.student()) if absent else None
        cls = lightning_opd.recording if recorded else trainer_class
        options = {"cls": cls, "rows": stored_rows(), "model": model, **STORED, **options}
        return lightning_opd.make(folder, **{**options, **way, **changes})
    trainer_class = recording(trainer_class) if recorded else trainer_class
    if options_of(case) == "opd-nothing-on-one":
        trainer_class = without_tokens_on_one(trainer_class)
    models = {"model": small_student(), "teacher_model": small_teacher()}
    if absent:
        models = {name: on_main_process(model) for name, model in models.items()}
    return distillation_trainer(folder, trainer_class, **{**models, **ROWS, **options, **way, **changes})


def main(kind: str, place: str, *names: str) -> None:
    folder = Path(place)
    stored_rows()  # before a trainer lets TRL's head believe that every model is spread by ZeRO-3
    if kind != "ddp":
        pretend_accelerator()
    for name in CASES[kind]:
        if names and name not in names:
            continue
        trainer = build(kind, name, folder / name, recorded=True)
        trainer.train()
        trainer.save_model(str(folder / name / "final"))
        record = {
            "windows": trainer.windows,
            "states": trainer.states,
            "start": trainer.start,
            # What the replay reads; an engine's own parts of it cannot be written.
            "args": SimpleNamespace(**{k: v for k, v in vars(trainer.args).items() if isinstance(v, PLAIN)}),
            "log": [entry for entry in trainer.state.log_history if "loss" in entry],
        }
        torch.save(record, folder / f"{name}-{trainer.accelerator.process_index}.pt")
    for name in RESUMED[kind]:
        if names and f"resume {name}" not in names:
            continue
        straight = build(kind, name, folder / f"{name}-straight", **SAVING)
        straight.train()
        build(kind, name, folder / f"{name}-halves", callbacks=[StopAt(2)], **SAVING).train()
        resumed = build(kind, name, folder / f"{name}-halves", **SAVING)
        resumed.train(resume_from_checkpoint=True)
        both = [held_by(trainer) for trainer in (straight, resumed)]
        torch.save(both, folder / f"{name}-resume-{resumed.accelerator.process_index}.pt")

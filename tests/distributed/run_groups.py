"""Trains the group baselines on the ranks that torchrun starts, recorded. Usage: rank.py run_groups KIND FOLDER [NAME...]"""

import os
from pathlib import Path
from types import NoneType, SimpleNamespace

import torch

import trl_bridge
from tests.distributed.cases import FSDP, zero
from tests.distributed.run import pretend_accelerator
from tests.helpers.group_losses import watch_buffer, watch_guidance
from tests.helpers.groups import group_trainer, hint_rows, options, recording
from tests.helpers.resume import StopAt
from tests.helpers.streams import held_by
from tests.helpers.training import small_lora
from trl_bridge.methods.catalogue import METHODS


# Six rows a rank in groups of four: the middle one of three lies on both ranks. Two of three prompts have a trace.
ROWS = {
    "per_device_train_batch_size": 6,
    "num_generations": 4,
    "gradient_accumulation_steps": 2,
    "steps_per_generation": 1,
    "max_completion_length": 10,
    "max_steps": 3,
}
SGD = {"optim": "sgd", "learning_rate": 0.1}


def right_on_the_second_rank(completions, **kwargs):
    """Of four rollouts on the second rank the first two, and none on the first rank."""
    return [float(os.environ["RANK"] == "1" and row % 4 < 2) for row in range(len(completions))]


class ByTurns:
    """
    Of three groups of four the first alone has a signal where a generation batch begins, and in fresh prompts the first two:
    the second of them, which lies on both ranks, moves to the second rank.
    """

    __name__ = "by_turns"

    def __init__(self):
        self.calls = 0

    def __call__(self, completions, **kwargs):
        self.calls += 1
        first = int(os.environ["RANK"]) * len(completions)
        alive = (1, 2)[(self.calls + 1) % 2]
        return [float(row % 4) if row // 4 < alive else 1.0 for row in range(first, first + len(completions))]


# What is trained: a method, whose name comes first, with its options.
METHOD = {
    "luffy": {"loss_type": "dapo", "preset": "code", **SGD},
    # One generation batch for each update, both ranks with demonstrations.
    "srft": {"temperature": 0.7, "steps_per_generation": 2},
    "hpt": {"gate": 1, "gate_off": 3, "loss_type": "dapo", **SGD},
    # One group on each rank: SFT alone on the first, RL alone on the second, and a second forward for the SFT term.
    "hpt apart": {
        "reward_funcs": right_on_the_second_rank, "success_threshold": 1.0, "temperature": 0.7, "max_steps": 2,
        "per_device_train_batch_size": 4, "steps_per_generation": 2, "train_dataset": hint_rows(), **SGD,
    },
    # Three unsolved questions one by one: the second rank has one less than the first. Adam has a large epsilon, since it
    # turns a gradient that cancels down to rounding into a full step.
    "relift": {
        "buffer_size": 3, "sft_per_device_train_batch_size": 1, "success_threshold": 9.0, "adam_epsilon": 1e-6,
        "sft_learning_rate": 3e-3, "sft_max_grad_norm": 0.5,
    },
    "relift one": {
        "buffer_size": 5, "sft_per_device_train_batch_size": 2, "success_threshold": 9.0, "separate_optimizer": False,
        "sft_max_grad_norm": 0.0, **SGD,
    },
    "uft": {"hint_steps": 3, "hint_coef": 0.5, **SGD},
    "prefix-rft": {"scale_rewards": "group", **SGD},
    # Hard groups on one rank, on both and on none, in different batches.
    "actguide": {"hard_threshold": 2.0, "probe_rollouts": 6, "beta": 0.1, **SGD},
    "self-teacher": {"objective": "sdpg", "kl_weight": 0.7, "hint_template": "{prompt}{demonstration}!", **SGD},
    "self-teacher average": {
        # The untrained model is nearly uniform, and its divergence close to rounding: sharper by the temperature.
        "objective": "sdft", "self_teacher": "average", "self_teacher_rate": 0.3, "hint_template": "{prompt}{demonstration}!",
        "temperature": 0.1, **SGD,
    },
    "ada-prefix": {"success_threshold": 2.0, "prefix_rate": 0.5, **SGD},
}  # fmt: skip
# Tried on DDP alone.
DDP_ONLY = {
    "luffy dynamic": {"dynamic_sampling": True, "loss_type": "dapo", "reward_funcs": ByTurns(), **SGD},
}  # fmt: skip
LORA = {"peft_config": small_lora()}
ZERO = {"zero-1": zero(1), "zero-2": zero(2), "zero-3": zero(3, stage3_param_persistence_threshold=0)}
# Each method once: what else there is to them is tried in full.
ONCE = [name for name in METHOD if name not in ("hpt", "relift one", "self-teacher", "ada-prefix")]
# By backend: method -> what the backend needs.
CASES = {
    "ddp": {name: {} for name in (*METHOD, *DDP_ONLY) if name != "relift one"},
    "fsdp": {
        **dict.fromkeys(METHOD, FSDP),
        **{f"{name}, lora": {**FSDP, **LORA} for name in ONCE},
        # Weights that a pass has gathered stay where they are for the next one.
        "self-teacher average, kept": {
            **FSDP,
            "fsdp_config": {"version": 2, "cpu_ram_efficient_loading": True, "reshard_after_forward": False},
        },
    },
    "deepspeed": {
        # All weights are below the default threshold, so none of them is given away but for a generation.
        "self-teacher average, zero-3, kept": {**zero(3), "steps_per_generation": 2},
        **{
            f"{name}, {stage}{kind}": {**way, **options}
            for name in METHOD
            for stage, way in ZERO.items()
            for kind, options in {"": {}, ", lora": LORA}.items()
        },
    },
}
PLAIN = (int, float, str, NoneType)
RESUMED = {
    "ddp": ("hpt", "relift", "actguide", "self-teacher average"),
    "fsdp": ("relift", "relift, lora", "self-teacher average, lora"),
    "deepspeed": tuple(
        f"{name}, {stage}{kind}"
        for name in ("relift", "self-teacher average")
        for stage in ZERO
        for kind in ("", ", lora")
    ),
}
WATCHING = {"relift": watch_buffer, "actguide": watch_guidance}


def options_of(case):
    """The entry of `METHOD` of a case."""
    return case.partition(",")[0]


def build(kind, case, folder, recorded=False, **changes):
    name = options_of(case).partition(" ")[0]
    trainer_class = getattr(trl_bridge, METHODS[name].trainer.rpartition(".")[2])
    if recorded:
        trainer_class = WATCHING[name]() if name in WATCHING else recording(trainer_class)
    rows = hint_rows(every=2, steps=name == "actguide")
    options = {
        "train_dataset": rows,
        **ROWS,
        **{**METHOD, **DDP_ONLY}[options_of(case)],
        **CASES[kind][case],
        **changes,
    }
    return group_trainer(folder, trainer_class, **options)


def main(kind: str, place: str, *names: str) -> None:
    folder = Path(place)
    if kind != "ddp":
        pretend_accelerator()
    for name in CASES[kind]:
        if names and name not in names and options_of(name) not in names:
            continue
        trainer = build(kind, name, folder / name, recorded=True)
        trainer.train()
        trainer.save_model(str(folder / name / "final"))
        rank = trainer.accelerator.process_index
        record = {
            "windows": trainer.windows,
            "states": trainer.states,
            "start": trainer.start,
            # What the replay reads; an engine's own parts of it cannot be written.
            "args": SimpleNamespace(**{k: v for k, v in vars(trainer.args).items() if isinstance(v, PLAIN)}),
            "options": {k: v for k, v in options(trainer.args).items() if not callable(v)},
            "log": [entry for entry in trainer.state.log_history if "loss" in entry],
            "shared": trainer.saved.state("shared"),
            "taken": getattr(trainer, "taken", None),
            "born": getattr(trainer, "born", None),
        }
        torch.save(record, folder / f"{name}-{rank}.pt")
    for name in RESUMED[kind]:
        if names and f"resume {name}" not in names:
            continue
        saving = {"save_strategy": "steps", "save_steps": 1, "max_steps": 4}
        straight = build(kind, name, folder / f"{name}-straight", **saving)
        straight.train()
        build(kind, name, folder / f"{name}-halves", callbacks=[StopAt(2)], **saving).train()
        resumed = build(kind, name, folder / f"{name}-halves", **saving)
        resumed.train(resume_from_checkpoint=True)
        both = [held_by(trainer) for trainer in (straight, resumed)]
        torch.save(both, folder / f"{name}-resume-{resumed.accelerator.process_index}.pt")

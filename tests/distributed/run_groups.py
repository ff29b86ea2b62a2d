"""Trains the group baselines on the ranks that torchrun starts, recorded. Usage: run_groups.py FOLDER"""

import sys
from pathlib import Path

import torch

import trl_bridge
from tests.baselines.groups import StopAt, group_trainer, options, recording
from tests.baselines.test_actguide import watching as watching_guidance
from tests.baselines.test_relift import watching
from tests.baselines.test_uft import hint_rows
from trl_bridge.methods import METHODS


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
CASES = {
    "luffy": {"loss_type": "dapo", "preset": "code", **SGD},
    "srft": {"temperature": 0.7},
    "hpt": {"gate": 1, "gate_off": 3, "loss_type": "dapo", **SGD},
    # Five unsolved questions in micro-batches of two: the second rank has one less than the first.
    "relift": {"buffer_size": 5, "sft_per_device_train_batch_size": 2, "success_threshold": 9.0, **SGD},
    "uft": {"hint_steps": 3, "hint_coef": 0.5, **SGD},
    "prefix-rft": {"scale_rewards": "group", **SGD},
    # Hard groups on one rank, on both and on none, in different batches.
    "actguide": {"hard_threshold": 2.0, "probe_rollouts": 6, "beta": 0.1, **SGD},
}
RESUMED = ("hpt", "relift", "actguide")
WATCHING = {"relift": watching, "actguide": watching_guidance}


def build(name, folder, recorded=False, **changes):
    trainer_class = getattr(trl_bridge, METHODS[name].trainer.rpartition(".")[2])
    if recorded:
        trainer_class = WATCHING[name]() if name in WATCHING else recording(trainer_class)
    options = {**ROWS, **CASES[name], **changes}
    rows = hint_rows(every=2, steps=name == "actguide")
    return group_trainer(folder, trainer_class, train_dataset=rows, **options)


def main(folder: Path) -> None:
    for name in CASES:
        trainer = build(name, folder / name, recorded=True)
        trainer.train()
        rank = trainer.accelerator.process_index
        record = {
            "windows": trainer.windows,
            "states": trainer.states,
            "start": trainer.start,
            "args": trainer.args,
            "options": {k: v for k, v in options(trainer.args).items() if not callable(v)},
            "log": [entry for entry in trainer.state.log_history if "loss" in entry],
            "shared": trainer.shared_state(),
            "taken": getattr(trainer, "taken", None),
            "born": getattr(trainer, "born", None),
        }
        torch.save(record, folder / f"{name}-{rank}.pt")
    for name in RESUMED:
        saving = {"save_strategy": "steps", "save_steps": 1, "max_steps": 4}
        straight = build(name, folder / f"{name}-straight", **saving)
        straight.train()
        build(name, folder / f"{name}-halves", callbacks=[StopAt(2)], **saving).train()
        resumed = build(name, folder / f"{name}-halves", **saving)
        resumed.train(resume_from_checkpoint=True)
        both = [{"model": dict(t.model.state_dict()), "shared": t.shared_state()} for t in (straight, resumed)]
        torch.save(both, folder / f"{name}-resume-{resumed.accelerator.process_index}.pt")


if __name__ == "__main__":
    main(Path(sys.argv[1]))

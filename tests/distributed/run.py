"""Trains recorded runs on the ranks that torchrun starts, and writes what each saw. Usage: rank.py run KIND FOLDER [CASE...]"""

import copy
import importlib
import importlib.util
import os
from pathlib import Path

import accelerate.state
import torch
import transformers.training_args
from torch.distributed.tensor import DTensor
from torch.utils import _pytree as pytree
from transformers import TrainerCallback

from tests.distributed.cases import BESTS, CASES, LEAN_CASES, RESUMES, model_of
from tests.helpers import engines
from tests.helpers.resume import StopAt, rows_of, state_of
from tests.helpers.training import RecordingTrainer, reference_options, rl_rows, small_lora, small_trainer
from trl_bridge.training.checkpoint import folder as checkpoint


# Of the runs that are resumed; and after which update of them by another number of ranks.
SAVING = {"save_strategy": "steps", "save_steps": 1, "max_steps": 6}
HANDED_ON = 3


def pretend_accelerator() -> None:
    """accelerate takes neither FSDP nor DeepSpeed up on CPU: let it think of each process as of one with a GPU."""
    kind = accelerate.state.DistributedType.MULTI_GPU
    accelerate.state.PartialState._prepare_backend = lambda self, *args, **kwargs: ("gloo", kind)
    accelerate.state.PartialState.set_device = lambda self: setattr(self, "device", torch.device("cpu"))
    transformers.training_args.is_torch_bf16_gpu_available = lambda: True
    if importlib.util.find_spec("deepspeed"):
        # It would compile reductions of its own with g++; gloo's do as well.
        importlib.import_module("deepspeed.comm.torch").build_shm_op = lambda: None


def trainer_of(output_dir, options, trainer_class=RecordingTrainer, **more):
    for name in ("ACCELERATE_USE_FSDP", "FSDP_CPU_RAM_EFFICIENT_LOADING", "ACCELERATE_USE_DEEPSPEED"):
        os.environ.pop(name, None)  # an earlier case's
    options = {**options, **more}
    if options.get("fsdp_config", {}).get("cpu_ram_efficient_loading"):
        # As `accelerate launch` sets them, before any model is loaded.
        os.environ.update(ACCELERATE_USE_FSDP="true", FSDP_CPU_RAM_EFFICIENT_LOADING="true")
    lora = small_lora(**options.pop("lora", {}))
    model = model_of(options.pop("model", {}), output_dir)
    trainer = small_trainer(output_dir, trainer_class, model=model, peft_config=lora, **options)
    for callback in trainer.callback_handler.callbacks:
        if isinstance(callback, Watch):
            callback.trainer = trainer
    return trainer


def main(kind: str, place: str, *names: str) -> None:
    folder = Path(place)
    engines.serve()
    look_on_main_process_alone((checkpoint, "latest"))
    if kind != "ddp":
        pretend_accelerator()
    for name, options in {**CASES[kind], **LEAN_CASES[kind]}.items():
        if names and name not in names:
            continue
        trainer = trainer_of(folder / name, options, max_steps=options.get("max_steps", 4))
        absent = any(p.numel() == 0 or p.isnan().any().item() for p in trainer.model.parameters())
        trainer.train()
        trainer.save_model(str(folder / name / "final"))
        rank = trainer.accelerator.process_index
        record = {
            "absent": absent,
            "windows": trainer.windows,
            "states": trainer.states,
            "start": trainer.start,
            "options": {k: v for k, v in reference_options(trainer).items() if not callable(v)},
            "log": [e for e in trainer.state.log_history if "loss" in e],
            "coordinator": trainer.coordinator.state_dict(),
            "student": {n: trainer.student.full(n).clone() for n in trainer.student.parameters},
            "shadow": None,
            "weighting": trainer.weighting.state_dict(),
        }
        if trainer.shadow is not None:
            held = trainer.shadow.held
            record["shadow"] = {n: held.full(n).clone() for n in held.parameters}
            record["rows"] = {n: (held.bounds(n), rows.shape[0]) for n, rows in held.shards().items()}
        torch.save(record, folder / f"{name}-{rank}.pt")
    for name, options in RESUMES[kind].items():
        if not names or f"resume {name}" in names:
            resume(folder, name, options)
    for name, options in BESTS.get(kind, {}).items():
        if not names or f"best {name}" in names:
            trainer = trainer_of(folder / f"best {name}", options, eval_dataset=rl_rows().select(range(8)))
            trainer.train()
            step = int(trainer.state.best_model_checkpoint.rpartition("-")[2])
            record = {"step": step, "brought": trainer.snapshot(), "states": trainer.states}
            torch.save(record, folder / f"best {name}-{trainer.accelerator.process_index}.pt")


def look_on_main_process_alone(*places) -> None:
    """Ranks may see a file at different times: which one to resume from is the main process's to find."""
    if os.environ["RANK"] != "0":
        for module, name in places:
            setattr(module, name, _not_asked)


def _not_asked(folder):
    raise AssertionError(f"a rank has looked for checkpoints in {folder} by itself")


def resume(folder: Path, name: str, options: dict) -> None:
    options = {**SAVING, **options}
    handed_on = "deepspeed" not in options
    watch = [Watch({HANDED_ON})] if handed_on else None
    straight = trainer_of(folder / f"{name} straight", options, callbacks=watch)
    straight.train()
    if handed_on:
        write_seen(straight, folder / f"{name} straight")
    both = {"straight": whole_state(straight)}
    trainer_of(folder / f"{name} halves", options, callbacks=[StopAt(3)], save_total_limit=2).train()
    resumed = trainer_of(folder / f"{name} halves", options)
    resumed.train(resume_from_checkpoint=True)
    both["resumed"] = whole_state(resumed)
    torch.save(both, folder / f"resume {name}-{straight.accelerator.process_index}.pt")


class Watch(TrainerCallback):
    """Keeps what a checkpoint holds, as it is when it has been loaded, and once it is saved at certain updates."""

    def __init__(self, steps=()):
        self.steps, self.seen, self.trainer = steps, {}, None

    def on_train_begin(self, args, state, control, **kwargs):
        self.seen[state.global_step] = what_is_saved(self.trainer)

    def on_save(self, args, state, control, **kwargs):
        if state.global_step in self.steps:
            self.seen[state.global_step] = what_is_saved(self.trainer)


def what_is_saved(trainer):
    """Whole where a backend makes it so by itself; the shadow's rows are those of this rank."""
    optimizer = pytree.tree_map(
        lambda value: value.full_tensor() if isinstance(value, DTensor) else value, trainer.optimizer.state_dict()
    )
    return copy.deepcopy(
        {
            "theta": trainer.theta_state_dict(),
            "hat": trainer.shadow_state_dict(),
            "optimizer": optimizer["state"],
            "scheduler": trainer.lr_scheduler.state_dict(),
            "shared": trainer.saved.state("shared"),
            "rows": rows_of(trainer)["shadow"],
            "sharded": trainer.shadow.held.sharded,
            "micro-batches": trainer._step / trainer.args.gradient_accumulation_steps,
        }
    )


def write_seen(trainer, place) -> None:
    watch = next(callback for callback in trainer.callback_handler.callbacks if isinstance(callback, Watch))
    record = {"seen": watch.seen, "windows": trainer.windows, "states": trainer.states, "start": trainer.start}
    torch.save(record, f"{place}-{trainer.accelerator.process_index}.pt")


def whole_state(trainer):
    """What `state_of` has where weights and optimizers are whole, and what stands in for it where they are not."""
    state = {
        "theta": trainer.theta_state_dict(),
        "hat": trainer.shadow_state_dict(),
        "student": {n: trainer.student.full(n).clone() for n in trainer.student.parameters},
        "local": trainer.saved.state("local"),
        "shared": trainer.saved.state("shared"),
        "rows": rows_of(trainer),
        "scheduler": trainer.lr_scheduler.state_dict(),
    }
    return (
        {**state, **state_of(trainer)}
        if not trainer.backend.steps_in_backward and not trainer.is_fsdp_enabled
        else state
    )

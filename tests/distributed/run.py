"""Trains recorded runs on the ranks that torchrun starts, and writes what each saw. Usage: run.py KIND FOLDER [CASE...]"""

import importlib
import importlib.util
import os
import sys
from pathlib import Path

import accelerate.state
import torch
import transformers.training_args

from tests import serving
from tests.bridge.test_resume import StopAt, _state
from tests.distributed.cases import CASES, LEAN_CASES, RESUMES, model_of
from tests.harness import RecordingTrainer, reference_options, small_lora, small_trainer
from trl_bridge.training import checkpoint


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
    return small_trainer(output_dir, trainer_class, model=model, peft_config=lora, **options)


def main(kind: str, folder: Path, names: list[str]) -> None:
    serving.serve()
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
            "student": {n: trainer.student.whole(n).clone() for n in trainer.student.parameters},
            "shadow": None,
            "weighting": trainer.weighting.state_dict(),
        }
        if trainer.shadow is not None:
            held = trainer.shadow.held
            record["shadow"] = {n: held.whole(n).clone() for n in held.parameters}
            record["rows"] = {n: (held.bounds(n), rows.shape[0]) for n, rows in held.held().items()}
        torch.save(record, folder / f"{name}-{rank}.pt")
    for name, options in RESUMES[kind].items():
        if not names or f"resume {name}" in names:
            resume(folder, name, options)


def look_on_main_process_alone(*places) -> None:
    """Ranks may see a file at different times: what to go on from is the main process's to find."""
    if os.environ["RANK"] != "0":
        for module, name in places:
            setattr(module, name, _not_asked)


def _not_asked(folder):
    raise AssertionError(f"a rank has looked for checkpoints in {folder} by itself")


def resume(folder: Path, name: str, options: dict) -> None:
    options = {"save_strategy": "steps", "save_steps": 1, "max_steps": 5, "save_total_limit": 2, **options}
    straight = trainer_of(folder / f"{name} straight", options)
    straight.train()
    both = {"straight": whole_state(straight)}
    trainer_of(folder / f"{name} halves", options, callbacks=[StopAt(3)]).train()
    resumed = trainer_of(folder / f"{name} halves", options)
    resumed.train(resume_from_checkpoint=True)
    both["resumed"] = whole_state(resumed)
    torch.save(both, folder / f"resume {name}-{straight.accelerator.process_index}.pt")


def whole_state(trainer):
    """What `_state` has where weights and optimizers are whole, and what stands in for it where they are not."""
    state = {
        "theta": trainer.theta_state_dict(),
        "hat": trainer.shadow_state_dict(),
        "student": {n: trainer.student.whole(n).clone() for n in trainer.student.parameters},
        "local": trainer.local_state(),
        "shared": trainer.shared_state(),
        "scheduler": trainer.lr_scheduler.state_dict(),
    }
    return (
        {**state, **_state(trainer)}
        if not trainer.backend.steps_in_backward and not trainer.is_fsdp_enabled
        else state
    )


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), sys.argv[3:])

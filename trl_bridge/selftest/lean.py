"""Small runs of lean mode, and their replay by the float64 reference."""

import torch

from .reference.lean import LeanReference
from .runs import (
    RecordingTrainer,
    adapters,
    movement_error,
    reference_options,
    small_lora,
    small_model,
    small_trainer,
)


# Ranks and scalings differ between theta and w, so that a slice or a scaling taken for the other's shows.
LEAN = {"lean": True, "lean_lora_r": 6, "lean_lora_alpha": 9.0}
SCALINGS = (9 / 6, 10 / 4)


def lean_trainer(output_dir, trainer_class=RecordingTrainer, lora=None, **options):
    config = small_lora(lora_alpha=10, **(lora or {}))
    options = {"learning_rate": 1e-2, **LEAN, **options}
    trainer = small_trainer(output_dir, trainer_class, peft_config=config, **options)
    # B of theta is zero at PEFT's own start, which leaves half of the first gradient out.
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name, weight in trainer.model.named_parameters():
            if "lora_B" in name:
                rank = trainer.args.lean_lora_r
                # On the CPU, so that it is the same start on every device.
                drawn = torch.empty(weight.shape)[:, :rank].normal_(std=0.1, generator=generator)
                weight[:, :rank] = drawn.to(weight)
    if isinstance(trainer, RecordingTrainer):
        trainer.start = trainer.snapshot()
    return trainer


def flat(state):
    """An adapter's tensors as the reference names them."""
    a, b = adapters(state)
    return {(name, part): tensor for part, tensors in (("A", a), ("B", b)) for name, tensor in tensors.items()}


def replay_lean(model, start, windows, states, options, scalings=SCALINGS):
    """Errors after each update, relative to what has moved, and the reference's metrics."""
    a, b = adapters(start["w"])
    theta = flat(start["theta"])
    reference = LeanReference(model, theta, scalings[0], a, b, scalings[1], options)
    start = {"theta": theta, "a": a, "b": b, "hat": theta}
    for step, (window, state) in enumerate(zip(windows, states, strict=True)):
        weights = None if window["weights"][0] is None else window["weights"]
        metrics = reference.update(step, window["rl"], window["sft"], weights)
        got_a, got_b = adapters(state["w"])
        got = {"theta": flat(state["theta"]), "a": got_a, "b": got_b}
        want = {"theta": reference.theta, "a": reference.a, "b": reference.b, "hat": reference.hat}
        if options["gain"]:
            got["hat"] = flat(state["hat"])
        moving = [n for n in got if any(not torch.equal(want[n][k].double(), start[n][k].double()) for k in want[n])]
        yield {n: movement_error(got[n], want[n], start[n]) for n in moving}, metrics


def lean_options(trainer, **changes):
    args = trainer.args
    rate = args.learning_rate if args.coordinator_learning_rate is None else args.coordinator_learning_rate
    return reference_options(trainer, w_lr=rate, **changes)


def replayed(trainer, **changes):
    options = lean_options(trainer, **changes)
    replay = list(replay_lean(small_model(), trainer.start, trainer.windows, trainer.states, options))
    assert len(replay) == trainer.state.global_step
    return replay

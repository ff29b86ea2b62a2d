"""A run that is stopped and resumed: what stops it, what it must bring back, and equality to the bit."""

import torch
from safetensors.torch import load_file

from trl_bridge.selftest.runs import StopAt as StopAt
from trl_bridge.selftest.runs import small_trainer


TIMES = ("runtime", "per_second", "step_time")


def rows_of(trainer):
    """This rank's part of what may be spread over the ranks."""
    return {
        name: {"rows": state.shards(), "rest": state.rest()} for name, state in trainer.saved.parts["sharded"].items()
    }


def assert_shadow_is_that_of(trainer, checkpoint):
    saved = load_file(checkpoint / "bridge" / "shadow" / "rows-0.safetensors")  # of one process: whole
    rows = {key: piece for key, piece in trainer.shadow.saved.shards().items() if key.startswith("weights/")}
    assert rows
    assert_same(rows, {key: saved[key] for key in rows})


def state_of(trainer):
    """Everything that an exact resume must bring back."""
    shared = trainer.saved.state("shared")
    return {
        "model": dict(trainer.model.state_dict()),
        "theta": trainer.theta_state_dict(),
        "optimizer": trainer.optimizer.state_dict(),
        "scheduler": trainer.lr_scheduler.state_dict(),
        "rows": rows_of(trainer),
        **shared,
    }


def metrics_of(trainer, after):
    entries = [e for e in trainer.state.log_history if "loss" in e and e["step"] > after]
    return [{k: v for k, v in e.items() if not any(t in k for t in TIMES)} for e in entries]


def assert_same(got, want, path=""):
    if isinstance(want, torch.Tensor):
        assert torch.equal(got, want), path
    elif isinstance(want, dict):
        assert got.keys() == want.keys(), path
        for key in want:
            assert_same(got[key], want[key], f"{path}/{key}")
    elif isinstance(want, (list, tuple)):
        assert len(got) == len(want), path
        for index, (x, y) in enumerate(zip(got, want, strict=True)):
            assert_same(x, y, f"{path}/{index}")
    else:
        assert got == want or (got != got and want != want), (path, got, want)


def saving_options(**changes):
    return {"max_steps": 8, "save_strategy": "steps", "save_steps": 1, "lr_scheduler_type": "cosine", **changes}


def saving_trainer(folder, callbacks=None, **changes):
    return small_trainer(folder, callbacks=callbacks, **saving_options(**changes))

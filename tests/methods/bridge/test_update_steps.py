"""`shadow_update_steps`: the shadow in every n-th update, and what the coordinator follows between."""

import pytest
import torch

from tests.helpers.bridge import assert_replayed, bridge_trainer
from tests.helpers.training import replay, small_config


SGD = {"optim": "sgd", "learning_rate": 0.1}
LATE = {"num_iterations": 2, "steps_per_generation": 4}


@pytest.mark.parametrize(
    "options",
    [
        {"shadow_update_steps": 2, "max_steps": 5},
        {"shadow_update_steps": 3, "max_steps": 8, **LATE, **SGD, "bridge_lambda": 0.3},
        {"shadow_update_steps": 2, "max_steps": 7, "shadow_reset_steps": 3, **SGD},
        {"shadow_update_steps": 2, "max_steps": 3, "bridge_lambda": 0.0},
    ],
    ids=["adamw", "sgd, iterations", "reset between", "lambda 0"],
)
def test_update_equals_reference(tmp_path, options):
    trainer = bridge_trainer(tmp_path, **options)
    trainer.train()
    assert_replayed(trainer)


def test_metrics_between_the_shadows_updates(tmp_path):
    trainer = bridge_trainer(tmp_path, shadow_update_steps=2, max_steps=5, **SGD)
    trainer.train()
    _, metrics = replay(trainer)
    entries = [entry for entry in trainer.state.log_history if "loss" in entry]
    for step, (got, want) in enumerate(zip(entries, metrics, strict=True)):
        of_the_pass = {"bridge/gain", "bridge/shadow_ratio", "bridge/shadow_clip_fraction"} & got.keys()
        assert len(of_the_pass) == (3 if step in (1, 3) else 0)
        for name in ("bridge/gain_grad_norm", "bridge/shadow_distance", *of_the_pass):
            assert got[name] == pytest.approx(want[name], rel=2e-3, abs=2e-6), (step, name)
    assert entries[0]["bridge/gain_grad_norm"] < 1e-5 * entries[0]["bridge/coordinator_grad_norm_rl"]
    assert entries[2]["bridge/gain_grad_norm"] > 1e-2 * entries[2]["bridge/coordinator_grad_norm_rl"]


def test_unlogged_updates_are_the_same(tmp_path):
    runs = []
    for every in (1, 10):
        trainer = bridge_trainer(tmp_path / str(every), shadow_update_steps=3, max_steps=4, logging_steps=every)
        trainer.train()
        runs.append(trainer.coordinator_state_dict())
    assert all(torch.equal(runs[0][name], runs[1][name]) for name in runs[0])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"shadow_update_steps": 0}, "`shadow_update_steps`.*0"),
        (
            {"shadow_update_steps": 4, "shadow_reset_steps": 2},
            "`shadow_reset_steps=2` undoes.*`shadow_update_steps=4`",
        ),
        ({"shadow_update_steps": 2, "cooperative_gain": False}, "`shadow_update_steps`.*`cooperative_gain=True`"),
    ],
    ids=str,
)
def test_refused(tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        small_config(tmp_path, **options)

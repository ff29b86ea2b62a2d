"""`shadow_overlap`: the shadow runs on the last rollouts while a vLLM server generates the next ones."""

import threading

import pytest
import torch

from tests.helpers import engines
from tests.helpers.bridge import TOLERANCE, assert_replayed, bridge_trainer, logged, trained
from tests.helpers.lean import lean_trainer, replayed
from tests.helpers.resume import StopAt, assert_same, state_of
from tests.helpers.training import replay, rl_rows, small_config


SGD = {"optim": "sgd", "learning_rate": 0.1}
SERVED = {**engines.OPTIONS, "vllm_importance_sampling_correction": False}
OVERLAP = {**SERVED, "shadow_overlap": True}


@pytest.fixture(autouse=True)
def server(monkeypatch):
    engines.serve(monkeypatch.setattr)


@pytest.mark.parametrize(
    "options",
    [
        {"max_steps": 4},
        {**SGD, "max_steps": 5, "shadow_reset_steps": 2, "loss_type": "grpo", "beta": 0.1},
        {**SGD, "max_steps": 4, "shadow_importance_sampling": False, "bridge_lambda": 0.3, "temperature": 0.7},
    ],
    ids=["adamw", "sgd, reset, kl", "no ratio"],
)
def test_update_equals_reference(tmp_path, options):
    trainer = bridge_trainer(tmp_path, **OVERLAP, **options)
    trainer.train()
    assert_replayed(trainer)
    # The shadow of the exact rule is elsewhere: the replay has told the two apart.
    errors, _ = replay(trainer, overlap=False)
    assert errors[-1]["hat"] > 1e-2 and errors[-1]["a"] > 1e-3


def test_metrics(tmp_path):
    trainer = bridge_trainer(tmp_path, **OVERLAP, **SGD, max_steps=4)
    trainer.train()
    _, metrics = replay(trainer)
    entries = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert "bridge/gain" not in entries[0]
    assert entries[0]["bridge/gain_grad_norm"] < 1e-5 * entries[0]["bridge/coordinator_grad_norm_rl"]
    for step, (got, want) in enumerate(zip(entries, metrics, strict=True)):
        for name in ("bridge/gain_grad_norm", "bridge/gain", "bridge/shadow_ratio", "bridge/shadow_distance"):
            if name in want:
                assert got[name] == pytest.approx(want[name], rel=2e-3, abs=2e-6), (step, name)
    assert "bridge/gain" in entries[1]


def test_part_of_the_rollouts(tmp_path):
    options = {"shadow_rollout_fraction": 0.5, "max_steps": 3}
    trainer = bridge_trainer(tmp_path, **OVERLAP, **SGD, **options)
    trainer.train()
    assert_replayed(trainer, rows=lambda batch: batch["shadow_weight"].double())


def test_lean(tmp_path):
    trainer = lean_trainer(tmp_path, **OVERLAP, optim="sgd", learning_rate=1.0, max_steps=4)
    trainer.train()
    assert all(error < TOLERANCE for errors, _ in replayed(trainer) for error in errors.values())
    assert replayed(trainer, overlap=False)[-1][0]["hat"] > 1e-2


def test_the_pass_runs_while_the_server_works(tmp_path):
    trainer = bridge_trainer(tmp_path, **OVERLAP, max_steps=3)
    client = trainer.vllm_generation.vllm_client
    running, passed = threading.Event(), threading.Event()
    generate, run, calls = client.generate, trainer._run_shadow, []

    def slow(**options):
        calls.append(options)
        if len(calls) > 1:
            running.set()
            assert passed.wait(60), "the shadow waited for the server"
        return generate(**options)

    def observed(batch):
        assert running.wait(60), "the server was not asked before the shadow's pass"
        run(batch)
        passed.set()

    client.generate, trainer._run_shadow = slow, observed
    trainer.train()
    # One request for each update, and the weights are sent once for each.
    assert len(calls) == len(client.pushes) == 3
    assert trainer.vllm_generation.vllm_client is client


def test_rollouts_are_those_of_plain_generation(tmp_path):
    options = {**SERVED, **SGD, "max_steps": 3, "cooperative_gain": True}
    runs = [trained(bridge_trainer(tmp_path / str(o), **{**options, "shadow_overlap": o})) for o in (False, True)]
    for window, other in zip(runs[0].windows, runs[1].windows, strict=True):
        for batch, twin in zip(window["rl"], other["rl"], strict=True):
            assert torch.equal(batch["completion_ids"], twin["completion_ids"])


def test_resume_is_exact(tmp_path):
    options = {**OVERLAP, "max_steps": 5, "save_strategy": "steps", "save_steps": 1}
    straight = bridge_trainer(tmp_path / "straight", **options)
    straight.train()
    bridge_trainer(tmp_path / "halves", callbacks=[StopAt(3)], **options).train()
    resumed = bridge_trainer(tmp_path / "halves", **options)
    resumed.train(resume_from_checkpoint=True)
    assert_same(state_of(resumed), state_of(straight))
    assert len(straight._overlap.state_dict()) == 2


def test_evaluation_leaves_the_waiting_rollouts(tmp_path):
    options = {"eval_strategy": "steps", "eval_steps": 1, "eval_dataset": rl_rows().select(range(4)), "max_steps": 4}
    trainer = bridge_trainer(tmp_path, **OVERLAP, **SGD, **options)
    trainer.train()
    assert sum("eval_loss" in entry for entry in trainer.state.log_history) == 4
    assert_replayed(trainer)


def test_a_server_that_fails_is_heard(tmp_path):
    trainer = bridge_trainer(tmp_path, **OVERLAP, max_steps=3)
    client = trainer.vllm_generation.vllm_client
    generate, calls = client.generate, []

    def failing(**options):
        calls.append(options)
        if len(calls) > 2:
            raise ConnectionError("the server is gone")
        return generate(**options)

    client.generate = failing
    with pytest.raises(ConnectionError, match="the server is gone"):
        trainer.train()
    assert trainer.vllm_generation.vllm_client is client
    assert logged(trainer, "bridge/gain_grad_norm")[1] > 1e-4
    # Called again it starts anew, without the rollouts that were waiting, and without the last gradient on them.
    client.generate = generate
    trainer.train()
    assert logged(trainer, "bridge/gain_grad_norm")[0] < 1e-5


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"shadow_overlap": True}, ValueError, '`shadow_overlap`.*`vllm_mode="server"`'),
        ({**OVERLAP, "vllm_mode": "colocate"}, ValueError, "`shadow_overlap`.*server"),
        ({**OVERLAP, "num_iterations": 2}, NotImplementedError, "`num_iterations=1`"),
        ({**OVERLAP, "steps_per_generation": 4}, NotImplementedError, "`steps_per_generation=2`"),
        ({**OVERLAP, "shadow_update_steps": 2}, NotImplementedError, "`shadow_update_steps`"),
        ({**OVERLAP, "cooperative_gain": False}, ValueError, "`shadow_overlap`.*`cooperative_gain=True`"),
    ],
    ids=str,
)
def test_refused(tmp_path, options, error, message):
    with pytest.raises(error, match=message):
        small_config(tmp_path, **options)


def test_refused_with_rollout_func(tmp_path):
    with pytest.raises(NotImplementedError, match="`shadow_overlap`.*`rollout_func`"):
        bridge_trainer(tmp_path, **OVERLAP, rollout_func=lambda prompts, trainer: {})

"""Server mode on a CPU with vLLM itself: the server samples from the policy, scores as a teacher, and may die and come back."""

import sys
import threading
import time

import pytest
import torch
from transformers import TrainerCallback

from tests.helpers.real_vllm import CASES, NEEDS_VLLM, SERVER, TOLERANCE, Watched, build, save_model, server
from tests.helpers.resume import StopAt
from trl_bridge.distillation.scoring import LocalTeacher, Rollout, ServedTeacher
from trl_bridge.generation.vllm_training import FileClient
from trl_bridge.models import load


pytestmark = NEEDS_VLLM


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("served")


@pytest.fixture(scope="module")
def model(folder):
    return save_model(folder / "student")


@pytest.fixture(scope="module")
def served(folder, model):
    with server(model, folder / "server.log") as running:
        yield running


@pytest.mark.parametrize("case", CASES)
def test_the_server_samples_from_the_policy(tmp_path, monkeypatch, model, served, case):
    trainer = build(case, tmp_path, model, **SERVER, vllm_server_base_url=served[1])
    Watched(monkeypatch).run(trainer)
    if case == "actguide":
        assert any(entry.get("actguide/guided_rate", 0) > 0 for entry in trainer.state.log_history)


def test_the_shadow_runs_while_the_server_works(tmp_path, monkeypatch, model, served):
    """The request goes off beside the main thread, and what the shadow's passes take of its time is saved."""
    options = {**SERVER, "max_completion_length": 40, "vllm_server_base_url": served[1]}
    trainer = build("bridge-overlap", tmp_path, model, **options)
    client, run, requests, passes = trainer.vllm_generation.vllm_client, trainer._run_shadow, [], []
    generate = client.generate

    def timed(**more):
        began = time.monotonic()
        answer = generate(**more)
        requests.append((threading.current_thread(), began, time.monotonic()))
        return answer

    def running(batch):
        began = time.monotonic()
        run(batch)
        passes.append((began, time.monotonic()))

    client.generate = timed
    monkeypatch.setattr(trainer, "_run_shadow", running)
    trainer.train()
    # The first update's rollouts are asked for with nothing else to do.
    assert [thread is threading.main_thread() for thread, _, _ in requests] == [True, False, False]
    saved = [
        sum(max(0.0, min(end, done) - max(began, sent)) for began, end in passes) for _, sent, done in requests[1:]
    ]
    took = [done - sent for _, sent, done in requests[1:]]
    sys.stdout.write(f"of {sum(took):.2f} s of generation, {sum(saved):.2f} s were the shadow's\n")
    assert min(saved) > 0


# A teacher


@pytest.fixture
def teacher(tmp_path, served):
    """A teacher on disk, whose weights the server has."""
    path = save_model(tmp_path / "teacher", seed=8)
    teacher = load(path)
    client = FileClient(base_url=served[1])
    client.init_communicator("cpu")
    client.update_model_params(teacher)
    client.reset_prefix_cache()
    return teacher


def test_a_served_teacher_scores_as_one_at_hand(served, teacher):
    rollouts = [Rollout([5, 6, 7], [8, 9, 30, 1]), Rollout([20], [3]), Rollout([4] * 9, [40, 41, 42])]
    local = [scores for batch in LocalTeacher(teacher, 2)(rollouts) for scores in batch]
    found = [scores for batch in ServedTeacher(served[1], 2)(rollouts) for scores in batch]
    for one, other in zip(found, local, strict=True):
        assert one == pytest.approx(other, abs=TOLERANCE)


@pytest.mark.parametrize("name", ["opd", "aopd"])
def test_distillation_from_a_served_teacher(tmp_path, model, served, teacher, name):
    """The same updates as with the teacher at hand; the student samples with transformers."""
    options = {"max_steps": 2, "model_init_kwargs": {"dtype": "float32"}}
    options |= {"aopd_top_k": 8} if name == "aopd" else {}
    ends = []
    for given in ({"teacher_model": teacher}, {"teacher_model_server_url": served[1]}):
        trainer = build(name, tmp_path, model, **options, **given)
        trainer.train()
        ends.append(trainer.model.state_dict())
    for key, want in ends[0].items():
        torch.testing.assert_close(ends[1][key], want, rtol=1e-4, atol=1e-5)


# Stopping


SEEDED = {"generation_kwargs": {"seed": 5}, "save_strategy": "steps", "save_steps": 1, "max_steps": 4}


def assert_same_end(resumed, straight):
    for key, want in straight.model.state_dict().items():
        torch.testing.assert_close(resumed.model.state_dict()[key], want, rtol=1e-4, atol=1e-6)


@pytest.fixture(scope="module")
def straight(folder, model, served):
    """A run that nothing stops."""
    options = {**SERVER, **SEEDED, "vllm_server_base_url": served[1]}
    trainer = build("bridge", folder / "straight", model, **options)
    trainer.train()
    return trainer


def test_resume_against_a_live_server(tmp_path, model, served, straight):
    """The server holds later weights than the checkpoint."""
    options = {**SERVER, **SEEDED, "vllm_server_base_url": served[1]}
    build("bridge", tmp_path, model, **options, callbacks=[StopAt(2)]).train()
    resumed = build("bridge", tmp_path, model, **options)
    resumed.train(resume_from_checkpoint=True)
    assert_same_end(resumed, straight)


class Kill(TrainerCallback):
    def __init__(self, process):
        self.process = process

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == 2:
            self.process.kill()
            self.process.wait()


def test_a_killed_server_loses_nothing(tmp_path, folder, model, served, straight):
    """Last, for it takes the others' server away."""
    process, url = served
    options = {**SERVER, **SEEDED, "vllm_server_base_url": url}
    trainer = build("bridge", tmp_path, model, **options, callbacks=[Kill(process)])
    began = time.monotonic()
    with pytest.raises(ConnectionError, match=rf"{url}/.* does not answer any more.*checkpoint-2"):
        trainer.train()
    assert time.monotonic() - began < 300
    with server(model, folder / "again.log", port=int(url.rpartition(":")[2])):
        resumed = build("bridge", tmp_path, model, **options)
        resumed.train(resume_from_checkpoint=True)
    assert resumed.state.global_step == 4
    assert_same_end(resumed, straight)

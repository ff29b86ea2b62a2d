"""BRIDGE with a teacher beside the reward: its term is in the RL loss of student and shadow alike, by the float64 reference."""

import pytest
import torch

from tests.helpers import teachers
from tests.helpers.lean import lean_trainer, replayed
from tests.helpers.resume import StopAt, assert_same
from tests.helpers.training import RecordingTrainer, replay, small_trainer
from trl_bridge import BridgeTrainer


TOLERANCE = 2e-4
LOUD = {"optim": "sgd", "learning_rate": 0.1, "max_grad_norm": 0.0}
FORMS = {
    "advantage": {"teacher_weight": 0.7, "teacher_weight_end": 0.1},
    "loss": {"teacher_form": "loss", "teacher_weight": 0.3, "teacher_kl": "k3"},
}


@pytest.fixture
def teacher(tmp_path):
    return teachers.stored(tmp_path / "teacher", teachers.sharp())


def formula(form):
    weight = (lambda step: 0.3) if form == "loss" else (lambda step: 0.7 - 0.6 * step / 3)
    return {"form": form, "kl": "k3", "weight": weight}


def trained(folder, teacher, form, **changes):
    trainer = small_trainer(folder, RecordingTrainer, teachers=[teacher], **FORMS[form], **{**LOUD, **changes})
    trainer.train()
    teachers.scored(trainer.windows, teachers.sharp(), trainer.args.temperature)
    return trainer


@pytest.mark.parametrize(
    ("form", "changes", "more"),
    [
        ("advantage", {}, {}),
        ("advantage", {"optim": "adamw_torch", "learning_rate": 1e-3, "temperature": 0.7, "beta": 0.1}, {}),
        ("loss", {"loss_type": "grpo"}, {}),
        ("loss", {"shadow_update_steps": 2, "num_iterations": 2}, {}),
    ],
    ids=["advantage", "advantage, adamw", "loss", "loss, every second update"],
)
def test_update_equals_the_reference(tmp_path, teacher, form, changes, more):
    trainer = trained(tmp_path, teacher, form, **changes)
    errors, metrics = replay(trainer, teacher=formula(form), live_only=False, **more)
    assert all(error < TOLERANCE for update in errors for error in update.values()), errors
    logged = [entry for entry in trainer.state.log_history if "loss" in entry]
    for entry, want in zip(logged, metrics, strict=True):
        if "bridge/gain" in want:
            assert entry["bridge/gain"] == pytest.approx(want["bridge/gain"], rel=1e-2, abs=1e-6)


def test_lean_mode_equals_the_reference(tmp_path, teacher):
    trainer = lean_trainer(tmp_path, teachers=[teacher], **FORMS["advantage"], optim="sgd", max_grad_norm=0.0)
    trainer.train()
    teachers.scored(trainer.windows, teachers.sharp(), 1.0)
    errors = [error for error, _ in replayed(trainer, teacher=formula("advantage"), live_only=False)]
    assert all(error < TOLERANCE for update in errors for error in update.values()), errors


def test_the_other_reading_is_another_update(tmp_path, teacher):
    """With the teacher in the student's loss alone the reference parts from the trainer, by w and by the shadow."""
    trainer = trained(tmp_path, teacher, "advantage")
    for window in trainer.windows:
        for batch in window["rl"]:
            batch["of_student"] = batch.pop("teacher_log_p")
    errors, _ = replay(_Once(trainer), teacher=formula("advantage"), live_only=False)
    assert max(update[part] for update in errors for part in ("a", "b", "hat")) > 100 * TOLERANCE


class _Once:
    """A recorded run whose batches show the teacher to the first of the reference's two losses only."""

    def __init__(self, trainer):
        self._trainer = trainer
        self.windows = [{**window, "rl": [_Shown(batch) for batch in window["rl"]]} for window in trainer.windows]

    def __getattr__(self, name):
        return getattr(self._trainer, name)


class _Shown(dict):
    """`teacher_log_p` is there when it is asked for the first time: by the student's loss."""

    asked = 0

    def __contains__(self, name):
        if name != "teacher_log_p":
            return super().__contains__(name)
        self.asked += 1
        return self.asked == 1

    def __getitem__(self, name):
        return super().__getitem__("of_student" if name == "teacher_log_p" else name)


def test_the_gain_gradient_is_zero_where_the_shadow_is_the_student(tmp_path, teacher):
    trainer = small_trainer(tmp_path, teachers=[teacher], **FORMS["advantage"], **LOUD, max_steps=2)
    trainer.train()
    first, second = [entry["bridge/gain_grad_norm"] for entry in trainer.state.log_history if "loss" in entry]
    assert first < 1e-4 * second


def test_weight_zero_is_bridge_to_the_bit(tmp_path, teacher):
    ends = []
    for options in ({"teachers": [teacher], "teacher_weight": 0.0}, {}):
        trainer = small_trainer(tmp_path, **options)
        trainer.train()
        ends.append((dict(trainer.model.state_dict()), trainer.coordinator_state_dict(), trainer.shadow_state_dict()))
    assert_same(*ends)


def test_resume_is_exact(tmp_path, teacher):
    options = {"teachers": [teacher], "save_strategy": "steps", "save_steps": 1, "max_steps": 4, **FORMS["advantage"]}
    straight = small_trainer(tmp_path / "straight", **options)
    straight.train()
    small_trainer(tmp_path / "halves", callbacks=[StopAt(2)], **options).train()
    resumed = small_trainer(tmp_path / "halves", **options)
    resumed.train(resume_from_checkpoint=True)
    for part in ("theta_state_dict", "coordinator_state_dict", "shadow_state_dict"):
        assert_same(getattr(resumed, part)(), getattr(straight, part)())
    assert isinstance(resumed, BridgeTrainer) and torch.isfinite(
        torch.tensor(resumed.state.log_history[-2]["teacher/reverse_kl"])
    )

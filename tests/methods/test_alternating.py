"""Alternating phases through `trainer.train()`: updates in float64, which phase is when, what an SFT update skips."""

import pytest
from datasets import Dataset
from peft import LoraConfig
from trl import GRPOTrainer

from tests.helpers.resume import StopAt, assert_same
from tests.helpers.streams import (
    SGD,
    assert_is_grpo,
    assert_resumes,
    assert_split_makes_no_difference,
    logged,
    make,
    recording,
    replay,
    trained,
    weights_of,
)
from tests.helpers.training import rl_rows
from trl_bridge import AlternatingTrainer


RECORDING = recording(AlternatingTrainer)
LORA = LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", init_lora_weights=False)
# A generation batch lasts for two updates.
TWO = {"steps_per_generation": 4, "rl_steps": 2, "sft_steps": 2}
CASES = {
    "default, adamw": ({"max_steps": 4}, "srsr"),
    "rl first, sgd": ({"first": "rl", "max_steps": 4, **SGD}, "rsrs"),
    "ratio of three to one": ({"rl_steps": 3, "max_steps": 6}, "srrrsr"),
    "more sft than rl": ({"first": "rl", "sft_steps": 2, "max_steps": 5, **SGD}, "rssrs"),
    "two updates to a generation batch": ({**TWO, "max_steps": 7}, "ssrrssr"),
    "iterations": ({**TWO, "steps_per_generation": 2, "num_iterations": 2, "max_steps": 6, **SGD}, "ssrrss"),
    "generation within an update": (
        {"gradient_accumulation_steps": 4, "steps_per_generation": 2, "max_steps": 4}, "srsr"
    ),
    "weighting": ({"sft_weighting": "likelihood", "max_steps": 4, **SGD}, "srsr"),
}  # fmt: skip


def phases(trainer):
    return "".join("r" if window["rl"] else "s" for window in trainer.windows)


@pytest.mark.parametrize("name", CASES)
def test_updates_equal_reference(tmp_path, name):
    options, expected = CASES[name]
    trainer = trained(RECORDING, tmp_path, **options)
    assert phases(trainer) == expected
    assert all(bool(window["rl"]) != bool(window["sft"]) for window in trainer.windows)
    replay(trainer)
    assert logged(trainer, "alternating/rl_update") == [float(phase == "r") for phase in expected]
    assert len(logged(trainer, "rl/loss")) == expected.count("r")


def test_update_of_a_lora_student(tmp_path):
    trainer = trained(RECORDING, tmp_path, peft_config=LORA, max_steps=4, **SGD)
    assert all("lora_" in name for name in trainer.start)
    replay(trainer, peft_config=LORA)


@pytest.mark.parametrize("changes", [{}, {"steps_per_generation": 4}], ids=["plain", "two updates to a batch"])
def test_rl_updates_are_grpos_to_the_bit(tmp_path, changes):
    assert_is_grpo(
        AlternatingTrainer, tmp_path, changes={**changes, "max_steps": 4}, first="rl", rl_steps=4, sft_steps=2
    )


def test_an_rl_phase_starts_where_grpo_would(tmp_path):
    # The first RL phase of a longer run, at a constant rate.
    options = {"lr_scheduler_type": "constant", "max_steps": 5}
    grpo = trained(GRPOTrainer, tmp_path / "grpo", **{**options, "max_steps": 2})
    ours = trained(RECORDING, tmp_path / "ours", first="rl", rl_steps=2, padding_free=False, **options)
    assert phases(ours) == "rrsrr"
    assert_same(ours.states[1], weights_of(grpo))


def test_an_sft_update_generates_nothing(tmp_path, monkeypatch):
    calls = []
    generate = GRPOTrainer._generate

    def counted(self, *args, **kwargs):
        calls.append(self.state.global_step)
        return generate(self, *args, **kwargs)

    monkeypatch.setattr(GRPOTrainer, "_generate", counted)
    trainer = trained(AlternatingTrainer, tmp_path, max_steps=8, **TWO)
    assert calls == [2, 6]
    assert trainer._buffered_inputs is not None
    assert trained(AlternatingTrainer, tmp_path, max_steps=10, **TWO)._buffered_inputs is None


def test_sft_updates_leave_the_randomness_of_rollouts_alone(tmp_path):
    # At rate 0 one policy answers one prompt, however much SFT there was before.
    rollouts = []
    for sft_steps in (1, 3):
        options = {"sft_steps": sft_steps, "max_steps": sft_steps + 1, "learning_rate": 0.0}
        trainer = make(RECORDING, tmp_path / str(sft_steps), **options)
        trainer.train_dataset = Dataset.from_dict({"prompt": ["1+2="] * 16})
        trainer.train()
        rollouts.append([batch["completion_ids"] for batch in trainer.windows[-1]["rl"]])
    assert_same(rollouts[0], rollouts[1])


def test_evaluation_in_an_sft_phase(tmp_path):
    trainer = make(
        AlternatingTrainer, tmp_path, eval_dataset=rl_rows().select(range(4)), eval_strategy="steps", eval_steps=1,
        per_device_eval_batch_size=4,
    )  # fmt: skip
    trainer.train()
    assert len([entry for entry in trainer.state.log_history if "eval_reward" in entry]) == 3


def test_micro_batch_split_makes_no_difference(tmp_path):
    assert_split_makes_no_difference(AlternatingTrainer, tmp_path)


@pytest.mark.parametrize("stop", [1, 3, 4], ids=["in sft", "in rl, between two updates of a batch", "at the border"])
def test_stop_and_resume(tmp_path, stop):
    assert_resumes(AlternatingTrainer, tmp_path, (stop,), max_steps=6, **TWO)


def test_resume_with_other_phases_is_refused(tmp_path):
    options = {"save_strategy": "steps", "save_steps": 1, "max_steps": 3}
    trained(AlternatingTrainer, tmp_path, callbacks=[StopAt(1)], **options)
    for name, value in (("rl_steps", 2), ("sft_steps", 2), ("first", "rl")):
        with pytest.raises(ValueError, match=f"resume_from_checkpoint.*`{name}`"):
            make(AlternatingTrainer, tmp_path, **options, **{name: value}).train(resume_from_checkpoint=True)

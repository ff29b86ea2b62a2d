"""Nothing lost: training 2N updates equals N, a stop, a resume, and N more, bit for bit."""

import json
import logging
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM
from trl import GRPOConfig, GRPOTrainer

from tests.helpers import engines
from tests.helpers.resume import (
    StopAt,
    assert_same,
    assert_shadow_is_that_of,
    metrics_of,
    saving_options,
    saving_trainer,
    state_of,
)
from tests.helpers.training import movement_error, rl_rows, sft_rows, small_config, small_lora, small_trainer
from trl_bridge.training.checkpoint import folder as checkpoints


CASES = {
    # 16 prompts and 4 of them an update: an RL epoch ends after update 4; 16 demonstrations and 6 an update.
    "before any boundary": ({}, 2),
    "after an epoch of demonstrations": ({}, 3),
    "at an RL epoch's end": ({}, 4),
    "in the second RL epoch": ({}, 5),
    "inside a generation batch": ({"num_iterations": 2, "steps_per_generation": 4}, 3),
    "gain off": ({"cooperative_gain": False}, 3),
    "reset of the shadow": ({"shadow_reset_steps": 2}, 3),
    "part of the rollouts": ({"shadow_rollout_fraction": 0.5, "num_iterations": 2, "steps_per_generation": 4}, 3),
    "between the shadow's updates": ({"shadow_update_steps": 3}, 4),
    "shadow in bf16, offloaded": ({"shadow_dtype": "bfloat16", "shadow_offload": True, "max_steps": 5}, 2),
    "before the shadow's first update": ({"shadow_update_steps": 3, "max_steps": 5}, 2),
    "pairing": ({"sft_pairing": "prompt", "steps_per_generation": 4}, 3),
    "likelihood": ({"sft_weighting": "likelihood"}, 3),
    "judge and verdict": ({"sft_weighting": "judge_verdict", "judge_window": 3, "success_threshold": 1.0}, 4),
    "adaptive entropy": ({"use_adaptive_entropy": True, "entropy_target": 4.0, "entropy_coef": 0.01}, 3),
    "metrics between logs": ({"logging_steps": 2}, 3),
}


@pytest.mark.parametrize("name", CASES)
def test_resume_is_exact(tmp_path, name):
    changes, stop = CASES[name]
    straight = saving_trainer(tmp_path / "straight", **changes)
    straight.train()
    saving_trainer(tmp_path / "halves", callbacks=[StopAt(stop)], **changes).train()
    resumed = saving_trainer(tmp_path / "halves", **changes)
    resumed.train(resume_from_checkpoint=str(tmp_path / "halves" / f"checkpoint-{stop}"))
    assert_same(state_of(resumed), state_of(straight))
    if changes.get("logging_steps") != 2:  # transformers forgets the losses since the last log
        assert_same(metrics_of(resumed, stop), metrics_of(straight, stop))
    else:
        for got, want in zip(metrics_of(resumed, stop), metrics_of(straight, stop), strict=True):
            assert_same({k: v for k, v in got.items() if k != "loss"}, {k: v for k, v in want.items() if k != "loss"})


KILLED_RUN = """
import sys
from tests.helpers.resume import saving_trainer
saving_trainer(sys.argv[1], logging_steps=1).train()
"""


def test_resume_after_sigkill(tmp_path):
    straight = saving_trainer(tmp_path / "straight")
    straight.train()
    folder = tmp_path / "killed"
    root = Path(__file__).parents[3]
    environment = {**os.environ, "PYTHONPATH": str(root)}
    process = subprocess.Popen([sys.executable, "-c", KILLED_RUN, str(folder)], env=environment, cwd=root)
    while process.poll() is None and not (folder / "checkpoint-3" / "bridge" / "shared.pt").exists():
        pass
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    resumed = saving_trainer(folder)
    resumed.train(resume_from_checkpoint=True)
    assert_same(state_of(resumed), state_of(straight))


def test_an_update_that_the_shadow_has_cut_off_is_not_resumed(tmp_path):
    straight = saving_trainer(tmp_path / "straight", max_steps=4)
    straight.train()
    cut = saving_trainer(tmp_path / "cut", max_steps=4, save_steps=2)
    run = cut._run_shadow

    def failing(batch):
        if cut.state.global_step == 3:
            raise MemoryError
        run(batch)

    # Theta has stepped then, and w has not.
    cut._run_shadow = failing
    with pytest.raises(MemoryError):
        cut.train()
    cut._save_checkpoint(cut.model, trial=None)
    cut._sealing.wait()
    assert (tmp_path / "cut" / "checkpoint-3").exists()
    cut._run_shadow = run
    cut.train(resume_from_checkpoint=True)
    assert_same(state_of(cut), state_of(straight))


def test_unfinished_checkpoint_is_passed_over(tmp_path, caplog, monkeypatch):
    saving_trainer(tmp_path, max_steps=3).train()
    (tmp_path / "checkpoint-3" / "bridge" / "complete.json").unlink()
    resumed = saving_trainer(tmp_path, max_steps=4)
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    monkeypatch.setattr(logging.getLogger("trl_bridge"), "propagate", True)
    with caplog.at_level("WARNING"):
        resumed.train(resume_from_checkpoint=True)
    assert resumed.state.global_step == 4
    assert "Passing over" in caplog.text and "checkpoint-3" in caplog.text


@pytest.mark.parametrize(
    "part", ["bridge", "bridge/complete.json", "bridge/shared.pt", "bridge/rank-0.pt",
             "bridge/shadow/rows-0.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth",
             "trainer_state.json", "model.safetensors"],
)  # fmt: skip
def test_checkpoint_that_lacks_a_part_is_refused(tmp_path, finished_run, part):
    folder = tmp_path / "checkpoint-2"
    shutil.copytree(finished_run / "checkpoint-2", folder)
    lost = folder / part
    shutil.rmtree(lost) if lost.is_dir() else lost.unlink()
    named = "complete.json" if part == "bridge" else part
    with pytest.raises(ValueError, match=f"resume_from_checkpoint.*{named}"):
        saving_trainer(tmp_path, max_steps=3).train(resume_from_checkpoint=str(folder))


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("cooperative_gain", {"cooperative_gain": False}),
        ("peft_config", {"peft_config": small_lora(r=2)}),
        ("sft_dataset", {"sft_dataset": sft_rows().select(range(9))}),
        ("seed", {"seed": 12}),
        ("shadow_optim", {"shadow_optim": "sgd"}),
        ("shadow_reset_steps", {"shadow_reset_steps": 3}),
        ("shadow_dtype", {"shadow_dtype": "bfloat16"}),
        ("shadow_offload", {"shadow_offload": True}),
        ("shadow_rollout_fraction", {"shadow_rollout_fraction": 0.5}),
        ("shadow_update_steps", {"shadow_update_steps": 2}),
        ("sft_weighting", {"sft_weighting": "phi"}),
        ("num_iterations", {"num_iterations": 2}),
        ("per_device_train_batch_size x gradient_accumulation_steps x ranks", {"gradient_accumulation_steps": 4}),
        ("per_device_train_batch_size x steps_per_generation x ranks", {"steps_per_generation": 4}),
        (
            "sft_per_device_train_batch_size x gradient_accumulation_steps x ranks",
            {"sft_per_device_train_batch_size": 2},
        ),
    ],
)
def test_checkpoint_of_other_options_is_refused(tmp_path, finished_run, name, changes):
    before = sorted(p.name for p in finished_run.iterdir())
    trainer = saving_trainer(finished_run, **{"max_steps": 3, **changes})
    with pytest.raises(ValueError, match=f"resume_from_checkpoint.*`{name}`"):
        trainer.train(resume_from_checkpoint=str(finished_run / "checkpoint-2"))
    assert sorted(p.name for p in finished_run.iterdir()) == before


def test_smaller_micro_batches_go_on_with_the_same_rollouts(tmp_path):
    # From inside a generation batch, which is cut anew, into the next one.
    late = {"num_iterations": 2, "max_steps": 5, "sft_pairing": "independent"}
    straight = saving_trainer(tmp_path, steps_per_generation=4, sft_per_device_train_batch_size=4, **late)
    straight.train()
    cut = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 4, "steps_per_generation": 8}
    resumed = saving_trainer(tmp_path / "cut", sft_per_device_train_batch_size=2, **late, **cut)
    start = {"theta": resumed.theta_state_dict(), "hat": resumed.shadow_state_dict()}
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert resumed.demonstrations.state_dict() == straight.demonstrations.state_dict()
    for part, method in (("theta", "theta_state_dict"), ("hat", "shadow_state_dict")):
        got, want = (getattr(trainer, method)() for trainer in (resumed, straight))
        assert movement_error(got, want, start[part]) < 2e-4, part


def test_checkpoint_of_another_way_of_training_is_refused(tmp_path, finished_run, monkeypatch):
    trainer = saving_trainer(tmp_path, max_steps=3)
    monkeypatch.setattr(type(trainer.backend), "checkpoint_kind", "FSDP2")
    with pytest.raises(ValueError, match="`backend` was 'one process or DDP', now 'FSDP2'"):
        trainer.train(resume_from_checkpoint=str(finished_run / "checkpoint-2"))


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("shadow_overlap", engines.OPTIONS | {"shadow_overlap": True}),
        ("adamw_bnb_8bit", {"shadow_optim": "adamw_bnb_8bit"}),
    ],
)
def test_options_that_are_bound_to_the_number_of_ranks(tmp_path, finished_run, monkeypatch, name, changes):
    trainer = saving_trainer(tmp_path)
    assert trainer.saved.only_same_ranks is None
    engines.serve(monkeypatch.setattr)
    trainer.args = small_config(tmp_path, **saving_options(**changes))
    assert name in trainer.saved.only_same_ranks
    with pytest.raises(ValueError, match=f"written by 1 ranks, and this run has 2: .*{name}.*Resume on 1"):
        checkpoints.check(finished_run / "checkpoint-2", {}, {"world_size": 2}, trainer.saved.only_same_ranks)


def test_checkpoint_of_plain_grpo_is_refused(tmp_path):
    args = small_config(tmp_path / "grpo", GRPOConfig, max_steps=1, save_strategy="steps", save_steps=1)
    small_trainer(tmp_path, GRPOTrainer, args=args).train()
    with pytest.raises(ValueError, match="resume_from_checkpoint.*bridge"):
        saving_trainer(tmp_path).train(resume_from_checkpoint=str(tmp_path / "grpo" / "checkpoint-1"))


@pytest.fixture(scope="module")
def finished_run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("finished")
    saving_trainer(folder, max_steps=2).train()
    return folder


def test_top_of_a_checkpoint_is_the_plain_policy(tmp_path):
    trainer = saving_trainer(tmp_path, max_steps=2, save_total_limit=1)
    trainer.train()
    assert [p.name for p in tmp_path.glob("checkpoint-*")] == ["checkpoint-2"]
    trainer.save_model(str(tmp_path / "final"))
    for folder in (tmp_path / "checkpoint-2", tmp_path / "final"):
        # As a user without this package would: in a process of its own, with transformers alone.
        loaded = AutoModelForCausalLM.from_pretrained(folder)
        assert type(loaded).__module__.startswith("transformers.")
        assert_same(dict(loaded.state_dict()), dict(trainer.model.state_dict()))
    assert not list((tmp_path / "final").glob("adapter*"))


def test_best_model_brings_back_its_own_coordinator_and_shadow(tmp_path):
    trainer = saving_trainer(
        tmp_path,
        max_steps=4,
        eval_dataset=rl_rows().select(range(4)),
        eval_strategy="steps",
        eval_steps=1,
        per_device_eval_batch_size=4,
        load_best_model_at_end=True,
        metric_for_best_model="eval_reward",
        greater_is_better=False,  # so that the best one is not the last
        learning_rate=5e-2,
    )
    trainer.train()
    best = Path(trainer.state.best_model_checkpoint)
    assert best.name != "checkpoint-4", "the last update was the best, so nothing was brought back"
    saved = torch.load(best / "bridge" / "shared.pt", weights_only=True)
    assert_same(trainer.coordinator_state_dict(), saved["coordinator"])
    assert_shadow_is_that_of(trainer, best)
    assert_same(dict(AutoModelForCausalLM.from_pretrained(best).state_dict()), dict(trainer.model.state_dict()))


def test_interrupted_save_leaves_the_previous_one(tmp_path, monkeypatch):
    trainer = saving_trainer(tmp_path, max_steps=2, save_total_limit=1)

    def cut_off(*args, **kwargs):
        raise KeyboardInterrupt

    saved = []

    def save_rng(output_dir):
        saved.append(output_dir)
        if len(saved) == 2:
            cut_off()
        return type(trainer)._save_rng_state(trainer, output_dir)

    monkeypatch.setattr(trainer, "_save_rng_state", save_rng)
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    assert (tmp_path / "checkpoint-1").is_dir() and (tmp_path / "checkpoint-2").is_dir()
    resumed = saving_trainer(tmp_path, max_steps=2)
    resumed.train(resume_from_checkpoint=True)
    straight = saving_trainer(tmp_path / "straight", max_steps=2)
    straight.train()
    assert_same(state_of(resumed), state_of(straight))


def test_saved_coordinator_is_a_peft_adapter(tmp_path):
    from peft import PeftConfig, load_peft_weights

    trainer = saving_trainer(tmp_path, max_steps=1)
    trainer.train()
    trainer.save_coordinator(tmp_path / "w")
    assert PeftConfig.from_pretrained(str(tmp_path / "w")).r == 4
    assert_same(load_peft_weights(str(tmp_path / "w")), trainer.coordinator_state_dict())
    assert json.loads((tmp_path / "w" / "adapter_config.json").read_text())["peft_type"] == "LORA"


def test_a_finished_run_is_not_gone_on_with(tmp_path):
    done = saving_trainer(tmp_path, max_steps=2)
    done.train()
    again = saving_trainer(tmp_path, max_steps=2)
    again.train(resume_from_checkpoint=True)
    assert again.state.global_step == 2
    assert_same(state_of(again), state_of(done))

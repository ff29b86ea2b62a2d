"""The template itself."""

import math
import random

import pytest
import torch
from peft import LoraConfig
from transformers import TrainerCallback

from tests.helpers.resume import assert_same
from tests.helpers.streams import make, weights_of
from tests.helpers.training import (
    RecordingTrainer,
    digits_reward,
    rl_rows,
    sft_rows,
    small_config,
    small_model,
    small_trainer,
)
from trl_bridge import NaiveMixTrainer
from trl_bridge.models import tiny_tokenizer
from trl_bridge.training.stream import DemonstrationTrainer
from trl_bridge.training.stream_config import DemonstrationConfig


def test_a_window_cut_off_by_an_exception_leaves_nothing_behind(tmp_path):
    calls = []

    def failing(completions, **kwargs):
        calls.append(len(completions))
        if len(calls) == 2:
            raise RuntimeError("the verifier is down")
        return digits_reward(completions)

    # Two generations in a window: the second one fails between the window's two micro-batches.
    trainer = small_trainer(tmp_path, reward_funcs=failing, steps_per_generation=1, gradient_accumulation_steps=2)
    with pytest.raises(RuntimeError, match="verifier is down"):
        trainer.train()
    assert trainer._window is not None and trainer._window.micro_batch == 1
    trainer.train()
    assert trainer.state.global_step == 3 and trainer._window is None
    assert all(torch.isfinite(p).all() for p in trainer.model.parameters())


def test_an_update_that_clipping_has_cut_off_is_not_resumed(tmp_path, monkeypatch):
    options = {"save_strategy": "steps", "save_steps": 2, "max_steps": 4}
    straight = make(NaiveMixTrainer, tmp_path / "straight", **options)
    straight.train()
    cut = make(NaiveMixTrainer, tmp_path / "cut", **options)
    clip = cut.accelerator.clip_grad_norm_

    def failing(*args, **kwargs):
        if cut.state.global_step == 3:
            raise MemoryError
        return clip(*args, **kwargs)

    # The gradient is whole then, its demonstrations are drawn, and nothing has stepped.
    monkeypatch.setattr(cut.accelerator, "clip_grad_norm_", failing)
    with pytest.raises(MemoryError):
        cut.train()
    cut._save_checkpoint(cut.model, trial=None)
    cut._sealing.wait()
    assert (tmp_path / "cut" / "checkpoint-3").exists()
    monkeypatch.undo()
    cut.train(resume_from_checkpoint=True)
    assert_same(weights_of(cut), weights_of(straight))


def test_windows_without_a_demonstration(tmp_path):
    # Groups of rollouts are shuffled over two updates, so an update may hold the first rollout of none.
    for weighting in ("none", "likelihood", "verdict"):
        trainer = small_trainer(
            tmp_path / weighting,
            RecordingTrainer,
            sft_pairing="prompt",
            gradient_accumulation_steps=1,
            steps_per_generation=4,
            per_device_train_batch_size=2,
            num_generations=8,
            sft_weighting=weighting,
            max_steps=8,
        )
        trainer.train()
        counts = [sum(int((b["labels"] != -100).sum()) for b in window["sft"]) for window in trainer.windows]
        assert 0 in counts and max(counts) > 0
        entries = [e for e in trainer.state.log_history if "loss" in e]
        assert all(math.isfinite(e["loss"]) for e in entries)
        assert ["sft/loss" in e for e in entries] == [count > 0 for count in counts]


def test_epoch_of_an_iterable_dataset_that_ends_inside_a_window(tmp_path):
    rows = rl_rows().select(range(10)).to_iterable_dataset()
    trainer = small_trainer(
        tmp_path,
        train_dataset=rows,
        gradient_accumulation_steps=4,
        steps_per_generation=1,
        per_device_train_batch_size=4,
        max_steps=4,
    )
    trainer.train()
    assert trainer.state.global_step == 4
    assert all(torch.isfinite(p).all() for p in trainer.model.parameters())


def test_reference_of_a_model_object_has_no_dropout(tmp_path):
    model = small_model(attention_dropout=0.3).train()
    trainer = small_trainer(tmp_path, model=model, beta=0.1)
    assert not trainer.ref_model.training
    ids = torch.arange(12).reshape(2, 6)
    assert torch.equal(trainer.ref_model(ids).logits, trainer.ref_model(ids).logits)


def test_verdicts_do_not_change_the_rollouts(tmp_path):
    def drawing(completions, **kwargs):
        torch.rand(1)
        random.random()
        return digits_reward(completions)

    rollouts = []
    for weighting in ("none", "verdict"):
        trainer = small_trainer(
            tmp_path / weighting,
            RecordingTrainer,
            reward_funcs=drawing,
            sft_weighting=weighting,
            bridge_lambda=1.0,
            cooperative_gain=False,
            coordinator_learning_rate=0.0,
        )
        trainer.train()
        rollouts.append([b["completion_ids"] for window in trainer.windows for b in window["rl"]])
    assert all(torch.equal(x, y) for x, y in zip(*rollouts, strict=True))


def test_unscorable_demonstrations_have_no_verdict(tmp_path):
    def silent_on_demonstrations(prompts, completions, **kwargs):
        known = set(sft_rows()["completion"])
        return [None if text in known else float(len(text)) for text in completions]

    trainer = small_trainer(
        tmp_path, reward_funcs=silent_on_demonstrations, sft_weighting="verdict", max_steps=1, logging_steps=1
    )
    trainer.train()
    assert not len(trainer.weighting.state_dict()["verdicts"])
    entry = next(e for e in trainer.state.log_history if "loss" in e)
    assert entry["sft/weight_mean"] > 0.4  # the prior, not "wrong"


class SaveInside(TrainerCallback):
    """What a time limit does: save and stop between two micro-batches of an update."""

    def on_substep_end(self, args, state, control, **kwargs):
        if state.global_step == 2:
            control.should_save = control.should_training_stop = True


def test_checkpoint_inside_an_update_is_not_whole(tmp_path):
    options = {"max_steps": 4, "save_strategy": "steps", "save_steps": 1}
    small_trainer(tmp_path, callbacks=[SaveInside()], **options).train()
    with pytest.raises(ValueError, match="resume_from_checkpoint"):
        small_trainer(tmp_path, **options).train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))


@pytest.mark.parametrize("event", ["on_pre_optimizer_step", "on_optimizer_step"])
def test_checkpoint_between_a_step_and_its_count_is_not_whole(tmp_path, event):
    def save(args, state, control, **kwargs):
        if state.global_step == 2:
            trainer._save_checkpoint(trainer.model, trial=None)
            control.should_training_stop = True

    callback = TrainerCallback()
    setattr(callback, event, save)
    trainer = small_trainer(tmp_path, max_steps=4, callbacks=[callback])
    trainer.train()
    assert trainer.state.global_step == 3 and (tmp_path / "checkpoint-2" / "optimizer.pt").exists()
    with pytest.raises(ValueError, match="resume_from_checkpoint"):
        small_trainer(tmp_path, max_steps=4).train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))


def test_resume_in_the_same_process_after_an_interruption(tmp_path):
    options = {"max_steps": 4, "save_strategy": "steps", "save_steps": 1, "sft_weighting": "likelihood"}
    straight = small_trainer(tmp_path / "straight", **options)
    straight.train()

    class Interrupt(TrainerCallback):
        done = False

        def on_substep_end(self, args, state, control, **kwargs):
            if state.global_step == 2 and not self.done:
                self.done = True
                raise KeyboardInterrupt

    trainer = small_trainer(tmp_path / "cut", callbacks=[Interrupt()], **options)
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    trainer.train(resume_from_checkpoint=True)
    want = dict(straight.model.named_parameters())
    assert all(torch.equal(p, want[n]) for n, p in trainer.model.named_parameters())


def test_scheduler_without_an_initial_rate_is_refused(tmp_path):
    model = small_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    plateau = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer)
    trainer = small_trainer(tmp_path, model=model, optimizers=(optimizer, plateau))
    with pytest.raises(ValueError, match="`optimizers`"):
        trainer.train()


def test_a_peft_student_gets_the_demonstration_head(tmp_path):
    # The baselines train an adapter where `peft_config` is given.
    args = small_config(tmp_path, DemonstrationConfig)
    trainer = DemonstrationTrainer(
        model=small_model(),
        reward_funcs=digits_reward,
        args=args,
        train_dataset=rl_rows(),
        sft_dataset=sft_rows(),
        processing_class=tiny_tokenizer(),
        peft_config=LoraConfig(r=2, target_modules="all-linear"),
    )
    trainer.train()
    assert trainer.state.global_step == 3

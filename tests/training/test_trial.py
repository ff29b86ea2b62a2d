"""A trial before RL: its updates in float64, what decides, what is left when it is refused, what is not repeated, and refusals."""

import random

import pytest
import torch
from accelerate.utils import DistributedType
from datasets import Dataset
from transformers import TrainerCallback

from tests.helpers import engines, streams
from tests.helpers.resume import StopAt, assert_same, metrics_of
from tests.helpers.streams import make, weights_of
from tests.helpers.tools import agent_trainer
from tests.helpers.training import (
    digits_reward,
    movement_error,
    rl_rows,
    sft_rows,
    small_config,
    small_model,
    small_trainer,
)
from tests.helpers.trials import FALLING, RISING, TRIAL, paying
from trl_bridge import AlternatingTrainer, BridgeTrainer, CHORDTrainer, NaiveMixTrainer
from trl_bridge.models import tiny_tokenizer
from trl_bridge.selftest.reference.stream import StreamReference
from trl_bridge.training import trial
from trl_bridge.training.trial import Outcome, try_out, verify


LEAN = {"lean": True, "lean_lora_r": 6}


# The rule


@pytest.mark.parametrize(
    ("rewards", "tolerance", "kept", "best"),
    [
        ([0.5, 0.6, 0.55, 0.58], 0.0, 2, 0.6),  # the best point, not the last
        ([0.5, 0.1, 0.2, 0.7], 0.0, 6, 0.7),  # through a valley
        ([0.5, 0.4, 0.3, 0.49], 0.005, 0, 0.5),  # refused
        ([0.5, 0.496, 0.4, 0.3], 0.005, 2, 0.496),  # paid as well, within the tolerance
        ([0.5, 0.496, 0.4955, 0.3], 0.005, 2, 0.496),  # which is below the policy, and no slope
        ([0.5, 0.5, 0.5, 0.5], 0.0, 6, 0.5),  # the latest of equals
    ],
)
def test_what_is_kept(rewards, tolerance, kept, best):
    weights = {"a": torch.tensor([1.0, 2.0])}
    answers = iter(rewards)
    outcome = try_out(
        lambda: weights, lambda: weights["a"].add_(1), lambda: next(answers), steps=6, every=2, tolerance=tolerance
    )
    assert outcome == Outcome(0.5, best, kept, 4)
    assert torch.equal(weights["a"], torch.tensor([1.0, 2.0]) + kept)


def test_the_last_update_is_measured_too():
    weights, answers = {"a": torch.zeros(1)}, iter([0.0, 0.1, 0.2])
    outcome = try_out(
        lambda: weights, lambda: weights["a"].add_(1), lambda: next(answers), steps=5, every=3, tolerance=0.0
    )
    assert outcome.kept == 5 and weights["a"].item() == 5


def test_an_exception_leaves_the_weights_as_they_were():
    weights, answers = {"a": torch.zeros(1)}, iter([0.0, 0.5])
    with pytest.raises(StopIteration):
        try_out(lambda: weights, lambda: weights["a"].add_(1), lambda: next(answers), steps=4, every=2, tolerance=0.0)
    assert weights["a"].item() == 0


# The verdicts


class Asked:
    """The reward functions, told who is right, flipping one answer in five; and how often each was asked."""

    def __init__(self, flip=0.0, silent=()):
        self.draw, self.flip, self.silent, self.calls = random.Random(0), flip, silent, {}

    def __call__(self, examples, filler):
        prompts = [example["prompt"] for example in examples]
        assert len(set(prompts)) == len(prompts)  # copies in one call may have one opinion
        return [self.reward(int(example["prompt"].partition("+")[0])) for example in examples]

    def reward(self, row):
        self.calls[row] = self.calls.get(row, 0) + 1
        right = row % 2 == 0
        return float("nan") if row in self.silent else float(right != (self.draw.random() < self.flip))


def judged(tmp_path, asked, size=60, at_once=7):
    rows = Dataset.from_dict({"prompt": [f"{i}+1=" for i in range(size)], "completion": ["7"] * size})
    args = small_config(tmp_path, NaiveMixTrainer.config_class)
    trainer = NaiveMixTrainer(
        model=small_model(), reward_funcs=digits_reward, args=args, train_dataset=rl_rows(), sft_dataset=rows,
        processing_class=tiny_tokenizer(),
    )  # fmt: skip
    options = {"rank": 0, "world_size": 1, "at_once": at_once, "success_threshold": 1.0}
    return verify(asked, trainer.demonstrations, list(range(size)), **options)


def test_a_verifier_that_agrees_with_itself_is_asked_three_times(tmp_path):
    asked = Asked(silent=(4, 5))
    chances, calls = judged(tmp_path, asked)
    assert set(asked.calls.values()) == {3} and calls == 3 * 58
    assert set(chances) == set(range(60)) - {4, 5}  # what nobody can score has no verdict
    assert all((chance > 0.99) == (index % 2 == 0) and not 0.01 < chance < 0.99 for index, chance in chances.items())


def test_a_noisy_verifier_is_asked_again_where_in_doubt(tmp_path):
    asked = Asked(flip=0.2)
    chances, calls = judged(tmp_path, asked)
    assert calls == sum(asked.calls.values()) and min(asked.calls.values()) == 3 < max(asked.calls.values()) <= 11
    wrong = sum(chance for index, chance in chances.items() if index % 2)
    right = sum(chance for index, chance in chances.items() if index % 2 == 0)
    assert right > 27 and wrong < 3  # of 30 each; three calls alone leave 0.17 of a wrong one on average


# Its updates


@pytest.mark.parametrize(
    "changes", [{}, {"gradient_accumulation_steps": 1, "max_grad_norm": 0.05}, streams.SGD], ids=str
)
def test_updates_are_those_of_the_reference(tmp_path, monkeypatch, changes):
    chances = {index: 0.1 + 0.05 * index for index in range(16)}
    monkeypatch.setattr(trial, "verify", lambda *args, **kwargs: (chances, 48))
    trainer = make(paying(NaiveMixTrainer, FALLING), tmp_path, **TRIAL, trial_learning_rate_factor=2.0, **changes)
    trainer.train()
    args = trainer.args
    options = {
        "optim": "sgd" if args.optim == "sgd" else "adamw", "lr": 2 * args.learning_rate, "max_grad_norm": args.max_grad_norm,
        "schedule": lambda step: 1.0, "sft_weight": lambda step: 1.0, "token_weight": lambda p: torch.ones_like(p),
    }  # fmt: skip
    reference = StreamReference(small_model(), trainer.before, options)
    count = 3 * args.gradient_accumulation_steps
    assert [len(drawn) for drawn in trainer.drawn] == [count] * 4
    assert len({index for drawn in trainer.drawn for index in drawn}) > count  # of all, not the same ones
    for drawn, got in zip(trainer.drawn, trainer.after, strict=True):
        weights = torch.tensor([[chances[index]] for index in drawn])
        reference.update(0, [], [trainer.demonstrations.batch(drawn)], [weights])
        assert movement_error(got, reference.weights, trainer.before) < streams.TOLERANCE


def test_only_what_is_right_is_learnt_from(tmp_path):
    def even(prompts, completions, **kwargs):
        return [float((int(p[0]) + int(p[2])) % 2 == 0) for p in prompts]

    trainer = small_trainer(tmp_path, paying(BridgeTrainer, FALLING), reward_funcs=even, **TRIAL)
    trainer.train()
    rows = {row for drawn in trainer.drawn for row in trainer.demonstrations.rows(drawn)}
    assert rows and all((row // 4 + row % 4) % 2 == 0 for row in rows)


# What is left of it


@pytest.mark.parametrize(
    ("trainer_class", "changes"),
    [
        (NaiveMixTrainer, {}),
        (CHORDTrainer, {}),
        (AlternatingTrainer, {}),
        (BridgeTrainer, {}),
        (BridgeTrainer, {"preset": "selective"}),
        (BridgeTrainer, {**LEAN, "weight_decay": 0.1}),
    ],
    ids=lambda value: getattr(value, "__name__", None) or ",".join(value),
)
def test_refused_nothing_has_happened(tmp_path, trainer_class, changes):
    def build(name, kind, **options):
        folder, options = tmp_path / name, {**changes, **options}
        return (
            small_trainer(folder, kind, **options) if trainer_class is BridgeTrainer else make(kind, folder, **options)
        )

    plain = build("plain", trainer_class)
    plain.train()
    tried = build("tried", paying(trainer_class, FALLING), **TRIAL)
    tried.train()
    assert len(tried.after) == 4 and len(tried.measured) == 3
    assert any(not torch.equal(tried.after[-1][name], weight) for name, weight in tried.before.items())
    assert_same(weights_of(tried), weights_of(plain))

    def told(trainer):
        return [{k: v for k, v in entry.items() if k != "num_tokens"} for entry in metrics_of(trainer, 0)]

    assert_same(told(tried), told(plain))  # but for the tokens, which are counted
    tokens = [max(entry.get("num_tokens", 0) for entry in metrics_of(trainer, 0)) for trainer in (tried, plain)]
    assert tokens[0] > tokens[1]


@pytest.mark.parametrize("lean", [False, True])
def test_kept_it_is_where_theta_and_the_shadow_start(tmp_path, lean):
    class Watched(paying(BridgeTrainer, RISING)):
        def _tried(self):
            self.coordinator_before, self.theta_before = self.coordinator_state_dict(), self.theta_state_dict()
            return super()._tried()

        def policy_pass(self, model, inputs):
            if self.state.global_step == 0:
                self.started = [self.coordinator_state_dict(), self.theta_state_dict(), self.shadow_state_dict()]
                self.at_start = weights_of(self)
            return super().policy_pass(model, inputs)

    trainer = small_trainer(tmp_path, Watched, **TRIAL, **(LEAN if lean else {}))
    trainer.train()
    assert_same(trainer.at_start, trainer.after[-1])
    w, theta, hat = trainer.started
    assert_same(w, trainer.coordinator_before)
    assert_same(hat, theta)
    assert any(not torch.equal(theta[name], before) for name, before in trainer.theta_before.items())
    if lean:  # the student's slices of w are where they were
        moved = {n: (trainer.at_start[n] - before).abs() for n, before in trainer.before.items()}
        assert all(m[6:].max() == 0 for n, m in moved.items() if "lora_A" in n)
        assert all(m[:, 6:].max() == 0 for n, m in moved.items() if "lora_B" in n)


def test_the_best_point_is_where_rl_starts(tmp_path):
    class Watched(paying(NaiveMixTrainer, [0.1, 0.3, 0.2])):
        def policy_loss(self, model, inputs):
            self.at_start = weights_of(self)
            return super().policy_loss(model, inputs)

    trainer = make(Watched, tmp_path, **TRIAL, max_steps=1, gradient_accumulation_steps=1)
    trainer.train()
    assert_same(trainer.at_start, trainer.after[1])


def test_its_costs_are_logged(tmp_path):
    trainer = make(paying(NaiveMixTrainer, RISING), tmp_path, **TRIAL)
    trainer.train()
    entry = trainer.state.log_history[0]
    # Two generation batches of 2 groups make the 3 prompts 4; three measurements of 4 prompts x 4.
    assert {name.removeprefix("trial/"): entry[name] for name in entry if name.startswith("trial/")} == {
        "demonstrations": 16, "verdicts": 48, "sft_steps": 4, "kept_steps": 4, "rollouts": 48, "reward_before": 0.1, "reward": 0.3,
    }  # fmt: skip
    assert entry["step"] == 0


def test_nothing_is_tried_where_nothing_is_right(tmp_path):
    # Sums of one digit, of which two are asked for.
    trainer = small_trainer(tmp_path, paying(BridgeTrainer, RISING), success_threshold=2.0, **TRIAL)
    trainer.train()
    entry = trainer.state.log_history[0]
    assert not trainer.measured and not trainer.drawn
    assert (entry["trial/demonstrations"], entry["trial/rollouts"], entry["trial/verdicts"]) == (0, 0, 48)


def test_every_measurement_has_the_weights_of_now_in_vllm(tmp_path, monkeypatch):
    monkeypatch.setattr("trl.trainer.grpo_trainer.VLLMGeneration", engines.Engine)
    trainer = make(
        paying(NaiveMixTrainer, RISING), tmp_path, **TRIAL, use_vllm=True, vllm_mode="server", max_steps=2,
        vllm_importance_sampling_correction=False,
    )  # fmt: skip
    trainer.train()
    assert trainer.vllm_generation.syncs == 3 + 2


# What it takes


def test_its_rollouts_are_taken_off_the_end(tmp_path):
    # Three measurements of one generation batch of four groups, which lasts for two updates: six updates' worth.
    options = {**TRIAL, "trial_takes_updates": True, "max_steps": 9, "steps_per_generation": 2}
    trainer = make(paying(NaiveMixTrainer, RISING), tmp_path, gradient_accumulation_steps=1, **options)
    trainer.train()
    sampled = trainer.state.log_history[0]["trial/rollouts"]
    assert sampled == 3 * trainer.args.generation_batch_size and trainer.state.global_step == 9 - 6
    # The schedule is that of all.
    rates = [entry["learning_rate"] for entry in trainer.state.log_history if "learning_rate" in entry]
    assert rates == pytest.approx([trainer.args.learning_rate * (1 - step / 9) for step in range(3)])


def test_where_nothing_is_tried_nothing_is_taken(tmp_path):
    options = {**TRIAL, "trial_takes_updates": True, "max_steps": 8, "success_threshold": 2.0}
    trainer = small_trainer(tmp_path, paying(BridgeTrainer, RISING), **options)
    trainer.train()
    assert trainer.state.global_step == 8


def test_alternating_gives_whole_phases(tmp_path):
    options = {**TRIAL, "trial_takes_updates": True, "max_steps": 20, "rl_steps": 4, "sft_steps": 1}
    trainer = make(paying(AlternatingTrainer, RISING), tmp_path, gradient_accumulation_steps=1, **options)
    trainer.train()
    # Six generation batches are two phases of four updates, with the SFT update of each.
    assert trainer.state.global_step == 20 - 10


@pytest.mark.parametrize("length", [{"max_steps": 6}, {"max_steps": -1, "num_train_epochs": 0.5}])
def test_a_trial_that_leaves_no_update_is_refused(tmp_path, length):
    options = {**TRIAL, "trial_takes_updates": True, "gradient_accumulation_steps": 1, **length}
    trainer = make(paying(NaiveMixTrainer, RISING), tmp_path, **options)
    with pytest.raises(
        ValueError, match="`trial_takes_updates`: the 3 measurements of the trial take .* as 6 updates"
    ):
        trainer.train()
    assert not trainer.trials


# Stopped and resumed


def test_a_resumed_run_ends_where_it_would_have_ended(tmp_path):
    options = {**TRIAL, "trial_takes_updates": True, "max_steps": 9, "save_strategy": "steps", "save_steps": 1}
    options["gradient_accumulation_steps"] = 1
    straight = make(paying(NaiveMixTrainer, RISING), tmp_path / "straight", **options)
    straight.train()
    make(paying(NaiveMixTrainer, RISING), tmp_path / "stopped", callbacks=[StopAt(1)], **options).train()
    resumed = make(paying(NaiveMixTrainer, RISING), tmp_path / "stopped", **options)
    resumed.train(resume_from_checkpoint=True)
    assert resumed.state.global_step == straight.state.global_step == 3 and resumed.trials == 0
    assert_same(weights_of(resumed), weights_of(straight))


def test_a_resumed_run_does_not_try_again(tmp_path):
    trainer_class = paying(NaiveMixTrainer, RISING)
    options = {**TRIAL, "save_strategy": "steps", "save_steps": 1, "max_steps": 3}
    straight = make(trainer_class, tmp_path / "straight", **options)
    straight.train()
    make(trainer_class, tmp_path / "stopped", callbacks=[StopAt(1)], **options).train()
    resumed = make(trainer_class, tmp_path / "stopped", **options)
    resumed.train(resume_from_checkpoint=True)
    assert straight.trials == 1 and resumed.trials == 0
    assert_same(weights_of(resumed), weights_of(straight))
    assert resumed.state.log_history[0]["trial/kept_steps"] == 4
    with pytest.raises(ValueError, match="trial_steps"):
        make(trainer_class, tmp_path / "stopped", **{**options, "trial_steps": 5}).train(resume_from_checkpoint=True)


def test_a_run_cut_off_inside_its_trial_makes_it_again(tmp_path):
    class Cut(paying(NaiveMixTrainer, RISING)):
        cut = True

        def _paid(self, batches):
            if self.cut and len(self.measured) == 2:
                raise RuntimeError("killed")
            return super()._paid(batches)

    straight = make(paying(NaiveMixTrainer, RISING), tmp_path / "straight", **TRIAL)
    straight.train()
    trainer = make(Cut, tmp_path / "cut", **TRIAL)
    with pytest.raises(RuntimeError, match="killed"):
        trainer.train()
    again = make(paying(NaiveMixTrainer, RISING), tmp_path / "cut", **TRIAL)
    again.train()
    assert again.measured == straight.measured
    assert_same(weights_of(again), weights_of(straight))


# Presets and refusals


def test_the_preset(tmp_path):
    args = small_config(tmp_path, preset="trial")
    assert (args.trial_steps, args.cooperative_gain, args.sft_weighting) == (240, False, None)
    assert small_config(tmp_path, preset="trial", trial_steps=7).trial_steps == 7
    # Ten times theta's rate would undo what the trial has learnt.
    assert args.coordinator_rate == args.learning_rate
    assert small_config(tmp_path, preset="trial", coordinator_learning_rate=0.5).coordinator_rate == 0.5
    assert small_config(tmp_path, preset="selective").coordinator_rate == 10 * args.learning_rate
    assert small_config(tmp_path, preset="selective").trial_steps is None
    assert small_trainer(tmp_path, args=args).weighting.kind == "judge_verdict"


def needs_answer(completions, answer, **kwargs):
    return [float(text == given) for text, given in zip(completions, answer, strict=True)]


@pytest.mark.parametrize(
    ("error", "message", "changes"),
    [
        (ValueError, "lacks the columns that they need: 'answer'", {
            "reward_funcs": needs_answer, "train_dataset": rl_rows().add_column("answer", ["1"] * 16)}),
        (NotImplementedError, "an iterable one has not", {"train_dataset": rl_rows().to_iterable_dataset()}),
    ],
)  # fmt: skip
def test_what_cannot_judge_is_refused(tmp_path, error, message, changes):
    with pytest.raises(error, match=message):
        small_trainer(tmp_path, **TRIAL, **changes)


def test_environments_are_refused(tmp_path):
    class Environment:
        def reset(self, **kwargs):
            return None

        def add(self, a: int, b: int) -> str:
            """
            Add.

            Args:
                a: A number.
                b: Another.
            """
            return str(a + b)

    with pytest.raises(ValueError, match="which no environment has seen. Set it to None; .* take 'selective'"):
        agent_trainer(tmp_path, BridgeTrainer, environment_factory=Environment, **TRIAL)


def test_packing_is_compared_before_the_first_update_and_again_for_rl(tmp_path):
    events = []

    class Watched(paying(NaiveMixTrainer, RISING)):
        def _check_packing(self, inputs):
            events.append("compared")
            super()._check_packing(inputs)

        def before_trial_step(self):
            events.append("update")

        def policy_loss(self, model, inputs):
            events.append("rl")
            return super().policy_loss(model, inputs)

    trainer = make(Watched, tmp_path, **TRIAL, max_steps=1)
    trainer.train()
    assert trainer._packs and events[:2] == ["compared", "update"]
    assert events[events.index("rl") - 1] == "compared" and events.count("compared") == 2


def test_it_is_logged_once_trackers_are_set_up(tmp_path):
    class Tracker(TrainerCallback):
        logged = None

        def on_train_begin(self, args, state, control, **kwargs):
            self.logged = []

        def on_log(self, args, state, control, logs=None, **kwargs):
            self.logged.append(sorted(logs))

    tracker = Tracker()
    make(paying(NaiveMixTrainer, RISING), tmp_path, **TRIAL, callbacks=[tracker]).train()
    assert "trial/kept_steps" in tracker.logged[0] and "trial/kept_steps" not in tracker.logged[1]


def test_an_adapter_with_deepspeed_is_refused(tmp_path, monkeypatch):
    trainer = small_trainer(tmp_path, **LEAN)
    monkeypatch.setattr(type(trainer.accelerator), "distributed_type", DistributedType.DEEPSPEED)
    with pytest.raises(
        NotImplementedError, match="`trial_steps` of BridgeTrainer is not supported with DeepSpeed for a LoRA"
    ):
        trainer.set_up_trial(sft_rows())


def test_options_without_a_trial_are_refused(tmp_path):
    for name, value in (("trial_prompts", 8), ("trial_tolerance", 0.1), ("trial_eval_steps", 5)):
        with pytest.raises(ValueError, match=f"`{name}` has no effect without a trial"):
            small_config(tmp_path, **{name: value})


def test_rewards_that_score_no_demonstration_are_refused_before_rl(tmp_path):
    known = set(sft_rows()["completion"])

    def silent(completions, **kwargs):
        return [None if text in known else 1.0 for text in completions]

    with pytest.raises(ValueError, match="no reward function can score any demonstration"):
        small_trainer(tmp_path, reward_funcs=silent, **TRIAL).train()

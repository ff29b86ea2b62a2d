"""Dynamic sampling: which groups give way and to which, the update on what results, its bound, resuming, and refusals."""

import math
from collections import Counter

import pytest
import torch
from datasets import Dataset
from trl import GRPOConfig, GRPOTrainer

from tests.helpers import groups, streams, teachers
from tests.helpers.group_losses import luffy_loss
from tests.helpers.groups import batches, expert_rows, group_config, hint_rows, replay_group, trace_rows
from tests.helpers.resume import assert_same, metrics_of
from tests.helpers.streams import logged, options_of, weights_of
from tests.helpers.training import RecordingTrainer, movement_error, replay, rl_rows, sft_rows, small_lora, small_model
from trl_bridge import (
    ActGuideTrainer,
    AdaPrefixTrainer,
    BridgeTrainer,
    HPTTrainer,
    LUFFYTrainer,
    NaiveMixTrainer,
    PackedGRPOConfig,
    PackedGRPOTrainer,
    PrefixRFTTrainer,
    ReLIFTTrainer,
    SelfTeacherTrainer,
    SRFTConfig,
    UFTTrainer,
)
from trl_bridge.methods.self_teacher import SelfTeacherConfig
from trl_bridge.models import tiny_tokenizer
from trl_bridge.selftest.reference.stream import StreamReference
from trl_bridge.training.dynamic_sampling import FreshPrompts, alike, exchanged, moved_by_advantage


TOLERANCE = 2e-4
SGD = {"optim": "sgd", "learning_rate": 0.1}
ON = {"dynamic_sampling": True}


def has_signal(prompt):
    """Of half of the prompts `a+b=`."""
    return (int(prompt[0]) + int(prompt[2])) % 2 == 0


def picky(prompts, **kwargs):
    """0, 1, 2, 3 in groups with a signal, 1 in the others."""
    return [float(row % 4) if has_signal(prompt) else 1.0 for row, prompt in enumerate(prompts)]


def by_member(prompts, **kwargs):
    """A signal in every group."""
    return [float(row % 4) for row in range(len(prompts))]


class Watched:
    """A reward function, and the rollouts of each generation that it has seen: prompt, tokens, reward."""

    __name__ = "watched"

    def __init__(self, reward=picky):
        self.reward, self.calls = reward, []

    def __call__(self, prompts, completion_ids, **kwargs):
        rewards = self.reward(prompts=prompts, completion_ids=completion_ids, **kwargs)
        self.calls.append(list(zip(prompts, map(tuple, completion_ids), rewards, strict=True)))
        return rewards


def build(folder, trainer_class=PackedGRPOTrainer, **changes):
    names = ("reward_funcs", "train_dataset", "sft_dataset", "eval_dataset", "peft_config", "callbacks")
    kwargs = {name: changes.pop(name) for name in names if name in changes}
    kwargs = {"reward_funcs": picky, "train_dataset": rl_rows(), **kwargs}
    model = changes.pop("model", None) or small_model()
    args = group_config(folder, trainer_class.config_class, **changes)
    return trainer_class(model=model, args=args, processing_class=tiny_tokenizer(), **kwargs)


def trained(*args, **changes):
    trainer = build(*args, **changes)
    trainer.train()
    return trainer


def grouped(rows, size=4):
    return [rows[start : start + size] for start in range(0, len(rows), size)]


def is_dead(group):
    return len({reward for _, _, reward in group if reward is not None}) < 2


def expected(calls, times=3):
    """The groups that each generation batch ends with, and how many generations it took, from all that was generated."""
    left, found = iter(calls), []
    for first in left:
        batch, generations = grouped(first), 1
        while any(map(is_dead, batch)) and generations <= times:
            live = [group for group in grouped(next(left)) if not is_dead(group)]
            for place, group in enumerate(batch):
                if is_dead(group) and live:
                    batch[place] = live.pop(0)
            generations += 1
        found.append((batch, generations))
    return found


def advantage(group, reward):
    known = [other for _, _, other in group if other is not None]
    if reward is None or len(known) < 2:
        return 0.0
    mean = sum(known) / len(known)
    return (reward - mean) / (math.sqrt(sum((r - mean) ** 2 for r in known) / (len(known) - 1)) + 1e-4)


def rows_of(window):
    """What a window is trained on: prompt, tokens of the completion, advantage."""
    tokenizer, found = tiny_tokenizer(), []
    for batch in window:
        masks = zip(
            *(batch[f"{part}_{what}"] for part in ("prompt", "completion") for what in ("ids", "mask")), strict=True
        )
        for (prompt, there, completion, shown), value in zip(masks, batch["advantages"], strict=True):
            text = tokenizer.decode(prompt[there > 0])
            found.append((text, tuple(completion[shown > 0].tolist()), round(float(value), 3)))
    return Counter(found)


def replayed(trainer, model=None, **more):
    """Plain GRPO in float64 on the recorded rows; the errors after each update."""
    reference = StreamReference(model or small_model(), trainer.start, {**options_of(trainer), **more})
    errors = []
    for step, (window, state) in enumerate(zip(trainer.windows, trainer.states, strict=True)):
        reference.update(step, window["rl"], [], [])
        errors.append(movement_error(state, reference.weights, trainer.start))
    assert len(errors) == trainer.args.max_steps
    return errors


# Which groups give way


@pytest.mark.parametrize(
    "changes", [{}, {"loss_type": "grpo", "beta": 0.1, "padding_free": False}], ids=["", "padded"]
)
def test_groups_without_a_signal_give_way_in_order(tmp_path, changes):
    reward = Watched()
    trainer = trained(
        tmp_path, teachers.recording(PackedGRPOTrainer), reward_funcs=reward, max_steps=4, **ON, **SGD, **changes
    )
    batches_, generations = zip(*expected(reward.calls), strict=True)
    assert logged(trainer, "dynamic_sampling/generations") == list(generations) and 1 < max(generations) <= 4
    assert logged(trainer, "dynamic_sampling/dead_groups") == [sum(map(is_dead, batch)) for batch in batches_]
    for window, batch in zip(trainer.windows, batches_, strict=True):
        want = [(p, ids, round(advantage(group, r), 3)) for group in batch for p, ids, r in group]
        assert rows_of(window["rl"]) == Counter(want)
        # The count that DAPO's loss divides by is that of these rows.
        assert {int(inputs["num_items_in_batch"]) for inputs in window["rl"]} == {sum(len(ids) for _, ids, _ in want)}
    assert max(replayed(trainer)) < TOLERANCE
    # Rollouts of the run so far.
    total = [16 * sum(generations[: step + 1]) for step in range(4)]
    assert logged(trainer, "dynamic_sampling/rollouts") == total


def test_fresh_prompts_come_in_an_order_of_their_own(tmp_path):
    reward = Watched()
    trainer = trained(tmp_path, reward_funcs=reward, max_steps=4, **ON)
    first = [sum(map(int, logged(trainer, "dynamic_sampling/generations")[:step])) for step in range(4)]
    fresh = [call[::4] for number, call in enumerate(reward.calls) if number not in first]
    order = FreshPrompts(16, trainer.args.seed)
    want = [rl_rows()[number]["prompt"] for _ in fresh for number in order.draw(4)]
    assert [prompt for call in fresh for prompt, _, _ in call] == want
    assert len(fresh) > 4 or len(set(want)) == len(want)
    # The sampler goes on as if there were no others.
    plain = Watched()
    trained(tmp_path, reward_funcs=plain, max_steps=4)
    assert [[row[0] for row in reward.calls[number]] for number in first] == [
        [row[0] for row in call] for call in plain.calls
    ]


def test_it_is_bounded(tmp_path):
    reward = Watched(lambda prompts, **kwargs: [1.0] * len(prompts))
    trainer = build(tmp_path, reward_funcs=reward, max_steps=2, max_resample_times=2, weight_decay=0.0, **ON)
    start = weights_of(trainer)
    trainer.train()
    assert len(reward.calls) == 6
    assert logged(trainer, "dynamic_sampling/generations") == [3.0, 3.0]
    assert logged(trainer, "dynamic_sampling/dead_groups") == [4.0, 4.0]
    assert logged(trainer, "dynamic_sampling/rollouts") == [48, 96]
    assert_same(weights_of(trainer), start)


def test_rounding_is_no_signal(tmp_path):
    """TRL's advantages of seven equal rewards are not zero."""
    options = {
        "num_generations": 7,
        "per_device_train_batch_size": 14,
        "gradient_accumulation_steps": 1,
        "max_steps": 1,
    }
    constant = lambda prompts, **kwargs: [0.7] * len(prompts)  # noqa: E731
    plain = trained(tmp_path, teachers.recording(PackedGRPOTrainer), reward_funcs=constant, **options)
    assert plain.windows[0]["rl"][0]["advantages"].any()
    trainer = trained(tmp_path, teachers.recording(PackedGRPOTrainer), reward_funcs=constant, **options, **ON)
    assert logged(trainer, "dynamic_sampling/dead_groups") == [2.0]
    assert not trainer.windows[0]["rl"][0]["advantages"].any()


def test_rows_without_a_verdict_are_no_signal(tmp_path):
    """Groups that nobody could score, of which one rollout was scored, and of which several are."""
    known = {0: [], 1: [2], 2: [1, 2], 3: [0, 1, 2, 3]}
    reward = Watched(
        lambda prompts, **kwargs: [float(i % 4) if i % 4 in known[int(p[0])] else None for i, p in enumerate(prompts)]
    )
    trainer = trained(tmp_path, teachers.recording(PackedGRPOTrainer), reward_funcs=reward, **ON)
    batches_, generations = zip(*expected(reward.calls), strict=True)
    assert logged(trainer, "dynamic_sampling/generations") == list(generations)
    for window, batch in zip(trainer.windows, batches_, strict=True):
        want = [(p, ids, round(advantage(group, r), 3)) for group in batch for p, ids, r in group]
        assert rows_of(window["rl"]) == Counter(want)


def test_alike():
    nan = math.nan
    rewards = torch.tensor([[1.0, 1.0, 1.0], [1.0, 2.0, 1.0], [nan, 1.0, 1.0], [nan, nan, nan], [nan, 0.0, 1.0]])
    assert alike(rewards).tolist() == [True, False, True, True, False]


def test_masked_tokens_are_no_signal():
    batch = {"advantages": torch.tensor([1.0, 1.0, 0.0]), "completion_mask": torch.tensor([[1, 0], [0, 0], [1, 1]])}
    assert moved_by_advantage(batch).tolist() == [True, False, False]
    tokens = torch.tensor([[0.0, 1.0], [1.0, 1.0], [0.0, 1.0]])
    assert moved_by_advantage({**batch, "advantages": tokens}).tolist() == [False, False, True]


def test_rows_are_exchanged_whole():
    """Another width, a tensor that one side lacks, and advantages of rows beside those of tokens."""
    mine = {
        "prompt_ids": torch.tensor([[5, 1], [5, 2]]),
        "completion_ids": torch.tensor([[1], [2]]),
        "advantages": torch.tensor([0.5, 0.0]),
        "num_items_in_batch": torch.tensor(2),
    }
    fresh = {
        "prompt_ids": torch.tensor([[3], [4], [6]]),
        "completion_ids": torch.tensor([[7, 8], [8, 9], [9, 9]]),
        "advantages": torch.tensor([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]]),
        "guided": torch.tensor([False, True, True]),
    }
    got = exchanged(mine, fresh, {1: 2}, pad_token_id=99)
    want = {
        "prompt_ids": [[5, 1], [99, 6]], "completion_ids": [[1, 99], [9, 9]], "advantages": [[0.5, 0.0], [5.0, 6.0]],
        "guided": [False, True], "num_items_in_batch": 2,
    }  # fmt: skip
    assert {name: value.tolist() for name, value in got.items()} == want
    # The other way round.
    back = exchanged({**fresh, "num_items_in_batch": 3}, {n: v for n, v in mine.items() if v.dim()}, {0: 0}, 99)
    assert back["advantages"].tolist() == [[0.5, 0.0], [3.0, 4.0], [5.0, 6.0]]
    assert back["guided"].tolist() == [False, True, True] and back["prompt_ids"].tolist() == [[5, 1], [99, 4], [99, 6]]


# What stays as it is


@pytest.mark.parametrize("trainer_class", [PackedGRPOTrainer, NaiveMixTrainer, LUFFYTrainer])
def test_with_a_signal_everywhere_it_is_off_to_the_bit(tmp_path, trainer_class):
    rows = {
        NaiveMixTrainer: {"sft_dataset": sft_rows(), "sft_pairing": "prompt"},
        LUFFYTrainer: {"train_dataset": expert_rows()},
    }.get(trainer_class, {})
    runs = []
    for option in ({}, ON):
        reward = Watched(by_member)
        trainer = trained(tmp_path, trainer_class, reward_funcs=reward, **rows, **option)
        assert len(reward.calls) == 3
        runs.append((weights_of(trainer), metrics_of(trainer, 0)))
    (plain, plain_log), (ours, log) = runs
    assert_same(ours, plain)
    for entry in log:
        assert entry.pop("dynamic_sampling/generations") == 1 and entry.pop("dynamic_sampling/dead_groups") == 0
        assert entry.pop("dynamic_sampling/rollouts") == 16 * entry["step"]
    assert log == plain_log


def test_metrics_and_table_are_of_the_sampler_s_prompts(tmp_path):
    plain, ours = (trained(tmp_path, max_steps=1, **option) for option in ({}, ON))
    (want,), (got,) = metrics_of(plain, 0), metrics_of(ours, 0)
    assert got["dynamic_sampling/generations"] > 1
    sampled = [name for name in want if name.startswith(("reward", "completions/", "frac_"))]
    assert len(sampled) > 8 and {name: got[name] for name in sampled} == {name: want[name] for name in sampled}
    assert_same(
        {name: list(ours._logs[name]) for name in ("prompt", "completion", "advantages")},
        {name: list(plain._logs[name]) for name in ("prompt", "completion", "advantages")},
    )
    assert len(ours._logs["prompt"]) == 16 and list(map(len, ours._logs["rewards"].values())) == [16]
    # All tokens that were sampled are counted.
    assert got["num_tokens"] == ours.state.num_input_tokens_seen > want["num_tokens"]


def test_evaluation_is_not_sampled_again(tmp_path):
    reward = Watched(lambda prompts, **kwargs: [1.0] * len(prompts))
    trainer = build(tmp_path, reward_funcs=reward, eval_dataset=rl_rows().select(range(2)), **ON)
    found = trainer.evaluate()
    assert len(reward.calls) == 1 and "eval_reward" in found
    assert not any("dynamic_sampling" in name for name in found)


# With the rest of a run


TWICE = {"num_iterations": 2, "steps_per_generation": 4, "per_device_train_batch_size": 4}


@pytest.mark.parametrize(
    ("changes", "stop"), [({}, 2), (TWICE, 3), (TWICE, 5)], ids=["", "inside a generation batch", "in the second one"]
)
def test_resume_is_exact(tmp_path, changes, stop):
    def resumable(folder, callbacks=None):
        options = {"max_steps": 6, "save_strategy": "steps", "save_steps": 1, "callbacks": callbacks, **ON, **changes}
        return build(folder, **options)

    groups.assert_resumes(tmp_path, resumable, stop)
    resumed = resumable(tmp_path / "halves")
    resumed.train(resume_from_checkpoint=str(tmp_path / "halves" / "checkpoint-6"))
    straight = resumable(tmp_path / "straight")
    straight.train(resume_from_checkpoint=str(tmp_path / "straight" / "checkpoint-6"))
    assert_same(resumed.fresh_prompts.state_dict(), straight.fresh_prompts.state_dict())
    assert resumed.fresh_prompts.rollouts > 16 * 6 // len(changes or [1])


@pytest.mark.parametrize(
    "change", [{"dynamic_sampling": False}, {"max_resample_times": 1}], ids=lambda c: next(iter(c))
)
def test_resuming_otherwise_is_refused(tmp_path, change):
    options = {"max_steps": 1, "save_strategy": "steps", "save_steps": 1, **ON}
    trained(tmp_path, **options)
    other = build(tmp_path, **{**options, "max_steps": 2, **change})
    with pytest.raises(ValueError, match=next(iter(change))):
        other.train(resume_from_checkpoint=True)


@pytest.mark.parametrize("lean", [False, True], ids=["", "lean"])
def test_bridge_equals_its_reference(tmp_path, lean):
    reward = Watched()
    if lean:
        trainer = trained(
            tmp_path,
            BridgeTrainer,
            sft_dataset=sft_rows(),
            lean=True,
            peft_config=small_lora(),
            reward_funcs=reward,
            **ON,
        )
        assert max(logged(trainer, "dynamic_sampling/generations")) > 1
        return
    options = {"sft_dataset": sft_rows(), "peft_config": small_lora(), "sft_per_device_train_batch_size": 3, **SGD}
    trainer = trained(tmp_path, RecordingTrainer, reward_funcs=reward, **options, **ON)
    batches_ = [batch for batch, _ in expected(reward.calls)]
    for window, batch in zip(trainer.windows, batches_, strict=True):
        assert {text for text, _, _ in rows_of(window["rl"])} == {prompt for group in batch for prompt, _, _ in group}
    errors, _ = replay(trainer)
    assert max(max(error.values()) for error in errors) < TOLERANCE, errors
    # Demonstrations come in an order of their own.
    plain = trained(tmp_path, RecordingTrainer, **options)
    assert_same([window["sft"] for window in trainer.windows], [window["sft"] for window in plain.windows])


def test_paired_demonstrations_and_teachers_are_those_of_the_new_prompts(tmp_path):
    teacher = teachers.stored(tmp_path / "teacher", teachers.sharp())
    named = {"teachers": [f"one={teacher}"], "teacher_form": "loss"}
    rows = Dataset.from_list([{**row, "teacher": "one" if has_signal(row["prompt"]) else None} for row in rl_rows()])
    options = {"sft_dataset": sft_rows(), "sft_pairing": "prompt", "train_dataset": rows, **named}
    trainer = trained(tmp_path, streams.recording(NaiveMixTrainer), max_resample_times=9, **options, **ON)
    assert logged(trainer, "dynamic_sampling/dead_groups") == [0.0] * 3
    for window in trainer.windows:
        trained_on = {prompt for prompt, _, _ in rows_of(window["rl"])}
        shown = {
            tiny_tokenizer().decode(ids[:4])
            for batch in window["sft"]
            for ids, labels in zip(batch["input_ids"], batch["labels"], strict=True)
            if (labels != -100).any()  # others fill up
        }
        assert shown == trained_on and all(map(has_signal, shown))
        # No row of theirs is without a teacher.
        assert not any(batch["teacher_per_token_logps"].isnan().any() for batch in window["rl"])


def test_the_judge_is_told_the_rewards_of_the_new_rows(tmp_path):
    options = {"sft_dataset": sft_rows(), "sft_weighting": "judge", "max_resample_times": 9}
    trainer = trained(tmp_path, streams.recording(NaiveMixTrainer), **options, **ON)
    assert max(logged(trainer, "dynamic_sampling/generations")) > 1
    for batch in (batch for window in trainer.windows for batch in window["rl"]):
        want = (batch["rollout_reward"] - 1.5) / (math.sqrt(5 / 3) + 1e-4)
        assert torch.allclose(batch["advantages"], want, atol=1e-5)


# Methods with an expert in the group


LONG = {"max_completion_length": 14}
GROUPS = {
    "luffy": (LUFFYTrainer, {"train_dataset": expert_rows(every=2)}),
    "hpt": (HPTTrainer, {"gate": 0, "train_dataset": expert_rows(every=2)}),
    "relift": (ReLIFTTrainer, {"buffer_size": 3, "train_dataset": expert_rows()}),
    "uft": (UFTTrainer, {"train_dataset": hint_rows(), "hint_steps": 3, "hint_coef": 0.5, **LONG}),
    "prefix-rft": (PrefixRFTTrainer, {"train_dataset": trace_rows(every=7), **LONG}),
    "ada-prefix": (AdaPrefixTrainer, {"train_dataset": trace_rows(every=2), **LONG}),
    "actguide": (ActGuideTrainer, {"train_dataset": hint_rows(every=5, steps=True), "expert_max_length": 20, "hard_threshold": 1.0}),
    "self-teacher": (SelfTeacherTrainer, {"train_dataset": expert_rows(every=2), "kl_weight": 0.5}),
    "rlsd": (SelfTeacherTrainer, {"train_dataset": expert_rows(every=2), "objective": "rlsd"}),
}  # fmt: skip


def signals(window):
    """For each prompt of a window, whether some row of it has a signal."""
    found = {}
    for batch in window:
        rows = moved_by_advantage(batch) | batch["sft_mask"].any(1)
        for ids, there, alive in zip(batch["prompt_ids"], batch["prompt_mask"], rows, strict=True):
            text = tiny_tokenizer().decode(ids[there > 0])
            found[text] = found.get(text, False) or bool(alive)
    return found


@pytest.mark.parametrize("name", GROUPS)
def test_group_methods(tmp_path, name):
    trainer_class, options = GROUPS[name]
    trainer = trained(tmp_path, groups.recording(trainer_class), max_resample_times=9, max_steps=4, **options, **ON)
    assert max(logged(trainer, "dynamic_sampling/generations")) > 1 or name == "hpt"
    for window, dead in zip(trainer.windows, logged(trainer, "dynamic_sampling/dead_groups"), strict=True):
        assert dead == 0.0 and all(signals(window).values())
        assert sum(len(batch["completion_ids"]) for batch in window) == 16
    assert all(torch.isfinite(weight).all() for weight in trainer.states[-1].values())


def test_luffy_equals_its_reference(tmp_path):
    trainer = trained(
        tmp_path, groups.recording(LUFFYTrainer), train_dataset=expert_rows(every=2), loss_type="dapo", **ON, **SGD
    )
    assert max(logged(trainer, "dynamic_sampling/generations")) > 1
    assert any(batch["expert_mask"].any() for batch in batches(trainer))
    for window in trainer.windows:
        tokens = sum(
            int((batch["completion_mask"] * (batch["tool_mask"] | batch["expert_mask"])).sum()) for batch in window
        )
        assert {int(batch["num_items_in_batch"]) for batch in window} == {tokens}
    assert max(replay_group(trainer, luffy_loss())) < TOLERANCE


def test_a_group_that_is_imitated_has_a_signal(tmp_path):
    """HPT trains on the trace where no rollout is right: such groups stay."""
    options = {"gate": 0, "success_threshold": 9.0, "train_dataset": expert_rows()}
    trainer = trained(tmp_path, groups.recording(HPTTrainer), reward_funcs=picky, **options, **ON)
    assert logged(trainer, "dynamic_sampling/generations") == [1.0] * 3
    assert all(entry["hpt/gate_rate"] == 1.0 for entry in trainer.logged if "loss" in entry)


def test_ada_prefix_is_steered_by_every_generation(tmp_path):
    """A question that is too hard gives way, and its prefix grows."""
    reward = Watched(lambda prompts, **kwargs: [0.0] * len(prompts))
    trainer = trained(
        tmp_path, AdaPrefixTrainer, reward_funcs=reward, train_dataset=trace_rows(), max_steps=1, **LONG, **ON
    )
    seen = {prompt for call in reward.calls for prompt, _, _ in call}
    assert len(reward.calls) == 4 and len(trainer.shares) == len(seen) > 4
    assert min(trainer.shares.values()) > trainer.args.prefix_start


# Refusals


@pytest.mark.parametrize(
    ("config_class", "changes", "error", "message"),
    [
        (PackedGRPOConfig, {"scale_rewards": "batch"}, NotImplementedError, "`scale_rewards='batch'`.*'none' or 'group'"),
        (
            PackedGRPOConfig,
            {"multi_objective_aggregation": "normalize_then_sum"},
            NotImplementedError,
            "`multi_objective_aggregation='normalize_then_sum'`.*'sum_then_normalize'",
        ),
        (PackedGRPOConfig, {"max_resample_times": 0}, ValueError, "`max_resample_times` must be at least 1, got 0"),
        (SRFTConfig, {}, NotImplementedError, "`dynamic_sampling` is not supported by SRFTConfig: .*own verdict"),
        (SelfTeacherConfig, {"objective": "sdft"}, ValueError, "`dynamic_sampling`.*'sdft'"),
    ],
)  # fmt: skip
def test_where_it_would_be_wrong_it_is_refused(tmp_path, config_class, changes, error, message):
    with pytest.raises(error, match=message):
        group_config(tmp_path, config_class, **{**ON, **changes})


def test_an_iterable_dataset_is_refused(tmp_path):
    with pytest.raises(NotImplementedError, match="`dynamic_sampling` draws fresh prompts from `train_dataset`"):
        build(tmp_path, train_dataset=rl_rows().to_iterable_dataset(), **ON)


def test_off_is_trl_s_own(tmp_path):
    """The default, beside TRL's trainer: no generation more, no metric more."""
    ours = trained(tmp_path, padding_free=False)
    theirs = GRPOTrainer(
        model=small_model(), reward_funcs=picky, args=group_config(tmp_path, GRPOConfig), train_dataset=rl_rows(),
        processing_class=tiny_tokenizer(),
    )  # fmt: skip
    theirs.train()
    assert_same(weights_of(ours), weights_of(theirs))
    assert not any("dynamic" in name for name in metrics_of(ours, 0)[0])

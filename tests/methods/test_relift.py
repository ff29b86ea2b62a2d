import pytest
import torch

from tests.helpers.group_losses import replay_relift, watch_buffer
from tests.helpers.groups import (
    assert_resumes,
    expert_rows,
    group_config,
    group_trainer,
)
from tests.helpers.resume import StopAt, assert_same, rows_of
from tests.helpers.training import digits_reward, small_config, small_lora, small_model
from trl_bridge.methods.relift import ReLIFTConfig, ReLIFTTrainer
from trl_bridge.models import tiny_tokenizer


SGD = {"optim": "sgd", "learning_rate": 0.1}


@pytest.mark.parametrize(
    "changes",
    [
        {**SGD},
        {"sft_learning_rate": 3e-3, "sft_max_grad_norm": 0.5, "sft_per_device_train_batch_size": 2},
        {"separate_optimizer": False, "temperature": 0.7, "preset": "code"},
        {
            "loss_type": "dapo",
            "temperature": 0.7,
            "beta": 0.1,
            "scale_rewards": "group",
            "sft_max_grad_norm": 0,
            **SGD,
        },
        {"num_iterations": 2, "steps_per_generation": 4, "buffer_size": 2, "max_steps": 8},
        {"gradient_accumulation_steps": 4, "steps_per_generation": 2, "buffer_size": 5, "loss_type": "grpo"},
    ],
)
def test_update_equals_the_reference(tmp_path, changes):
    # Adam turns a gradient that cancels down to rounding into a full step; the larger epsilon keeps it small.
    trainer = group_trainer(
        tmp_path, watch_buffer(), **{"buffer_size": 3, "max_steps": 4, "adam_epsilon": 1e-6, **changes}
    )
    trainer.train()
    assert trainer.sft_steps >= 2
    errors, losses = replay_relift(trainer)
    assert max(errors) < 2e-4
    logged = [entry for entry in trainer.logged if "loss" in entry]
    for loss, entry in zip(losses, logged, strict=True):
        assert entry.get("sft/loss") == (loss if loss is None else pytest.approx(loss, rel=1e-5))
        assert ("relift/sft_grad_norm" in entry) == (loss is not None)
    if changes.get("num_iterations") == 2:
        # Four updates on each generation batch; the SFT step waits for the last one.
        assert [bool(taken) for taken in trainer.taken] == [False, False, False, True] * 2


# The buffer


def scripted(*numbers):
    """So many right rollouts in each group of four; `None` is a group that nobody could score."""

    def reward(completions, **kwargs):
        wanted = [numbers[row // 4] for row in range(len(completions))]
        return [None if n is None else 2.0 if row % 4 < n else 0.0 for row, n in enumerate(wanted)]

    return reward


def texts(entries):
    tokenizer = tiny_tokenizer()
    return [(generation, tokenizer.decode(prompt), tokenizer.decode(trace)) for generation, prompt, trace in entries]


def test_the_newest_questions_leave(tmp_path):
    reward, seen = scripted(0, 4, None, 1), []

    def watched(prompts, completions, **kwargs):
        seen.append(prompts[::4])
        return reward(completions)

    trainer = group_trainer(tmp_path, watch_buffer(), reward_funcs=watched, buffer_size=3, max_steps=4)
    trainer.train()
    eos = tiny_tokenizer().eos_token
    traces = dict(zip(expert_rows()["prompt"], expert_rows()["expert"], strict=True))
    new = [
        [(generation, prompts[group], traces[prompts[group]] + eos) for group in (0, 2)]
        for generation, prompts in enumerate(seen)
    ]
    assert texts(trainer.kept[0]) == new[0] and trainer.taken[0] == []
    assert texts(trainer.taken[1]) == [new[0][1], *new[1]]
    assert texts(trainer.kept[1]) == [new[0][0]]
    assert texts(trainer.taken[2]) == [new[0][0], *new[2]]
    assert trainer.kept[2] == [] and texts(trainer.kept[3]) == new[3]
    logged = [entry for entry in trainer.logged if "loss" in entry]
    assert [entry["relift/buffer_size"] for entry in logged] == [2, 1, 0, 2]
    assert [entry["relift/sft_steps"] for entry in logged] == [0, 1, 2, 2]
    assert all(entry["relift/solve_none"] == 0.5 and entry["relift/solve_all"] == 0.25 for entry in logged)


def test_old_questions_leave_untrained(tmp_path):
    options = {"reward_funcs": scripted(0, 4, 4, 0), "buffer_size": 100, "max_steps": 4}
    trainer = group_trainer(tmp_path, watch_buffer(), buffer_max_age=1, **options)
    trainer.train()
    assert [[generation for generation, _, _ in kept] for kept in trainer.kept] == [
        [0, 0],
        [0, 0, 1, 1],
        [1, 1, 2, 2],
        [2, 2, 3, 3],
    ]


def test_questions_without_trace_do_not_enter(tmp_path):
    rows = expert_rows(every=2)
    trainer = group_trainer(
        tmp_path, watch_buffer(), train_dataset=rows, reward_funcs=scripted(0, 0, 0, 0), max_steps=4
    )
    trainer.train()
    with_trace = {prompt for prompt, expert in zip(rows["prompt"], rows["expert"], strict=True) if expert}
    entered = [prompt for _, prompt, _ in texts(trainer.buffer)]
    assert sorted(entered) == sorted(with_trace)  # an epoch of 16 prompts


def test_questions_enter_once_for_each_generation_batch(tmp_path):
    options = {"reward_funcs": scripted(0, 4, 4, 4, 4, 4, 4, 0), "num_iterations": 2, "steps_per_generation": 4}
    trainer = group_trainer(tmp_path, watch_buffer(), buffer_size=100, max_steps=8, **options)
    trainer.train()
    assert [len(kept) for kept in trainer.kept] == [2] * 4 + [4] * 4


# The SFT step


def _ends(tmp_path, cases, **changes):
    ends = []
    for case in cases:
        trainer = group_trainer(
            tmp_path, watch_buffer(), **{"max_steps": 2, "buffer_size": 3, **SGD, **changes, **case}
        )
        trainer.train()
        assert trainer.sft_steps > 0
        ends.append(trainer)
    return ends


def _assert_close(got, want, tolerance):
    for name, value in want.states[-1].items():
        moved = (value - want.start[name]).norm()
        assert (got.states[-1][name] - value).norm() < tolerance * moved + 1e-9, name


def test_the_split_into_micro_batches_changes_nothing(tmp_path):
    first, *others = _ends(tmp_path, [{"sft_per_device_train_batch_size": size} for size in (1, 2, 100)])
    for other in others:
        assert other.taken == first.taken
        _assert_close(other, first, 1e-5)


def test_gradient_checkpointing_changes_nothing(tmp_path):
    plain, checkpointed = _ends(tmp_path, [{}, {"gradient_checkpointing": True}], beta=0.1)
    _assert_close(checkpointed, plain, 1e-5)


def test_autocast_reaches_the_sft_step(tmp_path):
    plain, bf16 = _ends(tmp_path, [{}, {"bf16": True}], max_steps=1, buffer_size=1)
    assert {p.dtype for p in bf16.model.parameters()} == {torch.float32}
    got, want = bf16.logged[0]["sft/loss"], plain.logged[0]["sft/loss"]
    assert got == pytest.approx(want, rel=0.05) and got != want


@pytest.mark.parametrize("padding_free", [True, False])
def test_the_step_has_no_padding(tmp_path, padding_free):
    options = {"buffer_size": 100, "max_steps": 1, "padding_free": padding_free}
    trainer = group_trainer(tmp_path, watch_buffer(), reward_funcs=scripted(0, 0, 0, 0), **options)
    trainer.train()
    demonstrations = [([5, 6, 7], [8, 9]), ([5], [6, 7, 8, 9]), ([5, 6, 7, 8], [9] * 6)]
    seen = []
    hook = trainer.model.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(tuple(kwargs["input_ids"].shape)), with_kwargs=True
    )
    trainer.sft_step(demonstrations)
    hook.remove()
    assert seen == ([(1, 4 + 4 + 9)] if padding_free else [(3, 10)])


def test_the_step_leaves_gradients_and_random_numbers_alone(tmp_path):
    model = small_model(attention_dropout=0.3)
    trainer = group_trainer(tmp_path, watch_buffer(), model=model, buffer_size=100, reward_funcs=scripted(0, 0, 0, 0))
    trainer.train()
    demonstrations = [(prompt, trace) for _, prompt, trace in trainer.buffer]
    before, state = trainer.snapshot(), torch.get_rng_state()
    for parameter in trainer.model.parameters():
        parameter.grad = torch.ones_like(parameter)
    stale = trainer.sft_step(demonstrations)
    assert all(parameter.grad is None for parameter in trainer.model.parameters())
    assert torch.equal(torch.get_rng_state(), state)
    trainer.model.load_state_dict(before, strict=False)
    fresh = trainer.sft_step(demonstrations)
    assert fresh == stale  # the same dropout, and nothing left of the gradients that were there


def test_lora_student_and_its_reference(tmp_path):
    options = {
        "buffer_size": 3,
        "beta": 0.1,
        "temperature": 0.7,
        "learning_rate": 1e-2,
        "lr_scheduler_type": "constant",
    }
    trainer = group_trainer(tmp_path, watch_buffer(), peft_config=small_lora(), **options)
    trainer.train()
    assert trainer.sft_steps > 0
    moved = {name for name in trainer.start if not torch.equal(trainer.start[name], trainer.states[-1][name])}
    assert moved and all("lora" in name for name in moved)
    size = sum(p.numel() for p in trainer.model.parameters() if p.requires_grad)
    held = trainer.sft_pass.optimizer.param_groups
    assert sum(p.numel() for group in held for p in group["params"]) == size
    # The demonstrations' likelihood grows: the step went through the adapter.
    demonstrations = [(prompt, trace) for taken in trainer.taken for _, prompt, trace in taken]
    losses = [trainer.sft_step(demonstrations)["loss"] for _ in range(3)]
    assert losses[0] > losses[1] > losses[2]


def test_the_reference_model_stays(tmp_path):
    trainer = group_trainer(tmp_path, watch_buffer(), buffer_size=1, beta=0.1, **SGD)
    trainer.train()
    assert trainer.sft_steps > 0
    for name, parameter in trainer.ref_model.named_parameters():
        assert torch.equal(parameter, trainer.start[name]), name


# Saving and resuming


@pytest.mark.parametrize("separate", [True, False])
def test_resume_is_exact(tmp_path, separate):
    saving = {"max_steps": 6, "save_strategy": "steps", "save_steps": 1, "lr_scheduler_type": "cosine"}
    built = {}

    def build(folder, **changes):
        name = folder.name if folder.name not in built else "resumed"
        built[name] = group_trainer(
            folder, ReLIFTTrainer, buffer_size=5, separate_optimizer=separate, **saving, **changes
        )
        return built[name]

    assert_resumes(tmp_path, build, stop=3)
    halves, resumed, straight = (built[name].saved.state("shared") for name in ("halves", "resumed", "straight"))
    assert halves["buffer"] and 0 < halves["sft_steps"] < straight["sft_steps"]
    rows = {name: rows_of(built[name]) for name in ("resumed", "straight")}
    assert (
        any(key.startswith("exp_avg/") for key in rows["straight"].get("sft_optimizer", {"rows": {}})["rows"])
        == separate
    )
    assert_same([resumed, rows["resumed"]], [straight, rows["straight"]])


def test_a_changed_optimizer_is_refused_on_resume(tmp_path):
    saving = {"max_steps": 2, "save_strategy": "steps", "save_steps": 1, "buffer_size": 2}
    group_trainer(tmp_path, ReLIFTTrainer, callbacks=[StopAt(1)], **saving).train()
    for changes in ({"sft_learning_rate": 0.5}, {"separate_optimizer": False}):
        changed = group_trainer(tmp_path, ReLIFTTrainer, **saving, **changes)
        with pytest.raises(ValueError, match=next(iter(changes))):
            changed.train(resume_from_checkpoint=True)


def test_the_best_model_comes_back(tmp_path):
    saving = {"save_strategy": "steps", "save_steps": 1, "eval_strategy": "steps", "eval_steps": 1, "max_steps": 3}
    best = {"load_best_model_at_end": True, "metric_for_best_model": "eval_reward", "greater_is_better": True}
    rewards = iter([3.0, 1.0, 0.0])  # the first evaluation is the best one

    def reward(completions, **kwargs):
        return [next(rewards)] * 4 if len(completions) == 4 else digits_reward(completions)

    trainer = group_trainer(
        tmp_path,
        watch_buffer(),
        reward_funcs=reward,
        buffer_size=1,
        eval_dataset=expert_rows().select(range(1)),
        per_device_eval_batch_size=4,
        **saving,
        **best,
    )
    trainer.train()
    assert trainer.sft_steps == 3 and trainer.state.best_model_checkpoint.endswith("checkpoint-1")
    for name, parameter in trainer.model.named_parameters():
        assert torch.equal(parameter, trainer.states[0][name]), name


# Optimizers and interruptions


def test_other_optimizers_can_be_shared(tmp_path):
    config = small_config(tmp_path, ReLIFTConfig, optim="adafactor", separate_optimizer=False)
    assert config.epsilon == 0.2 and small_config(tmp_path, ReLIFTConfig, preset="code").epsilon == 1e6


def test_a_schedule_without_base_rate_is_refused(tmp_path):
    class Constant:
        def get_last_lr(self):
            return [1e-3]

        def step(self):
            pass

    model = small_model()
    optimizers = (torch.optim.AdamW(model.parameters(), lr=1e-3), Constant())
    args = group_config(tmp_path, ReLIFTConfig, buffer_size=1)
    trainer = ReLIFTTrainer(
        model=model,
        args=args,
        reward_funcs=digits_reward,
        train_dataset=expert_rows(),
        processing_class=tiny_tokenizer(),
        optimizers=optimizers,
    )
    with pytest.raises(ValueError, match="initial_lr"):
        trainer.train()
    assert trainer.state.global_step == 0


def test_training_anew_after_an_interruption(tmp_path):
    class Interrupted(ReLIFTTrainer):
        stops = True

        def training_step(self, *args, **kwargs):
            loss = super().training_step(*args, **kwargs)
            if self.stops and self._step == 1:  # inside the first update
                raise KeyboardInterrupt
            return loss

    options = {"buffer_size": 2, "max_steps": 4}
    clean = group_trainer(tmp_path / "clean", ReLIFTTrainer, **options)
    clean.train()
    again = group_trainer(tmp_path / "again", Interrupted, **options)
    with pytest.raises(KeyboardInterrupt):
        again.train()
    again.stops = False
    again.train()
    assert again.sft_steps >= clean.sft_steps - 1 > 0
    assert again._step == clean._step

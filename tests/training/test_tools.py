"""Tools, environments and rollout functions: what they write is in no loss, and all else is as without them."""

import pytest
import torch
from datasets import Dataset
from trl import GRPOConfig, GRPOTrainer

from tests.helpers import streams
from tests.helpers.lean import LEAN, lean_options, replay_lean
from tests.helpers.resume import StopAt, assert_same, metrics_of, state_of
from tests.helpers.tools import (
    TOKENIZER,
    TOOLS,
    Calls,
    add,
    agent_model,
    agent_trainer,
    assistant,
    call,
    calling,
    external,
    gradient,
    leaves,
    texts,
    told,
    tool_prompts,
    trace,
    turns_reward,
    user,
)
from tests.helpers.training import RecordingTrainer, digits_reward, replay, small_config, small_lora
from trl_bridge import (
    AlternatingTrainer,
    BridgeTrainer,
    CHORDTrainer,
    NaiveMixTrainer,
    PackedGRPOTrainer,
)


TOLERANCE = 2e-4
SGD = {"optim": "sgd", "learning_rate": 0.1}
RESULT = "\n<|im_start|>tool\nsum 3<|im_end|>\n<|im_start|>assistant\n"


def rl(trainer):
    return [batch for window in trainer.windows for batch in window["rl"]]


def sft(trainer):
    return [batch for window in trainer.windows for batch in window["sft"]]


# BRIDGE


CASES = {
    "sgd": SGD,
    "grpo, sequence level, kl, entropy": {
        **SGD, "loss_type": "grpo", "importance_sampling_level": "sequence", "beta": 0.1, "entropy_coef": 0.05,
        "bridge_lambda": 0.3,
    },
    "adamw, iterations": {"num_iterations": 2, "steps_per_generation": 4, "max_steps": 4},
    "bnpo, padded, accumulation of four": {
        "loss_type": "bnpo", "padding_free": False, "gradient_accumulation_steps": 4, "per_device_train_batch_size": 4,
    },
    "likelihood": {"sft_weighting": "likelihood"},
    "selective": {"preset": "selective", **SGD},
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_bridges_update_equals_the_reference(tmp_path, name):
    trainer = agent_trainer(tmp_path, calling(RecordingTrainer), **CASES[name])
    trainer.train()
    for window in trainer.windows:
        assert any(RESULT in text for batch in window["rl"] for text in texts(batch, external(batch)))
    for batch in sft(trainer):
        ids = torch.where(batch["labels"] == -100, TOKENIZER.pad_token_id, batch["labels"])
        assert not any("sum" in TOKENIZER.decode(row) for row in ids)
        assert all("<tool_call>" in TOKENIZER.decode(row) for row in ids)
    errors, metrics = replay(trainer)
    assert len(errors) == trainer.args.max_steps and all(e < TOLERANCE for step in errors for e in step.values()), (
        errors
    )
    logged = [entry for entry in trainer.state.log_history if "loss" in entry]
    for step, (want, got) in enumerate(zip(metrics, logged, strict=True)):
        for key in ("bridge/gain", "bridge/shadow_ratio_mean", "sft/loss"):
            if key in want and key in got:
                assert got[key] == pytest.approx(want[key], rel=2e-3, abs=2e-6), (step, key)
    assert logged[0]["tools/call_frequency"] > 0 and logged[0]["tools/failure_frequency"] == 0


def test_lean_modes_update_equals_the_reference(tmp_path):
    trainer = agent_trainer(
        tmp_path, calling(RecordingTrainer), peft_config=small_lora(lora_alpha=10), learning_rate=1e-2, **LEAN
    )
    trainer.train()
    assert all(external(batch).any() for batch in rl(trainer))
    options = lean_options(trainer)
    replayed = list(replay_lean(agent_model(), trainer.start, trainer.windows, trainer.states, options))
    assert len(replayed) == 2 and all(e < TOLERANCE for errors, _ in replayed for e in errors.values()), replayed


@pytest.mark.parametrize("loss_type", ["dapo", "grpo", "dr_grpo", "bnpo", "luspo", "cispo"])
def test_gradient_of_a_tools_tokens_is_exactly_zero(tmp_path, loss_type):
    trainer = agent_trainer(
        tmp_path, calling(RecordingTrainer), loss_type=loss_type, beta=0.1, entropy_coef=0.05, max_steps=1
    )
    trainer.train()
    for batch in rl(trainer):
        with torch.no_grad():
            scores = trainer.policy.score(trainer.model, batch)
        log_probs, entropies, _ = leaves(scores)
        loss = trainer.policy.loss_of((log_probs, entropies, None), batch)
        masked, own = external(batch), (batch["completion_mask"] * batch["tool_mask"]).bool()
        for leaf in (log_probs, entropies):
            found = gradient(loss, leaf)
            assert masked.any() and (found[masked] == 0).all() and (found[own] != 0).any()


@pytest.mark.parametrize("trainer_class", [NaiveMixTrainer, CHORDTrainer])
def test_stream_methods_train_with_tools(tmp_path, trainer_class):
    trainer = agent_trainer(tmp_path, calling(streams.recording(trainer_class)), **SGD)
    trainer.train()
    assert all(external(batch).any() for batch in rl(trainer))
    if trainer_class is NaiveMixTrainer:
        streams.replay(trainer, model=agent_model())
    assert trainer.state.global_step == 2


def test_updates_by_turns_train_with_tools(tmp_path):
    trainer = agent_trainer(tmp_path, calling(AlternatingTrainer), max_steps=4)
    trainer.train()
    assert trainer.demonstrations.tokens_seen > 0 and trainer.state.global_step == 4


# GRPO


def plain(folder, trainer_class, **changes):
    config = GRPOConfig if trainer_class is GRPOTrainer else trainer_class.config_class
    options = {"max_completion_length": 128, "max_steps": 2, "reward_funcs": turns_reward, **changes}
    reward, tools = options.pop("reward_funcs"), options.pop("tools", TOOLS)
    return type(trainer_class.__name__, (Calls, trainer_class), {})(
        model=agent_model(), reward_funcs=reward, args=small_config(folder, config, **options),
        train_dataset=tool_prompts(), processing_class=TOKENIZER, tools=tools,
    )  # fmt: skip


def test_grpo_without_packing_is_trls_to_the_bit(tmp_path):
    trl, ours = plain(tmp_path, GRPOTrainer), None
    trl.train()
    ours = plain(tmp_path, PackedGRPOTrainer, padding_free=False)
    ours.train()
    assert_same(dict(ours.model.state_dict()), dict(trl.model.state_dict()))
    names = [name for name in trl.state.log_history[0] if "/" in name or name in ("loss", "entropy", "reward")]
    for mine, theirs in zip(metrics_of(ours, 0), metrics_of(trl, 0), strict=True):
        assert len(names) > 10 and {n: mine[n] for n in names if n in theirs} == {
            n: theirs[n] for n in names if n in theirs
        }


@pytest.mark.parametrize("options", [{}, {"loss_type": "grpo", "temperature": 0.7}, {"entropy_coef": 0.05}])
def test_packed_passes_are_trls(tmp_path, options):
    trl = plain(tmp_path, GRPOTrainer, **SGD, **options)
    trl.train()
    ours = plain(tmp_path, PackedGRPOTrainer, **SGD, **options)
    ours.train()
    assert ours._packs
    for name, weight in trl.model.state_dict().items():
        assert torch.allclose(ours.model.state_dict()[name], weight, rtol=1e-4, atol=1e-6), name
    for mine, theirs in zip(metrics_of(ours, 0), metrics_of(trl, 0), strict=True):
        for name in ("reward", "tools/call_frequency", "completions/mean_length", "entropy", "kl"):
            if name in theirs:
                assert mine[name] == pytest.approx(theirs[name], rel=1e-4), name


def test_entropy_of_rollouts_that_are_not_run_is_that_of_own_tokens(tmp_path):
    """A group whose rewards are alike is not run, and counts with what the others' own tokens have on average."""

    def only_one_group_differs(completions, prompts, **kwargs):
        return [float(row) if prompt[0]["content"] < "2" else 1.0 for row, prompt in enumerate(prompts)]

    trainer = plain(tmp_path, PackedGRPOTrainer, reward_funcs=only_one_group_differs, max_steps=1)
    with torch.no_grad():
        # Of a model that is sure of nothing all entropies are alike, whichever tokens they are of.
        trainer.model.get_output_embeddings().weight.mul_(20)
    seen = []
    compute = trainer._compute_loss

    def recorded(model, inputs):
        seen.append(inputs)
        return compute(model, inputs)

    trainer._compute_loss = recorded
    trainer.train()
    checked = 0
    for inputs in list(seen):
        live = inputs["advantages"] != 0
        if live.all() or not live.any():
            continue
        with torch.no_grad():
            _, (_, entropies, _) = trainer.policy.loss(trainer.model, inputs)
        mask = (inputs["completion_mask"] * inputs["tool_mask"]).bool() & live[:, None]
        assert external(inputs)[live].any()
        want = entropies[mask].mean()
        with_tools = entropies[inputs["completion_mask"].bool() & live[:, None]].mean()
        assert abs(with_tools / want - 1) > 1e-3
        assert torch.allclose(entropies[~live], want.expand_as(entropies[~live]))
        checked += 1
    assert checked


# Environments


class Counter:
    """A number that the policy may raise; the prompt says where it starts."""

    made = 0

    def __init__(self):
        type(self).made += 1

    def reset(self, start=0, **kwargs):
        self.value, self.calls = start, 0
        return f" from {start}"

    def add(self, a: int, b: int) -> str:
        """
        Adds.

        Args:
            a: A number.
            b: Another one.

        Returns:
            Where the counter stands.
        """
        self.value, self.calls = self.value + a + b, self.calls + 1
        return f"at {self.value}"

    def get_reward(self):
        return float(self.value) + 0.1 * self.calls


def starts():
    return Dataset.from_dict({"prompt": [[user("count")]] * 16, "start": list(range(16))})


def test_an_environment_of_its_own_for_each_rollout(tmp_path):
    trainer = agent_trainer(
        tmp_path, calling(RecordingTrainer), environment_factory=Counter, train_dataset=starts(), reward_funcs=None,
        sft_weighting="none", **SGD,
    )  # fmt: skip
    trainer.train()
    errors, _ = replay(trainer)
    assert all(e < TOLERANCE for step in errors for e in step.values()), errors
    for batch in rl(trainer):
        prompts = [TOKENIZER.decode(ids) for ids in batch["prompt_ids"]]
        assert all("count from " in prompt and "add(a, b)" in prompt for prompt in prompts)
        # The result of the first call is where the prompt's start says.
        for prompt, written in zip(prompts, texts(batch, external(batch)), strict=True):
            start = int(prompt.split("count from ")[1].split("<")[0])
            assert not written or f"at {start + 3}<" in written
    assert logged(trainer, "rewards/Counter/mean")


def logged(trainer, name):
    return [entry[name] for entry in trainer.state.log_history if name in entry]


class Other(Counter):
    def subtract(self, a: int) -> str:
        """
        Subtracts.

        Args:
            a: A number.

        Returns:
            Where the counter stands.
        """
        return "no"


def test_demonstrations_have_the_tools_of_their_environment(tmp_path):
    rows = Dataset.from_list(
        [{**row, "environment": ("plain", "other")[n % 2], "start": n} for n, row in enumerate(starts())]
    )
    demonstrations = Dataset.from_list(
        [{"messages": [user("count"), *trace(n, 1)], "environment": ("plain", "other")[n % 2]} for n in range(8)]
    )
    options = {
        "environment_factory": {"plain": Counter, "other": Other}, "train_dataset": rows, "reward_funcs": None,
        "sft_weighting": "none", "max_steps": 1,
    }  # fmt: skip
    trainer = agent_trainer(tmp_path, calling(BridgeTrainer), sft_dataset=demonstrations, **options)
    prompts = [TOKENIZER.decode(row["input_ids"]) for row in trainer.demonstrations.rendered]
    assert ["subtract(a)" in prompt for prompt in prompts] == [False, True] * 4
    trainer.train()
    wrong = demonstrations.remove_columns("environment")
    with pytest.raises(ValueError, match=r"`sft_dataset` row 0: `environment` is None, .*plain, other"):
        agent_trainer(tmp_path, BridgeTrainer, sft_dataset=wrong, **options)


def test_an_environment_that_has_the_prompts(tmp_path):
    class Asks(Counter):
        def reset(self, **kwargs):
            super().reset()
            return "what?"

    trainer = agent_trainer(
        tmp_path,
        calling(NaiveMixTrainer),
        environment_factory=Asks,
        train_dataset=None,
        reward_funcs=None,
        max_steps=2,
    )
    trainer.train()
    assert "what?" in trainer._logs["prompt"][0][-1]["content"] and trainer.state.global_step == 2


# Rollout functions


def outside(prompts, trainer):
    """Three tokens of the policy's, two of the environment's, and three of the policy's."""
    tokenizer = trainer.processing_class
    prompt_ids = tokenizer.apply_chat_template(prompts, add_generation_prompt=True)["input_ids"]
    texts = [f"{row % 3}aZZ{row}b" for row in range(len(prompts))]
    ids = [[*tokenizer(text)["input_ids"], tokenizer.eos_token_id] for text in texts]
    masks = [[1, 1, 0, 0] + [1] * (len(row) - 4) for row in ids]
    return {"prompt_ids": prompt_ids, "completion_ids": ids, "logprobs": None, "env_mask": masks}


def content_reward(completions, **kwargs):
    return digits_reward([messages[0]["content"] for messages in completions])


@pytest.mark.parametrize("options", [SGD, {**SGD, "loss_type": "grpo", "beta": 0.1, "padding_free": False}])
def test_a_rollout_function_with_a_mask(tmp_path, options):
    sft_dataset = Dataset.from_dict({"prompt": [[user("1+1=")]] * 4, "completion": [[assistant("2")]] * 4})
    trainer = agent_trainer(
        tmp_path,
        RecordingTrainer,
        rollout_func=outside,
        reward_funcs=content_reward,
        sft_dataset=sft_dataset,
        **options,
    )
    trainer.train()
    for batch in rl(trainer):
        assert set(texts(batch, external(batch))) == {"ZZ"}
    errors, _ = replay(trainer)
    assert all(e < TOLERANCE for step in errors for e in step.values()), errors


# Beside the rest


def test_dynamic_sampling(tmp_path):
    def seldom(prompts, completions, **kwargs):
        return [
            turns_reward([c])[0] if p[0]["content"] < "2" else 1.0 for p, c in zip(prompts, completions, strict=True)
        ]

    trainer = agent_trainer(
        tmp_path, calling(RecordingTrainer), dynamic_sampling=True, reward_funcs=seldom, sft_weighting="none", **SGD
    )
    trainer.train()
    assert max(logged(trainer, "dynamic_sampling/generations")) > 1
    assert all(external(batch).any() for batch in rl(trainer))
    for window in trainer.windows:
        total = sum(int((batch["completion_mask"] * batch["tool_mask"]).sum()) for batch in window["rl"])
        assert {int(batch["num_items_in_batch"]) for batch in window["rl"]} == {total}
    errors, _ = replay(trainer)
    assert all(e < TOLERANCE for step in errors for e in step.values()), errors


def test_rows_with_an_advantage_at_a_tools_tokens_only_have_no_signal():
    from trl_bridge.training.dynamic_sampling import moved_by_advantage

    batch = {"advantages": torch.ones(2), "completion_mask": torch.ones(2, 3, dtype=torch.long)}
    batch["tool_mask"] = torch.tensor([[0, 0, 0], [0, 1, 0]])
    assert moved_by_advantage(batch).tolist() == [False, True]


def test_a_teacher_says_nothing_of_a_tools_tokens(tmp_path):
    teacher = tmp_path / "teacher"
    model = agent_model()
    with torch.no_grad():
        model.get_output_embeddings().weight.mul_(3)
    model.save_pretrained(teacher)
    TOKENIZER.save_pretrained(teacher)
    trainer = agent_trainer(
        tmp_path / "run", calling(PackedGRPOTrainer), teachers=[str(teacher)], teacher_weight=0.5, max_steps=1
    )
    seen = []
    compute = trainer._compute_loss
    trainer._compute_loss = lambda model, inputs: seen.append(inputs) or compute(model, inputs)
    trainer.train()
    for inputs in list(seen):
        with torch.no_grad():
            log_probs, entropies, _ = trainer.policy.score(trainer.model, inputs)
        leaf = log_probs.clone().requires_grad_()
        trainer._get_per_token_logps_and_entropies = lambda *args, _scores=(leaf, entropies, None), **kwargs: _scores
        found = gradient(trainer._compute_loss(trainer.model, inputs), leaf)
        del trainer._get_per_token_logps_and_entropies
        assert (found[external(inputs)] == 0).all() and found.any()


def test_verdicts_are_asked_with_the_whole_conversation(tmp_path):
    asked = []

    def seen(completions, completion_ids, **kwargs):
        asked.extend(zip(completions, completion_ids, strict=True))
        return turns_reward(completions)

    trainer = agent_trainer(tmp_path, calling(BridgeTrainer), reward_funcs=seen, sft_weighting="verdict", max_steps=1)
    trainer.train()
    shown = [(messages, ids) for messages, ids in asked if len(messages) == 3 and messages[2]["content"].endswith("!")]
    assert shown
    for messages, ids in shown:
        (calls,) = messages[0]["tool_calls"]
        arguments = calls["function"]["arguments"]
        assert messages[1]["content"] == add(**arguments)
        assert messages[1]["content"] in TOKENIZER.decode(ids)


@pytest.mark.parametrize("stop", [1, 3])
def test_resuming_inside_a_generation_batch_of_several_turns(tmp_path, stop):
    options = {
        "num_iterations": 2, "steps_per_generation": 4, "max_steps": 6, "save_strategy": "steps", "save_steps": 1,
        "sft_weighting": "judge",
    }  # fmt: skip

    def build(folder, callbacks=None):
        return agent_trainer(folder, calling(BridgeTrainer), callbacks=callbacks, **options)

    straight = build(tmp_path / "straight")
    straight.train()
    build(tmp_path / "halves", [StopAt(stop)]).train()
    resumed = build(tmp_path / "halves")
    resumed.train(resume_from_checkpoint=str(tmp_path / "halves" / f"checkpoint-{stop}"))
    assert_same(state_of(resumed), state_of(straight))
    assert_same(metrics_of(resumed, stop), metrics_of(straight, stop))


# Refused before the first update


REFUSED = {
    "no tools": (
        {"tools": None}, r"`sft_dataset` row 0: `messages` uses tools, and nothing says which.*`tools`",
    ),
    "another tool": (
        {"sft_dataset": Dataset.from_list([
            {"messages": [user("a"), assistant("b")]},
            {"messages": [user("a"), call(1, 2, "subtract"), told("x"), assistant("b")]},
        ])},
        r"`sft_dataset` row 1: `messages` calls 'subtract', which is none of the tools \(add\)",
    ),
    "environments and verdicts": (
        {"environment_factory": Counter, "sft_weighting": "verdict"}, "`sft_weighting='verdict'`.*no environment",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_refused(tmp_path, name):
    changes, message = REFUSED[name]
    with pytest.raises(ValueError, match=message):
        agent_trainer(tmp_path, BridgeTrainer, **changes)


def test_the_judge_takes_the_place_of_verdicts_that_no_environment_can_give(tmp_path):
    given = agent_trainer(
        tmp_path, BridgeTrainer, environment_factory=Counter, train_dataset=starts(), preset="selective"
    )
    assert given.weighting.kind == "judge"
    with_tools = agent_trainer(tmp_path, BridgeTrainer, preset="selective")
    assert with_tools.weighting.kind == "judge_verdict"

"""What the methods promise alike: a LoRA student, limits, the split, exact resume, a model card, and rollouts from vLLM."""

import pkgutil

import pytest
import torch
from datasets import Dataset
from trl import GRPOConfig, GRPOTrainer

from tests.helpers.group_losses import hpt_loss, uft_loss
from tests.helpers.groups import (
    Engine,
    assert_resumes,
    batches,
    expert_rows,
    group_trainer,
    hint_rows,
    recording,
    replay_group,
    sample_these,
    trace_rows,
)
from tests.helpers.streams import make
from tests.helpers.training import (
    digits_reward,
    rl_rows,
    sft_rows,
    small_config,
    small_lora,
    small_model,
    small_trainer,
)
from trl_bridge import __version__
from trl_bridge.methods.catalogue import METHODS
from trl_bridge.models import tiny_tokenizer


def trainer_of(name):
    return pkgutil.resolve_name(METHODS[name].trainer)


# ReLIFT and ActGuide have cases of their own.
@pytest.mark.parametrize("name", ["luffy", "srft", "hpt", "uft", "prefix-rft"])
def test_lora_student(tmp_path, name):
    options = {"max_completion_length": 10, "beta": 0.1, "temperature": 0.7}
    if name == "hpt":
        options |= {"success_threshold": 1.0, "gate": 1, "gate_off": 2}
    trainer_class = recording(trainer_of(name))
    trainer = group_trainer(tmp_path, trainer_class, peft_config=small_lora(), train_dataset=hint_rows(), **options)
    trainer.train()
    trained = {name for name in trainer.start if not torch.equal(trainer.start[name], trainer.states[-1][name])}
    assert trained and all("lora" in name for name in trained)
    assert any(batch["expert_mask"].any() for batch in batches(trainer))
    assert name != "hpt" or any(entry.get("sft/loss", 0) > 0 for entry in trainer.logged)
    assert all(torch.isfinite(weight).all() for weight in trainer.states[-1].values())


# Limits: without anything of the method it is GRPO


GRPO = {"loss_type": "dr_grpo", "scale_rewards": "none", "epsilon": 0.2}
TEMPERED = {**GRPO, "temperature": 0.7, "num_iterations": 2, "loss_type": "dapo"}
TWICE = {"num_iterations": 2, "scale_rewards": "group"}
UFT = {"loss_type": "dapo", "beta": 0.0, "num_iterations": 2, "max_completion_length": 10}
PREFIX = {**TWICE, "delta": 3.0, "beta": 0.0, "max_completion_length": 14}
NO_EXPERT = {"expert_probability": 0.0}
LIMITS = [
    *[("luffy", NO_EXPERT, {**TWICE, "loss_type": loss_type}) for loss_type in ("dr_grpo", "dapo")],
    *[("prefix-rft", {**NO_EXPERT, "train_dataset": trace_rows()}, {**PREFIX, "loss_type": loss_type})
      for loss_type in ("dr_grpo", "dapo")],
    *[("hpt", never, shared) for shared in (GRPO, TEMPERED) for never in ({"gate": -1}, {"gate": 0, **NO_EXPERT})],
    *[("relift", never, shared) for shared in (GRPO, TEMPERED)
      for never in ({"buffer_size": 100}, {"buffer_size": 1, **NO_EXPERT})],
    *[("uft", {"train_dataset": hint_rows(), **never}, {**UFT, **more}) for never, more in (
        ({"hint_steps": 0}, {}), ({"hint_steps": 3, **NO_EXPERT}, {}), ({"hint_steps": 0}, {"temperature": 0.7}))],
]  # fmt: skip


@pytest.mark.parametrize(("name", "never", "shared"), LIMITS)
def test_limits_are_grpo_to_the_bit(tmp_path, name, never, shared):
    ours = group_trainer(tmp_path, recording(trainer_of(name)), padding_free=False, **never, **shared)
    ours.train()
    grpo = group_trainer(tmp_path, GRPOTrainer, args=small_config(tmp_path, GRPOConfig, **shared))
    grpo.train()
    for mine, theirs in zip(ours.model.parameters(), grpo.model.parameters(), strict=True):
        assert torch.equal(mine, theirs)
    if name == "relift":
        assert bool(ours.buffer) == ("expert_probability" not in never)
    if name == "prefix-rft":
        assert all(batch["advantages"].dim() == 1 for batch in batches(ours))


# Exactness


SPLIT = {
    "luffy": {"train_dataset": expert_rows(every=2)},
    "srft": {"train_dataset": expert_rows(every=2), "success_threshold": 1.0},
    "uft": {"train_dataset": hint_rows(every=2), "hint_coef": 1.0, "hint_steps": 3, "max_completion_length": 10},
}


@pytest.mark.parametrize("loss_type", ["dr_grpo", "dapo"])
@pytest.mark.parametrize("name", SPLIT)
def test_the_split_into_micro_batches_changes_nothing(tmp_path, monkeypatch, name, loss_type):
    sample_these(monkeypatch, ["1", "22x", "x", "333", "4xy", "", "5"])
    options = {"loss_type": loss_type, "max_steps": 1, "optim": "sgd", "learning_rate": 1.0, "max_grad_norm": 0.0}
    weights, logs = [], []
    for size, steps in [(4, 4), (8, 2), (16, 1)]:
        split = {"per_device_train_batch_size": size, "gradient_accumulation_steps": steps}
        trainer = group_trainer(tmp_path, recording(trainer_of(name)), **SPLIT[name], **options, **split)
        trainer.train()
        assert len(trainer.windows[0]) == steps
        assert name == "luffy" or any(batch["sft_mask"].any() for batch in batches(trainer))
        weights.append(trainer.states[0])
        logs.append({k: v for k, v in trainer.state.log_history[0].items() if k.split("/")[0] in ("srft", "sft")})
    moved = sum(float((weights[0][n] - trainer.start[n]).norm()) for n in weights[0])
    for other, values in zip(weights[1:], logs[1:], strict=True):
        assert sum(float((weights[0][n] - other[n]).norm()) for n in other) < 1e-5 * moved
        assert values == pytest.approx(logs[0], rel=1e-4)


# Inside a generation batch, which serves four updates.
INSIDE = {"num_iterations": 2, "steps_per_generation": 4, "per_device_train_batch_size": 4}
TRACES = expert_rows(every=2)
SEVERAL = Dataset.from_list([{**row, "expert": [row["expert"], "7"] if row["expert"] else []} for row in TRACES])
LUFFY = {"train_dataset": SEVERAL, "expert_probability": 0.7, "max_steps": 6}
SRFT = {"train_dataset": TRACES, "success_threshold": 1.0, "max_steps": 6}
HPT = {
    "success_threshold": 1.0,
    "gate": 1,
    "gate_off": 2,
    "num_iterations": 2,
    "steps_per_generation": 4,
    "max_steps": 6,
}
HINTS = {"train_dataset": hint_rows(every=2, steps=True), "hint_steps": 5, "max_completion_length": 10}
PREFIXES = {"train_dataset": trace_rows(every=2), "max_completion_length": 14}
GUIDED = {"train_dataset": hint_rows(steps=True), "hard_threshold": 1.0, "expert_max_length": 20}
# ReLIFT, which has a buffer and moments to bring back, has a case of its own.
RESUMED = [
    ("luffy", LUFFY, 3),
    ("luffy", {**LUFFY, **INSIDE}, 3),
    ("srft", SRFT, 3),
    ("srft", {**SRFT, **INSIDE}, 3),
    ("hpt", HPT, 3),
    *[(name, {**options, **more}, stop)
      for name, options in (("uft", HINTS), ("prefix-rft", PREFIXES), ("actguide", GUIDED))
      for more, stop in (({"max_steps": 3}, 2), ({"max_steps": 5, **INSIDE}, 3))],
]  # fmt: skip
# Another run than the one that was stopped, and what the refusal names.
OTHER = {
    "uft": ({"train_dataset": hint_rows(every=2)}, "expert_steps"),
    "actguide": ({"guidance_template": "{steps}\n{prompt}"}, "guidance_template"),
}


@pytest.mark.parametrize(("name", "options", "stop"), RESUMED)
def test_resume_is_exact(tmp_path, name, options, stop):
    saving = {**options, "save_strategy": "steps", "save_steps": 1}
    assert_resumes(tmp_path, lambda folder, **more: group_trainer(folder, trainer_of(name), **saving, **more), stop)
    if name in OTHER:
        changes, named = OTHER[name]
        other = group_trainer(tmp_path / "halves", trainer_of(name), **{**saving, **changes})
        with pytest.raises(ValueError, match=named):
            other.train(resume_from_checkpoint=str(tmp_path / "halves" / f"checkpoint-{stop}"))


WITH_PAPER = [
    name
    for name, method in METHODS.items()
    if method.family in ("stream", "group") and getattr(trainer_of(name), "_paper", None)
]


@pytest.mark.parametrize("name", WITH_PAPER)
def test_model_card_names_the_paper(tmp_path, name):
    trainer_class = trainer_of(name)
    if METHODS[name].family == "stream":
        trainer = make(trainer_class, tmp_path)
    else:
        rows = hint_rows(steps=True)
        trainer = group_trainer(tmp_path, trainer_class, train_dataset=rows, max_completion_length=10)
    trainer.create_model_card(model_name="student")
    card = (tmp_path / "README.md").read_text()
    assert trainer_class._paper["id"] in card and trainer_class._paper["title"] in card and trainer._name in card
    assert f"- Method: {trainer._name}, by trl-bridge {__version__}\n" in card


# vLLM


@pytest.mark.parametrize(
    ("name", "loss", "changes"),
    [
        ("hpt", hpt_loss(), {"gate": 2, "gate_off": 3, "success_threshold": 1.0}),
        ("uft", uft_loss, {"hint_steps": 4}),
    ],
)
def test_update_with_vllm_equals_the_reference(tmp_path, monkeypatch, name, loss, changes):
    monkeypatch.setattr("trl.trainer.grpo_trainer.VLLMGeneration", Engine)
    trainer = group_trainer(
        tmp_path,
        recording(trainer_of(name)),
        train_dataset=hint_rows(),
        max_completion_length=14,
        use_vllm=True,
        vllm_importance_sampling_mode="token_truncate",
        vllm_importance_sampling_clip_max=3.0,
        optim="sgd",
        learning_rate=0.05,
        **changes,
    )
    trainer.train()
    for batch in batches(trainer):
        expert = batch["expert_mask"].bool()
        # Tokens that vLLM did not sample are not corrected.
        assert (batch["importance_sampling_ratio"][expert & batch["tool_mask"].bool()] == 1).all()
    assert any((batch["importance_sampling_ratio"] != 1).any() for batch in batches(trainer))
    with_ratio = lambda p: loss(_Corrected(p))  # noqa: E731
    assert max(replay_group(trainer, with_ratio, hint_coef=getattr(trainer.args, "hint_coef", 0.0))) < 2e-4


class _Corrected:
    """A pass whose policy loss carries vLLM's ratio: GRPO multiplies each token's loss with it."""

    def __init__(self, plain):
        self._plain = plain

    def __getattr__(self, name):
        return getattr(self._plain, name)

    def policy_loss(self):
        p = self._plain
        ratio = p.batch["importance_sampling_ratio"].double()
        # Ratio 1 to the policy itself: no clipping, so the correction may stand at the advantage.
        advantages = p.advantages.unsqueeze(1) * ratio
        return p.policy_loss(advantages=advantages)


VLLM = {"use_vllm": True, "vllm_importance_sampling_mode": "token_truncate", "vllm_importance_sampling_clip_max": 3.0}


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("naive-mix", {"sft_weight": 0.0}),
        ("chord", {"mu_peak": 0.0, "mu_valley": 0.0}),
        ("alternating", {"first": "rl", "rl_steps": 2, "sft_steps": 1}),
        ("relift", {"loss_type": "dapo", "scale_rewards": "group"}),
        ("grpo", {}),
    ],
)
def test_limits_are_grpo_with_vllm_to_the_bit(tmp_path, monkeypatch, name, changes):
    monkeypatch.setattr("trl.trainer.grpo_trainer.VLLMGeneration", Engine)
    trainer_class = trainer_of(name)
    kwargs = {"grpo": {}, "relift": {"train_dataset": expert_rows()}}.get(name, {"sft_dataset": sft_rows()})
    ends = []
    for kind, options in ((trainer_class, {"padding_free": False, **changes}), (GRPOTrainer, {})):
        config = kind.config_class if kind is trainer_class else GRPOConfig
        given = kwargs if kind is trainer_class else {}
        trainer = kind(
            model=small_model(),
            reward_funcs=digits_reward,
            args=small_config(tmp_path, config, max_steps=2, **VLLM, **options),
            processing_class=tiny_tokenizer(),
            **{"train_dataset": rl_rows(), **given},
        )
        trainer.train()
        ends.append(list(trainer.model.parameters()))
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(*ends, strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(ends[0], small_model().parameters(), strict=True))


@pytest.mark.parametrize("reward_funcs", [3, [digits_reward, None, 0.5], [dict], {"a": 1}])
def test_a_reward_that_nobody_can_call_is_refused_by_its_key(tmp_path, reward_funcs):
    with pytest.raises(TypeError, match="`reward_funcs`: number [02] is "):
        small_trainer(tmp_path, reward_funcs=reward_funcs)

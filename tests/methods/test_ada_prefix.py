"""AdaPrefix: the steering by hand, the update against float64, its limit, resuming, and refusals."""

import pytest
import torch
from datasets import Dataset
from trl import GRPOConfig, GRPOTrainer

from tests.helpers.groups import (
    assert_resumes,
    batches,
    group_trainer,
    recording,
    replay_group,
    sample_these,
    trace_rows,
)
from tests.helpers.resume import assert_same
from tests.helpers.training import rl_rows, small_config, small_lora
from trl_bridge import AdaPrefixConfig, AdaPrefixTrainer


OPTIONS = {
    "max_completion_length": 14,
    "success_threshold": 2.0,
    "optim": "sgd",
    "learning_rate": 0.1,
    "max_grad_norm": 0.0,
}
TOLERANCE = 2e-4


def build(folder, trainer_class=AdaPrefixTrainer, **changes):
    return group_trainer(folder, trainer_class, **{"train_dataset": trace_rows(every=2), **OPTIONS, **changes})


@pytest.mark.parametrize(
    "changes", [{}, {"loss_type": "grpo", "beta": 0.1, "num_iterations": 2}], ids=["dapo", "grpo, twice"]
)
def test_update_equals_the_reference(tmp_path, changes):
    trainer = build(tmp_path, recording(AdaPrefixTrainer), **changes)
    trainer.train()
    assert any(batch["expert_mask"].any() for batch in batches(trainer))
    assert max(replay_group(trainer, lambda p: p.policy_loss())) < TOLERANCE


def test_a_lora_student(tmp_path):
    trainer = build(tmp_path, recording(AdaPrefixTrainer), peft_config=small_lora())
    trainer.train()
    moved = {n for n in trainer.start if not torch.equal(trainer.start[n], trainer.states[-1][n])}
    assert moved and all("lora" in name for name in moved)


def test_the_share_is_steered_by_the_success_rate(tmp_path, monkeypatch):
    """One question; the rollouts' last character says whether they are right."""
    rows = Dataset.from_dict({"prompt": ["1+1="], "expert": ["abcdefghi!"]})
    rates = iter([0.0, 1.0, 0.75, 0.5])
    reward = lambda completions, **kwargs: (lambda right: [float(row < right) for row in range(4)])(next(rates) * 4)  # noqa: E731
    sample_these(monkeypatch, ["1"])
    options = {
        "train_dataset": rows, "reward_funcs": reward, "per_device_train_batch_size": 4, "gradient_accumulation_steps": 1, "max_steps": 4,
        "prefix_start": 0.6, "prefix_rate": 0.4, "prefix_high": 0.9, "success_threshold": 1.0, "prefix_steps": 100,
        "prefix_withdrawal": 0.0,
    }  # fmt: skip
    trainer = build(tmp_path, recording(AdaPrefixTrainer), **options)
    trainer.train()
    shares = [0.6, 0.8, 0.6, 0.5, 0.5]
    assert [e["ada_prefix/share"] for e in trainer.logged if "loss" in e] == pytest.approx(shares[:4])
    assert [e["ada_prefix/success"] for e in trainer.logged if "loss" in e] == [0.0, 1.0, 0.75, 0.5]
    assert list(trainer.shares.values()) == pytest.approx(shares[4:])
    # Ten characters and the token that ends the trace.
    assert [int(batch["expert_mask"].sum(1)[0]) for batch in batches(trainer)] == [
        int(s * 10 + 1e-9) for s in shares[:4]
    ]
    # Prefixes are out of the loss, and all rollouts of a group have the same one.
    for batch in batches(trainer):
        assert (
            not (batch["expert_mask"] & batch["tool_mask"]).any()
            and len(set(batch["expert_mask"].sum(1).tolist())) == 1
        )


def test_a_question_is_clamped_and_unknown_rewards_tell_nothing(tmp_path):
    for reward, want in ((0.0, 0.3), (9.0, 0.0), (None, None)):
        options = {
            "reward_funcs": lambda completions, reward=reward, **kwargs: [reward] * len(completions),
            "prefix_rate": 9.0,
        }
        trainer = build(tmp_path, max_steps=1, prefix_start=0.1, prefix_high=0.3, **options)
        trainer.train()
        assert set(trainer.shares.values()) == (set() if want is None else {want})


def test_it_is_withdrawn(tmp_path):
    trainer = build(
        tmp_path,
        recording(AdaPrefixTrainer),
        max_steps=6,
        prefix_steps=4,
        prefix_high=0.8,
        prefix_start=0.8,
        prefix_rate=1e-9,
    )
    high = []
    for step in range(7):
        trainer.state.global_step = step
        high.append(trainer.high())
    assert high == pytest.approx([0.8, 0.8, 0.8, 0.4, 0.0, 0.0, 0.0])
    trainer.state.global_step = 0
    trainer.train()
    shown = [any(batch["expert_mask"].any() for batch in window) for window in trainer.windows]
    assert shown == [True] * 4 + [False] * 2


@pytest.mark.parametrize("never", [{"prefix_high": 0.0}, {"expert_probability": 0.0}])
def test_without_prefixes_it_is_grpo_to_the_bit(tmp_path, never):
    shared = {name: value for name, value in OPTIONS.items() if name != "success_threshold"} | {
        "loss_type": "dapo",
        "num_iterations": 2,
    }
    ours = build(tmp_path, padding_free=False, **never, **shared)
    ours.train()
    args = small_config(tmp_path, GRPOConfig, **shared)
    grpo = group_trainer(tmp_path, GRPOTrainer, args=args, train_dataset=trace_rows(every=2))
    grpo.train()
    assert_same(dict(ours.model.named_parameters()), dict(grpo.model.named_parameters()))


@pytest.mark.parametrize(
    ("changes", "stop"),
    [
        ({"max_steps": 4}, 2),
        ({"max_steps": 5, "num_iterations": 2, "steps_per_generation": 4, "per_device_train_batch_size": 4}, 3),
    ],
    ids=["between", "inside a generation batch"],
)
def test_resume_is_exact(tmp_path, changes, stop):
    saving = {**changes, "save_strategy": "steps", "save_steps": 1, "prefix_rate": 0.5}
    made = []
    assert_resumes(tmp_path, lambda folder, **more: made.append(build(folder, **saving, **more)) or made[-1], stop)
    straight, _, resumed = made
    assert straight.shares == resumed.shares and len(set(resumed.shares.values())) > 1
    other = build(tmp_path / "halves", **{**saving, "prefix_rate": 0.4})
    with pytest.raises(ValueError, match="prefix_rate"):
        other.train(resume_from_checkpoint=str(tmp_path / "halves" / f"checkpoint-{stop}"))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"prefix_start": 1.5}, "prefix_start"),
        ({"prefix_target": -0.1}, "prefix_target"),
        ({"prefix_rate": 0.0}, "prefix_rate"),
        ({"prefix_steps": 0}, "prefix_steps"),
        ({"prefix_withdrawal": 2.0}, "prefix_withdrawal"),
        ({"loss_scale": "paper", "loss_type": "dr_grpo"}, "no SFT term|AdaPrefix has none"),
        ({"expert_max_length": 300, "max_completion_length": 200}, "expert_max_length"),
    ],
)
def test_options_are_refused(tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        AdaPrefixConfig(str(tmp_path), use_cpu=True, bf16=False, **options)


def test_rows_without_the_column(tmp_path):
    with pytest.raises(ValueError, match="no `expert` column"):
        build(tmp_path, train_dataset=rl_rows())

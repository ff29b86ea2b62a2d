"""The policy as its own teacher: each objective against float64, its limits, TRL's SDFT, resuming, and refusals."""

import warnings

import pytest
import torch
from datasets import Dataset
from trl import GRPOConfig, GRPOTrainer

from tests.helpers.group_losses import self_teacher_loss
from tests.helpers.groups import (
    assert_resumes,
    batches,
    group_trainer,
    hint_rows,
    recording,
    replay_group,
)
from tests.helpers.resume import assert_same
from tests.helpers.teachers import sharp, stored
from tests.helpers.training import movement_error, rl_rows, small_config, small_lora
from trl_bridge import SelfTeacherConfig, SelfTeacherTrainer
from trl_bridge.models import tiny_tokenizer
from trl_bridge.objectives.self_distill import divergence, fading, ramped, reweighted


TEMPLATE = "{prompt}{demonstration}!"
OPTIONS = {
    "hint_template": TEMPLATE,
    "optim": "sgd",
    "learning_rate": 0.1,
    "max_grad_norm": 0.0,
    "max_completion_length": 8,
}
TOLERANCE = 2e-4


def build(folder, trainer_class=SelfTeacherTrainer, model=None, **changes):
    options = {"train_dataset": hint_rows(every=2), **OPTIONS, **changes}
    return group_trainer(folder, trainer_class, model or sharp(3), **options)


def trained(folder, **changes):
    trainer = build(folder, recording(SelfTeacherTrainer), **changes)
    trainer.train()
    for update, window in enumerate(trainer.windows):
        for batch in window:
            batch["update"] = update
    trainer.initial_model = sharp(3)
    return trainer


@pytest.mark.parametrize(
    ("options", "formula"),
    [
        ({"objective": "sdft", "loss_type": "grpo"}, {}),
        ({"objective": "sdft", "kl_direction": "forward", "kl_clip": 0.05, "temperature": 0.7}, {"direction": "forward", "clip": 0.05}),
        ({"objective": "sdft", "kl_weight": 0.5, "kl_clip": 0.1, "loss_type": "dr_grpo"}, {"weight": 0.5, "clip": 0.1}),
        ({"objective": "sdpg", "kl_weight": 0.7}, {"weight": 0.7, "gate": True}),
        ({"objective": "sdpg", "kl_weight": 0.7, "preset": "code", "beta": 0.1, "entropy_coef": 0.05, "num_iterations": 2}, {"weight": 0.7}),
        ({"objective": "rlsd", "rlsd_decay_steps": 6}, {"share": lambda step: 0.5 * (1 - step / 6)}),
    ],
    ids=["sdft", "sdft, forward, clipped", "sdft, reverse, clipped", "sdpg", "sdpg, code", "rlsd"],
)  # fmt: skip
def test_update_equals_the_reference(tmp_path, options, formula):
    trainer = trained(tmp_path, **options)
    assert any(batch["hinted"].any() for batch in batches(trainer)) and not all(
        b["hinted"].all() for b in batches(trainer)
    )
    assert max(replay_group(trainer, self_teacher_loss(trainer.args, **formula))) < TOLERANCE
    if options["objective"] != "rlsd":
        assert all(entry["self_teacher/kl"] > 0 for entry in trainer.logged if "loss" in entry)


@pytest.mark.parametrize("objective", ["sdft", "rlsd"])
def test_the_average_is_the_teacher(tmp_path, objective):
    trainer = trained(tmp_path, objective=objective, self_teacher="average", self_teacher_rate=0.3, rlsd_decay_steps=0)
    averages = [{n: t.double() for n, t in trainer.start.items()}]
    for state in trainer.states:
        averages.append({n: 0.7 * t + 0.3 * state[n].double() for n, t in averages[-1].items()})
    formula = self_teacher_loss(trainer.args, averages=averages, share=lambda step: 0.5)
    assert max(replay_group(trainer, formula)) < TOLERANCE
    assert_same({n: t.float() for n, t in averages[-1].items()}.keys(), trainer._average.values.keys())
    assert movement_error(trainer._average.values, averages[-1], trainer.start) < TOLERANCE


def test_a_lora_student(tmp_path):
    for objective in ("sdft", "sdpg", "rlsd"):
        options = {"objective": objective, "peft_config": small_lora(), "self_teacher": "average", "max_steps": 2}
        trainer = build(tmp_path / objective, recording(SelfTeacherTrainer), **options)
        trainer.train()
        moved = {n for n in trainer.start if not torch.equal(trainer.start[n], trainer.states[-1][n])}
        assert (
            moved and all("lora" in name for name in moved) and all("lora" in name for name in trainer._average.values)
        )


# Limits


@pytest.mark.parametrize("never", [{"objective": "sdpg", "kl_weight": 0.0}, {"objective": "rlsd", "rlsd_weight": 0.0}])
def test_without_the_teacher_it_is_grpo_to_the_bit(tmp_path, never):
    shared = {name: value for name, value in OPTIONS.items() if name != "hint_template"} | {
        "loss_type": "dapo",
        "num_iterations": 2,
    }
    ours = build(tmp_path, padding_free=False, **never, **shared)
    ours.train()
    grpo = group_trainer(
        tmp_path, GRPOTrainer, sharp(3), args=small_config(tmp_path, GRPOConfig, **shared), train_dataset=hint_rows(every=2)
    )  # fmt: skip
    grpo.train()
    assert_same(dict(ours.model.named_parameters()), dict(grpo.model.named_parameters()))


def test_a_hint_that_says_nothing_teaches_nothing(tmp_path):
    """The teacher is the student where the two prompts are one: a divergence of zero, without gradient."""
    logits = torch.randn(5, 9, requires_grad=True)
    for direction in ("reverse", "forward"):
        kl = divergence(logits, logits.detach().clone(), direction)
        (gradient,) = torch.autograd.grad(kl.sum(), logits)
        assert float(kl.detach().abs().max()) == 0.0 and float(gradient.abs().max()) < 1e-7
    advantages = torch.tensor([[1.5], [-2.0], [0.0]])
    assert torch.equal(reweighted(advantages, torch.zeros(3, 4), 0.5, 0.2), advantages.expand(3, 4))
    rows = Dataset.from_list(
        [{**row, "expert": None} for row in hint_rows()][:15] + [{"prompt": "9+9=", "expert": "1"}]
    )
    trainer = build(tmp_path, recording(SelfTeacherTrainer), objective="sdft", train_dataset=rows, max_steps=1)
    trainer.train()
    hinted = any(batch["hinted"].any() for batch in batches(trainer))
    still = all(torch.equal(trainer.start[n], trainer.states[-1][n]) for n in trainer.start)
    assert still is not hinted


def test_weights():
    # A right rollout's token that the teacher finds likelier counts more, a wrong one's less.
    advantages = torch.tensor([[1.0], [-1.0]])
    ratio = torch.tensor([[0.1, -0.1, 5.0], [0.1, -0.1, -5.0]])
    got = reweighted(advantages, ratio, 1.0, 0.2)
    want = torch.tensor([[1.10517, 0.90484, 1.2], [-0.90484, -1.10517, -1.2]])
    assert torch.allclose(got, want, atol=1e-4)
    assert [fading(step, 0.5, 4) for step in (0, 2, 4, 9)] == [0.5, 0.25, 0.0, 0.0] and fading(7, 0.5, 0) == 0.5
    assert [ramped(step, 1.0, 2, 4, 10) for step in (0, 1, 2, 6, 8, 10)] == [0.0, 0.5, 1.0, 1.0, 0.5, 0.0]
    assert ramped(3, 0.1, 0, 0, 0) == 0.1


def test_the_control_shows_the_demonstration_of_another_question(tmp_path):
    rows = Dataset.from_dict({"prompt": [f"{n}+0=" for n in range(4)], "expert": [f"{n}{n}{n}" for n in range(4)]})
    seen = []
    for where in ("own", "other"):
        trainer = build(tmp_path, recording(SelfTeacherTrainer), train_dataset=rows, hint_from=where, max_steps=2)
        trainer.train()
        for batch in batches(trainer):
            hints = trainer.processing_class.batch_decode(batch["prompt_hint_ids"], skip_special_tokens=True)
            for hint in (text.replace(" ", "") for text in hints):
                question, demonstration = hint[0], hint[4:7]
                assert len(set(demonstration)) == 1 and hint == f"{question}+0={demonstration}!"
                seen.append((where, question == demonstration[0]))
    assert set(seen) == {("own", True), ("other", False)}
    # Drawn alike on every rank and after a resume.
    draws = [trainer.experts.draw_other("1+0=", generation, 0) for generation in range(6)]
    assert draws == [trainer.experts.draw_other("1+0=", generation, 0) for generation in range(6)]
    assert len({tuple(draw) for draw in draws}) > 1


# TRL's own


@pytest.mark.parametrize(("direction", "alpha"), [("reverse", 1.0), ("forward", 0.0)])
def test_sdft_is_trls_at_its_limit(tmp_path, monkeypatch, direction, alpha):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from trl.experimental.sdft import SDFTConfig, SDFTTrainer
    tokenizer = tiny_tokenizer()
    texts = [f"{row % 7}{'+' * (row % 4)}" for row in range(16)]
    completions = [tokenizer(text)["input_ids"] + [tokenizer.eos_token_id] for text in texts]
    rows = hint_rows().select(range(4))
    place = stored(tmp_path / "model", sharp(3))
    shared = {
        "output_dir": str(tmp_path), "use_cpu": True, "bf16": False, "report_to": "none", "max_steps": 1, "optim": "sgd",
        "learning_rate": 0.5, "max_grad_norm": 0.0, "num_generations": 4, "per_device_train_batch_size": 8, "seed": 11,
        "gradient_accumulation_steps": 2, "max_completion_length": 10, "gradient_checkpointing": False, "save_strategy": "no",
        "shuffle_dataset": False, "lr_scheduler_type": "constant",
    }  # fmt: skip

    def theirs(trainer, prompts, *args, **kwargs):
        return prompts, [completions[row] for row in range(len(prompts))]

    monkeypatch.setattr(SDFTTrainer, "_generate", theirs)
    theirs_rows = rows.rename_column("expert", "privileged_context")
    template = TEMPLATE.replace("demonstration", "privileged_context")
    sdft = SDFTTrainer(
        place,
        args=SDFTConfig(
            teacher_model_kind="live", distillation_mode="full_logits", distillation_alpha=alpha, distillation_topk=None,
            teacher_prompt_template=template, model_init_kwargs={"dtype": "float32"}, **shared,
        ),
        train_dataset=theirs_rows,
        processing_class=tokenizer,
    )  # fmt: skip
    sdft.train()

    def ours(trainer, prompt_ids, *args, **kwargs):
        return [list(completions[row]) for row in range(len(prompt_ids))], None

    monkeypatch.setattr(GRPOTrainer, "_generate_single_turn", ours)
    trainer = SelfTeacherTrainer(
        sharp(3),
        reward_funcs=lambda completions, **kwargs: [0.0] * len(completions),
        args=SelfTeacherConfig(
            objective="sdft", kl_direction=direction, loss_type="grpo", hint_template=TEMPLATE, **shared
        ),
        train_dataset=rows,
        processing_class=tokenizer,
    )
    trainer.train()
    start = dict(sharp(3).named_parameters())
    assert movement_error(dict(trainer.model.named_parameters()), dict(sdft.model.named_parameters()), start) < 1e-4


# Resuming


@pytest.mark.parametrize(
    "options",
    [
        {"objective": "sdft", "self_teacher": "average"},
        {"objective": "sdpg", "kl_weight": 0.5, "kl_warmup_steps": 3},
        {
            "objective": "rlsd",
            "num_iterations": 2,
            "steps_per_generation": 4,
            "per_device_train_batch_size": 4,
            "hint_from": "other",
        },
    ],
    ids=["sdft", "sdpg", "rlsd"],
)
def test_resume_is_exact(tmp_path, options):
    saving = {**options, "save_strategy": "steps", "save_steps": 1, "max_steps": 4}
    assert_resumes(tmp_path, lambda folder, **more: build(folder, **saving, **more), 3)
    other = build(tmp_path / "halves", **{**saving, "hint_from": "own" if "hint_from" in options else "other"})
    with pytest.raises(ValueError, match="hint_from"):
        other.train(resume_from_checkpoint=str(tmp_path / "halves" / "checkpoint-3"))


def test_the_average_of_16_bit_weights_does_not_round_away_what_an_update_adds(tmp_path):
    trainer = build(tmp_path, model=sharp(3).bfloat16(), self_teacher="average", self_teacher_rate=0.01)
    trainer.build_parts()
    weights = dict(trainer.model.named_parameters())
    want = {name: p.detach().double() for name, p in weights.items()}
    with torch.no_grad():
        for parameter in weights.values():
            parameter.mul_(1.02)
    for _ in range(50):
        trainer.after_step()
        want = {name: 0.99 * want[name] + 0.01 * p.detach().double() for name, p in weights.items()}
    for name, average in trainer._average.values.items():
        torch.testing.assert_close(average.double(), want[name], rtol=1e-5, atol=1e-7)
    with trainer._as_teacher():
        assert all(p.dtype is torch.bfloat16 for p in weights.values())


# What is refused


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"objective": "opsd"}, "objective"),
        ({"hint_template": "{prompt}"}, "{demonstration} once"),
        ({"hint_template": "{prompt}{prompt}{demonstration}"}, "{prompt} once"),
        ({"objective": "sdft", "kl_weight": 0.0}, "nothing to learn"),
        ({"objective": "sdft", "teachers": ["a"]}, "`teachers` belongs to an RL loss"),
        ({"objective": "sdft", "beta": 0.1}, "`beta` belongs to an RL loss"),
        ({"objective": "sdft", "entropy_coef": 0.1}, "`entropy_coef` belongs to an RL loss"),
        ({"objective": "rlsd", "kl_weight": 0.1}, "`kl_weight` has no effect"),
        ({"objective": "rlsd", "kl_gate": True}, "kl_gate"),
        ({"kl_clip": 0.0}, "kl_clip"),
        ({"kl_direction": "both"}, "kl_direction"),
        ({"self_teacher_rate": 1.5}, "self_teacher_rate"),
        ({"rlsd_weight": -0.1}, "rlsd_weight"),
        ({"hint_from": "mine"}, "hint_from"),
    ],
)
def test_options_are_refused(tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        SelfTeacherConfig(str(tmp_path), use_cpu=True, bf16=False, **options)


def test_rows_without_the_column(tmp_path):
    with pytest.raises(ValueError, match="no `expert` column"):
        build(tmp_path, train_dataset=rl_rows())

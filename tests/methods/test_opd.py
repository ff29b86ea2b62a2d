"""OPD: the trained update against the float64 formulas, and what the docstring says."""

import pytest
import torch
from trl import DistillationConfig, DistillationTrainer

from tests.helpers.distillation import (
    distillation_trainer,
    recording,
    replay,
    small_student,
    small_teacher,
    tokenizer,
    weights_of,
)
from tests.helpers.groups import assert_resumes
from tests.helpers.training import movement_error, rl_rows
from trl_bridge import OPDConfig, OPDTrainer


TOLERANCE = 2e-4
SGD = {"optim": "sgd", "learning_rate": 5e-3}

CASES = {
    "adamw, clipped": {"max_grad_norm": 1.0},
    "sequence": {"loss_aggregation": "sequence", **SGD},
    "clip and weight": {"advantage_clip": 0.3, "opd_weight": 1.25, **SGD},
    "temperature": {"temperature": 0.7, **SGD},
    "checkpointing": {"gradient_checkpointing": True},
}


@pytest.mark.parametrize("case", CASES)
def test_update_equals_the_reference(tmp_path, case):
    trainer = distillation_trainer(tmp_path, recording(OPDTrainer), **CASES[case])
    trainer.train()
    lengths = {int(n) for window in trainer.windows for b in window for n in b["completion_mask"].sum(1)}
    assert len(lengths) > 1, "rows of one length hide how they are averaged"
    errors = replay(trainer)
    assert len(errors) == 2 and max(errors) < TOLERANCE
    if case == "clip and weight":
        assert 0 < trainer.logged[0]["opd/advantage_clip_fraction"] < 1


def test_tokens_of_tools_do_not_count(tmp_path):
    class Masked(recording(OPDTrainer)):
        def _generate_and_score_completions(self, inputs):
            output = super()._generate_and_score_completions(inputs)
            mask = torch.ones_like(output["completion_mask"])
            mask[::2, 1:3] = 0
            output["tool_mask"] = mask
            output["num_items_in_batch"] = (mask * output["completion_mask"]).sum()
            return output

    trainer = distillation_trainer(tmp_path, Masked, **SGD)
    trainer.train()
    assert max(replay(trainer)) < TOLERANCE


@pytest.mark.parametrize("aggregation", ["token", "sequence"])
def test_split_into_micro_batches_makes_no_difference(tmp_path, aggregation):
    states = []
    for size in (8, 2, 1) if aggregation == "token" else (8, 1):
        trainer = distillation_trainer(
            tmp_path,
            OPDTrainer,
            per_device_train_batch_size=size,
            gradient_accumulation_steps=8 // size,
            loss_aggregation=aggregation,
            max_steps=1,
            **SGD,
        )
        start = weights_of(trainer)
        trainer.train()
        states.append(weights_of(trainer))
    for state in states[1:]:
        assert movement_error(state, states[0], start) < 1e-5


def test_a_student_like_its_teacher_stands_still(tmp_path):
    trainer = distillation_trainer(tmp_path, OPDTrainer, teacher_model=small_student(), max_steps=1, **SGD)
    start = weights_of(trainer)
    trainer.train()
    # The same weights give the same scores to the bit, chunk by chunk.
    assert all(torch.equal(start[name], value) for name, value in weights_of(trainer).items())
    assert trainer.state.log_history[0]["opd/reverse_kl"] == 0.0


def test_metrics(tmp_path):
    trainer = distillation_trainer(tmp_path, recording(OPDTrainer), max_steps=1)
    trainer.train()
    (entry,) = [log for log in trainer.logged if "loss" in log]
    student, teacher, found = small_student(), small_teacher(), []
    for batch in trainer.windows[0]:
        ids = torch.cat([batch["prompt_ids"], batch["completion_ids"]], dim=1)
        mask = torch.cat([batch["prompt_mask"], batch["completion_mask"]], dim=1)
        length, kept = batch["completion_ids"].size(1), batch["completion_mask"].bool()
        scores = []
        for model in (student, teacher):
            logits = model(input_ids=ids, attention_mask=mask).logits[:, -length - 1 : -1]
            log_p = torch.log_softmax(logits, -1)
            scores.append(log_p.gather(2, batch["completion_ids"][..., None]).squeeze(2)[kept])
        advantages = scores[1] - scores[0]
        found.append([advantages.mean().item(), advantages.abs().mean().item(), scores[1].mean().item()])
    mean, size, teacher_logprob = torch.tensor(found).mean(0).tolist()
    assert entry["opd/advantage_mean"] == pytest.approx(mean, abs=1e-5)
    assert entry["opd/reverse_kl"] == pytest.approx(-mean, abs=1e-5)
    assert entry["opd/advantage_abs"] == pytest.approx(size, abs=1e-5)
    assert entry["opd/teacher_logprob"] == pytest.approx(teacher_logprob, abs=1e-5)
    assert entry["opd/advantage_clip_fraction"] == 0.0 and entry["entropy"] > 0


def test_rollouts_are_those_of_trls_trainer(tmp_path):
    theirs = distillation_trainer(tmp_path, recording(DistillationTrainer), DistillationConfig, max_steps=1)
    theirs.train()
    ours = distillation_trainer(tmp_path, recording(OPDTrainer), max_steps=1)
    ours.train()
    for a, b in zip(theirs.windows[0], ours.windows[0], strict=True):
        assert all(torch.equal(a[name], b[name]) for name in a)
    assert theirs.logged[0]["entropy"] == pytest.approx(ours.logged[0]["entropy"], abs=1e-5)


def test_resume_is_exact(tmp_path):
    # 16 prompts and 8 an update: the second epoch, whose order a new process would not know, begins after update 2.
    options = {"max_steps": 4, "save_strategy": "steps", "save_steps": 1}
    assert_resumes(
        tmp_path, lambda folder, **changes: distillation_trainer(folder, OPDTrainer, **options, **changes), stop=3
    )


def test_resume_with_other_options_is_refused(tmp_path):
    options = {"max_steps": 1, "save_strategy": "steps", "save_steps": 1}
    distillation_trainer(tmp_path, OPDTrainer, **options).train()
    trainer = distillation_trainer(tmp_path, OPDTrainer, advantage_clip=1.0, **options)
    with pytest.raises(ValueError, match="`advantage_clip` was None, now 1.0"):
        trainer.train(resume_from_checkpoint=True)


def test_evaluation(tmp_path):
    options = {"eval_dataset": rl_rows(), "eval_strategy": "steps", "eval_steps": 1, "max_steps": 1}
    trainer = distillation_trainer(tmp_path, OPDTrainer, per_device_eval_batch_size=8, **options)
    trainer.train()
    (entry,) = [log for log in trainer.state.log_history if "eval_loss" in log]
    assert entry["eval_loss"] == entry["eval_loss"] and entry["eval_opd/reverse_kl"] > 0


def test_default_arguments_and_teacher_by_name(tmp_path):
    small_teacher().save_pretrained(tmp_path / "teacher")
    tokenizer().save_pretrained(tmp_path / "teacher")
    options = {"teacher_model": None, "teacher_model_name_or_path": str(tmp_path / "teacher"), **SGD}
    trainer = distillation_trainer(tmp_path, recording(OPDTrainer), **options)
    assert isinstance(trainer.args, OPDConfig)
    trainer.train()
    assert max(replay(trainer)) < TOLERANCE

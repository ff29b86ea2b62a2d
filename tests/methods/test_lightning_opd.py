"""`LightningOPDTrainer` against float64 with an online teacher, its limits, its refusals, and an exact resume."""

import json
import math

import pytest
import torch
from accelerate.utils import set_seed
from datasets import Dataset, concatenate_datasets
from peft import LoraConfig
from transformers import AutoModelForCausalLM

from tests.helpers import distillation
from tests.helpers.lightning_opd import (
    identity,
    log_probs,
    make,
    recording,
    replay,
    scored,
    sequences,
    student,
    teacher,
)
from tests.helpers.resume import StopAt, assert_same
from tests.helpers.training import movement_error
from trl_bridge import LightningOPDConfig, OPDTrainer
from trl_bridge.distillation.scored_rows import ScoredCollator, check_complete, rows_hash, scored_rows
from trl_bridge.distillation.scoring import LocalTeacher, Rollout
from trl_bridge.distillation.teacher import head_of
from trl_bridge.models import tiny_tokenizer
from trl_bridge.objectives.lm_head import teacher_scores


TOLERANCE = 1e-4
LOGGED = ("loss", "opd/advantage_mean", "opd/advantage_abs", "opd/advantage_clip_fraction", "opd/reverse_kl")


@pytest.fixture(autouse=True)
def quick_batches(monkeypatch):
    monkeypatch.setattr("accelerate.utils.memory.clear_device_cache", lambda garbage_collection=False: None)


def logs(trainer):
    return [entry for entry in trainer.state.log_history if "loss" in entry]


def check_against_reference(trainer, model=None, **options):
    steps = list(replay(student() if model is None else model, trainer.start, trainer.windows, 0.01, **options))
    assert len(steps) == len(trainer.states) == len(logs(trainer))
    for (weights, metrics), state, entry in zip(steps, trainer.states, logs(trainer), strict=True):
        assert movement_error(state, weights, trainer.start) < TOLERANCE
        for name in LOGGED:
            assert entry[name] == pytest.approx(metrics[name], rel=1e-3, abs=1e-5), name


@pytest.mark.parametrize(
    ("aggregation", "clip"), [("sequence", 10.0), ("sequence", None), ("token", 10.0), ("sequence", 0.5)]
)
def test_update_equals_an_online_teacher(tmp_path, aggregation, clip):
    # The metrics of a logged update are means over its micro-batches, as TRL's are: here it has one.
    options = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 1, "max_steps": 3}
    trainer = make(tmp_path, cls=recording, loss_aggregation=aggregation, advantage_clip=clip, **options)
    trainer.train()
    check_against_reference(trainer, clip=clip, aggregation=aggregation)
    assert logs(trainer)[0]["opd/advantage_clip_fraction"] > 0 or clip != 0.5


@pytest.mark.parametrize("aggregation", ["sequence", "token"])
def test_the_split_into_micro_batches_makes_no_difference(tmp_path, aggregation):
    ends = []
    for size in (8, 4, 1):
        options = {"per_device_train_batch_size": size, "gradient_accumulation_steps": 8 // size, "max_steps": 1}
        trainer = make(tmp_path, cls=recording, loss_aggregation=aggregation, **options)
        trainer.train()
        (weights, metrics), = replay(student(), trainer.start, trainer.windows, 0.01, aggregation=aggregation)  # fmt: skip
        assert len(trainer.windows[0]) == 8 // size
        assert movement_error(trainer.states[0], weights, trainer.start) < TOLERANCE
        assert logs(trainer)[0]["loss"] == pytest.approx(metrics["loss"], rel=1e-4)
        ends.append(trainer.states[0])
    assert all(movement_error(end, ends[0], trainer.start) < 1e-5 for end in ends[1:])


def test_a_teacher_like_the_student_gives_no_gradient_at_all(tmp_path):
    # Scored by the very forward that training makes: all rows in one batch, in their order.
    rows = scored()
    batch = ScoredCollator(pad_token_id=tiny_tokenizer().pad_token_id)(list(scored_rows(
        rows, tiny_tokenizer(), require_same_teacher=True)[0]))  # fmt: skip
    trainer = make(tmp_path, rows=rows)
    with torch.no_grad():
        outputs = trainer.model(
            **{name: batch[name] for name in ("input_ids", "labels", "attention_mask")}, fused_lm_head=True
        )
    own = [row[mask].tolist() for row, mask in zip(outputs.log_probs, outputs.label_mask, strict=True)]
    options = {"per_device_train_batch_size": 8, "gradient_accumulation_steps": 1, "max_steps": 1}
    copied = rows.remove_columns("teacher_logprobs").add_column("teacher_logprobs", own)
    trainer = make(tmp_path, cls=recording, rows=copied, train_sampling_strategy="sequential", **options)
    trainer.train()
    entry = logs(trainer)[0]
    assert entry["grad_norm"] == entry["loss"] == entry["opd/reverse_kl"] == 0.0
    assert_same(trainer.states[0], trainer.start)


def test_moves_towards_the_teacher_and_logs_how_far_it_went(tmp_path):
    rows = scored(reference=True)
    options = {"per_device_train_batch_size": 8, "gradient_accumulation_steps": 1, "optim": "adamw_torch"}
    trainer = make(tmp_path, rows=rows, max_steps=12, learning_rate=1e-3, **options)
    trainer.train()
    first, last = logs(trainer)[0], logs(trainer)[-1]
    # On fixed rollouts every token is pulled to the teacher's score.
    assert last["opd/advantage_abs"] < 0.5 * first["opd/advantage_abs"]
    assert first["opd/weight_mean"] == pytest.approx(1, abs=1e-4) and first["opd/weight_std"] < 1e-2
    assert last["opd/weight_std"] > 0.1
    assert first["opd/teacher_logprob"] == pytest.approx(
        sum(map(sum, rows["teacher_logprobs"])) / sum(map(len, rows["teacher_logprobs"])), rel=1e-4
    )
    assert {"entropy", "mean_token_accuracy", "num_tokens"} <= first.keys()  # the parent's own


@pytest.mark.parametrize("aggregation", ["sequence", "token"])
def test_first_update_is_opds_on_its_rollouts_and_then_they_part(tmp_path, aggregation):
    options = {"per_device_train_batch_size": 8, "gradient_accumulation_steps": 1, "max_steps": 2, "optim": "sgd",
               "learning_rate": 0.1, "lr_scheduler_type": "constant", "max_grad_norm": 0.0, "logging_steps": 1,
               "loss_aggregation": aggregation, "advantage_clip": None}  # fmt: skip
    opd = distillation.distillation_trainer(tmp_path / "opd", distillation.recording(OPDTrainer), **options)
    opd.train()
    batch = opd.windows[0][0]
    kept = [[ids[mask.bool()].tolist() for ids, mask in zip(batch[f"{part}_ids"], batch[f"{part}_mask"], strict=True)]
            for part in ("prompt", "completion")]  # fmt: skip
    rollouts = [Rollout(*pair) for pair in zip(*kept, strict=True)]
    (scores,) = LocalTeacher(distillation.small_teacher(), 8)(rollouts)
    rows = Dataset.from_dict(
        {"prompt_ids": kept[0], "completion_ids": kept[1], "teacher_logprobs": scores,
         "scored_with": [identity(distillation.tokenizer())] * 8}
    )  # fmt: skip
    lightning = make(
        tmp_path,
        cls=recording,
        model=distillation.small_student(),
        rows=rows,
        tokenizer=distillation.tokenizer(),
        **options,
    )
    lightning.train()
    assert len({len(ids) for ids in kept[1]}) > 1  # of different lengths
    assert movement_error(lightning.states[0], opd.states[0], opd.start) < 1e-4
    for name in ("loss", "opd/advantage_mean", "opd/teacher_logprob", "opd/reverse_kl"):
        assert logs(lightning)[0][name] == pytest.approx(logs(opd)[0][name], rel=1e-4), name
    # The second update of OPD is on new rollouts, Lightning's on the old ones.
    assert movement_error(lightning.states[1], opd.states[1], opd.start) > 1e-2


@pytest.mark.parametrize("lora", [False, True])
def test_log_probabilities_in_bf16_are_opds(tmp_path, lora):
    config = LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights=False) if lora else None
    model = make(tmp_path, bf16=True, peft_config=config).model.eval()
    ids = torch.arange(3, 15)[None]
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        plain = model.get_base_model() if lora else model
        hidden = plain.base_model(ids).last_hidden_state[0, :-1]
        want = teacher_scores(hidden, ids[0, 1:], head_of(plain, 1.0)).log_probs
        outputs = model(input_ids=ids, labels=ids, fused_lm_head=True)
    assert torch.allclose(outputs.log_probs[0], want, atol=1e-5)
    assert outputs.entropy is not None and outputs.is_top1 is not None  # the parent's metrics


@pytest.mark.parametrize("aggregation", ["sequence", "token"])
def test_evaluation_is_the_loss_of_its_rows(tmp_path, aggregation):
    rows = scored(3, seed=1)
    trainer = make(
        tmp_path, evaluation=rows, loss_aggregation=aggregation, per_device_eval_batch_size=3, advantage_clip=None
    )
    batch = ScoredCollator(pad_token_id=0)(list(trainer.eval_dataset))
    losses = [-(torch.tensor(scores) - own) * own for scores, own in
              zip(rows["teacher_logprobs"], (log_probs(student(), *row) for row in sequences(batch)), strict=True)]  # fmt: skip
    want = torch.stack([x.mean() for x in losses]).mean() if aggregation == "sequence" else torch.cat(losses).mean()
    results = trainer.evaluate()
    assert results["eval_loss"] == pytest.approx(float(want), rel=1e-4) and "eval_opd/reverse_kl" in results
    assert trainer.evaluate(scored(3, seed=1))["eval_loss"] == pytest.approx(float(want), rel=1e-4)
    with pytest.raises(NotImplementedError, match="`evaluate`"):
        trainer.predict(trainer.eval_dataset)


def test_lora_student(tmp_path):
    set_seed(0)
    config = LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", init_lora_weights=False)
    options = {"gradient_accumulation_steps": 1, "per_device_train_batch_size": 8, "advantage_clip": None}
    trainer = make(tmp_path, cls=recording, peft_config=config, **options)
    trainer.train()
    # Two updates of A and B on the merged model's loss, in float64.
    model = trainer.accelerator.unwrap_model(trainer.model)
    frozen = {name for name, parameter in model.named_parameters() if not parameter.requires_grad}
    base = dict(student().named_parameters())
    plain = {n.removeprefix("base_model.model.").replace(".base_layer", ""): model.get_parameter(n) for n in frozen}
    assert_same(plain, {n: base[n] for n in plain})
    steps = list(replay_lora(model, trainer))
    for weights, state in zip(steps, trainer.states, strict=True):
        assert movement_error(state, weights, trainer.start) < TOLERANCE


def replay_lora(model, trainer):
    """Plain gradient steps of A and B in float64, through PEFT's own forward."""
    judge = teacher().double()
    model.double().load_state_dict(trainer.start, strict=False)
    moving = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    for window in trainer.windows:
        losses = []
        for ids, first in (row for batch in window for row in sequences(batch)):
            own = log_probs(model, ids, first)
            losses.append((-(log_probs(judge, ids, first) - own).detach() * own).mean())
        gradients = torch.autograd.grad(torch.stack(losses).mean(), moving.values())
        with torch.no_grad():
            for parameter, gradient in zip(moving.values(), gradients, strict=True):
                parameter -= 0.01 * gradient
        yield {name: parameter.detach().clone() for name, parameter in moving.items()}


def test_long_rows_lose_their_end_and_prompts_that_fill_the_limit_are_dropped():
    rows, _ = scored_rows(scored(), tiny_tokenizer(), require_same_teacher=True, max_length=4)
    assert len(rows) == 6  # two of the prompts have four tokens
    for row in rows:
        assert len(row["input_ids"]) == len(row["labels"]) == len(row["teacher_logprobs"]) <= 4
        assert [score != 0 for score in row["teacher_logprobs"]] == [label != -100 for label in row["labels"]]
    with pytest.raises(ValueError, match="every prompt of `train_dataset` fills `max_length=2`"):
        scored_rows(scored(), tiny_tokenizer(), require_same_teacher=True, max_length=2)


def broken(**columns):
    rows = scored(2).to_dict()
    return Dataset.from_dict({name: values for name, values in {**rows, **columns}.items() if values is not None})


SCORES = [[-1.0], [-1.0] * 9]


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (broken(teacher_logprobs=[[-1.0], [-1.0] * 8]), "row 1 of `train_dataset`.*9 completion tokens and 8 scores"),
        (broken(teacher_logprobs=[[-math.inf], [-1.0] * 9]), "row 0.*token 0 is -inf"),
        (broken(teacher_logprobs=[[math.nan], [-1.0] * 9]), "row 0.*token 0 is nan"),
        (broken(prompt_ids=[[], [5]]), "row 0 of `train_dataset` has an empty prompt"),
        (broken(teacher_logprobs=None), "no column 'teacher_logprobs'.*score-rollouts"),
        (broken(scored_with=["{}"] * 2), "`scored_with` does not say"),
        (broken(scored_with=["me"] * 2), "`scored_with` does not say"),
        (broken(reference_logprobs=[[-1.0], [-1.0]]), "`reference_logprobs`: has 9 completion tokens and 1"),
        (broken(scored_with=[identity(), identity(tiny_tokenizer("0123456789"))]), "another tokenizer"),
        (broken(scored_with=[identity(), identity(tiny_tokenizer(), conversational=True)]), None),
        (broken(scored_with=[identity(), identity(teacher={"model": "QwQ"})]), "scored by 'QwQ'.*written by 'big'"),
        (scored(2).select([]), "`train_dataset` is empty"),
        (broken(prompt_ids=[[5], [5, 10**6]]), "row 1 of `train_dataset` has the token id 1000000 in `prompt_ids`"),
        (broken(completion_ids=[[-1], [5] * 9]), "row 0 of `train_dataset` has the token id -1 in `completion_ids`"),
    ],
)  # fmt: skip
def test_rows_that_are_refused(tmp_path, rows, message):
    if message is None:  # a template hash of None: there is none to compare
        make(tmp_path, rows=rows)
        return
    with pytest.raises(ValueError, match=message):
        make(tmp_path, rows=rows)


@pytest.mark.parametrize("given", [broken(prompt_ids=[[5], [5, 9999]]), {"late": broken(prompt_ids=[[5], [5, 9999]])}])
def test_evaluation_rows_with_other_tokens_are_refused(tmp_path, given):
    with pytest.raises(ValueError, match=r"row 1 of `eval_dataset.*has the token id 9999"):
        make(tmp_path, rows=scored(2), evaluation=given)


def test_rows_of_a_file_are_counted_against_what_they_say(caplog):
    whole = broken(scored_with=[json.dumps({**json.loads(identity()), "rows": 2})] * 2)
    check_complete(whole, "dataset_name (train_dataset)")
    check_complete(scored(2).select([0]), "dataset_name (train_dataset)")  # of an earlier release
    check_complete(concatenate_datasets([whole, whole]), "dataset_name (train_dataset)")
    with pytest.raises(ValueError, match=r"`dataset_name \(train_dataset\)` holds 1 of the 2 rows.*cut"):
        check_complete(whole.select([0]), "dataset_name (train_dataset)")


def test_another_template_or_end_of_sequence_is_refused_and_the_teacher_rule_can_be_lifted(tmp_path):
    tokenizer = tiny_tokenizer(chat_template=True)
    rows = broken(scored_with=[identity(tokenizer, conversational=True)] * 2)
    scored_rows(rows, tokenizer, require_same_teacher=True)
    tokenizer.chat_template += " "
    with pytest.raises(ValueError, match="another chat template"):
        scored_rows(rows, tokenizer, require_same_teacher=True)
    tokenizer.eos_token = "<unk>"
    with pytest.raises(ValueError, match="another tokenizer"):
        scored_rows(rows, tokenizer, require_same_teacher=True)
    wrong = broken(scored_with=[identity(teacher={"model": "QwQ"})] * 2)
    make(tmp_path, rows=wrong, require_same_teacher=False)
    # One wrong source in a mixture is found.
    with pytest.raises(ValueError, match="scored by 'QwQ'"):
        make(tmp_path, rows=concatenate_datasets([scored(4), wrong]))


@pytest.mark.parametrize(
    ("options", "error", "name"),
    [
        ({"advantage_clip": 0.0}, ValueError, "advantage_clip"),
        ({"loss_aggregation": "rows"}, ValueError, "loss_aggregation"),
        ({"max_length": 1}, ValueError, "max_length"),
        ({"packing": True}, NotImplementedError, "packing"),
        ({"padding_free": True}, NotImplementedError, "padding_free"),
        ({"loss_type": "dft"}, NotImplementedError, "loss_type"),
        ({"assistant_only_loss": True}, NotImplementedError, "assistant_only_loss"),
        ({"completion_only_loss": False}, NotImplementedError, "completion_only_loss"),
        ({"label_smoothing_factor": 0.1}, NotImplementedError, "label_smoothing_factor"),
        ({"neftune_noise_alpha": 5.0}, NotImplementedError, "neftune_noise_alpha"),
        ({"truncation_mode": "keep_end"}, NotImplementedError, "truncation_mode"),
        ({"enable_jit_checkpoint": True}, NotImplementedError, "enable_jit_checkpoint"),
        ({"dataset_kwargs": {"skip_prepare_dataset": True}}, NotImplementedError, "dataset_kwargs"),
        ({"load_best_model_at_end": True, "save_only_model": True, "eval_strategy": "steps", "save_steps": 5,
          "eval_steps": 5}, ValueError, "save_only_model"),
    ],
)  # fmt: skip
def test_options_that_are_refused(options, error, name):
    with pytest.raises(error, match=f"`{name}"):
        LightningOPDConfig("out", use_cpu=True, bf16=False, **options)


def test_arguments_that_are_refused(tmp_path):
    from peft import PromptTuningConfig
    from trl import SFTConfig

    from trl_bridge import LightningOPDTrainer

    for name in ("data_collator", "compute_loss_func", "compute_metrics", "formatting_func"):
        with pytest.raises(NotImplementedError, match=f"`{name}`"):
            LightningOPDTrainer("model", train_dataset=scored(1), **{name: print})
    with pytest.raises(TypeError, match="LightningOPDConfig"):
        LightningOPDTrainer("model", args=SFTConfig("out", use_cpu=True, bf16=False), train_dataset=scored(1))
    with pytest.raises(NotImplementedError, match="virtual tokens"):
        make(tmp_path, peft_config=PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2))
    with pytest.raises(TypeError, match="must be a `Dataset`"):
        make(tmp_path, rows=scored(2).to_iterable_dataset())


RESUMED = {
    "max_steps": 5,
    "save_strategy": "steps",
    "save_steps": 1,
    "lr_scheduler_type": "cosine",
    "optim": "adamw_torch",
    "learning_rate": 1e-3,
    "max_grad_norm": 1.0,
    "per_device_train_batch_size": 2,
    "logging_steps": 2,
}


def state(trainer):
    # `loss` is a running sum of transformers' that no checkpoint has: after a stop inside a logging interval it lacks a part.
    timed = ("time", "runtime", "per_second", "loss")
    return {
        "model": dict(trainer.model.state_dict()),
        "optimizer": trainer.optimizer.state_dict()["state"],
        "log": [{k: v for k, v in e.items() if not any(t in k for t in timed)} for e in logs(trainer)],
        "tokens": trainer._total_train_tokens,
    }


# Two updates an epoch: stopped in the second epoch, inside of a logging interval and at its end.
@pytest.mark.parametrize("stop", [3, 4])
def test_resume_is_exact(tmp_path, stop):
    rows = scored(reference=True)
    straight = make(tmp_path / "straight", rows=rows, **RESUMED)
    straight.train()
    make(tmp_path / "halves", rows=rows, callbacks=[StopAt(stop)], **RESUMED).train()
    resumed = make(tmp_path / "halves", rows=rows, **RESUMED)
    resumed.train(resume_from_checkpoint=True)
    assert resumed.state.global_step == 5
    assert_same(state(resumed), state(straight))


def test_resume_with_other_rows_or_another_loss_is_refused(tmp_path):
    make(tmp_path, **{**RESUMED, "max_steps": 1}).train()
    for options, name in (
        ({"advantage_clip": 1.0}, "advantage_clip"),
        ({"loss_aggregation": "token"}, "loss_aggregation"),
        ({"rows": scored(6)}, "train_dataset"),
        ({"rows": scored(seed=1)}, "train_dataset"),
        ({"rows": scored(scorer=student())}, "train_dataset"),
        ({"rows": scored().select(range(7, -1, -1))}, "train_dataset"),
        ({"max_length": 100}, "max_length"),
        ({"rows": scored(scored_with=[identity(sampling={"temperature": 0.5})] * 8)}, "train_dataset"),
    ):
        with pytest.raises(ValueError, match=f"`{name}`"):
            make(tmp_path, **{**RESUMED, "max_steps": 2, **options}).train(resume_from_checkpoint=True)


def test_the_hash_of_rows_reads_contents_and_order_alone(tmp_path):
    def laid_out(rows):
        return scored_rows(rows, tiny_tokenizer(), require_same_teacher=True)[0]

    rows = scored(reference=True)
    rows.to_parquet(tmp_path / "rows.parquet")
    again = Dataset.from_parquet(str(tmp_path / "rows.parquet"), cache_dir=str(tmp_path))
    known = rows_hash(laid_out(rows))
    assert known == rows_hash(laid_out(again)) and len(known) == 16
    swapped = laid_out(rows).select([1, 0, *range(2, 8)])
    others = [laid_out(rows.remove_columns("reference_logprobs")), swapped]
    # The same numbers, divided between two rows in another way, or trained in part.
    two = Dataset.from_dict(
        {"input_ids": [[3, 4], [5]], "labels": [[3, 4], [5]], "teacher_logprobs": [[-1, -2], [-3]]}
    )
    moved = Dataset.from_dict({name: [[*a[:1]], [*a[1:], *b]] for name, (a, b) in two.to_dict().items()})
    masked = Dataset.from_dict({**two.to_dict(), "labels": [[-100, 4], [5]]})
    hashes = [known, *map(rows_hash, [*others, two, moved, masked])]
    assert len(set(hashes)) == len(hashes)


def test_saved_model_loads_with_transformers_alone(tmp_path):
    trainer = make(tmp_path, max_steps=1)
    trainer.train()
    trainer.save_model(str(tmp_path / "saved"))
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "saved").state_dict()
    assert_same(dict(loaded), dict(trainer.accelerator.unwrap_model(trainer.model).state_dict()))
    trainer.create_model_card(model_name="mine")
    card = (tmp_path / "README.md").read_text()
    assert "Lightning OPD" in card and "2604.13010" in card
    assert json.loads(identity())["sft_teacher"] == "big"

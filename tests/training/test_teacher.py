"""A teacher beside the reward: each trainer's update against the float64 reference, its limits, and what is refused."""

import json
import math

import pytest
import torch
from datasets import Dataset
from trl import GRPOConfig, GRPOTrainer

from tests.helpers import groups, streams, teachers
from tests.helpers.group_losses import luffy_loss
from tests.helpers.groups import group_trainer, replay_group, trace_rows
from tests.helpers.resume import StopAt, assert_same
from tests.helpers.scoring_server import vllm_server
from tests.helpers.streams import logged, make, options_of, sharp_model, trained, weights_of
from tests.helpers.training import PAIRS, movement_error, small_config, small_lora
from trl_bridge import (
    ActGuideTrainer,
    CHORDTrainer,
    LUFFYTrainer,
    NaiveMixConfig,
    NaiveMixTrainer,
    PackedGRPOConfig,
    PackedGRPOTrainer,
    PrefixRFTTrainer,
)
from trl_bridge.distillation.identity import tokenizer_hash
from trl_bridge.distillation.scoring import LocalTeacher, Rollout
from trl_bridge.selftest.reference.stream import StreamReference
from trl_bridge.training.teacher_config import named, place_of


TOLERANCE = 2e-4
SGD = {"optim": "sgd", "learning_rate": 0.1}
ALIKE = {"max_grad_norm": 0.0}  # clipped gradients are of one length, whatever the term's weight


@pytest.fixture
def teacher(tmp_path):
    return teachers.stored(tmp_path / "teacher", teachers.sharp())


FORMS = {
    "advantage": {"teacher_weight": 0.7},
    "advantage, clipped, fading": {"teacher_weight": 0.9, "teacher_weight_end": 0.1, "teacher_weight_steps": 2, "teacher_clip": 0.5},
    "k2": {"teacher_form": "loss", "teacher_weight": 0.3},
    "k3, withdrawn": {"teacher_form": "loss", "teacher_weight": 0.3, "teacher_weight_end": 0.0, "teacher_kl": "k3"},
}  # fmt: skip


def reference_of(form, steps):
    o = FORMS[form]
    start, end = o["teacher_weight"], o.get("teacher_weight_end")
    over = o.get("teacher_weight_steps", steps)

    def weight(step):
        return start if end is None else start + (end - start) * min(1, step / over)

    kl = o.get("teacher_kl", "k2")
    return {"form": o.get("teacher_form", "advantage"), "kl": kl, "clip": o.get("teacher_clip"), "weight": weight}


def replay(trainer, form, **more):
    """Plain GRPO with a teacher in float64; the errors after each update."""
    o = {**options_of(trainer), "teacher": reference_of(form, trainer.args.max_steps), **more}
    reference = StreamReference(sharp_model(), trainer.start, o)
    windows = teachers.scored(trainer.windows, teachers.sharp(), trainer.args.temperature)
    errors = []
    for step, (window, state) in enumerate(zip(windows, trainer.states, strict=True)):
        reference.update(step, window["rl"], [], [])
        errors.append(movement_error(state, reference.weights, trainer.start))
    assert len(errors) == trainer.args.max_steps
    return errors


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(
    "changes", [{}, {"temperature": 0.7, "num_iterations": 2, "loss_type": "grpo"}], ids=["", "twice"]
)
def test_grpo_with_a_teacher_equals_the_reference(tmp_path, teacher, form, changes):
    # On rollouts that the student has moved away from, k3 grows exponentially: no run survives a longer step.
    sgd = {**SGD, "learning_rate": 1e-3} if "k3" in form and changes else SGD
    trainer = trained(
        teachers.recording(PackedGRPOTrainer), tmp_path, model=sharp_model(), teachers=[teacher], **FORMS[form], **sgd, **ALIKE, **changes
    )  # fmt: skip
    assert max(replay(trainer, form)) < TOLERANCE
    weights = map(reference_of(form, 3)["weight"], range(3))
    assert logged(trainer, "teacher/weight") == pytest.approx([weight for weight in weights if weight])
    assert all(map(math.isfinite, logged(trainer, "teacher/reverse_kl")))
    batches = [batch for window in trainer.windows for batch in window["rl"]]
    # Rollouts without an advantage are trained on as well.
    assert changes or any((batch["advantages"] == 0).any() for batch in batches)


@pytest.mark.parametrize("loss_type", ["bnpo", "dr_grpo", "luspo", "cispo", "sapo", "vespo"])
@pytest.mark.parametrize("form", ["advantage", "k2"])
def test_every_loss_type(tmp_path, teacher, loss_type, form):
    options = {"loss_type": loss_type, "max_steps": 1, "epsilon_high": 5.0 if loss_type == "cispo" else 0.2}
    if loss_type == "luspo" and form != "advantage":
        options["importance_sampling_level"] = "sequence"
    trainer = trained(
        teachers.recording(PackedGRPOTrainer), tmp_path, model=sharp_model(), teachers=[teacher], **FORMS[form], **SGD, **ALIKE, **options
    )  # fmt: skip
    args = trainer.args
    o = {
        "vespo_k": (args.vespo_k_pos, args.vespo_k_neg),
        "vespo_lambda": (args.vespo_lambda_pos, args.vespo_lambda_neg),
    }
    o |= {
        "sapo_pos": args.sapo_temperature_pos,
        "sapo_neg": args.sapo_temperature_neg,
        "eps_high": options["epsilon_high"],
        "max_completion_length": args.max_completion_length,
    }
    assert max(replay(trainer, form, **o)) < TOLERANCE


def test_a_lora_student(tmp_path, teacher):
    trainer = trained(
        teachers.recording(PackedGRPOTrainer), tmp_path, peft_config=small_lora(), teachers=[teacher], **FORMS["advantage"], **SGD
    )  # fmt: skip
    assert trainer.states and all("lora" in name for name in trainer.start)
    assert all(kl > 0 for kl in logged(trainer, "teacher/reverse_kl"))


@pytest.mark.parametrize("form", ["advantage", "k2"])
@pytest.mark.parametrize(
    ("trainer_class", "method", "reference"),
    [
        (NaiveMixTrainer, {"sft_weight": 0.5}, {"sft_weight": lambda step: 0.5}),
        (
            CHORDTrainer,
            {"mu_peak": 0.5, "mu_valley": 0.5, "mu_warmup_steps": 0, "mu_decay_steps": 0},
            {"rl_weight": lambda step: 0.5, "sft_weight": lambda step: 0.5, "token_weight": torch.ones_like},
        ),
    ],
    ids=["naive-mix", "chord"],
)
def test_stream_methods_equal_the_reference(tmp_path, teacher, form, trainer_class, method, reference):
    if trainer_class is CHORDTrainer:
        method = {**method, "enable_phi_function": False}
    trainer = trained(
        streams.recording(trainer_class),
        tmp_path,
        model=sharp_model(),
        teachers=[teacher],
        **FORMS[form],
        **method,
        **SGD,
    )
    teachers.scored(trainer.windows, teachers.sharp(), 1.0)
    streams.replay(trainer, sharp_model(), teacher=reference_of(form, 3), **reference)
    assert all(kl > 0 for kl in logged(trainer, "teacher/reverse_kl"))


@pytest.mark.parametrize("form", ["advantage", "k2"])
@pytest.mark.parametrize(
    ("trainer_class", "loss", "options"),
    [
        (LUFFYTrainer, luffy_loss(), {"loss_type": "dapo"}),
        (PrefixRFTTrainer, None, {"max_completion_length": 14, "delta": None}),
    ],
    ids=["luffy", "prefix-rft"],
)
def test_group_methods_equal_the_reference(tmp_path, teacher, form, trainer_class, loss, options):
    trainer = group_trainer(
        tmp_path, groups.recording(trainer_class), train_dataset=trace_rows(), teachers=[teacher], epsilon=0.2,
        scale_rewards="none", prefix_entropy_quantile=1.0, **FORMS[form], **SGD, **ALIKE, **options,
    ) if trainer_class is PrefixRFTTrainer else group_trainer(
        tmp_path, groups.recording(trainer_class), teachers=[teacher], **FORMS[form], **SGD, **ALIKE, **options,
    )  # fmt: skip
    trainer.train()
    assert any(batch["expert_mask"].any() for batch in groups.batches(trainer))
    teachers.scored(trainer.windows, teachers.sharp(), 1.0)
    # Prefix-RFT: all tokens are in GRPO's loss, and the teacher's term is on those that the policy has sampled.
    loss = loss or (lambda p: p.policy_loss())
    assert max(replay_group(trainer, loss, teacher=reference_of(form, 3))) < TOLERANCE


def test_actguide_has_the_teachers_term_under_the_prompt_without_guidance(tmp_path, teacher):
    rows = groups.hint_rows(steps=True)
    trainer = group_trainer(
        tmp_path, groups.recording(ActGuideTrainer), train_dataset=rows, hard_threshold=1.0, expert_max_length=20,
        teachers=[teacher], **FORMS["advantage"],
    )  # fmt: skip
    trainer.train()
    guided = [batch for batch in groups.batches(trainer) if "guided" in batch]
    assert guided
    for batch in guided:
        with torch.no_grad():
            want, _ = groups.objectives.scores(teachers.sharp().double(), {}, batch, 1.0)
        shown = batch["completion_mask"].bool()
        assert torch.allclose(batch["teacher_per_token_logps"].double()[shown], want[shown], atol=1e-4)


# Limits


@pytest.mark.parametrize("padding_free", [False, True])
def test_weight_zero_is_the_method_without_a_teacher_to_the_bit(tmp_path, teacher, padding_free):
    ours = trained(
        PackedGRPOTrainer, tmp_path / "ours", padding_free=padding_free, teachers=[teacher], teacher_weight=0.0
    )
    plain = trained(PackedGRPOTrainer, tmp_path / "plain", padding_free=padding_free)
    assert_same(weights_of(ours), weights_of(plain))
    assert ours.teachers is None
    if not padding_free:
        trl = trained(GRPOTrainer, tmp_path / "trl")
        assert_same(weights_of(ours), weights_of(trl))


@pytest.mark.parametrize("form", ["advantage", "loss"])
def test_a_teacher_equal_to_the_student_changes_nothing_in_the_first_update(tmp_path, form):
    same = teachers.stored(tmp_path / "same", sharp_model())
    options = {"max_steps": 1, "padding_free": False, **SGD}
    plain = trained(PackedGRPOTrainer, tmp_path / "plain", model=sharp_model(), **options)
    ours = trained(
        PackedGRPOTrainer, tmp_path / "ours", model=sharp_model(), teachers=[same], teacher_form=form, **options
    )
    start = dict(sharp_model().named_parameters())
    # Both passes are one kernel on other rows: exactly nothing, or rounding.
    assert movement_error(weights_of(ours), weights_of(plain), start) < 1e-6
    assert abs(logged(ours, "teacher/reverse_kl")[0]) < 1e-6


def test_a_teacher_that_is_withdrawn_is_not_asked_any_more(tmp_path, teacher):
    trainer = make(
        PackedGRPOTrainer, tmp_path, teachers=[teacher], teacher_weight=0.5, teacher_weight_end=0.0, teacher_weight_steps=2,
        max_steps=4,
    )  # fmt: skip
    asked = []
    score = trainer.teachers.score
    trainer.teachers.score = lambda *args: asked.append(trainer.state.global_step) or score(*args)
    trainer.train()
    assert asked == [0, 1] and logged(trainer, "teacher/weight") == [0.5, 0.25]


# Several teachers, served ones, stored scores


def rows_with(names):
    return Dataset.from_dict({"prompt": [f"{a}+{b}=" for a, b in PAIRS], "teacher": names})


def build(folder, trainer_class=PackedGRPOTrainer, rows=None, model=None, callbacks=None, **options):
    return trainer_class(
        model=model or sharp_model(),
        reward_funcs=streams.digits_reward,
        args=small_config(folder, trainer_class.config_class, **options),
        train_dataset=rows_with([None] * len(PAIRS)) if rows is None else rows,
        processing_class=teachers.tiny_tokenizer(),
        callbacks=callbacks,
    )


def test_each_row_has_the_teacher_that_its_column_names(tmp_path):
    models = {"one": teachers.sharp(5), "two": teachers.sharp(6)}
    where = [f"{name}={teachers.stored(tmp_path / name, model)}" for name, model in models.items()]
    names = [("one", "two", None, "")[row % 4] for row in range(len(PAIRS))]
    trainer = build(
        tmp_path / "run", teachers.recording(PackedGRPOTrainer), rows_with(names), teachers=where, **FORMS["advantage"], **SGD, **ALIKE
    )  # fmt: skip
    trainer.train()
    of_prompt = {f"{a}+{b}=": name for (a, b), name in zip(PAIRS, names, strict=True)}
    seen = set()
    for update, window in enumerate(trainer.windows):
        for batch in window["rl"]:
            log_p = torch.full(batch["completion_ids"].shape, torch.nan, dtype=torch.float64)
            for row in range(len(log_p)):
                prompt = trainer.processing_class.decode(batch["prompt_ids"][row][batch["prompt_mask"][row].bool()])
                name = of_prompt[prompt.replace(" ", "")]
                seen.add(name)
                if name:
                    with torch.no_grad():
                        log_p[row] = groups.objectives.scores(models[name].double(), {}, {k: v[row : row + 1] for k, v in batch.items() if k.startswith(("prompt_", "completion_"))}, 1.0)[0]  # fmt: skip
            batch.update(teacher_log_p=log_p, update=update)
    assert {"one", "two"} <= seen and seen & {None, ""}
    o = {**options_of(trainer), "teacher": reference_of("advantage", 3)}
    reference = StreamReference(sharp_model(), trainer.start, o)
    for step, (window, state) in enumerate(zip(trainer.windows, trainer.states, strict=True)):
        reference.update(step, window["rl"], [], [])
        assert movement_error(state, reference.weights, trainer.start) < TOLERANCE


@pytest.fixture
def client(monkeypatch):
    """TRL's client refuses to be made where vLLM is not installed, which it does not need to ask for scores."""
    monkeypatch.setattr("trl.generation.vllm_client.is_vllm_available", lambda: True)


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_a_served_teacher_is_the_local_one(tmp_path, teacher, client, temperature):
    options = {**FORMS["advantage"], "temperature": temperature, **SGD}
    local = build(tmp_path / "local", teachers=[teacher], **options)
    local.train()
    with vllm_server(teachers.sharp()) as (url, requests):
        served = build(tmp_path / "served", teachers=[url], **options)
        served.train()
    assert requests and all(request["temperature"] in (1.0, temperature) for request in requests)
    start = dict(sharp_model().named_parameters())
    assert movement_error(weights_of(served), weights_of(local), start) < 1e-4


def test_a_server_that_ignores_the_temperature_is_refused(tmp_path, client):
    with vllm_server(teachers.sharp()) as (url, _):
        build(tmp_path, teachers=[url], temperature=0.7)
    with vllm_server(teachers.sharp(), deaf=True) as (url, _):
        with pytest.raises(ValueError, match=r"scores at another temperature than 0.7.*processed_logprobs"):
            build(tmp_path, teachers=[url], temperature=0.7)
        build(tmp_path, teachers=[url])


def test_stored_scores(tmp_path, monkeypatch):
    """Of rollouts that come from a file too, the same update as with the teacher at hand; of others there are none."""
    tokenizer, model = teachers.tiny_tokenizer(), teachers.sharp()
    rollouts = [
        Rollout(
            tokenizer(f"{a}+{b}=")["input_ids"], [*tokenizer(f"{a}{'!' * n}")["input_ids"], tokenizer.eos_token_id]
        )
        for a, b in PAIRS
        for n in range(4)
    ]
    scores = [row for part in LocalTeacher(teachers.sharp())(rollouts) for row in part]
    made_by = {"student": {"model": "s"}, "teacher": {"model": "t"}, "sft_teacher": "t", "chat_template": None}
    identity = json.dumps({**made_by, "tokenizer": tokenizer_hash(tokenizer)})
    columns = {"prompt_ids": [r.prompt_ids for r in rollouts], "completion_ids": [r.completion_ids for r in rollouts]}
    rows = Dataset.from_dict({**columns, "teacher_logprobs": scores, "scored_with": [identity] * len(rollouts)})
    rows.to_parquet(tmp_path / "train.parquet")

    def generate(trainer, prompt_ids, *args, **kwargs):
        of_prompt = {}
        for rollout in rollouts:
            of_prompt.setdefault(tuple(rollout.prompt_ids), []).append(rollout.completion_ids)
        return [list(of_prompt[tuple(ids)][row % 4]) for row, ids in enumerate(prompt_ids)], None

    monkeypatch.setattr(GRPOTrainer, "_generate_single_turn", generate)
    ends = []
    for where in (str(tmp_path / "train.parquet"), teachers.stored(tmp_path / "model", model)):
        trainer = build(tmp_path / "run", teachers=[where], **FORMS["advantage"], **SGD)
        trainer.train()
        ends.append(weights_of(trainer))
    assert movement_error(*ends, dict(sharp_model().named_parameters())) < 1e-4
    monkeypatch.setattr(GRPOTrainer, "_generate_single_turn", lambda *args, **kwargs: ([[5]] * 16, None))
    with pytest.raises(ValueError, match="no scores of a rollout that was sampled just now"):
        build(tmp_path / "run", teachers=[str(tmp_path / "train.parquet")]).train()
    rows.remove_columns("teacher_logprobs").to_parquet(tmp_path / "bare.parquet")
    with pytest.raises(ValueError, match="has no column `teacher_logprobs`"):
        build(tmp_path / "run", teachers=[str(tmp_path / "bare.parquet")])


def test_resume_is_exact(tmp_path, teacher):
    options = {
        "teachers": [teacher], "teacher_weight": 0.8, "teacher_weight_end": 0.2, "max_steps": 5, "save_strategy": "steps", "save_steps": 1,
        "num_iterations": 2, "steps_per_generation": 4, "per_device_train_batch_size": 4,
    }  # fmt: skip
    straight = build(tmp_path / "straight", **options)
    straight.train()
    build(tmp_path / "halves", callbacks=[StopAt(3)], **options).train()
    resumed = build(tmp_path / "halves", **options)
    resumed.train(resume_from_checkpoint=True)
    assert_same(weights_of(resumed), weights_of(straight))
    assert logged(resumed, "teacher/reverse_kl")[-2:] == logged(straight, "teacher/reverse_kl")[-2:]
    other = build(tmp_path / "halves", **{**options, "teacher_weight": 0.7})
    with pytest.raises(ValueError, match="teacher_weight"):
        other.train(resume_from_checkpoint=str(tmp_path / "halves" / "checkpoint-3"))


# What is refused


def test_names_and_places():
    assert named(["Qwen/Qwen3-8B"]) == {"": "Qwen/Qwen3-8B"}
    assert named(["http://host:8000/?a=b"]) == {"": "http://host:8000/?a=b"}
    assert named(["m=a/b", "c=http://h:1/?x=y"]) == {"m": "a/b", "c": "http://h:1/?x=y"}
    assert [place_of(w) for w in ("a/b", "https://h", "x/train.parquet", "r.jsonl")] == [
        "model",
        "server",
        "scores",
        "scores",
    ]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"teachers": ["a", "b"]}, "one teacher, or several with a name"),
        ({"teachers": ["m=a", "m=b"]}, "one teacher, or several with a name"),
        ({"teachers": []}, "one teacher, or several with a name"),
        ({"teachers": ["a"], "teacher_weight": -1.0}, "teacher_weight"),
        ({"teachers": ["a"], "teacher_weight_steps": 0}, "teacher_weight_steps"),
        ({"teachers": ["a"], "teacher_form": "both"}, "teacher_form"),
        ({"teachers": ["a"], "teacher_kl": "k1", "teacher_form": "loss"}, "teacher_kl"),
        ({"teachers": ["a.parquet"], "temperature": 0.7}, "stored scores of `teachers` are at temperature 1"),
        ({"teachers": ["m=a", "n=b"], "remove_unused_columns": True}, "remove_unused_columns"),
        ({"teachers": ["a"], "teacher_weight_steps": 5}, "no effect without `teacher_weight_end`"),
        ({"teacher_offload": True}, "`teacher_offload` has no effect: none of `teachers` is a model here"),
        ({"teachers": ["http://a"], "teacher_offload": True}, "`teacher_offload` has no effect"),
    ],
)
@pytest.mark.parametrize("config", [PackedGRPOConfig, NaiveMixConfig])
def test_options_are_refused(tmp_path, options, message, config):
    with pytest.raises(ValueError, match=message):
        config(str(tmp_path), use_cpu=True, bf16=False, **options)


@pytest.mark.parametrize(
    ("option", "form"),
    [
        ({"off_policy_mask_threshold": 0.5}, "loss"),
        ({"importance_sampling_level": "sequence"}, "loss"),
        ({"teacher_kl": "k3"}, "loss"),
        ({"teacher_clip": 0.5}, "advantage"),
    ],
)
def test_options_of_one_form_are_refused_with_the_other(tmp_path, option, form):
    options = {"teachers": ["a"], "use_cpu": True, "bf16": False, **option}
    other = "advantage" if form == "loss" else "loss"
    with pytest.raises(NotImplementedError, match=next(iter(option))):
        PackedGRPOConfig(str(tmp_path), teacher_form=other, **options)
    PackedGRPOConfig(str(tmp_path), teacher_form=form, **options)


def test_no_micro_batch_of_a_weighted_update_is_without_scores(tmp_path, teacher):
    # The second generation batch begins in the first update, whose weight is zero, and ends in the next.
    ramp = {"teacher_weight": 0.0, "teacher_weight_end": 1.0, "teacher_weight_steps": 1}
    batches = {"gradient_accumulation_steps": 3, "steps_per_generation": 2, "max_steps": 3}
    trainer = trained(
        teachers.recording(PackedGRPOTrainer),
        tmp_path,
        model=sharp_model(),
        teachers=[teacher],
        **ramp,
        **batches,
        **SGD,
    )
    scored = [["teacher_per_token_logps" in batch for batch in window["rl"]] for window in trainer.windows]
    assert scored == [[False] * 3, [True] * 3, [True] * 2]  # the epoch ends inside the third


def test_rows_and_teachers_that_there_are_not(tmp_path, teacher):
    with pytest.raises(ValueError, match=r"no teacher 'three' \(row 2 of `train_dataset`\)"):
        build(tmp_path, rows=rows_with(["one", None, "three", *[None] * 13]), teachers=[f"one={teacher}"])
    rows = rows_with([None] * len(PAIRS)).remove_columns("teacher")
    with pytest.raises(ValueError, match="no column `teacher`"):
        build(tmp_path, rows=rows, teachers=[f"one={teacher}"])
    with pytest.raises(ValueError, match="`teachers`.*nowhere"):
        build(tmp_path, teachers=["./nowhere"])


def test_plain_trl_knows_nothing_of_it(tmp_path):
    with pytest.raises(TypeError):
        GRPOConfig(str(tmp_path), teachers=["a"])

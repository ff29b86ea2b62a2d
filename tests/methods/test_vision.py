"""Vision-language models: BRIDGE and the stream methods with rows that have pictures, on tiny models of three families."""

import logging

import pytest
import torch
from accelerate import Accelerator
from datasets import Dataset, Image
from peft import LoraConfig
from trl import GRPOTrainer
from trl.trainer.sft_trainer import DataCollatorForVisionLanguageModeling

from tests.helpers.lean import SCALINGS, lean_options, lean_trainer, replay_lean
from tests.helpers.resume import StopAt, assert_same, metrics_of, saving_options, state_of
from tests.helpers.streams import recording, weights_of
from tests.helpers.streams import replay as replay_stream
from tests.helpers.training import RecordingTrainer, replay, small_lora
from tests.helpers.vision import (
    FAMILIES,
    asked,
    digits,
    picture,
    picture_demonstrations,
    picture_rows,
    vision_model,
    vision_trainer,
)
from trl_bridge import (
    AlternatingTrainer,
    BridgeTrainer,
    CHORDTrainer,
    NaiveMixTrainer,
    PackedGRPOTrainer,
)
from trl_bridge.models import tiny_model, tiny_tokenizer


TOLERANCE = 2e-4  # relative error of the movement
SGD = {"optim": "sgd", "learning_rate": 0.1}
ACCUMULATED = {**SGD, "gradient_accumulation_steps": 4, "per_device_train_batch_size": 4, "max_steps": 2}
FROZEN = {**ACCUMULATED, "freeze_vision_tower": True, "beta": 0.1, "temperature": 0.7}
# A row without a picture and one with two beside those with one.
MIXED = picture_rows(pictures=lambda n: {1: 0, 2: 2}.get(n % 4, 1))


def tower_of(model):
    tower = model.get_encoder(modality="image")
    (name,) = [name for name, module in model.named_modules() if module is tower]
    return {n for n, _ in model.named_parameters() if n.startswith(f"{name}.")}


# BRIDGE


@pytest.mark.parametrize("options", [ACCUMULATED, FROZEN], ids=["all of it", "tower frozen, kl, temperature"])
@pytest.mark.parametrize("family", FAMILIES)
def test_bridge_equals_reference(tmp_path, family, options):
    trainer = vision_trainer(tmp_path, RecordingTrainer, family, train_dataset=MIXED, **options)
    trainer.initial_model, _ = vision_model(family)
    tower = tower_of(trainer.model)
    trainer.train()
    frozen = tower if "freeze_vision_tower" in options else set()
    errors, metrics = replay(trainer, frozen=frozen)
    assert len(errors) == trainer.state.global_step and all(
        e < TOLERANCE for error in errors for e in error.values()
    ), errors
    assert metrics[-1]["bridge/gain"] != 0
    moved = {n for n, w in trainer.theta_state_dict().items() if not torch.equal(w, trainer.start["theta"][n])}
    assert bool(moved & tower) is not bool(frozen) and moved - tower
    hat = trainer.shadow_state_dict()
    assert any(not torch.equal(hat[n], trainer.start["hat"][n]) for n in tower) is not bool(frozen)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_shadow_that_sees_a_part_of_the_rollouts(tmp_path, family):
    options = {**SGD, "shadow_rollout_fraction": 0.5, "train_dataset": MIXED}
    trainer = vision_trainer(tmp_path, RecordingTrainer, family, **options)
    trainer.initial_model, _ = vision_model(family)
    trainer.train()
    errors, _ = replay(trainer, rows=lambda batch: batch["shadow_weight"])
    assert len(errors) == trainer.state.global_step and all(
        e < TOLERANCE for error in errors for e in error.values()
    ), errors


@pytest.mark.parametrize("family", FAMILIES)
def test_the_coordinator_is_on_the_language_model(tmp_path, family):
    trainer = vision_trainer(tmp_path, BridgeTrainer, family, peft_config=None)
    model = trainer.model
    inside = {id(module) for module in model.get_decoder().modules()}
    targets = {target.module for target in trainer.coordinator.targets}
    assert len(targets) == 14 and all(id(model.get_submodule(name)) in inside for name in targets)


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_lean_equals_reference(tmp_path, family, frozen):
    model, processor = vision_model(family)
    rows = {"train_dataset": picture_rows(), "sft_dataset": picture_demonstrations(), "reward_funcs": digits}
    options = {**ACCUMULATED, "learning_rate": 1.0, "freeze_vision_tower": frozen}
    trainer = lean_trainer(tmp_path, model=model, processing_class=processor, **rows, **options)
    trainer.train()
    run = trainer.start, trainer.windows, trainer.states
    replayed = list(replay_lean(vision_model(family)[0], *run, lean_options(trainer), SCALINGS))
    assert len(replayed) == 2 and all(e < TOLERANCE for errors, _ in replayed for e in errors.values()), replayed
    assert {name.split(".")[1] for name in trainer.coordinator.shape()} <= {"language_model", "text_model"}


def test_padded_passes_run_and_the_log_says_why(tmp_path, caplog):
    with caplog.at_level(logging.WARNING):
        vision_trainer(tmp_path, BridgeTrainer)
    assert "`padding_free` stands aside, and passes are padded: it is a vision-language model" in caplog.text


# The others


METHODS = {
    "chord": (CHORDTrainer, {"mu_peak": 0.8, "mu_valley": 0.8, "mu_warmup_steps": 0, "mu_decay_steps": 0}, (0.2, 0.8)),
    "naive-mix": (NaiveMixTrainer, {"sft_weight": 0.5}, (1.0, 0.5)),
    "alternating": (AlternatingTrainer, {}, (1.0, 1.0)),
}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("name", METHODS)
def test_stream_methods_equal_reference(tmp_path, name, family):
    cls, options, (rl, sft) = METHODS[name]
    trainer = vision_trainer(tmp_path, recording(cls), family, train_dataset=MIXED, **ACCUMULATED, **options)
    trainer.train()
    assert trainer.windows and len(trainer.states) == len(trainer.windows)
    replay_stream(trainer, vision_model(family)[0], rl_weight=lambda step: rl, sft_weight=lambda step: sft)


def test_chord_with_lora(tmp_path):
    lora = LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", init_lora_weights=False)
    options = {**METHODS["chord"][1], **ACCUMULATED, "freeze_vision_tower": True}
    trainer = vision_trainer(tmp_path, recording(CHORDTrainer), peft_config=lora, **options)
    start = {n: p.detach().clone() for n, p in trainer.model.named_parameters()}
    trainer.train()
    moved = {n for n, p in trainer.model.named_parameters() if not torch.equal(p, start[n])}
    assert moved and all("lora_" in n and ".visual.blocks." not in n for n in moved)


@pytest.mark.parametrize("family", FAMILIES)
def test_packed_grpo_is_grpo(tmp_path, family):
    # TRL itself takes no generation batch in which one row has a picture and another none.
    options = {"learning_rate": 1e-2, "steps_per_generation": 4}
    weights = []
    for cls in (GRPOTrainer, PackedGRPOTrainer):
        trainer = vision_trainer(tmp_path / cls.__name__, cls, family, **options)
        start = weights_of(trainer)
        trainer.train()
        weights.append(weights_of(trainer))
    assert_same(weights[1], weights[0])
    assert any(not torch.equal(weights[0][n], start[n]) for n in start)


# Demonstrations


@pytest.mark.parametrize("family", FAMILIES)
def test_demonstrations_are_collated_as_trl_does(tmp_path, family):
    trainer = vision_trainer(tmp_path, CHORDTrainer, family)
    collate = DataCollatorForVisionLanguageModeling(trainer.processing_class, completion_only_loss=True)
    for share in ([0, 1], [2, 5], [2], [3, 6, 7]):
        want = collate([trainer.demonstrations.source[row] for row in trainer.demonstrations.rows(share)])
        got = trainer.demonstrations.batch(share)
        assert got.keys() == want.keys() - {"rows", "cols"}
        for name, value in got.items():
            # TRL trains on what the template prints after the end of the turn, too: here a line break.
            wanted = want[name][:, :-1] if name in ("input_ids", "labels", "attention_mask") else want[name]
            wanted = wanted[:, : value.size(1)] if name.endswith("token_type_ids") else wanted
            there = got["attention_mask"].bool() if value.shape == got["attention_mask"].shape else ...
            assert torch.equal(value[there], wanted[there]), name


# Resuming


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("lean", [False, True])
def test_bridge_resumes_inside_a_generation_batch(tmp_path, family, lean):
    changes = saving_options(steps_per_generation=4, lean=lean, max_steps=4, train_dataset=MIXED)
    straight = vision_trainer(tmp_path / "straight", BridgeTrainer, family, **changes)
    straight.train()
    vision_trainer(tmp_path / "halves", BridgeTrainer, family, callbacks=[StopAt(1)], **changes).train()
    resumed = vision_trainer(tmp_path / "halves", BridgeTrainer, family, **changes)
    resumed.train(resume_from_checkpoint=str(tmp_path / "halves" / "checkpoint-1"))
    assert_same(state_of(resumed), state_of(straight))
    assert_same(metrics_of(resumed, 1), metrics_of(straight, 1))


@pytest.mark.parametrize(
    "change",
    [{"freeze_vision_tower": True}, {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 4}],
    ids=["the tower", "the cut"],
)
def test_what_a_resumed_run_must_share(tmp_path, change):
    options = saving_options(max_steps=2)
    vision_trainer(tmp_path, CHORDTrainer, callbacks=[StopAt(1)], **options).train()
    with pytest.raises(ValueError, match=next(iter(change))):
        vision_trainer(tmp_path, CHORDTrainer, **{**options, **change}).train(resume_from_checkpoint=True)


def test_the_best_checkpoint_comes_back(tmp_path):
    options = {
        **saving_options(max_steps=3),
        "load_best_model_at_end": True,
        "metric_for_best_model": "loss",
        "eval_steps": 1,
    }
    trainer = vision_trainer(
        tmp_path,
        PackedGRPOTrainer,
        "gemma3",
        eval_strategy="steps",
        eval_dataset=picture_rows(4),
        learning_rate=1e-2,
        **options,
    )
    trainer.train()
    saved = type(trainer.model).from_pretrained(trainer.state.best_model_checkpoint)
    assert_same(dict(trainer.model.state_dict()), dict(saved.state_dict()))


def test_several_evaluation_datasets_have_rewards_of_their_own(tmp_path):
    datasets = {"seen": picture_rows(4), "unseen": picture_rows(4, pictures=lambda n: 0)}
    options = {"eval_dataset": datasets, "eval_strategy": "steps", "eval_steps": 1, "max_steps": 1}
    trainer = vision_trainer(tmp_path, CHORDTrainer, "smolvlm", **options)
    trainer.train()
    entries = [entry for entry in trainer.state.log_history if any(name.startswith("eval_") for name in entry)]
    assert [[name for name in entry if name.endswith("_reward")] for entry in entries] == [
        ["eval_seen_reward"], ["eval_unseen_reward"]
    ]  # fmt: skip


# What is refused


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pictures")
    for name in ("whole.png", "whole.jpg"):
        picture(0).resize((64, 64)).save(folder / name)
    for name in ("png", "jpg"):
        whole = (folder / f"whole.{name}").read_bytes()
        (folder / f"cut.{name}").write_bytes(whole[: len(whole) // 2])
    (folder / "text.png").write_text("no picture")
    return folder


@pytest.mark.parametrize("argument", ["train_dataset", "eval_dataset", "sft_dataset"])
@pytest.mark.parametrize("decoded", [False, True], ids=["paths", "an Image column"])
@pytest.mark.parametrize(
    ("file", "message"),
    [
        ("gone.png", "names .*gone.png, which does not exist"),
        ("text.png", "holds no picture that can be read"),
        ("cut.png", "holds no picture that can be read"),
        ("cut.jpg", "holds no picture that can be read"),
    ],
)
def test_a_picture_that_cannot_be_read(tmp_path, files, argument, decoded, file, message):
    paths = [str(files / name) for name in ("whole.png", "whole.jpg", "whole.png", file)]
    rows = [{"prompt": asked(n), "completion": [{"role": "assistant", "content": "1"}]} for n in range(4)]
    dataset = Dataset.from_list(rows).add_column("image", paths)
    dataset = dataset.cast_column("image", Image()) if decoded else dataset
    given = {"one": dataset} if argument == "eval_dataset" else dataset
    where = "`eval_dataset\\['one'\\]`" if argument == "eval_dataset" else f"`{argument}`"
    with pytest.raises(ValueError, match=f"{where} row 3: `image` {message}.*Correct the row"):
        vision_trainer(tmp_path / "out", CHORDTrainer, **{argument: given})
    assert not (tmp_path / "out").exists()


BLOCKS = [{"role": "user", "content": [{"type": "image"}, {"type": "image"}]}]
OWN = [{"role": "user", "content": [{"type": "image", "url": "x.png"}]}]


@pytest.mark.parametrize(
    ("first", "second", "message"),
    [
        ({"image": "whole.png"}, {"image": None}, "row 1: `image` is null. Use a column `images`"),
        ({"images": ["whole.png"]}, {"images": None}, "row 1: `images` is null"),
        ({"images": ["whole.png"]}, {"images": [None]}, "row 1: `images` holds no picture"),
        ({"images": []}, {"images": [b"raw"]}, "row 1: `images` holds no picture"),
        (
            {"images": [], "prompt": "1"},
            {"images": ["whole.png"], "prompt": "1"},
            "row 1 has a picture, and its `prompt` is a",
        ),
        (
            {"images": ["whole.png"] * 2},
            {"images": ["whole.png"]},
            r"row 1: Number of images provided \(1\) .* placeholders \(2\)",
        ),
        ({"images": ["whole.png"] * 2}, {"images": [], "prompt": OWN}, "row 1: a message holds its picture itself"),
        ({"image": "whole.png", "images": []}, {"image": "whole.png", "images": []}, "has both `image` and `images`"),
    ],
)
def test_rows_that_do_not_fit(tmp_path, files, monkeypatch, first, second, message):
    monkeypatch.chdir(files)
    dataset = Dataset.from_list([{"prompt": BLOCKS, **first}, {"prompt": BLOCKS, **second}])
    with pytest.raises(ValueError, match=message):
        vision_trainer(tmp_path / "out", CHORDTrainer, train_dataset=dataset)


@pytest.mark.parametrize("name", ["model", "processing_class"])
def test_a_processor_and_a_model_that_do_not_go_together(tmp_path, name):
    tokenizer = tiny_tokenizer(chat_template=True)
    plain = {"model": tiny_model(tokenizer), "processing_class": tokenizer}
    with pytest.raises(ValueError, match="vision_config"):
        vision_trainer(tmp_path / "out", CHORDTrainer, **{name: plain[name]})


@pytest.mark.parametrize("argument", ["train_dataset", "eval_dataset", "sft_dataset"])
def test_pictures_for_a_text_model(tmp_path, argument):
    tokenizer = tiny_tokenizer(chat_template=True)
    text = picture_demonstrations().remove_columns("images")
    rows = {"train_dataset": text, "sft_dataset": text, argument: picture_demonstrations()}
    with pytest.raises(NotImplementedError, match=f"`{argument}` has a column `images` .*in row 0., but CHORDTrainer"):
        vision_trainer(tmp_path / "out", CHORDTrainer, model=tiny_model(tokenizer), processing_class=tokenizer, **rows)


@pytest.mark.parametrize(
    "options",
    [
        {"teachers": ["builtin:tiny"], "teacher_weight": 0.5},
        {"dynamic_sampling": True},
        {"sft_pairing": "prompt"},
    ],
    ids=lambda options: next(iter(options)),
)
def test_options_that_would_forget_the_pictures(tmp_path, options):
    name = next(iter(options))
    with pytest.raises(NotImplementedError, match=f"`{name}.*is not supported by BridgeConfig with a vision-language"):
        vision_trainer(tmp_path, BridgeTrainer, **options)


def test_several_processes(tmp_path, monkeypatch):
    monkeypatch.setattr(Accelerator, "num_processes", property(lambda self: 2))
    with pytest.raises(NotImplementedError, match="`sft_dataset` row 2 has no picture, and on several processes"):
        vision_trainer(tmp_path, CHORDTrainer)


def test_a_target_in_a_frozen_tower(tmp_path):
    targets = r".*(q_proj|visual\.blocks\.\d\.attn\.proj)"
    for lean in (False, True):
        with pytest.raises(ValueError, match="visual.blocks.0.attn.proj', which `freeze_vision_tower` freezes"):
            vision_trainer(
                tmp_path,
                BridgeTrainer,
                freeze_vision_tower=True,
                lean=lean,
                peft_config=small_lora(target_modules=targets),
            )
    with pytest.raises(ValueError, match="`freeze_vision_tower` has no effect"):
        tokenizer, text = tiny_tokenizer(chat_template=True), picture_demonstrations().remove_columns("images")
        rows = {"train_dataset": text, "sft_dataset": text, "freeze_vision_tower": True}
        vision_trainer(tmp_path, CHORDTrainer, model=tiny_model(tokenizer), processing_class=tokenizer, **rows)

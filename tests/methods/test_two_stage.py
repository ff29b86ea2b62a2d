"""Cold start as one run: what it does, and that a run cut off anywhere ends as one that was not."""

import gc
import json
import logging
import weakref

import pytest
import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType
from peft import LoraConfig, load_peft_weights
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, PreTrainedModel, TrainerCallback
from trl import GRPOConfig, GRPOTrainer, SFTConfig, SFTTrainer

from tests.helpers.command import refusal
from tests.helpers.resume import assert_same
from tests.helpers.training import digits_reward, rl_rows, sft_rows, small_config, small_model
from tests.helpers.two_stage import SFT, Cut, two_stage
from trl_bridge.cli import train
from trl_bridge.cli.parsing import parse_command_line
from trl_bridge.methods.catalogue import METHODS
from trl_bridge.methods.two_stage import TwoStageConfig, TwoStageTrainer
from trl_bridge.models import tiny_tokenizer
from trl_bridge.training.backends import Backend
from trl_bridge.training.student_config import StudentConfig


def saved(folder):
    return load_file(folder / "model.safetensors")


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    folder = tmp_path_factory.mktemp("straight")
    trainer = two_stage(folder)
    trainer.train()
    trainer.save_model()
    return folder


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    small_model().save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return str(folder)


def test_is_sft_and_then_grpo(tmp_path, straight):
    common = {name: getattr(small_config(tmp_path, GRPOConfig), name) for name in ("seed", "use_cpu", "report_to")}
    args = SFTConfig(
        output_dir=str(tmp_path / "sft"), max_length=1024, bf16=False, gradient_checkpointing=False, **SFT, **common
    )
    sft = SFTTrainer(model=small_model(), args=args, train_dataset=sft_rows(), processing_class=tiny_tokenizer())
    sft.train()
    sft.save_model(str(tmp_path / "sft"))
    assert_same(saved(straight / "sft"), saved(tmp_path / "sft"))
    grpo = GRPOTrainer(
        model=str(tmp_path / "sft"),
        reward_funcs=digits_reward,
        args=small_config(tmp_path / "grpo", GRPOConfig),
        train_dataset=rl_rows(),
    )
    grpo.train()
    assert_same(saved(straight), dict(grpo.model.state_dict()))
    assert not torch.equal(saved(straight)["model.norm.weight"], saved(straight / "sft")["model.norm.weight"])


def test_output_is_a_plain_model_with_the_stages_beside_it(straight):
    assert AutoModelForCausalLM.from_pretrained(straight).num_parameters() > 0
    assert {f"checkpoint-{n}" for n in (1, 2, 3)} <= {p.name for p in (straight / "sft").iterdir()}
    assert {f"checkpoint-{n}" for n in (1, 2, 3)} <= {p.name for p in (straight / "grpo").iterdir()}


CUTS = {
    "inside sft": ("sft", 2, "step_end", ["sft 2", "sft 3", "grpo 1", "grpo 2", "grpo 3"]),
    "after sft's last checkpoint": ("sft", 3, "save", ["grpo 1", "grpo 2", "grpo 3"]),
    "before grpo's first checkpoint": ("grpo", 1, "step_end", ["grpo 1", "grpo 2", "grpo 3"]),
    "inside grpo": ("grpo", 3, "step_end", ["grpo 3"]),
    "after grpo's last checkpoint": ("grpo", 3, "save", []),
}


@pytest.mark.parametrize("name", CUTS)
def test_a_run_that_is_cut_off_ends_as_one_that_is_not(tmp_path, straight, name):
    stage, step, when, left = CUTS[name]
    with pytest.raises(KeyboardInterrupt):
        two_stage(tmp_path, callbacks=[Cut(stage, step, when)]).train()
    seen = Cut(None, None)
    resumed = two_stage(tmp_path, callbacks=[seen])
    resumed.train(resume_from_checkpoint=True)
    resumed.save_model()
    assert [f"{folder} {update}" for folder, update in seen.updates] == left
    assert_same(saved(tmp_path), saved(straight))
    assert_same(saved(tmp_path / "sft"), saved(straight / "sft"))


def test_an_unfinished_sft_checkpoint_is_passed_over(tmp_path, straight):
    with pytest.raises(KeyboardInterrupt):
        two_stage(tmp_path, callbacks=[Cut("sft", 3)]).train()
    (tmp_path / "sft" / "checkpoint-2" / "trainer_state.json").unlink()
    resumed = two_stage(tmp_path)
    resumed.train(resume_from_checkpoint=True)
    resumed.save_model()
    assert_same(saved(tmp_path), saved(straight))


def test_the_first_model_is_released_before_the_second_is_built(tmp_path):
    alive = []

    class Watch(TrainerCallback):
        def on_train_begin(self, args, state, control, model=None, **kwargs):
            if args.output_dir.endswith("sft"):
                alive.append(weakref.ref(model))
            else:
                gc.collect()
                models = [o for o in gc.get_objects() if isinstance(o, PreTrainedModel)]
                assert alive[0]() is None
                assert any(o is model for o in models)
                alive.append(None)

    two_stage(tmp_path, callbacks=[Watch()], max_steps=1, sft_max_steps=1).train()
    assert len(alive) == 2


def test_one_adapter_goes_through_both_stages(tmp_path, model_folder):
    lora = LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM")
    starts = []

    class Watch(TrainerCallback):
        def on_train_begin(self, args, state, control, model=None, **kwargs):
            starts.append({n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad})

    def run(folder, callbacks, resume=None):
        trainer = two_stage(folder, model=model_folder, peft_config=lora, callbacks=callbacks, learning_rate=1e-2)
        trainer.train(resume_from_checkpoint=resume)
        trainer.save_model()
        return load_peft_weights(str(folder))

    final = run(tmp_path / "straight", [Watch()])
    after_sft = load_peft_weights(str(tmp_path / "straight" / "sft"))
    assert starts[1].keys() == starts[0].keys() and all("lora_" in name for name in starts[1])
    assert_same({n.replace(".default.weight", ".weight"): p for n, p in starts[1].items()}, after_sft)
    assert any(not torch.equal(final[name], after_sft[name]) for name in final)
    for stage, step, when in (("sft", 3, "save"), ("grpo", 2, "step_end")):
        folder = tmp_path / f"{stage}-{when}"
        with pytest.raises(KeyboardInterrupt):
            run(folder, [Cut(stage, step, when)])
        assert_same(run(folder, None, resume=True), final)


def test_evaluation_is_the_second_stages(tmp_path):
    logs = []

    class Watch(TrainerCallback):
        def on_evaluate(self, args, state, control, metrics, **kwargs):
            logs.append((args.output_dir.rpartition("/")[2], "eval_reward" in metrics))

    evaluation = {"eval_strategy": "steps", "eval_steps": 1, "per_device_eval_batch_size": 4}
    rows = rl_rows().select(range(4))
    two_stage(tmp_path, callbacks=[Watch()], eval_dataset=rows, max_steps=2, sft_max_steps=1, **evaluation).train()
    assert logs == [("grpo", True)] * 2


# Which key goes where


def test_keys_of_the_first_stage(tmp_path):
    args = small_config(tmp_path, TwoStageConfig, warmup_steps=7, weight_decay=0.3, max_grad_norm=0.2)
    first = args.first_stage()
    assert type(first) is SFTConfig and first.output_dir == str(tmp_path / "sft")
    # Pace and length are its own; the rest is the run's.
    assert (first.learning_rate, first.num_train_epochs, first.max_steps, first.warmup_steps) == (2e-5, 3.0, -1, 0)
    assert (first.per_device_train_batch_size, first.gradient_accumulation_steps, first.seed) == (8, 2, 11)
    assert (first.weight_decay, first.max_grad_norm, first.loss_type, first.max_length) == (0.3, 0.2, "nll", 1024)
    assert not first.bf16 and first.use_cpu and first.report_to == []
    second = args.second_stage()
    assert second.output_dir == str(tmp_path / "grpo") and args.output_dir == str(tmp_path)
    assert (second.learning_rate, second.max_steps, second.loss_type) == (1e-3, 3, "dapo")


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("learning_rate", 3e-4),
        ("num_train_epochs", 2.0),
        ("max_steps", 9),
        ("warmup_steps", 4),
        ("per_device_train_batch_size", 3),
        ("gradient_accumulation_steps", 5),
        ("lr_scheduler_type", "cosine"),
        ("weight_decay", 0.1),
        ("max_grad_norm", 0.0),
        ("save_steps", 6),
        ("max_length", None),
        ("packing", True),
        ("completion_only_loss", True),
        ("assistant_only_loss", True),
        ("loss_type", "dft"),
    ],
)
def test_each_prefixed_key_reaches_sft_alone(tmp_path, name, value):
    plain = small_config(tmp_path, TwoStageConfig)
    args = small_config(tmp_path, TwoStageConfig, **{f"sft_{name}": value})
    assert getattr(args.first_stage(), name) == value != getattr(plain.first_stage(), name)
    assert getattr(args.second_stage(), name, None) == getattr(plain.second_stage(), name, None)


def test_every_prefixed_key_is_tested():
    import dataclasses

    ours = {f.name for f in dataclasses.fields(TwoStageConfig)} - {f.name for f in dataclasses.fields(StudentConfig)}
    (mark,) = test_each_prefixed_key_reaches_sft_alone.pytestmark
    assert ours == {f"sft_{name}" for name, _ in mark.args[1]}


@pytest.mark.parametrize(
    ("name", "content"), [("optimizer.pt", b""), ("bridge/complete.json", b"{"), ("scheduler.pt", None)]
)
def test_a_damaged_checkpoint_of_the_first_stage_is_passed_over(tmp_path, caplog, monkeypatch, name, content):
    monkeypatch.setattr(logging.getLogger("trl_bridge"), "propagate", True)
    with pytest.raises(KeyboardInterrupt):
        two_stage(tmp_path, callbacks=[Cut("sft", 3)]).train()
    file = tmp_path / "sft" / "checkpoint-2" / name
    file.write_bytes(file.read_bytes()[:-1] + b"\1" if content is None else content)
    again = Cut("sft", 99)
    with caplog.at_level("WARNING"):
        two_stage(tmp_path, callbacks=[again]).train(resume_from_checkpoint=True)
    assert again.updates[0] == ("sft", 2)  # from the checkpoint before
    said = [record.message for record in caplog.records if "Passing over" in record.message]
    assert len(said) == 1 and name in said[0]


def test_checkpoints_of_earlier_releases_are_of_the_trainer_that_they_name(tmp_path):
    trainer = two_stage(tmp_path)
    trainer.train()
    assert trainer.trainer.saved.requirements["trainer"] == "ResumableTrainer"


# Refusals


def test_an_earlier_run_is_not_written_over(tmp_path, straight):
    with pytest.raises(ValueError, match="`output_dir`.*holds an earlier two-stage run"):
        two_stage(straight).train()


@pytest.mark.parametrize(
    ("changes", "resume", "said"),
    [
        ({}, True, "`resume_from_checkpoint` is set, but"),
        ({}, "somewhere/checkpoint-3", "`resume_from_checkpoint='somewhere/checkpoint-3'`"),
    ],
)
def test_resume_that_cannot_be(tmp_path, changes, resume, said):
    with pytest.raises(ValueError, match=said):
        two_stage(tmp_path, **changes).train(resume_from_checkpoint=resume)


def test_resume_of_weights_alone_is_refused(straight):
    with pytest.raises(ValueError, match="`save_only_model=False`"):
        two_stage(straight, save_only_model=True).train(resume_from_checkpoint=True)


@pytest.mark.parametrize(
    ("changes", "error", "said"),
    [
        ({"sft_dataset": None}, ValueError, "needs `sft_dataset`"),
        ({"train_dataset": None}, ValueError, "`train_dataset` with a `prompt`"),
        ({"train_dataset": sft_rows().rename_column("prompt", "question")}, ValueError, "no column `prompt`"),
        ({"reward_funcs": []}, ValueError, "needs `reward_funcs`"),
        ({"args": GRPOConfig("x", use_cpu=True, bf16=False)}, TypeError, "`TwoStageConfig`"),
        ({"peft_config": LoraConfig(r=2)}, NotImplementedError, "`peft_config` with a model object"),
    ],
)
def test_bad_input_is_refused_before_the_first_stage(tmp_path, changes, error, said):
    arguments = {"reward_funcs": digits_reward, "args": small_config(tmp_path, TwoStageConfig)}
    arguments |= {"train_dataset": rl_rows(), "sft_dataset": sft_rows(), "processing_class": tiny_tokenizer()}
    with pytest.raises(error, match=said):
        TwoStageTrainer(model=small_model(), **{**arguments, **changes})


@pytest.mark.parametrize("kind", [DistributedType.FSDP, DistributedType.DEEPSPEED])
def test_an_adapter_on_a_quantised_base_is_not_spread(tmp_path, model_folder, monkeypatch, kind):
    check = Backend.check

    def spread(self, args):
        monkeypatch.setattr(Accelerator, "distributed_type", kind)
        monkeypatch.setattr(PreTrainedModel, "is_quantized", True, raising=False)
        check(self, args)

    # As soon as TRL's own constructor is through, which cannot run with either on one CPU, nor with a quantised base.
    monkeypatch.setattr("trl_bridge.methods.two_stage.backend_for", Backend)
    monkeypatch.setattr(Backend, "check", spread)
    trainer = two_stage(tmp_path, model=model_folder, peft_config=LoraConfig(r=2, task_type="CAUSAL_LM"))
    with pytest.raises(NotImplementedError, match=f"quantised base has not been tested with {kind.value}.*bfloat16"):
        trainer.train()
    assert not list(tmp_path.glob("*/checkpoint-*"))


# The command


def test_command_line(tmp_path, capsys):
    method, recipe = METHODS["two-stage"], ["--config", "smoke/two-stage"]
    line = parse_command_line(method, [*recipe, "--sft_learning_rate", "0.5", "--max_steps", "7"], launched=False)
    assert (line.training.sft_learning_rate, line.training.sft_max_steps, line.training.max_steps) == (0.5, 4, 7)
    assert "did you mean `--sft_learning_rate`?" in refusal(capsys, "two-stage", *recipe, "--sft_lerning_rate", "1")
    (tmp_path / "typo.yaml").write_text("sft_max_step: 3\n")
    assert "did you mean `sft_max_steps`?" in refusal(capsys, "two-stage", "--config", str(tmp_path / "typo.yaml"))


def test_command_resumes(tmp_path, monkeypatch, capsys):
    arguments = ["--config", "smoke/two-stage", "--output_dir", str(tmp_path / "cut"), "--save_steps", "1"]
    with pytest.raises(SystemExit):
        train.run("two-stage", [*arguments, "--resume_from_checkpoint", "true"])
    assert "holds no checkpoint" in capsys.readouterr().err
    build = train.build_trainer

    def cut(method, line):
        trainer = build(method, line)
        trainer._callbacks = [Cut("grpo", 2)]
        return trainer

    with monkeypatch.context() as patch:
        patch.setattr(train, "build_trainer", cut)
        with pytest.raises(SystemExit, match="130"):
            train.run("two-stage", arguments)
    train.run("two-stage", [*arguments, "--resume_from_checkpoint", "true"])
    state = json.loads((tmp_path / "cut" / "grpo" / "checkpoint-4" / "trainer_state.json").read_text())
    assert state["global_step"] == 4
    train.run("two-stage", [*arguments[:2], "--output_dir", str(tmp_path / "straight")])
    assert_same(saved(tmp_path / "cut"), saved(tmp_path / "straight"))


def test_the_second_stage_runs_without_padding(tmp_path, straight):
    trainer = two_stage(tmp_path, padding_free=True)
    trainer.train()
    trainer.save_model()
    assert trainer.trainer._packs
    names = saved(straight).keys()
    error, moved = (
        sum(float((a[n].double() - b[n].double()).square().sum()) for n in names) ** 0.5
        for a, b in ((saved(tmp_path), saved(straight)), (saved(straight), saved(straight / "sft")))
    )
    assert error < 2e-4 * moved

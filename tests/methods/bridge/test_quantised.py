"""Quantised bases, with bitsandbytes itself on the CPU: lean mode, and LoRA students of other methods."""

from types import SimpleNamespace

import pytest
import torch
from peft import PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, BitsAndBytesConfig
from trl import GRPOConfig, GRPOTrainer

from tests.helpers.bridge import assert_equal, copies
from tests.helpers.group_losses import luffy_loss
from tests.helpers.groups import group_trainer, options, replay_recorded
from tests.helpers.groups import recording as group_recording
from tests.helpers.lean import lean_options, lean_trainer, replay_lean
from tests.helpers.resume import StopAt, assert_same, metrics_of, state_of
from tests.helpers.streams import SGD, make, recording, replay
from tests.helpers.training import rl_rows, small_config, small_lora, small_model, small_trainer
from trl_bridge import BridgeTrainer, CHORDTrainer, LUFFYTrainer, cli
from trl_bridge.methods.bridge.lean.build import students_adapter
from trl_bridge.models import tiny_tokenizer


pytest.importorskip("bitsandbytes")

TOLERANCE = 2e-4  # relative error of the movement, as without quantisation
FLOAT32 = {"bnb_4bit_compute_dtype": torch.float32}
KINDS = {
    "nf4": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True, **FLOAT32},
    "int8": {"load_in_8bit": True},
}
both = pytest.mark.parametrize("kind", KINDS)


@pytest.fixture
def folder(tmp_path):
    small_model(hidden_size=64).save_pretrained(tmp_path / "base")
    tiny_tokenizer().save_pretrained(tmp_path / "base")
    return tmp_path / "base"


def quantised(folder, kind):
    config = BitsAndBytesConfig(**KINDS[kind])
    return AutoModelForCausalLM.from_pretrained(folder, quantization_config=config, dtype=torch.float32)


def dequantised(folder, kind):
    return quantised(folder, kind).dequantize().float()


def in_float32(trainer):
    """Adapters as they would be without TRL's rounding to bfloat16, which no reference follows."""
    for parameter in trainer.model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    return trainer


def logits(model):
    # In training mode: in evaluation, bitsandbytes rounds activations, to 16 bits or to 8.
    with torch.no_grad():
        return model.train()(input_ids=torch.arange(3, 15)[None]).logits


@pytest.mark.parametrize("changes", [{}, {"padding_free": False, "gradient_checkpointing": True}], ids=["", "padded"])
@both
def test_lean_update_equals_the_reference_on_the_dequantised_base(tmp_path, folder, kind, changes):
    trainer = lean_trainer(tmp_path, model=quantised(folder, kind), **changes)
    kinds = {
        ("lora_" in n, p.dtype) for n, p in trainer.model.named_parameters() if n.endswith("proj.base_layer.weight")
    }
    assert kinds == {(False, torch.uint8 if kind == "nf4" else torch.int8)}
    assert all(p.dtype == torch.float32 for n, p in trainer.model.named_parameters() if "lora_" in n)
    base = {n: p.clone() for n, p in trainer.model.named_parameters() if not p.requires_grad}
    trainer.train()
    plain = dequantised(folder, kind)
    off = (
        plain.model.layers[0].mlp.up_proj.weight - small_model(hidden_size=64).model.layers[0].mlp.up_proj.weight
    ).abs()
    assert off.max() > 1e-4, "the base was not quantised"
    replayed = replay_lean(plain, trainer.start, trainer.windows, trainer.states, lean_options(trainer))
    errors = [errors for errors, _ in replayed]
    assert len(errors) == 3 and all(error < TOLERANCE for step in errors for error in step.values()), errors
    assert_equal({n: p for n, p in trainer.model.named_parameters() if not p.requires_grad}, base)


@both
def test_lambda_one_is_trls_qlora_grpo(tmp_path, folder, kind):
    """To the bit, but for TRL's rounding of the adapters: one scaling and one rate, without clipping."""
    shared = {"max_grad_norm": 0.0, "learning_rate": 1e-2}
    ours = {"bridge_lambda": 1.0, "cooperative_gain": False, "padding_free": False, "lean_lora_alpha": 15.0}
    lean = lean_trainer(
        tmp_path, BridgeTrainer, model=quantised(folder, kind), coordinator_learning_rate=1e-2, **ours, **shared
    )
    start = {n: p.detach().clone() for n, p in lean.model.named_parameters() if p.requires_grad}
    adapter = students_adapter(lean.args, lean.coordinator.peft_config)
    lean.train()
    args = small_config(tmp_path / "grpo", GRPOConfig, **shared)
    grpo = small_trainer(tmp_path, GRPOTrainer, model=quantised(folder, kind), args=args, grpo_adapter=adapter)
    assert {p.dtype for p in grpo.model.parameters() if p.requires_grad} == {torch.bfloat16}
    in_float32(grpo).model.load_state_dict(start, strict=False)
    grpo.train()
    assert_equal(copies(dict(lean.model.named_parameters())), copies(dict(grpo.model.named_parameters())))


def test_evaluation_leaves_the_weights_as_they_were(tmp_path, folder):
    """Where the CPU has instructions for bfloat16, bitsandbytes would round and pack them in the first one."""
    options = {"eval_dataset": rl_rows().select(range(4)), "eval_strategy": "steps", "eval_steps": 1}
    trainer = lean_trainer(tmp_path, model=quantised(folder, "nf4"), per_device_eval_batch_size=4, **options)
    with torch.no_grad():
        trainer.model.eval()(input_ids=torch.arange(3, 15)[None])
    trainer.train()
    plain = dequantised(folder, "nf4")
    replayed = list(replay_lean(plain, trainer.start, trainer.windows, trainer.states, lean_options(trainer)))
    assert all(error < TOLERANCE for errors, _ in replayed for error in errors.values())
    packing = [
        m.support_avx512bf16_for_cpu for m in trainer.model.modules() if hasattr(m, "support_avx512bf16_for_cpu")
    ]
    assert packing and not any(packing)


def test_a_model_that_was_packed_is_refused(tmp_path, folder):
    model = quantised(folder, "nf4")
    # What the first forward in evaluation mode leaves behind, on a CPU that packs.
    model.model.layers[1].self_attn.q_proj.weight.quant_state.packing_format_for_cpu = True
    with pytest.raises(ValueError, match="`model` has been evaluated.*layers.1.self_attn.q_proj.*Load it again"):
        lean_trainer(tmp_path, model=model)


@both
def test_resume_is_exact(tmp_path, folder, kind):
    def run(name, **changes):
        saving = {"save_strategy": "steps", "save_steps": 1, "max_steps": 4, "num_iterations": 2, **changes}
        return lean_trainer(
            tmp_path / name, BridgeTrainer, model=quantised(folder, kind), steps_per_generation=4, **saving
        )

    straight = run("straight")
    straight.train()
    run("halves", callbacks=[StopAt(3)]).train()
    resumed = run("halves")
    resumed.train(resume_from_checkpoint=True)
    assert_same(state_of(resumed), state_of(straight))
    assert_same(resumed.shadow_state_dict(), straight.shadow_state_dict())
    assert_same(metrics_of(resumed, 3), metrics_of(straight, 3))


def test_a_base_quantised_otherwise_is_refused(tmp_path, folder):
    saving = {"save_strategy": "steps", "save_steps": 1}
    lean_trainer(tmp_path, BridgeTrainer, model=quantised(folder, "nf4"), max_steps=1, **saving).train()
    for model in (quantised(folder, "int8"), dequantised(folder, "nf4")):
        trainer = lean_trainer(tmp_path, BridgeTrainer, model=model, max_steps=2, **saving)
        with pytest.raises(ValueError, match="resume_from_checkpoint.*`frozen base`"):
            trainer.train(resume_from_checkpoint=True)


@both
def test_saved_adapter_merges_into_the_dequantised_base(tmp_path, folder, kind):
    """From a quantised checkpoint, by its name: what is merged is the policy, a plain model in full precision."""
    quantised(folder, kind).save_pretrained(tmp_path / "quantised")
    named = {"model": str(tmp_path / "quantised"), "model_init_kwargs": {"dtype": "float32"}}
    trainer = lean_trainer(tmp_path, BridgeTrainer, learning_rate=3e-2, **named)
    trainer.train()
    trainer.save_model(str(tmp_path / "policy"))
    want = logits(trainer.model)
    loaded = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(tmp_path / "quantised"), tmp_path / "policy"
    )
    torch.testing.assert_close(logits(loaded), want, atol=1e-5, rtol=1e-5)
    assert cli.main(["merge", str(tmp_path / "policy"), "--output_dir", str(tmp_path / "plain")]) == 0
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "plain")
    assert not hasattr(plain.config, "quantization_config") and plain.dtype == torch.float32
    torch.testing.assert_close(logits(plain), want, atol=1e-4, rtol=1e-4)
    assert not torch.allclose(logits(dequantised(folder, kind)), want, atol=1e-2)


# LoRA students of a stream and of a group method


@both
def test_stream_method(tmp_path, folder, kind):
    lora = small_lora()
    changes = {"model": quantised(folder, kind), "peft_config": lora, "mu_peak": 0.8, "mu_valley": 0.8, **SGD}
    trainer = in_float32(make(recording(CHORDTrainer), tmp_path, **changes))
    trainer.train()
    weight = {"rl_weight": lambda step: 1 - 0.8, "sft_weight": lambda step: 0.8}
    assert trainer.windows and len(trainer.states) == len(trainer.windows)
    replay(trainer, model=dequantised(folder, kind), peft_config=lora, **weight)


@both
def test_group_method(tmp_path, folder, kind):
    lora = small_lora()
    changes = {"model": quantised(folder, kind), "peft_config": lora, "optim": "sgd", "learning_rate": 0.1}
    trainer = in_float32(group_trainer(tmp_path, group_recording(LUFFYTrainer), **changes))
    trainer.train()
    start, *states = ({n: p for n, p in s.items() if "lora_" in n} for s in (trainer.start, *trainer.states))
    run = SimpleNamespace(windows=trainer.windows, start=start, states=states)
    model = get_peft_model(dequantised(folder, kind), lora)
    assert max(replay_recorded(run, model, luffy_loss(), options(trainer.args))) < TOLERANCE

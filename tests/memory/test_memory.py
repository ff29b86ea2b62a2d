"""The memory formulas: against a measured run, against what is known of each backend, and through the command."""

import argparse
import gc
import importlib.util
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from transformers import AutoConfig

from trl_bridge import cli
from trl_bridge.cli.memory import DEFAULTS, run_of
from trl_bridge.cli.parsing import parse_values
from trl_bridge.memory.formulas import BACKENDS, Run, estimate, optimizer_bytes
from trl_bridge.memory.shapes import SIZES, load_config, shape_of
from trl_bridge.methods.catalogue import METHODS


ROOT = Path(__file__).parents[2]
SPEC = importlib.util.spec_from_file_location("memory_benchmark", ROOT / "benchmarks" / "memory.py")
benchmark = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(benchmark)

# Weights outweigh the rest, as in a large model; a run takes a few seconds.
SMALL = benchmark.Sizes(
    hidden_size=384, layers=2, heads=4, vocab_size=1024, batch_size=4, prompt_length=8, completion_length=4
)


@pytest.mark.parametrize("variant", ["GRPO", "BRIDGE"])
def test_formula_is_within_a_tenth_of_the_measured_peak(variant):
    gc.collect()
    measured = benchmark.peak_of(variant, SMALL, "one-process")["peak"]
    assert benchmark.formula(variant, SMALL, "one-process").total == pytest.approx(measured, rel=0.1)
    # The parts are large enough here that a wrong one shows.
    assert benchmark.formula("BRIDGE, SGD shadow", SMALL, "one-process").total != pytest.approx(measured, rel=0.1)


@pytest.fixture(scope="module")
def shape():
    return shape_of(benchmark.make_config(SMALL))


def test_shape_is_the_models_own(shape):
    model = benchmark.make_model(SMALL)
    assert shape.parameters == sum(p.numel() for p in model.parameters())
    layer = sum(p.numel() for p in model.model.layers[0].parameters())
    assert (shape.layer_parameters, shape.layers) == (layer, 2)
    assert shape.root_parameters == shape.parameters - 2 * layer
    linears = [m for n, m in model.named_modules() if n.endswith("_proj")]
    assert shape.adapter_width == sum(m.in_features + m.out_features for m in linears)


def parts(shape, **changes):
    """Bytes for each weight of the parts that do not depend on the batch, in the phase after all backwards."""
    run = Run(rows=1, prompt_length=1, completion_length=1, accumulation=2, **changes)
    return {name: size / shape.parameters for name, size in estimate(shape, run).parts.items()}


# Bytes for each weight, float32 AdamW on N ranks: weights, gradient and two states, 4 each. The student's gradient is gone when the
# shadow's comes, but under DeepSpeed.
@pytest.mark.parametrize(
    ("backend", "student", "shadow"),
    [
        ("one-process", 16, 12),
        ("ddp", 16 + 4, 12 / 8),  # and the reducer's buckets
        ("fsdp2", 16 / 8, 12 / 8),
        ("zero1", 4 + 4 + 12 / 8 + 4, 16 / 8),  # and its bucket, which small models fill
        ("zero2", 4 + 4 / 8 + 12 / 8 + 4, 16 / 8),
        (
            "zero3",
            16 / 8 + 4 / 8 + 4,
            12 / 8,
        ),  # DeepSpeed's float32 master is a copy; the peak is in a pass of the student
    ],
)
def test_student_and_shadow_by_backend(shape, backend, student, shadow):
    n = 1 if backend == "one-process" else 8
    found = parts(shape, backend=backend, num_processes=n, bf16=False, shadow=True)
    mine = ("weights", "gradients", "optimizer", "reduction buffers")
    assert sum(found.get(name, 0) for name in mine) == pytest.approx(student, rel=1e-6)
    assert found["shadow"] + found.get("shadow's gradients", 0) == pytest.approx(shadow, rel=1e-6)


def test_options_of_the_shadow(shape):
    base = Run(rows=4, accumulation=2, coordinator_rank=16, bf16=False, shadow=True)
    total = estimate(shape, base).total
    per_weight = {
        "stateless": total - estimate(shape, replace(base, shadow_state_bytes=0)).total,
        "on the CPU": total - estimate(shape, replace(base, shadow_offload=True)).total,
        "none": total - estimate(shape, replace(base, shadow=False)).total,
        "in 16 bits": total - estimate(shape, replace(base, shadow_bf16=True)).total,
    }
    want = {"stateless": 8, "on the CPU": 12, "none": 12, "in 16 bits": -2}
    assert {k: v / shape.parameters for k, v in per_weight.items()} == pytest.approx(want, abs=1e-3)
    # The lean mode holds no second copy of the base.
    lean = replace(base, adapter_rank=80)
    without = replace(lean, shadow=False)
    adapter = 80 * shape.adapter_width
    assert estimate(shape, lean).parts["weights"] == 4 * (shape.parameters + adapter)
    assert estimate(shape, lean).total - estimate(shape, without).total == pytest.approx(12 * adapter)
    overlapped = replace(lean, shadow_overlap=True)
    assert estimate(shape, overlapped).total - estimate(shape, without).total == pytest.approx(16 * adapter)
    # Its base and the student's adapter are spread where the backend spreads weights, the shadow's never.
    fsdp = estimate(shape, replace(lean, backend="fsdp2", num_processes=4)).parts
    assert fsdp["weights"] == shape.parameters + adapter and fsdp["optimizer"] == 2 * adapter
    assert fsdp["shadow"] == 12 * adapter
    zero = estimate(shape, replace(lean, backend="zero1", num_processes=4)).parts
    assert zero["weights"] == 4 * (shape.parameters + adapter) and zero["optimizer"] == 3 * adapter


def test_what_the_batch_costs(shape):
    base = Run(rows=16, prompt_length=64, completion_length=64, accumulation=2, checkpointing=False)
    activations = estimate(shape, base).parts["activations"]
    assert estimate(shape, replace(base, rows=32)).parts["activations"] == 2 * activations
    assert estimate(shape, replace(base, checkpointing=True)).parts["activations"] < activations / 2
    # GRPO under FSDP2 holds whole gradients between the micro-batches of an update, BRIDGE its rows only.
    fsdp = replace(base, backend="fsdp2", num_processes=4, bf16=False)
    gradients = [estimate(shape, replace(fsdp, unsynced=x)).parts["gradients"] for x in (True, False)]
    assert gradients[0] == 4 * gradients[1]


def test_vllm_takes_its_share_throughout_unless_it_sleeps(shape):
    base = Run(rows=1)
    total = estimate(shape, base).total
    assert estimate(shape, replace(base, vllm_bytes=2**30)).total == total + 2**30
    asleep = estimate(shape, replace(base, vllm_bytes=2**30, vllm_sleeps=True)).parts
    assert asleep["vLLM"] == 2**30 and "gradients" not in asleep
    assert "vLLM" not in estimate(shape, replace(base, vllm_bytes=2**10, vllm_sleeps=True)).parts


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"backend": "fsdp1"}, "one of one-process"),
        ({"backend": "ddp"}, "num_processes=1"),
        ({"num_processes": 2}, "num_processes=2"),
    ],
)
def test_runs_that_cannot_be(shape, changes, said):
    with pytest.raises(ValueError, match=said):
        estimate(shape, Run(**changes))


def test_unknown_optimizers():
    assert (optimizer_bytes("adamw_torch_fused"), optimizer_bytes("sgd")) == (8, 0)
    with pytest.raises(ValueError, match="`optim=galore_adamw`"):
        optimizer_bytes("galore_adamw")


_QWEN: dict = {"model_type": "qwen2", "vocab_size": 152064, "tie_word_embeddings": False}
CONFIGS: dict = {
    "1.5B": {**_QWEN, "vocab_size": 151936, "tie_word_embeddings": True, "hidden_size": 1536, "intermediate_size": 8960,
             "num_hidden_layers": 28, "num_attention_heads": 12, "num_key_value_heads": 2},
    "3B": {**_QWEN, "vocab_size": 151936, "tie_word_embeddings": True, "hidden_size": 2048, "intermediate_size": 11008,
           "num_hidden_layers": 36, "num_attention_heads": 16, "num_key_value_heads": 2},
    "7B": {**_QWEN, "hidden_size": 3584, "intermediate_size": 18944, "num_hidden_layers": 28, "num_attention_heads": 28,
           "num_key_value_heads": 4},
    "14B": {**_QWEN, "hidden_size": 5120, "intermediate_size": 13824, "num_hidden_layers": 48,
            "num_attention_heads": 40, "num_key_value_heads": 8},
    "32B": {**_QWEN, "hidden_size": 5120, "intermediate_size": 27648, "num_hidden_layers": 64,
            "num_attention_heads": 40, "num_key_value_heads": 8},
    "70B": {"model_type": "llama", "vocab_size": 128256, "tie_word_embeddings": False, "hidden_size": 8192,
            "intermediate_size": 28672, "num_hidden_layers": 80, "num_attention_heads": 64, "num_key_value_heads": 8},
}  # fmt: skip


def test_sizes_are_those_that_their_makers_print():
    printed = {"1.5B": 1.54, "3B": 3.09, "7B": 7.61, "14B": 14.7, "32B": 32.5, "70B": 70.6}
    assert {size: shape.parameters / 1e9 for size, shape in SIZES.items()} == pytest.approx(printed, rel=0.01)


def test_sizes_are_counted_from_the_models():
    made = {size: AutoConfig.for_model(**config) for size, config in CONFIGS.items()}
    assert {size: shape_of(config) for size, config in made.items()} == SIZES


# The command


def test_the_table_of_the_page_is_the_commands(capsys):
    assert cli.main(["memory", "--table"]) == 0
    page = (ROOT / "docs" / "scaling.md").read_text()
    assert capsys.readouterr().out in page


@pytest.mark.parametrize("method", ["bridge", "grpo"])
def test_defaults_are_the_parsers(method):
    values, launch = parse_values(METHODS[method], [])
    assert not launch and DEFAULTS.items() >= {k: v for k, v in vars(values).items() if k in DEFAULTS}.items()
    options = argparse.Namespace(backend=None, prompt_length=None, gpu_memory=80.0)
    assert run_of(METHODS[method], argparse.Namespace(**DEFAULTS), [], options) == run_of(
        METHODS[method], values, [], options
    )


@pytest.mark.parametrize("method", ["bridge", "grpo"])
def test_a_size_alone_needs_neither_torch_nor_trl(method):
    code = (
        "import sys; from trl_bridge import cli; "
        f"cli.main(['memory', '--params', '7B', '--prompt_length', '64', '--method', {method!r}]); "
        "print(sorted({'torch', 'transformers', 'trl', 'peft', 'datasets'} & set(sys.modules)))"
    )
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert shown.startswith(f"{method}, 7B (7.62B)") and shown.splitlines()[-1] == "[]"


def refusal(capsys, *arguments):
    with pytest.raises(SystemExit) as stopped:
        cli.main(["memory", *arguments])
    assert stopped.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    return line


def printed_total(capsys, *arguments):
    assert cli.main(["memory", *arguments]) == 0
    lines = capsys.readouterr().out.splitlines()
    parts = [float(line.split()[-2]) for line in lines if line.endswith("GiB")]
    total = float(lines[-1].removeprefix("total").split()[0])
    assert sum(parts) == pytest.approx(total, abs=0.01 * len(parts))
    return total, lines


def test_a_recipe_on_the_backend_of_its_accelerate_config(capsys):
    recipe = ("--config", "qwen2.5-3b/bridge", "--params", "3B")
    total, lines = printed_total(capsys, *recipe, "--accelerate_config", "bridge/fsdp2", "--num_processes", "16")
    assert lines[0] == "bridge, 3B (3.09B)" and lines[1].startswith(
        "fsdp2, 16 GPUs, bf16, 5 x (1024 + 3000) tokens, with"
    )
    assert "computed" in lines[-1] and any(line.startswith("vLLM") and "24.00" in line for line in lines)
    same, _ = printed_total(capsys, *recipe, "--backend", "fsdp2", "--num_processes", "16")
    assert same == total
    less, _ = printed_total(capsys, *recipe, "--backend", "fsdp2", "--num_processes=16", "--shadow_optim", "sgd")
    # A shadow without state: 8 bytes for each weight, on a sixteenth of them.
    assert total - less == pytest.approx(8 * 3.0859e9 / 16 / 2**30, abs=0.02)


def test_a_local_config_and_values_of_the_shell(capsys, tmp_path):
    benchmark.make_config(SMALL).save_pretrained(tmp_path)
    small = ("--model", str(tmp_path), "--bf16", "false", "--gradient_checkpointing", "false")
    total, lines = printed_total(capsys, *small, "--method", "grpo", "--per_device_train_batch_size", "2")
    assert lines[0].startswith("grpo, ") and "one-process, 1 GPU, float32, 2 x" in lines[1] and "measured" in lines[-1]
    assert printed_total(capsys, *small, "--method", "grpo", "--per_device_train_batch_size", "4")[0] > total
    assert load_config(str(tmp_path)).hidden_size == 384


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ((), "name a model"),
        (("--params", "9B"), "1.5B, 3B"),
        (("--params", "7B", "--model", "x"), "not allowed with"),
        (("--params", "7B", "--method", "grp"), "no method is called 'grp'"),
        (("--params", "7B", "--foo", "1"), "unknown option `--foo`"),
        (("--params", "7B", "--backend", "fsdp2"), "`num_processes=1`"),
        (("--params", "7B", "--optim", "adafactor"), "`optim=adafactor`"),
        (("--params", "7B", "--dtype", "bfloat16"), "float32"),
        (("--params", "7B", "--accelerate_config", "bridge/zero9"), "bridge/zero3"),
        (("--params", "7B", "--gpu_memory", "0"), "`--gpu_memory`"),
        (("--table", "--params", "7B", "--max_steps", "1"), "`--table`"),
    ],
)
def test_refused_in_one_line(capsys, arguments, said):
    assert said in refusal(capsys, *arguments)


def test_no_measured_mark_without_a_measurement():
    run = Run(bf16=False, checkpointing=False)
    marked = [b for b in BACKENDS if replace(run, backend=b).measured]
    assert marked == ["one-process", "ddp", "fsdp2"]
    for changes in (
        {"shadow_offload": True},
        {"adapter_rank": 8},
        {"reference": True},
        {"vllm_bytes": 1},
        {"teacher_bytes": 1},
    ):
        assert not replace(run, **changes).measured


def test_teachers_and_what_a_self_teacher_holds(shape, capsys, tmp_path):
    assert parts(shape, backend="fsdp2", num_processes=8, bf16=False, teacher_bytes=6e6)["teachers"] == pytest.approx(
        6e6 / 8 / shape.parameters, abs=1e-6
    )
    assert parts(shape, bf16=False, averaged=True)["averaged weights"] == 4
    assert parts(shape, backend="fsdp2", num_processes=8, bf16=False, averaged=True)["averaged weights"] == 0.5
    # Where scoring is the peak: what comes from the CPU, or is gathered of the shards.
    large = {"teacher_bytes": 100 * shape.parameters, "bf16": False}
    assert parts(shape, **large)["teachers"] == 100 and "teachers, while they score" not in parts(shape, **large)
    assert parts(shape, **large, teacher_offload=True)["teachers, while they score"] == 100
    for offload in (False, True):
        held = parts(shape, **large, backend="fsdp2", num_processes=8, teacher_offload=offload)
        assert held["teachers, while they score"] == 100 and held.get("teachers", 0) == (0 if offload else 12.5)
    run = Run(rows=200, completion_length=100, bf16=False, checkpointing=False)
    plain, whole = (estimate(shape, replace(run, whole_logits=held)).parts["logits"] for held in (False, True))
    assert whole == 5 * 4 * 200 * 100 * shape.vocab_size != plain
    benchmark.make_config(SMALL).save_pretrained(tmp_path)
    small = ("--model", str(tmp_path), "--bf16", "false")
    total, _ = printed_total(capsys, *small, "--method", "grpo")
    named = (f"a={tmp_path}", "b=http://host:8000", f"c={tmp_path}")
    more, lines = printed_total(capsys, *small, "--method", "grpo", "--teachers", *named, "--teacher_dtype", "float32")
    size = shape_of(load_config(str(tmp_path))).parameters
    assert more - total == pytest.approx(2 * 4 * size / 2**30, abs=0.02)
    assert any(line.startswith("teachers") for line in lines)
    recipe = (
        "--config",
        "qwen2.5-3b/grpo-with-teacher",
        "--params",
        "3B",
        "--backend",
        "fsdp2",
        "--num_processes",
        "4",
    )
    _, lines = printed_total(capsys, *recipe, "--teachers", str(tmp_path))
    assert lines[0] == "grpo, 3B (3.09B)" and any(line.startswith("teachers") for line in lines)
    for method, options, bytes_ in (
        ("opd", (), 2),
        ("aopd", ("--teacher_model_init_kwargs", '{"dtype": "float32"}'), 4),
        ("opd", ("--teacher_offload", "true"), 0),
    ):
        plain, _ = printed_total(capsys, *small, "--method", method)
        more, _ = printed_total(
            capsys, *small, "--method", method, "--teacher_model_name_or_path", str(tmp_path), *options
        )
        assert more - plain == pytest.approx(bytes_ * size / 2**30, abs=0.02)

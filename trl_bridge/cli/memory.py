"""`trl-bridge memory`: memory of one GPU for a run, estimated before anything is launched."""

import argparse
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import yaml

from ..memory.formulas import BACKENDS, Estimate, Run, estimate, optimizer_bytes
from ..memory.shapes import SIZES, load_config, shape_of, shape_of_size
from ..methods.catalogue import METHODS, Method
from ..tables import markdown_table
from .errors import ToolParser, UsageError


_GIB = 2**30
# What the table holds fixed: 8 rollouts of 1024 + 3072 tokens and one demonstration as long in a micro-batch, two of them in
# an update, bfloat16, AdamW, gradient checkpointing, rollouts from a vLLM server.
_RUN = Run(rows=8, prompt_length=1024, completion_length=3072, accumulation=2)
_BRIDGE = {"coordinator_rank": 16, "demonstration_rows": 1, "demonstration_length": 4096}
_OPTIONS: dict[str, dict[str, Any]] = {
    "GRPO": {"unsynced": True},
    # Bytes for each weight of the student: a teacher of its size in 16 bits.
    "GRPO, teacher": {"unsynced": True, "teacher_bytes": 2},
    "GRPO, teacher on the CPU": {"unsynced": True, "teacher_bytes": 2, "teacher_offload": True},
    "self-teacher, SDPG, one row": {"unsynced": True, "whole_logits": True, "rows": 1},
    "self-teacher, RLSD, average": {"unsynced": True, "averaged": True},
    "BRIDGE": {**_BRIDGE, "shadow": True},
    "BRIDGE, SGD shadow": {**_BRIDGE, "shadow": True, "shadow_state_bytes": 0},
    "BRIDGE, shadow on the CPU": {**_BRIDGE, "shadow": True, "shadow_offload": True},
    "BRIDGE, selective": _BRIDGE,
    "BRIDGE, lean, base in bf16": {**_BRIDGE, "shadow": True, "adapter_rank": 80, "base_bytes": 2},
}
# What memory depends on where nothing is given. To ask the parser is to import TRL, transformers and torch.
DEFAULTS: dict[str, Any] = {
    **dict.fromkeys(
        (
            "activation_checkpointing bf16 cooperative_gain max_prompt_length model_name_or_path sft_max_length "
            "sft_per_device_train_batch_size shadow_dtype shadow_optim steps_per_generation"
        ).split()
    ),
    **dict.fromkeys("fp16 lean load_in_4bit load_in_8bit shadow_offload use_peft use_vllm".split(), False),
    "beta": 0.0,
    "dtype": "float32",
    "gradient_accumulation_steps": 1,
    "gradient_checkpointing": True,
    "lora_r": 16,
    "max_completion_length": 512,
    "num_generations": 8,
    "optim": "adamw_torch_fused",
    "per_device_train_batch_size": 8,
    "preset": "paper",
}
_COLUMNS = (
    ("one-process", 1),
    ("ddp", 8),
    ("zero2", 8),
    ("fsdp2", 8),
    ("zero3", 8),
    ("fsdp2", 16),
    ("fsdp2", 64),
)


def scaling_table() -> str:
    """The table, in Markdown."""
    head = ["model", "option", *(f"{backend} x {count}" if count > 1 else "1 GPU" for backend, count in _COLUMNS)]
    rows = []
    for size, shape in SIZES.items():
        for option, changes in _OPTIONS.items():
            teacher = {"teacher_bytes": changes.get("teacher_bytes", 0) * shape.parameters}
            runs = [replace(_RUN, **changes | teacher, backend=b, num_processes=count) for b, count in _COLUMNS]
            offloads = changes.get("teacher_offload")
            rows.append(
                [
                    size,
                    option,
                    *(
                        "" if offloads and run.backend == "zero3" else f"{estimate(shape, run).total / _GIB:.0f}"
                        for run in runs
                    ),
                ]
            )
    return markdown_table(head, rows, left=2)


_EPILOG = (
    "Every option of the method is taken as well, from the recipe or spelt out, such as --per_device_train_batch_size 4 "
    "--optim adamw_torch --shadow_optim sgd --gradient_checkpointing false."
)


def main(argv: list[str] | None = None) -> int:
    """Run the tool."""
    options, rest = _parse(sys.argv[1:] if argv is None else argv)
    if options.table:
        if rest:
            raise UsageError(f"`--table` takes no other options, got {' '.join(rest)}")
        sys.stdout.write(scaling_table())
        return 0
    method = _method(options, rest)
    if options.config:
        rest = ["--config", options.config, *rest]
    values, launch = _values(method, rest)
    name = options.params or options.model or values.model_name_or_path
    if name is None:
        raise UsageError("name a model (`--model`, or a recipe's `model_name_or_path`) or a size (`--params 7B`)")
    shape = shape_of_size(name) if options.params else shape_of(load_config(name))
    run = run_of(method, values, launch, options)
    sys.stdout.write(
        _report(f"{method.name}, {name} ({shape.parameters / 1e9:.2f}B)", run, estimate(shape, run), options)
    )
    return 0


def _values(method: Method, rest: list[str]) -> tuple[Any, list[str]]:
    """A method's values, and the launcher's options."""
    if not rest and method.name in ("bridge", "grpo"):
        return argparse.Namespace(**DEFAULTS), []
    # Imported late, so that --help and a wrong option answer at once.
    from .parsing import parse_values

    return parse_values(method, rest)


def run_of(method: Method, values: Any, launch: list[str], options: argparse.Namespace) -> Run:
    """What memory depends on, of a method's values."""

    def get(name: str, otherwise: Any = None) -> Any:
        return getattr(values, name, otherwise)

    backend, processes = _backend(launch, options)
    bridge, stream = method.name == "bridge", method.family in ("bridge", "stream")
    adapter = values.lora_r if get("use_peft") and not bridge else 0
    if get("lean"):
        adapter = values.lean_lora_r + values.lora_r
    if values.dtype not in (None, "float32") and not adapter:
        raise UsageError(f"`dtype: {values.dtype}`: the formulas are those of weights in float32 (`--dtype float32`)")
    prompt, completion = options.prompt_length or values.max_prompt_length or 512, get("max_completion_length")
    if completion is None:  # SFT: full rows are scored
        prompt, completion = 0, get("max_length") or prompt
    rows, optim = values.per_device_train_batch_size, values.optim
    groups = max(1, rows // (get("num_generations") or 1))
    colocated = bool(get("use_vllm")) and values.vllm_mode == "colocate"
    generations = get("steps_per_generation") or values.gradient_accumulation_steps
    checkpointing = values.activation_checkpointing
    gain = get("cooperative_gain")
    return Run(
        backend=backend,
        num_processes=processes,
        bf16=values.bf16 is not False and not values.fp16,
        state_bytes=optimizer_bytes(str(optim)),
        shadow_state_bytes=optimizer_bytes(str(get("shadow_optim") or optim)),
        rows=rows,
        prompt_length=prompt,
        completion_length=completion,
        demonstration_rows=(values.sft_per_device_train_batch_size or groups) if stream else 0,
        demonstration_length=(values.sft_max_length or prompt + completion) if stream else 0,
        accumulation=values.gradient_accumulation_steps,
        unsynced=not bridge,
        checkpointing=bool(values.gradient_checkpointing if checkpointing is None else checkpointing),
        reference=bool(get("beta")),
        teacher_bytes=_teacher_bytes(values),
        teacher_offload=bool(get("teacher_offload")),
        averaged=get("self_teacher") == "average",
        whole_logits=get("objective") in ("sdft", "sdpg"),
        coordinator_rank=values.lora_r if bridge else 0,
        shadow=bridge and (values.preset == "paper" if gain is None else gain),
        shadow_offload=bool(get("shadow_offload")),
        shadow_overlap=bool(get("shadow_overlap")),
        shadow_bf16=str(get("shadow_dtype")) in ("bfloat16", "float16"),
        adapter_rank=adapter,
        base_bytes=_base_bytes(values),
        generation_rows=0 if get("use_vllm") or method.family == "sft" else rows * generations,
        vllm_bytes=round(values.vllm_gpu_memory_utilization * options.gpu_memory * _GIB) if colocated else 0,
        vllm_sleeps=colocated and bool(values.vllm_enable_sleep_mode),
    )


def _teacher_bytes(values: Any) -> float:
    """Of teachers that are models here; those stored in an unknown precision in 16 bits."""
    distilled = getattr(values, "teacher_model_name_or_path", None)
    if distilled:
        size = 4.0 if "float32" in str(values.teacher_model_init_kwargs) else 2.0  # a mapping, or JSON as typed
        return shape_of(load_config(distilled)).parameters * size
    if not getattr(values, "teachers", None):
        return 0.0
    from ..training.teacher_config import named, place_of

    models = [where for where in named(values.teachers).values() if place_of(where) == "model"]
    size = 4.0 if values.teacher_dtype == "float32" else 2.0
    return sum(shape_of(load_config(where)).parameters * size for where in models)


def _base_bytes(values: Any) -> float:
    """Bytes of an element of the base under an adapter."""
    sizes = {"load_in_4bit": 0.5625, "load_in_8bit": 1}  # with the 4-bit blocks' scales
    found = [size for option, size in sizes.items() if getattr(values, option)]
    return found[0] if found else 2 if values.dtype == "bfloat16" else 4


def _parse(argv: list[str]) -> tuple[argparse.Namespace, list[str]]:
    parser = ToolParser(
        prog="trl-bridge memory",
        description="Estimate the memory of one GPU for a run. Nothing is downloaded but the model's config.",
        epilog=_EPILOG,
    )
    parser.add_argument("--config", help="YAML file, or name of a shipped recipe, such as qwen2.5-3b/bridge")
    parser.add_argument("--method", help="method, where the recipe's name does not say it (default: bridge)")
    model = parser.add_mutually_exclusive_group()
    model.add_argument("--model", help="folder or hub name, in place of the recipe's model_name_or_path")
    model.add_argument("--params", metavar="SIZE", help="size in place of a model: 1.5B, 3B, 7B, 14B, 32B or 70B")
    parser.add_argument("--backend", choices=BACKENDS, help="backend (default: what --accelerate_config says)")
    parser.add_argument(
        "--prompt_length", type=int, help="longest prompt in tokens (default: max_prompt_length, or 512)"
    )
    parser.add_argument("--gpu_memory", type=float, default=80.0, help="memory of one GPU in GiB (default: 80)")
    parser.add_argument("--table", action="store_true", help="print the table of docs/scaling.md and stop")
    options, rest = parser.parse_known_args(argv)
    if options.gpu_memory <= 0 or (options.prompt_length or 1) < 1:
        raise UsageError("`--gpu_memory` and `--prompt_length` must be above 0")
    return options, rest


def _method(options: argparse.Namespace, rest: list[str]) -> Method:
    # A form of a method follows its name: `grpo-with-teacher`.
    stem = Path(options.config or "").stem
    fitting = [name for name in METHODS if stem == name or stem.startswith(f"{name}-")]
    name = options.method or max(fitting, key=len, default="bridge")
    if name not in METHODS:
        raise UsageError(f"no method is called {name!r}: choose from {', '.join(METHODS)}")
    return METHODS[name]


def _backend(launch: list[str], options: argparse.Namespace) -> tuple[str, int]:
    """Backend and number of processes, as the launcher's options have them."""
    given = dict(zip(launch[::2], launch[1::2], strict=False)) if all(t.startswith("--") for t in launch[::2]) else {}
    parts = (token.partition("=") for token in launch)
    given.update({key: value for key, equals, value in parts if equals})
    config: dict[str, Any] = {}
    name = given.get("--accelerate_config") or given.get("--config_file")
    if name:
        from .launch import find_accelerate_config

        config = yaml.safe_load(find_accelerate_config(name).read_text(encoding="utf-8")) or {}
    processes = int(given.get("--num_processes") or config.get("num_processes") or 1)
    if options.backend:
        return options.backend, processes
    stage = (config.get("deepspeed_config") or {}).get("zero_stage", 2)
    backends = {"DEEPSPEED": f"zero{stage}", "FSDP": "fsdp2"}
    kind = str(config.get("distributed_type", "NO"))
    if kind in backends:
        return backends[kind], processes
    if kind == "NO" and config:
        return "one-process", 1
    return ("ddp" if processes > 1 else "one-process"), processes


def _report(title: str, run: Run, result: Estimate, options: argparse.Namespace) -> str:
    where = f"{run.backend}, {run.num_processes} GPU{'s' if run.num_processes > 1 else ''}"
    precision = "bf16" if run.bf16 else "float32"
    lengths = f"{run.rows} x ({run.prompt_length} + {run.completion_length}) tokens"
    lines = [
        title,
        f"{where}, {precision}, {lengths}, {'with' if run.checkpointing else 'no'} gradient checkpointing",
        "",
    ]
    width = max(map(len, result.parts))
    lines += [f"{name:{width}}  {size / _GIB:8.2f} GiB" for name, size in result.parts.items()]
    basis = "measured on CPU, see docs/benchmarks.md" if result.measured else "computed"
    free = options.gpu_memory - result.total / _GIB
    verdict = f"{free:.1f} GiB left" if free >= 0 else f"{-free:.1f} GiB too much"
    lines += [f"{'total':{width}}  {result.total / _GIB:8.2f} GiB  ({basis}; {verdict} of {options.gpu_memory:g})", ""]
    return "\n".join(lines)

"""The table of `docs/scaling.md`: memory of one GPU by size of the model, backend and option."""

from typing import Any

from ..training.memory import Run, estimate
from ..training.model_shape import SIZES, config_of_size, shape_of


__all__ = ["scaling_table"]

# What the table holds fixed: 8 rollouts of 1024 + 3072 tokens and one demonstration as long in a micro-batch, two of them in
# an update, bfloat16, AdamW, gradient checkpointing, rollouts from a vLLM server.
_RUN = Run(rows=8, prompt_length=1024, completion_length=3072, accumulation=2)
_BRIDGE = {"coordinator_rank": 16, "demonstration_rows": 1, "demonstration_length": 4096}
_OPTIONS: dict[str, dict[str, Any]] = {
    "GRPO": {"unsynced": True},
    "BRIDGE": {**_BRIDGE, "shadow": True},
    "BRIDGE, SGD shadow": {**_BRIDGE, "shadow": True, "shadow_state_bytes": 0},
    "BRIDGE, shadow on the CPU": {**_BRIDGE, "shadow": True, "shadow_offload": True},
    "BRIDGE, selective": _BRIDGE,
    "BRIDGE, lean, base in bf16": {**_BRIDGE, "shadow": True, "adapter_rank": 80, "base_bytes": 2},
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
    """
    The table, in Markdown.

    Returns:
        `str`: GiB for each size, option and backend with its number of GPUs.
    """
    heads = [f"{backend} x {count}" if count > 1 else "1 GPU" for backend, count in _COLUMNS]
    lines = [f"| model | option | {' | '.join(heads)} |", "| --- | --- |" + " ---: |" * len(_COLUMNS)]
    for size in SIZES:
        shape = shape_of(config_of_size(size))
        for option, changes in _OPTIONS.items():
            cells = []
            for backend, count in _COLUMNS:
                run = Run(**{**vars(_RUN), **changes, "backend": backend, "num_processes": count})
                cells.append(f"{estimate(shape, run).total / 2**30:.0f}")
            lines.append(f"| {size} | {option} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"

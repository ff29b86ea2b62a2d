"""Which of the shadow's cost options can be had, and with what."""

from typing import Any

import torch
from transformers.training_args import OptimizerNames

from ..training.backends import Storage


# Cost option -> the value that costs what the exact rule does.
COST_OPTIONS: dict[str, Any] = {
    "shadow_dtype": None, "shadow_offload": False, "shadow_rollout_fraction": 1.0, "shadow_update_steps": 1, "shadow_overlap": False,
}  # fmt: skip
# Those that lean mode has too.
LEAN_COST_OPTIONS = frozenset({"shadow_rollout_fraction", "shadow_update_steps", "shadow_overlap"})
# Those of bitsandbytes have their kernels on the GPU.
_CPU_OPTIMIZERS = frozenset(
    {
        OptimizerNames.ADAMW_TORCH,
        OptimizerNames.ADAMW_TORCH_FUSED,
        OptimizerNames.SGD,
        OptimizerNames.ADAGRAD,
        OptimizerNames.RMSPROP,
    }
)


def check_cost_options(args: Any) -> None:
    """
    Refuse cost options of the shadow that cannot be had.

    Args:
        args ([`BridgeConfig`]):
            Arguments, presets filled in.

    Raises:
        ValueError: a value is out of its range, or there is no shadow to make cheaper.
        NotImplementedError: options that cannot be had together; the one to change is named.
    """
    fraction = args.shadow_rollout_fraction
    if not 0.0 < fraction <= 1.0:
        raise ValueError(f"`shadow_rollout_fraction` must lie in (0, 1], got {fraction}.")
    groups = int(args.generation_batch_size) // int(args.num_generations)
    if fraction < 1.0 and round(fraction * groups, 6) < 1:
        raise ValueError(
            f"`shadow_rollout_fraction={fraction}` of the {groups} group(s) of a generation batch is less than one. "
            "Raise it, or `generation_batch_size`."
        )
    if fraction < 1.0 and args.top_entropy_quantile < 1.0:
        raise NotImplementedError(
            "`shadow_rollout_fraction` below 1 is not supported with `top_entropy_quantile`: which tokens are of high "
            "entropy is known of all rollouts alone. Set `top_entropy_quantile=1.0`, or `shadow_rollout_fraction=1.0`."
        )
    if args.shadow_update_steps < 1:
        raise ValueError(f"`shadow_update_steps` must be at least 1, got {args.shadow_update_steps}.")
    reset = args.shadow_reset_steps
    if reset is not None and args.shadow_update_steps > 1 and args.shadow_update_steps % reset == 0:
        raise ValueError(
            f"`shadow_reset_steps={reset}` undoes every update that `shadow_update_steps={args.shadow_update_steps}` leaves "
            "to the shadow, right after it is made. Reset more rarely, or set one of them to its default."
        )
    if args.shadow_overlap:
        _check_overlap(args)
    if args.shadow_dtype not in (None, "bfloat16"):
        raise ValueError(
            f"`shadow_dtype` must be None (as the student) or 'bfloat16', got {args.shadow_dtype!r}. float16 would need a "
            "gradient scaler."
        )
    if args.shadow_dtype is not None and args.cast_lm_head_to_fp32:
        raise NotImplementedError(
            "`shadow_dtype` is not supported with `cast_lm_head_to_fp32`: the shadow's head has the shadow's precision. "
            "Set `cast_lm_head_to_fp32=False`, or `shadow_dtype=None`."
        )
    optim = args.shadow_optim or args.optim
    if args.shadow_offload and OptimizerNames(optim) not in _CPU_OPTIMIZERS:
        names = ", ".join(sorted(o.value for o in _CPU_OPTIMIZERS))
        raise NotImplementedError(
            f"`shadow_offload` is not supported with `shadow_optim={str(OptimizerNames(optim).value)!r}`, which cannot step "
            f"on the CPU. Set `shadow_optim` to one of {names}, or `shadow_offload=False`."
        )
    changed = [name for name, default in COST_OPTIONS.items() if getattr(args, name) != default]
    if changed and not args.cooperative_gain:
        raise ValueError(
            f"`{changed[0]}` has no effect without the cooperative gain, where there is no shadow. Set it to "
            f"{COST_OPTIONS[changed[0]]}, or `cooperative_gain=True`."
        )


def _check_overlap(args: Any) -> None:
    if not args.use_vllm or args.vllm_mode != "server":
        raise ValueError(
            "`shadow_overlap` uses the time in which a vLLM server generates. Set `use_vllm=True` and "
            '`vllm_mode="server"`, or `shadow_overlap=False`.'
        )
    if args.shadow_update_steps > 1:
        raise NotImplementedError(
            "`shadow_overlap` is not supported with `shadow_update_steps` above 1. Set one of them to its default."
        )
    if args.num_iterations > 1 or args.steps_per_generation != args.gradient_accumulation_steps:
        raise NotImplementedError(
            "`shadow_overlap` needs one generation for each update, in which the shadow has its turn. Set "
            f"`num_iterations=1` and `steps_per_generation={args.gradient_accumulation_steps}` (as "
            "`gradient_accumulation_steps`), or `shadow_overlap=False`."
        )


def shadow_storage(args: Any) -> Storage:
    """How `shadow_dtype` and `shadow_offload` want the shadow held."""
    return Storage(torch.bfloat16 if args.shadow_dtype == "bfloat16" else None, args.shadow_offload)

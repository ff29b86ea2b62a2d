"""Which options of TRL the trainers refuse, and why. `docs/support.md` has all fields."""

from collections.abc import Callable
from typing import Any

from transformers import SchedulerType
from transformers.training_args import OptimizerNames


# Optimizers that step from a gradient and their own state: theta's step then equals the one that theta + w takes, so
# the merged update is exact. Others read the weights' values, step inside the backward, or project the gradient.
SIDE_OPTIMIZERS = frozenset(
    {
        OptimizerNames.ADAMW_TORCH,
        OptimizerNames.ADAMW_TORCH_FUSED,
        OptimizerNames.SGD,
        OptimizerNames.ADAGRAD,
        OptimizerNames.RMSPROP,
        OptimizerNames.ADAMW_BNB,
        OptimizerNames.ADAMW_8BIT,
        OptimizerNames.PAGED_ADAMW,
        OptimizerNames.PAGED_ADAMW_8BIT,
    }
)


def _is_set(value: Any) -> bool:
    return value not in (None, False, "", [], {}, 0)


# Field -> (when it is refused, why and what to do instead).
REFUSED: dict[str, tuple[Callable[[Any], bool], str]] = {
    "fp16": (
        _is_set,
        "a gradient scaler would skip updates after the parts beside the student have moved. Use `bf16=True`",
    ),
    "neftune_noise_alpha": (
        _is_set,
        "its noise would enter the RL log-probabilities and their ratios. Set it to None",
    ),
    "use_liger_kernel": (
        _is_set,
        "its kernels cannot be carried to the model copies in a tested way. Set it to False, or use "
        "`model_init_kwargs={'use_kernels': True}`",
    ),
    "torch_compile": (
        _is_set,
        "a compiled forward does not know the demonstration head. Set it to False",
    ),
    "lr_scheduler_type": (
        lambda value: value in (SchedulerType.REDUCE_ON_PLATEAU, SchedulerType.GREEDY),
        "it keeps no initial rate, and the coordinator's and the shadow's rates follow the rate relative to it. Use "
        "another schedule",
    ),
    "max_grad_norm": (lambda value: value is None, "transformers compares it with 0. Set it to 0 for no clipping"),
    "sync_ref_model": (
        _is_set,
        "the KL reference is a frozen copy of the initial policy. Set it to False",
    ),
    "parallelism_config": (_is_set, "only data parallelism is built. Remove it, and launch with DDP (torchrun)"),
    "ddp_static_graph": (
        _is_set,
        "a micro-batch runs several passes, so its graph is not the one that DDP recorded. Set it to False",
    ),
    "bf16_full_eval": (
        _is_set,
        "evaluation outside of training would cast the student's own weights to bfloat16. Use `bf16=True`",
    ),
    "fp16_full_eval": (
        _is_set,
        "evaluation outside of training would cast the student's own weights to float16. Use `bf16=True`",
    ),
    "use_transformers_paged": (
        _is_set,
        "TRL casts the student's own weights for it where `bf16=True`. Set it to False, or use `use_vllm=True`",
    ),
    "use_transformers_continuous_batching": (
        _is_set,
        "TRL casts the student's own weights for it where `bf16=True`. Set it to False, or use `use_vllm=True`",
    ),
    "router_aux_loss_coef": (
        _is_set,
        "the shadow and the gain have no load-balancing term. Set it to 0",
    ),
    "enable_jit_checkpoint": (
        _is_set,
        "it saves between the coordinator's step and the student's, and a resumed run would take one of them twice. "
        "Save often (`save_steps`) in place of it",
    ),
}


def check_config(args: Any) -> None:
    """Refuse options that no trainer with a demonstration stream supports."""
    for name, (refuses, reason) in REFUSED.items():
        if refuses(getattr(args, name)):
            raise NotImplementedError(f"`{name}` is not supported by {type(args).__name__}: {reason}.")
    check_best_model(args)


def check_best_model(args: Any) -> None:
    """Refuse to go back to a best checkpoint that has no state beside the weights."""
    if args.load_best_model_at_end and args.save_only_model:
        raise ValueError(
            "`load_best_model_at_end` with `save_only_model` would restore the policy alone and leave the state beside "
            "it as it was. Set `save_only_model=False`."
        )


def check_side_optimizer(name: str, value: Any) -> None:
    """Refuse optimizers that the parts beside the student cannot use."""
    if value not in list(OptimizerNames):
        raise ValueError(f"`{name}`={value!r} is not an optimizer that transformers knows.")
    if OptimizerNames(value) not in SIDE_OPTIMIZERS:
        supported = ", ".join(sorted(o.value for o in SIDE_OPTIMIZERS))
        raise NotImplementedError(
            f"`{name}`={str(getattr(value, 'value', value))!r} is not supported: the merged update needs an optimizer whose step depends "
            f"on gradients alone. Use one of {supported}."
        )

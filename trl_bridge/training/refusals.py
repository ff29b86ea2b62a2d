"""Which options of TRL the trainers refuse, and why. `docs/support.md` has all fields."""

from collections.abc import Callable, Mapping
from typing import Any

from accelerate import Accelerator
from transformers import PreTrainedTokenizerBase, ProcessorMixin, SchedulerType
from transformers.training_args import OptimizerNames

from .backends.refusals import is_sharded


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


# Why an option is refused where it is set, and what to do instead; or when else it is refused, and why.
Rules = Mapping[str, str | tuple[Callable[[Any], bool], str]]


def is_set(value: Any) -> bool:
    """Whether an option asks for something."""
    return value not in (None, False, "", [], {}, 0)


def other_than(*allowed: Any) -> Callable[[Any], bool]:
    """Whether an option has a value that is not allowed."""
    return lambda value: value not in allowed


def refuse(args: Any, rules: Rules, where: str = "") -> None:
    """Refuse options by their rules."""
    for name, rule in rules.items():
        refuses, reason = (is_set, rule) if isinstance(rule, str) else rule
        value = getattr(args, name)
        if refuses(value):
            shown = f"{name}={getattr(value, 'value', value)!r}" if isinstance(value, str) else name
            raise NotImplementedError(f"`{shown}` is not supported by {type(args).__name__}{where}: {reason}.")


REFUSED: Rules = {
    "fp16": "a gradient scaler would skip updates after the parts beside the student have moved. Use `bf16=True`",
    "use_liger_kernel": (
        "its kernels cannot be carried to the model copies in a tested way. Set it to False, or use "
        "`model_init_kwargs={'use_kernels': True}`"
    ),
    "torch_compile": (
        "packed passes are compiled again for each layout, and the demonstration head was not tested compiled. Set it to "
        "False"
    ),
    "lr_scheduler_type": (
        lambda value: value in (SchedulerType.REDUCE_ON_PLATEAU, SchedulerType.GREEDY),
        "it keeps no initial rate, and the coordinator's and the shadow's rates follow the rate relative to it. Use "
        "another schedule",
    ),
    "max_grad_norm": (lambda value: value is None, "transformers compares it with 0. Set it to 0 for no clipping"),
    "sync_ref_model": "the KL reference is a frozen copy of the initial policy. Set it to False",
    "parallelism_config": "only data parallelism is built. Remove it, and launch with DDP (torchrun)",
    "ddp_static_graph": (
        "a micro-batch runs several passes, so its graph is not the one that DDP recorded. Set it to False"
    ),
    "bf16_full_eval": (
        "evaluation outside of training would cast the student's own weights to bfloat16. Use `bf16=True`"
    ),
    "fp16_full_eval": (
        "evaluation outside of training would cast the student's own weights to float16. Use `bf16=True`"
    ),
    "use_transformers_paged": (
        "TRL casts the student's own weights for it where `bf16=True`. Set it to False, or use `use_vllm=True`"
    ),
    "use_transformers_continuous_batching": (
        "TRL casts the student's own weights for it where `bf16=True`. Set it to False, or use `use_vllm=True`"
    ),
    "enable_jit_checkpoint": (
        "it saves between the coordinator's step and the student's, and a resumed run would take one of them twice. "
        "Save often (`save_steps`) in place of it"
    ),
}


# Where there is no SFT pass of its own to have the noise.
NOISE: Rules = {
    "neftune_noise_alpha": (
        "its noise would enter the RL log-probabilities and their ratios, of which the experts' rows are a part here. Set it to None"
    ),
}

# Where a group may leave the RL loss.
SCALED_BY_GROUP: Rules = {
    "scale_rewards": (
        other_than("group", "none"),
        "groups that leave the RL loss would still change the advantages of the others. Set it to 'none' or 'group'",
    ),
    "multi_objective_aggregation": (
        other_than("sum_then_normalize"),
        "groups that leave the RL loss would still change the advantages of the others. Set it to 'sum_then_normalize'",
    ),
}


def _has_picture(value: Any) -> bool:
    """Whether a row holds a part of a message that is no text."""
    if isinstance(value, dict):
        return value.get("type") in ("image", "audio", "video") or any(map(_has_picture, value.values()))
    return isinstance(value, list) and any(map(_has_picture, value))


def check_seeing(owner: str, processing_class: Any, model: Any = None, **datasets: Any) -> None:
    """Refuse pictures that the model does not see, and rows whose pictures cannot be read."""
    from ..demonstrations.pictures import check_pictures

    config = getattr(model, "config", None)
    if hasattr(config, "audio_config"):
        raise NotImplementedError(f"{owner} does not support models that hear, and `model` has an `audio_config`.")
    sees = hasattr(config, "vision_config")
    if sees and isinstance(processing_class, PreTrainedTokenizerBase):
        raise ValueError(
            f"`model` has a `vision_config`, and `processing_class` is a tokenizer: {owner} needs the model's processor "
            "(`AutoProcessor.from_pretrained`), or a text-only `model`."
        )
    if isinstance(processing_class, ProcessorMixin):
        if config is not None and not sees:
            raise ValueError(
                "`processing_class` is a processor, and `model` has no `vision_config`. Pass a vision-language model, or a tokenizer."
            )
        for name, dataset in datasets.items():
            check_pictures(dataset, name)
    elif processing_class is not None:
        _refuse_rows_with_pictures(owner, datasets)


def check_ranks_seeing(accelerator: Accelerator, owner: str, **datasets: Any) -> None:
    """Refuse what several processes cannot train a model that sees with."""
    from ..demonstrations.pictures import check_each_has_one

    kind = accelerator.distributed_type
    if is_sharded(kind):
        raise NotImplementedError(
            f"{owner} has not been tested with a vision-language model and {kind.value}. Launch it on one device, or with DDP (torchrun)."
        )
    if accelerator.num_processes > 1:
        for name, dataset in datasets.items():
            check_each_has_one(dataset, name)


# With a model that sees.
_BLIND: Rules = {
    "teachers": "a teacher would be asked without the pictures. Set it to None",
    "dynamic_sampling": "pixels of one prompt cannot be put in another's place. Set it to False",
    "sft_pairing": (other_than("independent"), "the same words may be asked of several pictures. Use 'independent'"),
}


def refuse_blind_options(args: Any) -> None:
    """Refuse options that would forget the pictures."""
    refuse(args, {name: rule for name, rule in _BLIND.items() if hasattr(args, name)}, " with a vision-language model")


def refuse_pictures(owner: str, processing_class: Any, model: Any = None, **datasets: Any) -> None:
    """Refuse models and rows with pictures or sound, which would be trained on without them."""
    parts = [name for name in ("vision_config", "audio_config") if hasattr(getattr(model, "config", None), name)]
    if parts or isinstance(processing_class, ProcessorMixin):
        found = f"`model` has a `{parts[0]}`" if parts else "`processing_class` is a processor"
        raise NotImplementedError(
            f"{owner} does not support vision-language models, and {found}. Pass a text-only `model` and a tokenizer."
        )
    _refuse_rows_with_pictures(owner, datasets)


def _refuse_rows_with_pictures(owner: str, datasets: Mapping[str, Any]) -> None:
    # Late: --help, which reads the rules, need not wait for pandas and Arrow.
    from datasets import Dataset

    for name, dataset in datasets.items():
        for split in dataset.values() if isinstance(dataset, Mapping) else [dataset]:
            columns = {"image", "images"} & set(getattr(split, "column_names", None) or ())
            if columns:
                column = columns.pop()
                first = next((row for row, value in enumerate(split[column]) if value), None)
                where = "" if first is None else f" (the first picture is in row {first})"
                raise NotImplementedError(
                    f"`{name}` has a column `{column}`{where}, but {owner} trains on text only. Remove it (`remove_columns`), or "
                    "take rows without pictures."
                )
            if isinstance(split, Dataset) and len(split) and _has_picture(split[0]):
                raise NotImplementedError(
                    f"`{name}` row 0 has messages with pictures or sound, but {owner} trains on text only. Take rows without."
                )


def check_config(args: Any, noisy_demonstrations: bool = False) -> None:
    """Refuse options that no trainer on GRPO supports. `noisy_demonstrations`: SFT passes of their own may have noise."""
    refuse(args, REFUSED if noisy_demonstrations else {**REFUSED, **NOISE})
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

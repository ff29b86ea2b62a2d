"""Which options of TRL the distillation trainers refuse, and why."""

from typing import Any

from accelerate import Accelerator
from accelerate.utils import is_peft_model

from ..training.backends import backend_for
from ..training.backends.refusals import refuse_quantised
from ..training.refusals import Rules, check_best_model, other_than, refuse


REFUSED: Rules = {
    "beta": (
        other_than(1.0),
        "the loss is that of sampled tokens, which has no interpolation. Leave it at 1, or use TRL's "
        "`DistillationTrainer`",
    ),
    "use_liger_kernel": "it has not been tested here. Set it to False",
    "torch_compile": "it has not been tested here. Set it to False",
    "neftune_noise_alpha": (
        "its noise would enter the student's log-probabilities and not the teacher's. Set it to None"
    ),
    "fp16": "a gradient scaler has not been tested here. Use `bf16=True`",
    "parallelism_config": "only data parallelism is built. Remove it, and launch with DDP (torchrun)",
    "auto_find_batch_size": "it would change the rollouts of an update half-way. Set it to False",
    "enable_jit_checkpoint": (
        "it may save inside an update, which cannot be resumed exactly. Save often (`save_steps`) in place of it"
    ),
}

# Sampling that draws tokens from another distribution than the student's, and the values that leave it alone.
_SAMPLING: dict[str, tuple[Any, ...]] = {
    "top_p": (1.0, None),
    "top_k": (0, None),
    "min_p": (0.0, None),
    "repetition_penalty": (1.0, None),
    "typical_p": (1.0, None),
    "epsilon_cutoff": (0.0, None),
    "eta_cutoff": (0.0, None),
    "do_sample": (True,),
    "num_beams": (1, None),
    "no_repeat_ngram_size": (0, None),
    "presence_penalty": (0.0, None),
    "frequency_penalty": (0.0, None),
}


def check_backend(accelerator: Accelerator, model: Any) -> None:
    """Refuse backends that no distillation trainer supports, which would otherwise fail at the first checkpoint."""
    backend_for(accelerator)
    refuse_quantised(accelerator.distributed_type, model.get_base_model() if is_peft_model(model) else model)


def check_config(args: Any) -> None:
    """Refuse options that no distillation trainer supports."""
    refuse(args, REFUSED)
    check_best_model(args)
    kwargs = args.generation_kwargs or {}
    for name, neutral in _SAMPLING.items():
        for source, value in (
            (name, getattr(args, name, neutral[0])),
            ("generation_kwargs", kwargs.get(name, neutral[0])),
        ):
            if value not in neutral:
                raise ValueError(
                    f"`{source}`: {name}={value!r} draws tokens from another distribution than the student's own, and the "
                    f"sampled-token loss would be biased. Set it to {neutral[0]}."
                )
    if kwargs.get("temperature", args.temperature) != args.temperature:
        raise ValueError("`generation_kwargs`: set the temperature by `temperature`, which the loss uses too.")

"""Arguments of [`BridgeTrainer`]."""

from dataclasses import field
from typing import Any

import torch
from transformers.training_args import OptimizerNames

from ...objectives.schedules import linear_ramp
from ...training.backends import Storage
from ...training.options import above, at_least, must, one_of, options, within
from ...training.refusals import check_side_optimizer
from ...training.stream_config import DemonstrationConfig


@options
class BridgeConfig(DemonstrationConfig):
    """
    Configuration of [`BridgeTrainer`]: everything of [`~trl.GRPOConfig`], the demonstration stream of
    [`DemonstrationConfig`], and the cooperative update of BRIDGE (arXiv 2509.06948). Where the paper leaves a value open,
    the default is a choice of ours; `docs/bridge.md` lists them.
    """

    bridge_lambda: float = field(default=0.5, metadata=within(0, 1))
    """Weight of RL in the fused objective; SFT has `1 - bridge_lambda`."""
    bridge_lambda_start: float | None = field(default=None, metadata=within(0, 1))
    """Value that the weight is ramped from, linearly. `None` keeps it constant."""
    bridge_lambda_warmup_steps: int = field(default=0, metadata=at_least(0))
    """Updates until the ramp reaches `bridge_lambda`."""
    preset: str = field(default="paper", metadata=one_of("paper", "selective", "trial"))
    """Fills `cooperative_gain` and `sft_weighting` where they are `None`. 'paper': `cooperative_gain=True`,
    `sft_weighting='none'`. 'selective' (ours, not the paper's): `cooperative_gain=False`,
    `sft_weighting='judge_verdict'`, or 'judge' where the demonstrations lack the columns that the reward functions
    need. 'trial': as 'selective', after a trial of 240 updates (`trial_steps`), with the coordinator at the student's rate."""
    cooperative_gain: bool | None = None
    """Whether the coordinator's gradient carries the cooperative-gain term. Without it no shadow is built: the
    coordinator then follows the fused gradient."""
    coordinator_learning_rate: float | None = field(default=None, metadata=at_least(0))
    """Learning rate of the coordinator `w`. `None` takes `10 * learning_rate`: at equal rates a LoRA is nearly inert
    beside fully trained weights under AdamW. With `lean=True`, where theta is a LoRA too, and after a trial, which ten
    times would undo, `None` takes `learning_rate`. The paper never prints its rate."""

    # The RL-only shadow

    shadow_learning_rate: float | None = field(default=None, metadata=at_least(0))
    """Learning rate of the shadow. `None` takes `learning_rate`."""
    shadow_optim: str | None = None
    """Optimizer of the shadow. `None` takes `optim`."""
    shadow_importance_sampling: bool = True
    """Whether the shadow's loss carries the ratio of its probabilities to those that the rollouts were sampled with
    (clipped as GRPO clips). The paper does not say."""
    shadow_reset_steps: int | None = field(default=None, metadata=at_least(1))
    """Every so many updates the shadow is set back to the base weights and its optimizer state is cleared. `None` never
    resets, as in the paper."""

    # Less exact or slower, and cheaper: `docs/bridge.md` has the error of each

    shadow_offload: bool = False
    """Whether the shadow's weights, gradients and optimizer state are on the CPU between its passes, where it also
    steps. Exact."""
    shadow_dtype: str | None = field(
        default=None,
        metadata=must(
            "be None (as the student) or 'bfloat16' (float16 would need a gradient scaler)",
            lambda value: value == "bfloat16",
        ),
    )
    """What the shadow's passes compute with: 'bfloat16', or `None`, as the student's. Its float32 weights stand beside
    the ones in bfloat16 and take every step."""
    shadow_rollout_fraction: float = field(default=1.0, metadata=must("lie in (0, 1]", lambda value: 0 < value <= 1))
    """Part of the rollouts that the shadow is trained on, in whole groups (rounded, at least one of each generation
    batch). Its gradient is scaled to that of all rollouts. 1 is exact."""
    shadow_update_steps: int = field(default=1, metadata=at_least(1))
    """The shadow runs and steps in every so many-th update. Between them the coordinator's gradient takes the projection
    of the shadow's last gradient; before the first one the gain gradient is zero. 1 is exact."""
    shadow_overlap: bool = False
    """Whether the shadow runs on an update's rollouts while the vLLM server generates the next ones, in which time the
    trainer's GPUs have nothing else to do. Its part of the coordinator's gradient is then one batch of rollouts old.
    Needs `use_vllm=True` with `vllm_mode='server'`."""

    # Lean mode (ours, not the paper's: `docs/bridge.md`)

    lean: bool = False
    """Freeze the base, which may be in 16 bits or quantised, and hold theta, w and theta_hat as slices of LoRA adapters
    on it (not the paper's form). Costs little more than LoRA GRPO; `save_model` then saves an adapter."""
    lean_lora_r: int = field(default=64, metadata=at_least(1))
    """Rank of theta and of theta_hat with `lean=True`."""
    lean_lora_alpha: float | None = field(default=None, metadata=above(0))
    """Their alpha with `lean=True`. `None` takes `lean_lora_r`, so that the scaling is 1."""

    log_gradient_stats: bool = False
    """Whether to log the norms of the SFT and RL gradients over the base weights and the cosine between them. Costs one
    more copy of the gradient."""

    def __post_init__(self) -> None:
        if self.preset == "trial" and self.trial_steps is None:
            self.trial_steps = 240
        super().__post_init__()
        if (self.bridge_lambda_start is None) != (self.bridge_lambda_warmup_steps == 0):
            raise ValueError(
                "A ramp needs both `bridge_lambda_start` and `bridge_lambda_warmup_steps` above 0, got "
                f"{self.bridge_lambda_start} and {self.bridge_lambda_warmup_steps}."
            )
        if not self.learning_rate > 0:
            raise ValueError(
                f"`learning_rate` must be above 0, got {self.learning_rate}: the coordinator's and the shadow's rates "
                "follow its schedule."
            )
        self._check_lean()
        if self.cooperative_gain is None:
            self.cooperative_gain = self.preset == "paper"
        if self.sft_weighting is None and self.preset == "paper":
            self.sft_weighting = "none"
        elif self.sft_weighting is None and self.neftune_noise_alpha is not None:
            raise NotImplementedError(
                f"`neftune_noise_alpha` is not supported with `preset={self.preset!r}`, whose likelihoods would be those of noisy passes. "
                "Set it to None, or `sft_weighting='verdict'`."
            )
        check_side_optimizer("optim", self.optim)
        if self.shadow_optim is not None:
            check_side_optimizer("shadow_optim", self.shadow_optim)
        check_cost_options(self)
        if self.off_policy_mask_threshold is not None and self.cooperative_gain:
            raise NotImplementedError(
                "`off_policy_mask_threshold` is not supported with the cooperative gain: the mask would drop other "
                "rollouts for the shadow than for the student. Set it to None, or `cooperative_gain=False`."
            )

    def _check_lean(self) -> None:
        changed = [name for name, default in COST_OPTIONS.items() if getattr(self, name) != default]
        refused = [name for name in changed if name not in LEAN_COST_OPTIONS]
        if self.lean and refused:
            raise NotImplementedError(
                f"`{refused[0]}` is not supported with `lean=True`, where the shadow is no more than an adapter. Set it to "
                f"{COST_OPTIONS[refused[0]]}."
            )
        if self.lean and self.cast_lm_head_to_fp32:
            raise NotImplementedError(
                "`cast_lm_head_to_fp32` is not supported with `lean=True`: TRL does not find a tied embedding below an "
                "adapter. Set it to False."
            )
        if not self.lean and (self.lean_lora_r != 64 or self.lean_lora_alpha is not None):
            raise ValueError(
                "`lean_lora_r` and `lean_lora_alpha` are read with `lean=True` alone: without it theta is the base itself, "
                "and the coordinator's rank is that of `peft_config`. Set `lean=True`, or remove them."
            )

    def lambda_at(self, step: int) -> float:
        """Weight of RL at an update."""
        if self.bridge_lambda_start is None:
            return self.bridge_lambda
        return linear_ramp(step, self.bridge_lambda_start, self.bridge_lambda, self.bridge_lambda_warmup_steps)

    @property
    def coordinator_rate(self) -> float:
        """Base learning rate of the coordinator; an explicit 0 is a rate."""
        if self.coordinator_learning_rate is not None:
            return self.coordinator_learning_rate
        return self.learning_rate if self.lean or self.preset == "trial" else 10 * self.learning_rate

    @property
    def lean_alpha(self) -> float:
        """Alpha of theta's slices in lean mode."""
        return self.lean_lora_r if self.lean_lora_alpha is None else self.lean_lora_alpha

    @property
    def shadow_rate(self) -> float:
        """Base learning rate of the shadow; an explicit 0 is a rate."""
        return self.learning_rate if self.shadow_learning_rate is None else self.shadow_learning_rate


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
    """Refuse cost options of the shadow that cannot be had."""
    fraction = args.shadow_rollout_fraction
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
    reset = args.shadow_reset_steps
    if reset is not None and args.shadow_update_steps > 1 and args.shadow_update_steps % reset == 0:
        raise ValueError(
            f"`shadow_reset_steps={reset}` undoes every update that `shadow_update_steps={args.shadow_update_steps}` leaves "
            "to the shadow, right after it is made. Reset more rarely, or set one of them to its default."
        )
    if args.shadow_overlap:
        _check_overlap(args)
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

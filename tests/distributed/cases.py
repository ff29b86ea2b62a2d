"""What is run on two ranks, by backend. Imported by the tests and by the script that torchrun starts."""

import copy
import os
import time
from pathlib import Path

import torch

from tests.helpers import engines
from tests.helpers.families import tiny
from tests.helpers.training import small_model
from trl_bridge.models import tiny_tokenizer


SGD = {"optim": "sgd", "learning_rate": 0.1}
# A stand-in for the server; every rank but the main one waits for its answer.
OVERLAP = {**SGD, **engines.OPTIONS, "vllm_importance_sampling_correction": False, "shadow_overlap": True}
# What accelerate and DeepSpeed need to train on a CPU, or as TRL's own accelerate configs have it.
SHARDED = {"use_cpu": False}
FSDP = {**SHARDED, "fsdp": True, "fsdp_config": {"version": 2, "cpu_ram_efficient_loading": False}}


def zero(stage, **changes):
    config = {
        "train_batch_size": "auto",
        "train_micro_batch_size_per_gpu": "auto",
        "gradient_accumulation_steps": "auto",
        "gradient_clipping": "auto",
        "bf16": {"enabled": "auto"},
        # A torch optimizer on the CPU is not on DeepSpeed's list.
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "zero_optimization": {
            "stage": stage,
            **({"stage3_gather_16bit_weights_on_model_save": True} if stage == 3 else {}),
        },
    }
    config["zero_optimization"].update(changes)
    return {**SHARDED, "deepspeed": config}


DDP_CASES = {
    "adamw": {},
    "sgd, grpo, metrics": {**SGD, "loss_type": "grpo", "bridge_lambda": 0.3, "log_gradient_stats": True},
    "pairing": {"sft_pairing": "prompt", "gradient_checkpointing": True},
    "likelihood": {"sft_weighting": "likelihood"},
    "judge and verdict": {"sft_weighting": "judge_verdict", "judge_window": 2},
    # One group on each rank, so that one of them has no row for the shadow.
    "half of the rollouts": {
        **SGD, "shadow_rollout_fraction": 0.5, "per_device_train_batch_size": 4, "gradient_accumulation_steps": 1, "entropy_coef": 0.05,
    },
    "shadow in every second update, offloaded": {**SGD, "shadow_update_steps": 2, "shadow_offload": True},
    "shadow in bf16": {**SGD, "shadow_dtype": "bfloat16"},
    "shadow beside the server": OVERLAP,
    # SGD: Adam turns the rounding of gradients that are zero (the KL at the start) into full steps.
    "generation within a window": {"gradient_accumulation_steps": 4, "steps_per_generation": 2, "beta": 0.1, **SGD},
}  # fmt: skip

# RL outweighs SFT in w's gradient, so that an error in the gain is large beside the rounding of bfloat16.
LOUD = {**SGD, "scale_rewards": "none", "reward_weights": [10.0]}
LEAN = {"lean": True, "lean_lora_r": 6, "lean_lora_alpha": 9.0, "lora": {"lora_alpha": 10}, "learning_rate": 1e-2}
FSDP_CASES = {
    "adamw, decay, weights on one rank": {
        **FSDP, "weight_decay": 0.1, "max_grad_norm": 0.3, "model": {"absent": True},
        "fsdp_config": {"version": 2, "cpu_ram_efficient_loading": True},
    },
    "sgd, metrics, uneven rows": {
        **FSDP, **SGD, "loss_type": "grpo", "bridge_lambda": 0.3, "log_gradient_stats": True, "temperature": 0.7,
        "model": {"odd_rows": True},
    },
    "reference, cosine": {**FSDP, **SGD, "beta": 0.1, "lr_scheduler_type": "cosine", "gradient_checkpointing": True},
    "experts, metrics": {
        **FSDP, **SGD, "loss_type": "grpo", "log_gradient_stats": True, "padding_free": False, "router_aux_loss_coef": 0.0, "model": {"experts": True},
        "lora": {"target_parameters": ["experts.gate_up_proj", "experts.down_proj"]},
    },
    "gain off, tied": {**FSDP, "cooperative_gain": False, "model": {"tie_word_embeddings": True}},
    "reset, tied": {**FSDP, "shadow_reset_steps": 2, "model": {"tie_word_embeddings": True}},
    "selective": {**FSDP, "preset": "selective", "gradient_accumulation_steps": 1},
    "bf16": {**FSDP, **SGD, "bf16": True},
    "reentrant": {**FSDP, "gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": True}},
    "half of the rollouts, every second update": {
        **FSDP, **SGD, "shadow_rollout_fraction": 0.5, "shadow_update_steps": 2, "per_device_train_batch_size": 4,
        "gradient_accumulation_steps": 1,
    },
    "shadow beside the server": {**FSDP, **OVERLAP, "shadow_reset_steps": 2},
    "offload, reset": {**FSDP, "shadow_offload": True, "shadow_reset_steps": 2, "model": {"odd_rows": True}},
    "shadow in bf16, offload": {**FSDP, **SGD, "shadow_dtype": "bfloat16", "shadow_offload": True},
    "by name, loaded by the main process": {
        **FSDP, **SGD, "beta": 0.1, "model": {"by_name": True}, "fsdp_config": {"version": 2, "cpu_ram_efficient_loading": True},
    },
}  # fmt: skip

REENTRANT = {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": True}}

ZERO_CASES = {
    "zero-1": {**zero(1), "weight_decay": 0.1, "max_grad_norm": 0.3},
    "zero-1, reference, reset": {**zero(1), **SGD, "beta": 0.1, "shadow_reset_steps": 2, "model": {"odd_rows": True}},
    "zero-2, grpo, checkpointing": {
        **zero(2), **SGD, "loss_type": "grpo", "bridge_lambda": 0.3, "temperature": 0.7, "gradient_checkpointing": True,
    },
    "zero-2, selective": {**zero(2), "preset": "selective", "gradient_accumulation_steps": 1},
    "zero-3, reentrant": {**zero(3, stage3_param_persistence_threshold=0), **REENTRANT, "model": {"odd_rows": True}},
    "zero-3, reference, tied": {
        **zero(3), **SGD, "beta": 0.1, "lr_scheduler_type": "cosine", "model": {"tie_word_embeddings": True},
    },
    "zero-3, gain off": {**zero(3), "cooperative_gain": False, "weight_decay": 0.1, "max_grad_norm": 0.3},
    "zero-3, by name": {
        **zero(3, stage3_param_persistence_threshold=0), **SGD, "beta": 0.1, "model": {"by_name": True}, "gradient_checkpointing": True,
    },
    "zero-3, offload": {**zero(3, stage3_param_persistence_threshold=0), "shadow_offload": True},
    "zero-1, shadow in bf16": {**zero(1), **SGD, "shadow_dtype": "bfloat16"},
    "zero-2, half of the rollouts, every second update": {
        **zero(2), **SGD, "shadow_rollout_fraction": 0.5, "shadow_update_steps": 2,
    },
    "zero-2, shadow beside the server": {**zero(2), **OVERLAP},
    "zero-3, shadow beside the server": {**zero(3, stage3_param_persistence_threshold=0), **OVERLAP},
    "zero-1, bf16": {**zero(1), **SGD, "bf16": True},
    "zero-2, bf16": {**zero(2), **SGD, "bf16": True},
    "zero-3, bf16": {**zero(3), **SGD, "bf16": True},
}  # fmt: skip

LEAN_DDP_CASES = {
    "lean, adamw, decay": {**LEAN, "weight_decay": 0.1, "max_grad_norm": 0.3, "gradient_checkpointing": True},
    "lean, sgd, metrics": {
        **LEAN, "optim": "sgd", "learning_rate": 1.0, "log_gradient_stats": True, "bridge_lambda": 0.3, "beta": 0.1,
        # One group on each rank, so that one of them has no row for the shadow.
        "shadow_rollout_fraction": 0.5, "per_device_train_batch_size": 4, "gradient_accumulation_steps": 1,
    },
    "lean, bf16": {**LEAN, **LOUD, "bf16": True},
    "lean, selective": {**LEAN, "preset": "selective"},
}  # fmt: skip

LEAN_FSDP_CASES = {
    # A weight of w's own rows on one rank alone, A's ten rows being five on each; the base where the main process loaded it.
    "lean, adamw, decay, by name": {
        **FSDP, **LEAN, "weight_decay": 0.1, "max_grad_norm": 0.3, "gradient_checkpointing": True, "model": {"by_name": True},
        "fsdp_config": {"version": 2, "cpu_ram_efficient_loading": True},
    },
    "lean, sgd, metrics, uneven rows": {
        **FSDP, **LEAN, "optim": "sgd", "learning_rate": 1.0, "log_gradient_stats": True, "bridge_lambda": 0.3, "beta": 0.1,
        "temperature": 0.7, "shadow_rollout_fraction": 0.5, "per_device_train_batch_size": 4, "gradient_accumulation_steps": 1,
        "model": {"odd_rows": True},
    },
    "lean, reset, bf16": {**FSDP, **LEAN, **LOUD, "bf16": True, "shadow_reset_steps": 2},
    # Of A's eight rows the last six are w's: they begin on one rank and end on the other. The scalings are LEAN's.
    "lean, w across ranks, shadow beside the server": {
        **FSDP, **OVERLAP, **LEAN, "learning_rate": 1.0, "lean_lora_r": 2, "lean_lora_alpha": 3.0, "lora": {"r": 6, "lora_alpha": 15},
    },
}  # fmt: skip

_ALL_AWAY = {"stage3_param_persistence_threshold": 0}
LEAN_ZERO_CASES = {
    "lean, zero-1, decay": {**zero(1), **LEAN, "weight_decay": 0.1, "max_grad_norm": 0.3, "model": {"odd_rows": True}},
    "lean, zero-2, sgd, reset": {
        **zero(2), **LEAN, "optim": "sgd", "learning_rate": 1.0, "bridge_lambda": 0.3, "temperature": 0.7, "gradient_checkpointing": True,
        "shadow_reset_steps": 2,
    },
    "lean, zero-2, selective": {**zero(2), **LEAN, "preset": "selective"},
    "lean, zero-3, decay, reentrant": {
        **zero(3, **_ALL_AWAY), **LEAN, "weight_decay": 0.1, "max_grad_norm": 0.3, "gradient_checkpointing": True, "model": {"odd_rows": True},
    },
    # All weights are below the default threshold, so none of them is given away.
    "lean, zero-3, sgd, half of the rollouts": {
        **zero(3), **LEAN, "optim": "sgd", "learning_rate": 1.0, "shadow_rollout_fraction": 0.5, "per_device_train_batch_size": 4,
        "gradient_accumulation_steps": 1, "shadow_update_steps": 2,
    },
    "lean, zero-3, by name": {**zero(3, **_ALL_AWAY), **LEAN, **SGD, "beta": 0.1, "model": {"by_name": True}},
    "lean, zero-3, shadow beside the server": {**zero(3, **_ALL_AWAY), **OVERLAP, **LEAN, "learning_rate": 1.0},
    "lean, zero-1, bf16": {**zero(1), **LEAN, **LOUD, "bf16": True},
    "lean, zero-2, bf16": {**zero(2), **LEAN, **LOUD, "bf16": True},
    "lean, zero-3, bf16": {**zero(3, **_ALL_AWAY), **LEAN, **LOUD, "bf16": True},
}  # fmt: skip

LEAN_CASES = {"ddp": LEAN_DDP_CASES, "fsdp": LEAN_FSDP_CASES, "deepspeed": LEAN_ZERO_CASES}
CASES = {"ddp": DDP_CASES, "fsdp": FSDP_CASES, "deepspeed": ZERO_CASES}

_LATE = {"num_iterations": 2, "steps_per_generation": 4}
RESUMES = {
    "ddp": {
        "judge, every second update": {**_LATE, "sft_weighting": "judge_verdict", "shadow_update_steps": 2},
        "lean": {**LEAN, "shadow_reset_steps": 2},
    },
    "fsdp": {
        "judge, offload": {
            **FSDP,
            **_LATE,
            "sft_weighting": "judge_verdict",
            "shadow_offload": True,
            "model": {"odd_rows": True},
        },
        "lean": {**FSDP, **LEAN, "shadow_reset_steps": 2},
    },
    "deepspeed": {
        "zero-2": {**zero(2), **_LATE},
        "zero-3": {**zero(3, stage3_param_persistence_threshold=0)},
        "lean, zero-1": {**zero(1), **LEAN, "weight_decay": 0.1},
        "lean, zero-2": {**zero(2), **_LATE, **LEAN},
        "lean, zero-3": {**zero(3, **_ALL_AWAY), **_LATE, **LEAN},
    },
}


# With steps as large as these the best update is not the last.
_BEST = {
    "eval_strategy": "steps", "eval_steps": 1, "per_device_eval_batch_size": 4, "load_best_model_at_end": True,
    "metric_for_best_model": "eval_reward", "greater_is_better": False, "save_strategy": "steps", "save_steps": 1, "max_steps": 4,
}  # fmt: skip
_LEAN_BEST = {**_BEST, **LEAN, "learning_rate": 5e-2, "greater_is_better": True}
BESTS = {
    "fsdp": {"lean": {**FSDP, **_LEAN_BEST}},
    "deepspeed": {
        "zero-2": {**zero(2), **_BEST, "learning_rate": 5e-2},
        "zero-3": {**zero(3, **_ALL_AWAY), **_BEST, "learning_rate": 5e-2},
        "lean, zero-3": {**zero(3, **_ALL_AWAY), **_LEAN_BEST},
    },
}


def on_main_process(model):
    """What a rank may hold that waits for the main process's weights."""
    if os.environ["RANK"] != "0":
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.fill_(torch.nan)
    return model


def model_of(changes: dict, output_dir: Path | None = None):
    """The model of a case, alike on all ranks; or the folder that it is to be loaded from (`by_name`), or nothing (`absent`)."""
    changes = dict(changes)
    by_name, odd, absent = (changes.pop(name, False) for name in ("by_name", "odd_rows", "absent"))
    if changes.pop("experts", False):
        model = tiny("gpt_oss")
        model.set_experts_implementation("eager")  # as the reference computes: the grouped product has no float64
        return model
    model = small_model(**changes)
    if odd:
        config = copy.deepcopy(model.config)
        config.intermediate_size = 33
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(3)
            model = type(model)(config).eval()
    if absent and output_dir is not None:
        model = on_main_process(model)
    if not by_name or output_dir is None:
        return model
    folder = output_dir / "base"
    if int(os.environ["RANK"]) == 0:
        model.save_pretrained(folder)
        tiny_tokenizer().save_pretrained(folder)
        (folder / "done").touch()
    while not (folder / "done").exists():
        time.sleep(0.1)
    return str(folder)

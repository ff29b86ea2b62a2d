"""
Every field of [`~trl.GRPOConfig`]: tested with a demonstration stream (and by which test), refused, or neutral.

`docs/support.md` is printed from here (`python -m trl_bridge.training.support_table`); a field that TRL adds and that
is not listed fails a test.
"""

import dataclasses
import sys
from collections.abc import Iterator

from trl import GRPOConfig

from .refusals import REFUSED


TESTED, REFUSES, NEUTRAL = "tested", "refused", "neutral"


@dataclasses.dataclass(frozen=True)
class Support:
    """What is known of one option."""

    status: str
    note: str
    limits: str = ""


_UPDATE = "tests/methods/bridge/test_update.py::test_update_equals_reference"
_OPTIONS = "tests/methods/bridge/test_options.py::"
_RUN = "tests/methods/bridge/test_options_run.py::"
_RESUME = "tests/methods/bridge/test_resume.py::"

# Test -> fields that it sets.
_TESTED = {
    _UPDATE: (
        "per_device_train_batch_size max_steps learning_rate weight_decay max_grad_norm optim "
        "gradient_accumulation_steps gradient_checkpointing num_iterations steps_per_generation temperature beta "
        "use_bias_correction_kl entropy_coef loss_type epsilon_high importance_sampling_level scale_rewards "
        "mask_truncated_completions num_generations max_completion_length"
    ),
    "tests/methods/bridge/test_update.py::test_cosine_schedule_with_warmup": "lr_scheduler_type warmup_steps",
    "tests/methods/bridge/test_consequences.py::test_coordinator_is_what_peft_would_make": "seed",
    f"{_OPTIONS}test_shadow_follows_the_parents_loss": (
        "epsilon delta sapo_temperature_neg sapo_temperature_pos vespo_k_pos vespo_lambda_pos vespo_k_neg "
        "vespo_lambda_neg top_entropy_quantile bf16 cast_lm_head_to_fp32"
    ),
    f"{_OPTIONS}test_batching_options_replayed": "pad_to_multiple_of generation_batch_size",
    f"{_RUN}test_several_rewards_with_weights": "multi_objective_aggregation reward_weights",
    f"{_OPTIONS}test_checkpointing_variants": (
        "activation_checkpointing activation_checkpointing_kwargs gradient_checkpointing_kwargs"
    ),
    f"{_OPTIONS}test_adaptive_entropy_is_that_of_grpo": (
        "use_adaptive_entropy entropy_coef_min entropy_coef_max entropy_coef_delta entropy_target"
    ),
    f"{_OPTIONS}test_disable_dropout_reaches_every_pass": "disable_dropout",
    f"{_OPTIONS}test_off_policy_mask_without_the_gain": "off_policy_mask_threshold",
    f"{_RUN}test_vllm_ratios_reach_the_shadow": (
        "use_vllm vllm_importance_sampling_correction vllm_importance_sampling_mode vllm_importance_sampling_clip_max "
        "vllm_importance_sampling_clip_min"
    ),
    f"{_RUN}test_evaluation_takes_the_parents_path": (
        "eval_strategy eval_steps eval_on_start per_device_eval_batch_size num_generations_eval"
    ),
    f"{_RUN}test_short_last_window": "num_train_epochs",
    f"{_RUN}test_logging_does_not_change_the_update": "logging_strategy logging_steps logging_first_step",
    f"{_OPTIONS}test_optimizer_arguments_reach_all_three": "adam_beta1 adam_beta2 adam_epsilon optim_args",
    f"{_RUN}test_model_given_by_name": "model_init_kwargs",
    f"{_RUN}test_rollouts_in_the_datasets_order": "shuffle_dataset",
    "tests/demonstrations/test_render.py::test_template_and_its_arguments_are_those_of_generation": "chat_template_kwargs",
    f"{_RESUME}test_resume_is_exact": "save_strategy save_steps",
    "tests/distributed/test_backends.py::test_two_ranks_equal_the_reference": "fsdp fsdp_config deepspeed",
    f"{_RESUME}test_best_model_brings_back_its_own_coordinator_and_shadow": "load_best_model_at_end",
    f"{_RESUME}test_interrupted_save_leaves_the_previous_one": "save_total_limit",
}

# Values that are refused of options that are tested or neutral, beside those in `REFUSED`.
_LIMITS = {
    **{name: reason for name, (_, reason) in REFUSED.items()},
    "lr_scheduler_type": "`reduce_lr_on_plateau` and `greedy`",
    "max_grad_norm": "None",
    "optim": "those whose step reads the weights' values, or that step inside the backward",
    "off_policy_mask_threshold": "with `cooperative_gain=True`",
    "save_only_model": "with `load_best_model_at_end=True`",
    "fsdp": "with `cast_lm_head_to_fp32=True`",
    "fsdp_config": "FSDP1, sharded state dicts, CPU offload, its own activation checkpointing, ignored modules",
    "deepspeed": (
        "an optimizer or a scheduler of its own, offload, fp16, stage 0, tensor parallelism, and with "
        "`cast_lm_head_to_fp32=True` or `log_gradient_stats=True`"
    ),
    "load_best_model_at_end": "with `save_only_model=True`",
}

# Refused by TRL itself.
_UPSTREAM_REFUSALS = {
    "auto_find_batch_size": "TRL refuses it: a smaller batch would not hold whole groups of rollouts",
}

# Why an option never reaches code of ours -> fields.
_NEUTRAL = {
    "decides what is sampled; the rollouts are data to the update": (
        "top_p top_k min_p generation_kwargs repetition_penalty cache_implementation use_cache"
    ),
    "configures the vLLM engine, which gives rollouts": (
        "vllm_mode vllm_model_impl vllm_enable_sleep_mode vllm_structured_outputs_regex vllm_server_base_url "
        "vllm_server_host vllm_server_port vllm_server_timeout vllm_group_port vllm_gpu_memory_utilization "
        "vllm_max_model_length vllm_tensor_parallel_size"
    ),
    "deprecated name of `vllm_importance_sampling_clip_max`, which TRL sets from it": "vllm_importance_sampling_cap",
    "shapes the schedule of theta, which the coordinator and the shadow follow": "lr_scheduler_kwargs",
    "read only by optimizers that are refused": "optim_target_modules",
    "read only where `use_transformers_continuous_batching=True`, which is refused": (
        "transformers_continuous_batching_config"
    ),
    "read only where `sync_ref_model=True`, which is refused": "ref_model_mixup_alpha ref_model_sync_steps",
    "read only with tools, which are refused": "max_tool_calling_iterations",
    "read only where `use_liger_kernel=True`, which is refused": "liger_kernel_config",
    "sets `torch_compile=True`, which is refused": "torch_compile_backend torch_compile_mode",
    "gathers the student's weights for generation, one layer at a time or at once": "ds3_gather_for_generation",
    "GRPO's loss never asks for it: its labels and token counts are its own": (
        "label_smoothing_factor label_names average_tokens_across_devices include_num_input_tokens_seen"
    ),
    "GRPO's own sampler takes the place of what it chooses": "train_sampling_strategy length_column_name data_seed",
    "loads the RL rows, before they reach the update": (
        "dataloader_drop_last dataloader_num_workers dataloader_pin_memory dataloader_persistent_workers "
        "dataloader_prefetch_factor dataloader_multiprocessing_context dataloader_in_order remove_unused_columns "
        "accelerator_config"
    ),
    "sets up DDP; the parts beside the student have their own all-reduce": (
        "ddp_find_unused_parameters ddp_bucket_cap_mb ddp_broadcast_buffers ddp_backend ddp_timeout local_rank"
    ),
    "chooses the device, or the precision of its matrix products": "use_cpu tf32 full_determinism",
    "frees cached memory, or measures it": "torch_empty_cache_steps skip_memory_metrics debug",
    "read by the parent's evaluation loop": (
        "eval_delay prediction_loss_only eval_do_concat_batches eval_use_gather_object eval_accumulation_steps "
        "include_for_metrics batch_eval_metrics metric_for_best_model greater_is_better"
    ),
    "says where things are written, under which name, and how loudly": (
        "output_dir run_name project report_to trackio_space_id trackio_bucket_id trackio_static_space_id log_level "
        "log_level_replica log_on_each_node logging_nan_inf_filter disable_tqdm save_on_each_node"
    ),
    "logs rollouts, from the parent's own buffers": (
        "log_completions log_multimodal num_completions_to_print log_unique_prompts log_completions_hub_repo"
    ),
    "uploads what a checkpoint holds once it is written": (
        "push_to_hub hub_token hub_private_repo hub_model_id hub_strategy hub_always_push hub_revision"
    ),
    "acts when a run goes on from a checkpoint, on the parent's own state": (
        "ignore_data_skip restore_callback_states_from_checkpoint resume_from_checkpoint"
    ),
    "leaves out of a checkpoint all that is not the policy; a resume from it is refused": "save_only_model",
    "read by launch scripts alone": "do_train do_eval do_predict",
    "lets transformers run code that comes with a model": "trust_remote_code",
}


def _rows() -> Iterator[tuple[str, Support]]:
    for test, names in _TESTED.items():
        yield from ((name, Support(TESTED, test, _LIMITS.get(name, ""))) for name in names.split())
    tested = {name for names in _TESTED.values() for name in names.split()}
    for name, (_, reason) in REFUSED.items():
        if name not in tested:
            yield name, Support(REFUSES, reason)
    for name, reason in _UPSTREAM_REFUSALS.items():
        yield name, Support(REFUSES, reason)
    for reason, names in _NEUTRAL.items():
        yield from ((name, Support(NEUTRAL, reason, _LIMITS.get(name, ""))) for name in names.split())


def support_table() -> dict[str, Support]:
    """The table, in the order of TRL's fields."""
    table: dict[str, Support] = {}
    for name, support in _rows():
        if name in table:
            raise ValueError(f"`{name}` is listed twice, as {table[name].status} and as {support.status}.")
        table[name] = support
    fields = [field.name for field in dataclasses.fields(GRPOConfig)]
    missing, stale = sorted(set(fields) - table.keys()), sorted(table.keys() - set(fields))
    if missing or stale:
        raise ValueError(f"Fields of `GRPOConfig` not listed: {missing}. Listed, but no fields: {stale}.")
    return {name: table[name] for name in fields}


def as_markdown() -> str:
    """The page `docs/support.md`."""
    lines = [
        "# Support of TRL's options",
        "",
        "Every field of `trl.GRPOConfig` with `BridgeTrainer`. *Tested*: a test of ours sets it and compares the update. "
        "*Refused*: the config or the trainer raises an error that names it. *Neutral*: it never reaches code of ours.",
        "",
        "With `lean=True` (`docs/bridge.md`) the same hold, with `cast_lm_head_to_fp32` refused beside them. The update is compared in "
        "`tests/methods/bridge/test_lean.py` and `tests/distributed/test_backends.py` for the options that they name.",
        "",
        "This page is printed by `python -m trl_bridge.training.support_table`.",
        "",
        "| option | status | by which test, or why |",
        "| --- | --- | --- |",
    ]
    for name, support in support_table().items():
        note = f"`{support.note}`" if support.status == TESTED else support.note
        limits = f"; refused: {support.limits}" if support.limits else ""
        lines.append(f"| `{name}` | {support.status} | {note}{limits} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    sys.stdout.write(as_markdown())

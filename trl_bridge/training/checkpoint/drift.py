"""What a resumed run does otherwise than the run before."""

import dataclasses
import hashlib
import json
from typing import Any

from datasets import Dataset
from transformers import TrainingArguments


# Options of transformers' trainer that enter an update and do not come back with the optimizer's state.
_OF_UPDATES = (
    "average_tokens_across_devices",
    "bf16",
    "data_seed",
    "label_smoothing_factor",
    "lr_scheduler_kwargs",
    "lr_scheduler_type",
    "max_grad_norm",
    "max_steps",
    "num_train_epochs",
    "optim",
    "optim_args",
    "tf32",
    "warmup_steps",
)
# Options of TRL and ours that enter none: what is logged, where things run, and how an update is cut into micro-batches.
_BESIDE_UPDATES = frozenset(
    {
        "cache_implementation",
        "dataset_num_proc",
        "ds3_gather_for_generation",
        "generation_batch_size",
        "log_completions",
        "log_completions_hub_repo",
        "log_gradient_stats",
        "log_multimodal",
        "log_unique_prompts",
        "num_completions_to_print",
        "num_generations_eval",
        "per_device_train_batch_size",
        "preset",
        "sft_per_device_train_batch_size",
        "steps_per_generation",
        "trust_remote_code",
        "vllm_enable_sleep_mode",
        "vllm_gpu_memory_utilization",
        "vllm_group_port",
        "vllm_max_model_length",
        "vllm_mode",
        "vllm_server_base_url",
        "vllm_server_host",
        "vllm_server_port",
        "vllm_server_timeout",
        "vllm_tensor_parallel_size",
    }
)


def options_of(args: Any) -> dict[str, Any]:
    """Options that say how updates are made, as JSON values."""
    of_transformers = {field.name for field in dataclasses.fields(TrainingArguments)}
    own = {field.name for field in dataclasses.fields(args)} - of_transformers - _BESIDE_UPDATES
    return {name: as_json(getattr(args, name)) for name in sorted({*own, *_OF_UPDATES})}


def as_json(value: Any) -> Any:
    """A value as it comes back from a file: tuples are lists, enumerations strings, and so are objects."""
    return json.loads(json.dumps(value, default=str))


def differences(was: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """What differs, by name, of two mappings of JSON values."""
    names = [name for name in sorted(was.keys() | now.keys()) if was.get(name) != now.get(name)]
    return [_difference(name, was.get(name), now.get(name)) for name in names]


def _difference(name: str, was: Any, now: Any) -> str:
    if isinstance(was, dict) and isinstance(now, dict):
        first, *others = differences(was, now)  # of a coordinator there may be hundreds
        return f"`{name}` ({first.replace('`', '')}{f', and {len(others)} more' if others else ''})"
    if any(isinstance(value, str) and len(value) == 64 for value in (was, now)):  # a hash, which says nothing
        return f"`{name}` has other rows"
    return f"`{name}` was {_short(was)}, now {_short(now)}"


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def rows_hash(dataset: Any) -> str | None:
    """Hash of a dataset's rows as they are stored; `None` of one that is read as it comes."""
    if not isinstance(dataset, Dataset):
        return None
    digest = hashlib.sha256()
    for batch in dataset.with_format("arrow").iter(batch_size=1000):
        table: Any = batch
        digest.update(json.dumps(table.to_pylist(), default=str, sort_keys=True).encode())
    return digest.hexdigest()

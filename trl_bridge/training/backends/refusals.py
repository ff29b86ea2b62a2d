"""Options of FSDP and DeepSpeed that are not supported, and what to change."""

from typing import Any

from accelerate.utils import DistributedType
from torch.distributed.fsdp import CPUOffloadPolicy, StateDictType


def is_sharded(kind: DistributedType) -> bool:
    """Whether a backend shards the student: FSDP or DeepSpeed."""
    return kind in (DistributedType.FSDP, DistributedType.DEEPSPEED)


def refuse_sharding(kind: DistributedType, owner: str) -> None:
    """Refuse to shard the student of a trainer that has not been tested so."""
    if is_sharded(kind):
        raise NotImplementedError(
            f"{owner} has not been tested with {kind.value}. Launch it on one device, or with DDP (torchrun)."
        )


def refuse_turns(kind: DistributedType, owner: str) -> None:
    """Refuse several turns where each of them is a collective generation, and ranks take different numbers of them."""
    if is_sharded(kind):
        raise NotImplementedError(
            f"`tools` and `environment_factory` are not supported by {owner} with {kind.value}: a rank whose rollouts need no more "
            "turns would leave the others waiting. Launch it on one device, or with DDP (torchrun)."
        )


def refuse_quantised(kind: DistributedType, base: Any) -> None:
    """Refuse to shard an adapter on a quantised base."""
    if is_sharded(kind) and getattr(base, "is_quantized", False):
        raise NotImplementedError(
            f"A LoRA on a quantised base has not been tested with {kind.value}. Load the base in bfloat16 (without "
            "`quantization_config`), or launch it on one device or with DDP (torchrun)."
        )


def refuse_fsdp(plugin: Any) -> None:
    """Refuse what is not supported of FSDP."""
    refusals = {
        "fsdp_version": (plugin.fsdp_version != 2, "FSDP1 is not supported. Set it to 2"),
        "fsdp_state_dict_type": (
            plugin.state_dict_type != StateDictType.FULL_STATE_DICT,
            "`save_model` would write no plain model. Set it to FULL_STATE_DICT",
        ),
        "fsdp_offload_params": (
            isinstance(plugin.cpu_offload, CPUOffloadPolicy),
            "the parts beside the student are not moved with it. Set it to false",
        ),
        "fsdp_activation_checkpointing": (
            plugin.activation_checkpointing,
            "it renames the weights of the student alone. Set it to false, and `gradient_checkpointing=True`",
        ),
        "fsdp_ignored_modules": (plugin.ignored_modules is not None, "every weight is trained. Remove it"),
    }
    _refuse(refusals, "of the FSDP configuration")


def refuse_deepspeed(stage: int, config: dict[str, Any]) -> None:
    """Refuse what is not supported of DeepSpeed."""
    zero = config.get("zero_optimization", {})
    offloads = [
        name for name in ("offload_optimizer", "offload_param") if zero.get(name, {}).get("device", "none") != "none"
    ]
    refusals = {
        "zero_optimization.stage": (stage not in (1, 2, 3), "set it to 1, 2 or 3, or launch without DeepSpeed"),
        "optimizer": ("optimizer" in config, "remove it: `optim` names the optimizer of the student and of its parts"),
        "scheduler": ("scheduler" in config, "remove it: the parts beside the student follow `lr_scheduler_type`"),
        "zero_optimization." + (offloads or ["offload"])[0]: (
            bool(offloads),
            "the master weights have to stay on the device. Remove it (`device: none`)",
        ),
        "fp16": (
            bool(config.get("fp16", {}).get("enabled", False)),
            "its scaler would skip updates after the parts beside the student have moved. Use bf16",
        ),
        "zero_optimization.stage3_gather_16bit_weights_on_model_save": (
            stage == 3 and not zero.get("stage3_gather_16bit_weights_on_model_save", False),
            "`save_model` would write no plain model. Set it (`zero3_save_16bit_model` in an accelerate config) to true",
        ),
        "tensor_parallel": (
            config.get("tensor_parallel", {}).get("autotp_size", 1) > 1,
            "only data parallelism is supported. Remove it",
        ),
        "zero_optimization.mics_shard_size": (zero.get("mics_shard_size", -1) > 0, "remove it"),
        "zero_optimization.zero_hpz_partition_size": (zero.get("zero_hpz_partition_size", 1) > 1, "remove it"),
    }
    _refuse(refusals, "in the DeepSpeed configuration")


def _refuse(refusals: dict[str, tuple[bool, str]], where: str) -> None:
    for name, (refused, reason) in refusals.items():
        if refused:
            raise NotImplementedError(f"`{name}` {where} is not supported: {reason}.")

"""What a backend refuses, and rows of weights that do not divide by the number of ranks."""

import types

import pytest
import torch
from accelerate.utils import DistributedType
from torch.distributed.fsdp import CPUOffloadPolicy, OffloadPolicy, StateDictType

from tests.helpers.training import small_config
from trl_bridge.methods.bridge.targets import Target, check_initial_values
from trl_bridge.training.backends import ShardedWeights, backend_for
from trl_bridge.training.backends.fsdp import FSDP2Backend
from trl_bridge.training.backends.refusals import refuse_deepspeed, refuse_fsdp


def _plugin(**changes):
    options = {
        "fsdp_version": 2,
        "state_dict_type": StateDictType.FULL_STATE_DICT,
        "cpu_offload": OffloadPolicy(),
        "activation_checkpointing": False,
        "ignored_modules": None,
    }
    return types.SimpleNamespace(**{**options, **changes})


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("fsdp_version", {"fsdp_version": 1}),
        ("fsdp_state_dict_type", {"state_dict_type": StateDictType.SHARDED_STATE_DICT}),
        ("fsdp_offload_params", {"cpu_offload": CPUOffloadPolicy()}),
        ("fsdp_activation_checkpointing", {"activation_checkpointing": True}),
        ("fsdp_ignored_modules", {"ignored_modules": [torch.nn.Linear(1, 1)]}),
    ],
)
def test_fsdp_options_that_are_refused(name, changes):
    refuse_fsdp(_plugin())
    with pytest.raises(NotImplementedError, match=f"`{name}`.*(Set|Remove)"):
        refuse_fsdp(_plugin(**changes))


GATHERED = {"stage3_gather_16bit_weights_on_model_save": True}


@pytest.mark.parametrize(
    ("name", "stage", "config"),
    [
        ("zero_optimization.stage", 0, {}),
        ("optimizer", 2, {"optimizer": {"type": "AdamW"}}),
        ("scheduler", 2, {"scheduler": {"type": "WarmupLR"}}),
        ("zero_optimization.offload_optimizer", 2, {"zero_optimization": {"offload_optimizer": {"device": "cpu"}}}),
        ("zero_optimization.offload_param", 3, {"zero_optimization": {**GATHERED, "offload_param": {"device": "nvme"}}}),
        ("fp16", 1, {"fp16": {"enabled": True}}),
        ("zero_optimization.stage3_gather_16bit_weights_on_model_save", 3, {}),
        ("tensor_parallel", 1, {"tensor_parallel": {"autotp_size": 2}}),
        ("zero_optimization.mics_shard_size", 3, {"zero_optimization": {**GATHERED, "mics_shard_size": 2}}),
        ("zero_optimization.zero_hpz_partition_size", 3, {"zero_optimization": {**GATHERED, "zero_hpz_partition_size": 2}}),
    ],
)  # fmt: skip
def test_deepspeed_options_that_are_refused(name, stage, config):
    refuse_deepspeed(2, {"zero_optimization": {"stage": 2, "offload_optimizer": {"device": "none"}}})
    refuse_deepspeed(3, {"zero_optimization": {"stage": 3, **GATHERED}})
    with pytest.raises(NotImplementedError, match=f"`{name}` in the DeepSpeed configuration"):
        refuse_deepspeed(stage, config)


def test_other_ways_of_training_are_refused():
    with pytest.raises(NotImplementedError, match="MEGATRON_LM.*FSDP2 or DeepSpeed"):
        backend_for(types.SimpleNamespace(distributed_type=DistributedType.MEGATRON_LM))


def test_head_in_float32_is_refused_under_fsdp(tmp_path):
    accelerator = types.SimpleNamespace(state=types.SimpleNamespace(fsdp_plugin=_plugin()))
    with pytest.raises(NotImplementedError, match="`cast_lm_head_to_fp32`.*FSDP"):
        FSDP2Backend(accelerator).check(small_config(tmp_path, cast_lm_head_to_fp32=True))


@pytest.mark.parametrize("init", ["pissa", "olora", "orthogonal"])
def test_initial_values_from_weights_that_are_not_there(init):
    for good in (True, False, "gaussian"):
        check_initial_values(types.SimpleNamespace(init_lora_weights=good))
    with pytest.raises(ValueError, match=f"init_lora_weights`='{init}'.*cpu_ram_efficient_loading"):
        check_initial_values(types.SimpleNamespace(init_lora_weights=init))


@pytest.mark.parametrize(("rows", "ranks"), [(7, 3), (2, 3), (1, 4), (8, 2), (9, 8)])
def test_rows_of_all_ranks_make_the_weight(rows, ranks):
    weight = torch.arange(float(rows)).unsqueeze(1)
    linear = torch.nn.Linear(1, rows, bias=False)
    chunks = list(weight.chunk(ranks))
    for rank in range(ranks):
        backend = types.SimpleNamespace(world_size=ranks, rank=rank)
        first, last = ShardedWeights(linear, backend).bounds("weight")
        expected = chunks[rank] if rank < len(chunks) else weight[:0]
        assert torch.equal(weight[first:last], expected)


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("cuts", [(0, 3, 5), (0, 5, 5), (0, 1, 5)])
def test_projection_and_change_by_rows_make_the_whole(transposed, cuts):
    torch.manual_seed(0)
    out, inner = (4, 5) if transposed else (5, 4)
    a, b = (torch.nn.Parameter(torch.randn(s, dtype=torch.float64)) for s in ((2, inner), (out, 2)))
    target = Target(module="layer", a=a, b=b, scaling=0.5, transposed=transposed)
    gradient = torch.randn((5, 4), dtype=torch.float64)  # as the weight is stored
    oriented = gradient.T if transposed else gradient
    want = 0.5 * b.detach().T @ oriented, 0.5 * oriented @ a.detach().T
    pieces = [slice(first, last) for first, last in zip(cuts, cuts[1:], strict=False)]
    parts = [target.project(gradient[piece], piece.start) for piece in pieces]
    for index in range(2):
        torch.testing.assert_close(sum(part[index] for part in parts), want[index])
    old_a, old_b = torch.randn_like(a), torch.randn_like(b)
    difference = 0.5 * (b @ a - old_b @ old_a).detach()
    changes = torch.cat([target.change(old_a, old_b, piece.start, piece.stop) for piece in pieces])
    torch.testing.assert_close(changes.detach(), difference.T if transposed else difference)

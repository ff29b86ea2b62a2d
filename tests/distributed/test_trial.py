"""A trial before RL on two gloo processes, launched as a user would."""

import pytest
import torch

from tests.distributed.launch import DEEPSPEED, folder_of_runs, load
from tests.helpers.resume import assert_same
from tests.helpers.streams import TOLERANCE
from tests.helpers.training import movement_error, small_model
from trl_bridge.selftest.reference.stream import StreamReference


pytestmark = pytest.mark.distributed
KINDS = ["ddp", "fsdp"]
STAGES = [
    pytest.param(name, marks=[DEEPSPEED] if name == "zero-3" else [DEEPSPEED, pytest.mark.exhaustive])
    for name in ("zero-1", "zero-2", "zero-3")
]
folder = folder_of_runs("run_trial")


@pytest.fixture(params=[*KINDS, *STAGES])
def ranks(folder, request):
    return load(folder(request.param), "seen")


@pytest.fixture(params=KINDS)
def lean_ranks(folder, request):
    return load(folder(request.param), "seen")


def test_updates_on_two_ranks_are_those_of_the_reference(ranks):
    seen = ranks[0]
    options = {
        "optim": "adamw", "lr": 3e-3, "max_grad_norm": 1.0, "schedule": lambda step: 1.0, "sft_weight": lambda step: 1.0,
        "token_weight": torch.ones_like,
    }  # fmt: skip
    reference = StreamReference(small_model(), seen["before"], options)
    assert [len(batch["input_ids"]) for batch in seen["batches"]] == [3 * 2 * 2] * 4
    for batch, weights, got in zip(seen["batches"], seen["weights"], seen["after"], strict=True):
        reference.update(0, [], [batch], [weights])
        assert movement_error(got, reference.weights, seen["before"]) < TOLERANCE


def test_ranks_agree_and_a_refused_trial_leaves_nothing(ranks):
    first, second = ranks
    for name in ("before", "after", "measured", "refused"):
        assert_same(first[name], second[name])
    assert_same(first["bridge"][:2], second["bridge"][:2])  # theta_hat's and theta's are the main process's alone
    for rank in ranks:
        assert_same(rank["refused"], rank["plain"])


def test_kept_it_is_where_the_student_and_the_spread_shadow_start(ranks):
    after, policy, theta, hat = ranks[0]["bridge"]
    assert_same(policy, after)
    assert_same(hat, theta)


def test_kept_it_is_where_lean_slices_start(lean_ranks):
    after, policy, theta, hat = lean_ranks[0]["lean"]
    assert_same(policy, after)
    assert_same(hat, theta)


def test_lean_slices_of_w_are_where_they_were(lean_ranks):
    policy, before = lean_ranks[0]["lean"][1], lean_ranks[0]["lean before"]
    moved = {name: (policy[name] - was).abs() for name, was in before.items()}
    assert all(part[6:].max() == 0 and part[:6].max() > 0 for name, part in moved.items() if "lora_A" in name)
    assert all(part[:, 6:].max() == 0 and part[:, :6].max() > 0 for name, part in moved.items() if "lora_B" in name)


def test_costs_are_of_all_ranks(ranks):
    entry = ranks[0]["asked"]
    # Two ranks of two micro-batches of 8 rows: 8 groups, of which 3 are asked for; each of 16 rows judged three times.
    assert (entry["trial/rollouts"], entry["trial/verdicts"], entry["trial/sft_steps"]) == (3 * 32, 48, 4)

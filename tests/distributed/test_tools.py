"""BRIDGE with tools on two ranks, against the float64 reference."""

import pytest

from tests.distributed.launch import launch, load
from tests.helpers.tools import agent_model, external
from tests.helpers.training import adapters, movement_error
from trl_bridge.selftest.reference.bridge import Reference


def test_two_ranks_with_different_numbers_of_turns_equal_the_reference(tmp_path):
    launch("run_tools", tmp_path)
    ranks = load(tmp_path, "tools")
    written = [
        sum(int(external(batch).sum()) for window in rank["windows"] for batch in window["rl"]) for rank in ranks
    ]
    # Rows are dealt anew over the ranks, so that both train on what one of them has got from the tool.
    assert sum(written) > 0
    main, steps = ranks[0], len(ranks[0]["states"])
    options = {
        **main["options"],
        "world_size": 2,
        "schedule": lambda step: (steps - step) / steps,
        "lam": lambda step: 0.5,
    }
    a, b = adapters(main["start"]["w"])
    theta = main["start"]["theta"]
    reference = Reference(agent_model(), theta, a, b, 1.0, options)
    start = {"theta": theta, "a": a, "b": b, "hat": theta}
    for step, state in enumerate(main["states"]):
        windows = [rank["windows"][step] for rank in ranks]
        joined = {key: [x for window in windows for x in window[key]] for key in ("rl", "sft", "weights")}
        weights = None if joined["weights"][0] is None else joined["weights"]
        metrics = reference.update(step, joined["rl"], joined["sft"], weights)
        got_a, got_b = adapters(state["w"])
        got = {"theta": state["theta"], "a": got_a, "b": got_b, "hat": state["hat"]}
        want = {"theta": reference.theta, "a": reference.a, "b": reference.b, "hat": reference.hat}
        for name in got:
            assert movement_error(got[name], want[name], start[name]) < 2e-4, (step, name)
        for key in ("bridge/gain", "sft/loss"):
            assert main["log"][step][key] == pytest.approx(metrics[key], rel=3e-3, abs=5e-6), (step, key)

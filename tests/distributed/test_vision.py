"""Rows with pictures on two ranks, against the float64 references."""

import pytest

from tests.distributed.launch import launch, load
from tests.distributed.run_vision import CASES, CHORD
from tests.helpers.lean import SCALINGS, replay_lean
from tests.helpers.resume import assert_same
from tests.helpers.training import adapters, movement_error
from tests.helpers.vision import vision_model
from trl_bridge.selftest.reference.bridge import Reference
from trl_bridge.selftest.reference.stream import StreamReference


pytestmark = pytest.mark.distributed
TOLERANCE = 2e-4
ALIKE = {"world_size": 2, "schedule": lambda step: (2 - step) / 2, "lam": lambda step: 0.5}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    place = tmp_path_factory.mktemp("vision")
    launch("run_vision", place)
    return place


def joined(ranks, step):
    window = {key: [x for rank in ranks for x in rank["windows"][step][key]] for key in ("rl", "sft", "weights")}
    seen = [sum(float(batch["pixel_values"].abs().sum()) for batch in rank["windows"][step]["rl"]) for rank in ranks]
    assert abs(seen[0] - seen[1]) > 1.0, "the ranks have seen the same pictures"
    return window


@pytest.mark.parametrize("name", [name for name in CASES if name.startswith("bridge")])
def test_bridge_equals_the_reference(folder, name):
    ranks, (_, family, changes) = load(folder, name), CASES[name]
    main, (model, _) = ranks[0], vision_model(family)
    (a, b), theta = adapters(main["start"]["w"]), main["start"]["theta"]
    tower = model.get_encoder(modality="image")
    (place,) = [path for path, module in model.named_modules() if module is tower]
    frozen = {n for n in theta if n.startswith(f"{place}.")} if "freeze_vision_tower" in changes else set()
    reference = Reference(model, theta, a, b, 1.0, {**main["options"], **ALIKE, "frozen": frozen})
    start = {"theta": theta, "a": a, "b": b, "hat": theta}
    assert len(main["states"]) == 2
    for step, state in enumerate(main["states"]):
        window = joined(ranks, step)
        metrics = reference.update(step, window["rl"], window["sft"])
        got_a, got_b = adapters(state["w"])
        got = {"theta": state["theta"], "a": got_a, "b": got_b, "hat": state["hat"]}
        want = {"theta": reference.theta, "a": reference.a, "b": reference.b, "hat": reference.hat}
        for part in got:
            assert movement_error(got[part], want[part], start[part]) < TOLERANCE, (step, part)
        for key in ("bridge/gain", "sft/loss"):
            assert main["log"][step][key] == pytest.approx(metrics[key], rel=3e-3, abs=5e-6), (step, key)


def test_lean_equals_the_reference(folder):
    ranks = load(folder, "lean")
    main = ranks[0]
    windows = [joined(ranks, step) for step in range(2)]
    options = {**main["options"], **ALIKE}
    replayed = replay_lean(vision_model()[0], main["start"], windows, main["states"], options, SCALINGS)
    assert all(e < TOLERANCE for errors, _ in replayed for e in errors.values())


def test_chord_equals_the_reference(folder):
    ranks = load(folder, "chord")
    main, mu = ranks[0], CHORD["mu_peak"]
    weights = {"rl_weight": lambda step: 1 - mu, "sft_weight": lambda step: mu, "token_weight": lambda p: p**0}
    reference = StreamReference(vision_model("smolvlm")[0], main["start"], {**main["options"], **ALIKE, **weights})
    assert len(main["states"]) == 2
    for step, state in enumerate(main["states"]):
        window = joined(ranks, step)
        metrics = reference.update(step, window["rl"], window["sft"], window["weights"])
        assert movement_error(state, reference.weights, main["start"]) < TOLERANCE, step
        assert main["log"][step]["loss"] == pytest.approx(metrics["loss"], rel=3e-3, abs=5e-6)


def test_it_resumes_inside_a_generation_batch(folder):
    for straight, resumed in load(folder, "resumed"):
        assert_same(resumed, straight)

"""Colocate mode with vLLM itself: after each sync the engine holds the policy, whichever method trains it."""

import pytest
from trl.generation import vllm_generation

from tests.helpers.real_vllm import (
    CASES,
    COLOCATE,
    NEEDS_VLLM,
    SERVED_ALONE,
    TIED,
    SharedEngines,
    Watched,
    build,
    save_model,
)


pytestmark = NEEDS_VLLM


@pytest.fixture(scope="module")
def engines():
    return SharedEngines()


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    return {kind: save_model(folder / kind, tied=kind == "tied") for kind in ("untied", "tied")}


@pytest.fixture
def watched(monkeypatch, engines):
    monkeypatch.setattr(vllm_generation, "LLM", engines)
    return Watched(monkeypatch)


COLOCATED = [case for case in CASES if case not in SERVED_ALONE]


@pytest.mark.parametrize(
    ("kind", "case"), [*(("untied", case) for case in COLOCATED), *(("tied", case) for case in TIED)]
)
def test_the_engine_holds_the_policy(tmp_path, models, watched, kind, case):
    trainer = build(case, tmp_path, models[kind], **COLOCATE)
    watched.run(trainer)
    if case == "actguide":
        assert any(entry.get("actguide/guided_rate", 0) > 0 for entry in trainer.state.log_history)

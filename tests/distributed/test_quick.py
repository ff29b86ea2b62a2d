"""What `make test` runs on DeepSpeed."""

import pytest

from tests.distributed import cases, run_distillation, run_groups, run_streams, run_two_stage
from tests.distributed.launch import QUICK


def names_of(*tables):
    return {prefix + name for prefix, table in tables for name in table["deepspeed"]}


RUNS = {
    "run": names_of(("", cases.CASES), ("", cases.LEAN_CASES), ("resume ", cases.RESUMES), ("best ", cases.BESTS)),
    "run_streams": names_of(("", run_streams.CASES), ("resume ", run_streams.RESUMES), ("", run_streams.PACKED)),
    "run_groups": names_of(("", run_groups.CASES), ("resume ", run_groups.RESUMED)),
    "run_distillation": names_of(("", run_distillation.CASES))
    | {f"resume {name}" for name in run_distillation.RESUMED["deepspeed"]},
    "run_two_stage": names_of(("", run_two_stage.CASES))
    | {f"{name} {stage} {step}" for name, cuts in run_two_stage.CUTS.items() for stage, step in cuts},
}


@pytest.mark.parametrize("module", RUNS)
def test_quick_runs_are_runs(module):
    assert set(QUICK[module]) < RUNS[module]


def test_every_method_is_quick_once():
    quick = [run_groups.options_of(name) for name in QUICK["run_groups"]]
    assert set(quick) - {"resume relift", "resume self-teacher average"} == set(run_groups.METHOD)
    assert {"naive-mix", "alternating"} < set(QUICK["run_streams"])


@pytest.mark.parametrize("module", ["run", "run_groups", "run_distillation", "run_two_stage"])
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_every_stage_is_quick(module, stage):
    assert any(f"zero-{stage}" in name for name in QUICK[module])

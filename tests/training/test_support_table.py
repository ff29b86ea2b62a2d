"""`docs/support.md`: every option of TRL is listed, tests named there exist and set it, and refusals are raised."""

import dataclasses

import pytest
from trl import GRPOConfig

from tests.helpers.pages import ROOT, is_test, plain, table
from tests.helpers.training import small_config
from trl_bridge.training.refusals import REFUSED, check_config


PAGE = (ROOT / "docs" / "support.md").read_text()
HEADING = "| option | status | by which test, or why |"

# A value of each refused option that is refused.
VALUES = {
    "fp16": True,
    "use_liger_kernel": True,
    "torch_compile": True,
    "lr_scheduler_type": "reduce_lr_on_plateau",
    "max_grad_norm": None,
    "sync_ref_model": True,
    "ddp_static_graph": True,
    "bf16_full_eval": True,
    "fp16_full_eval": True,
    "use_transformers_paged": True,
    "use_transformers_continuous_batching": True,
    "enable_jit_checkpoint": True,
    "auto_find_batch_size": True,
}
NEEDED = {"lr_scheduler_type": {"eval_strategy": "steps", "eval_steps": 1}}


def support_table(page=PAGE):
    """From each option to its status, its note (the test or the reason) and what is refused of it."""
    rows = [(name, status, *note.partition("; refused: ")[::2]) for name, status, note in table(page, HEADING)]
    assert [name for name, *_ in rows] == [field.name for field in dataclasses.fields(GRPOConfig)]
    return {name: (status, plain(note), limits) for name, status, note, limits in rows}


def test_every_field_is_listed_in_order():
    assert {status for status, _, _ in support_table().values()} == {"tested", "refused", "neutral"}


@pytest.mark.parametrize(
    ("change", "found"),
    [
        (lambda row: "", "learning_rate"),
        (lambda row: row + row.replace("max_steps", "no_such_option"), "no_such_option"),
        (lambda row: row + row, "max_steps"),
    ],
)
def test_a_missing_stale_or_double_field_is_an_error(change, found):
    (row,) = (line for line in PAGE.splitlines(keepends=True) if line.startswith("| `max_steps` |"))
    with pytest.raises(AssertionError, match=f"'{found}' != "):
        support_table(PAGE.replace(row, change(row)))


def test_every_test_named_exists():
    tests = {note for status, note, _ in support_table().values() if status == "tested"}
    assert len(tests) > 15
    missing = [test for test in tests if not is_test(test)]
    assert not missing, missing


def test_every_option_called_tested_is_set_by_that_test():
    """The name of the option stands in the file of the test, in the harness that it runs on, or among the cases on two ranks."""
    harness = (ROOT / "trl_bridge/selftest/runs.py").read_text()
    cases = (ROOT / "tests/distributed/cases.py").read_text()
    for name, (status, note, _) in support_table().items():
        if status == "tested":
            text = (ROOT / note.partition("::")[0]).read_text() + harness + cases
            assert f'"{name}"' in text or f"{name}=" in text, (name, note)


def test_refusals_agree_with_the_code():
    options = support_table()
    for name, rule in REFUSED.items():
        reason = rule if isinstance(rule, str) else rule[1]
        status, note, limits = options[name]
        assert limits if status == "tested" else (status, note) == ("refused", reason), name
    refused = {name for name, (status, _, _) in options.items() if status == "refused"}
    assert refused - set(REFUSED) == {"auto_find_batch_size"}
    # The one that needs an object of its own is below.
    assert refused | set(REFUSED) == set(VALUES) | {"parallelism_config"}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", VALUES)
def test_refused_option_raises(tmp_path, name):
    with pytest.raises((ValueError, NotImplementedError), match=name):
        small_config(tmp_path, **{**NEEDED.get(name, {}), name: VALUES[name]})


def test_refused_object_raises(tmp_path):
    args = small_config(tmp_path)
    args.parallelism_config = object()  # what transformers makes of a configuration
    with pytest.raises(NotImplementedError, match="parallelism_config"):
        check_config(args)


def test_best_model_needs_whole_checkpoints(tmp_path):
    options = {"load_best_model_at_end": True, "save_strategy": "steps", "save_steps": 1, "eval_strategy": "steps"}
    options["eval_steps"] = 1
    small_config(tmp_path, **options)
    with pytest.raises(ValueError, match="`load_best_model_at_end` with `save_only_model`"):
        small_config(tmp_path, **options, save_only_model=True)


@pytest.mark.parametrize("optim", ["adafactor", "lion_32bit", "lomo", "galore_adamw", "apollo_adamw", "no_such"])
@pytest.mark.parametrize("name", ["optim", "shadow_optim"])
def test_optimizers_that_are_refused(tmp_path, name, optim):
    with pytest.raises((ValueError, NotImplementedError), match=optim):
        small_config(tmp_path, **{name: optim})

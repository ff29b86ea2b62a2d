"""Every option of TRL is listed, tests named there exist, refusals are raised, and the docs page is up to date."""

import ast
import dataclasses
import subprocess
import sys
from pathlib import Path

import pytest
from trl import GRPOConfig

from tests.helpers.training import small_config
from trl_bridge.training import support_table as module
from trl_bridge.training.refusals import REFUSED, check_config
from trl_bridge.training.support_table import as_markdown, support_table


ROOT = Path(__file__).parents[2]

# A value of each refused option that is refused.
VALUES = {
    "fp16": True,
    "neftune_noise_alpha": 5.0,
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
    "router_aux_loss_coef": 0.1,
    "enable_jit_checkpoint": True,
    "auto_find_batch_size": True,
}
NEEDED = {"lr_scheduler_type": {"eval_strategy": "steps", "eval_steps": 1}}


def test_every_field_is_listed_in_order():
    assert list(support_table()) == [field.name for field in dataclasses.fields(GRPOConfig)]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda rows: rows[1:], "not listed: "),
        (lambda rows: [*rows, ("no_such_option", rows[0][1])], "no fields: .*no_such_option"),
        (lambda rows: [*rows, rows[0]], "listed twice"),
    ],
)
def test_a_missing_stale_or_double_field_is_an_error(monkeypatch, change, message):
    rows = change(list(module._rows()))
    monkeypatch.setattr(module, "_rows", lambda: iter(rows))
    with pytest.raises(ValueError, match=message):
        support_table()


def _functions(path):
    return {node.name for node in ast.parse(path.read_text()).body if isinstance(node, ast.FunctionDef)}


def test_every_test_named_exists():
    tests = {support.note for support in support_table().values() if support.status == "tested"}
    assert len(tests) > 15
    missing = [test for test in tests if test.partition("::")[2] not in _functions(ROOT / test.partition("::")[0])]
    assert not missing, missing


def test_every_option_called_tested_is_set_by_that_test():
    """The name of the option stands in the file of the test, in the harness that it runs on, or among the cases on two ranks."""
    harness = (ROOT / "tests/helpers/training.py").read_text()
    cases = (ROOT / "tests/distributed/cases.py").read_text()
    for name, support in support_table().items():
        if support.status == "tested":
            text = (ROOT / support.note.partition("::")[0]).read_text() + harness + cases
            assert f'"{name}"' in text or f"{name}=" in text, (name, support.note)


def test_refusals_agree_with_the_code():
    table = support_table()
    for name in REFUSED:
        assert table[name].status == "refused" or table[name].limits, name
    refused = {name for name, support in table.items() if support.status == "refused"}
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


def test_docs_page_is_what_the_table_prints():
    assert (ROOT / "docs/support.md").read_text() == as_markdown(), (
        "run `python -m trl_bridge.training.support_table > docs/support.md`"
    )


def test_command_prints_the_page():
    run = subprocess.run(
        [sys.executable, "-m", "trl_bridge.training.support_table"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    assert run.stdout == as_markdown()

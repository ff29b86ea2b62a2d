"""The check of the contract at start-up: it passes here, names what has moved, and costs nothing to speak of."""

import importlib.metadata
import os
import shutil
import subprocess
import sys
from pathlib import Path
from pkgutil import resolve_name

import peft
import pytest
import transformers
import trl
from packaging.specifiers import SpecifierSet

from trl_bridge import _SUPPORTED_TRL, contract
from trl_bridge.contract.tables import ORDERS


ROOT = Path(__file__).parents[2]


def test_nothing_has_moved():
    assert not list(contract.breaches())
    assert not list(contract.breaches(*contract.LATE))


def test_what_rests_on_an_order_is_there():
    for order in ORDERS:
        assert callable(resolve_name(order.ours)), order.ours


def test_tested_versions_are_those_of_the_development_set_up():
    pinned = dict(line.split("==") for line in (ROOT / "constraints.txt").read_text().splitlines() if "==" in line)
    for package, minor in contract.TESTED.items():
        assert pinned[package].startswith(f"{minor}."), package


def moved():
    return "\n".join(contract.breaches())


def test_a_method_that_is_gone(monkeypatch):
    monkeypatch.delattr(trl.GRPOTrainer, "_calculate_rewards")
    monkeypatch.delattr(trl.trainer.utils, "pad")
    assert (
        moved().startswith("trl.trainer.utils.pad is gone") and "trl.GRPOTrainer._calculate_rewards is gone" in moved()
    )


def test_an_override_that_would_get_more(monkeypatch):
    monkeypatch.setattr(trl.GRPOTrainer, "_compute_loss", lambda self, model, inputs, more=None: None)
    assert "trl.GRPOTrainer._compute_loss takes (self, model, inputs, more=None), not (self, model, inputs)" in moved()


@pytest.mark.parametrize(
    ("signature", "fits"),
    [
        ("self, tensor, reduction='sum', scale=1.0, more=None, *, last=(1, 2), **kwargs", True),
        ("self, tensor, reduction='sum', scale=1.0, more", None),
        ("self, tensor, more=None, reduction='sum', scale=1.0", False),
        ("self, tensor, reduction='mean', scale=1.0", False),
        ("self, tensor, scale=1.0", False),
    ],
)
def test_what_we_call_may_take_more_behind(monkeypatch, signature, fits):
    if fits is None:
        signature, fits = signature.replace("more", "*, more"), False
    monkeypatch.setattr("accelerate.Accelerator.reduce", eval(f"lambda {signature}: None"))
    assert ("accelerate.Accelerator.reduce takes" in moved()) != fits


@pytest.mark.parametrize(("more", "fits"), [("*, more=None", True), ("*, more", False)])
def test_a_constructor_may_take_more_anywhere(monkeypatch, more, fits):
    signature = f"self, model, peft_config, adapter_name, low_cpu_mem_usage=False, state_dict=None, {more}"
    monkeypatch.setattr(peft.LoraModel, "__init__", eval(f"lambda {signature}: None"))
    assert ("peft.LoraModel.__init__ takes" in moved()) != fits
    monkeypatch.setattr(
        peft.LoraModel, "__init__", lambda self, model, extra=1, peft_config=2, adapter_name=3, state_dict=None: None
    )
    assert "peft.LoraModel.__init__ takes" in moved()


def test_calls_in_another_order(monkeypatch):
    def training_step(self, model, inputs, num_items_in_batch=None):
        self.accelerator.backward(self.compute_loss(model, inputs))
        with self.compute_loss_context_manager():
            pass

    monkeypatch.setattr(transformers.Trainer, "training_step", training_step)
    assert "transformers.Trainer.training_step has no `self.compute_loss(`" in moved()
    assert "trl_bridge.training.stream.DemonstrationTrainer.compute_loss rests on" in moved()


def test_a_loss_that_sets_more_or_scores_twice(monkeypatch):
    def loss(self, model, inputs):
        self.new: int = 3
        per_token_logps, entropies, aux_loss = self._get_per_token_logps_and_entropies(model)
        return self._get_per_token_logps_and_entropies(model)

    monkeypatch.setattr(trl.GRPOTrainer, "_compute_loss", loss)
    assert "trl.GRPOTrainer._compute_loss sets ['new'], not" in moved()
    assert "has `self._get_per_token_logps_and_entropies(` 2 times, not 1" in moved()


def test_a_parent_that_takes_a_name_of_ours_or_drops_one_that_we_read(monkeypatch):
    monkeypatch.setattr(trl.GRPOTrainer, "policy_pass", None, raising=False)
    monkeypatch.setitem(contract.ATTRIBUTES, "trl.GRPOTrainer", "_step no_such_attribute")
    assert "has an attribute policy_pass now, which is a name of ours" in moved()
    assert "trl.GRPOTrainer has no attribute no_such_attribute" in moved() and "attribute _step" not in moved()


def test_all_of_it_is_one_error(monkeypatch):
    monkeypatch.delattr(trl.GRPOTrainer, "_calculate_rewards")
    monkeypatch.delattr(trl.trainer.utils, "pad")
    with pytest.raises(ImportError) as error:
        contract.check()
    text = str(error.value)
    assert "utils.pad is gone" in text and "_calculate_rewards is gone" in text and "'trl==1.16.*'" in text
    contract.check("trl.DistillationTrainer._compute_loss")  # which has not moved


@pytest.mark.parametrize(
    ("installed", "warns"), [("1.16.0", False), ("1.16.3", False), ("1.17.0", True), ("1.160.0", True)]
)
def test_an_untested_minor_release_is_one_warning(monkeypatch, recwarn, installed, warns):
    monkeypatch.setattr(contract, "version", lambda package: installed)
    contract.check()
    contract.check("trl.DistillationTrainer")
    assert [str(w.message).count("`trl-bridge selftest`") for w in recwarn] == [1] * warns
    monkeypatch.setenv("LOCAL_RANK", "1")
    contract.check()
    assert len(recwarn) == warns


def test_newer_releases_are_let_in():
    assert all(_SUPPORTED_TRL.contains(found) for found in ("1.16.0", "1.17.0", "1.40.2"))
    assert not any(_SUPPORTED_TRL.contains(found) for found in ("1.15.9", "2.0.0"))
    assert any(
        f'"trl{bound}"' in (ROOT / "pyproject.toml").read_text() for bound in (">=1.16,<2", str(_SUPPORTED_TRL))
    )
    assert SpecifierSet(">=1.16,<2") == _SUPPORTED_TRL


def run_with(path, *lines):
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([*map(str, path), str(ROOT)])}
    return subprocess.run(
        [sys.executable, "-c", "\n".join(lines)], env=environment, capture_output=True, text=True, timeout=600
    )


@pytest.mark.slow
def test_nothing_more_is_imported_and_it_is_quick():
    done = run_with(
        [],
        "import sys, time, peft.utils.transformers_weight_conversion",
        "import trl.trainer.grpo_trainer, trl.trainer.sft_trainer, trl_bridge.contract as contract",
        "before, start = set(sys.modules), time.process_time()",
        "assert not list(contract.breaches())",
        "print(sorted(set(sys.modules) - before), time.process_time() - start)",
    )
    modules, seconds = done.stdout.rsplit(" ", 1)
    assert modules == "[]" and float(seconds) < 0.5, done.stdout + done.stderr


@pytest.mark.slow
def test_a_user_of_a_release_to_come(tmp_path):
    shutil.copytree(Path(trl.__file__).parent, tmp_path / "trl")
    info = Path(importlib.metadata.distribution("trl")._path)
    metadata = (info / "METADATA").read_text().replace("\nVersion: 1.16.0\n", "\nVersion: 1.17.0\n")
    (tmp_path / "trl-1.17.0.dist-info").mkdir()
    (tmp_path / "trl-1.17.0.dist-info" / "METADATA").write_text(metadata)
    use = "from trl_bridge import BridgeTrainer, LUFFYTrainer, OPDTrainer; print(BridgeTrainer.__name__)"
    done = run_with([tmp_path], use)
    assert done.stdout == "BridgeTrainer\n" and done.stderr.count("`trl-bridge selftest`") == 1, done.stderr
    grpo = tmp_path / "trl" / "trainer" / "grpo_trainer.py"
    grpo.write_text(
        grpo.read_text().replace(
            "def _compute_loss(self, model, inputs)", "def _compute_loss(self, model, inputs, new)"
        )
    )
    done = run_with([tmp_path], use)
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("ImportError")]
    assert "trl 1.17.0" in line and "_compute_loss takes (self, model, inputs, new), not (self, model, inputs)" in line
    assert "pip install 'trl==1.16.*'" in line

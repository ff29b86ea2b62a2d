"""What the distillation trainers rely on in TRL. A failure here says what changed upstream."""

import inspect

import pytest
import torch
from trl import DistillationConfig, DistillationTrainer
from trl.trainer.distillation_trainer import _chunked_divergence_loss

from tests.helpers.contract import place_of, readers_of, source_of
from tests.helpers.distillation import distillation_trainer
from trl_bridge import OPDTrainer
from trl_bridge.contract.names import OWN_NAMES
from trl_bridge.contract.tables import ATTRIBUTES
from trl_bridge.distillation.teacher import logit_scale


READ = ATTRIBUTES["trl.DistillationTrainer"].split()
OWN = {
    "backend",
    "_clock_template",
    "_measured",
    "_stepping",
    "_train_sampler",
    "prompts_per_generation",
    "served_teacher",
    "template_day",
}


@pytest.fixture(scope="module")
def theirs(tmp_path_factory):
    return distillation_trainer(tmp_path_factory.mktemp("theirs"), DistillationTrainer, DistillationConfig)


@pytest.mark.parametrize("name", READ)
def test_attribute_that_we_read(theirs, name):
    assert hasattr(theirs, name), readers_of(name)


def test_own_names_are_not_the_parents(theirs, tmp_path):
    assert not {name for name in OWN_NAMES | OWN if hasattr(theirs, name)}
    assert set(vars(distillation_trainer(tmp_path, OPDTrainer))) - set(vars(theirs)) <= OWN


def test_loss_is_scaled_by_the_trainer_itself():
    assert DistillationTrainer.loss_is_scaled_for_ga is True, place_of(OPDTrainer._compute_loss)


def test_keys_of_a_generation_batch(theirs):
    theirs.model.train()
    batch = theirs._generate_and_score_completions([{"prompt": "1+1="} for _ in range(8)])
    want = {"prompt_ids", "prompt_mask", "completion_ids", "completion_mask", "num_items_in_batch"}
    assert set(batch) == want, {name: readers_of(name) for name in want - set(batch)}


def test_every_name_of_a_logit_scale_is_known():
    parent, ours = source_of(DistillationTrainer._compute_loss), inspect.getsource(logit_scale)
    names = ("logit_scale", "output_multiplier", "lm_head_multiplier", "logits_scaling", "hyperclovax")
    for name in names:
        assert f'"{name}"' in parent and f'"{name}"' in ours or f".{name}" in parent, (name, place_of(logit_scale))
    # Read off the student's config; a new one would be a line more.
    read = {line.split('"')[1] for line in parent.splitlines() if "getattr(student_config" in line}
    assert read == {*names[:4], "final_logit_softcapping"}, place_of(logit_scale)


def test_scale_goes_before_the_softcap_and_temperature_last():
    hidden, weight = torch.tensor([[[1.0, 2.0]]]), torch.tensor([[0.5, -1.0], [1.0, 0.25]])
    options = {"student_logit_scale": 3.0, "student_final_logit_softcapping": 2.0, "temperature": 0.5}
    _, entropy, _ = _chunked_divergence_loss(hidden, hidden, weight, weight, torch.ones(1, 1), 1.0, **options)
    z = 2.0 * torch.tanh(3.0 * hidden[0, 0] @ weight.T / 2.0) / 0.5
    log_p = torch.log_softmax(z, -1)
    assert entropy.item() == pytest.approx(-(log_p.exp() * log_p).sum().item(), abs=1e-6)

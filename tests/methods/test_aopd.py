"""AOPD: the trained update against the float64 formulas, its two limits, and its presets."""

import pytest
import torch
from trl import DistillationConfig, DistillationTrainer

from tests.helpers.distillation import distillation_config, distillation_trainer, recording, replay, weights_of
from tests.helpers.groups import assert_resumes
from tests.helpers.training import movement_error
from trl_bridge import AOPDConfig, AOPDTrainer, OPDTrainer


TOLERANCE = 2e-4
SGD = {"optim": "sgd", "learning_rate": 5e-3}
VOCABULARY = 15

CASES = {
    "code": {"aopd_top_k": 4, **SGD},
    "paper": {"aopd_top_k": 4, "preset": "paper", **SGD},
    "more tokens than there are": {"aopd_top_k": 99},
    "weights": {"aopd_weight": 0.5, "opd_weight": 1.25, "aopd_generalized_kl": True, "aopd_top_k": 4, **SGD},
    "threshold": {"aopd_tau": -0.2, "temperature": 1.5, "aopd_allow_temperature": True, "aopd_top_k": 3, **SGD},
}


@pytest.mark.parametrize("case", CASES)
def test_update_equals_the_reference(tmp_path, case):
    trainer = distillation_trainer(tmp_path, recording(AOPDTrainer), **CASES[case])
    trainer.train()
    assert max(replay(trainer)) < TOLERANCE
    assert 0 < trainer.logged[0]["aopd/gate_fraction"] < 1


def test_gate_that_never_fires_is_opd_to_the_bit(tmp_path):
    options = {"max_steps": 3, "gradient_checkpointing": True}
    opd = distillation_trainer(tmp_path, OPDTrainer, **options)
    opd.train()
    aopd = distillation_trainer(tmp_path, AOPDTrainer, aopd_tau=-1.0, **options)
    aopd.train()
    want = weights_of(opd)
    assert all(torch.equal(want[name], value) for name, value in weights_of(aopd).items())
    assert aopd.state.log_history[0]["aopd/gate_fraction"] == 0.0
    assert aopd.state.log_history[0]["loss"] == opd.state.log_history[0]["loss"]


def test_gate_that_always_fires_is_trls_forward_divergence(tmp_path):
    theirs = distillation_trainer(tmp_path, DistillationTrainer, DistillationConfig, beta=0.0, max_steps=3)
    start = weights_of(theirs)
    theirs.train()
    ours = distillation_trainer(tmp_path, AOPDTrainer, aopd_tau=1.0, aopd_top_k=VOCABULARY, max_steps=3)
    ours.train()
    assert ours.state.log_history[0]["aopd/gate_fraction"] == 1.0
    assert ours.state.log_history[0]["loss"] == pytest.approx(theirs.state.log_history[0]["loss"], abs=1e-5)
    difference = max((weights_of(ours)[n] - t).abs().max().item() for n, t in weights_of(theirs).items())
    moved = max((start[n] - t).abs().max().item() for n, t in weights_of(theirs).items())
    assert difference < 1e-5 and moved > 1e-3


def test_split_into_micro_batches_makes_no_difference(tmp_path):
    states = []
    for size in (8, 1):
        options = {"per_device_train_batch_size": size, "gradient_accumulation_steps": 8 // size, "preset": "paper"}
        trainer = distillation_trainer(tmp_path, AOPDTrainer, max_steps=1, aopd_top_k=4, **options, **SGD)
        start = weights_of(trainer)
        trainer.train()
        states.append(weights_of(trainer))
    assert movement_error(states[1], states[0], start) < 1e-5


def test_metrics(tmp_path):
    trainer = distillation_trainer(tmp_path, recording(AOPDTrainer), aopd_top_k=VOCABULARY, max_steps=1)
    trainer.train()
    entry = trainer.logged[0]
    assert entry["aopd/topk_mass"] == pytest.approx(1.0, abs=1e-5)
    # Over the whole vocabulary it is a divergence, and tokens are imitated where the teacher finds them less likely.
    assert entry["aopd/imitation_loss"] > 0 > entry["aopd/mean_advantage_gated"]
    assert entry["aopd/policy_loss"] != entry["aopd/imitation_loss"]
    never = distillation_trainer(tmp_path, AOPDTrainer, aopd_tau=-1.0, max_steps=1)
    never.train()
    assert never.state.log_history[0]["aopd/imitation_loss"] is None


def test_policy_loss_is_logged_as_trained(tmp_path):
    options = {"aopd_tau": -1.0, "opd_weight": 2.0, "max_steps": 1, "gradient_accumulation_steps": 1}
    trainer = distillation_trainer(tmp_path, AOPDTrainer, advantage_clip=0.3, **options)
    trainer.train()
    entry = trainer.state.log_history[0]
    assert entry["opd/advantage_clip_fraction"] > 0
    assert entry["loss"] == pytest.approx(2 * entry["aopd/policy_loss"], rel=1e-5)


def test_presets(tmp_path):
    def fields(**changes):
        config = distillation_config(tmp_path, AOPDConfig, **changes)
        return config.aopd_normalize_by_k, config.aopd_imitate_ties, config.loss_aggregation

    assert fields() == fields(preset="code") == (False, False, "token")
    assert fields(preset="paper") == (True, True, "sequence")
    assert fields(preset="paper", aopd_normalize_by_k=False, loss_aggregation="token") == (False, True, "token")


def test_resume_is_exact(tmp_path):
    options = {"max_steps": 4, "save_strategy": "steps", "save_steps": 1, "aopd_top_k": 4}
    assert_resumes(
        tmp_path, lambda folder, **changes: distillation_trainer(folder, AOPDTrainer, **options, **changes), stop=3
    )

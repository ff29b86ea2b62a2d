"""NEFTune: noise on the embeddings of demonstrations, of its size, and in no other pass."""

import math

import pytest
import torch
from transformers import LlamaForCausalLM

from tests.helpers.resume import assert_same
from tests.helpers.streams import assert_resumes, make, replay, trained
from tests.helpers.training import small_config, small_model, small_trainer
from tests.helpers.two_stage import two_stage
from trl_bridge import AlternatingTrainer, LUFFYConfig, NaiveMixTrainer
from trl_bridge.selftest.streams import recording
from trl_bridge.training import packed_trainer


ALPHA = 5.0


@pytest.fixture
def noise(monkeypatch):
    """Token ids of each noisy pass, (B, T), and what was added to their embeddings, (B, T, d)."""
    seen, hooks = [], []
    activate, deactivate = packed_trainer.activate_neftune, packed_trainer.deactivate_neftune

    def see(module, inputs, output):
        seen.append((inputs[0].clone(), (output - module.weight[inputs[0]]).detach()))

    def activated(model, alpha, accelerator):
        hook = activate(model, alpha, accelerator)
        hooks.append(accelerator.unwrap_model(model).get_input_embeddings().register_forward_hook(see))
        return hook

    def deactivated(*args):
        hooks.pop().remove()
        deactivate(*args)

    monkeypatch.setattr(packed_trainer, "activate_neftune", activated)
    monkeypatch.setattr(packed_trainer, "deactivate_neftune", deactivated)
    return seen


def with_noise(seen):
    """A model whose passes over what was seen have its noise, in turn."""
    model, left = small_model(), list(seen)

    def add(module, inputs, output):
        if left and left[0][0].shape == inputs[0].shape and torch.equal(left[0][0], inputs[0]):
            return output + left.pop(0)[1].to(output.dtype)
        return output

    model.get_input_embeddings().register_forward_hook(add)
    return model, left


@pytest.mark.parametrize(
    ("trainer_class", "changes", "method"),
    [
        (NaiveMixTrainer, {"sft_weight": 0.7}, {"sft_weight": lambda step: 0.7}),
        (AlternatingTrainer, {"first": "sft", "max_steps": 4}, {}),
    ],
)
def test_updates_are_those_of_noisy_demonstrations_and_plain_rollouts(tmp_path, noise, trainer_class, changes, method):
    trainer = trained(recording(trainer_class), tmp_path, neftune_noise_alpha=ALPHA, **changes)
    assert all(bool(added.any()) for _, added in noise)
    model, left = with_noise(noise)
    replay(trainer, model, **method)
    assert noise and not left


def test_it_is_of_the_size_that_transformers_gives_it(tmp_path, noise):
    trained(NaiveMixTrainer, tmp_path, neftune_noise_alpha=ALPHA, max_steps=1)
    for ids, added in noise:
        bound = ALPHA / math.sqrt(ids.size(1) * added.size(2))
        assert 0.9 * bound < added.abs().max() <= bound * (1 + 1e-5)
        assert added.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.1)


def test_bridge_has_it_in_its_sft_pass_alone(tmp_path, noise):
    trainer = small_trainer(tmp_path, neftune_noise_alpha=ALPHA, max_steps=2)
    passes = []
    trainer.model.get_input_embeddings().register_forward_hook(lambda *args: passes.append(args[1][0].shape))
    plain = small_trainer(tmp_path / "plain", max_steps=2)
    trainer.train()
    plain.train()
    accumulation = trainer.args.gradient_accumulation_steps
    assert len(noise) == 2 * accumulation < len(passes)
    # The first update's rollouts and scores know nothing of it: policy and shadow are one then, so their gain is zero.
    assert trainer.state.log_history[0]["bridge/gain"] == plain.state.log_history[0]["bridge/gain"] == 0
    assert not hasattr(trainer.model.get_input_embeddings(), "neftune_noise_alpha")


def test_it_is_gone_after_an_exception(tmp_path):
    trainer = make(NaiveMixTrainer, tmp_path, neftune_noise_alpha=ALPHA)

    def fails():
        raise MemoryError

    packs = trainer._packs
    with pytest.raises(MemoryError):
        trainer.under_noise(trainer.model, fails)
    assert trainer._packs == packs and not hasattr(trainer.model.get_input_embeddings(), "neftune_noise_alpha")


def test_resumes_bit_for_bit(tmp_path):
    assert_resumes(NaiveMixTrainer, tmp_path, [1, 2], max_steps=3, neftune_noise_alpha=ALPHA)


def test_what_would_read_noisy_likelihoods_is_refused(tmp_path):
    with pytest.raises(
        NotImplementedError, match="`sft_weighting='judge'`, whose likelihoods would be those of noisy"
    ):
        small_config(tmp_path, neftune_noise_alpha=ALPHA, sft_weighting="judge")
    with pytest.raises(NotImplementedError, match="`preset='selective'`, whose likelihoods would be those of noisy"):
        small_config(tmp_path, neftune_noise_alpha=ALPHA, preset="selective")
    small_config(tmp_path, neftune_noise_alpha=ALPHA, preset="selective", sft_weighting="verdict")
    with pytest.raises(NotImplementedError, match="of which the experts' rows are a part here"):
        LUFFYConfig(str(tmp_path), neftune_noise_alpha=ALPHA, use_cpu=True, bf16=False)


def test_a_trial_has_it_too(tmp_path, noise):
    make(NaiveMixTrainer, tmp_path, neftune_noise_alpha=ALPHA, trial_steps=2, trial_prompts=2, max_steps=1).train()
    assert len(noise) == 3 * 2


def test_two_stage_has_it_in_its_cold_start_alone(tmp_path):
    weights = {}
    for alpha in (None, ALPHA):
        for rate in (0.0, 2e-3):
            trainer = two_stage(tmp_path / f"{alpha}-{rate}", neftune_noise_alpha=alpha, sft_learning_rate=rate)
            trainer.train()
            weights[alpha, rate] = dict(trainer._second.model.state_dict())
            first = LlamaForCausalLM.from_pretrained(tmp_path / f"{alpha}-{rate}" / "sft").state_dict()
            weights[alpha, rate, "sft"] = dict(first)
    assert_same(weights[ALPHA, 0.0], weights[None, 0.0])
    with pytest.raises(AssertionError):
        assert_same(weights[ALPHA, 2e-3, "sft"], weights[None, 2e-3, "sft"])

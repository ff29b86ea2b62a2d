import math

import pytest
import torch

from trl_bridge.objectives.expert import SHAPINGS, published_sft_scale, reduce_tokens, shaped_probability


PROBABILITIES = torch.tensor([[1e-4, 0.02, 0.1], [0.4, 0.9, 1.0]], dtype=torch.float64)


def gradient(shaping, log_probs, **options):
    """Derivative of the sum of the shaped values, by log-probability."""
    log_probs = log_probs.clone().requires_grad_()
    (found,) = torch.autograd.grad(shaped_probability(log_probs, shaping, **options).sum(), log_probs)
    return found


@pytest.mark.parametrize("gamma", [0.1, 0.5])
def test_gradient_of_f_in_closed_form(gamma):
    found = gradient("p_div_p", PROBABILITIES.log(), gamma=gamma)
    expected = gamma * PROBABILITIES / (PROBABILITIES + gamma) ** 2
    assert torch.allclose(found, expected, rtol=1e-12, atol=0)


def test_f_pulls_most_at_gamma_and_little_at_one():
    p = torch.tensor([0.05, 0.1, 0.2, 1.0], dtype=torch.float64)
    found = gradient("p_div_p", p.log(), gamma=0.1)
    assert found.argmax() == 1
    assert found[1].item() == pytest.approx(0.25, rel=1e-12)
    assert found[3].item() == pytest.approx(0.1 / 1.1**2, rel=1e-12)


def test_values_by_hand():
    p = torch.tensor([[0.25]], dtype=torch.float64)
    expected = {
        "p_div_p": 0.25 / 0.35,
        "none": 0.25,
        "logp": math.log(0.25),
        "p_logp": 0.25 * math.log(0.25),
        "square_root": 0.5,
        "pow": 0.25**0.3,
        # 2 p / (q + w), w = q / 2 + 1 / (2 V)
        "rl_plus": 0.5 / (0.25 + 0.125 + 0.05),
    }
    assert set(expected) == set(SHAPINGS)
    for shaping, value in expected.items():
        found = shaped_probability(p.log(), shaping, exponent=0.3, vocab_size=10).item()
        assert found == pytest.approx(value, rel=1e-12), shaping


@pytest.mark.parametrize("shaping", SHAPINGS)
def test_gradients_against_finite_differences(shaping):
    options = {"gamma": 0.3, "exponent": 0.7, "vocab_size": 50}
    log_probs, step = PROBABILITIES.log() - 1e-3, 1e-6

    def value(moved):
        if shaping != "rl_plus":
            return shaped_probability(moved, shaping, **options)
        # Its denominator is detached: it stays where it is while the probability moves.
        return 2 * moved.exp() / (1.5 * log_probs.exp() + 0.01)

    expected = (value(log_probs + step) - value(log_probs - step)) / (2 * step)
    assert torch.allclose(gradient(shaping, log_probs, **options), expected, rtol=1e-7, atol=1e-9)


def test_rl_plus_of_the_released_code():
    p = torch.tensor([0.2], dtype=torch.float64)
    # w = (q + 1) / 2 there: a vocabulary of one.
    assert shaped_probability(p.log(), "rl_plus", vocab_size=1).item() == pytest.approx(0.4 / (0.2 + 0.6), rel=1e-12)


def test_unknown_shaping():
    with pytest.raises(ValueError, match="`policy_shaping` must be one of 'p_div_p', .*'p_div_q'"):
        shaped_probability(torch.zeros(1, 1), "p_div_q")


@pytest.fixture
def tokens():
    per_token = torch.tensor([[1.0, 2.0, math.inf], [4.0, math.nan, math.inf], [math.inf] * 3], dtype=torch.float64)
    mask = torch.tensor([[1, 1, 0], [1, 0, 0], [0, 0, 0]])
    return per_token, mask


@pytest.mark.parametrize(
    ("loss_type", "expected"),
    [("grpo", (1.5 + 4.0 + 0.0) / 3 / 2), ("dr_grpo", 7.0 / (3 * 10) / 2), ("dapo", 7.0 / 14)],
)
def test_reduction_by_hand(tokens, loss_type, expected):
    found = reduce_tokens(*tokens, loss_type, max_completion_length=10, accumulation_steps=2, num_items=14)
    assert found.item() == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("loss_type", ["dr_grpo", "dapo"])
def test_reduction_adds_up_over_micro_batches(tokens, loss_type):
    per_token, mask = tokens
    per_token, mask = per_token[:2], mask[:2]
    options = {"max_completion_length": 10, "num_items": torch.tensor(3.0)}
    whole = reduce_tokens(per_token, mask, loss_type, accumulation_steps=1, **options)
    rows = [
        reduce_tokens(per_token[row : row + 1], mask[row : row + 1], loss_type, accumulation_steps=2, **options)
        for row in range(2)
    ]
    assert sum(rows).item() == pytest.approx(whole.item(), rel=1e-12)


def test_unknown_loss_type(tokens):
    with pytest.raises(ValueError, match="`loss_type` must be one of 'grpo', 'dr_grpo', 'dapo', got 'bnpo'"):
        reduce_tokens(*tokens, "bnpo", max_completion_length=10, accumulation_steps=1, num_items=1)


def test_published_scale_of_the_sft_term():
    # One unit of the scripts' SFT coefficient: 6.4 pieces for 64 sequences at their own length.
    assert published_sft_scale(8192) == pytest.approx(0.1)
    assert published_sft_scale(1024) == pytest.approx(0.8)

import math

import pytest
import torch

from trl_bridge.objectives.expert import (
    SHAPINGS,
    entropy_weight,
    hint_probability,
    hint_stage,
    most_uncertain,
    prefix_advantages,
    published_sft_scale,
    reduce_tokens,
    sequence_entropy,
    shaped_probability,
    verdict_advantages,
)


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
    [
        *[(kind, (1.5 + 4.0 + 0.0) / 3 / 2) for kind in ("grpo", "sapo")],
        *[(kind, 7.0 / 14) for kind in ("dapo", "cispo", "vespo")],
        ("dr_grpo", 7.0 / (3 * 10) / 2),
        ("bnpo", 7.0 / 3 / 2),
        ("luspo", 7.0 / 3 / 2),
    ],
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
    with pytest.raises(ValueError, match="`loss_type='ppo'` is not one of TRL's"):
        reduce_tokens(*tokens, "ppo", max_completion_length=10, accumulation_steps=1, num_items=1)


def test_published_scale_of_the_sft_term():
    # One unit of the scripts' SFT coefficient: 6.4 pieces for 64 sequences at their own length.
    assert published_sft_scale(8192) == pytest.approx(0.1)
    assert published_sft_scale(1024) == pytest.approx(0.8)


# Hints (UFT)


@pytest.mark.parametrize(
    ("step", "probability"),
    [
        (0, 0.05 + 0.45 * (1 + math.cos(math.pi / 300))),
        (149, 0.5),
        (199, 0.05 + 0.45 * (1 - 0.5)),
        (299, 0.05),
        (300, 0.0),
        (10_000, 0.0),
    ],
)
def test_probability_at_chosen_updates(step, probability):
    assert hint_probability(step, 0.95, 0.05, 300) == pytest.approx(probability, abs=1e-12)


def test_probability_falls_and_needs_no_updates():
    values = [hint_probability(step, 0.95, 0.05, 300) for step in range(301)]
    assert all(later < earlier for earlier, later in zip(values, values[1:], strict=False))
    assert hint_probability(0, 0.95, 0.05, 0) == 0.0


def test_staircase():
    # 300 updates, 6 stairs of 50, counted from 1: the published floor shortens the first one by an update.
    shown = [hint_stage(step, 5, 300) for step in range(302)]
    assert [shown.count(pieces) for pieces in range(6)] == [53, 50, 50, 50, 50, 49]
    assert shown == sorted(shown, reverse=True)
    assert (shown[48], shown[49], shown[299], shown[300]) == (5, 4, 0, 0)
    # Fewer updates than stairs.
    assert [hint_stage(step, 5, 3) for step in range(4)] == [4, 3, 2, 0]


# Prefixes (Prefix-RFT)


NAN = math.nan


@pytest.mark.parametrize(
    ("rewards", "continuation", "own", "prefix"),
    [
        ([0, 0, 1, 1], "reward", [-1 / 3, -1 / 3, 2 / 3, 1], 2 / 3),
        ([0, 0, 1, 1], "none", [-1 / 3, -1 / 3, 2 / 3, 0], 2 / 3),
        ([0, 0, 0, 1], "reward", [0, 0, 0, 1], 1),
        ([1, 1, 1, 0], "reward", [0, 0, 0, 0], -1),
        ([1, NAN, 0, 2], "reward", [0.5, 0, -0.5, 2], 1.5),
        ([1, 0, 0, NAN], "reward", [2 / 3, -1 / 3, -1 / 3, 0], 0),
        ([NAN, NAN, NAN, 1], "reward", [0, 0, 0, 1], 0),
    ],
)
def test_advantages_from_raw_rewards(rewards, continuation, own, prefix):
    got_own, got_prefix = prefix_advantages(torch.tensor([rewards], dtype=torch.float64), "none", continuation)
    assert got_own.tolist() == [pytest.approx(own, abs=1e-12)]
    assert got_prefix.tolist() == [pytest.approx(prefix, abs=1e-12)]


def test_only_pure_rows_are_scaled():
    rewards = torch.tensor([[0.0, 2.0, 4.0, 5.0], [1.0, 1.0, 1.0, 3.0]], dtype=torch.float64)
    own, prefix = prefix_advantages(rewards, "group", "reward")
    assert own[0].tolist() == pytest.approx([-2 / 2.0001, 0, 2 / 2.0001, 5])
    assert own[1].tolist() == [0, 0, 0, 3]
    assert prefix.tolist() == [3, 2]


def test_bad_choices_are_refused():
    with pytest.raises(ValueError, match="`scale_rewards`"):
        prefix_advantages(torch.zeros(1, 4), "batch", "reward")
    with pytest.raises(ValueError, match="`continuation`"):
        prefix_advantages(torch.zeros(1, 4), "none", "mean")


def test_the_most_uncertain_of_the_masked_tokens():
    entropies = torch.tensor([[9.0, 0.1, 0.5, 0.2, 9.0], [9.0, 0.3, 0.9, 0.4, 9.0]])
    mask = torch.tensor([[0, 1, 1, 1, 0], [0, 1, 1, 1, 0]]).bool()
    kept = {share: most_uncertain(entropies, mask, share).nonzero().tolist() for share in (0.0, 0.2, 0.5, 1.0)}
    assert kept[0.0] == []
    # floor(6 * 0.8) = 4 are left out, and floor(6 * 0.5) = 3.
    assert kept[0.2] == [[0, 2], [1, 2]]
    assert kept[0.5] == [[0, 2], [1, 2], [1, 3]]
    assert kept[1.0] == mask.nonzero().tolist()


@pytest.mark.parametrize(
    ("count", "share", "kept"), [(10, 0.9, 9), (10, 0.2, 2), (5, 0.2, 1), (4, 0.2, 1), (1, 0.2, 1)]
)
def test_number_kept(count, share, kept):
    assert most_uncertain(torch.rand(1, count), torch.ones(1, count).bool(), share).sum() == kept


def test_ties_and_nothing_to_rank():
    entropies = torch.tensor([[1.0, 1.0, 1.0], [1.0, 2.0, 1.0]])
    everything = torch.ones(2, 3).bool()
    assert most_uncertain(entropies, everything, 0.5).nonzero().tolist() == [[0, 0], [0, 1], [1, 1]]
    assert not most_uncertain(entropies, ~everything, 0.5).any()


# Entropy and verdicts (SRFT)


def test_entropy_is_a_mean_over_the_sequence():
    entropies = torch.tensor([[1.0, 2.0, math.nan], [0.5, 9.0, 9.0], [9.0, 9.0, 9.0]], requires_grad=True)
    mask = torch.tensor([[1, 1, 0], [1, 0, 0], [0, 0, 0]])
    found = sequence_entropy(entropies, mask)
    assert found.tolist() == [[1.5], [0.5], [0.0]]
    assert not found.requires_grad


@pytest.mark.parametrize(("sign", "expected"), [(-1, [0.5, 0.5 * math.exp(-2.0)]), (1, [0.5, 0.5 * math.exp(2.0)])])
def test_weight_by_hand(sign, expected):
    entropy = torch.tensor([[0.0], [2.0]], dtype=torch.float64, requires_grad=True)
    found = entropy_weight(entropy, 0.5, sign)
    assert found.flatten().tolist() == pytest.approx(expected, rel=1e-12)
    assert not found.requires_grad


def test_advantages_by_verdict():
    log_probs = torch.tensor([[-0.1, -11.0], [-0.1, -11.0], [-0.1, -11.0], [-10.0, -10.1]], requires_grad=True)
    verdicts = torch.tensor([1.0, -1.0, 0.0, -1.0])
    weights = torch.tensor([[0.2], [0.3], [0.4], [0.5]])
    found = verdict_advantages(log_probs, verdicts, weights, -10.0)
    # The right sample keeps its improbable token, the wrong ones' are held back.
    assert torch.equal(found, torch.tensor([[0.2, 0.2], [-1.0, 0.0], [0.0, 0.0], [-1.0, 0.0]]))
    assert not found.requires_grad
    unguarded = verdict_advantages(log_probs, verdicts, weights, None)
    assert torch.equal(unguarded, torch.tensor([[0.2, 0.2], [-1.0, -1.0], [0.0, 0.0], [-1.0, -1.0]]))

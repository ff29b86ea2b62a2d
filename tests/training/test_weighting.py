import io
import math
import pickle

import pytest
import torch

from trl_bridge.objectives import weights as rules
from trl_bridge.training.weighting import DemonstrationWeighting


KINDS = ("none", "likelihood", "likelihood_sequence", "phi", "judge", "verdict", "judge_verdict")
NORMALISED = KINDS[1:4]


def window_of(seed, demonstrations=8, length=5):
    """Log-probabilities, mask and rows of a window's demonstrations, and its rollouts."""
    generator = torch.Generator().manual_seed(seed)
    log_probs = -6 * torch.rand(demonstrations, length, generator=generator, dtype=torch.float64)
    lengths = torch.randint(1, length + 1, (demonstrations, 1), generator=generator)
    rows = torch.randint(0, 12, (demonstrations,), generator=generator).tolist()
    s = (-20 * torch.rand(16, generator=generator, dtype=torch.float64)).tolist()
    pairs = [(value, float(value > -10)) for value in s]
    return log_probs, torch.arange(length) < lengths, rows, pairs


def verdict_of(row, call):
    """A verifier that is right most of the time: its nth verdict on a row."""
    return int((row % 2 == 0) ^ ((row + call) % 5 == 0))


def run_window(ranks, seed, micro_batches=1):
    """
    One window as the trainer runs it, on simulated ranks (one weighting each).

    Returns the weights of all its demonstrations in the window's order.
    """
    log_probs, mask, rows, pairs = window_of(seed)
    world_size = len(ranks)
    slices = micro_batches * world_size
    size, share = len(rows) // slices, len(pairs) // slices
    parts = [slice(i * size, (i + 1) * size) for i in range(slices)]
    if ranks[0].needs_verdicts:
        due = ranks[0].visits_due(rows)
        for rank, weighting in enumerate(ranks):
            mine = [i for m in range(micro_batches) for i in range(len(rows))[parts[m * world_size + rank]]]
            asked = [rows[i] for i in mine for _ in range(due[i])]
            weighting.record_verdicts(asked, [verdict_of(row, seed) for row in asked])
        gathered = [pickle.loads(pickle.dumps(weighting.pending_verdicts())) for weighting in ranks]
        for weighting in ranks:
            weighting.fold_verdicts(gathered)
    for weighting in ranks:
        weighting.begin_window()
    if ranks[0].needs_initial_mean:
        raw = ranks[0].raw(log_probs, mask)
        counted = mask if raw.size(1) > 1 else torch.ones_like(mask[:, :1])
        for weighting in ranks:
            weighting.set_initial_mean(raw.sum().item(), counted.sum().item())
    output = []
    for micro_batch in range(micro_batches):
        for rank, weighting in enumerate(ranks):
            number = micro_batch * world_size + rank
            part = parts[number]
            weights = weighting.token_weights(log_probs[part], mask[part], rows[part], None)
            output.append(torch.ones(size, 1).double() if weights is None else weights)
            if weighting.needs_rollouts:
                weighting.observe_rollouts(pairs[number * share : (number + 1) * share])
    pending = [pickle.loads(pickle.dumps(weighting.pending())) for weighting in ranks]
    for weighting in ranks:
        weighting.end_window(pending)
    return torch.cat(output)


def make(kind, world_size=1, **options):
    return [DemonstrationWeighting(kind, **options) for _ in range(world_size)]


def saved(weighting):
    file = io.BytesIO()
    torch.save(weighting.state_dict(), file)
    file.seek(0)
    return torch.load(file, weights_only=True)


# What each kind needs


def test_needs():
    needs = {kind: make(kind)[0] for kind in KINDS}
    assert [kind for kind in KINDS if needs[kind].needs_rollouts] == ["judge", "judge_verdict"]
    assert [kind for kind in KINDS if needs[kind].needs_verdicts] == ["verdict", "judge_verdict"]
    assert [kind for kind in KINDS if needs[kind].needs_initial_mean] == list(NORMALISED)


def test_none_has_no_weight():
    (weighting,) = make("none")
    log_probs, mask, rows, _ = window_of(0)
    weighting.begin_window()
    assert weighting.raw(log_probs, mask) is None
    assert weighting.token_weights(log_probs, mask, rows, None) is None
    assert weighting.metrics() == {}


@pytest.mark.parametrize(
    ("options", "name"),
    [
        ({"kind": "likelyhood"}, "sft_weighting"),
        ({"kind": "judge", "judge_window": 0}, "judge_window"),
        ({"kind": "judge", "judge_penalty": 0.0}, "judge_penalty"),
        ({"kind": "judge", "judge_beta": -1.0}, "judge_beta"),
        ({"kind": "verdict", "verdict_calls": 0}, "verdict_calls"),
    ],
)
def test_arguments(options, name):
    with pytest.raises(ValueError, match=f"`{name}`"):
        DemonstrationWeighting(**options)


# Worked examples


def test_likelihood_worked_example():
    (weighting,) = make("likelihood")
    first = torch.tensor([[0.5, 0.25], [1.0, 0.3]]).log()
    mask = torch.tensor([[True, True], [True, False]])
    weighting.begin_window()
    weighting.set_initial_mean(1.75, 3)
    assert not weighting.needs_initial_mean
    weights = weighting.token_weights(first.requires_grad_(), mask, [0, 1], None)
    mean = 1.75 / 3
    assert torch.allclose(weights, torch.tensor([[0.5, 0.25], [1.0, 0.0]]) / mean)
    assert weights.dtype == first.dtype and not weights.requires_grad
    assert weights[mask].mean().item() == pytest.approx(1.0)
    weighting.end_window([weighting.pending()])

    # The second window divides by the first's mean, the third by that of both: each token counts once.
    second, one = torch.tensor([[0.9]]).log(), torch.tensor([[True]])
    weighting.begin_window()
    assert weighting.token_weights(second, one, [2], None).item() == pytest.approx(0.9 / mean)
    weighting.end_window([weighting.pending()])
    weighting.begin_window()
    assert weighting.token_weights(second, one, [2], None).item() == pytest.approx(0.9 / (2.65 / 4))


def test_sequence_likelihood_counts_demonstrations():
    (weighting,) = make("likelihood_sequence")
    log_probs = torch.tensor([[0.5, 0.25], [1.0, 0.3]]).log()
    mask = torch.tensor([[True, True], [True, False]])
    weighting.begin_window()
    weighting.set_initial_mean(1.125, 2)
    weights = weighting.token_weights(log_probs, mask, [0, 1], None)
    assert torch.allclose(weights, torch.tensor([[0.125], [1.0]]) / 0.5625)
    assert weighting.pending()["raw_count"] == 2


def test_phi_worked_example():
    (weighting,) = make("phi")
    log_probs, mask = torch.tensor([[0.5, 0.9]]).log(), torch.tensor([[True, True]])
    weighting.begin_window()
    weighting.set_initial_mean(0.34, 2)
    assert torch.allclose(weighting.token_weights(log_probs, mask, [0], None), torch.tensor([[0.25, 0.09]]) / 0.17)


def test_likelihoods_below_every_float_give_weight_one():
    (weighting,) = make("likelihood_sequence")
    log_probs, mask = torch.full((2, 3), -400.0), torch.ones(2, 3, dtype=torch.bool)
    weighting.begin_window()
    weighting.set_initial_mean(weighting.raw(log_probs, mask).sum().item(), 2)
    assert weighting.token_weights(log_probs, mask, [0, 1], None).tolist() == [[1.0], [1.0]]


def test_judge_worked_example():
    (weighting,) = make("judge", judge_beta=2.0, judge_penalty=0.5)
    log_probs, mask, rows, pairs = window_of(0)
    assert torch.equal(run_window([weighting], 0), torch.ones(8, 1).double())
    fit = rules.fit_judge([s for s, _ in sorted(pairs)], [r for _, r in sorted(pairs)], 0.5)
    weighting.begin_window()
    assert weighting.metrics() == {"sft/judge_slope": fit.b1}
    s = (log_probs * mask).sum(dim=1)
    weights = weighting.token_weights(log_probs, mask, rows, None)
    assert torch.allclose(weights, rules.judge_weight(s, fit, 2.0)[:, None])
    # At another temperature it is the given likelihood that counts.
    tempered = weighting.token_weights(log_probs, mask, rows, s - 15)
    assert torch.allclose(tempered, rules.judge_weight(s - 15, fit, 2.0)[:, None])
    assert tempered.max() < 0.1 < 0.8 < weights.max()


def test_judge_by_token():
    (weighting,) = make("judge", judge_per_token=True)
    run_window([weighting], 0)
    weighting.begin_window()
    pairs = sorted(window_of(0)[3])
    fit = rules.fit_judge(*zip(*pairs, strict=True), 1.0)
    log_probs, mask = torch.tensor([[-4.0, -5.0, -6.0, -9.0], [-4.0, -9.0, -9.0, -9.0]]), torch.ones(2, 4) > 0
    mask[0, 3], mask[1, 1:] = False, False
    means = torch.tensor([-5.0, -4.0])
    assert torch.allclose(
        weighting.token_weights(log_probs, mask, [0, 1], None)[:, 0].double(), rules.judge_weight(means, fit, 4.0)
    )
    tempered = weighting.token_weights(log_probs, mask, [0, 1], torch.tensor([-21.0, -8.0]))
    assert torch.allclose(tempered[:, 0].double(), rules.judge_weight([-7.0, -8.0], fit, 4.0))


def test_judge_sees_the_last_windows_but_not_its_own():
    (weighting,) = make("judge", judge_window=2)
    for seed in range(4):
        run_window([weighting], seed)
    pairs = sorted(window_of(2)[3] + window_of(3)[3])
    weighting.begin_window()
    assert weighting.metrics()["sft/judge_slope"] == rules.fit_judge(*zip(*pairs, strict=True), 1.0).b1


def test_a_window_without_new_rollouts_is_a_window():
    (weighting,) = make("judge", judge_window=2)
    run_window([weighting], 0)
    for _ in range(2):
        weighting.begin_window()
        assert "sft/judge_slope" in weighting.metrics()
        weighting.end_window([weighting.pending()])
    weighting.begin_window()
    assert weighting.metrics() == {}


@pytest.mark.parametrize("pair", [(math.nan, 1.0), (-math.inf, 0.0), (-3.0, math.nan)])
def test_rollouts_must_be_finite(pair):
    with pytest.raises(ValueError, match="not finite"):
        make("judge")[0].observe_rollouts([pair])


def test_visits_due():
    (weighting,) = make("verdict", verdict_calls=2)
    assert weighting.visits_due([4, 7, 4]) == [3, 3, 2]
    assert weighting.visits_due([4]) == [3]  # nothing is recorded by asking
    weighting.record_verdicts([4, 4, 4], [1, 0, 1])
    assert weighting.pending_verdicts() == [(4, 3, 2)]
    weighting.fold_verdicts([weighting.pending_verdicts()])
    assert weighting.pending_verdicts() == []
    assert weighting.visits_due([4, 7]) == [2, 3]


def test_verdict_worked_example():
    (weighting,) = make("verdict")
    weighting.fold_verdicts([[(0, 2, 2), (1, 2, 0)], [(2, 2, 1), (0, 2, 2), (3, 1, 1)]])
    weighting.begin_window()
    eps = rules.flip_rate([4, 2, 2], [4, 0, 1])
    assert weighting.metrics() == {"sft/verdict_flip_rate": eps}
    prior = rules.verdict_prior([4, 2, 2, 1], [4, 0, 1, 1], eps)
    log_probs, mask = torch.zeros(3, 2), torch.ones(3, 2, dtype=torch.bool)
    weights = weighting.token_weights(log_probs, mask, [2, 0, 3], None)
    assert torch.allclose(weights, rules.verdict_weight([2, 4, 1], [1, 4, 1], eps, prior)[:, None].float())


def test_judge_verdict_is_the_product():
    product, judge, verdict = make("judge_verdict")[0], make("judge")[0], make("verdict")[0]
    for seed in range(3):
        weights = [run_window([weighting], seed) for weighting in (product, judge, verdict)]
        assert torch.equal(weights[0], weights[1] * weights[2])
    assert not torch.equal(weights[0], weights[1]) and not torch.equal(weights[0], weights[2])


# What must change nothing


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("world_size", "micro_batches"), [(1, 4), (2, 2), (4, 1), (8, 1)])
def test_split_and_ranks_change_nothing(kind, world_size, micro_batches):
    one, many = make(kind), make(kind, world_size)
    for seed in range(5):
        whole, split = run_window(one, seed), run_window(many, seed, micro_batches)
        # The judge and the verdicts are equal to the bit; the normalised kinds' sums round differently.
        assert torch.allclose(whole, split, rtol=1e-13 if kind in NORMALISED else 0, atol=0)
        assert one[0].metrics() == many[0].metrics()


@pytest.mark.parametrize("kind", KINDS)
def test_ranks_hold_the_same_state(kind):
    ranks = make(kind, 2)
    for seed in range(4):
        run_window(ranks, seed, 2)
        ours, theirs = saved(ranks[0]), saved(ranks[1])
        assert ours.keys() == theirs.keys()
        assert torch.equal(ours["verdicts"], theirs["verdicts"])
        assert all(torch.equal(*pair) for pair in zip(ours["rollouts"], theirs["rollouts"], strict=True))
        assert all(ours[name] == theirs[name] for name in ("options", "total", "count"))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("before", [0, 1, 3])
def test_resume_changes_nothing(kind, before):
    straight, first = make(kind, judge_window=2), make(kind, judge_window=2)
    for seed in range(before):
        run_window(straight, seed)
        run_window(first, seed)
    resumed = make(kind, judge_window=2)
    resumed[0].load_state_dict(saved(first[0]))
    for seed in range(before, before + 3):
        assert torch.equal(run_window(straight, seed), run_window(resumed, seed))
        assert straight[0].metrics() == resumed[0].metrics()


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("judge_window", 3),
        ("judge_beta", 1.0),
        ("judge_penalty", 2.0),
        ("judge_per_token", True),
        ("verdict_calls", 2),
        ("kind", "judge"),
    ],
)
def test_resume_with_other_options_is_refused_by_name(option, value):
    state = DemonstrationWeighting("judge_verdict").state_dict()
    name = "sft_weighting" if option == "kind" else option
    with pytest.raises(ValueError, match=f"`{name}="):
        DemonstrationWeighting(**{"kind": "judge_verdict", option: value}).load_state_dict(state)


def test_saving_inside_a_window_is_refused():
    (weighting,) = make("judge")
    weighting.begin_window()
    weighting.observe_rollouts([(-3.0, 1.0)])
    with pytest.raises(RuntimeError, match="inside an accumulation window"):
        weighting.state_dict()
    weighting.end_window([weighting.pending()])
    assert len(weighting.state_dict()["rollouts"]) == 1


# Edges


@pytest.mark.parametrize("kind", KINDS[1:])
def test_a_batch_that_stands_in_for_none_leaves_no_trace(kind):
    (weighting,) = make(kind)
    weighting.begin_window()
    weights = weighting.token_weights(torch.zeros(1, 3), torch.zeros(1, 3, dtype=torch.bool), [], None)
    assert weights.tolist() == [[1.0]]
    assert weighting.pending() == {"rollouts": [], "raw_total": 0.0, "raw_count": 0.0}


def test_the_first_window_needs_its_mean():
    (weighting,) = make("likelihood")
    log_probs, mask, rows, _ = window_of(0)
    weighting.begin_window()
    with pytest.raises(RuntimeError, match="set_initial_mean"):
        weighting.token_weights(log_probs, mask, rows, None)
    with pytest.raises(ValueError, match="`count` must be above 0"):
        weighting.set_initial_mean(0.0, 0.0)

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from trl_bridge.objectives.lm_head import Head, student_scores, teacher_scores


VOCABULARY, WIDTH, TOKENS, K = 11, 6, 7, 3
VARIANTS = {
    "plain": {},
    "bias": {"bias": torch.linspace(-1, 1, VOCABULARY, dtype=torch.float64)},
    "scale": {"scale": 0.25},
    "softcap": {"softcap": 1.5},
    "all": {"scale": 3.0, "softcap": 2.0, "temperature": 0.7},
}


def make(seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(TOKENS, WIDTH, generator=generator, dtype=dtype)
    weight = torch.randn(VOCABULARY, WIDTH, generator=generator, dtype=dtype)
    ids = torch.randint(VOCABULARY, (TOKENS,), generator=generator)
    return hidden.requires_grad_(), weight.requires_grad_(), ids


def by_hand(hidden, weight, bias=None, scale=1.0, softcap=None, temperature=1.0):
    """Log-probabilities with all logits at once."""
    logits = hidden @ weight.T
    if bias is not None:
        logits = logits + bias
    logits = logits * scale
    if softcap is not None:
        logits = softcap * (logits / softcap).tanh()
    return torch.log_softmax(logits / temperature, -1)


@pytest.mark.parametrize("chunk", [1, 3, 7, None])
@pytest.mark.parametrize("variant", VARIANTS)
def test_scores_and_gradients_are_those_of_the_whole_logits(variant, chunk):
    options = VARIANTS[variant]
    hidden, weight, ids = make()
    top_ids = torch.stack([ids, (ids + 1) % VOCABULARY, (ids + 4) % VOCABULARY], 1)
    coefficients = torch.linspace(-1, 2, TOKENS, dtype=torch.float64)

    def total(sampled, top):
        return (coefficients * sampled).sum() + (coefficients[:, None] * top**2).sum()

    log_p = by_hand(hidden, weight, **options)
    wanted = log_p.gather(1, ids[:, None]).squeeze(1), log_p.gather(1, top_ids)
    gradients = torch.autograd.grad(total(*wanted), (hidden, weight))
    scores = student_scores(hidden, ids, top_ids, Head(weight, **options), chunk)
    assert torch.allclose(scores.log_probs, wanted[0], rtol=0, atol=1e-13)
    assert torch.allclose(scores.top_log_probs, wanted[1], rtol=0, atol=1e-13)
    assert torch.allclose(scores.entropy, -(log_p.exp() * log_p).sum(-1), rtol=0, atol=1e-13)
    assert not scores.entropy.requires_grad
    for found, want in zip(torch.autograd.grad(total(*scores[:2]), (hidden, weight)), gradients, strict=True):
        assert torch.allclose(found, want, rtol=0, atol=1e-13)


@pytest.mark.parametrize("chunk", [2, None])
def test_the_teachers_likeliest_tokens(chunk):
    hidden, weight, ids = make()
    scores = teacher_scores(hidden, ids, Head(weight, scale=0.5), K, chunk)
    log_p = by_hand(hidden, weight, scale=0.5).detach()
    top = log_p.sort(dim=-1, descending=True)
    assert torch.equal(scores.top_ids, top.indices[:, :K])
    assert torch.allclose(scores.top_log_probs, top.values[:, :K], rtol=0, atol=1e-13)
    assert torch.allclose(scores.log_probs, log_p.gather(1, ids[:, None]).squeeze(1), rtol=0, atol=1e-13)
    assert not any(part.requires_grad for part in scores)


def test_more_likeliest_tokens_than_there_are():
    hidden, weight, ids = make()
    scores = teacher_scores(hidden, ids, Head(weight), VOCABULARY + 5)
    assert scores.top_ids.shape == (TOKENS, VOCABULARY)
    assert torch.allclose(scores.top_log_probs.exp().sum(-1), torch.ones(TOKENS, dtype=torch.float64))
    assert teacher_scores(hidden, ids, Head(weight)).top_ids.shape == (TOKENS, 0)


def test_no_token_keeps_the_graph():
    hidden, weight, ids = make()
    scores = student_scores(hidden[:0], ids[:0], torch.empty(0, K, dtype=torch.long), Head(weight))
    assert scores.log_probs.shape == (0,) and scores.top_log_probs.shape == (0, K)
    found = torch.autograd.grad(scores.log_probs.sum() + scores.top_log_probs.sum(), (hidden, weight))
    assert all(torch.equal(part, torch.zeros_like(part)) for part in found)


def test_scores_are_float32_under_autocast():
    hidden, weight, ids = make(dtype=torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        scores = student_scores(hidden, ids, ids[:, None], Head(weight))
        teacher = teacher_scores(hidden.bfloat16(), ids, Head(weight.bfloat16()))
    assert torch.allclose(scores.log_probs, by_hand(hidden, weight).gather(1, ids[:, None]).squeeze(1), atol=1e-5)
    assert teacher.log_probs.dtype == torch.float32


class Largest(TorchDispatchMode):
    """Number of elements of the largest tensor that is made."""

    size = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(tensor, torch.Tensor):
                self.size = max(self.size, tensor.numel())
        return out


def test_whole_logits_are_never_there():
    tokens, vocabulary, width, chunk = 64, 500, 2, 4
    hidden = torch.randn(tokens, width, requires_grad=True)
    weight = torch.randn(vocabulary, width, requires_grad=True)
    ids = torch.zeros(tokens, dtype=torch.long)
    kept = []
    with (
        Largest() as largest,
        torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.numel()) or t, lambda t: t),
    ):
        teacher = teacher_scores(hidden, ids, Head(weight), K, chunk)
        scores = student_scores(hidden, ids, teacher.top_ids, Head(weight), chunk)
    # Between the forward and the backward pass nothing of a chunk's logits is left.
    assert max(kept, default=0) <= max(tokens * width, vocabulary * width)
    with largest:
        (scores.log_probs.sum() + scores.top_log_probs.sum()).backward()
    assert largest.size <= max(chunk * vocabulary, vocabulary * width) < tokens * vocabulary / 4

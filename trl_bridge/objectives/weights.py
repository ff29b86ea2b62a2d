"""
Weights of demonstrations: how much of each one the SFT term takes in.

All functions compute in float64 and return tensors without gradient.
"""

import dataclasses
from collections.abc import Sequence

import torch


Numbers = torch.Tensor | Sequence[float] | Sequence[int]

_NEWTON_STEPS = 4
# Floors of the judge: the smoothing of the start's logit, of the intercept's curvature, of the spread, of the ratio.
_RATE_SMOOTHING = 0.01
_INTERCEPT_DAMPING = 1e-3
_STD_FLOOR = 1e-6
_RATIO_SMOOTHING = 1e-3
# Bounds of the estimated flip rate and prior of the verdict.
MIN_FLIP_RATE, MAX_FLIP_RATE = 1e-4, 0.45
MIN_PRIOR, MAX_PRIOR = 0.01, 0.99


def _double(values: Numbers) -> torch.Tensor:
    return torch.as_tensor(values).detach().double()


def token_likelihood(log_probs: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """
    Probability of each demonstrated token, `p = pi(y_t | x, y_<t)`.

    Shapes: `log_probs` (B, T), `mask` (B, T), returns (B, T).
    """
    return _double(log_probs).exp().masked_fill(~mask, 0.0)


def sequence_likelihood(log_probs: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """
    Probability of each whole completion, `pi(y | x)`.

    It falls exponentially with the length: meant for short completions.

    Shapes: `log_probs` (B, T), `mask` (B, T), returns (B, 1).
    """
    return _double(log_probs).masked_fill(~mask, 0.0).sum(dim=1, keepdim=True).exp()


def phi(log_probs: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """
    `p (1 - p)` of each demonstrated token: high where the policy is undecided.

    Source: "On-Policy RL Meets Off-Policy Experts: Harmonizing SFT and RL via Dynamic Weighting" (CHORD), the weight
    phi.

    Shapes: `log_probs` (B, T), `mask` (B, T), returns (B, T).
    """
    log_probs = _double(log_probs)
    return (log_probs.exp() * -torch.expm1(log_probs)).masked_fill(~mask, 0.0)


def trapo(log_probs: torch.Tensor, mask: torch.Tensor, bound: float = 0.1) -> torch.Tensor:
    """
    `p / max(p, bound)` of each demonstrated token: 1 for tokens that the policy finds likely, less for the others.

    The NLL's gradient is `-1/p` times `grad p`, which grows without bound for unlikely tokens. TRAPO puts
    `-1/max(p, bound)` in its place; on the NLL itself that is the weight returned here. (`1/max(p, bound)` as a weight
    of the NLL would do the opposite: raise unlikely tokens tenfold.)

    Source: "Trust-Region Adaptive Policy Optimization" (TRAPO, arXiv 2512.17636), trust-region SFT.

    Shapes: `log_probs` (B, T), `mask` (B, T), returns (B, T).
    """
    p = _double(log_probs).exp()
    return (p / p.clamp(min=bound)).masked_fill(~mask, 0.0)


@dataclasses.dataclass(frozen=True)
class JudgeFit:
    """A fitted judge: the reward that a log-likelihood `s` predicts, `sigmoid(b0 + b1 (s - mean) / std)`."""

    b0: float
    b1: float
    mean: float
    std: float
    low: float
    high: float
    base_rate: float


def fit_judge(s: Numbers, r: Numbers, penalty: float) -> JudgeFit | None:
    """
    Learn from rollouts what reward a log-likelihood predicts: a logistic regression with a penalised slope.

    Minimises `sum_j BCE(r_j, sigmoid(b0 + b1 z_j)) + penalty b1^2`, `z = (s - mean s) / std s`, by four Newton steps
    from `b0 = log((mean r + .01) / (1.01 - mean r))`, `b1 = 0`, with 1e-3 added to the intercept's curvature, which
    keeps the step finite where all rewards are equal.

    Shapes: `s` (N,), `r` (N,).
    """
    if not penalty > 0:
        raise ValueError(f"`judge_penalty` must be above 0 (the slope has no bound without it), got {penalty}.")
    s, r = _double(s), _double(r)
    if s.shape != r.shape:
        raise ValueError(f"`s` and `r` must have the same length, got {tuple(s.shape)} and {tuple(r.shape)}.")
    if s.numel() == 0:
        return None
    mean, base_rate = s.mean(), r.mean()
    std = s.std(correction=0) + _STD_FLOOR
    design = torch.stack([torch.ones_like(s), (s - mean) / std], dim=1)  # (N, 2)
    ridge = torch.tensor([0.0, 2 * penalty], dtype=s.dtype, device=s.device)
    damping = torch.tensor([_INTERCEPT_DAMPING, 0.0], dtype=s.dtype, device=s.device)
    start = torch.log((base_rate + _RATE_SMOOTHING) / (1 + _RATE_SMOOTHING - base_rate))
    b = torch.stack([start, torch.zeros_like(start)])
    for _ in range(_NEWTON_STEPS):
        p = torch.sigmoid(design @ b)  # (N,)
        gradient = design.T @ (p - r) + ridge * b
        hessian = design.T @ (design * (p * (1 - p))[:, None]) + torch.diag(ridge + damping)
        b = b - torch.linalg.solve(hessian, gradient)
    return JudgeFit(*(float(value) for value in (b[0], b[1], mean, std, s.min(), s.max(), base_rate)))


def judge_weight(s: Numbers, fit: JudgeFit | None, beta: float) -> torch.Tensor:
    """
    Judge's weight of demonstrations: one for what would be paid at least as well as the policy is, less for the rest.

    `J = min(1, (q + .001) / (mean r + .001))^beta`, with `q` the foretold reward of the demonstration's log-likelihood,
    clipped to the range that the rollouts have shown.

    Shapes: `s` (B,), returns (B,).
    """
    s = _double(s)
    if fit is None:
        return torch.ones_like(s)
    q = torch.sigmoid(fit.b0 + fit.b1 * (s.clamp(fit.low, fit.high) - fit.mean) / fit.std)
    return ((q + _RATIO_SMOOTHING) / (fit.base_rate + _RATIO_SMOOTHING)).clamp(max=1.0) ** beta


def flip_rate(n: Numbers, v: Numbers) -> float:
    """
    How often the verifier contradicts itself: the probability `eps` that a verdict is flipped.

    Two verdicts on one demonstration differ with probability `2 eps (1 - eps)`, estimated by the mean over
    demonstrations of `2 v (n - v) / (n (n - 1))`. Assumes that verdicts err independently from call to call.

    Shapes: `n` (N,), `v` (N,).
    """
    n, v = _double(n), _double(v)
    n, v = n[n >= 2], v[n >= 2]
    if n.numel() == 0:
        return MIN_FLIP_RATE
    differ = float((2 * v * (n - v) / (n * (n - 1))).mean())
    eps = (1 - max(0.0, 1 - 2 * differ) ** 0.5) / 2
    return min(max(eps, MIN_FLIP_RATE), MAX_FLIP_RATE)


def verdict_prior(n: Numbers, v: Numbers, eps: float) -> float:
    """
    Share of right demonstrations, read from noisy verdicts.

    Shapes: `n` (N,), `v` (N,).
    """
    n, v = _double(n), _double(v)
    n, v = n[n >= 1], v[n >= 1]
    if n.numel() == 0:
        return 0.5
    prior = (float((v / n).mean()) - eps) / (1 - 2 * eps)
    return min(max(prior, MIN_PRIOR), MAX_PRIOR)


def verdict_weight(n: Numbers, v: Numbers, eps: float, prior: float) -> torch.Tensor:
    """
    Posterior probability that a demonstration is right: `sigmoid(logit prior + (2 v - n) log((1 - eps) / eps))`.

    Shapes: `n` (B,), `v` (B,), returns (B,).
    """
    n, v = _double(n), _double(v)
    log_odds = torch.logit(torch.tensor(prior, dtype=torch.float64))
    evidence = torch.log(torch.tensor((1 - eps) / eps, dtype=torch.float64))
    return torch.sigmoid(log_odds + (2 * v - n) * evidence)

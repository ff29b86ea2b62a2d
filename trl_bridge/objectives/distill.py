"""On-policy distillation: losses of tokens that the student sampled, from its own and a teacher's log-probabilities."""

from typing import NamedTuple

import torch


AGGREGATIONS = ("token", "sequence")
# Estimators of a KL divergence from sampled tokens, in Schulman's names.
ESTIMATORS = ("k2", "k3")


class PolicyTerm(NamedTuple):
    """
    The policy-gradient loss of tokens, and what it is made of.

    Shapes: `loss` (N,), `advantages` (N,), `clipped` (N,).
    """

    loss: torch.Tensor
    advantages: torch.Tensor
    clipped: torch.Tensor


def policy_term(
    student_log_probs: torch.Tensor, teacher_log_probs: torch.Tensor, clip: float | None = None
) -> PolicyTerm:
    """
    `-A log P_S(y)` with the detached advantage `A = log P_T(y) - log P_S(y)`.

    Over tokens drawn from the student its expected gradient is that of the reverse KL divergence `KL(P_S || P_T)` at
    each position (on-policy distillation; Lightning OPD, arXiv 2604.13010, with stored teacher scores).

    Shapes: `student_log_probs` (N,), `teacher_log_probs` (N,).
    """
    advantages = teacher_log_probs - student_log_probs.detach()
    used = advantages if clip is None else advantages.clamp(-clip, clip)
    return PolicyTerm(-used * student_log_probs, advantages, used != advantages)


def sampled_kl(log_ratio: torch.Tensor, estimator: str) -> torch.Tensor:
    """
    `KL(P_S || P_T)` at tokens that the student sampled, as a loss, of `log P_S - log P_T`.

    `"k2"` is half of its square, whose expected gradient is that of the divergence (KDRL, arXiv 2506.02208, compares it
    with the other); `"k3"` is GRPO's own estimate, `P_T / P_S - log(P_T / P_S) - 1`, whose value is unbiased and whose
    gradient is not.

    Shapes: `log_ratio` (B, T), returns (B, T).
    """
    if estimator == "k2":
        return 0.5 * log_ratio.square()
    if estimator == "k3":
        return torch.exp(-log_ratio) + log_ratio - 1
    raise ValueError(f"`teacher_kl` must be one of {', '.join(map(repr, ESTIMATORS))}, got {estimator!r}.")


def imitation_term(
    student_log_probs: torch.Tensor,
    teacher_log_probs: torch.Tensor,
    normalize_by_k: bool = False,
    generalized: bool = False,
) -> torch.Tensor:
    """
    Forward KL divergence on the teacher's K likeliest tokens, `sum_S P_T (log P_T - log P_S)`; nothing is renormalised
    (AOPD, arXiv 2605.06387).

    With `Z` the teacher's mass on `S`, its gradient by the student's logits is `Z P_S(v) - P_T(v) [v in S]`, which is
    not zero at `P_S = P_T`: the term draws the student into `S`. The generalised divergence
    `sum_S P_T log(P_T / P_S) - P_T + P_S` has none there.

    Shapes: `student_log_probs` (N, K), `teacher_log_probs` (N, K), returns (N,).
    """
    p = teacher_log_probs.exp()
    terms = torch.where(p > 0, p * (teacher_log_probs - student_log_probs), 0.0)
    if generalized:
        terms = terms + torch.where(teacher_log_probs.isfinite(), student_log_probs.exp() - p, 0.0)
    total = terms.sum(-1)
    return total / max(1, teacher_log_probs.size(-1)) if normalize_by_k else total


def imitation_gate(
    student_log_probs: torch.Tensor, teacher_log_probs: torch.Tensor, tau: float, ties: bool
) -> torch.Tensor:
    """
    Tokens that are imitated instead of reinforced: `P_T(y) - P_S(y) < tau`, in probabilities (AOPD, arXiv 2605.06387).

    Shapes: `student_log_probs` (N,), `teacher_log_probs` (N,), returns (N,).
    """
    if abs(tau) >= 1:
        # Rounded to float32, a gap is -1 or 1 itself where one model is sure and the other one is not.
        return torch.full_like(student_log_probs, tau > 0, dtype=torch.bool)
    gap = teacher_log_probs.exp() - student_log_probs.detach().exp()
    return gap <= tau if ties else gap < tau


def aggregate(
    per_token: torch.Tensor,
    mask: torch.Tensor,
    how: str,
    *,
    num_items: torch.Tensor | float | None = None,
    num_rows: float | None = None,
) -> torch.Tensor:
    """
    One loss of many tokens.

    Shapes: `per_token` (B, T), `mask` (B, T).
    """
    masked = per_token.masked_fill(mask == 0, 0.0)
    if how == "token":
        return masked.sum() / (mask.sum().clamp(min=1) if num_items is None else num_items)
    if how == "sequence":
        means = masked.sum(-1) / mask.sum(-1).clamp(min=1)
        return means.sum() / (per_token.size(0) if num_rows is None else num_rows)
    raise ValueError(f"`loss_aggregation` must be one of {', '.join(map(repr, AGGREGATIONS))}, got {how!r}.")


def stored_teacher_terms(
    log_probs: torch.Tensor,
    teacher_log_probs: torch.Tensor,
    mask: torch.Tensor,
    clip: float | None,
    aggregation: str,
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """
    What each token adds to the loss of Lightning OPD (arXiv 2604.13010), before the division by a count.

    `-A_t log p(y_t)` with `A_t = sg[clamp(log p_T(y_t) - log p(y_t), -c, c)]` of the current policy `p`: its gradient is that
    of the paper's ratio `p / sg[p]`, which is one with one update per batch. The released program's clipping of that ratio
    then never acts, and is left out.

    Shapes: `log_probs` (B, T), `teacher_log_probs` (B, T), `mask` (B, T).
    """
    mask = mask.bool()
    teacher = teacher_log_probs.detach().to(log_probs.dtype).masked_fill(~mask, 0.0)
    term = policy_term(log_probs, teacher, clip)
    gap = term.advantages.masked_fill(~mask, 0.0)  # (B, T)
    terms = term.loss.masked_fill(~mask, 0.0)
    if aggregation == "sequence":
        terms = terms / mask.sum(dim=1, keepdim=True).clamp(min=1)
    sums = {
        "advantage": gap.sum(),
        "advantage_abs": gap.abs().sum(),
        "clipped": (term.clipped & mask).sum(),
        "teacher_logprob": teacher.sum(),
        "tokens": mask.sum(),
    }
    return terms, sums


def reference_weights(
    log_probs: torch.Tensor, reference_log_probs: torch.Tensor, mask: torch.Tensor
) -> dict[str, torch.Tensor]:
    """
    How far the policy has moved from the one that sampled, by the ratio `p / p_ref` of each token.

    Shapes: `log_probs` (B, T), `reference_log_probs` (B, T), `mask` (B, T).
    """
    ratio = (log_probs.detach() - reference_log_probs.to(log_probs.dtype)).exp().masked_fill(~mask.bool(), 0.0)
    return {"weight": ratio.sum(), "weight_squared": (ratio**2).sum()}

"""Lightning OPD's term: a policy gradient on stored rollouts, with the teacher's stored scores as reward."""

import torch

from .distill import policy_term


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

    Args:
        log_probs (`torch.Tensor` of shape `(B, T)`):
            Log-probability of each token under the policy, in nats; carries the graph.
        teacher_log_probs (`torch.Tensor` of shape `(B, T)`):
            The teacher's.
        mask (`torch.Tensor` of shape `(B, T)`):
            True at completion tokens.
        clip (`float`, *optional*):
            `c`. `None` does not clamp.
        aggregation (`str`):
            `"token"` weighs all tokens alike and wants the number of tokens as count; `"sequence"` weighs all sequences
            alike and wants the number of sequences.

    Returns:
        `tuple[torch.Tensor, dict[str, torch.Tensor]]`: the terms `(B, T)`, 0 outside of the mask, and detached scalar sums
        over the masked tokens: `advantage` and `advantage_abs` (before the clamp), `clipped` (tokens whose advantage was
        clamped), `teacher_logprob` and `tokens`.
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

    Args:
        log_probs (`torch.Tensor` of shape `(B, T)`):
            Log-probability of each token under the policy, in nats.
        reference_log_probs (`torch.Tensor` of shape `(B, T)`):
            The same of the model that sampled, at temperature 1.
        mask (`torch.Tensor` of shape `(B, T)`):
            True at completion tokens.

    Returns:
        `dict[str, torch.Tensor]`: detached scalar sums `weight` and `weight_squared`.
    """
    ratio = (log_probs.detach() - reference_log_probs.to(log_probs.dtype)).exp().masked_fill(~mask.bool(), 0.0)
    return {"weight": ratio.sum(), "weight_squared": (ratio**2).sum()}

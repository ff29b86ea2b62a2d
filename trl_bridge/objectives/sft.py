"""The SFT term: weighted negative log-likelihood of demonstrations."""

import torch


def demonstration_loss(
    log_probs: torch.Tensor,
    mask: torch.Tensor,
    weights: torch.Tensor | None,
    num_tokens: float | torch.Tensor,
    world_size: int = 1,
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """
    Weighted negative log-likelihood of one micro-batch of demonstrations.

    The sum is divided by the tokens of the whole accumulation window over all ranks, weight or no weight, so that the
    gradients of a window's micro-batches add up to one gradient that does not depend on how the window is split, and
    that low weights mean less SFT.

    Shapes: `log_probs` (B, T), `mask` (B, T), `weights` (B, T) or (B, 1).
    """
    nll = -log_probs.masked_fill(~mask, 0.0)  # (B, T)
    if weights is None:
        weighted = nll
        weights = torch.ones_like(nll)
    else:
        weights = weights.detach().to(nll.dtype).expand_as(nll)
        weighted = weights * nll
    loss = weighted.sum() / num_tokens * world_size
    sums = {
        "nll_sum": nll.detach().sum(),
        "weight_sum": weights.masked_fill(~mask, 0.0).sum(),
        "zero_sum": ((weights == 0) & mask).sum(),
        "tokens": mask.sum(),
    }
    return loss, sums

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

    Args:
        log_probs (`torch.Tensor` of shape `(B, T)`):
            Log-probability of each token, in nats.
        mask (`torch.Tensor` of shape `(B, T)`):
            True at trained tokens.
        weights (`torch.Tensor` of shape `(B, T)` or `(B, 1)`, *optional*):
            Weight of each token or demonstration, without gradient. `None` is one everywhere.
        num_tokens (`float` or `torch.Tensor`):
            Trained tokens of the whole window over all ranks.
        world_size (`int`, *optional*, defaults to `1`):
            Number of ranks. The product undoes the mean over ranks that data parallelism takes of gradients.

    Returns:
        `tuple[torch.Tensor, dict[str, torch.Tensor]]`: the scalar loss, and detached scalar sums over the trained
        tokens: `nll_sum` (unweighted, in nats), `weight_sum`, `zero_sum` (tokens of weight zero) and `tokens`.
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

"""SRFT's weights: a sequence's entropy sets how strongly it is learned from; its verdict, which way it is pushed."""

import torch


def sequence_entropy(entropies: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """
    Mean entropy of each sequence's tokens.

    Args:
        entropies (`torch.Tensor` of shape `(B, T)`):
            Entropy of the policy at each token, in nats.
        mask (`torch.Tensor` of shape `(B, T)`):
            1 at the sequence's tokens.

    Returns:
        `torch.Tensor` of shape `(B, 1)`: without gradient; 0 for a sequence without tokens.
    """
    total = entropies.detach().masked_fill(mask == 0, 0.0).sum(dim=1, keepdim=True)  # (B, 1)
    return total / mask.sum(dim=1, keepdim=True).clamp(min=1)


def entropy_weight(entropy: torch.Tensor, scale: float, sign: int) -> torch.Tensor:
    """
    `scale exp(sign H)`, without gradient.

    SRFT (arXiv 2506.19767) has `0.5 exp(-H)` on its SFT term and `0.1 exp(H)` on its own right samples.

    Args:
        entropy (`torch.Tensor` of shape `(B, 1)`):
            `H` of each sequence, in nats.
        scale (`float`):
            Weight at entropy 0.
        sign (`int`):
            1 (more at high entropy) or -1 (less).

    Returns:
        `torch.Tensor` of shape `(B, 1)`.
    """
    return scale * (sign * entropy.detach()).exp()


def verdict_advantages(
    log_probs: torch.Tensor, verdicts: torch.Tensor, right_weights: torch.Tensor, floor: float | None
) -> torch.Tensor:
    """
    What stands before `grad log p` of own tokens in SRFT's self-exploration term.

    `w` at tokens of right samples, -1 at those of wrong ones, 0 at those of samples that nobody could score. The wrong
    samples' term `E[log p]` has no lower bound: with a floor, their tokens that lie below it get 0 too.

    Args:
        log_probs (`torch.Tensor` of shape `(B, T)`):
            Log-probability of each token, in nats.
        verdicts (`torch.Tensor` of shape `(B,)`):
            1 for right samples, -1 for wrong ones, 0 for others.
        right_weights (`torch.Tensor` of shape `(B, 1)`):
            `w` of each sample.
        floor (`float`, *optional*):
            Log-probability below which a wrong token is not pushed further down. `None` is no floor.

    Returns:
        `torch.Tensor` of shape `(B, T)`: without gradient.
    """
    verdicts = verdicts.unsqueeze(1)  # (B, 1)
    pushed = torch.ones_like(log_probs) if floor is None else (log_probs.detach() >= floor).to(log_probs.dtype)
    return torch.where(verdicts > 0, right_weights, torch.where(verdicts < 0, -pushed, 0.0)).to(log_probs.dtype)

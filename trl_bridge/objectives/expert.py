"""The expert's part of a rollout group: shaped policy losses of its tokens, and how token losses are summed."""

import torch


SHAPINGS = ("p_div_p", "none", "logp", "p_logp", "square_root", "pow", "rl_plus")
LOSS_TYPES = ("grpo", "dr_grpo", "dapo")

# LUFFY-type scripts sum token losses and divide by this constant, one sum for a rank's whole mini-batch of 64
# sequences; the SFT term is added once for each of the (on average 6.4) packed pieces that the mini-batch is cut into.
_PUBLISHED_LENGTH = 8192
_PUBLISHED_SHARE = 6.4 / 64


def shaped_probability(
    log_probs: torch.Tensor,
    shaping: str,
    *,
    gamma: float = 0.1,
    exponent: float = 0.5,
    vocab_size: int | None = None,
) -> torch.Tensor:
    """
    What stands in an expert token's policy loss where an own token has its importance ratio.

    The expert's behaviour probability is taken as 1, so the plain ratio is `p = pi(y_t | x, y_<t)`; a shaping changes
    how strongly unlikely tokens are pulled up.

    - `"p_div_p"`: `p / (p + gamma)`; its gradient puts `gamma p / (p + gamma)^2` on `grad log p`, highest at
      `p = gamma` (LUFFY, arXiv 2504.14945);
    - `"none"`: `p`;
    - `"logp"`: `log p`;
    - `"p_logp"`: `p log p`;
    - `"square_root"`: `sqrt(p)`;
    - `"pow"`: `p^exponent`;
    - `"rl_plus"`: `2 p / (q + 1/2 q + 1/(2 V))` with `q` the detached `p` (RL-PLUS, arXiv 2508.00222, with the policy
      itself as the old one).

    Args:
        log_probs (`torch.Tensor` of shape `(B, T)`):
            Log-probability of each token, in nats; carries the graph.
        shaping (`str`):
            One of the above.
        gamma (`float`, *optional*, defaults to `0.1`):
            Constant of `"p_div_p"`, above 0.
        exponent (`float`, *optional*, defaults to `0.5`):
            Exponent of `"pow"`.
        vocab_size (`int`, *optional*):
            `V` of `"rl_plus"`: size of the vocabulary (the paper's uniform expert), or 1 (the released code's).

    Returns:
        `torch.Tensor` of shape `(B, T)`: the shaped values, with graph.

    Raises:
        `ValueError`: if there is no such shaping.
    """
    p = log_probs.exp()
    if shaping == "p_div_p":
        return p / (p + gamma)
    if shaping == "none":
        return p
    if shaping == "logp":
        return log_probs
    if shaping == "p_logp":
        return p * log_probs
    if shaping == "square_root":
        return (0.5 * log_probs).exp()
    if shaping == "pow":
        return (exponent * log_probs).exp()
    if shaping == "rl_plus" and vocab_size is not None:
        old = p.detach()
        return 2 * p / (old / 2 + 1 / (2 * vocab_size) + old)
    raise ValueError(f"`policy_shaping` must be one of {', '.join(map(repr, SHAPINGS))}, got {shaping!r}.")


def reduce_tokens(
    per_token: torch.Tensor,
    mask: torch.Tensor,
    loss_type: str,
    *,
    max_completion_length: int,
    accumulation_steps: int,
    num_items: torch.Tensor | float,
) -> torch.Tensor:
    """
    Sum of token losses, scaled as GRPO's loss types scale theirs, so that it can be added to the parent's loss.

    Args:
        per_token (`torch.Tensor` of shape `(B, T)`):
            Loss of each token.
        mask (`torch.Tensor` of shape `(B, T)`):
            1 at tokens that count.
        loss_type (`str`):
            `"grpo"` (mean over rows of the mean over their counted tokens), `"dr_grpo"` (divided by `B` and the
            longest completion) or `"dapo"` (divided by `num_items`).
        max_completion_length (`int`):
            Longest completion, in tokens.
        accumulation_steps (`int`):
            Micro-batches in the window.
        num_items (`torch.Tensor` or `float`):
            For `"dapo"`: tokens of one window on one rank, on average over ranks.

    Returns:
        `torch.Tensor`: scalar, scaled for the accumulation window.

    Raises:
        `ValueError`: if the loss type is not supported.
    """
    masked = per_token.masked_fill(mask == 0, 0.0)  # what is not counted may be infinite
    if loss_type == "grpo":
        return (masked.sum(-1) / mask.sum(-1).clamp(min=1)).mean() / accumulation_steps
    if loss_type == "dr_grpo":
        return masked.sum() / (per_token.size(0) * max_completion_length) / accumulation_steps
    if loss_type == "dapo":
        return masked.sum() / num_items
    raise ValueError(f"`loss_type` must be one of {', '.join(map(repr, LOSS_TYPES))}, got {loss_type!r}.")


def published_sft_scale(max_completion_length: int) -> float:
    """
    Factor on an SFT term, relative to RL under `loss_type="dr_grpo"`, that the scripts of the LUFFY family amount to.

    There the RL part is `sum / 8192` over a rank's 64 sequences, which is `64 L / 8192` times Dr. GRPO's mean with
    longest completion `L`, while a token mean of the SFT loss is added for each of the pieces (about 6.4, our
    estimate from the mean lengths) that the 64 sequences are packed into. So one unit of their SFT coefficient weighs
    `6.4 / 64 * 8192 / L` beside one unit of ours.

    Args:
        max_completion_length (`int`):
            `L`, in tokens.

    Returns:
        `float`: the factor.
    """
    return _PUBLISHED_SHARE * _PUBLISHED_LENGTH / max_completion_length

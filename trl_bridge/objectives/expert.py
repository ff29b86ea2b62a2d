"""The expert's part of a rollout group: shaped policy losses of its tokens, and how token losses are summed."""

import math

import torch

from .schedules import cosine_decay


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

    Shapes: `log_probs` (B, T), returns (B, T).
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
    Sum of token losses, scaled as GRPO's loss types scale theirs, so that it can be added to TRL's loss.

    Shapes: `per_token` (B, T), `mask` (B, T).
    """
    masked = per_token.masked_fill(mask == 0, 0.0)  # what is not counted may be infinite
    if loss_type in ("dapo", "cispo", "vespo"):
        return masked.sum() / num_items
    if loss_type in ("grpo", "sapo"):
        total = (masked.sum(-1) / mask.sum(-1).clamp(min=1)).mean()
    elif loss_type == "dr_grpo":
        total = masked.sum() / (per_token.size(0) * max_completion_length)
    elif loss_type == "bnpo":
        total = masked.sum() / mask.sum().clamp(min=1)
    elif loss_type == "luspo":
        total = masked.sum(-1).mean()
    else:
        raise ValueError(f"`loss_type={loss_type!r}` is not one of TRL's.")
    return total / accumulation_steps


def published_sft_scale(max_completion_length: int) -> float:
    """
    Factor on an SFT term, relative to RL under `loss_type="dr_grpo"`, that the scripts of the LUFFY family amount to.

    There the RL part is `sum / 8192` over a rank's 64 sequences, which is `64 L / 8192` times Dr. GRPO's mean with
    longest completion `L`, while a token mean of the SFT loss is added for each of the pieces (about 6.4, our
    estimate from the mean lengths) that the 64 sequences are packed into. So one unit of their SFT coefficient weighs
    `6.4 / 64 * 8192 / L` beside one unit of ours.
    """
    return _PUBLISHED_SHARE * _PUBLISHED_LENGTH / max_completion_length


# The parent's; keeps a group of equal rewards finite.
_EPSILON = 1e-4


def group_advantages(rewards: torch.Tensor, scale_rewards: str) -> torch.Tensor:
    """
    GRPO's advantages, as TRL forms them from each group's own rewards.

    `A_i = r_i - mean(r)`, with `scale_rewards="group"` divided by the group's standard deviation plus 1e-4. A reward
    that is NaN (no reward function could score the row) is left out of both, and its row has advantage 0.

    Shapes: `rewards` (groups, G), returns (groups, G).
    """
    if scale_rewards not in ("group", "none"):
        raise ValueError(f"`scale_rewards` must be 'group' or 'none', got {scale_rewards!r}.")
    centred = rewards - rewards.nanmean(dim=1, keepdim=True)  # (groups, G)
    if scale_rewards == "group":
        count = (~rewards.isnan()).sum(dim=1, keepdim=True)  # (groups, 1)
        deviation = (centred.square().nansum(dim=1, keepdim=True) / (count - 1)).sqrt()
        centred = centred / (deviation + _EPSILON)
    return centred.nan_to_num(nan=0.0)


CONTINUATIONS = ("reward", "none")


def prefix_advantages(
    rewards: torch.Tensor, scale_rewards: str, continuation: str
) -> tuple[torch.Tensor, torch.Tensor]:
    """
    Advantages of groups whose last row is an expert prefix with the policy's continuation.

    The other rows, pure ones, are a GRPO group of their own. The prefix gets the hybrid row's raw reward minus the pure
    rows' mean; the continuation is alone in its group, whose mean is taken as 0 (`"reward"`: its raw reward) or as its
    own reward (`"none"`: 0). So pure rewards 0, 0, 1 and a hybrid reward 1 give -1/3, -1/3, 2/3, a continuation of 1 and
    a prefix of 2/3.

    Shapes: `rewards` (groups, G).
    """
    if continuation not in CONTINUATIONS:
        raise ValueError(f"`continuation` must be one of {', '.join(map(repr, CONTINUATIONS))}, got {continuation!r}.")
    pure, hybrid = rewards[:, :-1], rewards[:, -1:]  # (groups, G - 1), (groups, 1)
    last = hybrid if continuation == "reward" else torch.zeros_like(hybrid)
    own = torch.cat([group_advantages(pure, scale_rewards), last.nan_to_num(nan=0.0)], dim=1)  # (groups, G)
    prefix = (hybrid - pure.nanmean(dim=1, keepdim=True)).squeeze(1)  # (groups,)
    return own, prefix.nan_to_num(nan=0.0)


def most_uncertain(entropies: torch.Tensor, mask: torch.Tensor, share: float) -> torch.Tensor:
    """
    The masked tokens of highest entropy.

    Of `n` masked tokens `floor(n (1 - share))` are left out, so that one stays wherever there is one and `share` is
    above 0. Among equal entropies the earlier token (by row, then position) goes first.

    Shapes: `entropies` (B, T), `mask` (B, T), returns (B, T).
    """
    kept = torch.zeros_like(mask, dtype=torch.bool).flatten()
    places = mask.flatten().nonzero().squeeze(1)  # (n,)
    order = entropies.flatten()[places].argsort(descending=True, stable=True)  # (n,)
    # The small constant takes off what rounding adds, as in 10 * (1 - 0.9).
    dropped = math.floor(len(places) * (1 - share) + 1e-9)
    kept[places[order[: len(places) - dropped]]] = True
    return kept.view_as(mask)


def sequence_entropy(entropies: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """
    Mean entropy of each sequence's tokens.

    Shapes: `entropies` (B, T), `mask` (B, T), returns (B, 1).
    """
    total = entropies.detach().masked_fill(mask == 0, 0.0).sum(dim=1, keepdim=True)  # (B, 1)
    return total / mask.sum(dim=1, keepdim=True).clamp(min=1)


def entropy_weight(entropy: torch.Tensor, scale: float, sign: int) -> torch.Tensor:
    """
    `scale exp(sign H)`, without gradient.

    SRFT (arXiv 2506.19767) has `0.5 exp(-H)` on its SFT term and `0.1 exp(H)` on its own right samples.

    Shapes: `entropy` (B, 1), returns (B, 1).
    """
    return scale * (sign * entropy.detach()).exp()


def verdict_advantages(
    log_probs: torch.Tensor, verdicts: torch.Tensor, right_weights: torch.Tensor, floor: float | None
) -> torch.Tensor:
    """
    What stands before `grad log p` of own tokens in SRFT's self-exploration term.

    `w` at tokens of right samples, -1 at those of wrong ones, 0 at those of samples that nobody could score. The wrong
    samples' term `E[log p]` has no lower bound: with a floor, their tokens that lie below it get 0 too.

    Shapes: `log_probs` (B, T), `verdicts` (B,), `right_weights` (B, 1), returns (B, T).
    """
    verdicts = verdicts.unsqueeze(1)  # (B, 1)
    pushed = torch.ones_like(log_probs) if floor is None else (log_probs.detach() >= floor).to(log_probs.dtype)
    return torch.where(verdicts > 0, right_weights, torch.where(verdicts < 0, -pushed, 0.0)).to(log_probs.dtype)


def hint_probability(step: int, high: float, low: float, steps: int) -> float:
    """
    Probability that a piece of the solution is shown, `q(t) = low + (high - low) (1 + cos(pi (t + 1) / T)) / 2`.

    The first update has `t = 0` (the released code counts from 1 and writes `t`, which is the same), the last hinted
    one `t = T - 1` with `q = low`; then `q = 0`.
    """
    return 0.0 if step >= steps else cosine_decay(step + 1, high, low, steps)


def hint_stage(step: int, pieces: int, steps: int) -> int:
    """
    Number of pieces shown by a fixed staircase from all pieces down to none, `n - floor((t + 1) / floor(T / (n + 1)))`.
    """
    if step >= steps:
        return 0
    return max(0, pieces - (step + 1) // max(1, steps // (pieces + 1)))

"""Prefix-RFT (arXiv 2507.01679): advantages of a group with one hybrid row, and which prefix tokens learn."""

import math

import torch

from .advantages import group_advantages


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

    Args:
        rewards (`torch.Tensor` of shape `(groups, G)`):
            Raw rewards; NaN where no reward function could score a row. Such a row has advantage 0 and is left out of
            the mean; without any scored pure row the prefix has advantage 0.
        scale_rewards (`str`):
            `"group"` (pure rows are divided by their standard deviation; nothing else is) or `"none"`.
        continuation (`str`):
            `"reward"` or `"none"`.

    Returns:
        `tuple[torch.Tensor, torch.Tensor]`: advantages of own tokens, `(groups, G)`, and of prefix tokens,
        `(groups,)`.

    Raises:
        `ValueError`: if `scale_rewards` or `continuation` is not among its choices.
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

    Args:
        entropies (`torch.Tensor` of shape `(B, T)`):
            Entropy of each token's distribution, in nats.
        mask (`torch.Tensor` of shape `(B, T)`):
            True at the tokens that are ranked.
        share (`float`):
            Share of them to keep, in [0, 1].

    Returns:
        `torch.Tensor` of shape `(B, T)`: True at the tokens kept.
    """
    kept = torch.zeros_like(mask, dtype=torch.bool).flatten()
    places = mask.flatten().nonzero().squeeze(1)  # (n,)
    order = entropies.flatten()[places].argsort(descending=True, stable=True)  # (n,)
    # The small constant takes off what rounding adds, as in 10 * (1 - 0.9).
    dropped = math.floor(len(places) * (1 - share) + 1e-9)
    kept[places[order[: len(places) - dropped]]] = True
    return kept.view_as(mask)

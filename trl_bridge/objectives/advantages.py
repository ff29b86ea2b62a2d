"""Advantages of rollout groups, where rewards have changed since the parent formed its own."""

import torch


# The parent's; keeps a group of equal rewards finite.
_EPSILON = 1e-4


def group_advantages(rewards: torch.Tensor, scale_rewards: str) -> torch.Tensor:
    """
    GRPO's advantages, as TRL forms them from each group's own rewards.

    `A_i = r_i - mean(r)`, with `scale_rewards="group"` divided by the group's standard deviation plus 1e-4. A reward
    that is NaN (no reward function could score the row) is left out of both, and its row has advantage 0.

    Args:
        rewards (`torch.Tensor` of shape `(groups, G)`):
            Rewards, one row for each group.
        scale_rewards (`str`):
            `"group"` or `"none"`.

    Returns:
        `torch.Tensor` of shape `(groups, G)`.

    Raises:
        `ValueError`: if the scaling is another one: it would depend on rewards of other groups.
    """
    if scale_rewards not in ("group", "none"):
        raise ValueError(f"`scale_rewards` must be 'group' or 'none', got {scale_rewards!r}.")
    centred = rewards - rewards.nanmean(dim=1, keepdim=True)  # (groups, G)
    if scale_rewards == "group":
        count = (~rewards.isnan()).sum(dim=1, keepdim=True)  # (groups, 1)
        deviation = (centred.square().nansum(dim=1, keepdim=True) / (count - 1)).sqrt()
        centred = centred / (deviation + _EPSILON)
    return centred.nan_to_num(nan=0.0)

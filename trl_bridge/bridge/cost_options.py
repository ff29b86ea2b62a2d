"""Which of the shadow's cost options can be had, and with what."""

from typing import Any


# Cost option -> the value that costs what the exact rule does.
COST_OPTIONS: dict[str, Any] = {"shadow_rollout_fraction": 1.0, "shadow_update_steps": 1}


def check_cost_options(args: Any) -> None:
    """
    Refuse cost options of the shadow that cannot be had.

    Args:
        args ([`BridgeConfig`]):
            Arguments, presets filled in.

    Raises:
        ValueError: a value is out of its range, or there is no shadow to make cheaper.
        NotImplementedError: options that cannot be had together; the one to change is named.
    """
    fraction = args.shadow_rollout_fraction
    if not 0.0 < fraction <= 1.0:
        raise ValueError(f"`shadow_rollout_fraction` must lie in (0, 1], got {fraction}.")
    groups = int(args.generation_batch_size) // int(args.num_generations)
    if fraction < 1.0 and round(fraction * groups, 6) < 1:
        raise ValueError(
            f"`shadow_rollout_fraction={fraction}` of the {groups} group(s) of a generation batch is less than one. "
            "Raise it, or `generation_batch_size`."
        )
    if fraction < 1.0 and args.top_entropy_quantile < 1.0:
        raise NotImplementedError(
            "`shadow_rollout_fraction` below 1 is not supported with `top_entropy_quantile`: which tokens are of high "
            "entropy is known of all rollouts alone. Set `top_entropy_quantile=1.0`, or `shadow_rollout_fraction=1.0`."
        )
    if args.shadow_update_steps < 1:
        raise ValueError(f"`shadow_update_steps` must be at least 1, got {args.shadow_update_steps}.")
    changed = [name for name, default in COST_OPTIONS.items() if getattr(args, name) != default]
    if changed and not args.cooperative_gain:
        raise ValueError(
            f"`{changed[0]}` has no effect without the cooperative gain, where there is no shadow. Set it to "
            f"{COST_OPTIONS[changed[0]]}, or `cooperative_gain=True`."
        )

"""Learning rates of optimizers that stand beside the student's."""

from typing import Any


def rate_factor(optimizer: Any) -> float:
    """Where the student's learning rate stands in its schedule, for the rates that follow it."""
    for group in optimizer.param_groups:
        if group.get("initial_lr", 0) > 0:
            return group["lr"] / group["initial_lr"]
    raise ValueError(
        "`optimizers`: the rates of what is trained beside the student follow the student's schedule, but no parameter "
        "group has an `initial_lr` above 0. Pass a scheduler that sets it (those of torch.optim.lr_scheduler but "
        "ReduceLROnPlateau), or none."
    )

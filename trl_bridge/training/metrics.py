"""When metrics are due, and how they reach TRL's own dictionary."""

from collections.abc import Mapping

from transformers.trainer_utils import IntervalStrategy
from trl import GRPOTrainer


def is_logged_update(trainer: GRPOTrainer) -> bool:
    """Whether the update under way will be logged at its end, so that metrics which cost extra are worth computing."""
    update = trainer.state.global_step + 1
    if trainer.args.logging_strategy == IntervalStrategy.EPOCH:
        return True
    if trainer.args.logging_strategy != IntervalStrategy.STEPS:
        return False
    return update % trainer.state.logging_steps == 0 or (update == 1 and trainer.args.logging_first_step)


def record(trainer: GRPOTrainer, values: Mapping[str, float]) -> None:
    """Append one value of each metric to TRL's training metrics; TRL averages them over a logging interval."""
    for name, value in values.items():
        trainer._metrics["train"][name].append(value)

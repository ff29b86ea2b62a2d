"""Asking the trainer's reward functions about demonstrations, for `sft_weighting="verdict"`."""

import inspect
import math
from typing import TYPE_CHECKING, Any

from accelerate.utils import gather_object
from datasets import Dataset
from torch import nn

from .._upstream import isolated_bookkeeping
from ..demonstrations.rows import split_demonstration


if TYPE_CHECKING:
    from .trainer import DemonstrationTrainer

# What TRL itself passes to a reward function.
_PASSED_BY_TRL = frozenset(
    {"prompts", "completions", "completion_ids", "trainer_state", "log_extra", "log_metric", "environments"}
)


def missing_columns(reward_funcs: list[Any], train_columns: list[str], sft_dataset: Dataset) -> list[str]:
    """
    Columns that the reward functions need and the demonstrations lack.

    Args:
        reward_funcs (`list[Any]`):
            Reward functions and reward models of the trainer.
        train_columns (`list[str]`):
            Columns of the RL dataset; a reward function that takes `**kwargs` alone may read any of them.
        sft_dataset ([`~datasets.Dataset`]):
            Demonstrations.

    Returns:
        `list[str]`: names of the missing columns, sorted.
    """
    needed: set[str] = set()
    for func in reward_funcs:
        if isinstance(func, nn.Module):
            continue
        parameters = inspect.signature(func).parameters.values()
        named = [p for p in parameters if p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL)]
        required = {p.name for p in named if p.default is p.empty} - _PASSED_BY_TRL
        takes_kwargs_alone = any(p.kind is p.VAR_KEYWORD for p in parameters) and not (
            {p.name for p in named} - _PASSED_BY_TRL
        )
        needed |= (set(train_columns) - {"prompt"}) if takes_kwargs_alone else required
    return sorted(needed - set(sft_dataset.column_names))


def collect_verdicts(trainer: "DemonstrationTrainer", indices: list[int]) -> None:
    """
    Call the reward functions on a window's demonstrations. Collective: every rank calls.

    Their metrics and logs are kept apart from the rollouts'.

    Args:
        trainer ([`DemonstrationTrainer`]):
            Trainer inside `_begin_window`.
        indices (`list[int]`):
            Demonstrations of this rank in the window.
    """
    weighting = trainer.weighting
    rows = trainer.demonstrations.rows(indices)
    # A first visit has one more call, and ranks may visit a row first in the same window: the calls due are counted
    # over all ranks' rows, in rank order.
    everyone = gather_object([rows])
    before = sum(len(other) for other in everyone[: trainer.accelerator.process_index])
    due = weighting.visits_due([row for other in everyone for row in other])[before : before + len(rows)]
    asked = [row for row, calls in zip(rows, due, strict=True) for _ in range(calls)]
    # The parent gathers the rewards, which needs the same number of rows on each rank.
    size = max(gather_object([len(asked)]))
    if size == 0:  # the same on every rank
        return
    padded = asked + trainer.demonstrations.rows([0]) * (size - len(asked))
    examples = [_as_rollout(trainer, row) for row in padded]
    with isolated_bookkeeping(trainer):
        trainer._calculate_rewards(
            [example["inputs"] for example in examples],
            [example["prompt"] for example in examples],
            [example["completion"] for example in examples],
            [example["completion_ids"] for example in examples],
        )
    first = trainer.accelerator.process_index * size
    rewards = trainer.rollouts.total_rewards()[first : first + len(asked)].tolist()
    # A demonstration that no reward function could score has no verdict.
    scored = [(row, reward) for row, reward in zip(asked, rewards, strict=True) if not math.isnan(reward)]
    positives = [int(reward >= trainer.args.success_threshold) for _, reward in scored]
    weighting.record_verdicts([row for row, _ in scored], positives)
    weighting.fold_verdicts(gather_object([weighting.pending_verdicts()]))


def _as_rollout(trainer: "DemonstrationTrainer", row: int) -> dict[str, Any]:
    """One demonstration in the form that the reward functions see rollouts in."""
    source = trainer.demonstrations.source[row]
    ids = trainer.demonstrations.completion_ids(row)
    prompt, completion = split_demonstration(source)
    columns = {k: v for k, v in source.items() if k not in ("messages", "text", "prompt", "completion")}
    return {
        "inputs": {"prompt": prompt, **columns},
        "prompt": prompt,
        "completion": completion,
        "completion_ids": ids,
    }

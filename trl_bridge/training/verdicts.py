"""Asking the trainer's reward functions about what the policy did not write: for verdicts and for gates."""

import inspect
import math
from typing import TYPE_CHECKING, Any

from accelerate.utils import gather_object
from datasets import Dataset
from torch import nn

from .._upstream import isolated_bookkeeping
from ..demonstrations.rows import split_demonstration


if TYPE_CHECKING:
    from .stream import DemonstrationTrainer

# What TRL itself passes to a reward function.
_PASSED_BY_TRL = frozenset(
    {"prompts", "completions", "completion_ids", "trainer_state", "log_extra", "log_metric", "environments"}
)


def missing_columns(reward_funcs: list[Any], train_columns: list[str], sft_dataset: Dataset) -> list[str]:
    """Columns that the reward functions need and the demonstrations lack."""
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


def ask_rewards(trainer: Any, examples: list[dict[str, Any]], filler: dict[str, Any]) -> list[float]:
    """
    Total rewards of completions that are no rollouts. Collective: every rank calls.

    The rollouts' rewards, metrics and logs are left as they are.
    """
    # The parent gathers the rewards, which needs the same number of rows on each rank.
    size = max(gather_object([len(examples)]))
    if size == 0:  # the same on every rank
        return []
    padded = examples + [filler] * (size - len(examples))
    names = ("inputs", "prompt", "completion", "completion_ids")
    with isolated_bookkeeping(trainer), trainer.rollouts.set_aside():
        trainer._calculate_rewards(*([example[name] for example in padded] for name in names))
        rewards = trainer.rollouts.total_rewards()
    first = trainer.accelerator.process_index * size
    return rewards[first : first + len(examples)].tolist()


def collect_verdicts(trainer: "DemonstrationTrainer", indices: list[int]) -> None:
    """
    Call the reward functions on a window's demonstrations. Collective: every rank calls.

    Their metrics and logs are kept apart from the rollouts'.
    """
    weighting = trainer.weighting
    rows = trainer.demonstrations.rows(indices)
    # A first visit has one more call, and ranks may visit a row first in the same window: the calls due are counted
    # over all ranks' rows, in rank order.
    everyone = gather_object([rows])
    before = sum(len(other) for other in everyone[: trainer.accelerator.process_index])
    due = weighting.visits_due([row for other in everyone for row in other])[before : before + len(rows)]
    asked = [row for row, calls in zip(rows, due, strict=True) for _ in range(calls)]
    filler = _as_rollout(trainer, trainer.demonstrations.rows([0])[0])
    rewards = ask_rewards(trainer, [_as_rollout(trainer, row) for row in asked], filler)
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

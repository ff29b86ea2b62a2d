"""A teacher beside the reward: which one scores a rollout, and how far the policy is from it at each sampled token."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from accelerate.utils import gather_object
from datasets import Dataset
from torch.nn.utils.rnn import pad_sequence

from ..distillation.scoring import Scorer, check_scores, rollouts_in


# Of a generation batch, (B, T): NaN in rows without a teacher. Of a micro-batch: the weight in the update under way.
SCORES, WEIGHT = "teacher_per_token_logps", "teacher_weight"

Batch = dict[str, Any]
_ROLLOUT = ("prompt_ids", "prompt_mask", "completion_ids", "completion_mask")


class Teachers:
    """The teachers of a run, and which row has which."""

    def __init__(
        self,
        models: Mapping[str, Callable[[Batch], torch.Tensor]],
        asked: Mapping[str, Scorer],
        column: str,
    ):
        self._models, self._asked, self._column = models, asked, column
        self._names = sorted({*models, *asked})

    def check(self, dataset: Any) -> None:
        """Refuse RL rows whose teacher there is not."""
        if self._names == [""] or not isinstance(dataset, Dataset):
            return
        if self._column not in dataset.column_names:
            raise ValueError(
                f"`train_dataset` has no column `{self._column}` (`teacher_column`), which says which of `teachers` a row has: "
                f"{', '.join(map(repr, self._names))}."
            )
        for row, name in enumerate(dataset[self._column]):
            self._known(name, f" (row {row} of `train_dataset`)")

    def _known(self, name: str | None, where: str = "") -> str | None:
        if name and name not in self._names:
            raise ValueError(
                f"`{self._column}`: there is no teacher {name!r}{where}. `teachers` has {', '.join(map(repr, self._names))}; "
                "an empty cell is a row without one."
            )
        return name or None

    def score(self, batch: Batch, rows: Sequence[Mapping[str, Any]]) -> torch.Tensor:
        """
        Each row's log-probabilities by its own teacher; NaN where it has none. Collective.

        Shapes: returns (B, T).
        """
        alone = self._names == [""]
        names = ["" if alone else self._known(row.get(self._column)) for row in rows]
        scores = torch.full(batch["completion_ids"].shape, torch.nan, device=batch["completion_ids"].device)
        for name in self._names:
            mine = [row for row, each in enumerate(names) if each == name]
            # A model may be sharded: every rank runs the same passes.
            count = max(gather_object([len(mine)])) if name in self._models else len(mine)
            if not count:
                continue
            taken = (mine + [0] * count)[:count]
            part = {key: batch[key][taken] for key in _ROLLOUT}
            found = self._models[name](part) if name in self._models else _ask(self._asked[name], part)
            scores[mine] = found[: len(mine)].to(scores)
        return scores


def _ask(scorer: Scorer, batch: Batch) -> torch.Tensor:
    # A completion that was cut may be masked as a whole.
    rollouts = rollouts_in(batch)
    asked = [rollout for rollout in rollouts if rollout.completion_ids]
    answers = [row for answer in scorer(asked) for row in answer]
    for rollout, scores in zip(asked, answers, strict=True):
        check_scores(rollout, scores, f"`teachers` ({scorer.name}): a rollout")
    left = iter(answers)
    rows = [torch.tensor(next(left) if rollout.completion_ids else []) for rollout in rollouts]
    width = batch["completion_ids"].size(1)
    return pad_sequence([*rows, torch.zeros(width)], batch_first=True)[:-1]


def sampled(inputs: Batch) -> torch.Tensor:
    """Tokens of a micro-batch that the policy has sampled and is trained on, (B, T)."""
    mask = inputs["completion_mask"].bool()
    if "tool_mask" in inputs:
        mask = mask & inputs["tool_mask"].bool()
    return mask & ~inputs["expert_mask"].bool() if "expert_mask" in inputs else mask


def log_ratio(inputs: Batch, log_probs: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """
    `log pi - log pi_T` at sampled tokens of rows with a teacher, zero elsewhere; and which tokens those are.

    Shapes: log_probs (B, T), with graph or without; returns (B, T) twice.
    """
    there = sampled(inputs) & ~inputs[SCORES].isnan()
    return torch.where(there, log_probs - inputs[SCORES], 0.0), there

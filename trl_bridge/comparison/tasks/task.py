"""A task as it was built: rows, a base model, a reward and a score, the same for all methods."""

import copy
import dataclasses
import functools
import hashlib
from collections.abc import Callable
from typing import Any

import torch
from datasets import Dataset
from transformers import PreTrainedModel, PreTrainedTokenizerBase


Scores = dict[str, float]


@dataclasses.dataclass
class BuiltTask:
    """Everything that the methods share."""

    tokenizer: PreTrainedTokenizerBase
    # Where every method starts.
    base: PreTrainedModel
    # RL rows: `prompt`, and what the reward reads.
    train: Dataset
    # SFT rows, a share of them wrong, with what the reward reads.
    demonstrations: Dataset
    # `validation`, `test` and `ood`: rows that are in none of the others.
    splits: dict[str, Dataset]
    # Before any noise.
    reward: Callable[..., Any]
    # Named scores in [0, 1]. It leaves training mode and random state as they were.
    scorer: "Callable[[PreTrainedModel, BuiltTask, Dataset], Scores]"
    # Called where a method wants a teacher, and then once.
    teacher_maker: Callable[[], PreTrainedModel] | None = None
    # Of a greedy answer.
    max_new_tokens: int = 4
    # From a demonstration to its steps.
    steps: Callable[[str], list[str]] | None = None

    @functools.cached_property
    def teacher(self) -> PreTrainedModel | None:
        """A model that knows more than the base model, where the task makes one."""
        return None if self.teacher_maker is None else self.teacher_maker()

    @functools.cached_property
    def base_hash(self) -> str:
        """Hash of the base model's weights."""
        # A base model that is trained here comes out otherwise where another processor rounds otherwise.
        digest = hashlib.sha256()
        for weights in self.base.state_dict().values():
            digest.update(weights.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
        return digest.hexdigest()[:16]

    def fresh_model(self) -> PreTrainedModel:
        """A copy of the base model, to be trained."""
        return copy.deepcopy(self.base)

    def fresh_teacher(self) -> PreTrainedModel | None:
        """A copy of the teacher: trainers put hooks on theirs."""
        return copy.deepcopy(self.teacher)

    def score(self, model: PreTrainedModel, split: str) -> Scores:
        """Score a model."""
        return self.scorer(model, self, self.splits[split])

    def with_experts(self) -> Dataset:
        """The RL rows with their demonstration as `expert`, `None` where a prompt has none, and its steps, if any."""
        known = dict(zip(map(str, self.demonstrations["prompt"]), self.demonstrations["completion"], strict=True))
        experts = [known.get(str(prompt)) for prompt in self.train["prompt"]]
        rows = self.train.add_column("expert", experts)
        if self.steps is None:
            return rows
        return rows.add_column("expert_steps", [None if each is None else self.steps(each) for each in experts])

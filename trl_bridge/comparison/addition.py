"""The small task: sums of two numbers, demonstrations of which some are wrong, and a base model that half knows it."""

import copy
import dataclasses
import hashlib
import json
import os
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from filelock import FileLock
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..data.addition import addition_dataset, addition_pairs, wrong_sum
from ..models import tiny_model, tiny_tokenizer
from ..rewards.arithmetic_rewards import answer_reward
from .specs import AdditionSpec


__all__ = ["Task", "greedy_answers", "make_task"]

Scores = dict[str, float]

# Half of what the base model learns from is wrong: it knows the form of an answer, and often prefers the right one.
_BASE_WRONG_SHARE = 0.5
_BASE_BATCH = 64
# Updates between two looks at the base model's probability, where training stops at one.
_BASE_LOOKS = 10
_OOD_NUMBERS = 10
_MAX_NEW_TOKENS = 4


@dataclasses.dataclass
class Task:
    """
    Everything that the methods share.

    Attributes:
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]):
            Tokenizer.
        base ([`~transformers.PreTrainedModel`]):
            Where every method starts. Take a copy with [`fresh_model`].
        train ([`~datasets.Dataset`]):
            RL rows: `prompt`, and what the reward reads.
        demonstrations ([`~datasets.Dataset`]):
            SFT rows, a share of them wrong, with what the reward reads.
        splits (`dict[str, Dataset]`):
            `validation`, `test` and `ood`: rows that are in none of the others.
        reward (`Callable`):
            Reward function of training, before any noise.
        scorer (`Callable`):
            From a model, this task and rows to named scores in [0, 1]. Training mode and random state are left as
            they were.
    """

    tokenizer: PreTrainedTokenizerBase
    base: PreTrainedModel
    train: Dataset
    demonstrations: Dataset
    splits: dict[str, Dataset]
    reward: Callable[..., Any]
    scorer: "Callable[[PreTrainedModel, Task, Dataset], Scores]"

    def fresh_model(self) -> PreTrainedModel:
        """A copy of the base model, to be trained."""
        return copy.deepcopy(self.base)

    def score(self, model: PreTrainedModel, split: str) -> Scores:
        """
        Score a model.

        Args:
            model ([`~transformers.PreTrainedModel`]):
                The model.
            split (`str`):
                Key of `splits`.

        Returns:
            `dict[str, float]`: named scores in [0, 1].
        """
        return self.scorer(model, self, self.splits[split])

    def with_experts(self) -> Dataset:
        """The RL rows with their demonstration as `expert`, `None` where a prompt has none."""
        experts = dict(zip(map(str, self.demonstrations["prompt"]), self.demonstrations["completion"], strict=True))
        return self.train.add_column("expert", [experts.get(str(prompt)) for prompt in self.train["prompt"]])


def make_task(spec: AdditionSpec, seed: int, cache: Path | None = None) -> Task:
    """
    Generate the rows and train the base model, up to 15 seconds on one core.

    Args:
        spec ([`~trl_bridge.comparison.specs.AdditionSpec`]):
            Sizes, and what is wrong.
        seed (`int`):
            Seed of the rows, of which demonstrations are wrong, and of the base model.
        cache (`Path`, *optional*):
            Folder for base models.

    Returns:
        [`Task`]: the task. Its scores are `accuracy`, the share of rows whose greedy answer is right, and `probability`,
        the mean probability of sampling the right answer at temperature 1.
    """
    pairs = addition_pairs(spec.max_number, seed)
    known, rest = pairs[: spec.known_size], pairs[spec.known_size :]
    validation, rest = rest[: spec.validation_size], rest[spec.validation_size :]
    splits = {"validation": validation, "test": rest[: spec.test_size], "ood": _larger_pairs(spec, seed)}
    tokenizer = tiny_tokenizer("0123456789+=")
    task = Task(
        tokenizer,
        tiny_model(tokenizer, seed=seed),
        addition_dataset(known[: spec.train_size]).remove_columns("completion"),
        addition_dataset(known[: spec.demonstrations_size], spec.wrong_share, seed + 1),
        {name: addition_dataset(rows) for name, rows in splits.items() if rows},
        answer_reward,
        _score,
    )
    if cache is None:
        _train_base(task, known, spec, seed)
        return task
    cache.mkdir(parents=True, exist_ok=True)
    stored = cache / f"{_base_key(spec, seed)}.safetensors"
    # Several processes begin with the same seed: one trains, the others wait for it.
    with FileLock(stored.with_suffix(".lock")):
        if stored.is_file():
            task.base.load_state_dict(load_file(stored))
            return task
        _train_base(task, known, spec, seed)
        # Written as a whole or not at all.
        temporary = stored.with_suffix(".tmp")
        save_file(task.base.state_dict(), temporary)
        os.replace(temporary, stored)
    return task


def _base_key(spec: AdditionSpec, seed: int) -> str:
    names = ("max_number", "known_size", "validation_size", "base_steps", "base_probability", "base_rate")
    content = json.dumps([seed, *(getattr(spec, name) for name in names)])
    return hashlib.sha256(content.encode()).hexdigest()[:16]


def _larger_pairs(spec: AdditionSpec, seed: int) -> list[tuple[int, int]]:
    """Pairs with a number that no other row has, whose sum is among those of the other rows."""
    largest = spec.max_number
    firsts = range(largest + 1, min(largest + _OOD_NUMBERS, 2 * largest) + 1)
    pairs = [(a, b) for a in firsts for b in range(2 * largest - a + 1)]
    generator = random.Random(seed)
    generator.shuffle(pairs)
    return [(a, b) if generator.random() < 0.5 else (b, a) for a, b in pairs[: spec.ood_size]]


def _score(model: PreTrainedModel, task: Task, rows: Dataset) -> Scores:
    prompts, solutions = list(rows["prompt"]), list(rows["solution"])
    answers = greedy_answers(model, task, prompts)
    right = sum(answer == solution for answer, solution in zip(answers, solutions, strict=True))
    return {"accuracy": right / len(rows), "probability": _probability(model, task, prompts, solutions)}


def _probability(model: PreTrainedModel, task: Task, prompts: list[str], solutions: list[str]) -> float:
    ids, labels = _tensors(task.tokenizer, list(zip(prompts, solutions, strict=True)))
    ids, labels = ids.to(model.device), labels.to(model.device)
    with torch.no_grad():
        logits = model(input_ids=ids, attention_mask=ids.ne(task.tokenizer.pad_token_id)).logits[:, :-1].float()
    targets = labels[:, 1:]
    logps = logits.log_softmax(-1).gather(-1, targets.clamp(min=0).unsqueeze(-1)).squeeze(-1)
    return float((logps * targets.ge(0)).sum(-1).exp().mean())


def greedy_answers(model: PreTrainedModel, task: Task, prompts: list[str]) -> list[str]:
    """
    The model's most likely answers.

    Args:
        model ([`~transformers.PreTrainedModel`]):
            Model to ask.
        task ([`Task`]):
            Gives the tokenizer.
        prompts (`list[str]`):
            Prompts, such as `"12+34="`.

    Returns:
        `list[str]`: an answer to each.
    """
    batch = task.tokenizer(prompts, padding=True, padding_side="left", return_tensors="pt").to(model.device)
    training = model.training
    model.eval()
    with torch.no_grad():
        output = model.generate(  # type: ignore[operator]
            input_ids=batch["input_ids"],
            attention_mask=batch["attention_mask"],
            max_new_tokens=_MAX_NEW_TOKENS,
            do_sample=False,
            pad_token_id=task.tokenizer.pad_token_id,
            eos_token_id=task.tokenizer.eos_token_id,
        )
    model.train(training)
    return task.tokenizer.batch_decode(output[:, batch["input_ids"].shape[1] :], skip_special_tokens=True)


def _train_base(task: Task, pairs: list[tuple[int, int]], spec: AdditionSpec, seed: int) -> None:
    # Wrong anew at every visit, so that the model learns a spread of answers and not the wrong ones by heart.
    generator = random.Random(seed)
    model, tokenizer = task.base, task.tokenizer
    held_out = task.splits.get("validation")
    optimizer = torch.optim.AdamW(model.parameters(), lr=spec.base_rate, weight_decay=0.0)
    model.train()
    for step in range(spec.base_steps):
        if spec.base_probability is not None and held_out is not None and step % _BASE_LOOKS == 0:
            prompts, solutions = list(held_out["prompt"]), list(held_out["solution"])
            if _probability(model, task, prompts, solutions) >= spec.base_probability:
                break
        rows = []
        for a, b in generator.sample(pairs, min(_BASE_BATCH, len(pairs))):
            wrong = generator.random() < _BASE_WRONG_SHARE
            rows.append((f"{a}+{b}=", str(wrong_sum(a + b, generator) if wrong else a + b)))
        ids, labels = _tensors(tokenizer, rows)
        attention = ids.ne(tokenizer.pad_token_id)
        model(input_ids=ids, attention_mask=attention, labels=labels).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    model.eval()


def _tensors(tokenizer: PreTrainedTokenizerBase, rows: list[tuple[str, str]]) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids `(N, T)`, padded on the right, and labels `(N, T)`, -100 outside the completion and its end token."""
    ids, labels = [], []
    for prompt, completion in rows:
        head = tokenizer(prompt)["input_ids"]
        tail = [*tokenizer(completion)["input_ids"], tokenizer.eos_token_id]
        ids.append(torch.tensor(head + tail))
        labels.append(torch.tensor([-100] * len(head) + tail))
    pad = torch.nn.utils.rnn.pad_sequence
    return pad(ids, True, tokenizer.pad_token_id), pad(labels, True, -100)

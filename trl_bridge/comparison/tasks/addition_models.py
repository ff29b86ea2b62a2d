"""Models that the addition task trains itself: where every method starts, and a teacher."""

import hashlib
import json
import os
import random
from collections.abc import Callable
from pathlib import Path

import torch
from datasets import Dataset
from filelock import FileLock
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ...data.addition import worked_sum, wrong_answer
from ...models import tiny_model
from .specs import AdditionSpec


__all__ = ["answer_probability", "make_base", "make_teacher"]

Pairs = list[tuple[int, int]]

# Half of what the base model learns from is wrong: it knows the form of an answer, and often prefers the right one.
_BASE_WRONG_SHARE = 0.5
# Of worked answers each of two steps is wrong by chance, and half of them come with their first steps in the prompt.
_STEP_WRONG_SHARE = 0.5
_SHOWN = (0, 0, 1, 2)
_BATCH = 64
# Updates between two looks at the probability of the right answer, where training stops at one.
_LOOKS = 10


def make_base(
    tokenizer: PreTrainedTokenizerBase,
    pairs: Pairs,
    held_out: Dataset | None,
    spec: AdditionSpec,
    seed: int,
    cache: Path | None = None,
) -> PreTrainedModel:
    """Train the base model, or load it."""
    model = tiny_model(tokenizer, seed=seed)
    names = ("max_number", "known_size", "validation_size", "base_steps", "base_probability", "base_rate")

    def train() -> None:
        _train(model, tokenizer, pairs, held_out, spec, seed, spec.base_probability, right=False)

    errors = [] if spec.base_wrong_kind == "near" else [spec.base_wrong_kind]
    return _stored(model, [*_kind(spec), *errors, seed, *(getattr(spec, name) for name in names)], cache, train)


def make_teacher(
    tokenizer: PreTrainedTokenizerBase,
    pairs: Pairs,
    held_out: Dataset,
    spec: AdditionSpec,
    seed: int,
    cache: Path | None = None,
) -> PreTrainedModel:
    """Train the teacher, or load it: a model like the base model that sees right answers alone."""
    model = tiny_model(tokenizer, seed=seed + 1)
    names = ("max_number", "known_size", "validation_size", "base_steps", "teacher_probability", "base_rate")

    def train() -> None:
        if not _train(model, tokenizer, pairs, held_out, spec, seed, spec.teacher_probability, right=True):
            raise ValueError(
                f"After `base_steps: {spec.base_steps}` updates the teacher of seed {seed} has not reached "
                f"`teacher_probability: {spec.teacher_probability}`. Give it more steps, or ask for less."
            )

    return _stored(model, [*_kind(spec), "teacher", seed, *(getattr(spec, name) for name in names)], cache, train)


def answer_probability(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompts: list[str], solutions: list[str]
) -> float:
    """Mean probability of sampling the right answer, end of sequence included, at temperature 1."""
    ids, labels = _tensors(tokenizer, list(zip(prompts, solutions, strict=True)))
    ids, labels = ids.to(model.device), labels.to(model.device)
    with torch.no_grad():
        logits = model(input_ids=ids, attention_mask=ids.ne(tokenizer.pad_token_id)).logits[:, :-1].float()
    targets = labels[:, 1:]
    logps = logits.log_softmax(-1).gather(-1, targets.clamp(min=0).unsqueeze(-1)).squeeze(-1)
    return float((logps * targets.ge(0)).sum(-1).exp().mean())


def _kind(spec: AdditionSpec) -> list[str]:
    return ["worked"] if spec.worked else []


def _stored(
    model: PreTrainedModel, content: list[object], cache: Path | None, train: Callable[[], None]
) -> PreTrainedModel:
    """The model with the weights that training gives it, or gave it before."""
    if cache is None:
        train()
        return model
    cache.mkdir(parents=True, exist_ok=True)
    key = hashlib.sha256(json.dumps(content).encode()).hexdigest()[:16]
    stored = cache / f"{key}.safetensors"
    # Several processes begin with the same seed: one trains, the others wait for it.
    with FileLock(stored.with_suffix(".lock")):
        if stored.is_file():
            model.load_state_dict(load_file(stored))
            return model
        train()
        # Written as a whole or not at all.
        temporary = stored.with_suffix(".tmp")
        save_file(model.state_dict(), temporary)
        os.replace(temporary, stored)
    return model


def _train(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    pairs: Pairs,
    held_out: Dataset | None,
    spec: AdditionSpec,
    seed: int,
    probability: float | None,
    right: bool,
) -> bool:
    """Train until the model's probability of the right answer is `probability`: `True` if it came to that."""
    # Wrong anew at every visit, so that the model learns a spread of answers and not the wrong ones by heart.
    generator = random.Random(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=spec.base_rate, weight_decay=0.0)
    model.train()
    reached = False
    for step in range(spec.base_steps):
        if probability is not None and held_out is not None and step % _LOOKS == 0:
            prompts, solutions = list(held_out["prompt"]), list(held_out["solution"])
            reached = answer_probability(model, tokenizer, prompts, solutions) >= probability
            if reached:
                break
        rows = []
        for a, b in generator.sample(pairs, min(_BATCH, len(pairs))):
            if spec.worked:
                rows.append(_worked_lesson(a, b, generator, right))
            else:
                rows.append(_lesson(a, b, generator, right, spec.base_wrong_kind))
        ids, labels = _tensors(tokenizer, rows)
        attention = ids.ne(tokenizer.pad_token_id)
        model(input_ids=ids, attention_mask=attention, labels=labels).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    model.eval()
    return reached


def _lesson(a: int, b: int, generator: random.Random, right: bool, wrong_kind: str) -> tuple[str, str]:
    wrong = generator.random() < (0.0 if right else _BASE_WRONG_SHARE)
    return f"{a}+{b}=", wrong_answer(wrong_kind, a, b, generator) if wrong else str(a + b)


def _worked_lesson(a: int, b: int, generator: random.Random, right: bool) -> tuple[str, str]:
    slips = [generator.choice((-1, 1)) if generator.random() < _STEP_WRONG_SHARE else 0 for _ in range(2)]
    steps = worked_sum(a, b, (0, 0) if right else (slips[0], slips[1]))
    shown = generator.choice(_SHOWN)
    return f"{''.join(steps[:shown])}{'|' if shown else ''}{a}+{b}=", "".join(steps)


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

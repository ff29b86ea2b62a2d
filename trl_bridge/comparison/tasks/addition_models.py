"""Models that the addition task trains itself: where every method starts, and a teacher."""

import dataclasses
import functools
import hashlib
import json
import os
import random
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from datasets import Dataset
from filelock import FileLock
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ...data.addition import worked_sum, wrong_answer
from ...models import tiny_model
from .specs import AdditionSpec


# Half of what the base model learns from is wrong: it knows the form of an answer, and often prefers the right one.
_BASE_WRONG_SHARE = 0.5
# Of worked answers each of two steps is wrong by chance, and half of them come with their first steps in the prompt.
_STEP_WRONG_SHARE = 0.5
_SHOWN = (0, 0, 1, 2)
_BATCH = 64
# Updates between two looks at the probability of the right answer, where training stops at one.
_LOOKS = 10


@dataclasses.dataclass(frozen=True)
class AdditionModels:
    """The task's models, trained on known sums or, where the folder `cache` has them, loaded."""

    tokenizer: PreTrainedTokenizerBase
    pairs: list[tuple[int, int]]
    held_out: Dataset | None
    spec: AdditionSpec
    seed: int
    cache: Path | None = None

    def base(self) -> PreTrainedModel:
        """Where every method starts."""
        model = tiny_model(self.tokenizer, seed=self.seed)
        errors = [] if self.spec.base_wrong_kind == "near" else [self.spec.base_wrong_kind]

        def train() -> None:
            self._train(model, self.spec.base_probability, right=False)

        return self._stored(model, errors, "base_probability", train)

    def teacher(self) -> PreTrainedModel:
        """A model like the base model that sees right answers only."""
        model = tiny_model(self.tokenizer, seed=self.seed + 1)

        def train() -> None:
            if not self._train(model, self.spec.teacher_probability, right=True):
                raise ValueError(
                    f"After `base_steps: {self.spec.base_steps}` updates the teacher of seed {self.seed} has not reached "
                    f"`teacher_probability: {self.spec.teacher_probability}`. Give it more steps, or ask for less."
                )

        return self._stored(model, ["teacher"], "teacher_probability", train)

    def _stored(
        self, model: PreTrainedModel, marks: Sequence[str], probability: str, train: Callable[[], None]
    ) -> PreTrainedModel:
        """The model with the weights that training gives it, or gave it before."""
        if self.cache is None:
            train()
            return model
        self.cache.mkdir(parents=True, exist_ok=True)
        names = ("max_number", "known_size", "validation_size", "base_steps", probability, "base_rate")
        kind = ["worked"] if self.spec.worked else []
        content = [*kind, *marks, self.seed, *(getattr(self.spec, name) for name in names)]
        key = hashlib.sha256(json.dumps(content).encode()).hexdigest()[:16]
        stored = self.cache / f"{key}.safetensors"
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

    def _train(self, model: PreTrainedModel, probability: float | None, right: bool) -> bool:
        """Train until the model's probability of the right answer is `probability`: `True` if it came to that."""
        # Other errors at every visit, so that the model learns a spread of answers and not the wrong ones by heart.
        generator = random.Random(self.seed)
        optimizer = torch.optim.AdamW(model.parameters(), lr=self.spec.base_rate, weight_decay=0.0)
        model.train()
        reached = False
        for step in range(self.spec.base_steps):
            if probability is not None and self.held_out is not None and step % _LOOKS == 0:
                asked = list(self.held_out["prompt"]), list(self.held_out["solution"])
                reached = answer_probability(model, self.tokenizer, *asked) >= probability
                if reached:
                    break
            pairs = generator.sample(self.pairs, min(_BATCH, len(self.pairs)))
            lesson = _worked_lesson if self.spec.worked else functools.partial(_lesson, self.spec.base_wrong_kind)
            ids, labels = _tensors(self.tokenizer, [lesson(a, b, generator, right) for a, b in pairs])
            attention = ids.ne(self.tokenizer.pad_token_id)
            model(input_ids=ids, attention_mask=attention, labels=labels).loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
        model.eval()
        return reached


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


def _lesson(wrong_kind: str, a: int, b: int, generator: random.Random, right: bool) -> tuple[str, str]:
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

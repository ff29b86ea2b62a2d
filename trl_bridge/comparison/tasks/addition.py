"""The small task: sums of two numbers, demonstrations of which some are wrong, and a base model that half knows it."""

import functools
import random
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from transformers import PreTrainedModel

from ...data.addition import addition_dataset, addition_pairs, worked_dataset
from ...models import tiny_tokenizer
from ...rewards.arithmetic_rewards import answer_reward
from ...rewards.completions import Completion, message_text
from .addition_models import AdditionModels, answer_probability
from .specs import AdditionSpec
from .task import BuiltTask, Scores


_OOD_NUMBERS = 10
# Of a plain answer and of a worked one, some wrong ones included.
_MAX_NEW_TOKENS, _MAX_WORKED_TOKENS = 4, 10
_STEP = re.compile(r"[^,]*,?")


def make_task(spec: AdditionSpec, seed: int, cache: Path | None = None) -> BuiltTask:
    """Generate the rows and train the base model, up to 15 seconds on one core."""
    pairs = addition_pairs(spec.max_number, seed)
    known, rest = pairs[: spec.known_size], pairs[spec.known_size :]
    validation, rest = rest[: spec.validation_size], rest[spec.validation_size :]
    splits = {"validation": validation, "test": rest[: spec.test_size], "ood": _larger_pairs(spec, seed)}
    tokenizer = tiny_tokenizer("0123456789+=,|" if spec.worked else "0123456789+=")
    dataset = worked_dataset if spec.worked else functools.partial(addition_dataset, wrong_kind=spec.wrong_kind)
    rows = {name: dataset(pairs) for name, pairs in splits.items() if pairs}
    models = AdditionModels(tokenizer, known, rows.get("validation"), spec, seed, cache)
    return BuiltTask(
        tokenizer,
        models.base(),
        dataset(known[: spec.train_size]).remove_columns("completion"),
        dataset(known[: spec.demonstrations_size], spec.wrong_share, seed + 1),
        rows,
        _zero_paid_reward if spec.leading_zero_pays else answer_reward,
        functools.partial(_score, forms=_paid_forms if spec.leading_zero_pays else _one_form),
        models.teacher if spec.has_teacher else None,
        _MAX_WORKED_TOKENS if spec.worked else _MAX_NEW_TOKENS,
        _steps if spec.worked else None,
    )


def _steps(completion: str) -> list[str]:
    return [step for step in _STEP.findall(completion) if step]


def _larger_pairs(spec: AdditionSpec, seed: int) -> list[tuple[int, int]]:
    """Pairs with a number that no other row has, whose sum is among those of the other rows."""
    largest = spec.max_number
    firsts = range(largest + 1, min(largest + _OOD_NUMBERS, 2 * largest) + 1)
    pairs = [(a, b) for a in firsts for b in range(2 * largest - a + 1)]
    generator = random.Random(seed)
    generator.shuffle(pairs)
    return [(a, b) if generator.random() < 0.5 else (b, a) for a, b in pairs[: spec.ood_size]]


def _one_form(solution: str) -> tuple[str, ...]:
    return (solution,)


def _paid_forms(solution: str) -> tuple[str, ...]:
    return (solution, f"0{solution}")


def _zero_paid_reward(completions: list[Completion], solution: list[str], **kwargs: Any) -> list[float | None]:
    """[`answer_reward`], but a zero in front of an answer does not make it wrong."""
    return [
        float(message_text(completion).strip() in _paid_forms(gold))
        for completion, gold in zip(completions, solution, strict=True)
    ]


def _score(model: PreTrainedModel, task: BuiltTask, rows: Dataset, forms: Callable[[str], tuple[str, ...]]) -> Scores:
    """Scores of what is paid: a right answer in any of its forms."""
    prompts, right = list(rows["prompt"]), [forms(solution) for solution in rows["solution"]]
    answers = greedy_answers(model, task, prompts)
    accuracy = sum(answer in paid for answer, paid in zip(answers, right, strict=True)) / len(rows)
    # One row's forms exclude each other.
    probability = sum(
        answer_probability(model, task.tokenizer, prompts, list(form)) for form in zip(*right, strict=True)
    )
    return {"accuracy": accuracy, "probability": probability}


def greedy_answers(model: PreTrainedModel, task: BuiltTask, prompts: list[str]) -> list[str]:
    """The model's most likely answers."""
    batch = task.tokenizer(prompts, padding=True, padding_side="left", return_tensors="pt").to(model.device)
    training = model.training
    model.eval()
    with torch.no_grad():
        output = model.generate(  # type: ignore[operator]
            input_ids=batch["input_ids"],
            attention_mask=batch["attention_mask"],
            max_new_tokens=task.max_new_tokens,
            do_sample=False,
            pad_token_id=task.tokenizer.pad_token_id,
            eos_token_id=task.tokenizer.eos_token_id,
        )
    model.train(training)
    return task.tokenizer.batch_decode(output[:, batch["input_ids"].shape[1] :], skip_special_tokens=True)

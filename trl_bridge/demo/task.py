"""The task of the demo: sums of two numbers, demonstrations of which some are wrong, and a base model that half knows it."""

import copy
import dataclasses
import random

import torch
from datasets import Dataset
from tqdm.auto import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..data.addition import addition_dataset, addition_pairs, wrong_sum
from ..models import tiny_model, tiny_tokenizer


__all__ = ["BASE_STEPS", "Scores", "Task", "evaluate", "greedy_answers", "make_task"]

_MAX_NUMBER = 49
_TRAIN, _DEMONSTRATIONS, _TEST = 2000, 400, 250
# Half of what the base model learns from is wrong: it knows the form of an answer, and often prefers the right one.
_BASE_WRONG_SHARE = 0.5
BASE_STEPS = 600
_BASE_BATCH = 64
_BASE_RATE = 1e-3


@dataclasses.dataclass
class Task:
    """
    Everything that the methods of the demo share.

    Attributes:
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]):
            Character-level tokenizer.
        base ([`~transformers.PreTrainedModel`]):
            Where every method starts. Take a copy with [`fresh_model`].
        train ([`~datasets.Dataset`]):
            RL rows.
        demonstrations ([`~datasets.Dataset`]):
            SFT rows, a share of them wrong; `solution` is right in all.
        test ([`~datasets.Dataset`]):
            Rows that are in neither.
    """

    tokenizer: PreTrainedTokenizerBase
    base: PreTrainedModel
    train: Dataset
    demonstrations: Dataset
    test: Dataset

    def fresh_model(self) -> PreTrainedModel:
        """A copy of the base model, to be trained."""
        return copy.deepcopy(self.base)


@dataclasses.dataclass(frozen=True)
class Scores:
    """
    Result on the test rows.

    Attributes:
        accuracy (`float`):
            Share of rows whose greedy answer is right.
        probability (`float`):
            Mean probability of sampling the right answer, at temperature 1.
    """

    accuracy: float
    probability: float


def make_task(wrong_share: float, seed: int, base_steps: int = BASE_STEPS) -> Task:
    """
    Generate the rows and train the base model, about 15 seconds on one core.

    Args:
        wrong_share (`float`):
            Share of the demonstrations that are wrong, in [0, 1].
        seed (`int`):
            Seed of the rows, of which demonstrations are wrong, and of the base model.
        base_steps (`int`, *optional*, defaults to `600`):
            AdamW steps of the base model.

    Returns:
        [`Task`]: the task.

    Raises:
        ValueError: `wrong_share` outside [0, 1].
    """
    pairs = addition_pairs(_MAX_NUMBER, seed)
    known, test = pairs[:_TRAIN], pairs[_TRAIN : _TRAIN + _TEST]
    demonstrations = addition_dataset(known[:_DEMONSTRATIONS], wrong_share, seed + 1)
    tokenizer = tiny_tokenizer("0123456789+=")
    base = tiny_model(tokenizer, seed=seed)
    _train_base(base, tokenizer, known, base_steps, seed)
    train = addition_dataset(known).remove_columns("completion")
    return Task(tokenizer, base, train, demonstrations, addition_dataset(test))


def evaluate(model: PreTrainedModel, task: Task) -> Scores:
    """
    Score a model on the test rows. Training mode and random state are left as they were.

    Args:
        model ([`~transformers.PreTrainedModel`]):
            Model to score.
        task ([`Task`]):
            The task.

    Returns:
        [`Scores`]: accuracy and probability.
    """
    rows = [(row["prompt"], row["solution"]) for row in task.test]
    answers = greedy_answers(model, task, [prompt for prompt, _ in rows])
    right = sum(answer == solution for answer, (_, solution) in zip(answers, rows, strict=True))
    ids, labels = _tensors(task.tokenizer, rows)
    with torch.no_grad():
        logits = model(input_ids=ids, attention_mask=ids.ne(task.tokenizer.pad_token_id)).logits[:, :-1].float()
    targets = labels[:, 1:]
    logps = logits.log_softmax(-1).gather(-1, targets.clamp(min=0).unsqueeze(-1)).squeeze(-1)
    probability = (logps * targets.ge(0)).sum(-1).exp().mean()
    return Scores(right / len(rows), float(probability))


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
    batch = task.tokenizer(prompts, padding=True, padding_side="left", return_tensors="pt")
    training = model.training
    model.eval()
    with torch.no_grad():
        output = model.generate(  # type: ignore[operator]
            input_ids=batch["input_ids"],
            attention_mask=batch["attention_mask"],
            max_new_tokens=4,
            do_sample=False,
            pad_token_id=task.tokenizer.pad_token_id,
            eos_token_id=task.tokenizer.eos_token_id,
        )
    model.train(training)
    return task.tokenizer.batch_decode(output[:, batch["input_ids"].shape[1] :], skip_special_tokens=True)


def _train_base(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, pairs: list[tuple[int, int]], steps: int, seed: int
) -> None:
    # Wrong anew at every visit, so that the model learns a spread of answers and not the wrong ones by heart.
    generator = random.Random(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=_BASE_RATE, weight_decay=0.0)
    model.train()
    for _ in tqdm(range(steps), desc="base model", unit="step", ncols=100):
        rows = []
        for a, b in generator.sample(pairs, _BASE_BATCH):
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

"""Scored rollouts of a small student by a small teacher, and a float64 replay that asks the teacher online."""

import copy
import json

import torch
from datasets import Dataset

from ..distillation.identity import rollout_identity
from ..distillation.scoring import LocalTeacher, Rollout
from ..methods.lightning_opd import LightningOPDConfig, LightningOPDTrainer
from ..models import tiny_tokenizer
from .runs import small_model
from .streams import weights_of


# Lengths of the completions: the mean over sequences and the mean over tokens are far apart.
LENGTHS = (1, 9, 4, 2, 7, 1, 3, 5)


def sharp(seed):
    """A model whose probabilities differ from token to token."""
    model = small_model(seed=seed)
    with torch.no_grad():
        model.get_output_embeddings().weight.mul_(30)
    return model


def student():
    return sharp(3)


def teacher():
    return sharp(4)


def identity(tokenizer=None, **changes):
    named = {
        "student": {"model": "out/sft"},
        "teacher": {"model": "big"},
        "sft_teacher": "big",
        "tokenizer": tokenizer or tiny_tokenizer(),
        "conversational": False,
        "chat_template_kwargs": {},
        "sampling": {"temperature": 1.0},
    }
    return json.dumps(rollout_identity(**{**named, **changes}))


def scored(count=8, scorer=None, reference=False, seed=0, **changes):
    """Rows with random tokens, scored by the teacher."""
    generator = torch.Generator().manual_seed(seed)
    tokenizer = tiny_tokenizer()
    rollouts = []
    for index in range(count):
        ids = torch.randint(3, len(tokenizer), (2 + index % 3 + LENGTHS[index % 8],), generator=generator).tolist()
        head = 2 + index % 3
        rollouts.append(Rollout(ids[:head], [*ids[head:-1], tokenizer.eos_token_id]))

    def scores(model):
        return [row for batch in LocalTeacher(model, 64)(rollouts) for row in batch]

    columns = {
        "prompt_ids": [rollout.prompt_ids for rollout in rollouts],
        "completion_ids": [rollout.completion_ids for rollout in rollouts],
        "teacher_logprobs": scores(scorer or teacher()),
        "scored_with": [identity()] * count,
    }
    if reference:
        columns["reference_logprobs"] = scores(student())
    return Dataset.from_dict({**columns, **changes})


def make(output_dir, *, cls=LightningOPDTrainer, model=None, rows=None, callbacks=None, peft_config=None, evaluation=None, tokenizer=None,
         **changes):  # fmt: skip
    options = {
        "output_dir": str(output_dir),
        "use_cpu": True,
        "bf16": False,
        "report_to": "none",
        "disable_tqdm": True,
        "gradient_checkpointing": False,
        "per_device_train_batch_size": 4,
        "gradient_accumulation_steps": 2,
        "max_steps": 2,
        "logging_steps": 1,
        "learning_rate": 0.01,
        "optim": "sgd",
        "max_grad_norm": 0.0,
        "lr_scheduler_type": "constant",
        "save_strategy": "no",
        "seed": 5,
    }
    return cls(
        model=student() if model is None else model,
        args=LightningOPDConfig(**{**options, **changes}),
        train_dataset=scored() if rows is None else rows,
        eval_dataset=evaluation,
        processing_class=tokenizer or tiny_tokenizer(),
        callbacks=callbacks,
        peft_config=peft_config,
    )


class recording(LightningOPDTrainer):  # noqa: N801
    """Keeps the batches of each update, and the weights after it."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.windows, self.states, self._open = [], [], []

    def _prepare_for_training(self, *args, **kwargs):
        prepared = super()._prepare_for_training(*args, **kwargs)
        self.start = weights_of(self)
        return prepared

    def compute_loss(self, model, inputs, *args, **kwargs):
        if model.training:
            self._open.append({name: inputs[name].clone() for name in ("input_ids", "labels")})
        return super().compute_loss(model, inputs, *args, **kwargs)

    def log(self, logs, start_time=None):
        if "loss" in logs:
            self.windows.append(self._open)
            self.states.append(weights_of(self))
            self._open = []
        super().log(logs, start_time)


def sequences(batch):
    """Each row of a batch without its padding: tokens, and the place of its first completion token."""
    for ids, labels in zip(batch["input_ids"], batch["labels"], strict=True):
        places = (labels != -100).nonzero().flatten().tolist()
        yield ids[: places[-1] + 1], places[0]


def log_probs(model, ids, first):
    """`(T,)` in the model's own precision, from whole logits."""
    table = model(input_ids=ids[None]).logits[0].log_softmax(-1)
    return table[first - 1 : -1].gather(1, ids[first:, None]).squeeze(1)


def replay(model, start, windows, learning_rate, clip=10.0, aggregation="sequence"):
    """
    SGD in float64 on the recorded rows, each alone and unpadded; the teacher is asked anew. Yields the weights and the
    metrics of each update.
    """
    model, judge = copy.deepcopy(model).double(), teacher().double()
    model.load_state_dict({**model.state_dict(), **{name: value.double() for name, value in start.items()}})
    for window in windows:
        rows = [row for batch in window for row in sequences(batch)]
        model.zero_grad()
        losses, gaps = [], []
        for ids, first in rows:
            own = log_probs(model, ids, first)
            with torch.no_grad():
                gap = log_probs(judge, ids, first) - own
            bounded = gap if clip is None else gap.clamp(min=-clip, max=clip)
            losses.append(-bounded * own)
            gaps.append(gap)
        if aggregation == "sequence":
            loss = torch.stack([each.mean() for each in losses]).mean()
        else:
            loss = torch.cat(losses).mean()
        loss.backward()
        with torch.no_grad():
            for name in start:
                model.get_parameter(name).sub_(learning_rate * model.get_parameter(name).grad)
        gap = torch.cat(gaps)
        bounded = gap if clip is None else gap.clamp(-clip, clip)
        metrics = {
            "loss": float(loss.detach()),
            "opd/advantage_mean": float(gap.mean()),
            "opd/advantage_abs": float(gap.abs().mean()),
            "opd/advantage_clip_fraction": float((bounded != gap).double().mean()),
            "opd/reverse_kl": float(-gap.mean()),
        }
        yield {name: model.get_parameter(name).detach().clone() for name in start}, metrics

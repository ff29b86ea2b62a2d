"""The real task: a reasoning-gym task with worked solutions, by an instruction-tuned model."""

import random
from pathlib import Path

import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, TrainerState

from ...data.reasoning_gym_tasks import reasoning_gym_dataset
from ...generation.engines import Sampling, generate_batch, job_seed, prompt_ids
from ...models import load_smollm2
from ...rewards.calling import call_reward
from ...rewards.reasoning_gym_rewards import reasoning_gym_reward
from ...training.randomness import forked_python_rng
from .specs import ReasoningGymSpec
from .task import BuiltTask


_BATCH = 32


def make_task(spec: ReasoningGymSpec, seed: int, cache: Path | None = None) -> BuiltTask:
    """Generate the rows and load the model; nothing is trained, so nothing is kept in the cache."""
    held_out = spec.validation_size + spec.test_size
    rows = reasoning_gym_dataset(spec.task, spec.train_size, held_out, seed, **spec.parameters)
    train, rest = rows["train"], rows["test"]
    if "completion" not in train.column_names:
        raise ValueError(f"`task: {spec.task}` has no worked solutions to serve as demonstrations.")
    splits = {
        "validation": rest.select(range(min(spec.validation_size, len(rest)))),
        "test": rest.select(range(spec.validation_size, len(rest))),
    }
    if spec.ood_parameters:
        parameters = {**spec.parameters, **spec.ood_parameters}
        splits["ood"] = reasoning_gym_dataset(spec.task, spec.ood_size, 0, seed, **parameters)["train"]
    if spec.model == "builtin:smollm2-135m":
        model, tokenizer = load_smollm2()
    else:
        model = AutoModelForCausalLM.from_pretrained(spec.model, dtype=torch.float32)
        tokenizer = AutoTokenizer.from_pretrained(spec.model)
    demonstrations = _with_wrong(train, spec.wrong_share, seed)
    prompts = train.remove_columns("completion")
    limit = spec.max_new_tokens

    def scorer(scored: PreTrainedModel, task: BuiltTask, split: Dataset) -> dict[str, float]:
        return {"accuracy": _accuracy(scored, task, split, limit)}

    return BuiltTask(tokenizer, model, prompts, demonstrations, splits, reasoning_gym_reward, scorer)


def _with_wrong(rows: Dataset, share: float, seed: int) -> Dataset:
    """A share of the rows with the worked solution of another question: well formed, and wrong."""
    generator = random.Random(seed)
    wrong = generator.sample(range(len(rows)), round(share * len(rows)))
    completions = list(rows["completion"])
    for index, other in zip(wrong, wrong[1:] + wrong[:1], strict=True):
        completions[index] = rows[other]["completion"]
    return rows.remove_columns("completion").add_column("completion", completions)


def _accuracy(model: PreTrainedModel, task: BuiltTask, split: Dataset, max_new_tokens: int) -> float:
    training = model.training
    model.eval()
    right = 0.0
    sampling = Sampling(max_new_tokens, 0.0, 1.0)
    devices = [model.device] if model.device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices), forked_python_rng():
        for start in range(0, len(split), _BATCH):
            rows = split.select(range(start, min(start + _BATCH, len(split)))).to_list()
            prompts = [prompt_ids(row["prompt"], task.tokenizer, {}) for row in rows]
            seeds = [job_seed(0, "compare", start + row, 0) for row in range(len(prompts))]
            generated = generate_batch(model, task.tokenizer, prompts, seeds, sampling)
            texts, ids = [each.text for each in generated], [each.ids for each in generated]
            scores = call_reward(task.reward, rows, texts, ids, TrainerState())
            right += sum(score is not None and score >= 1.0 for score in scores)
    model.train(training)
    return right / len(split)

"""Rollouts for methods that read a teacher's stored scores: sampled from the base model and scored, before training."""

from pathlib import Path
from typing import Any

from datasets import Dataset
from transformers import PreTrainedModel

from ...distillation.collect import sample_rollouts, score_rollouts, write_rollouts
from ...distillation.identity import rollout_identity
from ...distillation.scoring import LocalTeacher
from ...generation.engines import Job, Sampling, TransformersEngine, job_seed, prompt_ids
from .task import BuiltTask


SAMPLING = {"temperature": 1.0, "max_completion_length": 256}
"""Keys of a row that say how its rollouts are sampled, and their defaults."""

# Few and large: between two batches accelerate collects garbage, which costs more than a batch.
_BATCH = 1024


def scored_rollouts(
    task: BuiltTask, teacher: PreTrainedModel, number: int, seed: int, sampling: dict[str, Any], folder: Path
) -> Dataset:
    """What `trl-bridge data score-rollouts` makes, of models in memory."""
    prompts = [prompt_ids(prompt, task.tokenizer) for prompt in task.train["prompt"]]
    jobs = []
    for place in range(number):
        sample, question = divmod(place, len(prompts))
        jobs.append(Job(question, sample, prompts[question], job_seed(seed, "rollouts", question, sample)))
    drawing = Sampling(sampling["max_completion_length"], sampling["temperature"])
    identity = rollout_identity(
        student={"model": "base model"},
        teacher={"model": "teacher"},
        # No model's answers: it learned from what the task generates.
        sft_teacher="none",
        tokenizer=task.tokenizer,
        conversational=not isinstance(task.train[0]["prompt"], str),
        chat_template_kwargs={},
        sampling={**sampling, "seed": seed},
    )
    student = task.fresh_model()
    rollouts = sample_rollouts(
        jobs,
        lambda: TransformersEngine(student, task.tokenizer, _BATCH),
        drawing,
        folder / "rollouts",
        identity,
        _BATCH,
    ).records
    scores = score_rollouts(rollouts, lambda: LocalTeacher(teacher, _BATCH), folder / "teacher", identity, _BATCH)
    return write_rollouts(folder / "train.parquet", rollouts, scores.records, [], identity)

"""Evaluation of one model on one task, resumable after a kill."""

import datetime
import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from accelerate import PartialState
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

from .. import __version__
from ..generation.day import template_kwargs
from ..generation.engines import Engine, Generated, Job, Sampling, jobs_of
from ..generation.records import Store
from .report import RECORD_FIELDS, summarise
from .tasks import Grade, Task, check_grader, grade


def make_jobs(
    task: Task, tokenizer: PreTrainedTokenizerBase, samples: int, seed: int, context: int | None = None
) -> list[Job]:
    """
    All completions that a task needs, question by question.

    Args:
        task ([`Task`]):
            The task.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]):
            Tokenizer of the model.
        samples (`int`):
            Samples per question.
        seed (`int`):
            Seed of the evaluation.
        context (`int`, *optional*):
            Longest sequence of the model: what a prompt leaves of it bounds its own completions. `None` bounds none.

    Returns:
        `list[Job]`: `len(task.rows) * samples` jobs.

    Raises:
        ValueError: `samples` below 1, or prompts that the tokenizer cannot render.
    """
    if samples < 1:
        raise ValueError(f"`n` must be 1 or more, got {samples}.")
    prompts = [row["prompt"] for row in task.rows]
    kwargs = task.prompting.chat_template_kwargs
    if task.prompting.day is not None:
        kwargs = template_kwargs(tokenizer, task.prompting.day, kwargs)
    jobs = jobs_of(prompts, tokenizer, samples, seed, task.name, kwargs)
    return jobs if context is None else [job._replace(room=max(context - len(job.ids), 0)) for job in jobs]


def check_task(
    task: Task,
    jobs: Sequence[Job],
    engine: str,
    sampling: Sampling,
    folder: Path,
    *,
    model: dict[str, Any],
    seed: int = 0,
) -> dict[str, Any]:
    """Refuse what [`evaluate_task`] would refuse, without a model."""
    samples = _samples(jobs)
    if samples > 1 and sampling.temperature == 0:
        raise ValueError(f"`n: {samples}` at temperature 0 would draw the same completion {samples} times.")
    settings = _settings(task, engine, sampling, model, seed)
    Store(folder).check(settings)
    check_grader(task)
    return settings


def evaluate_task(
    task: Task,
    jobs: Sequence[Job],
    engine: Engine,
    sampling: Sampling,
    folder: Path,
    *,
    model: dict[str, Any],
    seed: int = 0,
    threshold: float = 1.0,
) -> dict[str, Any] | None:
    """
    Draw and grade what is still missing, and summarise.

    Every completion is appended to `folder/completions.jsonl` as its batch is done; jobs found there are not run again. The
    questions are split over the ranks of the launch.

    Args:
        task ([`Task`]):
            The task.
        jobs (`Sequence[Job]`):
            What [`make_jobs`] made of it.
        engine ([`Engine`]):
            Draws completions.
        sampling ([`Sampling`]):
            How.
        folder (`Path`):
            Folder of this task.
        model (`dict[str, Any]`):
            What identifies the model, as JSON values; `path` goes into the table.
        seed (`int`, *optional*, defaults to `0`):
            Seed that the jobs were made with.
        threshold (`float`, *optional*, defaults to `1.0`):
            Score from which an answer is right.

    Returns:
        `dict[str, Any]`, *optional*: what is written to `folder/results.json`; `None` on ranks but the first.

    Raises:
        ValueError: greedy decoding with several samples, a grader that does not fit the rows, or a folder with
            completions that were made in another way.
    """
    settings = check_task(task, jobs, engine.name, sampling, folder, model=model, seed=seed)
    state = PartialState()
    store = Store(folder, state.process_index, RECORD_FIELDS)
    # Nobody writes before everybody has read.
    done = {(record["question"], record["sample"]) for record in store.read()}
    state.wait_for_everyone()
    if state.is_main_process:
        store.write_settings(settings)
    state.wait_for_everyone()
    missing = [job for job in jobs if (job.question, job.sample) not in done]
    questions = set(sorted({job.question for job in missing})[state.process_index :: state.num_processes])
    _fill(task, [job for job in missing if job.question in questions], engine, sampling, store, len(done))
    state.wait_for_everyone()
    if not state.is_main_process:
        return None
    results = {
        "benchmark": task.name,
        "model": model["path"],
        **summarise(store.finish(), len(task.rows), _samples(jobs), threshold, sampling.max_new_tokens),
        **{key: value for key, value in settings.items() if key != "model"},
        "model_details": model,
        "example_prompt": task.rows[0]["prompt"],
        "versions": {
            "trl_bridge": __version__,
            "transformers": transformers.__version__,
            "torch": torch.__version__,
        },
        "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC"),
    }
    text = json.dumps(results, indent=2, ensure_ascii=False) + "\n"
    (folder / "results.json").write_text(text, encoding="utf-8")
    return results


def _samples(jobs: Sequence[Job]) -> int:
    return 1 + max(job.sample for job in jobs)


def _settings(task: Task, engine: str, sampling: Sampling, model: dict[str, Any], seed: int) -> dict[str, Any]:
    """All that a completion or its score depends on. The number of samples is not among them: more may be added."""
    greedy = sampling.temperature == 0
    day = {} if task.prompting.day is None else {"day": task.prompting.day}
    return {
        "model": model,
        "source": task.source,
        "rows": task.fingerprint,
        "prompt_format": {
            "template": task.template,
            "system_prompt": task.prompting.system_prompt,
            "chat_template": not isinstance(task.rows[0]["prompt"], str),
            "chat_template_kwargs": task.prompting.chat_template_kwargs,
        },
        "grader": task.grader_name,
        "sampling": {
            "temperature": sampling.temperature,
            "top_p": None if greedy else sampling.top_p,
            "max_new_tokens": sampling.max_new_tokens,
        },
        "seed": seed,
        "engine": engine,
        **day,
    }


def _fill(task: Task, jobs: Sequence[Job], engine: Engine, sampling: Sampling, store: Store, done: int) -> None:
    # A prompt that fills the context is not answered: wrong, and counted.
    store.append(
        _record(task, job, Generated("", 0, True), Grade(0.0, None, False, False), 0.0)
        for job in jobs
        if job.room == 0
    )
    # The longest first, beside their likes: less padding, and memory that does not suffice shows at once.
    jobs = sorted((job for job in jobs if job.room != 0), key=lambda job: len(job.ids), reverse=True)
    place = 0
    with tqdm(total=done + len(jobs), initial=done, desc=task.name, disable=store.rank != 0) as bar:
        start = time.perf_counter()
        for batch in engine(jobs, sampling):
            chunk = jobs[place : place + len(batch)]
            place += len(batch)
            texts, ids = [generated.text for generated in batch], [generated.ids for generated in batch]
            grades = grade(task, [job.question for job in chunk], texts, ids)
            now = time.perf_counter()
            store.append(
                _record(task, job, generated, each, (now - start) / len(batch))
                for job, generated, each in zip(chunk, batch, grades, strict=True)
            )
            start = now
            bar.update(len(batch))


def _record(task: Task, job: Job, generated: Generated, graded: Any, seconds: float) -> dict[str, Any]:
    row = task.rows[job.question]
    return {
        "question": job.question,
        "sample": job.sample,
        "prompt": row["prompt"],
        "completion": generated.text,
        "answer": graded.answer,
        "gold": row.get("solution"),
        "score": graded.score,
        "answered": graded.answered,
        "stopped": graded.stopped,
        "tokens": generated.tokens,
        "truncated": generated.truncated,
        "seconds": round(seconds, 4),
    }

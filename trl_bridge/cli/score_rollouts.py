"""`trl-bridge data score-rollouts`: rows for Lightning OPD, sampled from the student and scored by the teacher, once."""

import argparse
import hashlib
import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .errors import UsageError, json_mapping


if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase

    from ..generation.engines import Engine, Job, Sampling

# The longest completion of the released program.
_MAX_NEW_TOKENS = 4096


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the verb's own options."""
    add = parser.add_argument
    add("--teacher", required=True, help="model that scores: a directory, a name on the hub, builtin:smollm2-135m")
    add(
        "--sft_teacher",
        required=True,
        help="model that wrote the SFT data of --model; training refuses another one than --teacher",
    )
    add("--output_dir", required=True, metavar="FOLDER", help="where the rows and the unfinished work are written")
    add("--format", choices=("parquet", "jsonl"), default="parquet", help="kind of the file (parquet)")
    add("--teacher_url", help="vLLM server that serves --teacher, such as http://localhost:8000")
    add("--samples", type=int, default=1, help="completions per prompt (1)")
    add("--temperature", type=float, default=0.8, help="sampling temperature (0.8, the paper's)")
    add("--top_p", type=float, default=1.0, help="mass of the nucleus (1)")
    add("--max_new_tokens", type=int, help="longest completion (4096, or what the two models' contexts leave)")
    add("--seed", type=int, default=0, help="seed of the completions (0)")
    add("--limit", type=int, help="first rows only")
    add("--chat_template_kwargs", help="variables for the chat template, as JSON: '{\"enable_thinking\": false}'")
    add("--reference_logprobs", action="store_true", help="store the student's own scores too, for the metrics")
    add("--batch_size", type=int, default=64, help="completions at a time; halved when out of memory (64)")
    add("--score_batch_size", type=int, default=16, help="rollouts scored at a time; halved when out of memory (16)")
    add("--dtype", default="auto", choices=("auto", "bfloat16", "float16", "float32"), help="weights' type (auto)")
    add("--use_vllm", action="store_true", help="sample with vLLM")
    add("--vllm_gpu_memory_utilization", type=float, default=0.9, help="vLLM's share of the GPU's memory (0.9)")


def run(options: argparse.Namespace, rows: "Dataset", tokenizer: "PreTrainedTokenizerBase | None") -> list[str]:
    """Sample, score and write."""
    from ..data.rows import prompt_of
    from ..distillation.collect import sample_rollouts, score_rollouts, write_rollouts
    from ..distillation.scoring import LocalTeacher, ServedTeacher
    from ..generation.day import template_kwargs, today
    from ..generation.records import Store

    _check(options, tokenizer)
    assert tokenizer is not None
    kwargs = json_mapping("--chat_template_kwargs", options.chat_template_kwargs)
    if options.limit is not None:
        rows = rows.select(range(min(options.limit, len(rows))))
    folder = Path(options.output_dir)
    # A run that is taken up again goes on with the day of its first start.
    day = Store(folder / "rollouts").day(tokenizer, today())
    jobs = _jobs(options, rows, tokenizer, kwargs if day is None else template_kwargs(tokenizer, day, kwargs))
    sampling = _sampling(options, jobs)
    _check_teacher(options, tokenizer)
    batch_size = options.score_batch_size
    served = ServedTeacher(options.teacher_url, batch_size) if options.teacher_url else None
    if served is not None:
        _check_served(options, served.model)
    identity = _identity(
        options, tokenizer, sampling, served, kwargs if isinstance(prompt_of(rows[0]), list) else None
    )
    sampled_with = {name: identity[name] for name in ("student", "tokenizer", "sampling")}
    sampled_with["prompts"] = hashlib.sha256(json.dumps([job.ids for job in jobs]).encode()).hexdigest()[:16]
    sampled_with |= {} if day is None else {"day": day}
    student = _Student(options, tokenizer, jobs, sampling)
    rollouts = sample_rollouts(jobs, student.engine, sampling, folder / "rollouts", sampled_with, options.batch_size)
    reference = None
    if options.reference_logprobs:
        reference = score_rollouts(
            rollouts.records,
            lambda: LocalTeacher(student.model(), batch_size),
            folder / "reference",
            sampled_with,
            batch_size,
            "scoring (student)",
        )
    student.release()
    scored = score_rollouts(
        rollouts.records,
        lambda: served or LocalTeacher(_load(options.teacher, options.dtype), batch_size),
        folder / "teacher",
        {**sampled_with, "teacher": identity["teacher"]},
        batch_size,
    )
    path = folder / f"train.{options.format}"
    dataset = write_rollouts(path, rollouts.records, scored.records, reference.records if reference else [], identity)
    values = [value for row in scored.records for value in row["logprobs"]]
    truncated = sum(row["truncated"] for row in rollouts.records)
    return [
        f"sampled: {rollouts.speed}",
        f"scored: {scored.speed}",
        f"wrote {len(dataset)} rollouts, {len(values)} tokens, to {path}: {truncated} cut at {sampling.max_new_tokens} "
        f"tokens, mean teacher log-probability {sum(values) / len(values):.3f}",
    ]


class _Student:
    """The model that samples, loaded when it is needed and given back before the teacher comes."""

    def __init__(self, options: argparse.Namespace, tokenizer: Any, jobs: "list[Job]", sampling: "Sampling"):
        self.options, self.tokenizer, self.jobs, self.sampling = options, tokenizer, jobs, sampling
        self._model: Any = None
        self._engine: Any = None

    def model(self) -> Any:
        if self._model is None:
            self._engine = None
            self._model = _load(self.options.model, self.options.dtype)
        return self._model

    def engine(self) -> "Engine":
        from ..generation.engines import TransformersEngine, VllmEngine, longest_prompt

        options = self.options
        if not options.use_vllm:
            return TransformersEngine(self.model(), self.tokenizer, options.batch_size)
        context = longest_prompt(self.jobs) + self.sampling.max_new_tokens
        share = options.vllm_gpu_memory_utilization
        self._engine = VllmEngine(
            options.model, context, options.batch_size, dtype=options.dtype, gpu_memory_utilization=share
        )
        return self._engine

    def release(self) -> None:
        import gc

        import torch

        self._model = self._engine = None
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def _check(options: argparse.Namespace, tokenizer: Any) -> None:
    from ..generation.engines import check_vllm
    from ..models import check_name, is_builtin

    if tokenizer is None:
        raise UsageError("`--model` is needed: the model that the rollouts are sampled from")
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise UsageError(
            "score-rollouts runs in one process; for more than one GPU give it a server with --teacher_url"
        )
    for name in ("samples", "limit", "batch_size", "score_batch_size"):
        if getattr(options, name) is not None and getattr(options, name) < 1:
            raise UsageError(f"`--{name}` must be 1 or more, got {getattr(options, name)}")
    if options.temperature <= 0:
        raise UsageError(f"`--temperature` must be above 0: rollouts are sampled, got {options.temperature}")
    if options.use_vllm:
        check_vllm(options.model)
    if options.teacher_url and is_builtin(options.teacher):
        raise UsageError(f"`--teacher_url`: a server cannot serve {options.teacher}, which is made in memory")
    check_name(options.teacher, "--teacher")


def _jobs(options: argparse.Namespace, rows: "Dataset", tokenizer: Any, kwargs: dict[str, Any]) -> "list[Job]":
    from ..data.rows import prompt_of
    from ..generation.engines import jobs_of

    jobs = jobs_of(map(prompt_of, rows), tokenizer, options.samples, options.seed, "rollouts", kwargs)
    empty = next((job.question for job in jobs if not job.ids), None)
    if empty is not None:
        raise ValueError(f"row {empty} of {options.name} has an empty prompt")
    return jobs


def _sampling(options: argparse.Namespace, jobs: "list[Job]") -> "Sampling":
    from ..generation.engines import Sampling, fitting_length, longest_prompt
    from ..models import context_of

    contexts = {options.model: context_of(options.model)}
    teacher = context_of(options.teacher)
    if options.teacher_url and teacher is not None:
        contexts[f"{options.teacher}, whose server is asked for one token more,"] = teacher - 1
    else:
        contexts[options.teacher] = teacher
    length = fitting_length(
        longest_prompt(jobs), "the longest prompt", contexts, options.max_new_tokens, _MAX_NEW_TOKENS
    )
    return Sampling(length, options.temperature, options.top_p)


def _identity(
    options: argparse.Namespace,
    tokenizer: "PreTrainedTokenizerBase",
    sampling: "Sampling",
    served: Any,
    template_kwargs: dict[str, Any] | None,
) -> dict[str, Any]:
    """What is stored beside each row."""
    from ..distillation.identity import rollout_identity

    drawn = {name: getattr(sampling, name) for name in ("temperature", "top_p", "max_new_tokens")}
    teacher = _describe(options.teacher, options.dtype, served is not None)
    return rollout_identity(
        student=_describe(options.model, options.dtype),
        teacher={**teacher, "engine": served.name if served else "transformers"},
        sft_teacher=options.sft_teacher,
        tokenizer=tokenizer,
        conversational=template_kwargs is not None,
        chat_template_kwargs=template_kwargs or {},
        sampling={**drawn, "seed": options.seed, "engine": "vllm" if options.use_vllm else "transformers"},
    )


def _describe(name: str, dtype: str, served: bool = False) -> dict[str, Any]:
    """A model's name and what tells it from another of that name. Of a served one the name is all that can be known."""
    from ..distillation.identity import model_name
    from ..generation.records import model_identity
    from ..models import is_builtin

    if served:
        return {"model": model_name(name)}
    found = {} if is_builtin(name) else model_identity(name)
    known = {key: value for key, value in found.items() if value is not None}
    return {"model": model_name(name), "dtype": dtype, **known}


def _check_teacher(options: argparse.Namespace, tokenizer: Any) -> None:
    from ..data.files import warn
    from ..distillation.identity import template_hash, vocabulary_hash
    from ..models import load_tokenizer

    own = load_tokenizer(options.teacher)
    if vocabulary_hash(own) != vocabulary_hash(tokenizer):
        raise UsageError(
            f"`--teacher {options.teacher}` has another vocabulary than {options.model}: it would score other tokens. Take a "
            "teacher of the same family, or TRL's GOLD for different tokenizers"
        )
    if template_hash(own) != template_hash(tokenizer):
        warn(
            f"{options.teacher} and {options.model} have different chat templates. The teacher scores the prompts as the "
            "student's template renders them."
        )


def _check_served(options: argparse.Namespace, served: str) -> None:
    from ..distillation.identity import model_name

    if model_name(served) != model_name(options.teacher):
        raise UsageError(
            f"`--teacher {options.teacher}`: the server at {options.teacher_url} serves {served}. Name that model, or start "
            f"the server with --served-model-name {options.teacher}"
        )


def _load(name: str, dtype: str) -> Any:
    from accelerate import PartialState

    from ..models import load

    model: Any = load(name, dtype=dtype)
    return model.to(PartialState().device)

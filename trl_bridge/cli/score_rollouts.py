"""`trl-bridge data score-rollouts`: rows for Lightning OPD, sampled from the student and scored by the teacher, once."""

import argparse
import hashlib
import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .errors import UsageError


if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase

    from ..generation.generate import Engine, Job, Sampling

__all__ = ["add_options", "run"]

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


def run(options: argparse.Namespace, rows: "Dataset", tokenizer: "PreTrainedTokenizerBase | None") -> list[str]:
    """Sample, score and write."""
    from ..distillation.collect import sample_rollouts, score_rollouts, write_rollouts
    from ..distillation.identity import rollout_identity
    from ..distillation.scoring import LocalTeacher, ServedTeacher

    _check(options, tokenizer)
    assert tokenizer is not None
    kwargs = _template_kwargs(options.chat_template_kwargs)
    if options.limit is not None:
        rows = rows.select(range(min(options.limit, len(rows))))
    jobs = _jobs(options, rows, tokenizer, kwargs)
    sampling = _sampling(options, jobs)
    _check_teacher(options, tokenizer)
    served = ServedTeacher(options.teacher_url, options.score_batch_size) if options.teacher_url else None
    if served is not None:
        _check_served(options, served.model)
    engine_name = "vllm" if options.use_vllm else "transformers"
    identity = rollout_identity(
        student=_describe(options.model, options.dtype),
        teacher={
            **_describe(options.teacher, options.dtype, served is not None),
            "engine": served.name if served else "transformers",
        },
        sft_teacher=options.sft_teacher,
        tokenizer=tokenizer,
        conversational=not isinstance(_prompt(rows[0]), str),
        chat_template_kwargs=kwargs,
        sampling={
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            "max_new_tokens": sampling.max_new_tokens,
            "seed": options.seed,
            "engine": engine_name,
        },
    )
    folder = Path(options.output_dir)
    sampled_with = {name: identity[name] for name in ("student", "tokenizer", "sampling")}
    sampled_with["prompts"] = hashlib.sha256(json.dumps([job.ids for job in jobs]).encode()).hexdigest()[:16]
    student = _Student(options, tokenizer, jobs, sampling)
    rollouts = sample_rollouts(jobs, student.engine, sampling, folder / "rollouts", sampled_with, options.batch_size)
    reference = None
    if options.reference_logprobs:
        reference = score_rollouts(
            rollouts.records,
            lambda: LocalTeacher(student.model(), options.score_batch_size),
            folder / "reference",
            sampled_with,
            options.score_batch_size,
            "scoring (student)",
        )
    student.release()
    scored = score_rollouts(
        rollouts.records,
        lambda: served or LocalTeacher(_load(options.teacher, options.dtype), options.score_batch_size),
        folder / "teacher",
        {**sampled_with, "teacher": identity["teacher"]},
        options.score_batch_size,
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
        from ..generation.generate import TransformersEngine
        from ..generation.vllm_engine import VllmEngine

        options = self.options
        if options.use_vllm:
            context = max(len(job.ids) for job in self.jobs) + self.sampling.max_new_tokens
            self._engine = VllmEngine(options.model, context, options.batch_size, dtype=options.dtype)
            return self._engine
        return TransformersEngine(self.model(), self.tokenizer, options.batch_size)

    def release(self) -> None:
        import gc

        import torch

        self._model = self._engine = None
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def _check(options: argparse.Namespace, tokenizer: Any) -> None:
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
    if options.use_vllm and options.model.startswith("builtin:"):
        raise UsageError("`--use_vllm` needs a model on disk or on the hub; the built-in ones are made in memory")
    if options.teacher_url and options.teacher.startswith("builtin:"):
        raise UsageError(f"`--teacher_url`: a server cannot serve {options.teacher}, which is made in memory")


def _template_kwargs(text: str | None) -> dict[str, Any]:
    try:
        values = json.loads(text or "{}")
    except ValueError:
        values = None
    if not isinstance(values, dict):
        raise UsageError(f"`--chat_template_kwargs {text}` is no JSON mapping")
    return values


def _prompt(row: dict[str, Any]) -> Any:
    from ..demonstrations.rows import split_demonstration

    return row["prompt"] if "prompt" in row else split_demonstration(row)[0]


def _jobs(options: argparse.Namespace, rows: "Dataset", tokenizer: Any, kwargs: dict[str, Any]) -> "list[Job]":
    from ..generation.generate import Job, job_seed, prompt_ids

    jobs = []
    for question, row in enumerate(rows):
        ids = prompt_ids(_prompt(row), tokenizer, kwargs)
        if not ids:
            raise ValueError(f"row {question} of {options.name} has an empty prompt")
        seeds = (job_seed(options.seed, "rollouts", question, sample) for sample in range(options.samples))
        jobs += [Job(question, sample, ids, seed) for sample, seed in enumerate(seeds)]
    return jobs


def _sampling(options: argparse.Namespace, jobs: "list[Job]") -> "Sampling":
    from ..generation.generate import Sampling

    # A server that scores is asked for one new token too.
    contexts = [(_context(options.model), options.model, 0)]
    contexts += [(_context(options.teacher), options.teacher, 1 if options.teacher_url else 0)]
    longest = max(len(job.ids) for job in jobs)
    left, wanted = None, options.max_new_tokens
    for context, name, asked in contexts:
        if context is None:
            continue
        fits = context - longest - asked
        if fits < (wanted or 1):
            raise UsageError(
                f"`--max_new_tokens {wanted or 1}`: the longest prompt has {longest} tokens and {name} a context of {context}, "
                f"which leaves {max(fits, 0)}"
            )
        left = fits if left is None else min(left, fits)
    if wanted is None:
        wanted = _MAX_NEW_TOKENS if left is None else min(_MAX_NEW_TOKENS, left)
    return Sampling(wanted, options.temperature, options.top_p)


def _context(name: str) -> int | None:
    if name.startswith("builtin:") or (Path(name) / "adapter_config.json").is_file():
        return None
    from transformers import AutoConfig

    return getattr(AutoConfig.from_pretrained(name).get_text_config(), "max_position_embeddings", None)


def _check_teacher(options: argparse.Namespace, tokenizer: Any) -> None:
    from trl import ModelConfig

    from ..data.log import warn
    from ..distillation.identity import template_hash, vocabulary_hash
    from .datasets import load_tokenizer

    own = load_tokenizer(ModelConfig(model_name_or_path=options.teacher))
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


def _describe(name: str, dtype: str, served: bool = False) -> dict[str, Any]:
    """A model's name and what tells it from another of that name. Of a served one the name is all that can be known."""
    from ..distillation.identity import model_name
    from ..generation.records import model_identity

    found: dict[str, Any] = {"model": model_name(name)}
    if served:
        return found
    found["dtype"] = dtype
    return found if name.startswith("builtin:") else found | model_identity(name, {})


def _load(name: str, dtype: str) -> Any:
    from accelerate import PartialState

    if name.startswith("builtin:"):
        from .train import builtin_model

        model = builtin_model(name, seed=0)["model"]
    else:
        from transformers import AutoModelForCausalLM

        model = AutoModelForCausalLM.from_pretrained(name, dtype=dtype)
    return model.to(PartialState().device)

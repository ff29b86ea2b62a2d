"""Batched generation with transformers or vLLM, reproducible for each question and sample whatever the batch or the resume point."""

import hashlib
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch
from accelerate.utils import find_executable_batch_size
from transformers import (
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    StoppingCriteria,
    StoppingCriteriaList,
    TemperatureLogitsWarper,
    TopPLogitsWarper,
)

from ..models import is_builtin


# Rows leave a batch when this share of it has ended: each time costs a copy of the others' keys and values.
_DROPPED_SHARE = 0.125


@dataclass(frozen=True)
class Sampling:
    """
    How completions are drawn.

    Attributes:
        max_new_tokens (`int`):
            Longest completion, in tokens.
        temperature (`float`, *optional*, defaults to `0.0`):
            0 is greedy decoding.
        top_p (`float`, *optional*, defaults to `1.0`):
            Mass of the nucleus; not read at temperature 0.
    """

    max_new_tokens: int
    temperature: float = 0.0
    top_p: float = 1.0

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1:
            raise ValueError(f"`max_new_tokens` must be 1 or more, got {self.max_new_tokens}.")
        if self.temperature < 0:
            raise ValueError(f"`temperature` must be 0 (greedy) or more, got {self.temperature}.")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"`top_p` must lie in (0, 1], got {self.top_p}.")


class Job(NamedTuple):
    """One completion to draw; `room` is what the model's context leaves for it, where that is known."""

    question: int
    sample: int
    ids: list[int]
    seed: int
    room: int | None = None

    def limit(self, sampling: Sampling) -> int:
        """Longest completion of this job."""
        return sampling.max_new_tokens if self.room is None else min(self.room, sampling.max_new_tokens)


class Generated(NamedTuple):
    """A completion."""

    text: str
    tokens: int
    truncated: bool
    ids: Sequence[int] = ()


class Engine(Protocol):
    """Draws completions, batch by batch, in the order of the jobs."""

    name: str

    def __call__(self, jobs: Sequence[Job], sampling: Sampling) -> Iterator[list[Generated]]: ...


class _GumbelNoise(LogitsProcessor):
    """
    Adds Gumbel noise of one generator per row, so that the argmax is an exact sample of the softmax (Gumbel-max).

    `generate` samples a batch from the one global generator: what a row draws then depends on its neighbours.
    """

    def __init__(self, generators: Sequence[torch.Generator]):
        self.generators = generators

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        noise = torch.empty_like(scores, dtype=torch.float32)  # (batch, vocab)
        for row, generator in zip(noise, self.generators, strict=True):
            row.exponential_(generator=generator)
        # The smallest draw must not become infinite: against a masked logit that would be NaN.
        return scores - noise.clamp_min_(torch.finfo(torch.float32).tiny).log_()


def job_seed(seed: int, name: str, question: int, sample: int) -> int:
    """Seed of one completion."""
    digest = hashlib.sha256(f"{seed}/{name}/{question}/{sample}".encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


def prompt_ids(
    prompt: str | list[dict[str, Any]],
    tokenizer: PreTrainedTokenizerBase,
    template_kwargs: dict[str, Any] | None = None,
) -> list[int]:
    """Tokens of a prompt, as TRL's trainers make them: messages through the chat template, text as it is."""
    if isinstance(prompt, str):
        return list(tokenizer(prompt)["input_ids"])
    if tokenizer.chat_template is None:
        raise ValueError(
            "the prompts are conversations and the tokenizer has no chat template: give it one, or make the prompts text"
        )
    encoded: Any = tokenizer.apply_chat_template(
        prompt, add_generation_prompt=True, return_dict=True, **(template_kwargs or {})
    )
    return list(encoded["input_ids"])


def jobs_of(
    prompts: Iterable[Any],
    tokenizer: PreTrainedTokenizerBase,
    samples: int,
    seed: int,
    name: str,
    template_kwargs: dict[str, Any],
) -> list[Job]:
    """All completions of some prompts, question by question. `name` keeps the seeds of two lists of prompts apart."""
    jobs = []
    for question, prompt in enumerate(prompts):
        ids = prompt_ids(prompt, tokenizer, template_kwargs)
        jobs += [Job(question, sample, ids, job_seed(seed, name, question, sample)) for sample in range(samples)]
    return jobs


def longest_prompt(jobs: Sequence[Job]) -> int:
    """Length of the longest prompt, in tokens."""
    return max(len(job.ids) for job in jobs)


def fitting_length(
    tokens: int, prompt: str, contexts: Mapping[str, int | None], wanted: int | None, default: int
) -> int:
    """Longest completion: what is wanted, or the default as far as a prompt of so many tokens leaves room in each context."""
    left = {name: context - tokens for name, context in contexts.items() if context is not None}
    for name, fits in left.items():
        if fits < (wanted or 1):
            raise ValueError(
                f"`--max_new_tokens {wanted or 1}`: {prompt} has {tokens} tokens and {name} a context of "
                f"{contexts[name]}, which leaves {max(fits, 0)}"
            )
    return min([default, *left.values()]) if wanted is None else wanted


class _Ended(StoppingCriteria):
    """Which rows have ended, by a token or by their own length; stops them all as soon as a share of them has."""

    def __init__(self, ends: torch.Tensor, lengths: torch.Tensor, share: float):
        self.ends, self.lengths = ends, lengths
        self.rows = torch.zeros_like(lengths, dtype=torch.bool)
        self.enough = math.ceil(share * len(lengths))

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        self.rows |= torch.isin(input_ids[:, -1], self.ends) | (input_ids.shape[1] >= self.lengths)
        return torch.ones_like(self.rows) if self.rows.sum() >= self.enough else self.rows.clone()


@torch.no_grad()
def generate_batch(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[list[int]],
    seeds: Sequence[int],
    sampling: Sampling,
    limits: Sequence[int] | None = None,
    drop_ended: bool = False,
) -> list[Generated]:
    """
    Draw one completion for each prompt, of its own longest length where `limits` are given. Neither reads nor moves the
    global random state.

    Of the model's own generation config only the special tokens count. With `drop_ended` rows leave the batch soon after
    they end, which ranks that gather weights together must not do, each at its own time.
    """
    ends = _end_tokens(model, tokenizer)
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else ends[0]
    limits = limits or [sampling.max_new_tokens] * len(prompts)
    width = max(map(len, prompts))
    ids = torch.tensor([[pad] * (width - len(p)) + p for p in prompts], device=model.device)  # (batch, width)
    mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts], device=model.device)
    noise = [torch.Generator(model.device).manual_seed(seed) for seed in seeds]
    left, cache = list(range(len(prompts))), None
    drawn: dict[int, Generated] = {}
    # A recurrent state cannot be cut to some of its rows.
    share = _DROPPED_SHARE if drop_ended and not model._is_stateful else 1.0
    generate: Any = model.generate
    while left:
        lengths = torch.tensor([width + limits[row] for row in left], device=model.device)
        ended = _Ended(torch.tensor(ends, device=model.device), lengths, share)
        with _blank(model.generation_config):
            output = generate(
                input_ids=ids,
                attention_mask=mask,
                cache=cache,
                logits_processor=_processors(sampling, [noise[row] for row in left]),
                stopping_criteria=StoppingCriteriaList([ended]),
                generation_config=GenerationConfig(
                    max_length=int(lengths.max()),
                    do_sample=False,
                    eos_token_id=ends,
                    pad_token_id=pad,
                    return_dict_in_generate=True,
                ),
            )
        rows = output.sequences[:, width:].tolist()
        for place in ended.rows.nonzero().flatten().tolist():
            drawn[left[place]] = _generated(rows[place][: limits[left[place]]], ends, tokenizer)
        going = (~ended.rows).nonzero().flatten()
        left = [left[place] for place in going.tolist()]
        if left:
            cache = output.cache
            cache.batch_select_indices(going)
            ids = output.sequences[going]
            mask = torch.cat([mask[going], mask.new_ones(len(left), ids.shape[1] - mask.shape[1])], dim=1)
    return [drawn[row] for row in range(len(prompts))]


def _processors(sampling: Sampling, noise: Sequence[torch.Generator]) -> LogitsProcessorList:
    processors = LogitsProcessorList()
    if sampling.temperature > 0:
        processors.append(TemperatureLogitsWarper(sampling.temperature))
        if sampling.top_p < 1:
            processors.append(TopPLogitsWarper(sampling.top_p))
        processors.append(_GumbelNoise(noise))
    return processors


@contextmanager
def _blank(own: GenerationConfig) -> Iterator[None]:
    """A model's own generation config without its content: what a call leaves at `None` would be filled from it."""
    # In place, for a model may hold the object at several levels (PEFT does).
    kept = dict(vars(own))
    try:
        vars(own).clear()
        vars(own).update(vars(GenerationConfig()))
        yield
    finally:
        vars(own).clear()
        vars(own).update(kept)


def _end_tokens(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    own = model.generation_config.eos_token_id
    ends = [] if own is None else [own] if isinstance(own, int) else list(own)
    if tokenizer.eos_token_id is not None and tokenizer.eos_token_id not in ends:
        ends.append(tokenizer.eos_token_id)
    if not ends:
        raise ValueError(
            "neither the model nor its tokenizer has an end-of-sequence token, so no completion would end"
        )
    return ends


def _generated(ids: list[int], ends: list[int], tokenizer: PreTrainedTokenizerBase) -> Generated:
    length = next((place for place, token in enumerate(ids) if token in ends), None)
    kept = ids if length is None else ids[: length + 1]
    return Generated(str(tokenizer.decode(kept, skip_special_tokens=True)), len(kept), length is None, kept)


class HalvingBatches:
    """Work that is done batch by batch. Out of memory, the batch is halved until it fits, and stays there."""

    def __init__(self, batch_size: int):
        if batch_size < 1:
            raise ValueError(f"`batch_size` must be 1 or more, got {batch_size}.")
        self.batch_size = batch_size

    def in_batches(self, items: Sequence[Any], work: Callable[[Sequence[Any]], list[Any]]) -> Iterator[list[Any]]:
        """What `work` returns for each batch of the items, in their order."""
        done = 0

        def halve() -> int:
            self.batch_size //= 2
            return self.batch_size

        @find_executable_batch_size(starting_batch_size=self.batch_size, reduce_batch_size_fn=halve)
        def step(batch_size: int) -> list[Any]:
            return work(items[done : done + batch_size])

        while done < len(items):
            batch = step()
            done += len(batch)
            yield batch


class TransformersEngine(HalvingBatches):
    """
    Generation with transformers. Out of memory, the batch is halved until it fits, and stays there.

    Args:
        model ([`~transformers.PreTrainedModel`]):
            Model.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]):
            Its tokenizer.
        batch_size (`int`, *optional*, defaults to `64`):
            Completions at a time to start with.
    """

    name = "transformers"

    def __init__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, batch_size: int = 64):
        super().__init__(batch_size)
        self.model = model.eval()
        self.tokenizer = tokenizer

    def __call__(self, jobs: Sequence[Job], sampling: Sampling) -> Iterator[list[Generated]]:
        def work(batch: Sequence[Job]) -> list[Generated]:
            prompts, seeds = [job.ids for job in batch], [job.seed for job in batch]
            limits = [job.limit(sampling) for job in batch]
            return generate_batch(self.model, self.tokenizer, prompts, seeds, sampling, limits, drop_ended=True)

        return self.in_batches(jobs, work)


def check_vllm(model: str) -> None:
    """Refuse a model that vLLM cannot load."""
    if is_builtin(model):
        raise ValueError("`use_vllm` needs a model on disk or on the hub; the built-in ones are made in memory")


class VllmEngine:
    """Generation with vLLM's offline engine; each completion has its own seed."""

    name = "vllm"

    def __init__(self, model: str, max_model_len: int, batch_size: int = 1024, **options: Any):
        if batch_size < 1:
            raise ValueError(f"`batch_size` must be 1 or more, got {batch_size}.")
        try:
            import vllm
        except ImportError as error:
            raise ImportError("`use_vllm` needs the package `vllm`: pip install 'trl-bridge[vllm]'") from error
        self.batch_size = batch_size
        self._params = vllm.SamplingParams
        self._llm = vllm.LLM(model=model, max_model_len=max_model_len, **options)

    def __call__(self, jobs: Sequence[Job], sampling: Sampling) -> Iterator[list[Generated]]:
        for start in range(0, len(jobs), self.batch_size):
            batch = jobs[start : start + self.batch_size]
            outputs = self._llm.generate(
                [{"prompt_token_ids": job.ids} for job in batch],
                sampling_params=[
                    self._params(
                        n=1,
                        temperature=sampling.temperature,
                        top_p=sampling.top_p if sampling.temperature > 0 else 1.0,
                        max_tokens=job.limit(sampling),
                        seed=job.seed,
                    )
                    for job in batch
                ],
                use_tqdm=False,
            )
            firsts = [output.outputs[0] for output in outputs]
            yield [
                Generated(first.text, len(first.token_ids), first.finish_reason == "length", list(first.token_ids))
                for first in firsts
            ]

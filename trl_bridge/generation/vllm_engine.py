"""Batched generation with vLLM, which is imported when asked for."""

from collections.abc import Iterator, Sequence
from typing import Any

from .generate import Generated, Job, Sampling


__all__ = ["VllmEngine"]


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
                        max_tokens=sampling.max_new_tokens,
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

"""
CPU time of `trl-bridge eval`'s generation: `python benchmarks/evaluation_speed.py [--shape smollm2]`.

Prompts of 100 to 200 tokens and completions of log-normal length with a mean of 0.4 of the budget, on a model with random
weights that is told where each completion ends. In one run: batches in the questions' order whose rows stay until the last
has ended (transformers' own `generate`), the same by length, and rows that leave the batch when they end.
"""

import argparse
import random
import time
from collections.abc import Iterator, Sequence

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from trl_bridge.generation.engines import Generated, Job, Sampling, generate_batch, job_seed
from trl_bridge.models import tiny_tokenizer


SHAPES = {
    "small": {"hidden_size": 256, "num_hidden_layers": 6, "num_attention_heads": 8, "intermediate_size": 1024, "vocab_size": 8192},
    "smollm2": {"hidden_size": 576, "num_hidden_layers": 30, "num_attention_heads": 9, "num_key_value_heads": 3,
                "intermediate_size": 1536, "vocab_size": 49152},
}  # fmt: skip


def made(count: int, budget: int, seed: int = 0) -> list[Job]:
    """Jobs whose room is the length at which they end."""
    rng = random.Random(seed)
    jobs = []
    for question in range(count):
        ids = [rng.randrange(4, 90) for _ in range(rng.randint(100, 200))]
        room = min(budget, max(1, round(budget * 0.4 * rng.lognormvariate(-0.18, 0.6))))
        jobs.append(Job(question, 0, ids, job_seed(0, "speed", question, 0), room))
    return jobs


def drawn(
    model: LlamaForCausalLM, jobs: Sequence[Job], budget: int, batch_size: int, drop: bool
) -> Iterator[Generated]:
    sampling = Sampling(budget, temperature=1.0, top_p=0.95)
    for start in range(0, len(jobs), batch_size):
        batch = jobs[start : start + batch_size]
        prompts, seeds, limits = [j.ids for j in batch], [j.seed for j in batch], [j.limit(sampling) for j in batch]
        yield from generate_batch(model, tiny_tokenizer(), prompts, seeds, sampling, limits, drop)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shape", choices=SHAPES, default="small")
    parser.add_argument("--jobs", type=int, default=128)
    parser.add_argument("--budget", type=int, default=256)
    parser.add_argument("--batch_size", type=int, default=64)
    arguments = parser.parse_args()
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**SHAPES[arguments.shape], eos_token_id=None)).eval()
    model.generation_config.eos_token_id = [arguments.budget + 2]  # never drawn often enough to matter
    jobs = made(arguments.jobs, arguments.budget)
    by_length = sorted(jobs, key=lambda job: len(job.ids), reverse=True)
    print(
        f"{arguments.shape}, mean length {sum(job.room or 0 for job in jobs) / len(jobs) / arguments.budget:.2f} of the budget"
    )
    seconds, texts = {}, {}
    for name, order, drop in (
        ("as before", jobs, False),
        ("by length", by_length, False),
        ("rows leave", by_length, True),
    ):
        start = time.process_time()
        found = list(drawn(model, order, arguments.budget, arguments.batch_size, drop))
        seconds[name] = time.process_time() - start
        texts[name] = {job.question: each.ids for job, each in zip(order, found, strict=True)}
        same = sum(texts[name][job.question] == texts["as before"][job.question] for job in jobs)
        ratio = seconds[name] / seconds["as before"]
        print(f"{name:<12}{seconds[name]:8.1f} s  {ratio:.2f}  {same} of {len(jobs)} completions the same")


if __name__ == "__main__":
    main()

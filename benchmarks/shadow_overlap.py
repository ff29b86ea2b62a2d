"""
What `shadow_overlap` costs in exactness, and the time that it hides: beside the exact rule, in one run.

    OMP_NUM_THREADS=1 python benchmarks/shadow_overlap.py [--what errors times] [--updates 16] [--waits 0.5 1 2 4]

Errors: as in `shadow_options.py`, on the exact run's own rollouts.

Times: a stand-in for the vLLM server, which sleeps (a server on other devices leaves the trainer's to the trainer) for `--waits` times
GRPO's work without generation, and answers with random tokens. Steps of GRPO, of the exact rule and of the overlapped one are taken in turns, by
the wall clock: the machine should have nothing else to do.
"""

import argparse
import platform
import statistics
import tempfile
import time

import equal_lengths
import torch
import trl.trainer.grpo_trainer
from equal_lengths import make
from shadow_options import distance, run

from trl_bridge import BridgeConfig, BridgeTrainer


SERVED = {"use_vllm": True, "vllm_mode": "server", "vllm_importance_sampling_correction": False}


class Server:
    """Stands in for TRL's `VLLMGeneration` in server mode, and for its client."""

    seconds = 0.0

    def __init__(self, max_completion_length, **options):
        self.vllm_client, self.length = self, max_completion_length

    def sync_weights(self):
        pass

    def generate(self, prompts, num_generations=None, n=None, **options):
        if n is None:
            answer = self.vllm_client.generate(prompts=prompts[::num_generations], n=num_generations)
            return prompts, answer["completion_ids"], answer["logprobs"], None
        time.sleep(Server.seconds)
        rows = n * len(prompts)
        ids = torch.randint(5, 60, (rows, self.length), generator=torch.Generator().manual_seed(rows)).tolist()
        return {"prompt_ids": prompts, "completion_ids": ids, "logprobs": [[[-3.0]] * self.length] * rows}


def print_errors(options):
    exact, (w0, theta0) = run({}, options, None)
    other, _ = run({**SERVED, "shadow_overlap": True}, options, exact.batches)
    pairs = zip(other.gradients[1:], exact.gradients[1:], strict=True)
    gradient = statistics.median(float((g - e).norm() / e.norm()) for g, e in pairs)
    w, hat = exact.coordinator_state_dict(), exact.shadow_state_dict()
    of_w = distance(other.coordinator_state_dict(), w) / distance(w, w0)
    of_hat = distance(other.shadow_state_dict(), hat) / distance(hat, theta0)
    print("| | error of w's gradient | of w | of theta_hat |\n| --- | --- | --- | --- |")
    print(f"| `shadow_overlap` | {gradient:.1e} | {of_w:.1e} | {of_hat:.1e} |", flush=True)


def print_times(options):
    equal_lengths.VARIANTS.update({
        "grpo": (*equal_lengths.VARIANTS["grpo"][:2], SERVED),
        "exact": (BridgeTrainer, BridgeConfig, SERVED),
        "overlap": (BridgeTrainer, BridgeConfig, {**SERVED, "shadow_overlap": True}),
    })  # fmt: skip
    work = step_time("grpo", options)
    print("| generation / GRPO's other work | exact / GRPO | `shadow_overlap` / GRPO |\n| --- | --- | --- |")
    for wait in options.waits:
        Server.seconds = wait * work
        steps = {name: [] for name in ("grpo", "exact", "overlap")}
        for _ in range(options.rounds):
            for name in steps:
                steps[name].append(step_time(name, options))
        grpo, exact, overlap = (min(values) for values in steps.values())
        print(f"| {wait:g} | {exact / grpo:.2f} | {overlap / grpo:.2f} |", flush=True)


def step_time(name, options):
    with tempfile.TemporaryDirectory() as folder:
        trainer, times = make(name, options, folder)
        trainer.train()
    return statistics.median(times.steps[1:])  # the shadow first runs in the second update


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in {
        "updates": 16, "seed": 0, "steps": 5, "rounds": 2, "hidden_size": 256, "layers": 3, "batch_size": 32,
        "prompt_length": 16, "completion_length": 24,
    }.items():  # fmt: skip
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--waits", type=float, nargs="+", default=[0.5, 1, 2, 4])
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--what", nargs="+", default=["errors", "times"], choices=["errors", "times"])
    options = parser.parse_args()
    trl.trainer.grpo_trainer.VLLMGeneration = Server
    print(f"machine: {platform.machine()}, {torch.get_num_threads()} threads, torch {torch.__version__}")
    print(f"options: {vars(options)}", flush=True)
    for part in options.what:
        {"errors": print_errors, "times": print_times}[part](options)


if __name__ == "__main__":
    main()

"""
What the shadow's cost options cost in exactness, and what they save: every option beside the exact rule, in one run.

    OMP_NUM_THREADS=1 python benchmarks/shadow_options.py [--what errors times memory] [--updates 30] [--steps 8] [--rounds 3]

Errors: the exact rule trains a small model; its rollouts are kept and given to every other run, whose demonstrations are the same too, so
that the runs differ by the rule alone. Per update |g - g_exact| / |g_exact| over the gradient of w (median over the updates), and
|w - w_exact| / |w_exact - w_0| after the last one; the same for theta_hat. The row without the gain is the yardstick.

Times: as in `equal_lengths.py`, taken in turns; the least of the rounds' means. On a CPU it is the process's own time, to which what else
the machine does adds little (with one thread it is the wall time of a machine to itself).

Memory: the shadow's own tensors, in copies of its float32 weights, counted in the process by where they belong: on the device between
passes, on the device in a pass, on the CPU. A gradient that leaves is counted as the largest weight's.
"""

import argparse
import copy
import platform
import statistics
import tempfile
import time

import equal_lengths
import torch
from datasets import Dataset
from equal_lengths import VARIANTS, make, sft_alone

from trl_bridge import BridgeConfig, BridgeTrainer
from trl_bridge.models import tiny_model, tiny_tokenizer


OPTIONS = {
    "exact": {},
    "a quarter of the rollouts": {"shadow_rollout_fraction": 0.25},
    "every 4th update": {"shadow_update_steps": 4},
    "every 4th update, 4 x rate": {"shadow_update_steps": 4, "shadow_learning_rate": 4e-4},
    "bfloat16": {"shadow_dtype": "bfloat16"},
    "offloaded": {"shadow_offload": True},
    "bfloat16, offloaded": {"shadow_dtype": "bfloat16", "shadow_offload": True},
    "without the gain": {"cooperative_gain": False},
}
# No error to show: equal to the bit to the exact rule, or to bfloat16 without offloading (`tests/methods/bridge/test_storage.py`).
EXACT = ("exact", "offloaded", "bfloat16, offloaded")
TIMED = ["a quarter of the rollouts", "every 4th update", "bfloat16", "offloaded"]


class Playback(BridgeTrainer):
    """Keeps the generation batches, or takes those of an earlier run; keeps the gradient of w in each update."""

    def __init__(self, *args, batches=None, **kwargs):
        super().__init__(*args, **kwargs)
        self.batches, self.given, self.gradients = [], batches, []
        pull = self.coordinator.pull

        def keeping(*values):
            pull(*values)
            self.gradients.append(torch.cat([p.grad.double().flatten() for p in self.coordinator.parameters()]))

        self.coordinator.pull = keeping

    def _generate_and_score_completions(self, inputs):
        if self.given is None:
            output = super()._generate_and_score_completions(inputs)
            self.batches.append(copy.deepcopy(output))
            return output
        if self._overlap.waits:
            self._overlap.run(self._run_shadow)  # what is put off has its turn here
        output = copy.deepcopy(self.given[len(self.batches)])
        self.batches.append(None)
        places = self.places(len(inputs))
        return {**output, **self._share.mark(places, len(inputs) // self.num_generations, self.generation)}


def run(changes, options, batches):
    tokenizer = tiny_tokenizer()
    pairs = [(a, b) for a in range(20) for b in range(20)]
    prompts = [f"{a}+{b}=" for a, b in pairs]
    with tempfile.TemporaryDirectory() as folder:
        trainer = Playback(
            model=tiny_model(tokenizer),
            reward_funcs=lambda completions, **kwargs: [float(sum(c.isdigit() for c in t)) for t in completions],
            args=BridgeConfig(
                output_dir=folder, use_cpu=True, bf16=False, report_to="none", disable_tqdm=True, save_strategy="no",
                num_generations=4, per_device_train_batch_size=8, gradient_accumulation_steps=2, logging_steps=1,
                max_completion_length=8, max_steps=options.updates, learning_rate=1e-4, seed=options.seed, **changes,
            ),
            train_dataset=Dataset.from_dict({"prompt": prompts}),
            sft_dataset=Dataset.from_dict({"prompt": prompts, "completion": [str(a + b) for a, b in pairs]}),
            processing_class=tokenizer,
            batches=batches,
        )  # fmt: skip
        start = (trainer.coordinator_state_dict(), trainer.theta_state_dict())
        trainer.train()
    return trainer, start


def distance(got, want):
    return sum(float((got[n].double() - want[n].double()).square().sum()) for n in want) ** 0.5


def print_errors(options):
    exact, (w0, theta0) = run({}, options, None)
    w, hat = exact.coordinator_state_dict(), exact.shadow_state_dict()
    logs = [entry for entry in exact.state.log_history if "loss" in entry]
    share = [
        e["bridge/lambda"] * e["bridge/gain_grad_norm"] / float(g.norm())
        for e, g in zip(logs, exact.gradients, strict=True)
    ]
    print(f"norm of lambda times the bracket over that of the gradient of w: {statistics.median(share):.2f}")
    print("| | error of w's gradient | of w | of theta_hat |\n| --- | --- | --- | --- |", flush=True)
    for name in (name for name in OPTIONS if name not in EXACT):
        changes = OPTIONS[name]
        other, _ = run(changes, options, exact.batches)
        pairs = zip(other.gradients, exact.gradients, strict=True)
        gradient = statistics.median(float((g - e).norm() / e.norm()) for g, e in pairs)
        of_w = distance(other.coordinator_state_dict(), w) / distance(w, w0)
        state = other.shadow_state_dict()
        of_hat = None if state is None else distance(state, hat) / distance(hat, theta0)
        hat_column = "-" if of_hat is None else f"{of_hat:.1e}"
        print(f"| {name} | {gradient:.1e} | {of_w:.1e} | {hat_column} |", flush=True)


def print_times(options):
    names = {
        "grpo": VARIANTS["grpo"],
        **{name: (BridgeTrainer, BridgeConfig, OPTIONS[name]) for name in ["exact", *TIMED]},
    }
    VARIANTS.update(names)
    steps, generation = {name: [] for name in names}, []
    for _ in range(options.rounds):
        for name in names:
            with tempfile.TemporaryDirectory() as folder:
                trainer, taken = make(name, options, folder)
                trainer.train()
            work = [step - g for step, g in zip(taken.steps, taken.generation, strict=True)]
            steps[name].append(statistics.fmean(work))
            generation.append(statistics.fmean(taken.generation))
    work = {name: min(values) for name, values in steps.items()}
    VARIANTS["bridge"] = names["exact"]
    r, s, g = work["grpo"], sft_alone(options), min(generation)
    print(f"S/R = {s / r:.2f}; generation is {g / (g + r):.0%} of GRPO's step")
    print("| | without generation / GRPO's | at 70 % generation | at 90 % |\n| --- | --- | --- | --- |")
    for name in names:
        ratio = work[name] / r
        print(f"| {name} | {ratio:.2f} | {0.7 + 0.3 * ratio:.2f} | {0.9 + 0.1 * ratio:.2f} |", flush=True)


def print_memory(options):
    print("| | device between passes | device in a pass | CPU |\n| --- | --- | --- | --- |")
    for name in ["exact", "bfloat16", "offloaded", "bfloat16, offloaded"]:
        places = " | ".join(f"{copies:.2f}" for copies in memory(options, OPTIONS[name]))
        print(f"| {name} | {places} |", flush=True)


def memory(options, changes):
    """Copies of the float32 weights: on the device between passes, in a pass, and on the CPU."""
    VARIANTS["one"] = (BridgeTrainer, BridgeConfig, changes)
    with tempfile.TemporaryDirectory() as folder:
        trainer, _ = make("one", argparse.Namespace(**{**vars(options), "steps": 1}), folder)
        held = {}
        backward = trainer.backend.backward_alongside

        def looking(loss):
            held["working"] = sum(p.untyped_storage().nbytes() for p in trainer.shadow.model.parameters())
            backward(loss)
            held["grads"] = sum(p.grad.nbytes for p in trainer.shadow.model.parameters() if p.grad is not None)

        trainer.backend.backward_alongside = looking
        trainer.train()
    shadow, working = trainer.shadow, {id(p) for p in trainer.shadow.model.parameters()}
    apart = not any(id(p) in working for p in shadow.held.parameters.values())
    weights = sum(p.numel() * 4 for p in shadow.held.parameters.values())
    largest = max(p.numel() * p.element_size() for p in shadow.model.parameters())
    left = sum(p.untyped_storage().nbytes() for p in shadow.model.parameters())
    state = sum(t.nbytes for s in shadow.optimizer.state.values() for t in s.values() if isinstance(t, torch.Tensor))
    masters = 2 * weights if apart else 0  # and their gradients
    beside = masters + state
    on_cpu = beside if changes.get("shadow_offload") else 0
    in_pass = held["working"] + (held["grads"] or largest) + beside - on_cpu
    return (left + held["grads"] + beside - on_cpu) / weights, in_pass / weights, on_cpu / weights


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in {
        "updates": 30, "seed": 0, "steps": 8, "rounds": 3, "hidden_size": 256, "layers": 4, "batch_size": 32,
        "prompt_length": 16, "completion_length": 40,
    }.items():  # fmt: skip
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument(
        "--what", nargs="+", default=["errors", "times", "memory"], choices=["errors", "times", "memory"]
    )
    options = parser.parse_args()
    if options.steps % 4:
        parser.error("--steps must be a multiple of 4: the shadow runs in every 4th update")
    print(f"machine: {platform.machine()}, {torch.get_num_threads()} threads, torch {torch.__version__}")
    print(f"options: {vars(options)}", flush=True)
    if options.device == "cpu":
        equal_lengths.clock = time.process_time
    for part in options.what:
        {"errors": print_errors, "times": print_times, "memory": print_memory}[part](options)


if __name__ == "__main__":
    main()

"""
What BRIDGE's second model costs over GRPO where nothing can be saved: completions of one length, padded passes; side by side in one run.

    python benchmarks/equal_lengths.py [--steps 6] [--rounds 3] [--hidden_size 256] [--layers 4] [--device cpu] [--process_time]

Times are medians over steps, taken in turns (one round of GRPO, one of BRIDGE, ...), so that what else the machine does meets both.
With G the generation, R the student's RL pass with its optimizer step, S the SFT pass and H the shadow's pass and step, GRPO costs
G + R and BRIDGE G + R + S + H. S is timed alone; H is counted as R. Memory is the peak of a process of its own for each trainer.
"""

import argparse
import json
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
import time

import torch
from datasets import Dataset
from peft import LoraConfig
from transformers import TrainerCallback
from trl import GRPOConfig, GRPOTrainer

from trl_bridge import BridgeConfig, BridgeTrainer
from trl_bridge.models import tiny_model, tiny_tokenizer


clock = time.perf_counter

PADDED = {"padding_free": False}
VARIANTS = {
    "grpo": (GRPOTrainer, GRPOConfig, {}),
    "bridge": (BridgeTrainer, BridgeConfig, PADDED),
    "bridge, selective": (BridgeTrainer, BridgeConfig, {"preset": "selective", **PADDED}),
    "bridge, stateless shadow": (BridgeTrainer, BridgeConfig, {"shadow_optim": "sgd", **PADDED}),
    # The same total rank, so that what lean mode adds is the second set and w's own optimizer.
    "grpo, lora": (GRPOTrainer, GRPOConfig, {}),
    "bridge, lean": (BridgeTrainer, BridgeConfig, {"lean": True, "lean_lora_r": 12, **PADDED}),
}
ADAPTERS = {"grpo, lora": 16, "bridge, lean": 4}


def reward(completions, **kwargs):
    return [float(sum(c.isdigit() for c in text)) for text in completions]


class StepTimes(TrainerCallback):
    """Wall time of each update, without the first of each round (warm-up)."""

    def __init__(self):
        self.steps, self.generation, self._start = [], [], 0.0

    def on_step_begin(self, args, state, control, **kwargs):
        self._start = clock()
        self.generated = 0.0

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step > 1:
            self.steps.append(clock() - self._start)
            self.generation.append(self.generated)


def make(name, options, folder):
    trainer_class, config_class, changes = VARIANTS[name]
    tokenizer = tiny_tokenizer()
    model = tiny_model(tokenizer, hidden_size=options.hidden_size, layers=options.layers, heads=8)
    prompts = [f"{a}+{b}=" + "?" * (options.prompt_length - 6) for a in range(10, 42) for b in range(10, 42)]
    completions = ["1" * (options.completion_length - 1)] * len(prompts)
    config = config_class(
        output_dir=folder,
        use_cpu=options.device == "cpu",
        bf16=False,
        report_to="none",
        disable_tqdm=True,
        save_strategy="no",
        logging_steps=1000,
        gradient_checkpointing=False,
        per_device_train_batch_size=options.batch_size,
        num_generations=8,
        max_completion_length=options.completion_length,
        max_steps=options.steps + 1,
        # Every completion has full length, so that both trainers do the same work.
        generation_kwargs={"min_new_tokens": options.completion_length},
        **changes,
    )
    times = StepTimes()
    kwargs = {}
    if trainer_class is BridgeTrainer:
        kwargs["sft_dataset"] = Dataset.from_dict({"prompt": prompts, "completion": completions})
    if name in ADAPTERS:
        rank = ADAPTERS[name]
        kwargs["peft_config"] = LoraConfig(r=rank, lora_alpha=rank, target_modules="all-linear", task_type="CAUSAL_LM")
    trainer = trainer_class(
        model=model,
        reward_funcs=reward,
        args=config,
        train_dataset=Dataset.from_dict({"prompt": prompts}),
        processing_class=tokenizer,
        callbacks=[times],
        **kwargs,
    )
    generate = trainer._generate_and_score_completions

    def timed(inputs):
        start = clock()
        output = generate(inputs)
        times.generated += clock() - start
        return output

    trainer._generate_and_score_completions = timed
    return trainer, times


def sft_alone(options):
    """Median seconds of one forward and backward over the demonstrations of one update."""
    with tempfile.TemporaryDirectory() as folder:
        trainer, _ = make("bridge", options, folder)
    model, share = trainer.model.train(), list(range(trainer.args.demonstration_batch_size))
    seconds = []
    for _ in range(options.steps * options.rounds):
        start = clock()
        log_probs, mask, _ = trainer._score(model, share)
        (-(log_probs * mask).sum() / mask.sum()).backward()
        seconds.append(clock() - start)
        model.zero_grad()
    return statistics.median(seconds[1:])


def peak_memory(name, options):
    """Peak of a fresh process that trains one variant, in MiB: resident on a CPU, allocated on a GPU."""
    command = [sys.executable, __file__, "--only", name] + [
        f"--{k}={v}" for k, v in vars(options).items() if k not in ("only", "process_time")
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def run_alone(name, options):
    with tempfile.TemporaryDirectory() as folder:
        trainer, _ = make(name, options, folder)
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        trainer.train()
        weights = sum(p.numel() * p.element_size() for p in trainer.model.parameters()) / 2**20
    if options.device == "cpu":
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    else:
        before, peak = 0.0, torch.cuda.max_memory_allocated() / 2**20
    print(json.dumps({"peak": peak, "before": before, "weights": weights}))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in {
        "steps": 6, "rounds": 3, "hidden_size": 256, "layers": 4, "batch_size": 16, "prompt_length": 16,
        "completion_length": 40,
    }.items():  # fmt: skip
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument(
        "--process_time", action="store_true", help="the process's own time, where other programs take turns with it"
    )
    parser.add_argument("--only", default=None, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.only:
        run_alone(options.only, options)
        return
    if options.process_time:
        global clock
        clock = time.process_time
    steps = {name: [] for name in VARIANTS}
    generation = {name: [] for name in VARIANTS}
    for _ in range(options.rounds):
        for name in VARIANTS:
            with tempfile.TemporaryDirectory() as folder:
                trainer, times = make(name, options, folder)
                trainer.train()
            steps[name] += times.steps
            generation[name] += times.generation
    median = {name: statistics.median(values) for name, values in steps.items()}
    g = statistics.median([t for values in generation.values() for t in values])
    r, s = median["grpo"] - statistics.median(generation["grpo"]), sft_alone(options)
    work = {name: median[name] - statistics.median(generation[name]) for name in VARIANTS}
    parts = {"grpo": r, "bridge": 2 * r + s, "bridge, selective": r + s, "bridge, stateless shadow": 2 * r + s}
    lora = work["grpo, lora"]
    parts |= {"grpo, lora": lora, "bridge, lean": 2 * lora + s}
    memory = {name: peak_memory(name, options) for name in VARIANTS}
    print(f"machine: {platform.machine()}, {torch.get_num_threads()} threads, torch {torch.__version__}")
    print(f"options: {vars(options)}")
    print(f"G = {g:.3f} s, R = {r:.3f} s, S/R = {s / r:.3f}, generation is {g / median['grpo']:.0%} of GRPO's step")
    print(
        "| | step / GRPO's | without generation / GRPO's | / sum of its parts | at 90 % generation | peak memory - GRPO's, in weights |"
    )
    print("| --- | --- | --- | --- | --- | --- |")
    for name in VARIANTS:
        extra = (memory[name]["peak"] - memory["grpo"]["peak"]) / memory[name]["weights"]
        print(
            f"| {name} | {median[name] / median['grpo']:.2f} | {work[name] / r:.2f} | {work[name] / parts[name]:.2f} | "
            f"{0.9 + 0.1 * work[name] / r:.2f} | {extra:.1f} |"
        )
    ratio = memory["bridge, lean"]["peak"] / memory["grpo, lora"]["peak"]
    print(
        f"lean over LoRA GRPO: step {median['bridge, lean'] / median['grpo, lora']:.2f}, without generation "
        f"{work['bridge, lean'] / lora:.2f}, peak memory of the process {ratio:.3f}"
    )


if __name__ == "__main__":
    main()

"""
What an update costs beside TRL's GRPO, without generation: time and memory of each trainer on the same rollouts, in one run.

    python benchmarks/step_overhead.py [--prompts 4] [--dead 0.5] [--steps 3] [--rounds 2] [--equal] [--smollm2] [--memory]
    python benchmarks/step_overhead.py --tools | --vision [...]

The rollouts are drawn beforehand, of lengths as they are met: log-normal with a mean of 0.4 of the budget, prompts of 100 to 200
tokens, 8 rollouts a prompt; `--dead` of the groups have rewards that are all alike. `--equal` has completions of the full budget
and prompts of one token, where nothing can be saved. The model is a Llama with SmolLM2's proportions at 1/40 of its size, or
with `--smollm2` of its size. With `--tools` the middle third of each rollout is what a tool has written; with `--vision` the model is a
Gemma 3 with a vision tower, and each prompt and demonstration has a picture. Times are of the process itself, medians over updates, taken in turns.

Two yardsticks: TRL's GRPO as it runs here, and with the LM head on the completions only, as it runs on CUDA.
"""

import argparse
import contextlib
import json
import math
import platform
import random
import resource
import statistics
import subprocess
import sys
import tempfile
import time

import torch
from datasets import Dataset
from PIL import Image
from transformers import LlamaConfig, LlamaForCausalLM, TrainerCallback
from trl import GRPOConfig, GRPOTrainer

from trl_bridge import BridgeConfig, BridgeTrainer, PackedGRPOConfig, PackedGRPOTrainer
from trl_bridge._upstream import compact_head
from trl_bridge.models import tiny_processor, tiny_tokenizer, tiny_vision_model


GROUP = 8
SELECTIVE = {"preset": "selective", "sft_weighting": "judge"}
PADDED = {"padding_free": False}
# Trainer, config, options, and whether the head scores completions only.
VARIANTS = {
    "TRL's GRPO": (GRPOTrainer, GRPOConfig, {}, False),
    "TRL's GRPO, compact head": (GRPOTrainer, GRPOConfig, {}, True),
    "BRIDGE, padded": (BridgeTrainer, BridgeConfig, PADDED, False),
    "BRIDGE, padded, compact head": (BridgeTrainer, BridgeConfig, PADDED, True),
    "BRIDGE": (BridgeTrainer, BridgeConfig, {}, False),
    "BRIDGE, selective, padded": (BridgeTrainer, BridgeConfig, {**SELECTIVE, **PADDED}, False),
    "BRIDGE, selective": (BridgeTrainer, BridgeConfig, SELECTIVE, False),
    "packed GRPO": (PackedGRPOTrainer, PackedGRPOConfig, {}, False),
}
# With tools, and with pictures.
FEW = ("TRL's GRPO", "BRIDGE", "BRIDGE, selective", "packed GRPO")


def lengths(count, options, rng, sigma=0.7):
    """Log-normal lengths cut at the budget, whose mean is `--mean` of it."""
    if options.equal:
        return [options.budget] * count
    sample = [rng.gauss(0, sigma) for _ in range(20_000)]
    low, high = 0.0, 2 * math.log(options.budget)
    for _ in range(40):
        middle = (low + high) / 2
        mean = statistics.fmean(min(options.budget, math.exp(middle + s)) for s in sample)
        low, high = (middle, high) if mean < options.mean * options.budget else (low, middle)
    return [max(4, min(options.budget, int(math.exp(low + rng.gauss(0, sigma))))) for _ in range(count)]


class Rollouts:
    """The rollouts of each update, with their rewards: in place of TRL's generation, and of its reward function."""

    def __init__(self, tokenizer, options):
        self.tokenizer, self.options = tokenizer, options
        self.seconds = 0.0

    def __call__(self, prompts, trainer):
        options, rng = self.options, random.Random(100 + trainer.state.global_step)
        dead = set(rng.sample(range(options.prompts), round(options.dead * options.prompts)))
        drawn = {"prompt_ids": [], "completion_ids": [], "logprobs": None, "drawn_reward": []}
        size = lengths(options.prompts * GROUP, options, rng)
        for group in range(options.prompts):
            prompt = self.tokens(1 if options.equal else rng.randint(100, 200), rng)
            right = rng.randint(1, GROUP - 1)
            for member in range(GROUP):
                completion = self.tokens(size[group * GROUP + member] - 1, rng)
                drawn["prompt_ids"].append(prompt)
                drawn["completion_ids"].append([*completion, self.tokenizer.eos_token_id])
                drawn["drawn_reward"].append(0.0 if group in dead else float(member < right))
        if options.tools:
            thirds = [len(ids) // 3 for ids in drawn["completion_ids"]]
            sizes = [len(ids) for ids in drawn["completion_ids"]]
            drawn["env_mask"] = [
                [int(not n <= i < 2 * n) for i in range(size)] for n, size in zip(thirds, sizes, strict=True)
            ]
        return drawn

    def tokens(self, count, rng):
        return [rng.randrange(4, len(self.tokenizer)) for _ in range(count)]


def reward(completions, drawn_reward, **kwargs):
    return drawn_reward


class StepTimes(TrainerCallback):
    """Processor seconds of each update but the first, without its generation."""

    def __init__(self):
        self.steps, self.generating = [], 0.0

    def on_step_begin(self, args, state, control, **kwargs):
        self.start, self.generating = time.process_time(), 0.0

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step > 1:
            self.steps.append(time.process_time() - self.start - self.generating)


def build_model(tokenizer, options):
    hidden, layers, heads, vocabulary = (576, 30, 9, 49_152) if options.smollm2 else (192, 8, 3, 4_352)
    layers = options.layers or layers
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=vocabulary, hidden_size=hidden, intermediate_size=hidden * 8 // 3, num_hidden_layers=layers,
        num_attention_heads=heads, num_key_value_heads=heads // 3, head_dim=64, tie_word_embeddings=True,
        bos_token_id=None, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
        initializer_range=0.04,
    )  # fmt: skip
    return LlamaForCausalLM(config)


def with_pictures(tokenizer, options):
    """Arguments of a trainer whose prompts and demonstrations have a picture each, and the rollouts' rewards."""
    rng, rollouts = random.Random(7), Rollouts(tokenizer, options)
    processor = tiny_processor()

    def said(role, count):
        return [{"role": role, "content": tokenizer.decode(rollouts.tokens(count, rng))}]

    def picture():
        size = processor.image_processor.size
        noise = [rng.randrange(256) for _ in range(3 * size["height"] * size["width"])]
        return Image.frombytes("RGB", (size["width"], size["height"]), bytes(noise))

    prompts = [said("user", rng.randint(20, 80)) for _ in range(64)]
    answers = [said("assistant", count) for count in lengths(64, options, rng)]
    pictures = [[picture()] for _ in range(64)]
    return {
        "model": tiny_vision_model(processor, hidden_size=192, layers=options.layers or 8),
        "processing_class": processor,
        "reward_funcs": lambda completions, **kwargs: [float(row % GROUP < 3) for row in range(len(completions))],
        "train_dataset": Dataset.from_dict({"prompt": prompts, "images": pictures}),
        "sft_dataset": Dataset.from_dict({"prompt": prompts, "completion": answers, "images": pictures}),
    }


def make(name, options, folder):
    trainer_class, config_class, changes, _ = VARIANTS[name]
    tokenizer = tiny_tokenizer()
    rows = options.prompts * GROUP
    config = config_class(
        output_dir=folder,
        use_cpu=True,
        bf16=False,
        report_to="none",
        disable_tqdm=True,
        save_strategy="no",
        logging_steps=1000,
        gradient_checkpointing=options.checkpointing,
        per_device_train_batch_size=options.micro_batch,
        gradient_accumulation_steps=rows // options.micro_batch,
        num_generations=GROUP,
        max_completion_length=options.budget,
        max_steps=options.steps + 1,
        **changes,
    )
    times, kwargs = StepTimes(), {}
    if trainer_class is BridgeTrainer:
        rng = random.Random(7)
        rollouts = Rollouts(tokenizer, options)
        texts = [
            [tokenizer.decode(rollouts.tokens(count, rng)) for count in counts]
            for counts in ([rng.randint(100, 200) for _ in range(256)], lengths(256, options, rng))
        ]
        kwargs["sft_dataset"] = Dataset.from_dict(dict(zip(("prompt", "completion"), texts, strict=True)))
    rollouts = Rollouts(tokenizer, options)
    kwargs |= {
        "model": build_model(tokenizer, options),
        "processing_class": tokenizer,
        "reward_funcs": reward,
        "train_dataset": Dataset.from_dict({"prompt": [f"{i}+1=" for i in range(256)]}),
        "rollout_func": rollouts,
    }
    if options.vision:
        seen = with_pictures(tokenizer, options)
        kwargs = {key: seen[key] for key in seen if key != "sft_dataset" or key in kwargs}
    trainer = trainer_class(args=config, callbacks=[times], **kwargs)
    if options.vision:
        trainer._generate_single_turn = lambda *args, **kwargs: (rollouts([], trainer)["completion_ids"], None)
    generate = trainer._generate_and_score_completions

    def timed(inputs):
        start = time.process_time()
        output = generate(inputs)
        times.generating += time.process_time() - start
        return output

    trainer._generate_and_score_completions = timed
    return trainer, times


def train(name, options):
    """Seconds of each update."""
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(sys.stderr):
        trainer, times = make(name, options, folder)
        with compact_head() if VARIANTS[name][3] else contextlib.nullcontext():
            trainer.train()
    return times.steps


def growth(name, options):
    """Growth of a fresh process that trains one variant, in MiB."""
    flags = [
        f"--{key}={value}" for key, value in vars(options).items() if not isinstance(value, bool) and key != "only"
    ]
    flags += [f"--{key}" for key in ("equal", "smollm2", "checkpointing", "tools", "vision") if getattr(options, key)]
    command = [sys.executable, __file__, "--only", name, *flags]
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    numbers = {"prompts": 4, "budget": 256, "micro_batch": 8, "steps": 3, "rounds": 2, "layers": 0}
    for name, default in numbers.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--mean", type=float, default=0.4, help="mean length over the budget")
    parser.add_argument("--dead", type=float, default=0.0, help="share of groups without an advantage")
    for name in ("equal", "smollm2", "checkpointing", "memory", "tools", "vision"):
        parser.add_argument(f"--{name}", action="store_true")
    parser.add_argument("--only", default=None, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.only:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        train(options.only, options)
        print(json.dumps((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024))
        return
    steps = {name: [] for name in (FEW if options.tools or options.vision else VARIANTS)}
    for _ in range(options.rounds):
        for name in steps:
            steps[name] += train(name, options)
    print(f"machine: {platform.machine()}, {torch.get_num_threads()} threads, torch {torch.__version__}")
    print(f"options: {vars(options)}")
    median = {name: statistics.median(values) for name, values in steps.items()}
    stock, compact = (median.get(name, math.nan) for name in list(VARIANTS)[:2])
    memory = {name: growth(name, options) for name in steps} if options.memory else {}
    print("| | / TRL's GRPO | / TRL's GRPO, compact head | growth of the process / TRL's GRPO |")
    print("| --- | ---: | ---: | ---: |")
    for name, seconds in median.items():
        grown = f"{memory[name] / memory[list(VARIANTS)[0]]:.2f}" if memory else ""
        print(f"| {name} | {seconds / stock:.2f} | {seconds / compact:.2f} | {grown} |")


if __name__ == "__main__":
    main()

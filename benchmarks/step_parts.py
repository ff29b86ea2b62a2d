"""
Where an update's time goes, without generation: TRL's GRPO, BRIDGE with padding and BRIDGE, on the rollouts of `step_overhead.py`.

    python benchmarks/step_parts.py FILE.jsonl [--prompts 4] [--steps 3] [--smollm2] [--layers 30] [--memory]
    python benchmarks/step_parts.py FILE.jsonl --draw PICTURE.svg

The first writes a line for each: processor seconds of an update by part, medians over the updates, and with `--memory` the growth of a
fresh process; the second draws those lines.
"""

import argparse
import json
import platform
import statistics
import tempfile
import time
from collections import defaultdict
from pathlib import Path

import torch
from step_overhead import growth, make
from transformers import TrainerCallback

from trl_bridge.comparison.pictures import new_figure


VARIANTS = ("TRL's GRPO", "BRIDGE, padded", "BRIDGE")
PARTS = ("rollouts", "shadow", "demonstrations", "optimizers and the rest")
# Okabe and Ito's, which are told apart without colours too.
COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7")


class Parts(TrainerCallback):
    """Processor seconds of each update but the first, by part: what a method takes beside the timed ones that it calls."""

    def __init__(self, trainer):
        self.updates, self.spent, self.under_way = [], defaultdict(float), []
        mixes = hasattr(trainer, "policy_pass")
        self.wrap(trainer, "_generate_and_score_completions", "generation")
        self.wrap(trainer, "training_step", "demonstrations" if mixes else "rollouts")
        if mixes:
            self.wrap(trainer, "policy_pass", "rollouts")
            self.wrap(trainer, "_run_shadow", "shadow")
            self.wrap(trainer, "end_of_window", PARTS[-1])

    def wrap(self, owner, method, part):
        inner = getattr(owner, method)

        def timed(*args, **kwargs):
            start = time.process_time()
            self.under_way.append(part)
            result = inner(*args, **kwargs)
            seconds = time.process_time() - start
            self.under_way.pop()
            self.spent[part] += seconds
            if self.under_way:
                self.spent[self.under_way[-1]] -= seconds
            return result

        setattr(owner, method, timed)

    def on_step_begin(self, args, state, control, **kwargs):
        self.start = time.process_time()
        self.spent.clear()

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step > 1:
            rest = time.process_time() - self.start - sum(self.spent.values())
            self.spent[PARTS[-1]] += rest
            self.updates.append([self.spent[part] for part in PARTS])


def measure(options):
    for name in VARIANTS:
        with tempfile.TemporaryDirectory() as folder:
            trainer, _ = make(name, options, folder)
            parts = Parts(trainer)
            trainer.add_callback(parts)
            trainer.train()
        seconds = [statistics.median(column) for column in zip(*parts.updates, strict=True)]
        line = {"variant": name, "seconds": dict(zip(PARTS, seconds, strict=True))}
        if options.memory:
            line["growth_mib"] = growth(name, options)
        with options.file.open("a") as file:
            file.write(
                json.dumps(
                    {**line, "machine": platform.machine(), "torch": torch.__version__, "options": shown(options)}
                )
                + "\n"
            )


def shown(options):
    return {key: value for key, value in vars(options).items() if key not in ("file", "draw")}


def draw(lines, path):
    """A bar for each variant, in units of the first one; the parts are named at the longest."""
    unit = sum(lines[0]["seconds"].values())
    totals = [sum(line["seconds"].values()) / unit for line in lines]
    figure = new_figure(8, 2.8)
    axes = figure.add_subplot()
    for row, line in enumerate(lines):
        left = 0.0
        for index, (colour, part) in enumerate(zip(COLOURS, PARTS, strict=True)):
            width = line["seconds"][part] / unit
            axes.barh(row, width, left=left, color=colour, edgecolor="white", height=0.5)
            if totals[row] == max(totals):
                side = (-0.28, "bottom") if index < 3 else (0.28, "top")
                axes.text(left + width / 2, row + side[0], part, ha="center", va=side[1], color=colour, fontsize=9)
            left += width
        axes.text(left + 0.02, row, f"{left:.2f}", va="center", fontsize=10)
    axes.set_yticks(range(len(lines)), [line["variant"] for line in lines])
    axes.invert_yaxis()
    axes.margins(x=0.12)
    axes.set_xlabel("processor time of an update without generation, over that of TRL's GRPO")
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path)
    parser.add_argument("--draw", metavar="PICTURE")
    for name, default in {"prompts": 4, "budget": 256, "micro_batch": 8, "steps": 3, "layers": 0}.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    for name, share in {"mean": 0.4, "dead": 0.0}.items():
        parser.add_argument(f"--{name}", type=float, default=share)
    for name in ("equal", "smollm2", "checkpointing", "memory", "tools", "vision"):
        parser.add_argument(f"--{name}", action="store_true")
    options = parser.parse_args()
    if options.draw:
        draw([json.loads(line) for line in options.file.read_text().splitlines()], options.draw)
    else:
        measure(options)


if __name__ == "__main__":
    main()

"""
How long a checkpoint holds up training, beside TRL's GRPO in one run: wall clock and processor time of a save, medians, and of what
BRIDGE still does beside the next update (checksums, and the marker once every file is on the disk).

    python benchmarks/checkpoint_time.py [--saves 3] [--layers 30]

The model has SmolLM2's shapes, 135 M parameters; a checkpoint holds its weights and AdamW's two states, and BRIDGE's as much of the
shadow again, and the coordinator.
"""

import argparse
import contextlib
import statistics
import sys
import tempfile
import time
from pathlib import Path

from step_overhead import make
from transformers.trainer_utils import SaveStrategy


VARIANTS = ("TRL's GRPO", "BRIDGE")
# The updates are as small as they can be: only what comes after them is timed.
UPDATES = {"prompts": 1, "budget": 8, "micro_batch": 8, "dead": 0.0, "mean": 0.4, "equal": True, "smollm2": True, "checkpointing": False, "tools": False, "vision": False}  # fmt: skip


def now():
    return time.perf_counter(), time.process_time()


def since(start):
    return [end - begin for end, begin in zip(now(), start, strict=True)]


def saves(name, options):
    """Seconds of each save, seconds of what follows it, and bytes of a checkpoint."""
    saved, after = [], []
    with tempfile.TemporaryDirectory(dir=options.folder) as folder, contextlib.redirect_stdout(sys.stderr):
        trainer, _ = make(name, argparse.Namespace(**UPDATES, layers=options.layers, steps=options.saves - 1), folder)
        trainer.args.save_strategy, trainer.args.save_steps, trainer.args.save_total_limit = SaveStrategy.STEPS, 1, 1
        save = trainer._save_checkpoint

        def timed(*args):
            start = now()
            save(*args)
            saved.append(since(start))
            start = now()
            if hasattr(trainer, "_sealing"):
                trainer._sealing.wait()
            after.append(since(start))

        trainer._save_checkpoint = timed
        trainer.train()
        size = sum(path.stat().st_size for path in Path(folder).glob("checkpoint-*/**/*") if path.is_file())
    return saved, after, size


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--saves", type=int, default=3)
    parser.add_argument("--layers", type=int, default=30)
    parser.add_argument(
        "--folder", default=None, help="where the checkpoints are written (the system's temporary folder)"
    )
    options = parser.parse_args()
    rows = {}
    for name in VARIANTS:
        saved, after, size = saves(name, options)
        rows[name] = [statistics.median(column) for column in (*zip(*saved, strict=True), *zip(*after, strict=True))]
        rows[name].append(size / 1e9)
    print("| | blocking, s | / TRL's GRPO | processor, s | / TRL's GRPO | then, beside training, s | GB |")
    print("| --- | ---: | ---: | ---: | ---: | ---: | ---: |")
    stock = rows[VARIANTS[0]]
    for name, (wall, processor, later, _, size) in rows.items():
        print(
            f"| {name} | {wall:.2f} | {wall / stock[0]:.2f} | {processor:.2f} | {processor / stock[1]:.2f} | {later:.2f} "
            f"| {size:.2f} |"
        )


if __name__ == "__main__":
    main()

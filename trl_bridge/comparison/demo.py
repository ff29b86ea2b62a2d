"""`trl-bridge demo`: train, tabulate, draw, save."""

import argparse
import contextlib
import json
import os
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tqdm.auto import tqdm
from transformers import TrainerCallback

from ..cli.errors import ToolParser
from .file import Row, Setting
from .pictures import new_figure, style
from .plan import Run
from .recorder import Recorder
from .tasks.addition import Task
from .tasks.specs import AdditionSpec
from .trainers import build_trainer


if TYPE_CHECKING:
    from .tasks.addition import Task


__all__ = ["Curve", "DEMONSTRATIONS", "METHODS", "ROLLOUTS_PER_STEP", "draw", "main", "train"]


def draw(curves: "list[Curve]", base: dict[str, float], title: str, path: Path) -> None:
    """Draw held-out accuracy over rollouts."""
    figure = new_figure(8, 5)
    axes = figure.add_subplot()
    axes.axhline(base["accuracy"], color="0.6", linewidth=1, label="base model")
    for index, curve in enumerate(curves):
        rollouts = [point["rollouts"] for point in curve.points]
        accuracy = [point["accuracy"] for point in curve.points]
        axes.plot(rollouts, accuracy, label=curve.name, **style(index, len(curves)))
    axes.set_xlabel("rollouts (a cold start's SFT stage comes before its first one)")
    axes.set_ylabel("accuracy on held-out sums (greedy)")
    axes.set_title(title)
    axes.grid(color="0.9")
    axes.legend(loc="best")
    figure.savefig(path, dpi=150)


ROLLOUTS_PER_STEP, DEMONSTRATIONS = 64, 16
_LEARNING_RATE = 2e-4
_POINTS = 12
_TRAINER: dict[str, Any] = {
    "activation_checkpointing": False,
    "beta": 0.0,
    "bf16": False,
    "loss_type": "dapo",
    "lr_scheduler_type": "linear",
    "max_completion_length": 4,
    "max_grad_norm": 1.0,
    "num_generations": 8,
    "num_iterations": 1,
    "per_device_train_batch_size": ROLLOUTS_PER_STEP,
    "scale_rewards": "group",
    "sft_per_device_train_batch_size": DEMONSTRATIONS,
    "temperature": 1.0,
    "use_cpu": True,
    "weight_decay": 0.0,
}
# As many SFT updates as BRIDGE makes, then as many rollouts.
_COLD_START = {"sft_completion_only_loss": True, "sft_max_length": None}

METHODS = {
    "GRPO": Row("GRPO", "grpo", {}, {}),
    "cold start": Row("cold start", "two-stage", _COLD_START, {"sft_learning_rate": 1.0}),
    "BRIDGE (paper)": Row("BRIDGE (paper)", "bridge", {"preset": "paper"}, {}),
    "BRIDGE (selective)": Row("BRIDGE (selective)", "bridge", {"preset": "selective"}, {}),
}
"""What the demo compares, in the order of the table."""


@dataclass
class Curve:
    """What a method did."""

    name: str
    points: list[dict[str, float]] = field(default_factory=list)
    model: Any = None
    seconds: float = 0.0

    @property
    def final(self) -> dict[str, float]:
        """The last point."""
        return self.points[-1]


def train(name: str, spec: AdditionSpec, task: Task, steps: int, seed: int) -> Curve:
    """Train a method."""
    row = METHODS[name]
    if row.method == "two-stage":
        row = Row(row.name, row.method, {**row.fields, "sft_max_steps": steps}, row.times_learning_rate)
    run = Run(row, Setting("demo", spec), "test", seed, _LEARNING_RATE, steps, _POINTS, _TRAINER)
    recorder = Recorder(task, _POINTS, row.method == "two-stage")
    with tempfile.TemporaryDirectory() as scratch, open(os.devnull, "w") as nowhere:
        # Trainers print a line for each update.
        with contextlib.redirect_stdout(nowhere):
            trainer = build_trainer(run, task, scratch, [recorder, _Bar(name, recorder)])
            start = time.perf_counter()
            trainer.train()
        seconds = time.perf_counter() - start - recorder.away[0]
        inner = getattr(trainer, "trainer", trainer)
        return Curve(name, recorder.curve, inner.accelerator.unwrap_model(inner.model), seconds)


class _Bar(TrainerCallback):
    """A progress bar for each stage of a training."""

    def __init__(self, label: str, recorder: Recorder):
        self.label, self.recorder = label, recorder

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.bar = tqdm(total=state.max_steps, desc=self.label, unit="step", ncols=100)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.bar.update()
        if self.recorder.curve:
            self.bar.set_postfix_str(f"accuracy {self.recorder.curve[-1]['accuracy']:.2f}")

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.bar.close()


# The rows that the curves are measured on.
_HELD_OUT = "validation"
_EXAMPLES = 3


def main(argv: list[str] | None = None) -> int:
    """Run the demo."""
    options = _parse(sys.argv[1:] if argv is None else argv)
    # Imported late, so that --help and a wrong option answer at once.
    from .pictures import check_matplotlib

    check_matplotlib()
    import torch
    import transformers

    from .tasks.specs import AdditionSpec

    # Matrices of 64 columns gain nothing from a second thread, and lose much where other programs run beside.
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    start = time.perf_counter()
    output = Path(options.output_dir)
    output.mkdir(parents=True, exist_ok=True)
    print(
        f"Sums of two numbers up to 49, {options.wrong_share:.0%} of 400 demonstrations wrong, {options.steps} updates of "
        f"{ROLLOUTS_PER_STEP} rollouts for each method, seed {options.seed}."
    )
    spec = AdditionSpec(wrong_share=options.wrong_share, base_steps=options.base_steps)
    print("Training the base model ...")
    task = spec.build(options.seed)
    base = task.score(task.base, _HELD_OUT)
    curves = [train(name, spec, task, options.steps, options.seed) for name in METHODS]

    table = _table(base, curves)
    title = f"Sums of two numbers, {options.wrong_share:.0%} of the demonstrations wrong (seed {options.seed})"
    draw(curves, base, title, output / "curves.png")
    _save(output, curves, base, vars(options))
    task.tokenizer.save_pretrained(output / "model")
    print(f"\n{table}\n")
    print(_before_and_after(task, curves[-1]))
    print(
        f"\nCurves:        {output / 'curves.png'}\n"
        f"All numbers:   {output / 'results.json'}\n"
        f"Trained model: {output / 'model'} ({curves[-1].name}; AutoModelForCausalLM.from_pretrained loads it)\n"
        f"One seed on a toy task: it shows how the methods behave, not how good they are. {time.perf_counter() - start:.0f} s "
        "in all."
    )
    return 0


def _parse(argv: list[str]) -> argparse.Namespace:
    parser = ToolParser(
        prog="trl-bridge demo",
        description="Compare GRPO, cold start and BRIDGE on sums of two numbers, with some demonstrations wrong.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--steps", type=int, default=120, help="RL updates of each method")
    parser.add_argument("--base_steps", type=int, default=600, help="training steps of the base model")
    parser.add_argument("--wrong_share", type=float, default=0.5, help="share of the demonstrations that are wrong")
    parser.add_argument("--seed", type=int, default=0, help="seed of everything")
    parser.add_argument("--output_dir", default="demo-output", help="folder for picture, model and numbers")
    options = parser.parse_args(argv)
    if options.steps < 1 or options.base_steps < 1:
        raise ValueError("`--steps` and `--base_steps` must be at least 1")
    if not 0.0 <= options.wrong_share <= 1.0:
        raise ValueError(f"`--wrong_share` must lie in [0, 1], got {options.wrong_share}")
    return options


def _table(base: dict[str, float], curves: "list[Curve]") -> str:
    """Markdown: accuracy and probability of the right answer on held-out sums, and the time of training."""
    rows = [("base model", f"{base['accuracy']:.3f}", f"{base['probability']:.3f}", "")]
    for curve in curves:
        scores = curve.final
        rows.append(
            (curve.name, f"{scores['accuracy']:.3f}", f"{scores['probability']:.3f}", f"{curve.seconds:.0f} s")
        )
    head = ("method", "held-out accuracy", "p(right answer)", "training")
    widths = [max(len(row[column]) for row in [head, *rows]) for column in range(len(head))]
    lines = [
        "| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) + " |"
        for row in [head, *rows]
    ]
    lines.insert(1, "|" + "|".join("-" * (width + 2) for width in widths) + "|")
    return "\n".join(lines)


def _before_and_after(task: "Task", curve: "Curve") -> str:
    """Completions of the base model and of a trained one: rows where they differ first, as they come."""
    from .tasks.addition import greedy_answers

    held_out = task.splits[_HELD_OUT]
    prompts, solutions = list(held_out["prompt"]), list(held_out["solution"])
    before = greedy_answers(task.base, task, prompts)
    after = greedy_answers(curve.model, task, prompts)
    rows = list(zip(prompts, solutions, before, after, strict=True))
    shown = sorted(range(len(rows)), key=lambda index: rows[index][2] == rows[index][3])[:_EXAMPLES]
    lines = [f"Before and after {curve.name}, on the first held-out sums where the answer changed:"]
    for prompt, solution, old, new in (rows[index] for index in shown):
        lines.append(f"  {prompt:8} before {old:5} after {new:5} (right: {solution})")
    return "\n".join(lines)


def _save(output: Path, curves: "list[Curve]", base: dict[str, float], options: dict[str, object]) -> None:
    curves[-1].model.save_pretrained(output / "model")
    results = {
        "options": options,
        "base": base,
        "methods": {curve.name: {"seconds": round(curve.seconds, 1), "points": curve.points} for curve in curves},
    }
    (output / "results.json").write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")

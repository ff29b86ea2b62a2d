"""The comparison `comparison/demo` in one process: a table, a picture, and what a trained model answers."""

import contextlib
import json
import os
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers
from tqdm.auto import tqdm

from .figures import check_matplotlib, new_figure, style
from .file import Comparison, parse_comparison, read_values
from .plan import Run, runs_of
from .recorder import Recorder, Stopwatch
from .run import policy_of
from .tasks.addition import greedy_answers
from .tasks.task import BuiltTask, Scores
from .trainers import build_trainer


# The rows that the curves are measured on.
_HELD_OUT = "validation"
_EXAMPLES = 3


@dataclass
class Curve:
    """What a method did."""

    name: str
    points: list[dict[str, float]] = field(default_factory=list)
    model: Any = None
    seconds: float = 0.0


def run_demo(steps: int, base_steps: int, wrong_share: float, seed: int, output_dir: str) -> None:
    """Train, tabulate, draw, save."""
    options = dict(steps=steps, base_steps=base_steps, wrong_share=wrong_share, seed=seed, output_dir=output_dir)
    check_matplotlib()
    # Matrices of 64 columns gain nothing from a second thread, and lose much where other programs run beside.
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    start = time.perf_counter()
    output = Path(output_dir)
    output.mkdir(parents=True, exist_ok=True)
    comparison = demo_comparison(steps, base_steps, wrong_share, seed)
    (setting,), (rate,) = comparison.settings, comparison.learning_rates
    print(
        f"Sums of two numbers up to 49, {wrong_share:.0%} of 400 demonstrations wrong, {steps} updates of "
        f"{comparison.trainer['per_device_train_batch_size']} rollouts for each method, seed {seed}."
    )
    print("Training the base model ...")
    task = setting.task.build(seed)
    base = task.score(task.base, _HELD_OUT)
    curves = [train(run, task) for row in comparison.rows for run in runs_of(comparison, row, setting, rate)]
    title = f"Sums of two numbers, {wrong_share:.0%} of the demonstrations wrong (seed {seed})"
    draw(curves, base, title, output / "curves.png")
    _save(curves, base, task, options, output)
    print(f"\n{_table(base, curves)}\n\n{_before_and_after(task, curves[-1])}")
    print(
        f"\nCurves:        {output / 'curves.png'}\n"
        f"All numbers:   {output / 'results.json'}\n"
        f"Trained model: {output / 'model'} ({curves[-1].name}; AutoModelForCausalLM.from_pretrained loads it)\n"
        f"One seed on a toy task: it shows how the methods behave, not how good they are. {time.perf_counter() - start:.0f} s "
        "in all."
    )


def demo_comparison(steps: int, base_steps: int, wrong_share: float, seed: int) -> Comparison:
    """The demo's comparison with the command's options."""
    values = read_values("comparison/demo")
    values["task"]["base_steps"] = base_steps
    values["settings"]["demo"]["wrong_share"] = wrong_share
    values["methods"]["cold start"]["sft_max_steps"] = steps
    return parse_comparison({**values, "steps": steps, "seeds": [seed]})


def _save(curves: list[Curve], base: Scores, task: BuiltTask, options: dict[str, Any], output: Path) -> None:
    curves[-1].model.save_pretrained(output / "model")
    task.tokenizer.save_pretrained(output / "model")
    methods = {curve.name: {"seconds": round(curve.seconds, 1), "points": curve.points} for curve in curves}
    results = {"options": options, "base": base, "methods": methods}
    (output / "results.json").write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")


def train(run: Run, task: BuiltTask) -> Curve:
    """Train a method."""
    recorder = Recorder(task, run.points, run.row.method == "two-stage")
    with tempfile.TemporaryDirectory() as scratch, open(os.devnull, "w") as nowhere:
        # Trainers print a line for each update.
        with contextlib.redirect_stdout(nowhere):
            trainer = build_trainer(run, task, scratch, [recorder, _Bar(run.row.name, recorder)])
            with Stopwatch() as spent:
                trainer.train()
        return Curve(run.row.name, recorder.curve, policy_of(trainer), spent.wall - recorder.away.wall)


class _Bar(transformers.TrainerCallback):
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


def draw(curves: list[Curve], base: Scores, title: str, path: Path) -> None:
    """Draw held-out accuracy over rollouts."""
    figure = new_figure(8, 5)
    axes = figure.add_subplot()
    axes.axhline(base["accuracy"], color="0.6", linewidth=1, label="base model")
    for index, curve in enumerate(curves):
        rollouts = [point["rollouts"] for point in curve.points]
        accuracy = [point["accuracy"] for point in curve.points]
        axes.plot(rollouts, accuracy, label=curve.name, **style(index))
    axes.set_xlabel("rollouts (a cold start's SFT stage comes before its first one)")
    axes.set_ylabel("accuracy on held-out sums (greedy)")
    axes.set_title(title)
    axes.grid(color="0.9")
    axes.legend(loc="best")
    figure.savefig(path, dpi=150)


def _table(base: Scores, curves: list[Curve]) -> str:
    """Accuracy and probability of the right answer on held-out sums, and the time of training."""
    rows = [["method", "held-out accuracy", "p(right answer)", "training"]]
    timed = [("base model", base, ""), *((each.name, each.points[-1], f"{each.seconds:.0f} s") for each in curves)]
    rows += [[name, f"{at['accuracy']:.3f}", f"{at['probability']:.3f}", time] for name, at, time in timed]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [f"| {' | '.join(map(str.ljust, row, widths))} |" for row in rows]
    lines.insert(1, f"|{'|'.join('-' * (width + 2) for width in widths)}|")
    return "\n".join(lines)


def _before_and_after(task: BuiltTask, curve: Curve) -> str:
    """Answers of the base model and of a trained one: rows where they differ first, as they come."""
    held_out = task.splits[_HELD_OUT]
    prompts = list(held_out["prompt"])
    before, after = (greedy_answers(model, task, prompts) for model in (task.base, curve.model))
    rows = sorted(zip(prompts, held_out["solution"], before, after, strict=True), key=lambda row: row[2] == row[3])
    lines = [f"Before and after {curve.name}, on the first held-out sums where the answer changed:"]
    for prompt, solution, old, new in rows[:_EXAMPLES]:
        lines.append(f"  {prompt:8} before {old:5} after {new:5} (right: {solution})")
    return "\n".join(lines)

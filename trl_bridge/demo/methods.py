"""The methods that the demo compares: four rows of `trl-bridge compare`, one after another in this process."""

import contextlib
import os
import tempfile
import time
from dataclasses import dataclass, field
from typing import Any

from tqdm.auto import tqdm
from transformers import TrainerCallback

from ..comparison.addition import Task
from ..comparison.config import Row, Setting
from ..comparison.plan import Run
from ..comparison.recorder import Recorder
from ..comparison.specs import AdditionSpec
from ..comparison.trainers import build_trainer


__all__ = ["DEMONSTRATIONS", "METHODS", "ROLLOUTS_PER_STEP", "Curve", "train"]

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
    """
    What a method did.

    Attributes:
        name (`str`):
            Name of the method.
        points (`list[dict[str, float]]`):
            `step` (RL updates so far), `rollouts`, `accuracy` and `probability`.
        model ([`~transformers.PreTrainedModel`], *optional*):
            The trained model.
        seconds (`float`):
            Time of training without evaluation.
    """

    name: str
    points: list[dict[str, float]] = field(default_factory=list)
    model: Any = None
    seconds: float = 0.0

    @property
    def final(self) -> dict[str, float]:
        """The last point."""
        return self.points[-1]


def train(name: str, spec: AdditionSpec, task: Task, steps: int, seed: int) -> Curve:
    """
    Train a method.

    Args:
        name (`str`):
            Key of [`METHODS`].
        spec ([`~trl_bridge.comparison.specs.AdditionSpec`]), task ([`~trl_bridge.comparison.addition.Task`]):
            The task, as described and as built.
        steps (`int`):
            RL updates.
        seed (`int`):
            Seed of the trainer.

    Returns:
        [`Curve`]: its curve and its model.
    """
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

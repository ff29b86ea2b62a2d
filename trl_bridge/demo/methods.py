"""The methods that the demo compares, each through the real trainer, from the same base model on the same rows."""

import dataclasses
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm
from transformers import PreTrainedModel, PrinterCallback, ProgressCallback, TrainerCallback
from trl import GRPOConfig, GRPOTrainer, SFTConfig, SFTTrainer

from ..bridge.config import BridgeConfig
from ..bridge.trainer import BridgeTrainer
from ..rewards.arithmetic_rewards import answer_reward
from .task import Scores, Task, evaluate


__all__ = ["METHODS", "Curve", "Settings"]

_PROMPTS, _GENERATIONS, _DEMONSTRATIONS = 8, 8, 16


@dataclasses.dataclass(frozen=True)
class Settings:
    """
    Settings that all methods share.

    Attributes:
        steps (`int`):
            RL updates, of 8 prompts with 8 rollouts each.
        seed (`int`):
            Seed of every trainer.
        learning_rate (`float`):
            Learning rate of the base weights (AdamW, linear decay).
        scratch (`Path`):
            Folder that trainers may write to.
    """

    steps: int
    seed: int
    scratch: Path
    learning_rate: float = 2e-4

    @property
    def evaluations(self) -> set[int]:
        """Updates after which a curve has a point."""
        return {math.ceil(self.steps * part / 12) for part in range(1, 13)}


@dataclasses.dataclass
class Curve:
    """
    What a method did.

    Attributes:
        name (`str`):
            Name of the method.
        model ([`~transformers.PreTrainedModel`], *optional*):
            The trained model, `None` before.
        points (`list[tuple[int, Scores]]`):
            RL updates so far, and the scores then.
        seconds (`float`):
            Time of training without evaluation.
    """

    name: str
    model: Any = None
    points: list[tuple[int, Scores]] = dataclasses.field(default_factory=list)
    seconds: float = 0.0

    @property
    def final(self) -> Scores:
        """Scores at the end."""
        return self.points[-1][1]


class _Follow(TrainerCallback):
    """A progress bar, and a point of the curve now and then."""

    def __init__(self, curve: Curve, task: Task, label: str, evaluations: set[int]):
        self.curve, self.task, self.label, self.evaluations = curve, task, label, evaluations
        self.evaluation_seconds = 0.0

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.bar = tqdm(total=state.max_steps, desc=self.label, unit="step", ncols=100)

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        self.bar.update()
        if state.global_step in self.evaluations:
            start = time.perf_counter()
            scores = evaluate(model, self.task)
            self.curve.points.append((state.global_step, scores))
            self.bar.set_postfix_str(f"accuracy {scores.accuracy:.2f}")
            self.evaluation_seconds += time.perf_counter() - start

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.bar.close()


def _common(settings: Settings) -> dict[str, Any]:
    return {
        "output_dir": str(settings.scratch),
        "max_steps": settings.steps,
        "learning_rate": settings.learning_rate,
        "lr_scheduler_type": "linear",
        "weight_decay": 0.0,
        "max_grad_norm": 1.0,
        "seed": settings.seed,
        "use_cpu": True,
        "bf16": False,
        "activation_checkpointing": False,
        "disable_tqdm": True,
        "logging_strategy": "no",
        "save_strategy": "no",
        "report_to": "none",
    }


def _rollouts(settings: Settings) -> dict[str, Any]:
    return {
        **_common(settings),
        "per_device_train_batch_size": _PROMPTS * _GENERATIONS,
        "num_generations": _GENERATIONS,
        "max_completion_length": 4,
        "temperature": 1.0,
        "loss_type": "dapo",
        "scale_rewards": "group",
        "beta": 0.0,
        "num_iterations": 1,
    }


def _train(trainer: Any, curve: Curve, follow: _Follow) -> None:
    for callback in (PrinterCallback, ProgressCallback):
        trainer.remove_callback(callback)
    start = time.perf_counter()
    trainer.train()
    curve.seconds += time.perf_counter() - start - follow.evaluation_seconds
    curve.model = trainer.accelerator.unwrap_model(trainer.model)


def _grpo(task: Task, settings: Settings, model: PreTrainedModel | None = None, curve: Curve | None = None) -> Curve:
    """GRPO, from the base model or from where a first stage ended."""
    curve = curve or Curve("GRPO", points=[(0, evaluate(task.base, task))])
    follow = _Follow(curve, task, curve.name, settings.evaluations)
    trainer = GRPOTrainer(
        model=model or task.fresh_model(),
        reward_funcs=[answer_reward],
        args=GRPOConfig(**_rollouts(settings)),
        train_dataset=task.train,
        processing_class=task.tokenizer,
        callbacks=[follow],
    )
    _train(trainer, curve, follow)
    return curve


def _cold_start(task: Task, settings: Settings) -> Curve:
    """As many SFT updates on the demonstrations as BRIDGE makes, then GRPO with as many rollouts."""
    curve = Curve("cold start")
    model = task.fresh_model()
    follow = _Follow(curve, task, "cold start (SFT)", set())
    trainer = SFTTrainer(
        model=model,
        args=SFTConfig(
            **_common(settings),
            per_device_train_batch_size=_DEMONSTRATIONS,
            completion_only_loss=True,
            max_length=None,
        ),
        train_dataset=task.demonstrations,
        processing_class=task.tokenizer,
        callbacks=[follow],
    )
    _train(trainer, curve, follow)
    curve.points.append((0, evaluate(model, task)))
    return _grpo(task, settings, model, curve)


def _bridge(name: str, preset: str) -> Callable[[Task, Settings], Curve]:
    def train(task: Task, settings: Settings) -> Curve:
        curve = Curve(name, points=[(0, evaluate(task.base, task))])
        follow = _Follow(curve, task, name, settings.evaluations)
        trainer = BridgeTrainer(
            model=task.fresh_model(),
            reward_funcs=[answer_reward],
            args=BridgeConfig(**_rollouts(settings), preset=preset, sft_per_device_train_batch_size=_DEMONSTRATIONS),
            train_dataset=task.train,
            sft_dataset=task.demonstrations,
            processing_class=task.tokenizer,
            callbacks=[follow],
        )
        _train(trainer, curve, follow)
        return curve

    return train


METHODS: dict[str, Callable[[Task, Settings], Curve]] = {
    "GRPO": _grpo,
    "cold start": _cold_start,
    "BRIDGE (paper)": _bridge("BRIDGE (paper)", "paper"),
    "BRIDGE (selective)": _bridge("BRIDGE (selective)", "selective"),
}
"""What the demo compares, in the order of the table."""

"""From a run to the method's own trainer, as a script of the user's would build it."""

import dataclasses
import functools
import inspect
from typing import Any

from ..methods import METHODS, Method
from ..rewards.noise import noisy
from .addition import Task
from .config import Comparison, Row
from .plan import Run, runs_of


__all__ = ["build_trainer", "check_rows", "config_fields"]

# What the comparison sets itself, for every method.
_OWN = {
    "disable_tqdm": True,
    "logging_strategy": "steps",
    "logging_steps": 1,
    "report_to": "none",
    "save_strategy": "no",
}
_OURS = (*_OWN, "learning_rate", "output_dir", "seed")
# Keys of a row that are no fields of its config: the coordinator's, by their names on the command line.
_LORA = {"lora_r": "r", "lora_alpha": "lora_alpha"}


def config_fields(run: Run) -> dict[str, Any]:
    """
    Fields of the method's config, `output_dir` apart.

    Args:
        run ([`~trl_bridge.comparison.plan.Run`]):
            The run.

    Returns:
        `dict[str, Any]`: the comparison's own fields as far as the config has them, then the row's.

    Raises:
        ValueError: the row has a field that the config lacks, or sets one that the comparison sets.
    """
    row = run.row
    known = _field_names(METHODS[row.method])
    fields = {name: value for name, value in row.fields.items() if not _is_lora(row, name)}
    for name in (*fields, *row.times_learning_rate):
        if name not in known:
            raise ValueError(f"`methods: {row.name}`: {METHODS[row.method].config} has no field `{name}`")
        if name in _OURS:
            raise ValueError(f"`methods: {row.name}`: `{name}` is set by the comparison")
    shared = {"max_steps": run.steps, **run.trainer}
    return {
        **{name: value for name, value in shared.items() if name in known},
        **fields,
        **{name: times * run.learning_rate for name, times in row.times_learning_rate.items()},
        **_OWN,
        "learning_rate": run.learning_rate,
        "seed": run.seed,
    }


def check_rows(comparison: Comparison, output_dir: str) -> None:
    """
    Refuse before anything is trained what the methods' configs refuse.

    Args:
        comparison ([`~trl_bridge.comparison.config.Comparison`]):
            The comparison.
        output_dir (`str`):
            Folder that the configs name; nothing is written.

    Raises:
        ValueError, TypeError, NotImplementedError: the message names the row, or the field.
    """
    for name in comparison.trainer:
        if name in (*_OURS, "max_steps"):
            raise ValueError(f"`trainer`: `{name}` is set by the comparison")
        # Of any method, also of one that is left out this time.
        if not any(name in _field_names(method) for method in METHODS.values()):
            raise ValueError(f"`trainer`: no method has a field `{name}`")
    for row in comparison.rows:
        run = runs_of(comparison, row, comparison.settings[0], comparison.learning_rates[0])[0]
        fields = config_fields(run)
        try:
            _import(METHODS[row.method].config)(**fields, output_dir=output_dir)
        except (ValueError, TypeError, NotImplementedError) as error:
            raise type(error)(f"`methods: {row.name}`: {error}") from error


def build_trainer(run: Run, task: Task, output_dir: str, callbacks: list[Any]) -> Any:
    """
    The trainer of a run, ready to train.

    Args:
        run ([`~trl_bridge.comparison.plan.Run`]):
            The run.
        task ([`~trl_bridge.comparison.addition.Task`]):
            Its task, built with its seed.
        output_dir (`str`):
            Folder that the trainer may write to.
        callbacks (`list[~transformers.TrainerCallback]`):
            Callbacks.

    Returns:
        [`~transformers.Trainer`] or [`~trl_bridge.TwoStageTrainer`]: the trainer.
    """
    method = METHODS[run.row.method]
    arguments: dict[str, Any] = {
        "model": task.fresh_model(),
        "args": _import(method.config)(**config_fields(run), output_dir=output_dir),
        "processing_class": task.tokenizer,
        "callbacks": callbacks,
    }
    if method.family == "sft":
        arguments["train_dataset"] = task.demonstrations.select_columns(["prompt", "completion"])
    else:
        arguments["train_dataset"] = task.with_experts() if method.family == "group" else task.train
        flip = run.setting.task.reward_flip
        arguments["reward_funcs"] = [noisy(task.reward, flip, run.seed) if flip else task.reward]
    if method.family in ("bridge", "stream"):
        arguments["sft_dataset"] = task.demonstrations
    lora = {_LORA[name]: value for name, value in run.row.fields.items() if _is_lora(run.row, name)}
    if lora:
        from peft import LoraConfig

        arguments["peft_config"] = LoraConfig(**{"r": 16, "lora_alpha": 16, "target_modules": "all-linear", **lora})
    return _import(method.trainer)(**arguments)


def _is_lora(row: Row, name: str) -> bool:
    return METHODS[row.method].family == "bridge" and name in _LORA


@functools.cache
def _field_names(method: Method) -> set[str]:
    config = _import(method.config)
    fields = {field.name for field in dataclasses.fields(config) if field.init}
    return fields & set(inspect.signature(config).parameters)


def _import(path: str) -> Any:
    import importlib

    module, _, name = path.rpartition(".")
    return getattr(importlib.import_module(module), name)

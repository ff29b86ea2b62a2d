"""From a run to the method's own trainer, as a script of the user's would build it."""

import dataclasses
import functools
import inspect
from pathlib import Path
from typing import Any

from datasets import Dataset

from ..methods.catalogue import METHODS, Method, import_by_path
from ..rewards.noise import noisy
from .file import TASKS_TEACHER, Comparison, Row
from .plan import Run, runs_of
from .tasks.scored_rollouts import SAMPLING, scored_rollouts
from .tasks.task import BuiltTask


# What the comparison sets itself, for every method.
_OWN = {
    "disable_tqdm": True,
    "logging_strategy": "steps",
    "logging_steps": 1,
    "report_to": "none",
    "save_strategy": "no",
}
_OURS = (*_OWN, "learning_rate", "output_dir", "seed")
# What the comparison sets unless a row does. The models that it trains did not learn from a teacher's answers.
_DEFAULTS = {"require_same_teacher": False}
# Keys of a row that are no fields of its config: the coordinator's, by their names on the command line, and how stored
# rollouts are sampled.
_LORA = {"lora_r": "r", "lora_alpha": "lora_alpha"}
_KEYS: dict[str, Any] = {"bridge": _LORA, "scored": SAMPLING}
# Fields that name a teacher of a row's own.
_TEACHERS = ("teacher_model_name_or_path", "teacher_model_server_url")


def config_fields(run: Run) -> dict[str, Any]:
    """Fields of the method's config, `output_dir` apart."""
    row = run.row
    known = _field_names(METHODS[row.method])
    fields = {name: value for name, value in row.fields.items() if name not in _KEYS.get(row.family, ())}
    for name in (*fields, *row.times_learning_rate):
        if name not in known:
            package, *_, config = METHODS[row.method].config.split(".")
            raise ValueError(f"`methods: {row.name}`: {package}.{config} has no field `{name}`")
        if name in _OURS:
            raise ValueError(f"`methods: {row.name}`: `{name}` is set by the comparison")
    shared = {"max_steps": run.steps, **_DEFAULTS, **run.trainer}
    return {
        **{name: value for name, value in shared.items() if name in known},
        **fields,
        **{name: times * run.learning_rate for name, times in row.times_learning_rate.items()},
        **_OWN,
        "learning_rate": run.learning_rate,
        "seed": run.seed,
    }


def check_rows(comparison: Comparison, output_dir: str) -> None:
    """Refuse before anything is trained what the methods' configs refuse."""
    for name in comparison.trainer:
        if name in (*_OURS, "max_steps"):
            raise ValueError(f"`trainer`: `{name}` is set by the comparison")
        # Of any method, also of one that is left out this time.
        if not any(name in _field_names(method) for method in METHODS.values()):
            raise ValueError(f"`trainer`: no method has a field `{name}`")
    for row in comparison.rows:
        run = runs_of(comparison, row, comparison.settings[0], comparison.learning_rates[0])[0]
        _check_teacher(comparison, row)
        fields = config_fields(run)
        try:
            import_by_path(METHODS[row.method].config)(**fields, output_dir=output_dir)
        except (ValueError, TypeError, NotImplementedError) as error:
            raise type(error)(f"`methods: {row.name}`: {error}") from error


def sample_offline(run: Run, task: BuiltTask, output_dir: str) -> Dataset | None:
    """Rollouts that are made before training, for a method that makes none: as many as its updates read."""
    if run.row.family != "scored":
        return None
    args, given = _config(run, output_dir), {**run.trainer, **run.row.fields}
    number = args.max_steps * args.per_device_train_batch_size * args.gradient_accumulation_steps
    sampling = {name: given.get(name, default) for name, default in SAMPLING.items()}
    teacher = task.fresh_teacher()
    assert teacher is not None  # check_rows
    return scored_rollouts(task, teacher, number, run.seed, sampling, Path(output_dir))


def build_trainer(
    run: Run, task: BuiltTask, output_dir: str, callbacks: list[Any], rollouts: Dataset | None = None
) -> Any:
    """The trainer of a run, ready to train."""
    row, flip = run.row, run.setting.task.reward_flip
    arguments: dict[str, Any] = {"train_dataset": _train_dataset(row, task, rollouts)}
    if row.reads_rewards:
        arguments["reward_funcs"] = [noisy(task.reward, flip, run.seed) if flip else task.reward]
    if row.family in ("bridge", "stream"):
        arguments["sft_dataset"] = task.demonstrations
    if row.family == "distillation" and not _has_own_teacher(row):
        arguments["teacher_model"] = task.fresh_teacher()
    if row.teacher_beside_reward:
        _save_teacher(task, output_dir)
    if lora := {_LORA[name]: value for name, value in row.fields.items() if name in _LORA}:
        from peft import LoraConfig

        arguments["peft_config"] = LoraConfig(**{"r": 16, "lora_alpha": 16, "target_modules": "all-linear", **lora})
    return import_by_path(METHODS[row.method].trainer)(
        model=task.fresh_model(),
        args=_config(run, output_dir),
        processing_class=task.tokenizer,
        callbacks=callbacks,
        **arguments,
    )


def _train_dataset(row: Row, task: BuiltTask, rollouts: Dataset | None) -> Dataset | None:
    if row.family == "sft":
        return task.demonstrations.select_columns(["prompt", "completion"])
    if row.family == "scored":
        return rollouts
    return task.with_experts() if row.family == "group" else task.train


def _config(run: Run, output_dir: str) -> Any:
    fields = config_fields(run)
    if run.row.teacher_beside_reward:
        fields["teachers"] = [str(Path(output_dir) / TASKS_TEACHER)]
    return import_by_path(METHODS[run.row.method].config)(**fields, output_dir=output_dir)


def _save_teacher(task: BuiltTask, output_dir: str) -> None:
    """`teachers` are named by where they are."""
    teacher, folder = task.teacher, Path(output_dir) / TASKS_TEACHER
    assert teacher is not None  # check_rows
    teacher.save_pretrained(folder)
    task.tokenizer.save_pretrained(folder)


def _check_teacher(comparison: Comparison, row: Row) -> None:
    if not row.reads_teacher or _has_own_teacher(row):
        return
    for setting in comparison.settings:
        if not setting.task.has_teacher:
            own = " or the row's `teacher_model_name_or_path`" if row.family == "distillation" else ""
            raise ValueError(
                f"`methods: {row.name}`: `{row.method}` needs a teacher, and the task of `settings: {setting.name}` makes "
                f"none. Set `teacher_probability` of the `addition` task{own}."
            )


def _has_own_teacher(row: Row) -> bool:
    return any(row.fields.get(name) is not None for name in _TEACHERS)


@functools.cache
def _field_names(method: Method) -> set[str]:
    config = import_by_path(method.config)
    fields = {field.name for field in dataclasses.fields(config) if field.init}
    return fields & set(inspect.signature(config).parameters)

"""Datasets that the script arguments name, in the columns that the trainers read."""

from typing import Any

from transformers import PreTrainedTokenizerBase
from trl import DatasetMixtureConfig, ModelConfig, get_dataset

from ..data.rows import load_named_dataset, prepared, take_split, within_prompt_length
from ..data.templates import Prompting
from ..demonstrations.rows import check_nulls, check_prompts
from ..generation.day import LONGEST_DAY, template_kwargs
from ..models import check_name, load_tokenizer
from .arguments import (
    DatasetArguments,
    GroupArguments,
    RewardArguments,
    ScoredArguments,
    StreamArguments,
    SupervisedArguments,
)


def load_splits(
    script: DatasetArguments, mixture: DatasetMixtureConfig, evaluate: bool, model: ModelConfig, training: Any = None
) -> dict[str, Any]:
    """The datasets of a method: `train_dataset`, `eval_dataset` and, of a stream of demonstrations, `sft_dataset`."""
    _check_prompts(script)
    prompting = Prompting(script.system_prompt, script.prompt_template)
    if mixture.datasets:
        loaded = get_dataset(mixture)
    elif script.dataset_name is not None:
        loaded = load_named_dataset(script.dataset_name, script.dataset_config, script.dataset_streaming)
    else:
        raise ValueError("either `datasets` or `dataset_name` must be set")

    def rows(argument: str) -> Any:
        return take_split(loaded, getattr(script, argument), "the dataset", argument)

    train = rows("dataset_train_split")
    splits = {"train_dataset": train}
    tests = script.dataset_test_split.split("+") if evaluate else []
    for test in tests:
        splits[f"eval_dataset.{test}"] = take_split(loaded, test, "the dataset", "dataset_test_split")
    tokenizer = None if script.max_prompt_length is None else _tokenizer(model, training)
    kwargs = getattr(training, "chat_template_kwargs", None)
    if tokenizer is not None:
        kwargs = template_kwargs(tokenizer, LONGEST_DAY, kwargs)
    for name, raw in splits.items():
        splits[name] = prepared(raw, "dataset_name", _columns(script, raw.column_names or []), prompting)
        what = f"dataset_name ({name if len(tests) > 1 else name.partition('.')[0]})"
        _check_rows(splits[name], script, what)
        if tokenizer is not None and script.max_prompt_length is not None:
            splits[name] = within_prompt_length(splits[name], tokenizer, script.max_prompt_length, what, kwargs)
    evaluated = {test: splits.pop(f"eval_dataset.{test}") for test in tests}
    splits["eval_dataset"] = evaluated if len(evaluated) > 1 else next(iter(evaluated.values()), None)
    if isinstance(script, StreamArguments):
        splits["sft_dataset"] = _demonstrations(train, script, prompting)
    return splits


def _check_rows(rows: Any, script: DatasetArguments, what: str) -> None:
    if isinstance(script, SupervisedArguments):
        check_nulls(rows, what)
    elif isinstance(script, ScoredArguments):
        from ..distillation.scored_rows import check_complete

        check_complete(rows, what)
    else:
        check_prompts(rows, what)


def _check_prompts(script: DatasetArguments) -> None:
    if isinstance(script, ScoredArguments):
        for name in ("prompt_column", "prompt_template", "max_prompt_length", "system_prompt"):
            if getattr(script, name) is not None:
                raise ValueError(
                    f"`{name}`: scored rollouts are tokens already. Give it to `trl-bridge data score-rollouts`, which makes "
                    "the rows"
                )
    if script.max_prompt_length is not None and script.max_prompt_length < 1:
        raise ValueError(f"`max_prompt_length` must be at least 1, got {script.max_prompt_length}")


def _columns(script: DatasetArguments, present: list[str]) -> dict[str, str | None]:
    """From the names that trainers read to the columns that the arguments name."""
    columns = {"prompt": script.prompt_column}
    if isinstance(script, RewardArguments):
        columns["solution"] = script.solution_column
    if isinstance(script, SupervisedArguments):
        columns["completion"] = script.expert_column
    if isinstance(script, GroupArguments):
        instead = "completion" if "completion" in present and "expert" not in present else None
        columns["expert"] = script.expert_column or instead
    return columns


def _tokenizer(model: ModelConfig, training: Any) -> PreTrainedTokenizerBase:
    return load_tokenizer(
        check_name(model.model_name_or_path, "model_name_or_path"),
        revision=model.model_revision,
        trust_remote_code=bool(getattr(training, "trust_remote_code", False)),
    )


def _demonstrations(train: Any, script: StreamArguments, prompting: Prompting) -> Any:
    """The demonstration stream's dataset; by default the RL rows themselves."""
    if script.sft_datasets:
        # The mixture turns the mappings of a YAML file into its own class.
        mixture = DatasetMixtureConfig(datasets=script.sft_datasets)  # type: ignore[arg-type]
        what, dataset = "sft_datasets", get_dataset(mixture)["train"]
    elif script.sft_dataset_name is not None:
        what = "sft_dataset_name"
        loaded = load_named_dataset(script.sft_dataset_name, script.sft_dataset_config)
        dataset = take_split(loaded, script.sft_dataset_split, script.sft_dataset_name, "sft_dataset_split")
    else:
        what, dataset = "dataset_name", train
        if "completion" not in (train.column_names or []) and script.expert_column is None:
            raise ValueError(
                "no demonstrations: set `sft_dataset_name` or `sft_datasets`, or name the column of `dataset_name` that "
                "holds them with `expert_column`"
            )
    columns = {"completion": script.expert_column}
    # Demonstrations may come as messages or text and need no solution, so these two are mapped where they are there.
    for target, source in (("prompt", script.prompt_column), ("solution", script.solution_column)):
        if source in (dataset.column_names or []):
            columns[target] = source
    return prepared(dataset, what, columns, prompting)

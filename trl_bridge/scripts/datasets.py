"""Datasets that the script arguments name, in the columns that the trainers read."""

from typing import Any

from trl import DatasetMixtureConfig, get_dataset

from ..data.load import AnyDataset, AnyDatasetDict, load_named_dataset, map_columns, with_system_prompt
from .arguments import DatasetArguments, GroupArguments, RewardArguments, StreamArguments, SupervisedArguments


__all__ = ["load_splits"]


def load_splits(
    family: str, script: DatasetArguments, mixture: DatasetMixtureConfig, evaluate: bool
) -> dict[str, AnyDataset | None]:
    """
    Load, map and prompt the datasets of a method.

    Args:
        family (`str`):
            Family of the method, a key of `trl_bridge.methods.FAMILIES`.
        script ([`DatasetArguments`]):
            Script arguments of that family.
        mixture ([`~trl.DatasetMixtureConfig`]):
            TRL's mixture; goes before `dataset_name`.
        evaluate (`bool`):
            Whether an evaluation split is needed.

    Returns:
        `dict[str, Dataset | None]`: `train_dataset`, `eval_dataset` and, for methods with a demonstration stream,
        `sft_dataset`.

    Raises:
        ValueError, OSError, ImportError: a dataset, split or column is missing.
    """
    loaded = _load(script, mixture)
    train = _split(loaded, script.dataset_train_split, "dataset_train_split")
    test = _split(loaded, script.dataset_test_split, "dataset_test_split") if evaluate else None
    splits = {
        "train_dataset": _prepared(train, script, "dataset_name"),
        "eval_dataset": None if test is None else _prepared(test, script, "dataset_name"),
    }
    if isinstance(script, StreamArguments):
        splits["sft_dataset"] = _demonstrations(train, script)
    return splits


def _load(script: DatasetArguments, mixture: DatasetMixtureConfig) -> AnyDatasetDict:
    if mixture.datasets:
        return get_dataset(mixture)
    if script.dataset_name is None:
        raise ValueError("either `datasets` or `dataset_name` must be set")
    return load_named_dataset(script.dataset_name, script.dataset_config, script.dataset_streaming)


def _split(loaded: AnyDatasetDict, name: str, argument: str) -> Any:
    if name not in loaded:
        raise ValueError(f"`{argument}: {name}`: the dataset has no such split; it has: {', '.join(map(str, loaded))}")
    return loaded[name]


def _prepared(dataset: AnyDataset, script: DatasetArguments, what: str) -> AnyDataset:
    columns = {"prompt": script.prompt_column}
    if isinstance(script, RewardArguments):
        columns["solution"] = script.solution_column
    if isinstance(script, SupervisedArguments):
        columns["completion"] = script.expert_column
    if isinstance(script, GroupArguments):
        columns["expert"] = script.expert_column
    dataset = map_columns(dataset, columns, what)
    return dataset if script.system_prompt is None else with_system_prompt(dataset, script.system_prompt)


def _demonstrations(train: AnyDataset, script: StreamArguments) -> AnyDataset:
    """The demonstration stream's dataset; by default the RL rows themselves."""
    if script.sft_datasets:
        # The mixture turns the mappings of a YAML file into its own class.
        mixture = DatasetMixtureConfig(datasets=script.sft_datasets)  # type: ignore[arg-type]
        what, dataset = "sft_datasets", get_dataset(mixture)["train"]
    elif script.sft_dataset_name is not None:
        what = "sft_dataset_name"
        loaded = load_named_dataset(script.sft_dataset_name, script.sft_dataset_config)
        dataset = _split(loaded, script.sft_dataset_split, "sft_dataset_split")
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
    dataset = map_columns(dataset, columns, what)
    return dataset if script.system_prompt is None else with_system_prompt(dataset, script.system_prompt)

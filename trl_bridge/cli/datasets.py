"""Datasets that the script arguments name, in the columns that the trainers read."""

from typing import Any

from trl import DatasetMixtureConfig, ModelConfig, get_dataset

from ..data.lengths import within_prompt_length
from ..data.rows import AnyDataset, AnyDatasetDict, load_named_dataset, map_columns, with_system_prompt
from ..data.templates import find_template, with_prompt_template
from .arguments import (
    DatasetArguments,
    GroupArguments,
    RewardArguments,
    ScoredArguments,
    StreamArguments,
    SupervisedArguments,
)


__all__ = ["load_splits", "load_tokenizer"]


def load_splits(
    family: str,
    script: DatasetArguments,
    mixture: DatasetMixtureConfig,
    evaluate: bool,
    model: ModelConfig | None = None,
    training: Any = None,
) -> dict[str, AnyDataset | None]:
    """Load, map and prompt the datasets of a method."""
    _check_prompts(script)
    loaded = _load(script, mixture)
    train = _split(loaded, script.dataset_train_split, "dataset_train_split")
    test = _split(loaded, script.dataset_test_split, "dataset_test_split") if evaluate else None
    splits = {
        "train_dataset": _prepared(train, script, "dataset_name"),
        "eval_dataset": None if test is None else _prepared(test, script, "dataset_name"),
    }
    if script.max_prompt_length is not None:
        if model is None:
            raise ValueError("`max_prompt_length` needs the model's tokenizer, and no model is given")
        tokenizer = load_tokenizer(model, bool(getattr(training, "trust_remote_code", False)))
        kwargs = getattr(training, "chat_template_kwargs", None)
        for split, dataset in splits.items():
            if dataset is not None:
                splits[split] = within_prompt_length(
                    dataset, tokenizer, script.max_prompt_length, f"dataset_name ({split})", kwargs
                )
    if isinstance(script, StreamArguments):
        splits["sft_dataset"] = _demonstrations(train, script)
    return splits


def load_tokenizer(model: ModelConfig, trust_remote_code: bool = False) -> Any:
    """Tokenizer of the model that the arguments name."""
    name = model.model_name_or_path
    if name is None:
        raise ValueError("`model_name_or_path` is not set")
    if name == "builtin:tiny":
        from ..models import tiny_tokenizer

        return tiny_tokenizer(chat_template=True)
    if name == "builtin:smollm2-135m":
        from ..models import load_smollm2

        return load_smollm2()[1]
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(name, revision=model.model_revision, trust_remote_code=trust_remote_code)


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
    if script.prompt_template is not None and find_template(script.prompt_template).plain and script.system_prompt:
        raise ValueError(
            f"`system_prompt` needs conversations, and `prompt_template: {script.prompt_template}` makes plain text: write "
            "the system prompt into the template"
        )


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
        present = dataset.column_names or []
        instead = "completion" if "completion" in present and "expert" not in present else None
        columns["expert"] = script.expert_column or instead
    return _prompted(map_columns(dataset, columns, what), script)


def _prompted(dataset: AnyDataset, script: DatasetArguments) -> AnyDataset:
    if script.prompt_template is not None:
        dataset = with_prompt_template(dataset, script.prompt_template)
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
    return _prompted(map_columns(dataset, columns, what), script)

"""Script arguments, one class for each family of methods."""

from dataclasses import field
from typing import Any

from trl import ModelConfig, ScriptArguments

from ..training.options import options


@options
class DatasetArguments(ScriptArguments):
    """
    Arguments that every method has: TRL's, where `dataset_name` also names sources, generated tasks and local files
    (see [`~trl_bridge.data.rows.load_named_dataset`]), the mapping of columns, and what is done to the prompts.
    """

    prompt_column: str | None = None
    """Column that holds the prompts. None means 'prompt'."""
    prompt_template: str | None = None
    """What is put around every question: boxed, qwen-boxed, abel, knights-knaves, or a text with {prompt} (with 'plain:'
    in front it is the whole prompt, without a chat template)."""
    max_prompt_length: int | None = None
    """Longest prompt in tokens. Rows above it are dropped, and their number is logged."""
    system_prompt: str | None = None
    """System message in front of every conversation. Prompts that are strings become conversations."""


@options
class SupervisedArguments(DatasetArguments):
    """Arguments of methods that read demonstrations only."""

    expert_column: str | None = None
    """Column that holds the demonstrations' completions. None means 'completion'."""


@options
class ScoredArguments(DatasetArguments):
    """
    Arguments of methods that read rollouts which a teacher has scored. These are tokens already: what changes prompts is
    refused, and belongs to `trl-bridge data score-rollouts`.
    """


@options
class RewardArguments(DatasetArguments):
    """Arguments of methods that sample rollouts."""

    solution_column: str | None = None
    """Column that holds what the reward functions compare with. None means 'solution'."""
    reward_model_name_or_path: str | None = None
    """Reward model: a name on the hub or a local directory."""
    reward_funcs: list[str] | None = None
    """Reward functions: names from trl_bridge.rewards or TRL's GRPO script (accuracy_reward, reasoning_accuracy_reward,
    think_format_reward, get_soft_overlong_punishment), or dotted paths of your own. reward_weights weighs them."""
    tools: list[str] | None = None
    """Tools that the policy may call while it answers: dotted paths of functions with type hints and a docstring, such as
    trl_bridge.data.search.search."""


@options
class StreamArguments(RewardArguments):
    """
    Arguments of methods with a demonstration stream beside the rollouts.

    Without `sft_dataset_name` and `sft_datasets` the demonstrations are the RL rows themselves, which then need a
    `completion` column (or the one that `expert_column` names).
    """

    expert_column: str | None = None
    """Column that holds the demonstrations' completions. None means 'completion'."""
    sft_dataset_name: str | None = None
    """Demonstrations; the same kinds of names as dataset_name. Without it the RL rows themselves, by their 'completion'
    column."""
    sft_dataset_config: str | None = None
    """Configuration name of the demonstrations, or a generated task's parameters."""
    sft_dataset_split: str = "train"
    """Split of the demonstrations."""
    sft_datasets: list[dict[str, Any]] = field(default_factory=list)
    """Mixture of demonstration datasets, each with the keys of 'datasets'. Only in a YAML file."""


@options
class GroupArguments(RewardArguments):
    """Arguments of methods that read a demonstration for each prompt from the RL rows."""

    expert_column: str | None = None
    """Column that holds the demonstration of each prompt. None means 'expert', or 'completion' where there is no
    'expert'."""


@options
class CoordinatorModelConfig(ModelConfig):
    """
    TRL's model arguments, where the `lora_*` keys describe the coordinator of BRIDGE, with its defaults. `use_peft` is
    neither needed nor read.
    """

    use_peft: bool = False
    """Not read: the lora_* keys always describe the coordinator."""
    lora_alpha: int = 16
    """LoRA alpha of the coordinator."""
    lora_dropout: float = 0.0
    """Must stay 0: the coordinator is merged into the weights."""
    lora_target_modules: list[str] | None = field(default_factory=lambda: ["all-linear"])
    """Modules that the coordinator acts on."""


FAMILY_ARGUMENTS: dict[str, tuple[type[DatasetArguments], type[ModelConfig]]] = {
    "bridge": (StreamArguments, CoordinatorModelConfig),
    "stream": (StreamArguments, ModelConfig),
    "group": (GroupArguments, ModelConfig),
    "rl": (RewardArguments, ModelConfig),
    "scored": (ScoredArguments, ModelConfig),
    "distillation": (DatasetArguments, ModelConfig),
    "sft": (SupervisedArguments, ModelConfig),
}
"""Script and model arguments of each family in `trl_bridge.methods.catalogue.FAMILIES`."""

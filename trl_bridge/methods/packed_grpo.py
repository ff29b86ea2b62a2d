"""[`PackedGRPOTrainer`]: TRL's GRPO, computed without padding."""

from collections.abc import Callable
from typing import Any

import torch
from datasets import Dataset, DatasetDict, IterableDataset
from transformers import PreTrainedModel, PreTrainedTokenizerBase, ProcessorMixin, TrainerCallback

from ..training.options import options
from ..training.refusals import check_config
from ..training.student import StudentTrainer
from ..training.student_config import StudentConfig


@options
class PackedGRPOConfig(StudentConfig):
    """Configuration of [`PackedGRPOTrainer`]: everything of [`~trl.GRPOConfig`], and how its passes are packed."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_config(self)


class PackedGRPOTrainer(StudentTrainer):
    """
    TRL's GRPO for people without demonstrations, computed without padding, with a group's prompt once and without rollouts
    whose advantage is zero. Loss, metrics and options are TRL's (`docs/support.md` has those that are refused), gradients
    are equal up to rounding, and it resumes exactly. `padding_free=False` is [`~trl.GRPOTrainer`] to the bit.

    Args:
        model, reward_funcs, args, train_dataset, eval_dataset, processing_class, reward_processing_classes, callbacks,
        optimizers, quantization_config, peft_config, tools, rollout_func, environment_factory:
            As in [`~trl.GRPOTrainer`]; `args` is a [`PackedGRPOConfig`].

    Raises:
        ValueError, TypeError, NotImplementedError: an argument cannot be used; the message names it and what to do.

    Example:

    ```python
    >>> from datasets import load_dataset
    >>> from trl.rewards import accuracy_reward
    >>> from trl_bridge import PackedGRPOConfig, PackedGRPOTrainer

    >>> trainer = PackedGRPOTrainer(
    ...     model="Qwen/Qwen2.5-0.5B-Instruct",
    ...     reward_funcs=accuracy_reward,
    ...     args=PackedGRPOConfig(output_dir="grpo"),
    ...     train_dataset=load_dataset("trl-lib/DeepMath-103K", split="train"),
    ... )
    >>> trainer.train()
    ```
    """

    config_class: type[StudentConfig] = PackedGRPOConfig
    trains_by_advantage = True
    sees_pictures = True
    shards = True
    shards_adapters = True
    balances_experts = True
    _tag_names = ["trl", "grpo"]
    _name = "GRPO"

    def __init__(
        self,
        model: "str | PreTrainedModel",
        reward_funcs: Any = None,
        args: StudentConfig | None = None,
        train_dataset: Dataset | IterableDataset | None = None,
        eval_dataset: Dataset | IterableDataset | DatasetDict | dict[str, Dataset | IterableDataset] | None = None,
        processing_class: PreTrainedTokenizerBase | ProcessorMixin | None = None,
        reward_processing_classes: PreTrainedTokenizerBase | list[PreTrainedTokenizerBase] | None = None,
        callbacks: list[TrainerCallback] | None = None,
        optimizers: tuple[torch.optim.Optimizer | None, torch.optim.lr_scheduler.LambdaLR | None] = (None, None),
        quantization_config: Any = None,
        peft_config: Any = None,
        tools: list[Callable] | None = None,
        rollout_func: Any = None,
        environment_factory: Any = None,
    ):
        super().__init__(
            model=model,
            reward_funcs=reward_funcs,
            args=self.config_or_default(args, model),
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=processing_class,
            reward_processing_classes=reward_processing_classes,
            callbacks=callbacks,
            optimizers=optimizers,
            quantization_config=quantization_config,
            peft_config=peft_config,
            tools=tools,
            rollout_func=rollout_func,
            environment_factory=environment_factory,
        )

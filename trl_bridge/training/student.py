"""What every trainer of ours adds to GRPO's plain student, whatever its objective."""

import contextlib
from collections.abc import Mapping
from typing import Any

import torch
from accelerate.utils import DistributedType, gather_object, is_peft_model
from torch import nn
from transformers import (
    PreTrainedModel,
    PreTrainedTokenizerBase,
    ProcessorMixin,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)
from transformers.trainer_utils import IntervalStrategy

from .._upstream import add_demonstration_head, isolated_bookkeeping, plain_copy, without_reference_model
from ..generation.vllm_training import check_served, fitted_vllm
from ..rewards.by_name import check_reward_funcs
from .backends.refusals import is_sharded, refuse_quantised, refuse_sharding
from .packed_trainer import PackedTrainer
from .policy import PolicyLoss
from .refusals import refuse_pictures
from .student_config import StudentConfig
from .verdicts import RolloutRewards


class _AfterStep(TrainerCallback):
    """Calls `after_step` when the student has stepped, before user callbacks and saving."""

    def __init__(self, trainer: "StudentTrainer"):
        self.trainer = trainer

    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.trainer.after_step()
        self.trainer.record_work()


class StudentTrainer(PackedTrainer):
    """
    GRPO whose student can also be scored on demonstrations: the base of all our trainers.

    It gives the student a head at temperature 1 (see [`_upstream.add_demonstration_head`]), a KL reference of its own
    for a model made in memory, TRL's loss as a function (`policy`), and the rewards of the rollouts (`rollouts`).
    """

    config_class: type[StudentConfig] = StudentConfig
    # Whether the update is tested where the weights are sharded (FSDP2, DeepSpeed).
    shards = False
    # The same of a LoRA student.
    shards_adapters = False

    def __init__(
        self,
        model: "str | PreTrainedModel",
        *,
        args: Any,
        processing_class: PreTrainedTokenizerBase | ProcessorMixin | None,
        peft_config: Any,
        tools: Any,
        environment_factory: Any,
        **kwargs: Any,
    ):
        owner = type(self).__name__
        if tools or environment_factory:
            raise NotImplementedError(
                f"`tools` and `environment_factory` are not supported by {owner}: demonstrations are rendered without "
                "tool schemas."
            )
        check_reward_funcs(kwargs.get("reward_funcs"))
        datasets = {name: kwargs.get(name) for name in ("train_dataset", "eval_dataset")}
        refuse_pictures(owner, processing_class, model, **datasets)
        own_reference = args.beta != 0.0 and isinstance(model, PreTrainedModel) and peft_config is None
        with fitted_vllm(args), without_reference_model(args) if own_reference else contextlib.nullcontext():
            super().__init__(model, args=args, processing_class=processing_class, peft_config=peft_config, **kwargs)
        refuse_pictures(owner, self.processing_class, self.model)
        if self.aux_loss_enabled:
            raise NotImplementedError(
                "The load-balancing loss of Mixture-of-Experts models is not supported. Set `router_aux_loss_coef=0`."
            )
        self.backend.check(args)
        check_served(args, self._plain_model)
        kind = self.accelerator.distributed_type
        if not self.shards:
            refuse_sharding(kind, owner)
        plain: Any = self._plain_model
        if is_sharded(kind) and is_peft_model(plain):
            self._check_sharded_adapter(plain, kind)
        head_owner = plain.get_base_model() if is_peft_model(plain) else plain
        add_demonstration_head(head_owner, args.cast_lm_head_to_fp32)
        if own_reference:
            self.beta = args.beta
            self.ref_model: Any = self._frozen_copy()
        self.policy = PolicyLoss(self)
        self.rollouts = RolloutRewards()
        self._set_up_packing()
        # First in the list, so that user callbacks and saving see the parts as `after_step` leaves them.
        self.callback_handler.callbacks.insert(0, _AfterStep(self))

    @classmethod
    def config_or_default(cls, args: Any, model: "str | PreTrainedModel") -> Any:
        """The arguments that a constructor was given, or the trainer's default ones."""
        if args is None:
            name = model if isinstance(model, str) else model.config._name_or_path
            return cls.config_class(f"{name.split('/')[-1] or 'model'}-{cls._name}")
        if not isinstance(args, cls.config_class):
            raise TypeError(
                f"`args` of {cls.__name__} must be a `{cls.config_class.__name__}`, got `{type(args).__name__}`."
            )
        return args

    def after_step(self) -> None:
        """After the student's optimizer step, before user callbacks and saving. Nothing here."""

    def _check_sharded_adapter(self, model: Any, kind: DistributedType) -> None:
        if not self.shards_adapters:
            raise NotImplementedError(
                f"A LoRA student of {type(self).__name__} has not been tested with {kind.value}. Launch it on one device "
                "or with DDP (torchrun), or train the model in full (without `peft_config`, or `lean`)."
            )
        refuse_quantised(kind, model.get_base_model())

    @property
    def _plain_model(self) -> PreTrainedModel:
        return self.accelerator.unwrap_model(self.model)

    def _frozen_copy(self) -> nn.Module:
        copy = plain_copy(self._plain_model, self.temperature, self.args.cast_lm_head_to_fp32, entropy=False)
        # TRL's own reference comes fresh from `from_pretrained`, without dropout.
        copy.requires_grad_(False).eval()
        return self.backend.prepare_reference(copy)

    def _sum_over_ranks(self, value: float) -> float:
        tensor = torch.tensor(value, dtype=torch.float64, device=self.accelerator.device)
        return self.accelerator.reduce(tensor, reduction="sum").item()

    # The update and the generation batch under way

    @property
    def is_logged_update(self) -> bool:
        """Whether the update will be logged at its end, so that metrics which cost extra are worth computing."""
        update = self.state.global_step + 1
        if self.args.logging_strategy == IntervalStrategy.EPOCH:
            return True
        if self.args.logging_strategy != IntervalStrategy.STEPS:
            return False
        return update % self.state.logging_steps == 0 or (update == 1 and self.args.logging_first_step)

    def record(self, values: Mapping[str, float]) -> None:
        """Append one value of each metric to TRL's training metrics; TRL averages them over a logging interval."""
        for name, value in values.items():
            self._metrics["train"][name].append(value)

    def rate_factor(self) -> float:
        """Where the student's learning rate stands in its schedule, for the rates that follow it."""
        for group in self.optimizer.param_groups:
            if group.get("initial_lr", 0) > 0:
                return group["lr"] / group["initial_lr"]
        raise ValueError(
            "`optimizers`: the rates of what is trained beside the student follow the student's schedule, but no "
            "parameter group has an `initial_lr` above 0. Pass a scheduler that sets it (those of "
            "torch.optim.lr_scheduler but ReduceLROnPlateau), or none."
        )

    @property
    def generation(self) -> int:
        """Number of the generation batch."""
        return self._step // self.generation_cycle

    def places(self, rows: int) -> list[tuple[int, int]]:
        """Group and place in it of this rank's rows of a generation batch."""
        # Groups are contiguous over the ranks' rows, and may straddle two ranks.
        first = self.accelerator.process_index * rows
        return [divmod(first + row, self.num_generations) for row in range(rows)]

    def ask_rewards(self, examples: list[dict[str, Any]], filler: dict[str, Any]) -> list[float]:
        """
        Total rewards of completions that are no rollouts. Collective: every rank calls.

        The rollouts' rewards, metrics and logs are left as they are.
        """
        # TRL gathers the rewards, which needs the same number of rows on each rank.
        size = max(gather_object([len(examples)]))
        if size == 0:  # the same on every rank
            return []
        padded = examples + [filler] * (size - len(examples))
        names = ("inputs", "prompt", "completion", "completion_ids")
        with isolated_bookkeeping(self), self.rollouts.set_aside():
            self._calculate_rewards(*([example[name] for example in padded] for name in names))
            rewards = self.rollouts.total_rewards()
        first = self.accelerator.process_index * size
        return rewards[first : first + len(examples)].tolist()

    # TRL's trainer

    def _calculate_rewards(
        self, inputs: Any, prompts: Any, completions: Any, completion_ids_list: Any
    ) -> torch.Tensor:
        rewards_per_func = super()._calculate_rewards(inputs, prompts, completions, completion_ids_list)
        self.rollouts.keep(rewards_per_func, self.reward_weights)
        return rewards_per_func

    def hyperparameter_search(self, *args: Any, **kwargs: Any) -> Any:
        raise NotImplementedError(
            f"`hyperparameter_search` is not supported by {type(self).__name__}: the parts beside the model are built "
            "once. Start one trainer for each trial."
        )

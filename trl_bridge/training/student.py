"""What every trainer of ours adds to GRPO's plain student, whatever its objective."""

import contextlib
from typing import Any

import torch
from accelerate.utils import DistributedType, is_peft_model
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
from trl import GRPOConfig

from .._upstream import add_demonstration_head, plain_copy, without_reference_model
from .backends.refusals import is_spread, refuse_quantised, refuse_spread
from .checkpoint.resume import ResumableTrainer
from .policy import RolloutRecord


class _AfterStep(TrainerCallback):
    """Calls `after_step` when the student has stepped, before user callbacks and saving."""

    def __init__(self, trainer: "StudentTrainer"):
        self.trainer = trainer

    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.trainer.after_step()


class StudentTrainer(ResumableTrainer):
    """
    GRPO whose student can also be scored on demonstrations: the base of all our trainers.

    It gives the student a head at temperature 1 (see [`_upstream.add_demonstration_head`]), a KL reference of its own
    for a model made in memory, and keeps scores and rewards that pass through the parent's methods.
    """

    config_class: type[GRPOConfig] = GRPOConfig
    # Whether the update is tested where the weights are spread over the ranks (FSDP2, DeepSpeed).
    shards = False
    # The same of a LoRA student.
    spreads_adapters = False

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
        if isinstance(processing_class, ProcessorMixin):
            raise NotImplementedError(f"{owner} does not support vision-language models: pass a tokenizer.")
        own_reference = args.beta != 0.0 and isinstance(model, PreTrainedModel) and peft_config is None
        with without_reference_model(args) if own_reference else contextlib.nullcontext():
            super().__init__(model, args=args, processing_class=processing_class, peft_config=peft_config, **kwargs)
        if isinstance(self.processing_class, ProcessorMixin):
            raise NotImplementedError(f"{owner} does not support vision-language models: pass a text-only `model`.")
        if self.aux_loss_enabled:
            raise NotImplementedError(
                "The load-balancing loss of Mixture-of-Experts models is not supported. Set `router_aux_loss_coef=0`."
            )
        self.backend.check(args)
        kind = self.accelerator.distributed_type
        if not self.shards:
            refuse_spread(kind, owner)
        plain: Any = self._plain_model
        if is_spread(kind) and is_peft_model(plain):
            self._check_spread_adapter(plain, kind)
        head_owner = plain.get_base_model() if is_peft_model(plain) else plain
        add_demonstration_head(head_owner, args.cast_lm_head_to_fp32)
        if own_reference:
            self.beta = args.beta
            self.ref_model: Any = self._frozen_copy()
        self.rollouts: Any = RolloutRecord(self)
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

    def _check_spread_adapter(self, model: Any, kind: DistributedType) -> None:
        if not self.spreads_adapters:
            raise NotImplementedError(
                f"A LoRA student of {type(self).__name__} has not been tested with {kind.value}. Launch it on one device "
                "or with DDP (torchrun), or train the model in full (without `peft_config`, or `lean`)."
            )
        refuse_quantised(kind, model.get_base_model())

    @property
    def _plain_model(self) -> PreTrainedModel:
        return self.accelerator.unwrap_model(self.model)

    def _frozen_copy(self) -> nn.Module:
        twin = plain_copy(self._plain_model, self.temperature, self.args.cast_lm_head_to_fp32, entropy=False)
        # TRL's own reference comes fresh from `from_pretrained`, without dropout.
        twin.requires_grad_(False).eval()
        return self.backend.prepare_reference(twin)

    def _sum_over_ranks(self, value: float) -> float:
        tensor = torch.tensor(value, dtype=torch.float64, device=self.accelerator.device)
        return self.accelerator.reduce(tensor, reduction="sum").item()

    # The parent's methods

    def _calculate_rewards(
        self, inputs: Any, prompts: Any, completions: Any, completion_ids_list: Any
    ) -> torch.Tensor:
        rewards_per_func = super()._calculate_rewards(inputs, prompts, completions, completion_ids_list)
        self.rollouts.keep(rewards_per_func)
        return rewards_per_func

    def _get_per_token_logps_and_entropies(self, *args: Any, **kwargs: Any) -> Any:
        if self.rollouts.replayed is not None:
            return self.rollouts.replayed
        scores = super()._get_per_token_logps_and_entropies(*args, **kwargs)
        self.rollouts.scores = scores
        return scores

    def hyperparameter_search(self, *args: Any, **kwargs: Any) -> Any:
        raise NotImplementedError(
            f"`hyperparameter_search` is not supported by {type(self).__name__}: the parts beside the model are built "
            "once. Start one trainer for each trial."
        )

"""What every trainer of ours adds to GRPO's plain student, whatever its objective."""

import contextlib
import functools
from collections import defaultdict
from collections.abc import Callable, Mapping
from typing import Any

import torch
from accelerate.utils import DistributedType, gather_object, is_peft_model
from datasets import IterableDataset
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
from trl import GRPOTrainer

from .._upstream import (
    add_demonstration_head,
    add_fused_lm_head,
    isolated_bookkeeping,
    isolated_generation,
    plain_copy,
    scored_by,
    without_reference_model,
)
from ..distillation.scoring import Scorer, ServedTeacher, StoredScores
from ..distillation.teacher import check_tokenizers
from ..generation.vllm_training import check_served, fitted_vllm
from ..models import check_found, check_name, is_builtin, load
from ..objectives.distill import sampled_kl
from ..objectives.expert import reduce_tokens
from ..rewards.by_name import check_reward_funcs
from .backends.refusals import is_sharded, refuse_quantised, refuse_sharding, refuse_turns
from .card import Carded
from .checkpoint.layout import has_rows
from .checkpoint.registry import SHARED, Registry
from .dynamic_sampling import FreshPrompts, alike, exchanged, moved_by_advantage
from .packed_trainer import PackedTrainer
from .packing import reason_for_padding
from .pictures import one_entry_for_each_row
from .policy import PolicyLoss, Scores, completions_of
from .refusals import check_ranks_seeing, check_seeing, refuse_blind_options, refuse_pictures
from .student_config import StudentConfig
from .teacher import SCORES, WEIGHT, Teachers, log_ratio
from .teacher_config import named, place_of
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


class StudentTrainer(Carded, PackedTrainer):
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
    # Whether the load-balancing loss of a mixture of experts is in every pass that trains.
    balances_experts = False
    # Why tools are refused, environments or both; `None` where they are not.
    refuses_tools: str | None = None
    refuses_environments: str | None = None
    # Whether the update is tested with pictures.
    sees_pictures = False

    def __init__(
        self,
        model: "str | PreTrainedModel",
        *,
        args: Any,
        processing_class: PreTrainedTokenizerBase | ProcessorMixin | None,
        peft_config: Any,
        tools: Any,
        environment_factory: Any,
        sft_dataset: Any = None,
        **kwargs: Any,
    ):
        owner = type(self).__name__
        reasons = {"tools": self.refuses_tools, "environment_factory": self.refuses_tools or self.refuses_environments}
        for name, asked in (("tools", tools), ("environment_factory", environment_factory)):
            if asked and reasons[name]:
                raise NotImplementedError(f"`{name}` is not supported by {owner}: {reasons[name]}.")
        check_reward_funcs(kwargs.get("reward_funcs"))
        if args.dynamic_sampling and isinstance(kwargs.get("train_dataset"), IterableDataset):
            raise NotImplementedError(
                "`dynamic_sampling` draws fresh prompts from `train_dataset` by their number, which an iterable one has not. "
                "Take a `Dataset`, or set it to False."
            )
        datasets = {name: kwargs.get(name) for name in ("train_dataset", "eval_dataset")}
        datasets["sft_dataset"] = sft_dataset
        check_sight: Any = check_seeing if self.sees_pictures else refuse_pictures
        check_sight(owner, processing_class, model, **datasets)
        own_reference = args.beta != 0.0 and isinstance(model, PreTrainedModel) and peft_config is None
        kwargs |= {"tools": tools, "environment_factory": environment_factory}
        with fitted_vllm(args), without_reference_model(args) if own_reference else contextlib.nullcontext():
            super().__init__(model, args=args, processing_class=processing_class, peft_config=peft_config, **kwargs)
        check_sight(owner, self.processing_class, self.model, **({} if processing_class else datasets))
        if self._is_vlm:
            refuse_blind_options(args)
            check_ranks_seeing(
                self.accelerator, owner, train_dataset=datasets["train_dataset"], sft_dataset=sft_dataset
            )
        if args.freeze_vision_tower:
            self._freeze_vision_tower()
        if self.aux_loss_enabled and not self.balances_experts:
            raise NotImplementedError(
                f"The load-balancing loss of Mixture-of-Experts models is not supported by {owner}. Set `router_aux_loss_coef=0`."
            )
        config = self._plain_model.config.get_text_config()
        if self.aux_loss_enabled and not (hasattr(config, "num_experts") and hasattr(config, "num_experts_per_tok")):
            raise NotImplementedError(
                f"`router_aux_loss_coef` is not supported with `{type(config).__name__}`: TRL reads `num_experts` and "
                "`num_experts_per_tok` of it, which it has not. Set it to 0."
            )
        self.backend.check(args)
        check_served(args, self._plain_model)
        kind = self.accelerator.distributed_type
        if not self.shards:
            refuse_sharding(kind, owner)
        if self.tools:
            refuse_turns(kind, owner)
        plain: Any = self._plain_model
        if is_sharded(kind) and is_peft_model(plain):
            self._check_sharded_adapter(plain, kind)
        head_owner = plain.get_base_model() if is_peft_model(plain) else plain
        add_demonstration_head(head_owner, args.cast_lm_head_to_fp32)
        if own_reference:
            self.beta = args.beta
            self.ref_model: Any = self._frozen_copy()
        # The SFT pass alone has noise (`under_noise`); transformers' own would be in every pass.
        self.neftune_noise_alpha = None
        self.policy = PolicyLoss(self)
        self.rollouts = RolloutRewards()
        self._set_up_packing()
        self.teachers = self._build_teachers()
        dataset: Any = self.train_dataset
        self.fresh_prompts = FreshPrompts(len(dataset), args.seed) if args.dynamic_sampling else None
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

    def _freeze_vision_tower(self) -> None:
        if not self._is_vlm:
            raise ValueError("`freeze_vision_tower` has no effect: `model` has no vision tower. Set it to False.")
        self._plain_model.get_encoder(modality="image").requires_grad_(False)

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

    # A teacher beside the reward

    def _build_teachers(self) -> Teachers | None:
        """The teachers of the run; `None` where their weight is zero throughout."""
        args = self.args
        if args.teachers is None or not (args.teacher_weight or args.teacher_weight_end):
            return None
        kinds: dict[str, dict[str, Any]] = {"model": {}, "server": {}, "scores": {}}
        for name, where in named(args.teachers).items():
            kinds[place_of(where)][name] = where
        models = {name: self._local_teacher(where) for name, where in kinds["model"].items()}
        asked: dict[str, Scorer] = {
            name: ServedTeacher(where, temperature=self.temperature) for name, where in kinds["server"].items()
        }
        asked |= {name: StoredScores(where, self._tokenizer) for name, where in kinds["scores"].items()}
        teachers = Teachers(models, asked, args.teacher_column)
        teachers.check(self.train_dataset)
        return teachers

    def _local_teacher(self, where: str) -> Callable[[dict[str, Any]], torch.Tensor]:
        """A model, with its weights spread as those of TRL's KL reference are, as a function of rollouts. Collective."""
        args = self.args
        name = check_name(where, "teachers")
        options = {"dtype": args.teacher_dtype, "trust_remote_code": args.trust_remote_code}
        if not is_builtin(name):
            check_found(name, "teachers", None, args.trust_remote_code)
            check_tokenizers(self._tokenizer, name, None, args.trust_remote_code)
        teacher = load(name, args.seed + 1, **options)  # a tiny one has the seed after the student's
        add_fused_lm_head(teacher, temperature=self.temperature, cast_lm_head_to_fp32=False, outputs=("log_probs",))
        teacher.requires_grad_(False).eval()
        score: Any = PackedTrainer if reason_for_padding(teacher) is None else GRPOTrainer
        prepared = self.backend.prepare_reference(teacher, args.teacher_offload)
        return functools.partial(self._score_with, score._get_per_token_logps_and_entropies, prepared)

    def _score_with(self, score: Callable[..., Scores], model: nn.Module, batch: dict[str, Any]) -> torch.Tensor:
        with torch.no_grad(), self.backend.at_hand(model, self.args.teacher_offload):
            size = self.args.per_device_train_batch_size
            return score(self, model, *completions_of(batch), batch_size=size)[0]

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        output = self.sample_groups(inputs)
        if self.model.training and self.fresh_prompts is not None:
            output = self._replace_dead_groups(output, inputs, self.fresh_prompts)
        # Scored where one of the updates that the batch serves reads it.
        steps = self.args.gradient_accumulation_steps
        updates = -(-(self._step % steps + self.generation_cycle) // steps)
        if self.model.training and self.teachers is not None and any(map(self._teacher_weight, range(updates))):
            output[SCORES] = self.teachers.score(output, inputs)
        return output

    def _teacher_weight(self, ahead: int = 0) -> float:
        return self.args.teacher_weight_at(self.state.global_step + ahead, self.state.max_steps)

    def _prepare_inputs(self, generation_batch: Any) -> Any:
        inputs = super()._prepare_inputs(generation_batch)
        if SCORES not in inputs:
            return inputs
        # It goes with the micro-batch, which a pass may read after the update.
        weight = self._teacher_weight()
        return {**inputs, WEIGHT: weight} if weight else {n: v for n, v in inputs.items() if n != SCORES}

    def live_rollouts(self, inputs: dict[str, Any]) -> torch.Tensor | None:
        # A teacher says something of rollouts without an advantage too.
        return None if SCORES in inputs else super().live_rollouts(inputs)

    def _compute_loss(self, model: nn.Module, inputs: dict[str, Any]) -> torch.Tensor:
        if SCORES not in inputs:
            return super()._compute_loss(model, inputs)
        scores = self.policy.score(model, inputs)
        ratio, there = log_ratio(inputs, scores[0])
        self._record_teacher(ratio.detach(), there, inputs[WEIGHT])
        by_advantage, clip = self.args.teacher_form == "advantage", self.args.teacher_clip
        if by_advantage:
            gap = ratio.detach() if clip is None else ratio.detach().clamp(-clip, clip)
            advantages = inputs["advantages"]
            advantages = advantages.unsqueeze(1) if advantages.dim() == 1 else advantages
            inputs = {**inputs, "advantages": advantages - inputs[WEIGHT] * gap}
        with scored_by(self, lambda *args, **kwargs: scores):
            loss = super()._compute_loss(model, inputs)
        if by_advantage:
            return loss
        mask = inputs["completion_mask"] * inputs.get("tool_mask", 1)
        return loss + inputs[WEIGHT] * self.reduce(sampled_kl(ratio, self.args.teacher_kl), mask, inputs)

    def _record_teacher(self, ratio: torch.Tensor, there: torch.Tensor, weight: float) -> None:
        sums = torch.stack([ratio.sum().double(), there.sum().double()])
        total, count = self.accelerator.reduce(sums, reduction="sum").tolist()
        self.record({"teacher/weight": weight, **({"teacher/reverse_kl": total / count} if count else {})})

    # Dynamic sampling

    def sample_groups(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        """A generation batch as TRL samples and scores it. Collective."""
        output = one_entry_for_each_row(super()._generate_and_score_completions(inputs))
        if self.model.training and self.fresh_prompts is not None:
            # TRL's mean of equal rewards may round, and what is left would be scaled up.
            equal = alike(self.rollouts.total_rewards().view(-1, int(self.num_generations or 0))).tolist()
            output["advantages"][[equal[group] for group, _ in self.places(len(inputs))]] = 0.0
        return output

    def with_signal(self, output: dict[str, Any]) -> torch.Tensor:
        """Which rows of a generation batch keep their group from being replaced, (B,)."""
        return moved_by_advantage(output)

    def _dead_groups(self, output: dict[str, Any]) -> list[int]:
        """Groups over all ranks that have no row with a signal. Collective."""
        signal = self.accelerator.gather(self.with_signal(output).int()).view(-1, int(self.num_generations or 0))
        return (~signal.any(dim=1)).nonzero().flatten().tolist()

    def _replace_dead_groups(
        self, output: dict[str, Any], inputs: list[dict[str, Any]], prompts: FreshPrompts
    ) -> dict[str, Any]:
        """The batch with groups of fresh prompts in the place of those without a signal; `inputs` change with it. Collective."""
        rollouts = len(inputs) * self.accelerator.num_processes
        dead, generations = self._dead_groups(output), 1
        while dead and generations <= self.args.max_resample_times:
            generations += 1
            drawn = prompts.draw(rollouts // int(self.num_generations or 0))
            output, dead = self._fill_places(dead, output, inputs, drawn)
        prompts.rollouts += generations * rollouts
        self.record({"dynamic_sampling/generations": generations, "dynamic_sampling/dead_groups": len(dead)})
        # Counts of the run so far; TRL's of tokens has gone on.
        totals = {"dynamic_sampling/rollouts": prompts.rollouts, "num_tokens": self.state.num_input_tokens_seen}
        self._metrics["train"].update({name: [total] for name, total in totals.items()})
        return output

    def _fill_places(
        self, dead: list[int], output: dict[str, Any], inputs: list[dict[str, Any]], drawn: list[int]
    ) -> tuple[dict[str, Any], list[int]]:
        """One more generation, of the rows drawn: the batch, and the groups that are without a signal still. Collective."""
        size, places = int(self.num_generations or 0), self.places(len(inputs))
        rows = [self._example(drawn[group], inputs[0]) for group, _ in places]
        with isolated_generation(self), self.rollouts.set_aside():
            fresh = self.sample_groups(rows)
            rewards = self.rollouts.total_rewards()
        empty = self._dead_groups(fresh)
        moves = dict(zip(dead, (group for group in range(len(drawn)) if group not in empty), strict=False))
        if not moves:
            return output, dead
        taken = {row: moves[group] * size + member for row, (group, member) in enumerate(places) if group in moves}
        whole = {name: self._from_all_ranks(name, value) for name, value in fresh.items() if has_rows(value)}
        output = exchanged(output, whole, taken, self._tokenizer.pad_token_id)
        self.count_items(output)
        for row in taken:
            inputs[row] = self._example(drawn[moves[places[row][0]]], inputs[row])
        self.rollouts.replace(moves, rewards, size)
        return output, dead[len(moves) :]

    def _example(self, number: int, like: dict[str, Any]) -> dict[str, Any]:
        """A row of the RL dataset, with the columns that reach TRL's trainer."""
        dataset: Any = self.train_dataset
        return {name: value for name, value in dataset[number].items() if name in like}

    def count_items(self, output: dict[str, Any]) -> None:
        """Count the trained tokens of a generation batch over all ranks, in place. Collective."""
        trained = output["completion_mask"] * output.get("tool_mask", 1)
        output["num_items_in_batch"] = self.accelerator.gather(trained.sum()).sum()

    def window_share(self, items: torch.Tensor) -> torch.Tensor:
        """Items of one window on one rank, on average, from the count over the generation batch (as for DAPO)."""
        steps = self.current_gradient_accumulation_steps / self.args.steps_per_generation
        return items.clamp(min=1.0) / self.accelerator.num_processes * steps

    def reduce(self, per_token: torch.Tensor, mask: torch.Tensor, inputs: dict[str, Any]) -> torch.Tensor:
        """Sum of token losses, scaled as TRL's trainer scales its own and as it enters the window's sum."""
        return reduce_tokens(
            per_token,
            mask,
            self.loss_type,
            max_completion_length=int(self.max_completion_length or 0),
            accumulation_steps=self.current_gradient_accumulation_steps,
            num_items=self.window_share(inputs["num_items_in_batch"]),
        )

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

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        # TRL gives the rewards of each of several evaluation datasets the same name, whose last one is then shown.
        names = [name[5:-5] for name in logs if name.startswith("eval_") and name.endswith("_loss")]
        for name in filter(None, names):
            values = self._metrics["eval"]
            self._metrics["eval"] = defaultdict(list, {f"{name}_{metric}": value for metric, value in values.items()})
        super().log(logs, *args, **kwargs)

    def _generate(self, prompts: list[Any]) -> Any:
        *generated, images, tool_images = super()._generate(prompts)
        # A row without a picture beside others with one has `None`, which no processor takes.
        return *generated, images and [pictures or [] for pictures in images], tool_images

    def _calculate_rewards(
        self, inputs: Any, prompts: Any, completions: Any, completion_ids_list: Any
    ) -> torch.Tensor:
        rewards_per_func = super()._calculate_rewards(inputs, prompts, completions, completion_ids_list)
        self.rollouts.keep(rewards_per_func, self.reward_weights)
        return rewards_per_func

    def register_state(self, saved: Registry) -> None:
        super().register_state(saved)
        if self._is_vlm:
            # Buffered pixels are not cut anew.
            saved.must_match("per_device_train_batch_size", "gradient_accumulation_steps", "steps_per_generation")
            saved.must_match("freeze_vision_tower")
        if self.fresh_prompts is not None:
            saved.must_match("dynamic_sampling", "max_resample_times")
            saved.add("fresh_prompts", self.fresh_prompts, SHARED)
        if self.teachers is not None:
            saved.must_match("teachers", "teacher_column", "teacher_form", "teacher_kl", "teacher_clip")
            saved.must_match("teacher_weight", "teacher_weight_end", "teacher_weight_steps")

    def hyperparameter_search(self, *args: Any, **kwargs: Any) -> Any:
        raise NotImplementedError(
            f"`hyperparameter_search` is not supported by {type(self).__name__}: the parts beside the model are built "
            "once. Start one trainer for each trial."
        )

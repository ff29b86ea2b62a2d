"""A trial before RL: the policy learns from verified demonstrations alone, and what its rollouts are paid says if it keeps that."""

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import torch
from accelerate.utils import DistributedType, is_peft_model
from datasets import Dataset, IterableDataset
from torch import nn
from transformers import (
    PreTrainedModel,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)

from .._upstream import (
    add_demonstration_head,
    forget_synced_weights,
    isolated_generation,
    optimizer_for,
    plain_copy,
)
from ..demonstrations.stream import DemonstrationStream, window_share
from ..objectives.sft import demonstration_loss
from .backends import Storage, Weights
from .checkpoint.registry import SHARED, Registry, attribute
from .demonstrations import Demonstrations
from .policy import completions_of
from .randomness import forked_python_rng, forked_torch_rng, seed_anew
from .side_model import SideModel
from .student import StudentTrainer
from .verdicts import AskRewards, collect_verdicts, missing_columns
from .weighting import DemonstrationWeighting


# Calls of the reward functions on every demonstration, and at most on one that is in doubt.
_CALLS, _MOST_CALLS = 3, 11
# Probability of being right above which a demonstration takes part; up to one minus it, it is visited again.
_DOUBTFUL = 0.05
# Added to the run's seed, which is below it: the stream of RL's updates has another order.
_APART = 2**33


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What a trial has measured, and how many of its updates are kept: none, or those up to the best measurement."""

    before: float
    best: float
    kept: int
    measurements: int


def try_out(
    weights: Callable[[], Mapping[str, torch.Tensor]],
    learn: Callable[[], None],
    paid: Callable[[], float],
    *,
    steps: int,
    every: int,
    tolerance: float,
) -> Outcome:
    """
    Let `learn` move weights in place, and leave the best that `paid` has measured; or, to the bit, what they were, where none
    is paid as well but for the tolerance.
    """
    found = best_weights = _copied(weights())
    try:
        before = best = paid()
        bar, kept, measurements = before - tolerance, 0, 1
        for step in range(1, steps + 1):
            learn()
            if step % every == 0 or step == steps:
                reward, measurements = paid(), measurements + 1
                if reward >= bar:
                    best = bar = reward
                    kept, best_weights = step, _copied(weights())
        found = best_weights
    finally:
        with torch.no_grad():
            for name, weight in weights().items():
                weight.copy_(found[name])
    return Outcome(before, best, kept, measurements)


def _copied(weights: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: weight.detach().to("cpu", copy=True) for name, weight in weights.items()}


def verify(
    ask: AskRewards,
    demonstrations: Demonstrations,
    candidates: list[int],
    *,
    rank: int,
    world_size: int,
    at_once: int,
    success_threshold: float,
) -> tuple[dict[int, float], int]:
    """
    Probability of being right of each demonstration that the reward functions can judge, and the number of their calls.
    Those in doubt are visited again. Collective.
    """
    weighting = DemonstrationWeighting("verdict")
    rows = demonstrations.rows(candidates)
    doubtful, calls, chances = candidates, [0], {}
    for visit in range(1, _MOST_CALLS + 1):
        # Each opinion in a call of its own: a verifier may say the same of all copies in one.
        for start in range(0, len(doubtful), at_once * world_size):
            part = doubtful[start : start + at_once * world_size][rank::world_size]
            collect_verdicts(
                ask, weighting, demonstrations, part, rank=rank, success_threshold=success_threshold, once=True
            )
        if visit < _CALLS:
            continue
        weighting.begin_window()
        calls, right = weighting.verdicts(rows)
        chances = {i: p for i, p, n in zip(candidates, right.tolist(), calls, strict=True) if n}
        doubtful = [i for i, chance in chances.items() if _DOUBTFUL < chance < 1 - _DOUBTFUL]
    return chances, sum(calls)


class _BeforeRL(TrainerCallback):
    """The trial, where a run starts, before user callbacks; a resumed run has had it."""

    def __init__(self, trainer: "TrialTrainer"):
        self.trainer = trainer
        self._values: dict[str, float] = {}

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if state.global_step == 0:
            self.trainer.check_updates_left(state.max_steps)
            self._values = self.trainer.try_demonstrations()
        # Each call of `train` sets it anew from the options.
        state.max_steps -= self.trainer.taken_updates

    def on_epoch_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        # Not before: trackers that are logged to set themselves up when training begins.
        if self._values:
            # TRL's own would print a table of no completions.
            Trainer.log(self.trainer, {f"trial/{name}": value for name, value in self._values.items()})
            self._values = {}


class TrialTrainer(StudentTrainer):
    """GRPO whose policy may try out its demonstrations before RL begins: the layer under the template of streams."""

    demonstrations: Demonstrations
    # Off the end of the run, for what the trial has sampled.
    taken_updates = 0
    # Under DeepSpeed, whose engine steps by itself, a sharded copy learns in the student's place: before it is filled, and after.
    _meta_fork: PreTrainedModel | None = None
    _fork: SideModel | None = None

    def updates_worth(self, rollouts: int) -> int:
        """RL updates that take at least so many rollouts."""
        args = self.args
        batches = -(-rollouts // args.generation_batch_size)
        return -(-batches * args.num_iterations * args.steps_per_generation // args.gradient_accumulation_steps)

    def set_up_trial(self, sft_dataset: Dataset) -> None:
        """Refuse what cannot be tried out, and see to it that the trial comes first."""
        owner, kind = type(self).__name__, self.accelerator.distributed_type
        if kind == DistributedType.DEEPSPEED and is_peft_model(self._plain_model):
            raise NotImplementedError(
                f"`trial_steps` of {owner} is not supported with DeepSpeed for a LoRA student: there a copy of the whole model learns. "
                "Launch it on one device, with DDP (torchrun) or with FSDP2, train in full, or set it to None."
            )
        dataset: Any = self.train_dataset
        if isinstance(dataset, IterableDataset):
            raise NotImplementedError(
                "`trial_steps` draws prompts from `train_dataset` by their number, which an iterable one has not. Take a "
                "`Dataset`, or set it to None."
            )
        if self.environment_factories is not None:
            raise ValueError(
                "`trial_steps` asks the reward functions about demonstrations, which no environment has seen. Set it to None; in place "
                "of `preset='trial'` take 'selective'."
            )
        missing = missing_columns(self.reward_funcs, dataset.column_names, sft_dataset)
        if missing:
            raise ValueError(
                "`trial_steps` asks the reward functions about demonstrations, but `sft_dataset` lacks the columns that they "
                f"need: {', '.join(map(repr, missing))}. Add them, or set it to None: without a verdict a trial keeps wrong "
                "demonstrations too."
            )
        self.callback_handler.callbacks.insert(0, _BeforeRL(self))

    def check_updates_left(self, max_steps: int) -> None:
        """Refuse a trial that would take all updates."""
        args = self.args
        measurements = 1 - (-args.trial_steps // args.trial_eval_steps)
        taken = self.updates_worth(measurements * self._trial_batches * args.generation_batch_size)
        if args.trial_takes_updates and taken >= max_steps:
            raise ValueError(
                f"`trial_takes_updates`: the {measurements} measurements of the trial take as many rollouts as {taken} updates, and the "
                f"run has {max_steps}. Lower `trial_prompts`, raise `trial_eval_steps`, or set it to False."
            )

    @property
    def _trial_batches(self) -> int:
        """Generation batches of a measurement."""
        return -(-self.args.trial_prompts // self.prompts_per_generation)

    def before_trial_step(self) -> None:
        """When a trial's gradient is whole, before clipping. Nothing here."""

    def after_trial(self) -> None:
        """When the policy has kept what it has learnt in a trial. Nothing here."""

    def try_demonstrations(self) -> dict[str, float]:
        """
        The trial, and what it has measured and cost. Random numbers, optimizer and metrics of RL go on as if there had been
        none. Collective.
        """
        self.model.train()
        with forked_torch_rng(self.accelerator.device), forked_python_rng():
            values = self._tried()
        self._fork = self._meta_fork = None
        forget_synced_weights(self)
        if self.args.trial_takes_updates:
            self.taken_updates = self.updates_worth(int(values["rollouts"]))
        # RL compares its own first rollouts, as it would without a trial.
        self._packing_is_checked = not self._packs
        return values

    def _tried(self) -> dict[str, float]:
        args, backend = self.args, self.backend
        count = args.demonstration_batch_size * args.gradient_accumulation_steps * backend.world_size
        size, seed = len(self.demonstrations.rendered), args.seed + _APART
        rows_at_once = args.generation_batch_size // backend.world_size
        chances, calls = verify(
            self.ask_rewards,
            self.demonstrations,
            DemonstrationStream(size, seed).draw(min(size, args.trial_steps * count)),
            rank=backend.rank,
            world_size=backend.world_size,
            at_once=rows_at_once,
            success_threshold=args.success_threshold,
        )
        if not chances:
            raise ValueError(
                "`trial_steps`: no reward function can score any demonstration of `sft_dataset`, so that nothing tells right "
                "ones from wrong ones. Give them what the rewards read, or set it to None."
            )
        kept = [index for index, chance in chances.items() if chance > _DOUBTFUL]
        values: dict[str, float] = {
            "demonstrations": len(kept),
            "verdicts": calls,
            "kept_steps": 0,
            "sft_steps": 0,
            "rollouts": 0,
        }
        if not kept:
            return values
        # Looked up now: forwards hide the weights that FSDP holds behind gathered ones, and may move its shards.
        weights = backend.weights(self._plain_model)
        trained = {name: weight for name, weight in weights.parameters.items() if weight.requires_grad}
        if self._meta_fork is not None:
            self._fork = self._filled_fork(self._meta_fork, weights)
        fork = self._fork
        stream, learn = DemonstrationStream(len(kept), seed), self._learner(chances, list(trained.values()))
        batches = self._trial_prompts()

        def shards() -> dict[str, torch.Tensor]:
            if fork is not None:
                return fork.weights
            backend.drop_gathered(self.model_wrapped)
            return {name: piece for name, piece in weights.shards().items() if name in trained}

        def hand_over() -> None:
            if fork is not None:
                for name in trained:
                    weights.write_(name, (slice(None),) * len(weights.shape(name)), fork.held.full(name))

        def paid() -> float:
            hand_over()
            return self._paid(batches)

        outcome = try_out(
            shards,
            lambda: learn([kept[number] for number in stream.draw(count)]),
            paid,
            steps=args.trial_steps,
            every=args.trial_eval_steps,
            tolerance=args.trial_tolerance,
        )
        hand_over()
        if outcome.kept:
            self.after_trial()
        rollouts = outcome.measurements * len(batches) * args.generation_batch_size
        costs = {"kept_steps": outcome.kept, "sft_steps": args.trial_steps, "rollouts": rollouts}
        return {**values, **costs, "reward_before": outcome.before, "reward": outcome.best}

    def _trial_optimizer(self, parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
        args = self.args
        rate = args.learning_rate * args.trial_learning_rate_factor
        return optimizer_for(self, [{"params": parameters, "weight_decay": 0.0}], rate, args.optim)

    def _filled_fork(self, blank: PreTrainedModel, student: Weights) -> SideModel:
        """A copy of the student that learns in its place. Collective."""

        def optimizer(leaves: Mapping[str, nn.Parameter]) -> torch.optim.Optimizer:
            return self._trial_optimizer(list(leaves.values()))

        held = self.backend.materialize(blank, student, Storage())
        return SideModel(blank.train(), held, optimizer, self.args.max_grad_norm)

    def _learner(self, chances: Mapping[int, float], parameters: list[nn.Parameter]) -> Callable[[list[int]], None]:
        """An SFT update on demonstrations (of all ranks), by an optimizer of its own. Collective."""
        args, backend, fork = self.args, self.backend, self._fork
        if fork is None:
            optimizer = self._trial_optimizer(parameters)

        def pass_of(is_last: bool) -> contextlib.AbstractContextManager[None]:
            if fork is not None:
                return backend.alongside()
            return contextlib.nullcontext() if is_last else backend.earlier_pass(self.model_wrapped)

        def step() -> None:
            if fork is not None:
                fork.step(1.0)
                return
            self.before_trial_step()
            if args.max_grad_norm > 0:
                nn.utils.clip_grad_norm_(parameters, args.max_grad_norm)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

        def learn(drawn: list[int]) -> None:
            tokens = sum(self.demonstrations.num_tokens(index) for index in drawn)
            micro_batches = args.gradient_accumulation_steps
            shares = window_share(
                self.demonstrations.by_length(drawn), micro_batches, backend.world_size, backend.rank
            )
            model = self.model_wrapped if fork is None else fork.model
            if fork is None:
                backend.before_micro_batch(model)
            for share, is_last in zip(shares, [False] * (micro_batches - 1) + [True], strict=True):
                with pass_of(is_last):
                    score = functools.partial(self.score_rows, model, self.demonstrations.batch(share))
                    log_probs, mask, *_ = self.under_noise(model, functools.partial(score, demonstration_head=True))
                    weights = torch.tensor([[chances[index]] for index in share], device=log_probs.device)
                    loss, _ = demonstration_loss(log_probs, mask, weights, tokens, backend.world_size)
                    backend.backward_alongside(loss)
            step()

        return learn

    def _trial_prompts(self) -> list[list[dict[str, Any]]]:
        """This rank's rows of the generation batches of a measurement, which has whole ones."""
        dataset: Any = self.train_dataset
        if self.args.remove_unused_columns:
            dataset = dataset.select_columns("prompt")
        groups, batches = self.prompts_per_generation, self._trial_batches
        drawn = DemonstrationStream(len(dataset), self.args.seed + _APART).draw(batches * groups)
        places = self.places(self.args.generation_batch_size // self.backend.world_size)
        return [[dataset[drawn[batch * groups + group]] for group, _ in places] for batch in range(batches)]

    def _paid(self, batches: list[list[dict[str, Any]]]) -> float:
        """Mean reward of the policy's rollouts, from the same random numbers each time. Collective."""
        forget_synced_weights(self)
        seed_anew(self.args.seed, _APART, self.backend.rank)
        rewards = []
        for rows in batches:
            with isolated_generation(self), self.rollouts.set_aside():
                output = self.sample_groups([dict(row) for row in rows])
                if self._packs and not self._packing_is_checked:
                    self._check_packing(completions_of(output))
                rewards.append(self.rollouts.total_rewards())
        mean = torch.cat(rewards).nanmean().item()
        if mean != mean:
            raise ValueError(
                "`trial_steps`: no reward function has scored any of the rollouts that the trial is judged by."
            )
        return mean

    def _prepare_for_training(self, max_steps: int, train_dataloader: Any, resume_from_checkpoint: Any) -> Any:
        if self.args.trial_steps and self.backend.steps_in_backward and not resume_from_checkpoint:
            # From the plain model, before the engine takes hold of it.
            self._meta_fork = self.backend.meta_copy(self._plain_model, self._copy_for_trial)
        return super()._prepare_for_training(max_steps, train_dataloader, resume_from_checkpoint)

    def _copy_for_trial(self, model: PreTrainedModel, memo: dict[int, Any] | None = None) -> PreTrainedModel:
        copy = plain_copy(model, self.temperature, self.args.cast_lm_head_to_fp32, entropy=False, memo=memo)
        add_demonstration_head(copy, self.args.cast_lm_head_to_fp32)
        return copy

    def register_state(self, saved: Registry) -> None:
        super().register_state(saved)
        saved.must_match("trial_steps")
        if self.args.trial_takes_updates:
            saved.must_match("trial_takes_updates")
            saved.add("trial_updates", attribute(self, "taken_updates"), SHARED)

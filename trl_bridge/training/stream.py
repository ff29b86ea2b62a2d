"""The template: GRPO with a demonstration stream."""

import dataclasses
from collections.abc import Callable
from typing import Any, cast

import torch
from accelerate.utils import gather_object
from datasets import Dataset, DatasetDict, IterableDataset
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase, ProcessorMixin, TrainerCallback
from transformers.utils import logging

from .._upstream import DataCollatorForLanguageModeling, tool_schemas
from ..demonstrations.render import Renderer, render_demonstrations
from ..demonstrations.rows import check_dataset, python_rows, split_demonstration
from ..demonstrations.stream import window_share
from ..objectives.sft import demonstration_loss
from .checkpoint.registry import SHARED, Registry
from .demonstrations import Demonstrations
from .policy import Scores
from .randomness import forked_python_rng, forked_torch_rng
from .stream_config import DemonstrationConfig
from .trial import TrialTrainer
from .verdicts import collect_verdicts, missing_columns
from .weighting import DemonstrationWeighting, RolloutObserver


logger = logging.get_logger(__name__)


@dataclasses.dataclass
class Window:
    """One accumulation window: the micro-batches that make up an optimizer update."""

    shares: list[list[int]]
    num_tokens: int
    micro_batch: int = 0
    sums: dict[str, torch.Tensor] = dataclasses.field(default_factory=dict)
    weighted: bool = False

    def add(self, sums: dict[str, torch.Tensor]) -> None:
        """Add one pass's sums to the running ones."""
        for name, value in sums.items():
            self.sums[name] = self.sums.get(name, 0) + value


class DemonstrationTrainer(TrialTrainer):
    """
    GRPO with a demonstration stream: the base of every trainer that adds an SFT term to RL.

    A training micro-batch runs `policy_pass`, `between_passes`, `demonstration_pass`, one graph alive at a time; after
    the window's last one `end_of_window` runs, and after the optimizer's step `after_step`. Subclasses fill these and
    set the two weights; they may leave one of the two passes out of an update, which then costs what the other one
    does. Evaluation takes the path of TRL's trainer.

    Args:
        sft_dataset ([`~datasets.Dataset`]):
            Demonstrations in any of TRL's SFT formats (prompt-completion, messages, text; standard or conversational).
            Where the reward functions are asked about demonstrations (`sft_weighting="verdict"`), its rows carry the
            columns that they need.
        model, reward_funcs, args, train_dataset, eval_dataset, processing_class, reward_processing_classes, callbacks,
        optimizers, quantization_config, peft_config, tools, rollout_func, environment_factory:
            As in [`~trl.GRPOTrainer`].

    Raises:
        ValueError, TypeError, NotImplementedError: an argument cannot be used; the message names it and what to do.
    """

    config_class: type[DemonstrationConfig] = DemonstrationConfig
    trains_by_advantage = True
    sees_pictures = True
    shards = True
    shards_adapters = True
    balances_experts = True

    def __init__(
        self,
        model: "str | PreTrainedModel",
        reward_funcs: Any = None,
        args: DemonstrationConfig | None = None,
        train_dataset: Dataset | IterableDataset | None = None,
        sft_dataset: Dataset | None = None,
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
        args = self.config_or_default(args, model)
        self._check_datasets(train_dataset, sft_dataset)
        super().__init__(
            model=model,
            reward_funcs=reward_funcs,
            args=args,
            train_dataset=train_dataset,
            sft_dataset=sft_dataset,
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
        self._sft_dataset = python_rows(sft_dataset)
        self._warn_of_two_formats()
        self.render_rows()
        self.weighting = DemonstrationWeighting(
            self.resolve_weighting(sft_dataset),
            verdict_calls=args.verdict_calls,
            **{f"judge_{name}": getattr(args, f"judge_{name}") for name in ("window", "beta", "penalty", "per_token")},
        )
        if self.weighting.needs_verdicts:
            self._check_verdict_columns(sft_dataset)
        self._observer = RolloutObserver(self.weighting, self.eos_token_ids, args.success_threshold)
        self._window: Window | None = None
        if args.trial_steps:
            self.set_up_trial(sft_dataset)

    # Arguments

    def _check_datasets(self, train_dataset: Any, sft_dataset: Any) -> None:
        if sft_dataset is None:
            remedy = ""
            if "expert" in (getattr(train_dataset, "column_names", None) or []):
                remedy = (
                    " The `expert` column of `train_dataset` is read by the group trainers alone; as demonstrations it "
                    "is `train_dataset.select_columns(['prompt', 'expert']).rename_column('expert', 'completion')`."
                )
            raise ValueError(
                f"{type(self).__name__} needs `sft_dataset`: a `Dataset` of demonstrations in any of TRL's SFT formats.{remedy}"
            )
        check_dataset(sft_dataset)

    def _warn_of_two_formats(self) -> None:
        train_dataset: Any = self.train_dataset
        if not isinstance(train_dataset, Dataset) or not self.accelerator.is_main_process:
            return
        spoken = isinstance(train_dataset[0].get("prompt"), list)  # there is none where an environment has the prompts
        if spoken and isinstance(split_demonstration(self._sft_dataset[0])[1], str):
            logger.warning(
                "The prompts of `train_dataset` are conversations and the demonstrations of `sft_dataset` bare strings: these are "
                "trained without the chat template, which the policy is asked with. Write them as messages, too."
            )

    def render_rows(self) -> None:
        args: Any = self.args
        tokenizer: Any = self.processing_class
        template_kwargs, tools = cast(dict[str, Any], self.chat_template_kwargs or {}), tool_schemas(self)
        eos = list(dict.fromkeys([self._tokenizer.eos_token_id, *self.eos_token_ids]))
        # The main process renders first, so that the others read its cache.
        with self.accelerator.main_process_first():
            rendered = render_demonstrations(
                self._sft_dataset,
                tokenizer,
                chat_template=self.chat_template,
                chat_template_kwargs=template_kwargs,
                eos_token_id=eos,
                max_length=args.sft_max_length,
                overlong=args.sft_overlong,
                tools=tools,
            )
        renderer = Renderer(tokenizer, self.chat_template, template_kwargs, eos, "sft_dataset", None, tools)
        self.demonstrations = Demonstrations(
            self._sft_dataset,
            rendered,
            seed=args.seed,
            collator=DataCollatorForLanguageModeling(
                pad_token_id=self._tokenizer.pad_token_id, pad_to_multiple_of=args.pad_to_multiple_of
            ),
            device=self.accelerator.device,
            prompts=self._paired_prompts() if args.sft_pairing == "prompt" else None,
            picture_inputs=renderer.picture_inputs if self._is_vlm else None,
        )

    def _paired_prompts(self) -> Any:
        train_dataset: Any = self.train_dataset
        if isinstance(train_dataset, IterableDataset):
            raise NotImplementedError(
                "`sft_pairing='prompt'` needs a `train_dataset` that can be looked through beforehand, not an iterable "
                "one. Use `sft_pairing='independent'`."
            )
        return train_dataset["prompt"]

    def resolve_weighting(self, sft_dataset: Dataset) -> str:
        """Kind of `sft_weighting` that is used."""
        return self.args.sft_weighting or "none"

    def _check_verdict_columns(self, sft_dataset: Dataset) -> None:
        columns = self.train_dataset.column_names or []
        if self.environment_factories is not None:
            raise ValueError(
                f"`sft_weighting={self.weighting.kind!r}` asks the reward functions about demonstrations, which no environment "
                "has seen. Use `sft_weighting='judge'`."
            )
        missing = missing_columns(self.reward_funcs, columns, sft_dataset)
        if missing:
            raise ValueError(
                f"`sft_weighting={self.weighting.kind!r}` asks the reward functions about demonstrations, but "
                f"`sft_dataset` lacks the columns that they need: {', '.join(map(repr, missing))}. Add them, or use "
                "`sft_weighting='judge'`, which needs none."
            )

    # The two terms of the update under way: functions of `state.global_step`, so the same on every rank

    def policy_due(self) -> bool:
        """Whether the update has an RL pass."""
        return True

    def demonstrations_due(self) -> bool:
        """Whether the update has an SFT pass; without one none of the stream is drawn. One of the two is due."""
        return True

    def policy_weight(self) -> float:
        """Weight of the RL loss in the update under way."""
        return 1.0

    def demonstration_weight(self) -> float:
        """Weight of the SFT loss in the update under way."""
        return 1.0

    def token_weights(
        self, log_probs: torch.Tensor, mask: torch.Tensor, weights: torch.Tensor | None
    ) -> torch.Tensor | None:
        """
        Weights of one micro-batch's demonstrated tokens. Those of `sft_weighting` as they are.

        Args:
            log_probs (`torch.Tensor` of shape `(B, T)`):
                Log-probability of each token at temperature 1, in nats, without gradient.
            mask (`torch.Tensor` of shape `(B, T)`):
                True at trained tokens.
            weights (`torch.Tensor` of shape `(B, T)` or `(B, 1)`, *optional*):
                Weights that `sft_weighting` gives, `None` for `"none"`.

        Returns:
            `torch.Tensor` of shape `(B, T)` or `(B, 1)`, *optional*: `None` is one everywhere.
        """
        return weights

    # The template

    def policy_loss(self, model: nn.Module, inputs: dict[str, Any]) -> tuple[torch.Tensor, Scores]:
        """
        TRL's RL loss times the term's weight, with its graph.

        Args:
            model (`nn.Module`):
                The wrapped student.
            inputs (`dict[str, Any]`):
                The micro-batch, as TRL's `_prepare_inputs` returns it.

        Returns:
            `tuple`: the weighted scalar loss, and the detached scores that it was formed of: log-probabilities
            `(B, T)` in nats at the sampling temperature, entropies `(B, T)` or `None`, auxiliary loss or `None`.
        """
        loss, scores = self.policy.loss(model, inputs)
        self._window.add({"rl_loss": loss.detach()})
        return self.policy_weight() * loss, scores

    def policy_pass(self, model: nn.Module, inputs: dict[str, Any]) -> tuple[torch.Tensor, Scores]:
        """
        TRL's RL loss and its backward, where an SFT pass follows.

        Args:
            model (`nn.Module`):
                The wrapped student.
            inputs (`dict[str, Any]`):
                The micro-batch, as TRL's `_prepare_inputs` returns it.

        Returns:
            `tuple`: the weighted loss, detached, and the scores of `policy_loss`.
        """
        with self.backend.earlier_pass(model):
            loss, scores = self.policy_loss(model, inputs)
            self.backend.backward(loss)
        return loss.detach(), scores

    def between_passes(self, model: nn.Module, inputs: dict[str, Any], scores: Scores) -> None:
        """
        After the policy's backward, before the demonstrations' forward, where both are due. Nothing here.

        Args:
            model (`nn.Module`):
                The wrapped student.
            inputs (`dict[str, Any]`):
                The micro-batch.
            scores (`tuple`):
                The policy's scores of it, as `policy_pass` returned them.
        """

    def demonstration_pass(self, model: nn.Module, window: Window) -> torch.Tensor:
        """
        The weighted SFT loss of one micro-batch's demonstrations.

        Args:
            model (`nn.Module`):
                The wrapped student.
            window ([`Window`]):
                The window under way.

        Returns:
            `torch.Tensor`: the loss, before the term's weight; the caller runs its backward.
        """
        share = window.shares[window.micro_batch]
        log_probs, mask, hits, balance = self.under_noise(model, lambda: self._score(model, share))
        tempered = self._tempered_sequence_log_probs(model, share, log_probs, mask)
        weights = self.weighting.token_weights(log_probs.detach(), mask, self.demonstrations.rows(share), tempered)
        weights = self.token_weights(log_probs.detach(), mask, weights)
        window.weighted = weights is not None
        loss, sums = demonstration_loss(log_probs, mask, weights, max(window.num_tokens, 1), self.backend.world_size)
        window.add({**sums, "hits": (hits * mask).sum()})
        if balance is not None and share:  # as TRL's SFT: a mean over micro-batches
            loss = loss + self.router_aux_loss_coef * balance / len(window.shares)
        return loss

    def end_of_window(self) -> None:
        """After the window's last backward, before TRL's trainer clips and steps. Nothing here."""

    # TRL's trainer

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> torch.Tensor:
        if return_outputs or not self.model.training:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        if self._window is None or self._window.micro_batch == len(self._window.shares):
            # The latter where an iterable dataset's epoch ended inside a window: TRL's trainer continues in the next
            # epoch and scales both parts by themselves.
            self._window = self._begin_window(model, self._window)
        loss = self._run_passes(model, inputs, self._window)
        self._window.micro_batch += 1
        return loss

    def _run_passes(self, model: nn.Module, inputs: dict[str, Any], window: Window) -> torch.Tensor:
        """The micro-batch's passes; the loss that comes back has the graph of the last one, whose backward is TRL's."""
        if not self.demonstrations_due():
            loss, scores = self.policy_loss(model, inputs)
            self._observe(inputs, scores)
            return loss
        done: torch.Tensor | float = 0.0
        if self.policy_due():
            done, scores = self.policy_pass(model, inputs)
            self._observe(inputs, scores)
            self.between_passes(model, inputs, scores)
        # The stream's randomness (dropout) is its own: RL samples as if it were not there.
        with forked_torch_rng(self.accelerator.device):
            loss = self.demonstration_weight() * self.demonstration_pass(model, window)
        return loss + done

    def scores_every_rollout(self, model: nn.Module, inputs: dict[str, Any]) -> bool:
        return "rollout_reward" in inputs and model is self.model_wrapped  # the judge reads them

    def _observe(self, inputs: dict[str, Any], scores: Scores) -> None:
        iteration = (self._step // self.args.steps_per_generation) % self.num_iterations
        if iteration == 0:
            self._observer.observe(inputs, scores[0])

    def training_step(self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Any = None) -> torch.Tensor:
        self.backend.before_micro_batch(model)
        loss = super().training_step(model, inputs, num_items_in_batch)
        if self.accelerator.sync_gradients:
            if not self.backend.steps_in_backward:
                self.end_of_window()
            self._finish_window()
        return loss

    def _prepare_for_training(self, max_steps: int, train_dataloader: Any, resume_from_checkpoint: Any) -> Any:
        # A window that an exception cut off in an earlier call of `train` is not continued.
        self._window = None
        self.weighting.discard_window()
        prepared = super()._prepare_for_training(max_steps, train_dataloader, resume_from_checkpoint)
        self.backend.attach(self.model_wrapped, self.end_of_window)
        return prepared

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        output = super()._generate_and_score_completions(inputs)
        if self.model.training:
            places = self.places(len(inputs))
            num_groups = self.args.generation_batch_size // self.num_generations
            prompts = [example.get("prompt") for example in inputs]
            output.update(self.demonstrations.pair(prompts, places, self.generation, num_groups))
            first = self.accelerator.process_index * len(inputs)
            rewards = self.rollouts.total_rewards()[first : first + len(inputs)]
            output.update(self._observer.take(output, rewards))
        return output

    # The window

    def _begin_window(self, model: nn.Module, earlier: Window | None = None) -> Window:
        sums = {} if earlier is None else earlier.sums
        if not self.demonstrations_due():
            return Window(shares=[[]] * self.current_gradient_accumulation_steps, num_tokens=0, sums=sums)
        shares = self._draw_shares()
        tokens = sum(self.demonstrations.num_tokens(index) for share in shares for index in share)
        window = Window(shares=shares, num_tokens=int(self._sum_over_ranks(float(tokens))), sums=sums)
        if self.weighting.needs_verdicts:
            # A reward function may draw random numbers; RL's own go on as if it had not been asked.
            with forked_torch_rng(self.accelerator.device), forked_python_rng():
                collect_verdicts(
                    self.ask_rewards,
                    self.weighting,
                    self.demonstrations,
                    [index for share in shares for index in share],
                    rank=self.backend.rank,
                    success_threshold=self.args.success_threshold,
                )
        self.weighting.begin_window()
        if self.weighting.needs_initial_mean:
            self._set_initial_mean(model, shares)
        return window

    def _draw_shares(self) -> list[list[int]]:
        micro_batches = self.current_gradient_accumulation_steps
        if self.demonstrations.paired:
            upcoming = (self._step + i for i in range(micro_batches))
            buffered: Any = self._buffered_inputs
            batches = [buffered[step % self.args.steps_per_generation] for step in upcoming]
            return [[i for i in batch["demonstration_index"].tolist() if i >= 0] for batch in batches]
        count = micro_batches * self.backend.world_size * self.args.demonstration_batch_size
        drawn = self.demonstrations.stream.draw(count)
        if count > self.args.demonstration_batch_size:
            # The loss is the window's: which micro-batch or rank has which of its demonstrations does not change it.
            drawn = self.demonstrations.by_length(drawn)
        return window_share(drawn, micro_batches, self.backend.world_size, self.backend.rank)

    def _set_initial_mean(self, model: nn.Module, shares: list[list[int]]) -> None:
        # The first window has no past to take the mean from: one more forward, this once, gives its own.
        total = torch.zeros(2, dtype=torch.float64)
        with torch.no_grad(), forked_torch_rng(self.accelerator.device):
            for share in shares:
                log_probs, mask, *_ = self._score(model, share)
                raw: Any = self.weighting.raw(log_probs, mask)
                counted = mask if raw.size(1) == mask.size(1) else mask.any(dim=1, keepdim=True)
                total += torch.stack([(raw * counted).sum(), counted.sum()]).double().cpu()
        weights, count = (self._sum_over_ranks(float(value)) for value in total)
        if count > 0:
            self.weighting.set_initial_mean(weights, count)

    def _finish_window(self) -> None:
        window = self._window
        self._window = None
        if self.demonstrations_due() or self.weighting.needs_rollouts:
            self.weighting.end_window(gather_object([self.weighting.pending()]))
        names = sorted(window.sums)
        totals = self.accelerator.reduce(torch.stack([window.sums[n].double() for n in names]), reduction="sum")
        total = dict(zip(names, totals.tolist(), strict=True))
        tokens = total.get("tokens", 0)
        self.demonstrations.tokens_seen += int(tokens)
        values = {"sft/num_tokens": float(self.demonstrations.tokens_seen), "sft/epoch": self.demonstrations.epoch}
        if "rl_loss" in total:
            values["rl/loss"] = total["rl_loss"] / self.backend.world_size
        if tokens:  # with `sft_pairing="prompt"` an update may hold no group's first rollout
            values["sft/loss"] = total["nll_sum"] / tokens
            values["sft/mean_token_accuracy"] = total["hits"] / tokens
            if window.weighted:
                values["sft/weight_mean"] = total["weight_sum"] / tokens
                values["sft/weight_zero_fraction"] = total["zero_sum"] / tokens
                self.weighting.note_mean(values["sft/weight_mean"])
        self.record({**values, **(self.weighting.metrics() if self.demonstrations_due() else {})})

    # Saving and resuming

    @property
    def inside_update(self) -> bool:
        return self._window is not None

    def register_state(self, saved: Registry) -> None:
        super().register_state(saved)
        saved.add("demonstrations", self.demonstrations, SHARED)
        saved.add("weighting", self.weighting, SHARED)
        if not self.demonstrations.paired:
            saved.layout["sft_per_device_train_batch_size"] = self.args.demonstration_batch_size
        sources = {"sft_dataset": self.demonstrations.fingerprint, "sft_weighting": self.weighting.kind}
        saved.must_match("sft_pairing", **sources)

    # Helpers

    def _score(self, model: nn.Module, share: list[int]) -> Any:
        """What `score_rows` returns of demonstrations."""
        return self.score_rows(model, self.demonstrations.batch(share), demonstration_head=True)

    def _tempered_sequence_log_probs(
        self, model: nn.Module, share: list[int], log_probs: torch.Tensor, mask: torch.Tensor
    ) -> torch.Tensor | None:
        """Summed log-probabilities at the sampling temperature, (B,), for the judge; `None` where they are not read."""
        if not self.weighting.needs_rollouts or self.temperature == 1.0:
            return None
        with torch.no_grad():
            tempered, trained, *_ = self.score_rows(model, self.demonstrations.batch(share), fused_lm_head=True)
        return (tempered * trained).sum(dim=1)

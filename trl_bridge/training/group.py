"""The template of the group baselines: GRPO whose rollout groups hold expert rows or expert prefixes."""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import torch
from datasets import Dataset, IterableDataset
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainerCallback

from .._upstream import tool_schemas
from ..demonstrations.group import Experts
from ..objectives.sft import demonstration_loss
from ..objectives.weights import trapo
from .checkpoint.registry import Registry
from .group_config import ExpertConfig
from .policy import Scores, completions_of
from .randomness import forked_torch_rng
from .student import StudentTrainer


@dataclasses.dataclass
class ExpertPlan:
    """Rows of a generation batch on this rank, and the expert's part in them."""

    generation: int
    groups: list[int]
    members: list[int]
    experts: list[list[int] | None]
    heads: list[int]
    inputs: list[dict[str, Any]] = dataclasses.field(default_factory=list)
    begun: bool = False  # whether the rows' first turn is sampled

    def head(self, row: int) -> list[int]:
        """The tokens that a row begins with."""
        return (self.experts[row] or [])[: self.heads[row]]

    def is_whole(self, row: int) -> bool:
        """Whether a row is the whole trace."""
        return self.heads[row] > 0 and self.heads[row] == len(self.experts[row] or [])


class ExpertTrainer(StudentTrainer):
    """
    GRPO with experts in the rollout group: the base of the group methods.

    The RL dataset has an `expert` column. For each generation batch: every group draws its trace; `expert_heads` says
    which rows begin with how much of it; TRL's trainer samples, scores with the reward functions (experts included) and
    forms advantages; `assign` sets the masks, and may change advantages or write experts into rows. For each
    micro-batch there is one forward; the loss is TRL's over own tokens, plus `expert_loss` over expert tokens,
    plus `sft_coefficient` times the NLL of the SFT tokens weighted by `sft_weights`. Shapes are fixed and every rank
    runs the same passes, so it trains wherever TRL's trainer does. Evaluation takes TRL's path.

    Tensors that travel with a generation batch, all (B, T): `expert_mask` (tokens written by the expert), `tool_mask`
    (TRL's: tokens in its RL loss), `sft_mask` (tokens in the SFT term).

    Args:
        train_dataset ([`~datasets.Dataset`]):
            RL rows with an `expert` column: a string, a list of messages, or a list of either; empty where a prompt
            has none.
        model, reward_funcs, args, eval_dataset, processing_class, reward_processing_classes, callbacks, optimizers,
        quantization_config, peft_config, tools, rollout_func, environment_factory:
            As in [`~trl.GRPOTrainer`].
    """

    config_class: type[ExpertConfig] = ExpertConfig
    shards = True
    shards_adapters = True
    # Whether rows of one group may be sampled from different prompts (vLLM is then asked for one completion of each).
    prompts_differ_in_group = False
    # Whether the `expert_steps` column is read, if there is one.
    reads_steps = False
    # Why traces in which tools answer are refused; `None` where they are not.
    refuses_turns: str | None = None
    refuses_environments = "an environment has not seen what an expert has written, and could not say what it is worth"

    def __init__(
        self,
        model: "str | PreTrainedModel",
        reward_funcs: Any = None,
        args: ExpertConfig | None = None,
        train_dataset: Dataset | None = None,
        eval_dataset: Any = None,
        processing_class: PreTrainedTokenizerBase | None = None,
        reward_processing_classes: Any = None,
        callbacks: list[TrainerCallback] | None = None,
        optimizers: tuple[torch.optim.Optimizer | None, torch.optim.lr_scheduler.LambdaLR | None] = (None, None),
        quantization_config: Any = None,
        peft_config: Any = None,
        tools: list[Callable] | None = None,
        rollout_func: Any = None,
        environment_factory: Any = None,
        sft_dataset: Any = None,
    ):
        owner = type(self).__name__
        if sft_dataset is not None:
            raise TypeError(
                f"{owner} takes no `sft_dataset`: its demonstrations are the `expert` column of `train_dataset`."
            )
        if rollout_func is not None:
            raise NotImplementedError(f"`rollout_func` is not supported by {owner}: it would not know the experts.")
        if isinstance(train_dataset, IterableDataset):
            raise NotImplementedError(
                f"{owner} needs a `train_dataset` that can be looked through beforehand, not an iterable one."
            )
        args = self.config_or_default(args, model)
        for name, neutral in (("sft_token_weight", "none"), ("loss_scale", "trl")):
            if getattr(args, name) != neutral and not self.has_sft_term():
                raise ValueError(f"`{name}` has no effect in {owner}, which has no SFT term. Set it to {neutral!r}.")
        super().__init__(
            model=model,
            reward_funcs=reward_funcs,
            args=args,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=processing_class,
            reward_processing_classes=reward_processing_classes,
            callbacks=callbacks,
            optimizers=optimizers,
            quantization_config=quantization_config,
            peft_config=peft_config,
            tools=tools,
            environment_factory=environment_factory,
        )
        self.render_rows()
        self._plan: ExpertPlan | None = None
        self._sums: dict[str, torch.Tensor] = {}
        self._sft_items: float | None = None  # SFT tokens of the window under way, over all ranks

    def render_rows(self) -> None:
        args, own_eos = self.args, self._tokenizer.eos_token_id
        dataset: Any = self.train_dataset
        template_kwargs: Any = self.chat_template_kwargs
        # The main process renders first, so that the others read its cache.
        with self.accelerator.main_process_first():
            self.experts = Experts(
                dataset,
                self._tokenizer,
                chat_template=self.chat_template,
                chat_template_kwargs=template_kwargs,
                eos_token_id=[own_eos, *(eos for eos in self.eos_token_ids if eos != own_eos)],
                max_length=args.longest_expert,
                overlong=args.expert_overlong,
                seed=args.seed,
                steps=self.reads_steps,
                tools=tool_schemas(self),
            )
        row = self.experts.first_row_of_turns
        if row is not None and self.refuses_turns:
            raise NotImplementedError(
                f"`train_dataset` row {row}: a tool answers in `expert`, which {type(self).__name__} does not support: "
                f"{self.refuses_turns}. Remove the trace."
            )

    # What methods fill

    def expert_heads(self, plan: ExpertPlan, inputs: list[dict[str, Any]]) -> list[int]:
        """How many tokens of its group's trace each row begins with. Here none."""
        return [0] * len(inputs)

    def assign(self, output: dict[str, Any], plan: ExpertPlan) -> None:
        """
        After rewards and advantages: set masks and advantages of the generation batch, in place.

        Called on every rank. `self.rollouts.total_rewards()` has the rewards of all ranks' rows.

        Args:
            output (`dict[str, Any]`):
                As TRL's `_generate_and_score_completions` returns it, with `expert_mask`, `tool_mask` (1 at own
                tokens) and `sft_mask` (0).
            plan ([`ExpertPlan`]):
                The batch.
        """

    def policy_inputs(self, inputs: dict[str, Any], scores: Scores) -> dict[str, Any]:
        """Inputs of TRL's loss, once the micro-batch is scored: where a method sets advantages per token."""
        return inputs

    def expert_loss(
        self, log_probs: torch.Tensor, entropies: torch.Tensor, inputs: dict[str, Any]
    ) -> torch.Tensor | None:
        """
        Policy loss of expert tokens, to be minimised; `None` where a method has none.

        Args:
            log_probs (`torch.Tensor` of shape `(B, T)`):
                Log-probabilities at the sampling temperature, with graph.
            entropies (`torch.Tensor` of shape `(B, T)`):
                Entropies of the same distributions, in nats, without graph.
            inputs (`dict[str, Any]`):
                The micro-batch.

        Returns:
            `torch.Tensor` of shape `(B, T)`, *optional*.
        """
        return None

    def sft_coefficient(self) -> float:
        """Weight of the SFT term in the update under way. 0 here: there is none."""
        return 0.0

    def sft_weights(
        self, log_probs: torch.Tensor, entropies: torch.Tensor, inputs: dict[str, Any]
    ) -> torch.Tensor | None:
        """Detached weights of the SFT tokens, (B, T) or (B, 1); `None` for 1 everywhere."""
        return None

    # The generation batch

    def sample_groups(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        if not self.model.training:
            return super().sample_groups(inputs)
        plan = self._draw(inputs)
        self._plan = plan
        try:
            output = super().sample_groups(inputs)
        finally:
            self._plan = None
        positions = torch.arange(output["completion_ids"].size(1), device=output["completion_ids"].device)
        heads = torch.tensor(plan.heads, device=positions.device)
        written = (positions < heads.unsqueeze(1)).long() * output["completion_mask"]
        output["expert_mask"] = written.clone()
        for row, head in enumerate(plan.heads):
            own = self.experts.own(plan.experts[row] or [])[:head]
            output["expert_mask"][row, : len(own)] *= torch.tensor(own, dtype=torch.long, device=positions.device)
        output["tool_mask"] = (1 - written) * output.get("tool_mask", 1)
        output["sft_mask"] = torch.zeros_like(output["expert_mask"])
        self._record_rewards(plan)
        self.assign(output, plan)
        self.count_items(output)
        return output

    def _draw(self, inputs: list[dict[str, Any]]) -> ExpertPlan:
        generation, places = self.generation, self.places(len(inputs))
        experts = [
            self.experts.draw(example["prompt"], generation, group, self.args.expert_probability)
            for example, (group, _) in zip(inputs, places, strict=True)
        ]
        plan = ExpertPlan(generation, [g for g, _ in places], [m for _, m in places], experts, [], inputs)
        plan.heads = self.expert_heads(plan, inputs)
        return plan

    def _generate_single_turn(
        self, prompt_ids: Any, images: Any, multimodal_fields: Any, num_generations: int, has_tool_images: bool = False
    ) -> Any:
        plan = self._plan
        if plan is None or plan.begun:
            return super()._generate_single_turn(
                prompt_ids, images, multimodal_fields, num_generations, has_tool_images
            )
        plan.begun = True
        # A whole trace's row is sampled all the same, so that the other rows' samples are plain GRPO's.
        continued = [[] if plan.is_whole(row) else plan.head(row) for row in range(len(prompt_ids))]
        completion_ids, logprobs = super()._generate_single_turn(
            [ids + head for ids, head in zip(prompt_ids, continued, strict=True)],
            images,
            multimodal_fields,
            1 if self.prompts_differ_in_group else num_generations,
            has_tool_images,
        )
        longest: Any = self.max_completion_length
        for row in range(len(prompt_ids)):
            head = plan.head(row)
            if not head:
                continue
            own = [] if plan.is_whole(row) else list(completion_ids[row])[: max(longest - len(head), 0)]
            completion_ids[row] = head + own
            if logprobs is not None:
                # What the policy did not sample has no sampling probability; TRL then corrects by 1.
                logprobs[row] = [None] * len(head) + list(logprobs[row])[: len(own)]
        return completion_ids, logprobs

    def _tool_call_loop(
        self,
        prompts: Any,
        prompt_ids: Any,
        completion_ids: Any,
        completions: list[Any],
        logprobs: Any,
        images: Any,
        multimodal_fields: Any,
    ) -> Any:
        plan, rest = self._plan, (logprobs, images, multimodal_fields)
        if plan is None:
            return super()._tool_call_loop(prompts, prompt_ids, completion_ids, completions, *rest)
        # The calls of a whole trace have their results, and are not made again.
        whole = {row: completions[row] for row in range(len(completions)) if plan.is_whole(row)}
        for row in whole:
            completions[row] = [{"role": "assistant", "content": ""}]
        mask, completions, *more = super()._tool_call_loop(prompts, prompt_ids, completion_ids, completions, *rest)
        for row, decoded in whole.items():
            completions[row] = self.experts.messages(plan.experts[row] or []) or decoded
        return mask, completions, *more

    def write_experts(self, output: dict[str, Any], plan: ExpertPlan, rows: list[int]) -> None:
        """
        Put whole traces into rows that have been sampled and scored, in place: they are expert tokens then, and no
        own ones.
        """
        traces = {row: plan.experts[row] or [] for row in rows}
        width = output["completion_ids"].size(1)
        missing = max((len(trace) for trace in traces.values()), default=0) - width
        if missing > 0:
            shape = output["completion_ids"].shape
            for name, value in output.items():
                # Prompts may be as wide as completions, and are padded on the left.
                if isinstance(value, torch.Tensor) and value.shape == shape and not name.startswith("prompt"):
                    fill = self._tokenizer.pad_token_id if name == "completion_ids" else 0
                    output[name] = nn.functional.pad(value, (0, missing), value=fill)
        for row, trace in traces.items():
            for name in ("completion_mask", "expert_mask", "tool_mask"):
                output[name][row] = 0
            output["completion_ids"][row] = self._tokenizer.pad_token_id
            output["completion_ids"][row, : len(trace)] = torch.tensor(trace, device=output["completion_ids"].device)
            output["completion_mask"][row, : len(trace)] = 1
            own = torch.tensor(self.experts.own(trace), device=output["completion_ids"].device)
            output["expert_mask"][row, : len(trace)] = own.long()

    def has_expert_loss(self) -> bool:
        """Whether expert tokens are in the RL loss, and counted in its normaliser (`loss_type="dapo"`)."""
        return type(self).expert_loss is not ExpertTrainer.expert_loss

    def has_sft_term(self) -> bool:
        """Whether the method has an SFT term on tokens of the rollout group."""
        return type(self).sft_coefficient is not ExpertTrainer.sft_coefficient

    def count_items(self, output: dict[str, Any]) -> None:
        trained = output["tool_mask"] | output["expert_mask"] if self.has_expert_loss() else output["tool_mask"]
        gather = self.accelerator.gather
        output["num_items_in_batch"] = gather((output["completion_mask"] * trained).sum()).sum()
        output["num_sft_items_in_batch"] = gather(output["sft_mask"].sum()).sum()

    def _record_rewards(self, plan: ExpertPlan) -> None:
        # TRL's own `reward` is over all rows; a curve of it would show the expert's share, not the policy.
        rewards = self.rollouts.total_rewards()
        heads: Any = torch.tensor(plan.heads, device=rewards.device)
        written = self.accelerator.gather(heads) > 0
        own, expert = rewards[~written].nanmean().item(), rewards[written].nanmean().item()
        values = {"rollouts/reward": own, "expert/reward": expert}
        self.record({name: value for name, value in values.items() if not math.isnan(value)})

    # The loss

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> torch.Tensor:
        if return_outputs or not self.model.training:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        scores = self.policy.score(model, inputs)
        policy_inputs = self.policy_inputs(_neutral(inputs, scores[0].detach()), scores)
        loss = self.policy.loss_of(scores, policy_inputs)
        self._add_up(**{"rl/loss": loss.detach()})
        if self.has_expert_loss():
            loss = loss + self._expert_term(policy_inputs, scores)
        coefficient = self.sft_coefficient()
        # The count is over all ranks, so that all of them leave the term out, or none.
        if coefficient != 0.0 and inputs["num_sft_items_in_batch"] > 0:
            loss = loss + coefficient * self.args.sft_scale * self._sft_term(model, inputs, scores)
        expert = inputs["expert_mask"].bool()
        self._add_up(
            expert_tokens=expert.sum(),
            tokens=written_tokens(inputs).sum(),
            expert_prob=scores[0].detach().exp().masked_fill(~expert, 0.0).sum(),
        )
        return loss

    def _expert_term(self, inputs: dict[str, Any], scores: Scores) -> torch.Tensor:
        log_probs, entropies = scores[0], scores[1]
        assert entropies is not None
        per_token = self.expert_loss(log_probs, entropies.detach(), inputs)
        assert per_token is not None
        loss = self.reduce(per_token, inputs["expert_mask"], inputs)
        self._add_up(**{"expert/loss": loss.detach()})
        return loss

    def _sft_term(self, model: nn.Module, inputs: dict[str, Any], scores: Scores) -> torch.Tensor:
        log_probs = scores[0] if self.temperature == 1.0 else self._untempered_log_probs(model, inputs)
        assert scores[1] is not None
        mask = inputs["sft_mask"].bool()
        weights = self.sft_weights(log_probs.detach(), scores[1].detach(), inputs)
        if self.args.sft_token_weight == "trapo":
            own = trapo(log_probs, mask).to(log_probs.dtype)
            weights = own if weights is None else own * weights
        # The mean over ranks of gradients is undone by the share being one rank's.
        loss, sums = demonstration_loss(log_probs, mask, weights, self._sft_share(inputs))
        self._add_up(**{"sft_tokens": sums["tokens"], "sft_nll": sums["nll_sum"], "sft_weight": sums["weight_sum"]})
        return loss

    def _sft_share(self, inputs: dict[str, Any]) -> torch.Tensor | float:
        """
        SFT tokens of the window on one rank, on average over ranks. Exact where the window lies in one generation batch;
        where it needs several, the later ones are not sampled yet, and each counts with its own mean.
        """
        steps, generation_steps = self.current_gradient_accumulation_steps, self.args.steps_per_generation
        if generation_steps % steps:
            return self.window_share(inputs["num_sft_items_in_batch"])
        if self._sft_items is None:
            buffered: Any = self._buffered_inputs
            batches = [buffered[(self._step + i) % generation_steps] for i in range(steps)]
            self._sft_items = self._sum_over_ranks(float(sum(int(batch["sft_mask"].sum()) for batch in batches)))
        return max(self._sft_items, 1.0) / self.accelerator.num_processes

    def _untempered_log_probs(self, model: nn.Module, inputs: dict[str, Any]) -> torch.Tensor:
        # GRPO's head divides by the sampling temperature, on which an SFT term must not depend: a second forward.
        with forked_torch_rng(self.accelerator.device):
            return self.score_completions(model, *completions_of(inputs), demonstration_head=True)

    # Metrics

    def _add_up(self, **values: torch.Tensor) -> None:
        """Add to the window's sums on this rank; the same names on every rank and in every micro-batch."""
        for name, value in values.items():
            self._sums[name] = self._sums.get(name, 0) + value.detach().double()

    def training_step(self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Any = None) -> torch.Tensor:
        loss = super().training_step(model, inputs, num_items_in_batch)
        if self.accelerator.sync_gradients:
            names = sorted(self._sums)
            totals = self.accelerator.reduce(torch.stack([self._sums[n] for n in names]), reduction="sum")
            self._sums, self._sft_items = {}, None
            self.record(self.window_metrics(dict(zip(names, totals.tolist(), strict=True))))
        return loss

    def window_metrics(self, totals: dict[str, float]) -> dict[str, float]:
        """Metrics of a window."""
        ranks = self.accelerator.num_processes
        values = {name: total / ranks for name, total in totals.items() if "/" in name}
        values["expert/token_share"] = totals["expert_tokens"] / max(totals["tokens"], 1.0)
        if totals["expert_tokens"]:
            values["expert/prob_mean"] = totals["expert_prob"] / totals["expert_tokens"]
        if totals.get("sft_tokens"):
            values["sft/loss"] = totals["sft_nll"] / totals["sft_tokens"]
            values["sft/weight_mean"] = totals["sft_weight"] / totals["sft_tokens"]
        return values

    # Saving and resuming

    @property
    def inside_update(self) -> bool:
        return bool(self._sums)

    def _prepare_for_training(self, max_steps: int, train_dataloader: Any, resume_from_checkpoint: Any) -> Any:
        # A window that an exception cut off in an earlier call of `train` is not continued.
        self._sums, self._sft_items = {}, None
        return super()._prepare_for_training(max_steps, train_dataloader, resume_from_checkpoint)

    def register_state(self, saved: Registry) -> None:
        super().register_state(saved)
        values = {"expert": self.experts.fingerprint, "expert_max_length": self.args.longest_expert}
        saved.must_match("expert_overlong", "expert_probability", **values)


def written_tokens(batch: dict[str, Any]) -> torch.Tensor:
    """Tokens that the policy or the expert has written, (B, T): all but the results of tools."""
    return batch["completion_mask"] * (batch["tool_mask"] | batch["expert_mask"])


def _neutral(inputs: dict[str, Any], log_probs: torch.Tensor) -> dict[str, Any]:
    """Tokens out of the RL loss get ratio 1 and KL 0: masked later, but an infinite ratio times 0 would be NaN."""
    own = inputs["tool_mask"].bool()
    names = [name for name in ("old_per_token_logps", "ref_per_token_logps") if name in inputs]
    return {**inputs, **{name: torch.where(own, inputs[name], log_probs) for name in names}}

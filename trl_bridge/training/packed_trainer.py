"""GRPO whose passes run without padding: the layer of TRL's trainer under every trainer of ours."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from accelerate.logging import get_logger
from torch import nn
from transformers.integrations.neftune import activate_neftune, deactivate_neftune

from .._upstream import attend_in_segments
from .checkpoint.layout import filler
from .checkpoint.resume import ResumableTrainer
from .packing import (
    deal,
    disagreement,
    lay_out_rollouts,
    lay_out_rows,
    positions_needed,
    reason_for_padding,
    run,
    spread,
)
from .pictures import picture_inputs, rows_of
from .policy import Completions, Scores, completions_of
from .randomness import forked_torch_rng
from .teacher import SCORES


logger = get_logger(__name__)

# Relative error from which a packed pass is taken to be wrong. Float32's own is 1e-6, that of a deep model in 16 bits up to
# 0.06, and a forgotten window's 1.
_TOLERANCE_FLOAT32, _TOLERANCE_16_BITS = 1e-3, 0.3


class _Live(NamedTuple):
    """Rows of a micro-batch whose advantage is not zero, and what the others' log-probabilities are."""

    rows: torch.Tensor  # (B,)
    others: torch.Tensor | None  # (B, T)
    score_others: bool
    own: torch.Tensor | int  # which tokens no tool has written, (B, T)


class PackedTrainer(ResumableTrainer):
    """
    GRPO whose passes run without padding, a group's prompt once, and without rollouts that have no gradient.

    TRL's loss is untouched: it gets the same log-probabilities, (B, T), from another forward.
    """

    # Whether a rollout enters the loss through its advantage only, and a micro-batch through its rows only.
    trains_by_advantage = False

    def _set_up_packing(self) -> None:
        self._packs: bool = self.args.padding_free
        self._packing_is_checked = False
        self._live: _Live | None = None  # of the loss under way
        self._work = [0, 0]  # positions that the update's RL passes have run, and those of them that they needed
        if not self._packs:
            return
        reason = reason_for_padding(self.accelerator.unwrap_model(self.model))
        if self.aux_loss_enabled:
            # It is no sum over rows: a prompt that is run once, or a rollout that is not, would count differently.
            reason = "the load-balancing loss of its experts counts every token of every rollout"
        if reason is None:
            attend_in_segments()
            logger.info("`padding_free`: training's passes run without padding.")
        else:
            self._pad(reason)

    def _pad(self, reason: str) -> None:
        logger.warning(f"`padding_free` stands aside, and passes are padded: {reason}.")
        self._packs = False

    # Passes

    def _get_per_token_logps_and_entropies(
        self,
        model: nn.Module,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor,
        logits_to_keep: int,
        batch_size: int | None = None,
        compute_entropy: bool = False,
        *args: Any,
        **kwargs: Any,
    ) -> Scores:
        pictures = picture_inputs(kwargs)
        if "pixel_values" in pictures:
            size = batch_size or len(input_ids)
            return self._score_seeing(
                model, (input_ids, attention_mask, logits_to_keep), pictures, size, compute_entropy
            )
        live = self._live
        rows = range(len(input_ids)) if live is None else live.rows.nonzero().flatten().tolist()
        inputs = (input_ids, attention_mask, logits_to_keep)
        others = any(value is not None and value is not False for value in (*args, *kwargs.values()))
        if self._packs and self.model.training and not self._packing_is_checked and not torch.is_grad_enabled():
            self._check_packing(inputs)  # old and reference scores come before the first micro-batch
        if not self._packs or others or not self.model.training:
            self._count(input_ids.numel(), inputs, rows)
            return super()._get_per_token_logps_and_entropies(
                model, *inputs, batch_size, compute_entropy, *args, **kwargs
            )
        log_probs, entropies = self._score_packed(model, inputs, rows, batch_size or len(input_ids))
        if live is not None:
            log_probs, entropies = self._fill(model, inputs, live, log_probs, entropies)
        return log_probs, entropies if compute_entropy else None, None

    def _score_seeing(
        self, model: nn.Module, inputs: Completions, pictures: dict[str, Any], size: int, compute_entropy: bool
    ) -> Scores:
        """TRL's forward, which takes no chunk without a picture beside others with one."""
        ids, mask, length = inputs
        parts = []
        for start in range(0, len(ids), size):
            rows = list(range(start, min(start + size, len(ids))))
            self._count(ids[rows].numel(), (ids[rows], mask[rows], length), range(len(rows)))
            score = super()._get_per_token_logps_and_entropies
            parts.append(score(model, ids[rows], mask[rows], length, None, compute_entropy, **rows_of(pictures, rows)))
        log_probs, entropies, _ = zip(*parts, strict=True)
        return torch.cat(log_probs), torch.cat(entropies) if compute_entropy else None, None

    def _score_packed(
        self, model: nn.Module, inputs: Completions, rows: Sequence[int], batch_size: int, **head: Any
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Log-probabilities and, if the head has them, entropies of some rows' completions; zero elsewhere, (B, T)."""
        ids, mask, length = inputs
        parts = []
        for start in range(0, max(len(rows), 1), batch_size):
            some = rows[start : start + batch_size]
            layout = lay_out_rollouts(ids, mask, length, some, self.args.share_prompts)
            self._count(layout.ids.numel(), inputs, some)
            where = torch.zeros_like(mask[:, -length:], dtype=torch.bool)
            where[list(some)] = mask[list(some), -length:].bool()
            with self.accelerator.autocast():
                outputs = run(model, layout, **(head or {"fused_lm_head": True}))
            parts.append([v if v is None else spread(v, layout, where) for v in (outputs.log_probs, outputs.entropy)])
        log_probs, entropies = ([part for part in column if part is not None] for column in zip(*parts, strict=True))
        return torch.stack(log_probs).sum(0), torch.stack(entropies).sum(0) if entropies else None

    def _fill(
        self,
        model: nn.Module,
        inputs: Completions,
        live: _Live,
        log_probs: torch.Tensor,
        entropies: torch.Tensor | None,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Scores of the rows without a gradient: their ratio is one, and their entropy what the others' is on average."""
        alive, mask = live.rows[:, None], inputs[1][:, -inputs[2] :]
        others = live.others
        if live.score_others:
            dead = (~live.rows).nonzero().flatten().tolist()
            with torch.no_grad():
                others = self._score_packed(model, inputs, dead, len(mask))[0]
        if others is not None:
            log_probs = torch.where(alive, log_probs, others)
        if entropies is not None:
            counted = mask * live.own * alive
            sums = torch.stack([(entropies.detach() * counted).sum(), counted.sum().to(entropies.dtype)])
            total, count = self.accelerator.reduce(sums, reduction="sum")
            # Where no rank has a live rollout it is 0 / 0, which TRL leaves out of its averages.
            entropies = torch.where(alive, entropies, total / count)
        return log_probs, entropies

    def score_completions(
        self, model: nn.Module, ids: torch.Tensor, mask: torch.Tensor, length: int, **head: bool
    ) -> torch.Tensor:
        """
        Log-probabilities of the last `length` tokens by another fused head than GRPO's.

        Shapes: ids, mask (B, P + T); returns (B, T).
        """
        if self._packs:
            return self._score_packed(model, (ids, mask, length), range(len(ids)), len(ids), **head)[0]
        labels = ids.masked_fill(mask == 0, -100)
        labels[:, :-length] = -100
        with self.accelerator.autocast():
            outputs = model(input_ids=ids, attention_mask=mask, labels=labels, use_cache=False, **head)
        return outputs.log_probs[:, -length:]

    def score_rows(
        self, model: nn.Module, batch: dict[str, torch.Tensor], **head: bool
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
        """
        Log-probabilities, mask and greedy hits (if the head has them) of labelled tokens, and the load-balancing loss where
        it is enabled.

        Args:
            model (`nn.Module`):
                The wrapped model.
            batch (`dict[str, torch.Tensor]`):
                Right-padded `input_ids`, `attention_mask` and `labels`, (B, T).
            head (`bool`):
                The keyword that asks for a fused head.

        Returns:
            `tuple`: three tensors of shape (B, T - 1), and a scalar or `None`.
        """
        with self.accelerator.autocast():
            if not self._packs:
                balance = {"output_router_logits": True} if self.aux_loss_enabled else {}
                outputs = model(**batch, use_cache=False, **head, **balance)
                return outputs.log_probs, outputs.label_mask, outputs.is_top1, outputs.aux_loss if balance else None
            layout = lay_out_rows(batch["input_ids"], batch["attention_mask"], batch["labels"])
            outputs = run(model, layout, **head)
        mask = batch["labels"][:, 1:] != -100
        hits = None if outputs.is_top1 is None else spread(outputs.is_top1, layout, mask)
        return spread(outputs.log_probs, layout, mask), mask, hits, None

    def under_noise(self, model: nn.Module, score: Callable[[], Any]) -> Any:
        """A pass over demonstrations, with NEFTune's noise on the embeddings where it is asked for."""
        alpha = self.args.neftune_noise_alpha
        if alpha is None:
            return score()
        # Its scale is that of a row's length, which a packed pass does not have.
        packs, self._packs = self._packs, False
        hook = activate_neftune(model, alpha, self.accelerator)
        try:
            return score()
        finally:
            deactivate_neftune(model, hook, self.accelerator)
            self._packs = packs

    # Rollouts without a gradient

    def _compute_loss(self, model: nn.Module, inputs: dict[str, Any]) -> torch.Tensor:
        rows = self.live_rollouts(inputs)
        if rows is not None:
            others, tool_mask = inputs.get("old_per_token_logps"), inputs.get("tool_mask", 1)
            self._live = _Live(rows, others, self.scores_every_rollout(model, inputs), tool_mask)
        try:
            return super()._compute_loss(model, inputs)
        finally:
            self._live = None

    def live_rollouts(self, inputs: dict[str, Any]) -> torch.Tensor | None:
        """
        Which rollouts of a micro-batch the loss has a gradient for; `None` where all of them are run.

        Shapes: returns (B,).
        """
        if not (self._packs and self.model.training and self.trains_by_advantage) or self.beta != 0.0:
            return None
        return _with_advantage(inputs) if self._micro_batches_add_up else None

    @property
    def _micro_batches_add_up(self) -> bool:
        """Whether a token's part of the loss is the same in any micro-batch."""
        return self.loss_type != "bnpo" and not self._entropy_bonus_enabled and self.top_entropy_quantile == 1.0

    def scores_every_rollout(self, model: nn.Module, inputs: dict[str, Any]) -> bool:
        """Whether a pass has to score rollouts that it does not train on. Here never."""
        return False

    # Which micro-batch a rollout is in

    def _prepare_inputs(self, generation_batch: Any) -> Any:
        before: Any = self._buffered_inputs
        inputs = super()._prepare_inputs(generation_batch)
        if not self._packs or not self.model.training:
            return inputs
        if not self._packing_is_checked:
            self._check_packing(completions_of(inputs))
        steps = self.args.steps_per_generation
        is_new = self._packs and self._buffered_inputs is not before
        if is_new and self.trains_by_advantage and self._micro_batches_add_up:
            window = min(steps, self.args.gradient_accumulation_steps)
            if max(steps, self.args.gradient_accumulation_steps) % window == 0:
                buffered: Any = self._buffered_inputs
                windows = [buffered[start : start + window] for start in range(0, steps, window)]
                self._buffered_inputs = [batch for batches in windows for batch in self._deal(batches)]
                inputs = self._buffered_inputs[self._step % steps]
        return inputs

    def _deal(self, batches: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """The rows of a window's micro-batches on all ranks, dealt anew. Collective."""
        rows = {name: v for name, v in batches[0].items() if isinstance(v, torch.Tensor) and v.dim() > 0}
        whole = {name: self._from_all_ranks(name, torch.cat([batch[name] for batch in batches])) for name in rows}
        ids, mask = whole["prompt_ids"].tolist(), whole["prompt_mask"].tolist()
        keys = [tuple(i for i, there in zip(*row, strict=True) if there) for row in zip(ids, mask, strict=True)]
        costs = whole["completion_mask"].sum(dim=1)
        if self.beta == 0.0 and SCORES not in whole:
            costs = costs * _with_advantage(whole)
        size, ranks = len(batches[0]["prompt_ids"]), self.accelerator.num_processes
        dealt = deal(keys, costs.tolist(), [len(key) for key in keys], len(batches) * ranks, size)
        mine = []
        for number in range(len(batches)):
            # Each micro-batch has its like on every rank; ranks take turns in having the longest.
            turn = dealt[number * ranks : (number + 1) * ranks][:: -1 if number % 2 else 1]
            mine.append(turn[self.accelerator.process_index])
        return [{**batches[0], **{name: value[own] for name, value in whole.items()}} for own in mine]

    def _from_all_ranks(self, name: str, value: torch.Tensor) -> torch.Tensor:
        if self.accelerator.num_processes == 1:
            return value
        if value.dim() > 1:
            fill, left = filler(name, self._tokenizer.pad_token_id), name.startswith("prompt")
            value = self.accelerator.pad_across_processes(value, dim=1, pad_index=fill, pad_first=left)
        return self.accelerator.gather(value)

    # Whether it is right on this model

    def _check_packing(self, inputs: Completions) -> None:
        """Compare a packed pass over rollouts with the padded one, and give packing up where they differ. Collective."""
        model: Any = self.model_wrapped
        inputs = _a_few(*inputs)
        there, has_graph = inputs[1][:, -inputs[2] :], torch.is_grad_enabled()
        self._packing_is_checked = True

        def score(packs: bool) -> torch.Tensor:
            self._packs = packs
            # This layer's own: a method's may count on the rows of its generation batch.
            return PackedTrainer._get_per_token_logps_and_entropies(self, model, *inputs)[0] * there

        plain: Any = self.accelerator.unwrap_model(model)
        checkpointing: Any = self.args.gradient_checkpointing_kwargs or {}
        work = list(self._work)
        with forked_torch_rng(self.accelerator.device), self.backend.earlier_pass(model):
            error = disagreement(
                lambda: score(True),
                lambda: score(False),
                plain.get_input_embeddings(),
                # DeepSpeed's backward is the engine's own, and a reentrant checkpoint has no gradient but of weights.
                with_gradient=has_graph and not (self.is_deepspeed_enabled or checkpointing.get("use_reentrant")),
            )
        self._packs, self._work = True, work
        found = self.accelerator.gather(torch.tensor([[error, there.sum()]], device=self.accelerator.device))
        worst, tokens = found.max(dim=0).values.tolist()
        # Where all completions are truncated, there is nothing to compare.
        self._packing_is_checked = has_graph and tokens > 0
        exact = self.accelerator.mixed_precision == "no" and plain.dtype.itemsize >= 4
        tolerance = _TOLERANCE_FLOAT32 if exact else _TOLERANCE_16_BITS
        if not worst <= tolerance:
            self._pad(
                f"on the first rollouts the packed pass differs from the padded one by {worst:.1e}, more than "
                f"{tolerance:.0e}; please report the model"
            )

    # Metrics

    def _count(self, positions: int, inputs: Completions, rows: Sequence[int]) -> None:
        if torch.is_grad_enabled() and self.model.training:
            self._work[0] += positions
            shared = self._packs and self.args.share_prompts
            self._work[1] += positions if shared else positions_needed(*inputs, rows)

    def record_work(self) -> None:
        """Record the share of useful positions among those of an update's RL passes. Collective."""
        work, self._work = torch.tensor(self._work, device=self.accelerator.device), [0, 0]
        run_, needed = self.accelerator.reduce(work, reduction="sum").tolist()
        if run_:
            self._metrics["train"]["efficiency/useful_tokens"].append(needed / run_)


def _a_few(ids: torch.Tensor, mask: torch.Tensor, length: int, most: int = 4) -> Completions:
    """Rollouts of one prompt: a micro-batch may fit without padding only."""
    first = int(mask[:, -length:].any(dim=1).long().argmax())  # with tokens, where there is one
    alike = (ids[:, :-length] == ids[first, :-length]).all(dim=1)
    rows = alike.nonzero().flatten()
    rows = torch.cat([rows[rows == first], rows[rows != first]])[:most]
    return ids[rows], mask[rows], length


def _with_advantage(inputs: dict[str, Any]) -> torch.Tensor:
    """Rows whose advantage is not exactly zero, (B,); nearly is not enough: TRL's mean of equal rewards may round."""
    moves = inputs["advantages"] != 0.0
    return moves if moves.dim() == 1 else moves.any(dim=1)

"""An optimizer step of SFT between two RL updates."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from .._upstream import DataCollatorForLanguageModeling
from ..objectives.sft import demonstration_loss
from ..training.backends import Backend
from ..training.checkpoint.sharded_state import ShardedState
from ..training.engine_steps import EngineSteps
from ..training.randomness import forked_torch_rng


# Tokens of a prompt and of its completion.
Demonstration = tuple[list[int], list[int]]


class SFTPass:
    """
    Trains the student on a set of demonstrations, in one optimizer step.

    The loss is the mean NLL at temperature 1 over the completions' `own` tokens, of all ranks together. Gradients are zero
    before and after; random numbers of RL go on as if there had been no pass. `own_optimizer` builds the pass's own
    optimizer of named parameters; without one the steps are additional ones of the student's.
    """

    def __init__(
        self,
        model: nn.Module,
        wrapped: nn.Module,
        backend: Backend,
        collator: DataCollatorForLanguageModeling,
        score: Callable[[nn.Module, dict[str, torch.Tensor]], tuple[Any, ...]],
        *,
        own: Callable[[list[int]], list[bool]],
        batch_size: int,
        max_grad_norm: float,
        own_optimizer: Callable[[dict[str, nn.Parameter]], torch.optim.Optimizer] | None,
    ):
        self._backend = backend
        self._collator = collator
        self._score_rows = score
        self._own = own
        self.batch_size = batch_size
        self.max_grad_norm = max_grad_norm
        self.optimizer: torch.optim.Optimizer | None = None
        self._engine = EngineSteps(wrapped) if backend.steps_in_backward else None
        self._engine_state_is_own = own_optimizer is not None
        self._parameters = list(model.parameters())
        # Kept from here on: forwards hide the weights that FSDP holds behind gathered ones.
        self._held = backend.weights(model)
        self._leaves: dict[str, nn.Parameter] = {}
        if own_optimizer is not None and self._engine is None:
            self._leaves = self._held.leaves()
            self.optimizer = own_optimizer(
                {n: leaf for n, leaf in self._leaves.items() if self._held.parameters[n].requires_grad}
            )

    @property
    def saved(self) -> ShardedState | None:
        """State of the pass's own optimizer; `None` where it has none, or where an engine has it."""
        if self.optimizer is None:
            return None
        return ShardedState(self._held, self._leaves, self.optimizer, with_weights=False)

    def state_dict(self) -> dict[Any, Any] | None:
        """What this rank's engine has of the pass's own optimizer; `None` where none has."""
        return self._engine.state_dict() if self._engine is not None and self._engine_state_is_own else None

    def load_state_dict(self, state: dict[Any, Any] | None) -> None:
        """Take over what `state_dict` returned."""
        if self._engine is not None and state is not None:
            self._engine.load_state_dict(state)

    def run(
        self,
        model: nn.Module,
        demonstrations: Sequence[Demonstration],
        student_optimizer: torch.optim.Optimizer,
        rate: float | None,
    ) -> dict[str, float]:
        """
        Take the step, at the own optimizer's rate or with the student's. Collective: every rank calls, with the same
        demonstrations.
        """
        world_size, rank, device = self._backend.world_size, self._backend.rank, self._backend.device
        share = demonstrations[rank::world_size]
        # As many passes as the rank with the largest share needs.
        passes = -(-len(demonstrations) // (world_size * self.batch_size))
        num_tokens = sum(sum(self._own(completion)) for _, completion in demonstrations)
        model.zero_grad()
        total = torch.zeros((), dtype=torch.float64, device=device)
        with forked_torch_rng(device):
            for index in range(passes):
                rows = share[index * self.batch_size : (index + 1) * self.batch_size]
                if index < passes - 1:
                    with self._backend.earlier_pass(model):
                        loss, sums = self._loss(model, rows, demonstrations[:1], num_tokens)
                        self._backend.backward(loss)
                else:
                    loss, sums = self._loss(model, rows, demonstrations[:1], num_tokens)
                    grad_norm = self._step(loss, student_optimizer, rate)
                total += sums["nll_sum"]
        model.zero_grad()
        return {"loss": self._backend.accelerator.reduce(total).item() / num_tokens, "grad_norm": grad_norm}

    def _score(self, model: nn.Module, rows: Sequence[Demonstration]) -> tuple[torch.Tensor, torch.Tensor]:
        """Log-probabilities and mask of trained tokens, (B, T - 1) each."""
        features = [
            {"input_ids": prompt + completion, "labels": [-100] * len(prompt) + self._labels(completion)}
            for prompt, completion in rows
        ]
        batch = dict(self._collator(features))
        inputs = {name: batch[name].to(self._backend.device) for name in ("input_ids", "attention_mask", "labels")}
        log_probs, mask, *_ = self._score_rows(model, inputs)
        return log_probs, mask

    def _labels(self, completion: list[int]) -> list[int]:
        return [token if own else -100 for token, own in zip(completion, self._own(completion), strict=True)]

    def _loss(
        self, model: nn.Module, rows: Sequence[Demonstration], filler: Sequence[Demonstration], num_tokens: int
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        log_probs, mask = self._score(model, rows or filler)
        # A rank that has run out of demonstrations runs a pass that trains on nothing.
        mask = mask & bool(rows)
        return demonstration_loss(log_probs, mask, None, num_tokens, self._backend.world_size)

    def _step(self, loss: torch.Tensor, student_optimizer: torch.optim.Optimizer, rate: float | None) -> float:
        """Last backward and step; the norm of the gradient before clipping."""
        if self._engine is not None:
            with self._engine.instead(self.max_grad_norm, rate):
                self._backend.last_backward(loss)
            return float(self._engine.engine.get_global_grad_norm())
        self._backend.last_backward(loss)
        limit = self.max_grad_norm if self.max_grad_norm > 0 else float("inf")
        grad_norm = nn.utils.clip_grad_norm_([p for p in self._parameters if p.grad is not None], limit)
        if self.optimizer is None:
            student_optimizer.step()
        else:
            self._held.refresh(self._leaves)
            for group in self.optimizer.param_groups:
                group["lr"] = rate
            self.optimizer.step()
            self.optimizer.zero_grad()
        return (grad_norm.full_tensor() if isinstance(grad_norm, DTensor) else grad_norm).item()

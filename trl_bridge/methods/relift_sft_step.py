"""An optimizer step of SFT between two RL updates."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

from .._upstream import decay_groups, optimizer_for
from ..objectives.sft import demonstration_loss
from ..training.checkpoint.sharded_state import RowState
from ..training.engine_steps import EngineSteps
from ..training.randomness import forked_torch_rng
from ..training.rates import rate_factor


if TYPE_CHECKING:
    from ..training.student import StudentTrainer

# Tokens of a prompt and of its completion.
Demonstration = tuple[list[int], list[int]]


class SFTPass:
    """
    Trains the student on a set of demonstrations, in one optimizer step.

    The loss is the mean NLL at temperature 1 over the completions' tokens, of all ranks together. Gradients are zero
    before and after; random numbers of RL go on as if there had been no pass.
    """

    def __init__(
        self, trainer: "StudentTrainer", *, batch_size: int, max_grad_norm: float, learning_rate: float | None
    ):
        self.trainer: Any = trainer
        self.batch_size = batch_size
        self.max_grad_norm = max_grad_norm
        self.learning_rate = learning_rate
        self.optimizer: torch.optim.Optimizer | None = None
        args: Any = self.trainer.args
        backend = self.trainer.backend
        self._engine = EngineSteps(self.trainer.model_wrapped) if backend.steps_in_backward else None
        model: Any = self.trainer.model
        # Kept from here on: forwards hide the weights that FSDP holds behind gathered ones.
        self._held = backend.weights(model)
        self._leaves: dict[str, nn.Parameter] = {}
        if learning_rate is not None and self._engine is None:
            self._leaves = self._held.leaves()
            trained = {n: leaf for n, leaf in self._leaves.items() if self._held.parameters[n].requires_grad}
            groups = decay_groups(self.trainer, model, trained, args.weight_decay)
            self.optimizer = optimizer_for(self.trainer, groups, learning_rate, args.optim)
        self._collator = DataCollatorForLanguageModeling(
            pad_token_id=self.trainer._tokenizer.pad_token_id, pad_to_multiple_of=args.pad_to_multiple_of
        )

    @property
    def saved(self) -> RowState | None:
        """State of the pass's own optimizer; `None` where it has none, or where an engine has it."""
        if self.optimizer is None:
            return None
        return RowState(self._held, self._leaves, self.optimizer, with_weights=False)

    def engine_state_dict(self) -> dict[Any, Any] | None:
        """What this rank's engine has of the pass's own optimizer; `None` where none has."""
        return None if self._engine is None or self.learning_rate is None else self._engine.state_dict()

    def load_engine_state_dict(self, state: dict[Any, Any] | None) -> None:
        """Take over what `engine_state_dict` returned."""
        if self._engine is not None and state is not None:
            self._engine.load_state_dict(state)

    def run(self, demonstrations: Sequence[Demonstration]) -> dict[str, float]:
        """Take the step. Collective: every rank calls, with the same demonstrations."""
        trainer = self.trainer
        world_size, rank = trainer.backend.world_size, trainer.backend.rank
        share = demonstrations[rank::world_size]
        # As many passes as the rank with the largest share needs.
        passes = -(-len(demonstrations) // (world_size * self.batch_size))
        num_tokens = sum(len(completion) for _, completion in demonstrations)
        model = trainer.model_wrapped
        model.zero_grad()
        total = torch.zeros((), dtype=torch.float64, device=trainer.accelerator.device)
        with forked_torch_rng(trainer.accelerator.device):
            for index in range(passes):
                rows = share[index * self.batch_size : (index + 1) * self.batch_size]
                if index < passes - 1:
                    with trainer.backend.earlier_pass(model):
                        loss, sums = self._loss(model, rows, demonstrations[:1], num_tokens)
                        trainer.backend.backward(loss)
                else:
                    loss, sums = self._loss(model, rows, demonstrations[:1], num_tokens)
                    grad_norm = self._step(loss)
                total += sums["nll_sum"]
        model.zero_grad()
        return {"loss": trainer.accelerator.reduce(total).item() / num_tokens, "grad_norm": grad_norm}

    def _score(self, model: nn.Module, rows: Sequence[Demonstration]) -> tuple[torch.Tensor, torch.Tensor]:
        """Log-probabilities and mask of trained tokens, (B, T - 1) each."""
        features = [
            {"input_ids": prompt + completion, "labels": [-100] * len(prompt) + completion}
            for prompt, completion in rows
        ]
        batch = dict(self._collator(features))
        device = self.trainer.accelerator.device
        inputs = {name: batch[name].to(device) for name in ("input_ids", "attention_mask", "labels")}
        with self.trainer.accelerator.autocast():
            outputs = model(**inputs, use_cache=False, demonstration_head=True)
        return outputs.log_probs, outputs.label_mask

    def _loss(
        self, model: nn.Module, rows: Sequence[Demonstration], filler: Sequence[Demonstration], num_tokens: int
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        log_probs, mask = self._score(model, rows or filler)
        # A rank that has run out of demonstrations runs a pass that trains on nothing.
        mask = mask & bool(rows)
        return demonstration_loss(log_probs, mask, None, num_tokens, self.trainer.backend.world_size)

    def _step(self, loss: torch.Tensor) -> float:
        """Last backward and step; the norm of the gradient before clipping."""
        rate = None
        if self.learning_rate is not None:
            rate = self.learning_rate * rate_factor(self.trainer.optimizer)
        if self._engine is not None:
            with self._engine.instead(self.max_grad_norm, rate):
                self.trainer.backend.last_backward(loss)
            return float(self._engine.engine.get_global_grad_norm())
        self.trainer.backend.last_backward(loss)
        parameters = [p for p in self.trainer.model.parameters() if p.grad is not None]
        limit = self.max_grad_norm if self.max_grad_norm > 0 else float("inf")
        grad_norm = nn.utils.clip_grad_norm_(parameters, limit)
        if self.optimizer is None:
            self.trainer.optimizer.step()
        else:
            self._held.refresh(self._leaves)
            for group in self.optimizer.param_groups:
                group["lr"] = rate
            self.optimizer.step()
            self.optimizer.zero_grad()
        return (grad_norm.full_tensor() if isinstance(grad_norm, DTensor) else grad_norm).item()

"""An optimizer step of SFT between two RL updates."""

import contextlib
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

from .._upstream import decay_groups, optimizer_for
from ..objectives.sft import demonstration_loss
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

    Args:
        trainer ([`StudentTrainer`](training.student.StudentTrainer)):
            Trainer whose student is prepared for training.
        batch_size (`int`):
            Demonstrations in each micro-batch on each device.
        max_grad_norm (`float`):
            Norm to which the gradient is clipped. 0 is no clipping.
        learning_rate (`float`, *optional*):
            Base rate of an optimizer of the pass's own, of the kind `args.optim`. It follows the schedule of the
            student's. `None` takes a step with the student's optimizer.
    """

    def __init__(
        self, trainer: "StudentTrainer", *, batch_size: int, max_grad_norm: float, learning_rate: float | None
    ):
        self.trainer: Any = trainer
        self.batch_size = batch_size
        self.max_grad_norm = max_grad_norm
        self.optimizer: torch.optim.Optimizer | None = None
        args: Any = self.trainer.args
        if learning_rate is not None:
            model: Any = self.trainer.model
            trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
            groups = decay_groups(self.trainer, model, trained, args.weight_decay)
            self.optimizer = optimizer_for(self.trainer, groups, learning_rate, args.optim)
        self._collator = DataCollatorForLanguageModeling(
            pad_token_id=self.trainer._tokenizer.pad_token_id, pad_to_multiple_of=args.pad_to_multiple_of
        )

    def run(self, demonstrations: Sequence[Demonstration]) -> dict[str, float]:
        """
        Take the step. Collective: every rank calls, with the same demonstrations.

        Args:
            demonstrations (`Sequence[Demonstration]`):
                At least one.

        Returns:
            `dict[str, float]`: `loss` (nats per token, before the step) and `grad_norm` (before clipping), the same on
            every rank.
        """
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
                earlier = trainer.backend.earlier_pass(model) if index < passes - 1 else contextlib.nullcontext()
                with earlier:
                    log_probs, mask = self._score(model, rows or demonstrations[:1])
                    # A rank that has run out of demonstrations runs a pass that trains on nothing.
                    mask = mask & bool(rows)
                    loss, sums = demonstration_loss(log_probs, mask, None, num_tokens, world_size)
                    trainer.backend.backward(loss)
                total += sums["nll_sum"]
        grad_norm = self._step()
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

    def _step(self) -> float:
        parameters = [p for p in self.trainer.model.parameters() if p.grad is not None]
        limit = self.max_grad_norm if self.max_grad_norm > 0 else float("inf")
        grad_norm = nn.utils.clip_grad_norm_(parameters, limit).item()
        if self.optimizer is None:
            self.trainer.optimizer.step()
        else:
            for group in self.optimizer.param_groups:
                group["lr"] = group["initial_lr"] * rate_factor(self.trainer.optimizer)
            self.optimizer.step()
        return grad_norm

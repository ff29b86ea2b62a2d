"""Optimizer steps of a DeepSpeed engine that are not the student's own."""

import contextlib
from collections import defaultdict
from collections.abc import Iterator
from typing import Any

import torch


class EngineSteps:
    """
    Steps with a clipping of their own and, where wanted, a learning rate and an optimizer state of their own.

    The engine holds the float32 master in pieces and takes gradients away as they come, so a second optimizer has
    nothing to read. Its own one takes these steps too, with its state exchanged for ours meanwhile.
    """

    def __init__(self, engine: Any):
        self.engine = engine
        self._state: dict[torch.Tensor, dict[str, Any]] = defaultdict(dict)

    @contextlib.contextmanager
    def instead(self, max_grad_norm: float, learning_rate: float | None) -> Iterator[None]:
        """While inside, the engine steps as told here."""
        sharded = self.engine.optimizer
        optimizer = sharded.optimizer
        groups = optimizer.param_groups
        clip, state, rates = sharded.clip_grad, optimizer.state, [group["lr"] for group in groups]
        sharded.clip_grad = max_grad_norm
        if learning_rate is not None:
            optimizer.state = self._state
            for group in groups:
                group["lr"] = learning_rate
        try:
            yield
        finally:
            sharded.clip_grad, optimizer.state = clip, state
            for group, rate in zip(groups, rates, strict=True):
                group["lr"] = rate

    def state_dict(self) -> dict[int, dict[str, Any]]:
        """State of the pieces of the master that this rank holds, by their number."""
        return {number: dict(self._state[piece]) for number, piece in enumerate(self._pieces) if piece in self._state}

    def load_state_dict(self, states: dict[int, dict[str, Any]]) -> None:
        """Take over what `state_dict` returned on this rank."""
        defaults, pieces = self.engine.optimizer.optimizer.defaults, self._pieces
        # As torch has it: the count of steps stays on the CPU unless a kernel reads it.
        counts_there = bool(defaults.get("fused") or defaults.get("capturable"))
        self._state = defaultdict(dict)
        for number, state in states.items():
            device = pieces[number].device
            self._state[pieces[number]] = {
                name: value.to(device) if torch.is_tensor(value) and (counts_there or name != "step") else value
                for name, value in state.items()
            }

    @property
    def _pieces(self) -> list[torch.Tensor]:
        sharded = self.engine.optimizer
        # ZeRO-3 steps one piece after the other, and takes them out of the optimizer between.
        spread = getattr(sharded, "fp32_partitioned_groups_flat", None)
        return list(spread or [piece for group in sharded.optimizer.param_groups for piece in group["params"]])

"""The projection of a model's accumulated gradient onto A and B."""

import functools

import torch

from ..training.backends import Weights
from .targets import Projection, Target


class CoordinatorGradient:
    """
    A and B's part of a model's accumulated gradient.

    Args:
        weights ([`Weights`]):
            The model's weights.
    """

    def __init__(self, weights: Weights):
        self.weights = weights

    def so_far(self) -> Projection:
        """What this rank's gradients come to by now; `complete_` makes the whole of it."""
        raise NotImplementedError

    def complete_(self, projection: Projection, synced: bool) -> None:
        """
        Reduce over ranks, in place.

        Args:
            projection (`list[tuple[torch.Tensor, torch.Tensor]]`):
                A linear function of what `so_far` returned.
            synced (`bool`):
                Whether the window's last backward is over.
        """
        self.weights.complete_([part for pair in projection for part in pair], synced)

    def whole(self) -> Projection:
        """At the end of a window: all of it, averaged over ranks."""
        projection = self.so_far()
        self.complete_(projection, synced=True)
        return projection

    def clear(self) -> None:
        """When it has been read, or a window starts anew."""
        raise NotImplementedError


class ProjectedGradient(CoordinatorGradient):
    """
    Projects the gradient that has come together so far, on whatever way of training.

    Where the engine takes gradients away (DeepSpeed), each is projected as it comes, and the sums are kept here.

    Args:
        targets (`list[Target]`):
            Give A and B.
        weights ([`Weights`]):
            The model's weights.
    """

    def __init__(self, targets: list[Target], weights: Weights):
        super().__init__(weights)
        self.targets = targets
        self._sums: Projection | None = None
        if weights.watched:
            self._sums = [(torch.zeros_like(t.a.data), torch.zeros_like(t.b.data)) for t in targets]
            for target, sums in zip(targets, self._sums, strict=True):
                weights.watch(target.weight_name, functools.partial(_add, target, sums))

    def so_far(self) -> Projection:
        if self._sums is not None:
            return [(a.clone(), b.clone()) for a, b in self._sums]
        projection = []
        for target in self.targets:
            gradient = self.weights.gradient(target.weight_name).to(target.a.device)  # an offloaded one is on the CPU
            projection.append(target.project(gradient, self.weights.bounds(target.weight_name)[0]))
        return projection

    def clear(self) -> None:
        for pair in self._sums or []:
            for part in pair:
                part.zero_()


def _add(target: Target, sums: tuple[torch.Tensor, torch.Tensor], gradient: torch.Tensor) -> None:
    with torch.no_grad():
        for total, part in zip(sums, target.project(gradient), strict=True):
            total += part

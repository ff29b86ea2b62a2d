"""The weights of a model and their gradients, as this rank stores them: full, or a shard (some rows) of each."""

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from .reducer import Reducer


# Rows first to last of an addition to a weight, in the weight's own orientation.
Rows = Callable[[int, int], torch.Tensor]
# Rows, and columns where there are, of a weight.
Part = tuple[slice, ...]


class Weights:
    """Full on each rank: one process, or DDP's replicas."""

    # Whether each rank stores only some rows.
    sharded = False
    # Whether gradients must be read as they come (`register_grad_hook`), because the engine takes them away.
    needs_grad_hooks = False

    def __init__(self, model: nn.Module | Mapping[str, nn.Parameter], backend: Reducer):
        self.backend = backend
        named = model.named_parameters() if isinstance(model, nn.Module) else model
        self.parameters: dict[str, nn.Parameter] = dict(named)

    def shape(self, name: str) -> torch.Size:
        """Shape of the full weight."""
        return self.parameters[name].shape

    def bounds(self, name: str) -> tuple[int, int]:
        """First row of this rank's shard, and the one after its last."""
        return 0, self.parameters[name].size(0)

    def rows(self, name: str, first: int, last: int) -> torch.Tensor:
        """Rows of a weight, not to be written to. Collective where weights are sharded."""
        return self.parameters[name].detach()[first:last]

    def full(self, name: str) -> torch.Tensor:
        """A full weight on every rank, not to be written to. Collective where weights are sharded."""
        return self.parameters[name].detach()

    def shards(self) -> dict[str, torch.Tensor]:
        """This rank's shard of each weight, by name, to be written to."""
        return {name: parameter.detach() for name, parameter in self.parameters.items()}

    @contextlib.contextmanager
    def replaced(self, values: Mapping[str, torch.Tensor]) -> Iterator[None]:
        """Passes with other values in the place of what `shards` returns. Collective."""
        own = {name: self.parameters[name].data for name in values}
        try:
            for name, value in values.items():
                self.parameters[name].data = value.to(own[name])
            yield
        finally:
            for name, value in own.items():
                self.parameters[name].data = value

    def gradient(self, name: str) -> torch.Tensor:
        """Accumulated gradient of this rank's shard; zero where no loss has reached it."""
        return gradient_of(self.parameters[name])

    def register_grad_hook(self, name: str, hook: Callable[[torch.Tensor], torch.Tensor | None]) -> None:
        """
        Call a function with each gradient of a full weight, of this rank and before any reduction; what it returns takes
        the gradient's place.
        """
        self.parameters[name].register_hook(hook)

    def onload(self) -> None:
        """Before a pass: the model computes with the weights as they are now."""

    def offload(self) -> None:
        """After a window's last pass: nothing is computed until `onload`."""

    def leaves(self) -> dict[str, nn.Parameter]:
        """What an ordinary optimizer steps on, by name."""
        return self.parameters

    def refresh(self, leaves: Mapping[str, nn.Parameter]) -> None:
        """Put shards and gradients into what `leaves` returned, before the optimizer steps."""

    def clear_gradients(self) -> None:
        """Forget the accumulated gradient."""
        for parameter in self.parameters.values():
            parameter.grad = None

    def add_(self, name: str, rows: Rows) -> None:
        """Add to a weight what a function of first and last row returns."""
        weight = self.parameters[name].detach()
        weight.add_(rows(*self.bounds(name)).to(weight))

    def write_(self, name: str, part: Part, values: torch.Tensor) -> None:
        """Overwrite a part of a weight, between two updates."""
        self.parameters[name].detach()[part] = values.to(self.parameters[name].dtype)

    def reduce_unsynced_(self, tensors: Iterable[torch.Tensor]) -> None:
        """Average over ranks what was read off gradients before the window's last backward, in place."""
        self.backend.average_(tensors)

    def reduce_shards_(self, tensors: Iterable[torch.Tensor]) -> None:
        """Sum over ranks what was read off each one's shards, in place."""

    def reduce_(self, tensors: Iterable[torch.Tensor], synced: bool) -> None:
        """Make linear functions of the gradients on this rank those of the full gradient, averaged over ranks."""
        tensors = list(tensors)
        if not synced:
            self.reduce_unsynced_(tensors)
        self.reduce_shards_(tensors)


class ShardedWeights(Weights):
    """Sharded by rows, as `fully_shard` does; every backward leaves the average of this rank's shard."""

    sharded = True

    def bounds(self, name: str) -> tuple[int, int]:
        parameter = self.parameters[name]
        # As `torch.chunk` cuts: the last ranks may have fewer rows, or none.
        size = -(-parameter.size(0) // self.backend.world_size)
        first = min(self.backend.rank * size, parameter.size(0))
        return first, min(first + size, parameter.size(0))

    def rows(self, name: str, first: int, last: int) -> torch.Tensor:
        if (first, last) == self.bounds(name):
            return local(self.parameters[name].detach())
        return self.full(name)[first:last]

    def full(self, name: str) -> torch.Tensor:
        # NCCL cannot gather shards on the CPU.
        return self.parameters[name].detach().to(self.backend.device).full_tensor()

    def shards(self) -> dict[str, torch.Tensor]:
        return {name: local(parameter.detach()) for name, parameter in self.parameters.items()}

    def gradient(self, name: str) -> torch.Tensor:
        return local(gradient_of(self.parameters[name]))

    def leaves(self) -> dict[str, nn.Parameter]:
        return {name: nn.Parameter(piece) for name, piece in self.shards().items()}

    def refresh(self, leaves: Mapping[str, nn.Parameter]) -> None:
        # FSDP may move its shards to other memory, at its first forward.
        for name, piece in self.shards().items():
            leaves[name].data = piece
            leaves[name].grad = self.gradient(name)

    def add_(self, name: str, rows: Rows) -> None:
        weight = local(self.parameters[name].detach())
        weight.add_(rows(*self.bounds(name)).to(weight))

    def write_(self, name: str, part: Part, values: torch.Tensor) -> None:
        held, given = overlap(self.bounds(name), part[0])
        piece = local(self.parameters[name].detach())
        piece[held, part[1]] = values[given].to(piece)

    def reduce_unsynced_(self, tensors: Iterable[torch.Tensor]) -> None:
        """Nothing: each backward has averaged already."""

    def reduce_shards_(self, tensors: Iterable[torch.Tensor]) -> None:
        self.backend.sum_(tensors)


def gradient_of(parameter: nn.Parameter) -> torch.Tensor:
    """The gradient of a parameter; zero where no loss has reached it."""
    return torch.zeros_like(parameter) if parameter.grad is None else parameter.grad


def overlap(bounds: tuple[int, int], rows: slice) -> tuple[slice, slice]:
    """Where a rank's rows and a part's rows overlap: counted from the first of those, and of these."""
    first, last = max(bounds[0], rows.start), min(bounds[1], rows.stop)
    last = max(first, last)
    return slice(first - bounds[0], last - bounds[0]), slice(first - rows.start, last - rows.start)


def local(tensor: torch.Tensor) -> torch.Tensor:
    """This rank's shard of a tensor, sharing its memory."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def trained(model: nn.Module) -> dict[str, nn.Parameter]:
    """The weights that are trained, by name."""
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def copy_rows_(pieces: Mapping[str, torch.Tensor], holder: Weights, source: Weights) -> None:
    """Overwrite a rank's shards of one model with those rows of another. Collective."""
    with torch.no_grad():
        for name, piece in pieces.items():
            piece.copy_(source.rows(name, *holder.bounds(name)))

"""What a checkpoint holds besides TRL's own, and what a resumed run must have in common with it."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

from .drift import as_json, options_of
from .layout import totals


SHARED, LOCAL, SHARDED = "shared", "local", "sharded"


@dataclass
class Value:
    """A part that is a plain value: how it is read, and how it is set."""

    state_dict: Callable[[], Any]
    load_state_dict: Callable[[Any], None]


def attribute(owner: object, name: str) -> Value:
    """A part that is an attribute of an object."""
    return Value(partial(getattr, owner, name), partial(setattr, owner, name))


class Registry:
    """The parts of a run's state: what each is, how it is stored, and what must match when it is loaded."""

    def __init__(self, args: Any):
        self.args = args
        # How an update is cut into ranks and micro-batches. A resumed run may cut the same rows otherwise (`layout.totals`).
        self.layout: dict[str, int] = {}
        # Why the run must be resumed on the same number of ranks; None if any number works.
        self.only_same_ranks: str | None = None
        # What a run decides at its first start, as JSON values, and takes over where it is resumed.
        self.first_start: dict[str, Any] = {}
        self.parts: dict[str, dict[str, Any]] = {SHARED: {}, LOCAL: {}, SHARDED: {}}
        self.of_weights: list[str] = []
        # By a local part's name: makes a rank's state of those of all ranks that wrote it, and of their layout.
        self.reshard: dict[str, Callable[[list[Any], dict[str, int]], Any]] = {}
        self._matched: dict[str, Any] = {}
        # What a resumed run may have otherwise, and says then.
        self.told = options_of(args)

    def add(
        self, name: str, part: Any, how: str, of_weights: bool = False, only_same_ranks: str | None = None
    ) -> None:
        """
        Add a part.

        `SHARED` and `LOCAL` ones have `state_dict` and `load_state_dict`, of tensors and plain values as
        `torch.load(weights_only=True)` takes them. A shared one is the same on all ranks and written by the main process;
        with `of_weights` it comes back with the best checkpoint's weights. Of a local one each rank has its own, and ranks
        of another number all take the first one's, unless `reshard` says otherwise. `SHARDED` ones are `ShardedState`.
        Local ones are loaded first, in the order they were added. `None` is not there: not in this run, or not yet built.
        """
        self.only_same_ranks = only_same_ranks or self.only_same_ranks
        if part is not None:
            self.parts[how][name] = part
            self.of_weights += [name] if of_weights else []

    def must_match(self, *options: str, **values: Any) -> None:
        """What a resumed run must share with the checkpoint: options by their name, and other JSON values."""
        self._matched |= {name: getattr(self.args, name) for name in options} | values

    @property
    def requirements(self) -> dict[str, Any]:
        """All that must match."""
        return self._matched | totals(self.layout)

    @property
    def description(self) -> dict[str, Any]:
        """What the marker says of the run."""
        told = {name: as_json(value) for name, value in self.told.items() if name not in self._matched}
        parts = {"layout": self.layout, "requirements": self.requirements, "first_start": self.first_start}
        return {**parts, "options": told}

    def state(self, how: str) -> dict[str, Any]:
        """State of the shared parts, or of this rank's own."""
        return {name: part.state_dict() for name, part in self.parts[how].items()}

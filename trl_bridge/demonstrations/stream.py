"""The order in which demonstrations are shown: seeded, resumable, the same on every rank."""

import hashlib
from collections import defaultdict
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import torch
from datasets import Dataset


def generator(*entropy: int) -> torch.Generator:
    """A generator of its own for each tuple of numbers (not negative), the same on every rank and machine."""
    state = np.random.SeedSequence(entropy).generate_state(1, np.uint64)[0]
    return torch.Generator().manual_seed(int(state) >> 1)  # torch takes 63 bits without a sign


class DemonstrationStream:
    """
    Draws demonstrations without replacement, epoch by epoch, each epoch shuffled again.

    An epoch's order is made by a generator of its own, seeded from the seed and the epoch: nothing global is touched,
    and every rank draws the same.
    """

    def __init__(self, size: int, seed: int):
        if size < 1:
            raise ValueError(f"`size` of a demonstration stream must be at least 1, got {size}.")
        if seed < 0:
            raise ValueError(f"`seed` of a demonstration stream must not be negative, got {seed}.")
        self.size = size
        self.seed = seed
        self._start(0)

    def _start(self, epoch: int, position: int = 0) -> None:
        self._epoch = epoch
        self._position = position
        self._order = torch.randperm(self.size, generator=generator(self.seed, epoch)).tolist()

    def draw(self, count: int) -> list[int]:
        """The next demonstrations."""
        if count < 0:
            raise ValueError(f"`count` must not be negative, got {count}.")
        drawn: list[int] = []
        while len(drawn) < count:
            if self._position == self.size:
                self._start(self._epoch + 1)
            taken = self._order[self._position : self._position + count - len(drawn)]
            self._position += len(taken)
            drawn += taken
        return drawn

    @property
    def epoch(self) -> float:
        """Epochs consumed, in fractions."""
        return self._epoch + self._position / self.size

    def state_dict(self) -> dict[str, int]:
        """State for a checkpoint: plain integers."""
        return {"size": self.size, "seed": self.seed, "epoch": self._epoch, "position": self._position}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Continue where a saved stream stood."""
        for name, mine in (("size", self.size), ("seed", self.seed)):
            if state[name] != mine:
                raise ValueError(
                    f"The saved demonstration stream has `{name}` {state[name]}, this one {mine}. Resume with the "
                    "`sft_dataset` and the seed that the checkpoint was made with."
                )
        self._start(state["epoch"], state["position"])


def window_share(indices: list[int], micro_batches: int, world_size: int, rank: int) -> list[list[int]]:
    """
    A rank's part of the demonstrations of one accumulation window.

    Micro-batch `m` of rank `r` gets the contiguous slice number `m * world_size + r`, so that the window's
    demonstrations are the same however it is split.
    """
    size, rest = divmod(len(indices), micro_batches * world_size)
    if rest:
        raise ValueError(
            f"`indices`: {len(indices)} demonstrations cannot be shared equally among {micro_batches} micro-batches on "
            f"each of {world_size} ranks."
        )
    starts = [(micro_batch * world_size + rank) * size for micro_batch in range(micro_batches)]
    return [indices[start : start + size] for start in starts]


class PromptIndex:
    """Finds demonstrations by their prompt."""

    def __init__(self, keys: Sequence[str], seed: int):
        if seed < 0:
            raise ValueError(f"`seed` of a prompt index must not be negative, got {seed}.")
        self.seed = seed
        self._indices: dict[str, list[int]] = defaultdict(list)
        for index, key in enumerate(keys):
            self._indices[key].append(index)

    def draw(self, key: str, generation: int, group: int) -> int:
        """One demonstration of a prompt, uniformly among those it has."""
        if key not in self._indices:
            raise KeyError(f"`sft_dataset` has no demonstration of the prompt {key}.")
        candidates = self._indices[key]
        if len(candidates) == 1:
            return candidates[0]
        own = generator(self.seed, generation, group)
        return candidates[int(torch.randint(len(candidates), (), generator=own))]

    def missing(self, keys: Iterable[str]) -> list[str]:
        """Those of the keys that have no demonstration, each once, in order."""
        return [key for key in dict.fromkeys(keys) if key not in self._indices]


def fingerprint(dataset: Dataset) -> str:
    """Hash of a rendered dataset's content, the same in every process and on every machine."""
    digest = hashlib.sha256()
    columns: Any = dataset.select_columns(["input_ids", "labels"]).with_format(None)
    for batch in columns.iter(batch_size=1000):
        for row in zip(batch["input_ids"], batch["labels"], strict=True):
            for values in row:
                # The length keeps rows apart whose concatenations would be equal.
                digest.update(np.array([len(values), *values], dtype="<i8").tobytes())
    return digest.hexdigest()

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
    Draws demonstrations without replacement, epoch by epoch, each epoch shuffled anew.

    An epoch's order is made by a generator of its own, seeded from the seed and the epoch: nothing global is touched,
    and every rank draws the same.

    Args:
        size (`int`):
            Number of demonstrations.
        seed (`int`):
            Seed, not negative.
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
        """
        The next demonstrations.

        Args:
            count (`int`):
                How many. Where it crosses the end of an epoch a demonstration may come twice.

        Returns:
            `list[int]`: their indices, in order.
        """
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
        """
        Continue where a saved stream stood.

        Args:
            state (`dict[str, int]`):
                What [`DemonstrationStream.state_dict`] returned.

        Raises:
            `ValueError`: if it is the state of another number of demonstrations or another seed.
        """
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

    Args:
        indices (`list[int]`):
            Demonstrations of the whole window over all ranks. Their number is a multiple of
            `micro_batches * world_size`.
        micro_batches (`int`):
            Micro-batches of the window on each rank.
        world_size (`int`):
            Number of ranks.
        rank (`int`):
            This rank.

    Returns:
        `list[list[int]]`: the rank's demonstrations, for each micro-batch.
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
    """
    Finds demonstrations by their prompt.

    Args:
        keys (`Sequence[str]`):
            Key of each demonstration's prompt (see [`demonstrations.render.prompt_key`]).
        seed (`int`):
            Seed of the choice among several demonstrations of one prompt, not negative.
    """

    def __init__(self, keys: Sequence[str], seed: int):
        if seed < 0:
            raise ValueError(f"`seed` of a prompt index must not be negative, got {seed}.")
        self.seed = seed
        self._indices: dict[str, list[int]] = defaultdict(list)
        for index, key in enumerate(keys):
            self._indices[key].append(index)

    def draw(self, key: str, generation: int, group: int) -> int:
        """
        One demonstration of a prompt, uniformly among those it has.

        Args:
            key (`str`):
                Key of the prompt.
            generation (`int`):
                Number of the generation batch.
            group (`int`):
                Number of the prompt's group in it, over all ranks. The choice depends on nothing but the seed, these
                two and the prompt.

        Returns:
            `int`: index of the demonstration.

        Raises:
            `KeyError`: if the prompt has none.
        """
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
    """
    Hash of a rendered dataset's content, the same in every process and on every machine.

    Args:
        dataset ([`~datasets.Dataset`]):
            With the columns `input_ids` and `labels`.

    Returns:
        `str`: hexadecimal SHA-256 of the rows' tokens and labels, in order.
    """
    digest = hashlib.sha256()
    columns: Any = dataset.select_columns(["input_ids", "labels"]).with_format(None)
    for batch in columns.iter(batch_size=1000):
        for row in zip(batch["input_ids"], batch["labels"], strict=True):
            for values in row:
                # The length keeps rows apart whose concatenations would be equal.
                digest.update(np.array([len(values), *values], dtype="<i8").tobytes())
    return digest.hexdigest()

"""The global random state: keeping what is ours out of it, and starting it again."""

import contextlib
import random
from collections.abc import Iterator

import numpy as np
import torch
from transformers import set_seed


def seed_anew(*entropy: int) -> None:
    """Seed every global generator from a tuple of numbers (not negative)."""
    set_seed(int(np.random.SeedSequence(entropy).generate_state(1)[0]))


@contextlib.contextmanager
def forked_python_rng() -> Iterator[None]:
    """Put Python's and numpy's global random state back afterwards, as `torch.random.fork_rng` does for torch's."""
    python, numpy = random.getstate(), np.random.get_state()
    try:
        yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)


@contextlib.contextmanager
def forked_torch_rng(device: torch.device) -> Iterator[None]:
    """Put torch's global random state back afterwards, on the CPU and on a device."""
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        yield

"""Keeping what is ours out of the global random state."""

import contextlib
import random
from collections.abc import Iterator

import numpy as np
import torch


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

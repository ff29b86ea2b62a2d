"""One run at a time writes to an output folder."""

import contextlib
import os
import socket
from collections.abc import Iterator
from pathlib import Path

from accelerate import PartialState
from accelerate.utils import broadcast_object_list
from filelock import FileLock, Timeout


# With a `_` in front it is not uploaded with the folder.
LOCK = "_run.lock"


@contextlib.contextmanager
def held(output_dir: str) -> Iterator[None]:
    """
    Hold a folder while a run writes to it, or refuse where another run does. Collective.

    The system lets go of the lock with the process that holds it, however that ends.
    """
    state = PartialState()
    path = Path(output_dir) / LOCK
    lock = FileLock(path, blocking=False)
    refusal = broadcast_object_list([_taken(lock, path) if state.is_main_process else None])[0]
    if refusal is not None:
        raise ValueError(refusal)
    try:
        yield
    finally:
        if lock.is_locked:
            path.unlink(missing_ok=True)  # before it is let go: after that it may be another run's
            lock.release()


def _taken(lock: FileLock, path: Path) -> str | None:
    """Take the lock, or say who has it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        lock.acquire()
    except Timeout:
        holder = path.read_text() or "another process"
        return (
            f"`output_dir`: {str(path.parent)!r} is written to by a run that is alive ({holder}), and two would overwrite "
            "each other's checkpoints. Stop it, or take another folder."
        )
    path.write_text(f"process {os.getpid()} on {socket.gethostname()}")
    return None

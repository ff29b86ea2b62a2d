"""Killable workers for symbolic comparison: one helper process per training process, started when first needed."""

import atexit
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any


Job = tuple[str, ...]
Outcome = bool | str
"""A verdict, or why there is none: `"timeout"`, `"memory"` (its own limits), `"deadline"` (the batch's), `"killed"` (the worker died twice), `"error: ..."`."""

# What the parent waits beyond a batch's deadline before it kills the helper itself.
_GRACE = 1.0
_ATTEMPTS = 3


class _Batch:
    def __init__(self, size: int):
        self.outcomes: dict[int, Outcome] = {}
        self.size = size
        self.finished = threading.Event()
        self.lost = False


class _Helper:
    """The helper process and the thread that reads its verdicts."""

    def __init__(self, workers: int, memory: int):
        package_root = str(Path(__file__).resolve().parents[3])
        path = os.pathsep.join(p for p in (package_root, os.environ.get("PYTHONPATH", "")) if p)
        # multiprocessing leaves its folder behind where it is killed: it gets one of ours.
        self.folder = tempfile.mkdtemp(prefix="trl-bridge-rewards-")
        environment = os.environ | {
            "TMPDIR": self.folder,
            "PYTHONPATH": path, "PYTHONHASHSEED": "0", "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "",
            "PYTHONWARNINGS": "ignore",
        }  # fmt: skip
        # -P: a `types.py` beside the user's script must not shadow the standard library's.
        command = [sys.executable, "-P", "-m", "trl_bridge.rewards.mathematics.pool_host", str(workers), str(memory)]
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment, start_new_session=True
        )
        self.owner = os.getpid()
        self.lock = threading.Lock()
        self.batches: dict[int, _Batch] = {}
        self.count = 0
        self.closed = False
        threading.Thread(target=self._read, name="trl-bridge-rewards", daemon=True).start()

    def alive(self) -> bool:
        # After a fork the pipes are shared with the parent: the child needs a helper of its own.
        return self.owner == os.getpid() and not self.closed and self.process.poll() is None

    def submit(self, jobs: Sequence[Job], limit: float, seconds: float) -> _Batch:
        batch = _Batch(len(jobs))
        with self.lock:
            self.count += 1
            self.batches[self.count] = batch
            message = {"batch": self.count, "jobs": list(jobs), "limit": limit, "seconds": seconds}
            assert self.process.stdin is not None
            if self.closed:
                batch.lost = True
                batch.finished.set()
                return batch
            try:
                self.process.stdin.write(json.dumps(message).encode() + b"\n")
                self.process.stdin.flush()
            except OSError:
                batch.lost = True
                batch.finished.set()
        return batch

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            message: dict[str, Any] = json.loads(line)
            batch = self.batches[message["batch"]]
            if "done" in message:
                del self.batches[message["batch"]]
                batch.finished.set()
            else:
                batch.outcomes[message["index"]] = message["outcome"]
        with self.lock:
            self.closed = True
            for batch in self.batches.values():
                batch.lost = True
                batch.finished.set()

    def kill(self) -> None:
        if self.owner != os.getpid():
            return
        try:
            os.killpg(self.process.pid, signal.SIGKILL)
        except ProcessLookupError:
            pass
        self.process.wait()
        shutil.rmtree(self.folder, ignore_errors=True)


class WorkerPool:
    """
    Pool of worker processes that are killed at a hard limit.

    Works in scripts without a `__main__` guard, in notebooks, under `torchrun` and after CUDA initialisation, since
    nothing of the user's process is forked or run again. Safe to call from several threads.
    """

    def __init__(self, workers: int | None = None, memory_gb: float = 1.0):
        ranks = max(1, int(os.environ.get("LOCAL_WORLD_SIZE", "1")))
        self.workers = workers or max(1, min(8, (os.cpu_count() or 1) // ranks))
        self.memory = int(memory_gb * 1e9)
        self._helper: _Helper | None = None
        self._lock = threading.Lock()
        os.register_at_fork(after_in_child=self._forget)

    def _forget(self) -> None:
        self._helper, self._lock = None, threading.Lock()

    def _running_helper(self) -> _Helper:
        with self._lock:
            if self._helper is None or not self._helper.alive():
                if self._helper is not None:
                    self._helper.kill()
                self._helper = _Helper(self.workers, self.memory)
            return self._helper

    def run(self, jobs: Sequence[Job], limit: float = 5.0, seconds: float = 30.0) -> list[Outcome]:
        """Run a batch of jobs."""
        deadline = time.monotonic() + seconds
        outcomes: dict[int, Outcome] = {}
        missing = list(range(len(jobs)))
        for _ in range(_ATTEMPTS):
            remaining = deadline - time.monotonic()
            if not missing or remaining <= 0:
                break
            helper = self._running_helper()
            batch = helper.submit([jobs[index] for index in missing], limit, remaining)
            finished = batch.finished.wait(max(0.0, deadline - time.monotonic()) + _GRACE)
            outcomes |= {missing[index]: outcome for index, outcome in dict(batch.outcomes).items()}
            missing = [index for index in range(len(jobs)) if index not in outcomes]
            if not finished:
                helper.kill()
            elif not batch.lost:
                break
        return [outcomes.get(index, "deadline") for index in range(len(jobs))]

    def close(self) -> None:
        """Kill the workers; the next batch starts new ones."""
        with self._lock:
            if self._helper is not None:
                self._helper.kill()
                self._helper = None


_pools: dict[float, WorkerPool] = {}
_pools_lock = threading.Lock()


def shared_pool(memory_gb: float = 1.0) -> WorkerPool:
    """The pool of this process for one memory limit, made when first asked for and closed at exit."""
    with _pools_lock:
        if memory_gb not in _pools:
            _pools[memory_gb] = WorkerPool(memory_gb=memory_gb)
        return _pools[memory_gb]


@atexit.register
def close_pools() -> None:
    """Close every shared pool."""
    for pool in list(_pools.values()):
        pool.close()

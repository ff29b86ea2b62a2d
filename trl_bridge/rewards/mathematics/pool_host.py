"""
Process between a training script and its workers: `python -m trl_bridge.rewards.mathematics.pool_host WORKERS MEMORY_BYTES`.

It exists so that the pool's start method never sees the user's `__main__`: the workers' main module is this file. Its
forkserver has SymPy loaded, so a killed worker is replaced in hundredths of a second, and it owns no GPU, so the fork is
safe. Batches come as JSON lines on stdin, verdicts leave as JSON lines on stdout; end of input ends the process.
"""

import json
import logging
import multiprocessing
import os
import resource
import shutil
import signal
import sys
import tempfile
import threading
import time
from collections import deque
from concurrent.futures import FIRST_COMPLETED, CancelledError, Future, TimeoutError, wait
from concurrent.futures.process import BrokenProcessPool
from typing import Any, BinaryIO

from pebble import ProcessExpired, ProcessPool


# Every job gets the first of these at first; what needs more goes to the end of the queue with the next, at last with the
# full limit, so that hostile answers do not keep the honest ones waiting.
SLICES = (0.4, 1.5)
BROKEN = 3
# Some job ends at least every slice and a kill: a pool that is silent for longer (a worker died with the pool's lock, of
# memory for one) is replaced. Before the first verdict the workers have still to load SymPy.
SILENCE = 3.0
STARTUP = 60.0


def prepare_worker(memory: int) -> None:
    """Limits of a worker; runs once in each."""
    # pebble installs a Python handler, which never runs while SymPy is inside one long C call: die at once instead.
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    with open("/proc/self/statm") as statm:
        base = int(statm.read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (base + memory, base + memory))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    sys.setrecursionlimit(2000)
    logging.disable(logging.CRITICAL)


def judge(job: list[str]) -> bool:
    """Run one job in a worker; imported there, since the host itself needs no computer algebra."""
    from trl_bridge.rewards.mathematics.symbolic import verdict

    return verdict(job)


class Host:
    """Runs the batches of one training process."""

    def __init__(self, workers: int, memory: int, output: BinaryIO):
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["trl_bridge.rewards.mathematics.warm"])
        self.workers = workers
        self.pool = ProcessPool(workers, initializer=prepare_worker, initargs=(memory,), context=context)
        self.output = output
        self.lock = threading.Lock()
        self.answered = False

    def send(self, message: dict[str, Any]) -> None:
        with self.lock:
            self.output.write(json.dumps(message).encode() + b"\n")
            self.output.flush()

    def run(self, batch: dict[str, Any]) -> None:
        """Judge one batch, sending each verdict as it comes, until its deadline."""
        try:
            self._run(batch)
        except (RuntimeError, BrokenProcessPool, CancelledError) as error:
            # An idle worker was killed from outside: pebble gives up the whole pool, the parent starts a new host.
            sys.stderr.write(f"trl_bridge.rewards: worker pool lost ({error}), starting another\n")
            os._exit(BROKEN)

    def _run(self, batch: dict[str, Any]) -> None:
        deadline = time.monotonic() + batch["seconds"]
        limit = batch["limit"]
        queue = deque((index, job, min(SLICES[0], limit)) for index, job in enumerate(batch["jobs"]))
        running: dict[Future, tuple[int, list[str], float]] = {}
        again: set[int] = set()
        while queue or running:
            # No more than the workers can take: a job that waits in the pool cannot be withdrawn from it.
            while queue and len(running) <= self.workers:
                index, job, seconds = queue.popleft()
                running[self.pool.schedule(judge, args=(job,), timeout=seconds)] = (index, job, seconds)
            patience = 2 * max(slice_ for _, _, slice_ in running.values()) + SILENCE if self.answered else STARTUP
            remaining = max(0.0, deadline - time.monotonic())
            done, _ = wait(running, timeout=min(remaining, patience), return_when=FIRST_COMPLETED)
            if not done and patience < remaining:
                raise RuntimeError(f"no verdict for {patience:.0f} s")
            self.answered = self.answered or bool(done)
            if time.monotonic() >= deadline:
                for future in running:
                    future.cancel()
                break
            for future in done:
                index, job, seconds = running.pop(future)
                outcome = self._outcome(future)
                if outcome == "timeout" and seconds < limit:
                    longer = [slice_ for slice_ in SLICES if seconds < slice_ < limit]
                    queue.append((index, job, longer[0] if longer else limit))
                elif outcome == "killed" and index not in again:
                    again.add(index)
                    queue.append((index, job, seconds))
                else:
                    self.send({"batch": batch["batch"], "index": index, "outcome": outcome})
        self.send({"batch": batch["batch"], "done": True})

    @staticmethod
    def _outcome(future: Future) -> bool | str:
        try:
            return future.result()
        except TimeoutError:
            return "timeout"
        except MemoryError:
            return "memory"
        except ProcessExpired as error:
            # Libraries in C abort where the memory limit stops them; any other end is not the answer's own.
            return "memory" if error.exitcode in (-signal.SIGABRT, -signal.SIGSEGV) else "killed"
        except (BrokenProcessPool, CancelledError):
            raise
        except Exception as error:
            # SymPy raises whatever it likes on hostile input: such an answer is not right, and a metric counts it.
            return f"error: {type(error).__name__}"


def watch_parent(parent: int) -> None:
    """End the whole process group when the training process is gone, even if it was killed."""
    while os.getppid() == parent:
        time.sleep(1.0)
    shutil.rmtree(tempfile.gettempdir(), ignore_errors=True)
    os.killpg(os.getpgid(0), signal.SIGKILL)


def main() -> None:
    """Serve requests, one JSON line each on stdin, until it ends; verdicts go to stdout."""
    # Whatever a library prints must not end up between the verdicts.
    output = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    host = Host(int(sys.argv[1]), int(sys.argv[2]), output)
    threading.Thread(target=watch_parent, args=(os.getppid(),), daemon=True).start()
    for line in sys.stdin.buffer:
        threading.Thread(target=host.run, args=(json.loads(line),), daemon=True).start()
    os.killpg(os.getpgid(0), signal.SIGKILL)


if __name__ == "__main__":
    main()

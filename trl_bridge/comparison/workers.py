"""All runs of a comparison over worker processes, each doing many runs one after another."""

import contextlib
import os
import sys
from collections.abc import Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from multiprocessing import active_children, get_context
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm

from ..generation.records import append_lines, read_lines
from ..processes import end_with
from .file import Comparison
from .plan import Run, all_runs, next_runs, number_of_runs


RUNS_FILE = "runs.jsonl"
_LOG = "worker-{}.log"


def read_records(folder: Path) -> dict[str, dict[str, Any]]:
    """Records of the runs that are done."""
    return {record["key"]: record for record in read_lines(folder / RUNS_FILE, ("key", "scores"))}


def run_all(comparison: Comparison, folder: Path, workers: int = 1) -> dict[str, dict[str, Any]]:
    """Do what is not done yet, and append one line to `runs.jsonl` for each run that ends."""
    records = read_records(folder)
    total = number_of_runs(comparison, records)
    # Spawned, for CUDA's sake; each process imports torch once, and then does one run after another.
    context = get_context("spawn")
    numbers = context.Queue()
    for number in range(workers):
        numbers.put(number)
    arguments = (numbers, str(folder))
    under_way: dict[Future[dict[str, Any]], Run] = {}
    failed: BaseException | None = None
    done = len({run.key for run in all_runs(comparison, records)} & set(records))
    with (
        ProcessPoolExecutor(workers, context, _start, arguments) as pool,
        _ended_with_this_process(),
        tqdm(total=total, initial=done, unit="run", desc="comparison", ncols=100) as bar,
    ):
        # In a worker: this process need not import torch.
        pool.submit(_check, comparison, str(folder)).result()
        while True:
            busy = {run.key for run in under_way.values()}
            for run in next_runs(comparison, records, busy) if failed is None else ():
                if len(under_way) == workers:
                    break
                under_way[pool.submit(_work, run, str(folder / "bases"))] = run
            if not under_way:
                break
            for future in wait(under_way, return_when=FIRST_COMPLETED).done:
                run = under_way.pop(future)
                if future.exception() is not None:
                    failed = failed or future.exception()
                    continue
                record = future.result()
                append_lines(folder / RUNS_FILE, [record])
                records[record["key"]] = record
                bar.set_postfix_str(f"{run.setting.name}, {run.row.name}")
                bar.update()
    if failed is not None:
        raise failed
    return records


@contextlib.contextmanager
def _ended_with_this_process() -> Iterator[None]:
    """The pool would wait for its runs, which may take hours, where this process is told to stop."""
    try:
        yield
    except KeyboardInterrupt:
        for worker in active_children():
            worker.terminate()
        raise


def _start(numbers: Any, folder: str) -> None:
    """Before a worker imports anything heavy: its GPU or its one thread, and where its output goes."""
    end_with(os.getppid())
    number = numbers.get()
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    devices = visible.split(",") if visible else [str(index) for index in range(_count_gpus())]
    if devices:
        os.environ["CUDA_VISIBLE_DEVICES"] = devices[number % len(devices)]
    log = open(Path(folder) / _LOG.format(number), "a", buffering=1, encoding="utf-8")  # noqa: SIM115
    sys.stdout = sys.stderr = log
    import torch
    import transformers

    if not torch.cuda.is_available():
        # Small matrices gain nothing from a second thread, and lose much where other programs run beside.
        torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()


def _count_gpus() -> int:
    return sum(path.name.removeprefix("nvidia").isdigit() for path in Path("/dev").glob("nvidia*"))


def _check(comparison: Comparison, folder: str) -> None:
    from .trainers import check_rows

    check_rows(comparison, folder)


def _work(run: Run, cache: str) -> dict[str, Any]:
    from .run import execute

    return execute(run, cache)

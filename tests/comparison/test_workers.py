import json

import pytest

from tests.helpers.comparison import Threads
from trl_bridge.comparison import workers
from trl_bridge.comparison.file import parse_comparison


VALUES = {
    "task": {"name": "addition"},
    "settings": {"a": None, "b": {"wrong_share": 0.5}},
    "methods": {"grpo": None, "bridge": None},
    "seeds": [0, 1],
    "validation_seeds": [9],
    "learning_rates": [0.1, 0.2],
    "steps": 10,
}


@pytest.fixture
def trained(monkeypatch):
    """Keys of the runs that were trained, in order."""
    keys = []

    def work(run, cache):
        keys.append(run.key)
        split = "test" if run.phase == "test" else "validation"
        return {"key": run.key, "scores": {split: {"probability": run.learning_rate}}}

    monkeypatch.setattr(workers, "ProcessPoolExecutor", Threads)
    monkeypatch.setattr(workers, "_check", lambda comparison, folder: None)
    monkeypatch.setattr(workers, "_work", work)
    return keys


@pytest.mark.parametrize("number", [1, 3])
def test_every_run_once_and_none_again(number, trained, tmp_path):
    given = parse_comparison(VALUES)
    records = workers.run_all(given, tmp_path, number)
    # 2 rows x 2 settings x (2 rates + 2 seeds), GRPO's settings being one.
    assert len(records) == len(trained) == len(set(trained)) == 12
    assert workers.read_records(tmp_path) == records
    assert workers.run_all(given, tmp_path, number) == records and len(trained) == 12
    # A row more: its runs alone.
    more = parse_comparison({**VALUES, "methods": {**VALUES["methods"], "chord": None}})
    assert len(workers.run_all(more, tmp_path, number)) == 20 and len(trained) == 20


def test_what_a_run_raises_comes_out_and_the_others_are_kept(trained, tmp_path, monkeypatch):
    given, work = parse_comparison(VALUES), workers._work

    def sometimes(run, cache):
        if run.row.name == "bridge":
            raise RuntimeError("out of memory")
        return work(run, cache)

    monkeypatch.setattr(workers, "_work", sometimes)
    with pytest.raises(RuntimeError, match="out of memory"):
        workers.run_all(given, tmp_path, 2)
    kept = [json.loads(line)["key"] for line in (tmp_path / "runs.jsonl").read_text().splitlines()]
    assert kept and sorted(kept) == sorted(trained)
    monkeypatch.setattr(workers, "_work", work)
    assert len(workers.run_all(given, tmp_path, 2)) == len(trained) == 12


def test_a_refusal_of_the_check_comes_out_before_any_run(trained, tmp_path, monkeypatch):
    def refuse(comparison, folder):
        raise ValueError("`methods: grpo`: no")

    monkeypatch.setattr(workers, "_check", refuse)
    with pytest.raises(ValueError, match="`methods: grpo`: no"):
        workers.run_all(parse_comparison(VALUES), tmp_path)
    assert not trained and not (tmp_path / "runs.jsonl").exists()


def test_workers_take_gpus_by_turns(tmp_path, monkeypatch):
    import queue

    import torch
    import transformers

    taken = []
    numbers = queue.Queue()
    for number in range(3):
        numbers.put(number)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,7")
    threads, verbosity = torch.get_num_threads(), transformers.logging.get_verbosity()
    for _ in range(3):
        with monkeypatch.context() as context:
            # Put back afterwards: they go to the worker's log.
            context.setattr("sys.stdout", None)
            context.setattr("sys.stderr", None)
            context.setenv("CUDA_VISIBLE_DEVICES", "4,7")
            workers._start(numbers, str(tmp_path))
            taken.append(workers.os.environ["CUDA_VISIBLE_DEVICES"])
    assert taken == ["4", "7", "4"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["worker-0.log", "worker-1.log", "worker-2.log"]
    torch.set_num_threads(threads)
    transformers.logging.set_verbosity(verbosity)

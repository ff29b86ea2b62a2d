import gc
import os
from collections import Counter


# Before torch, transformers or TRL are imported: nothing here may reach for the network or report home.
os.environ.update(
    HF_HUB_OFFLINE="1", HF_HUB_DISABLE_TELEMETRY="1", TRL_EXPERIMENTAL_SILENCE="1", TOKENIZERS_PARALLELISM="false"
)
# DeepSpeed, which accelerate imports wherever it is installed, would print that it has found no GPU.
os.environ["DS_ACCELERATOR"] = "cpu"
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest  # noqa: E402
import torch  # noqa: E402


torch.set_num_threads(1)
# Assertions in the helpers say as much as those in the tests.
pytest.register_assert_rewrite("tests.helpers")


@pytest.fixture(scope="session")
def tokenizer():
    from trl_bridge.models import tiny_tokenizer

    return tiny_tokenizer()


@pytest.fixture(scope="session")
def tiny():
    """A small model that takes conversations, and its tokenizer."""
    from trl_bridge.models import tiny_model, tiny_tokenizer

    tokenizer = tiny_tokenizer(chat_template=True)
    return tiny_model(tokenizer, hidden_size=32, layers=2), tokenizer


@pytest.fixture
def quick_batches(monkeypatch):
    """Without the collection of garbage before each batch, which costs these small batches more than the model."""
    monkeypatch.setattr("accelerate.utils.memory.clear_device_cache", lambda garbage_collection=False: None)


def pytest_collection_modifyitems(items):
    """Files in the order in which `--dist loadfile` hands them out: the longest first, so that both workers end together."""
    sizes = Counter(item.path for item in items)
    kinds = {item.path: 0 for item in items}
    for item in items:
        weight = 2 if item.get_closest_marker("distributed") else 1 if item.get_closest_marker("slow") else 0
        kinds[item.path] = max(kinds[item.path], weight)
    items.sort(key=lambda item: (-kinds[item.path], -sizes[item.path], item.path))


# Where the time goes: one table at the end, by folder

_CPU = pytest.StashKey[float]()


def _cpu():
    """CPU seconds of this process and of those that it has waited for, so that a busy machine does not count."""
    return sum(os.times()[:4])


def pytest_collection_finish(session):
    # Each training collects garbage twice, and spends more on looking through what is imported than on its updates.
    gc.collect()
    gc.freeze()
    session.config.stash[_CPU] = _cpu()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item):
    report = yield
    report.cpu, item.config.stash[_CPU] = _cpu() - item.config.stash[_CPU], _cpu()
    return report


def pytest_terminal_summary(terminalreporter):
    table = {}
    for report in sum(terminalreporter.stats.values(), []):
        if hasattr(report, "cpu"):
            row = table.setdefault(report.nodeid.split("::")[0].rpartition("/")[0], [set(), 0.0, 0.0])
            row[0].add(report.nodeid)
            row[1] += report.duration
            row[2] += report.cpu
    if not table:
        return
    lines = [(folder, len(tests), wall, cpu) for folder, (tests, wall, cpu) in table.items()]
    lines = sorted(lines, key=lambda line: -line[2])
    terminalreporter.write_sep("=", "time by folder, all workers together")
    terminalreporter.write_line(f"{'tests':>7} {'wall s':>9} {'CPU s':>9}")
    for folder, tests, wall, cpu in [*lines, ("total", *(sum(line[i] for line in lines) for i in (1, 2, 3)))]:
        terminalreporter.write_line(f"{tests:7} {wall:9.1f} {cpu:9.1f}  {folder}")

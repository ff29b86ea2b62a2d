"""Hostile answers, killed workers, and the places from which users start training."""

import os
import signal
import subprocess
import sys
import time

import psutil
import pytest

from benchmarks import rewards_fuzz
from trl_bridge.rewards import MathReward, check_golds
from trl_bridge.rewards.mathematics.workers import WorkerPool, shared_pool


HOSTILE = {
    "tower": "2^{2^{2^{100}}}+x",
    "digits": "9" * 100_000,
    "braces": "{" * 50_000 + "}" * 50_000,
    "factorials": "((10000!)!)!+x",
    "radicals": r"\sqrt{" * 38 + "2" + "}" * 38,
    "null": "x\x00y",
    "surrogate": "x\ud800y",
    "binomial": r"\binom{10^9}{5\cdot 10^8}+x",
    "code": "__import__('os').system('touch /tmp/trl_bridge_hacked')",
}


def test_hostile_answers_pay_nothing_in_bounded_time():
    reward = MathReward(limit=1.0, batch_limit=20.0)
    metrics = {}
    completions = [rf"\boxed{{{text}}}" for text in HOSTILE.values()] + [r"\boxed{1+x^2+y-y}"]
    shared_pool().run([("same", "a", "b")])
    start = time.monotonic()
    rewards = reward(completions, ["x^2+1"] * len(completions), log_metric=metrics.__setitem__)
    assert time.monotonic() - start < 22.0
    assert rewards == [0.0] * len(HOSTILE) + [1.0]
    assert metrics["math_reward/timeouts"] >= 1
    assert not os.path.exists("/tmp/trl_bridge_hacked")


def test_the_deadline_of_a_batch_holds_and_honest_answers_come_first():
    reward = MathReward(limit=30.0, batch_limit=10.0)
    metrics = {}
    completions = [rf"\boxed{{2^{{2^{{2^{{10{i}}}}}}}+x}}" for i in range(2)] + [
        rf"\boxed{{{i}+x+y-y}}" for i in range(20)
    ]
    golds = ["x^2"] * 2 + [f"x+{i}" for i in range(20)]
    shared_pool().run([("same", "a", "b")])
    start = time.monotonic()
    rewards = reward(completions, golds, log_metric=metrics.__setitem__)
    assert time.monotonic() - start < 11.0
    # Which limit comes first depends on the machine: the batch's deadline (not judged) or the answer's own memory (0).
    assert all(reward in (None, 0.0) for reward in rewards[:2]) and rewards[2:] == [1.0] * 20
    assert metrics["math_reward/timeouts"] == 2


def test_memory_is_limited():
    pool = WorkerPool(workers=1, memory_gb=0.2)
    try:
        start = time.monotonic()
        outcomes = pool.run(
            [("same", "x", r"\binom{4\cdot 10^9}{2\cdot 10^9}+(10^{10})!"), ("same", "x+1", "1+x")], 5.0, 20.0
        )
        assert outcomes[0] is not True and outcomes[1] is True
        assert time.monotonic() - start < 15.0
    finally:
        pool.close()


def test_a_killed_worker_and_a_killed_helper_are_replaced():
    pool = WorkerPool(workers=2)
    try:
        job = [("same", "x+1", "1+x")]
        assert pool.run(job) == [True]
        helper = psutil.Process(pool._running_helper().process.pid)
        for child in helper.children(recursive=True):
            child.send_signal(signal.SIGKILL)
        time.sleep(0.5)
        assert pool.run(job) == [True]
        pool._running_helper().process.kill()
        assert pool.run(job) == [True]
    finally:
        pool.close()


def test_a_forked_child_gets_workers_of_its_own():
    assert shared_pool().run([("same", "x+2", "2+x")]) == [True]
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        outcome = shared_pool().run([("same", "x+3", "3+x")])
        os.write(write, repr(outcome).encode())
        shared_pool().close()
        os._exit(0)
    os.waitpid(child, 0)
    assert os.read(read, 100) == b"[True]"
    assert shared_pool().run([("same", "x+4", "4+x")]) == [True]


SCRIPT = """
# One write for each line: two ranks share the pipe.
import os
os.write(1, b"once\\n")
from trl_bridge.rewards import math_reward
rewards = math_reward([r"\\\\boxed{1+x}", r"\\\\boxed{2+x}"], ["x+1", "x+1"])
os.write(1, f"rewards {rewards}\\n".encode())
"""


def run(command: list[str], **kwargs) -> str:
    root = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
    environment = os.environ | {"PYTHONPATH": root, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    result = subprocess.run(command, capture_output=True, text=True, timeout=120, env=environment, **kwargs)
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_a_script_without_a_main_guard(tmp_path):
    script = tmp_path / "train.py"
    script.write_text(SCRIPT)
    # A module of the user's that would shadow one of the standard library's must not reach the workers.
    (tmp_path / "types.py").write_text("raise RuntimeError")
    (tmp_path / "types.py").unlink()
    (tmp_path / "sympy.py").write_text("raise RuntimeError('shadowed')")
    assert run([sys.executable, str(script)], cwd=tmp_path).splitlines() == ["once", "rewards [1.0, 0.0]"]


def test_stdin_as_in_a_notebook(tmp_path):
    assert run([sys.executable, "-"], input=SCRIPT, cwd=tmp_path).splitlines() == ["once", "rewards [1.0, 0.0]"]


@pytest.mark.distributed
def test_torchrun(tmp_path):
    script = tmp_path / "train.py"
    script.write_text(SCRIPT)
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--standalone", str(script)]
    assert sorted(run(command, cwd=tmp_path).split("\n")) == sorted(["once", "rewards [1.0, 0.0]"] * 2 + [""])


def test_the_workers_end_with_a_killed_script(tmp_path):
    script = tmp_path / "train.py"
    script.write_text(SCRIPT + "import time; time.sleep(60)")
    environment = os.environ | {"PYTHONPATH": os.getcwd()}
    process = subprocess.Popen([sys.executable, str(script)], stdout=subprocess.PIPE, env=environment, text=True)
    assert process.stdout is not None
    assert [process.stdout.readline() for _ in range(2)][1].startswith("rewards")
    helpers = psutil.Process(process.pid).children(recursive=True)
    assert helpers
    process.kill()
    process.wait()
    _, alive = psutil.wait_procs(helpers, timeout=10)
    assert alive == []


def test_import_is_light():
    code = (
        "import sys, trl_bridge.rewards; print([m for m in ('sympy', 'torch', 'trl', 'pebble') if m in sys.modules])"
    )
    assert run([sys.executable, "-c", code]).strip() == "[]"


def test_a_small_fuzz():
    totals = rewards_fuzz.run(count=1500, seed=1, batch=500, limit=1.0)
    assert totals["strings"] == 1500
    # Golds are among the mutated strings' origins: a few may keep their value ("12." is 12), most may not.
    assert totals["paid"] < 75


def test_check_golds_lists_the_bad_rows():
    rows = [{"solution": s} for s in ("12", r"\frac{1}{", "x^2+1", "", None, "(3, 4]")]
    bad = check_golds(rows)
    assert [(item.row, item.reason) for item in bad] == [(1, "does not parse"), (3, "missing"), (4, "missing")]
    with pytest.raises(KeyError, match="answer"):
        check_golds(rows, column="answer")


def test_a_pool_that_hangs_is_replaced():
    """Stopped workers stand for a lock that died with its owner: no job can end, and no worker is dead."""
    pool = WorkerPool(workers=2)
    try:
        assert pool.run([("same", "x+1", "1+x")]) == [True]
        helper = psutil.Process(pool._running_helper().process.pid)
        for child in helper.children(recursive=True):
            child.send_signal(signal.SIGSTOP)
        assert pool.run([("same", "x+2", "2+x")], 2.0, 30.0) == [True]
        assert psutil.pid_exists(helper.pid) is False or helper.pid != pool._running_helper().process.pid
    finally:
        pool.close()

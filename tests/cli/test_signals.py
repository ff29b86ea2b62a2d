"""Processes that are told to stop, or killed: one line, and nothing left behind."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from trl_bridge.processes import exit_code


ROOT = Path(__file__).parents[2]
TRAINING = (
    "bridge --config smoke/bridge --max_steps 2000 --save_steps 2 --save_total_limit 2 --disable_tqdm true "
    "--logging_strategy no --output_dir"
)


def start(*arguments):
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen([sys.executable, *arguments], cwd=ROOT, env=environment, start_new_session=True, **pipes)


def wait_for(condition, seconds=240):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.05)


def is_alive(number):
    try:
        return Path(f"/proc/{number}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def children(number):
    return [int(child) for child in Path(f"/proc/{number}/task/{number}/children").read_text().split()]


@pytest.mark.parametrize(
    ("number", "whole_group", "code", "name"),
    [
        (signal.SIGTERM, False, 128 + signal.SIGTERM, "SIGTERM"),
        (signal.SIGINT, True, 128 + signal.SIGINT, "SIGINT"),  # a terminal's Ctrl-C
        (signal.SIGKILL, False, -signal.SIGKILL, "SIGTERM"),
    ],
)
def test_training_ends_with_the_command_and_says_how_to_resume(tmp_path, number, whole_group, code, name):
    command = start("-m", "trl_bridge", *TRAINING.split(), str(tmp_path / "out"))
    wait_for(lambda: list(tmp_path.glob("out/checkpoint-*/bridge/complete.json")))
    (training,) = children(command.pid)
    (os.killpg if whole_group else os.kill)(command.pid, number)
    wait_for(lambda: not is_alive(training), 60)
    _, err = command.communicate(timeout=60)
    assert command.returncode == code
    lines = [line for line in err.splitlines() if line.startswith("trl-bridge")]
    assert len(lines) == 1 and lines[0].startswith(f"trl-bridge bridge: stopped by {name}: the same command with ")
    assert "--resume_from_checkpoint true" in lines[0] and str(tmp_path / "out" / "checkpoint-") in lines[0]
    assert "Traceback" not in err and 'File "' not in err


def test_a_command_that_is_stopped_before_it_starts_anything_says_so():
    command = start(
        "-c",
        "from trl_bridge.cli import main; print('begun', flush=True); main(['bridge', '--config', 'smoke/bridge'])",
    )
    assert command.stdout.readline() == "begun\n"
    time.sleep(0.5)
    command.send_signal(signal.SIGINT)
    _, err = command.communicate(timeout=60)
    assert command.returncode == 128 + signal.SIGINT and err.strip() == "trl-bridge bridge: stopped by SIGINT"


@pytest.mark.parametrize("inside", ["an import", "a finalizer"])
def test_a_signal_is_not_lost_where_exceptions_are(tmp_path, inside):
    # As lazy imports do, which make an error of their own of whatever an import raises; a finalizer drops it.
    waits = "import time\nprint('begun', flush=True)\ntime.sleep(60)\n"
    (tmp_path / "slow.py").write_text(waits)
    program = {
        "an import": f"sys.path.insert(0, {str(tmp_path)!r})\n    try:\n        import slow\n"
        "    except BaseException:\n        raise ValueError",
        "a finalizer": f"class Held:\n        def __del__(self): exec({waits!r})\n    held = Held()\n    del held",
    }
    process = start("-c", STOPPABLE.format(inside=program[inside]))
    assert process.stdout.readline() == "begun\n"
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=20)
    assert process.returncode == 128 + signal.SIGINT and err.strip() == "program: stopped by SIGINT, and that is that"


STOPPABLE = """
import os, sys, time
from trl_bridge.processes import stoppable
with stoppable("program", lambda: ", and that is that"):
    {inside}
    print("begun", flush=True)
    time.sleep(60)
"""


def test_a_signal_that_comes_twice_leaves_one_line():
    process = start("-c", STOPPABLE.format(inside=""))
    assert process.stdout.readline() == "begun\n"
    for _ in range(3):
        process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=20)
    # As a shell counts: one that comes while Python ends has the system's own handler.
    assert exit_code(process.returncode) == 128 + signal.SIGINT
    assert err.strip() == "program: stopped by SIGINT, and that is that"


def test_a_process_that_does_not_stop_is_ended_by_the_next_signal():
    # As where a signal comes in a finalizer, which Python lets no exception leave.
    process = start("-c", "import time\nfrom trl_bridge.processes import stoppable\n"
                    "with stoppable('program'):\n    print('begun', flush=True)\n    while True:\n        try:\n"
                    "            time.sleep(1)\n        except BaseException:\n            pass\n")  # fmt: skip
    assert process.stdout.readline() == "begun\n"
    process.send_signal(signal.SIGTERM)
    time.sleep(2.5)
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=20) == 128 + signal.SIGTERM


def test_a_forked_child_is_ended_as_ever():
    inside = "child = os.fork()\n    child or time.sleep(60)\n    print(child, flush=True)"
    process = start("-c", STOPPABLE.format(inside=inside))
    child = int(process.stdout.readline())
    time.sleep(1)  # Python forgets signals that come while it forks
    os.kill(child, signal.SIGTERM)
    wait_for(lambda: not is_alive(child), 20)
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=20)
    assert err.count("\n") == 2 and process.returncode == 128 + signal.SIGTERM


HANDING_ON = """
import subprocess, sys
from trl_bridge.processes import handing_on
child = "from trl_bridge.processes import end_with_starter; import signal, time; {child}; print(1, flush=True); time.sleep(60)"
with handing_on():
    subprocess.run([sys.executable, "-c", {launcher!r} if {launcher!r} else child, child])
"""
LAUNCHER = "import subprocess, sys; subprocess.run([sys.executable, '-c', sys.argv[1]])"


def handing_on(child, through_launcher=False):
    process = start("-c", HANDING_ON.format(child=child, launcher=LAUNCHER if through_launcher else ""))
    assert process.stdout.readline() == "1\n"
    (started,) = children(process.pid)
    return process, children(started)[0] if through_launcher else started


@pytest.mark.parametrize("through_launcher", [False, True])
def test_a_killed_process_takes_along_what_it_has_started(through_launcher):
    process, started = handing_on("end_with_starter()", through_launcher)
    process.kill()  # and not waited for: until its parent does, it is there as a zombie
    wait_for(lambda: not is_alive(started), 20)
    process.communicate()
    assert not is_alive(started)


def test_a_child_that_hears_nothing_is_killed_by_the_second_signal():
    process, started = handing_on("signal.signal(signal.SIGTERM, signal.SIG_IGN)")
    process.send_signal(signal.SIGTERM)
    time.sleep(2.5)
    assert is_alive(started) and process.poll() is None
    process.send_signal(signal.SIGTERM)
    wait_for(lambda: not is_alive(started), 20)
    process.communicate(timeout=20)
    assert process.returncode == 0  # it goes on once the child is gone


def test_workers_of_a_comparison_end_with_it(tmp_path):
    command = start("-m", "trl_bridge", "compare", "--config", "comparison/addition", "--output_dir", str(tmp_path))
    wait_for(lambda: (tmp_path / "worker-0.log").exists())
    started = children(command.pid)
    assert started
    command.kill()
    wait_for(lambda: not any(is_alive(child) for child in started), 60)
    command.communicate()


def test_a_stopped_comparison_does_not_wait_for_its_runs(tmp_path):
    command = start("-m", "trl_bridge", "compare", "--config", "comparison/addition", "--output_dir", str(tmp_path))
    wait_for(lambda: (tmp_path / "worker-0.log").exists())
    started = children(command.pid)
    command.send_signal(signal.SIGTERM)
    _, err = command.communicate(timeout=60)
    assert command.returncode == 128 + signal.SIGTERM and "trl-bridge compare: stopped by SIGTERM" in err
    assert "Traceback" not in err
    wait_for(lambda: not any(is_alive(child) for child in started), 20)

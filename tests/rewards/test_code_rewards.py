"""Programs: opt-in, tests of every form, and what a program cannot do behind either wall."""

import json
import logging
import os
import subprocess
import sys
import tempfile
import threading
import time

import psutil
import pytest

from trl_bridge.rewards import CodeReward, code_reward, completions, sandbox
from trl_bridge.rewards.code_rewards import CodeExecutionRefused, last_program, parse_tests, same_output


def fenced(program: str) -> str:
    return f"Here it is:\n```python\n{program}\n```\nDone."


ADD = "a, b = map(int, input().split())\nprint(a + b)"
STDIN = [{"input": "1 2\n", "output": "3\n"}, {"input": "5 7", "output": "12"}]


@pytest.fixture(scope="module", params=["bubblewrap", "kernel"])
def reward(request) -> CodeReward:
    if reason := sandbox.missing(request.param):
        pytest.skip(f"{request.param}: {reason}")
    return CodeReward(allow_execution=True, seconds=2.0, workers=2, isolation=request.param)


def test_it_refuses_without_opt_in(monkeypatch):
    monkeypatch.delenv("TRL_BRIDGE_RUN_CODE", raising=False)
    with pytest.raises(CodeExecutionRefused, match="TRL_BRIDGE_RUN_CODE"):
        code_reward([fenced(ADD)], [STDIN])
    monkeypatch.setenv("TRL_BRIDGE_RUN_CODE", "1")
    assert code_reward([fenced(ADD)], [STDIN]) == [1.0]


def test_it_refuses_where_the_wall_cannot_be_had(monkeypatch):
    monkeypatch.setattr(sandbox, "missing", lambda wall: None if wall == "limits" else "not here")
    for isolation in ("auto", "bubblewrap", "kernel"):
        with pytest.raises(CodeExecutionRefused, match="apt-get install bubblewrap.*Landlock"):
            CodeReward(allow_execution=True, isolation=isolation)([fenced(ADD)], [STDIN])
    assert sandbox.report() == "none (no bubblewrap: not here; no kernel: not here)"
    assert CodeReward(allow_execution=True, isolation="limits")([fenced(ADD)], [STDIN]) == [1.0]
    monkeypatch.setenv("TRL_BRIDGE_RUN_CODE", "limits")
    assert code_reward([fenced(ADD)], [STDIN]) == [1.0]
    monkeypatch.setattr(sandbox, "missing", lambda wall: None)
    assert sandbox.choose("auto") == "bubblewrap"
    with pytest.raises(ValueError, match="isolation"):
        CodeReward(isolation="none")


def calls(inputs: list, outputs: list, name: str = "add") -> dict:
    return {"inputs": inputs, "outputs": outputs, "fn_name": name}


def script(given: object, expected: object) -> dict:
    return {"inputs": [given], "outputs": [expected]}


def test_every_form_of_tests(reward):
    function = "def add(a, b):\n    print('noise')\n    return a + b"
    solution = "class Solution:\n    def add(self, a, b):\n        return a + b"
    twice = "def twice(x):\n    return x * 2"
    functional = [{"input": "1\n2", "output": "3", "testtype": "functional", "fn_name": "add"}]
    forms = [
        (ADD, STDIN),
        (ADD, json.dumps(STDIN)),
        (ADD, {"inputs": ["1 2"], "outputs": ["3"]}),
        (function, ["assert add(1, 2) == 3", "assert add(0, 0) == 0"]),
        (function, "assert add(1, 2) == 3"),
        (function, functional),
        (solution, functional),
        (function, {"inputs": [[1, 2]], "outputs": [3], "fn_name": "add"}),
        (function, json.dumps(calls([[1, 2], [0, 4]], [[3], [4]]))),
        (function, calls([[1, 2]], ["3"])),
        (function, calls(["1\n2", "[1]\n[2]"], ["3", "[1, 2]"])),
        (function, calls([["a", "b"]], ["ab"])),
        (twice, calls(["ab", "12"], ["abab", "1212"], "twice")),
        (twice, calls([["ab"], ["12"]], [["abab"], ["1212"]], "twice")),
        (twice, calls([4, 5], [8, 10], "twice")),
        ("def one(x):\n    return [x]", calls([[1], [2]], [[1], [2]], "one")),
        ("def more(d):\n    return {k + 1: v for k, v in d.items()}", calls([[{"1": "a"}]], [[{"2": "a"}]], "more")),
        ("def pair(x):\n    return x, x", calls([[1]], [[[1, 1]]], "pair")),
        (ADD + "\nprint(input())", script(["1 2", "x"], ["3", "x"])),
        ("print(open(0).read().upper())", script("a\nb", "A\nB")),
        ("print(open('/dev/stdin').read().upper())", script("a\nb", "A\nB")),
        ("import sys, os\nprint(sys.stdin.fileno(), os.read(0, 9).decode())", script("a\n", "0 a")),
        ("print(int(input()) + 1)", script(4, 5)),
        (
            "out = open(1, 'w')\nclass A:\n    def __init__(self): self.out = out\na = A()\na.out.write('1')",
            script("", 1),
        ),
        ("import sys\nprint(1)\nsys.exit()", script("", 1)),
        ("import sys\nprint(1)\nsys.stdout.flush(); sys.stdout.close()", script("", 1)),
        # As a script of its own: threads are waited for, and its classes are found under its name.
        (
            "import atexit, threading, time\natexit.register(print, 2)\n"
            "threading.Thread(target=lambda: (time.sleep(0.2), print(1))).start()",
            script("", "1\n2"),
        ),
        (
            "import pickle\nclass A: pass\nprint(type(pickle.loads(pickle.dumps(A()))).__name__, __name__)",
            script("", "A __main__"),
        ),
    ]
    assert reward([fenced(program) for program, _ in forms], [tests for _, tests in forms]) == [1.0] * len(forms)


def test_wrong_programs_pay_nothing(reward):
    wrong = [
        (ADD.replace("+", "-"), STDIN),
        ("def add(a, b):\n    return a - b", ["assert add(1, 2) == 3"]),
        # Leaving before the tests, or with success, passes none.
        ("import os\ndef add(a, b):\n    os._exit(0)", ["assert add(1, 2) == 3"]),
        ("import sys\nsys.exit(0)", ["assert add(1, 2) == 3"]),
        ("print(3)\nraise SystemExit(1)", [STDIN[0]]),
        ("print(3)\nraise SystemExit('no')", [STDIN[0]]),
        ("print(3)\nimport sys\nsys.exit(256 + 7)", [STDIN[0]]),
        ("print(3)\n1 / 0", [STDIN[0]]),
        ("def add(a, b):\n    return 4", calls([[1, 2]], [[3]])),
        ("def add(a, b):\n    return 1", calls([[1, 2]], [[1, 2]])),
        ("def add(a, b):\n    return '3'", calls(["1\n2"], ["3"])),
        ("def sub(a, b):\n    return 3", calls([[1, 2]], [3])),
        ("syntax error", STDIN),
        ("", STDIN),
    ]
    assert reward([fenced(program) for program, _ in wrong], [tests for _, tests in wrong]) == [0.0] * len(wrong)
    assert reward([ADD, "<think>" + fenced(ADD)], [STDIN] * 2) == [0.0, 0.0]


def test_partial_pay_and_logs():
    columns, metrics = {}, {}
    reward = CodeReward(allow_execution=True, partial=True)
    tests = [{"input": "1 2", "output": "3"}, {"input": "1 2", "output": "4"}]
    assert reward([fenced(ADD), "none"], [tests] * 2, columns.__setitem__, metrics.__setitem__) == [0.5, 0.0]
    assert columns["answer"] == [ADD + "\n", "[none]"] and metrics == {"code_reward/no_program_fraction": 0.5}


UNREADABLE = [
    None,
    "",
    ["", " "],
    [],
    "[1",
    7,
    float("nan"),
    {"inputs": ["1"]},
    {"inputs": ["1"], "outputs": []},
    {"inputs": [[1]], "outputs": [1], "fn_name": 3.5},
    [None],
    [{"in": 1}],
    [["assert True"]],
    [{"input": None, "output": "1"}],
    [{"input": "1", "output": ""}],
    ["x = 1"],
    "# add",
    "assert (",
    "[" * 100_000,
]


def test_tests_that_cannot_be_judged(caplog, monkeypatch):
    monkeypatch.setattr(completions, "_warned", set())  # another test may have had the same rows
    reward = CodeReward(allow_execution=True, workers=2)
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            rewards = reward([fenced("print(1)")] * 20, [*UNREADABLE, [{"input": "", "output": 1}]])
            assert rewards == [None] * 19 + [1.0]
    assert len(caplog.records) == 19
    assert all(f"`tests` of row {row} " in caplog.text for row in range(19))


# `{pid}` is the test's own process, `{file}` and `{folder}` are its user's.
FORBIDDEN = {
    "time": "while True: pass",
    "sleep": "import time; time.sleep(60)",
    "memory": "x = bytearray(3 * 10**9)",
    "fork": "import os\nif os.fork() == 0: os._exit(0)",
    "spawn": "import subprocess; subprocess.run(['true'], check=True)",
    "replace itself": "import os; os.execv('/bin/true', ['true'])",
    "socket": "import socket; socket.socket()",
    "local socket": "import socket; socket.socket(socket.AF_UNIX)",
    "datagrams": "import socket; socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)",
    "look up": "import socket; socket.getaddrinfo('localhost', 80)",
    "kill": "import os; os.kill(os.getppid(), 0)",
    "kill the trainer": "import os; os.kill({pid}, 0)",
    "kill its group": "import os; os.kill(0, 0)",
    "handle of a process": "import os; os.pidfd_open({pid})",
    "signals for its files": "import fcntl; fcntl.fcntl(0, 8, {pid})",
    "memory of a process": "open('/proc/{pid}/mem')",
    "environment of a process": "open('/proc/{pid}/environ').read()",
    "command of a process": "open('/proc/{pid}/cmdline').read()",
    "descriptors of a process": "import os; os.listdir('/proc/{pid}/fd')",
    "folder of a process": "import os; os.readlink('/proc/{pid}/cwd')",
    "memory of its parent": "import os; open(f'/proc/{{os.getppid()}}/mem')",
    "environment of its parent": "import os; open(f'/proc/{{os.getppid()}}/environ').read()",
    "descriptors of its parent": "import os; os.listdir(f'/proc/{{os.getppid()}}/fd')",
    "limits of a process": "import resource; resource.prlimit({pid}, resource.RLIMIT_NOFILE)",
    "limits of its parent": "import os, resource; resource.prlimit(os.getppid(), resource.RLIMIT_NOFILE)",
    "higher limits": "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (2**40, 2**40))",
    "cores of a process": "import os; os.sched_setaffinity({pid}, os.sched_getaffinity(0))",
    "cores of its parent": "import os; os.sched_setaffinity(os.getppid(), os.sched_getaffinity(0))",
    "scheduler of its parent": "import os; os.sched_setscheduler(os.getppid(), 0, os.sched_param(0))",
    "priority of a process": "import os; os.setpriority(os.PRIO_PROCESS, {pid}, 19)",
    "tracing": "import ctypes; assert ctypes.CDLL(None).ptrace(0, 0, 0, 0) == 0",
    "read a process": "import ctypes; assert ctypes.CDLL(None).process_vm_readv({pid}, None, 0, None, 0, 0) == 0",
    "namespaces": "import ctypes; assert ctypes.CDLL(None).unshare(0x10000000) == 0",
    "another user": "import os; os.setuid(65534)",
    "root directory": "import os; os.chroot('.')",
    "mount": "import ctypes; assert ctypes.CDLL(None).mount(b'none', b'.', b'tmpfs', 0, None) == 0",
    "shared memory": "import ctypes; assert ctypes.CDLL(None).shmget(0, 4096, 0o1600) >= 0",
    "files in memory": "import os; os.memfd_create('x')",
    "file size": "open('big', 'wb').write(b'x' * 2**22)",
    "number of files": "import time\nfor i in range(3000): open(str(i), 'w').close()\ntime.sleep(1)",
    "bytes of files": "import time\nfor i in range(100): open(str(i), 'wb').write(b'x' * 10**6)\ntime.sleep(1)",
    "hidden files": "import os, time\nos.mkdir('d', 0o300)\ntime.sleep(1)",
    "open files": "files = [open('f', 'w') for _ in range(40)]",
    "threads": (
        "import threading, time\nthreading.stack_size(2**16)\n"
        "for i in range(300): threading.Thread(target=time.sleep, args=(1,)).start()"
    ),
    "output": "import sys\nfor _ in range(4000): sys.stdout.write('x' * 1024)\nsys.stdout.flush()",
    "read a file": "open({file!r}).read()",
    "list a folder": "import os; os.listdir({folder!r})",
    "write a file": "open({file!r}, 'a')",
    "empty a file": "import os; os.open({file!r}, os.O_RDONLY | os.O_TRUNC)",
    "cut a file": "import os; os.truncate({file!r}, 0)",
    "make a file": "open({folder!r} + '/new', 'w')",
    "remove a file": "import os; os.remove({file!r})",
    "link a file": "import os; os.link({file!r}, 'here')",
    "link to a file": "import os; os.symlink({file!r}, 'here'); open('here').read()",
    "mode of a file": "import os; os.chmod({file!r}, 0o600)",
    "owner of a file": "import os; os.chown({file!r}, -1, -1)",
    "time of a file": "import os; os.utime({file!r})",
    "write to Python": "import os; open(os.path.dirname(os.__file__) + '/new.py', 'w')",
    "read of users": "open('/etc/passwd').read()",
    "write above": "open('../new', 'w')",
    "shared folders": "open('/dev/shm/new', 'w')",
    "temporary folder": "open('/tmp/new', 'w')",
    "environment": "import os; assert 'SECRET_OF_THE_TRAINER' in os.environ",
    "a terminal": "open('/dev/tty')",
    "a pipe with a name": "import os; os.mkfifo('pipe')",
}


@pytest.mark.parametrize("name", FORBIDDEN)
def test_what_a_program_cannot_do(name, reward, tmp_path, monkeypatch):
    monkeypatch.setenv("SECRET_OF_THE_TRAINER", "x")
    file = tmp_path / "file"
    file.write_text("of the user")
    program = FORBIDDEN[name].format(pid=os.getpid(), file=str(file), folder=str(tmp_path))
    start = time.monotonic()
    # The program answers right if it gets past what it must not do.
    assert reward([fenced(program + "\nprint('past')")], [[{"input": "", "output": "past"}]]) == [0.0]
    # Seconds in which the machine had no core for the program are not the program's.
    assert time.monotonic() - start < (30.0 if name == "time" else 8.0)
    assert file.read_text() == "of the user" and os.listdir(tmp_path) == ["file"]


CAN_DO = {
    "threads and files": (
        "import threading, os, tempfile\nt = threading.Thread(target=lambda: print('in a thread'))\n"
        "t.start(); t.join()\nopen('f', 'w').write('x')\nassert os.listdir('.') == ['f'] and len(os.environ) < 8"
    ),
    "folders": (
        "import os, shutil, tempfile\nwith tempfile.TemporaryDirectory() as d:\n    open(d + '/f', 'w').write('x')\n"
        "    os.rename(d + '/f', d + '/g')\n    shutil.copyfile(d + '/g', 'h')\nassert open('h').read() == 'x'"
    ),
    "asyncio": "import asyncio\nasync def f():\n    await asyncio.sleep(0.01)\n    return 1\nassert asyncio.run(f()) == 1",
    "signals to itself": (
        "import signal, os\nsignal.signal(signal.SIGALRM, lambda *a: None)\nos.kill(os.getpid(), signal.SIGALRM)"
    ),
    "recursion": (
        "import sys, threading\nsys.setrecursionlimit(10**6)\nthreading.stack_size(2**26)\n"
        "def f(n): return n and f(n - 1)\nt = threading.Thread(target=f, args=(5000,)); t.start(); t.join()"
    ),
    "libraries": (
        "import ctypes, datetime, decimal, hashlib, sqlite3, uuid, zoneinfo\nuuid.uuid4()\n"
        "sqlite3.connect(':memory:').execute('select 1')"
    ),
    "numpy": "import numpy\nassert (numpy.ones((100, 100)) @ numpy.ones(100)).sum() == 10000",
    "pool of threads": (
        "from concurrent.futures import ThreadPoolExecutor\n"
        "with ThreadPoolExecutor(4) as pool: assert list(pool.map(abs, [-1, 2])) == [1, 2]"
    ),
    "random": "import os, secrets\nassert secrets.token_hex(2) and open('/dev/urandom', 'rb').read(1)",
}


@pytest.mark.parametrize("name", CAN_DO)
def test_what_a_program_can_do(name, reward):
    expected = "in a thread\npast" if "in a thread" in CAN_DO[name] else "past"
    assert reward([fenced(CAN_DO[name] + "\nprint('past')")], [[{"input": "", "output": expected}]]) == [1.0]


MESS = """
import os, math, sys
math.pi = 3
os.mkdir('folder'); open('folder/f', 'w').close()
os.symlink('/etc', 'link'); os.symlink('.', 'loop')
for _ in range(300):
    os.mkdir('deep'); os.chdir('deep')
    open('f', 'w').close()
print('past', flush=True)
os.mkdir('closed', 0)
os._exit(0)
"""


def test_no_program_sees_another_s(reward, tmp_path, monkeypatch):
    """Deep folders, folders that cannot be listed, changed modules: whatever one leaves behind is gone."""
    clean = "import os, math\nassert math.pi > 3.1 and os.listdir('.') == []\nprint('past')"
    one = CodeReward(allow_execution=True, workers=1, isolation=reward.isolation)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    tests = [{"input": "", "output": "past"}] * 2
    assert one([fenced(MESS), fenced(clean)] * 2, [tests] * 4) == [1.0] * 4
    assert os.listdir(tmp_path) == []


def test_what_cannot_be_removed_is_said_and_never_raises(monkeypatch, caplog):
    if reason := sandbox.missing("kernel"):
        pytest.skip(reason)

    def kept(path):
        raise PermissionError("kept")

    with caplog.at_level(logging.WARNING), monkeypatch.context() as patch:
        patch.setattr(sandbox.os, "rmdir", kept)
        reward = CodeReward(allow_execution=True, workers=1, isolation="kernel")
        assert reward([fenced(ADD)], [STDIN]) == [1.0]
    assert "could not be removed" in caplog.text
    os.rmdir(caplog.records[-1].args[0])


def test_another_user():
    """Root's walls stand for a user without any rights too."""
    if os.getuid() != 0:
        pytest.skip("only root can become another user")
    root = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
    other = {"user": 65534, "group": 65534, "extra_groups": [], "cwd": "/", "text": True, "capture_output": True}
    try:
        subprocess.run([sys.executable, "-c", ""], check=True, **other)
    except PermissionError:
        pytest.skip(f"another user cannot run {sys.executable}")
    code = "from trl_bridge.rewards import sandbox; print([sandbox.missing(wall) for wall in sandbox.WALLS])"
    environment = {"PYTHONPATH": root, "PATH": os.environ["PATH"]}
    result = subprocess.run([sys.executable, "-c", code], env=environment, **other)
    assert result.stdout.strip() == repr([sandbox.missing(wall) for wall in sandbox.WALLS]), result.stderr


def test_a_batch_has_a_deadline(caplog):
    reward = CodeReward(allow_execution=True, seconds=30.0, batch_limit=2.0, workers=2)
    start = time.monotonic()
    with caplog.at_level(logging.WARNING):
        assert reward([fenced("while True: pass")] * 6, [STDIN] * 6) == [None] * 6
    assert time.monotonic() - start < 6.0
    assert len(caplog.records) == 1 and "6 of 6 programs were not judged within the 2 seconds" in caplog.text


@pytest.mark.parametrize(("kills", "expected"), [(1, 1.0), (2, None)])
def test_a_program_killed_from_outside_runs_once_more(kills, expected, caplog):
    if reason := sandbox.missing("kernel"):
        pytest.skip(reason)
    here, killed, stop = psutil.Process(), [], threading.Event()
    # Workers of math_reward, where an earlier test has left some, are grandchildren too.
    before = {child.pid for child in here.children(recursive=True)}

    def kill():
        while len(killed) < kills and not stop.wait(0.02):
            for child in here.children(recursive=True):
                # The program sleeps in a child of the sandbox's own process.
                if child.pid in before or child.pid in killed or child.ppid() in (here.pid, *killed):
                    continue
                if child.cpu_times().user < 1:
                    time.sleep(0.2)
                    child.kill()
                    killed.append(child.pid)
                    break

    thread = threading.Thread(target=kill)
    thread.start()
    try:
        with caplog.at_level(logging.WARNING):
            program = "import time\ntime.sleep(4)\nprint(1)"  # long beside a busy machine's delays
            reward = CodeReward(allow_execution=True, seconds=30.0, workers=1, isolation="kernel")
            assert reward([fenced(program)], [[{"input": "", "output": "1"}]]) == [expected]
    finally:
        stop.set()
        thread.join()
    assert len(killed) == kills
    assert ("were killed twice from outside" in caplog.text) == (expected is None)


def test_a_sandbox_that_is_killed_is_replaced():
    box = sandbox.Sandbox(sandbox.choose("auto"))
    request = {"program": "print(1)", "kind": "stdin", "seconds": 5, "memory": 10**9, "file_size": 9, "remaining": 20}
    try:
        assert box.run(request)["output"] == "1\n"
        box._process.kill()
        box._process.wait()  # under load it could still answer the first of these
        assert [box.run(request).get("output") for _ in range(2)][-1] == "1\n"
    finally:
        box.close()


@pytest.mark.parametrize(
    ("text", "program"),
    [
        ("```text\n1\n```\n```python\na\n```", "a\n"),
        ("```bash\npip\n```\nand\n```python\na\n```\nprints\n```\n5\n```", "a\n"),
        ("```python\na\n```\nprints\n```text\n5\n```", "a\n"),
        ('```json\n{"a": 1}\n```\n```\na\n```', "a\n"),
        ("```json\n{}\n```", None),
        ("```python\r\na\r\nb\r\n```\r\n", "a\nb\n"),
        ("~~~python\na = '```'\n```\n~~~", "a = '```'\n```\n"),
        ("1. So:\n\n   ```python\n   if a:\n       b\n\n   ```", "if a:\n    b\n\n"),
        ("```python title='main.py' linenos\na\n```", "a\n"),
        ("```{.python .numberLines}\na\n```", "a\n"),
        ("```Python3\na\n```", "a\n"),
        ('````python\na = """\n```\n"""\n````', 'a = """\n```\n"""\n'),
        ("```python\na\n```\n```pycon\n>>> b\n```", "a\n"),
        ('```python\na = """\n    ```\n    """\n```', 'a = """\n    ```\n    """\n'),
        ("```python\na", None),
        ("```python\na\n```\n```python\nb", "a\n"),
        ("```python\n```", None),
        ("use ```x``` and\n```python\na\n```", "a\n"),
        ("```python\na = '\x0c\x1c'\n```", "a = '\x0c\x1c'\n"),
        (None, None),
    ],
)
def test_the_last_program(text, program):
    assert last_program(text) == program


def test_helpers():
    assert last_program("```python\na\n```\n```py\nb\n```") == "b\n"
    assert last_program("no code") is None
    assert same_output("1 2 \n3\n\n", "1 2\n3") and same_output("1.0", "1") and not same_output("1 2", "1\n2")
    assert not same_output("a", "b")
    with pytest.raises(ValueError, match="empty"):
        parse_tests([])
    with pytest.raises(ValueError, match="keys"):
        parse_tests([{"in": 1}])
    assert os.environ.get("PATH")

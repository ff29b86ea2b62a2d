"""Programs: opt-in, tests of every form, and what a program cannot do."""

import json
import os
import time

import pytest

from trl_bridge.rewards import CodeReward, code_reward
from trl_bridge.rewards.code_rewards import CodeExecutionRefused, last_program, parse_tests, same_output


def fenced(program: str) -> str:
    return f"Here it is:\n```python\n{program}\n```\nDone."


ADD = "a, b = map(int, input().split())\nprint(a + b)"
STDIN = [{"input": "1 2\n", "output": "3\n"}, {"input": "5 7", "output": "12"}]


@pytest.fixture(scope="module")
def reward() -> CodeReward:
    return CodeReward(allow_execution=True, seconds=2.0, workers=2)


def test_it_refuses_without_opt_in(monkeypatch):
    monkeypatch.delenv("TRL_BRIDGE_RUN_CODE", raising=False)
    with pytest.raises(CodeExecutionRefused, match="TRL_BRIDGE_RUN_CODE"):
        code_reward([fenced(ADD)], [STDIN])
    monkeypatch.setenv("TRL_BRIDGE_RUN_CODE", "1")
    assert code_reward([fenced(ADD)], [STDIN]) == [1.0]


def test_every_form_of_tests(reward):
    function = "def add(a, b):\n    print('noise')\n    return a + b"
    solution = "class Solution:\n    def add(self, a, b):\n        return a + b"
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


FORBIDDEN = {
    "time": "while True: pass",
    "sleep": "import time; time.sleep(60)",
    "memory": "x = bytearray(3 * 10**9)",
    "fork": "import os\nif os.fork() == 0: os._exit(0)",
    "spawn": "import subprocess; subprocess.run(['true'], check=True)",
    "socket": "import socket; socket.socket()",
    "kill": "import os; os.kill(os.getppid(), 0)",
    "file size": "open('big', 'wb').write(b'x' * 2**22)",
    "output": "import sys\nfor _ in range(4000): sys.stdout.write('x' * 1024)\nsys.stdout.flush()",
}


@pytest.mark.parametrize("name", FORBIDDEN)
def test_what_a_program_cannot_do(name, reward):
    start = time.monotonic()
    # The program answers right if it gets past what it must not do.
    assert reward([fenced(FORBIDDEN[name] + "\nprint('past')")], [[{"input": "", "output": "past"}]]) == [0.0]
    assert time.monotonic() - start < 8.0


def test_what_a_program_can_do(reward):
    program = "import threading, os, tempfile\nt = threading.Thread(target=lambda: print('in a thread'))\nt.start(); t.join()\nopen('f', 'w').write('x')\nprint(os.listdir('.'), len(os.environ) < 8)"
    assert reward([fenced(program)], [[{"input": "", "output": "in a thread\n['f'] True"}]]) == [1.0]


def test_a_batch_has_a_deadline():
    reward = CodeReward(allow_execution=True, seconds=30.0, batch_limit=2.0, workers=2)
    start = time.monotonic()
    assert reward([fenced("while True: pass")] * 6, [STDIN] * 6) == [0.0] * 6
    assert time.monotonic() - start < 6.0


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

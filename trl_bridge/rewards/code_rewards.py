"""Reward for programs: each runs against its tests in a confined subprocess, after the user has opted in."""

import json
import os
import re
import secrets
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from decimal import Decimal, InvalidOperation
from pathlib import Path
from typing import Any

from .completions import Completion, LogExtra, LogMetric, check_lengths, log_answers, visible_text


OPT_IN = "TRL_BRIDGE_RUN_CODE"
_FENCE = re.compile(r"```(?:python3?|py)?[ \t]*\n(.*?)```", re.DOTALL | re.IGNORECASE)
_RUNNER = str(Path(__file__).with_name("code_runner.py"))


class CodeExecutionRefused(RuntimeError):
    """Model-written code would run, and the user has not allowed it."""


def last_program(text: str | None) -> str | None:
    """The last fenced block (```python ... ```) of a text; `None` where there is none."""
    blocks = _FENCE.findall(text or "")
    return blocks[-1] if blocks and blocks[-1].strip() else None


def parse_tests(tests: Any) -> list[dict[str, Any]]:
    """Tests of one row in one form."""
    if isinstance(tests, str):
        tests = json.loads(tests) if tests.lstrip().startswith(("[", "{")) else [tests]
    if isinstance(tests, dict):
        extra = {"fn_name": tests["fn_name"], "testtype": "functional"} if tests.get("fn_name") else {}
        tests = [{"input": i, "output": o, **extra} for i, o in zip(tests["inputs"], tests["outputs"], strict=True)]
    parsed: list[dict[str, Any]] = []
    for test in tests or []:
        if isinstance(test, str):
            parsed.append({"kind": "assert", "test": test})
        elif test.get("testtype") == "functional":
            given, expected = test["input"], test["output"]
            given = (
                [json.loads(line) for line in given.splitlines() if line.strip()] if isinstance(given, str) else given
            )
            expected = json.loads(expected) if isinstance(expected, str) else expected
            parsed.append({"kind": "function", "name": test["fn_name"], "arguments": given, "expected": expected})
        elif "input" in test and "output" in test:
            parsed.append({"kind": "stdin", "stdin": test["input"], "expected": test["output"]})
        else:
            raise ValueError(
                f"`tests` has an entry with the keys {sorted(test)}: see the docs for the three known forms."
            )
    if not parsed:
        raise ValueError("`tests` is empty: a program without a test cannot be judged.")
    return parsed


def same_output(given: str, expected: str) -> bool:
    """Whether two outputs have the same lines, blanks at their ends aside; numbers by exact value (`1.0` is `1`)."""
    one, two = ([line.split() for line in text.strip().splitlines()] for text in (given, expected))
    if one == two:
        return True
    try:
        return [[Decimal(x) for x in line] for line in one] == [[Decimal(x) for x in line] for line in two]
    except InvalidOperation:
        return False


class CodeReward:
    """
    Reward 1.0 for a program that passes all its tests, else 0.0 (or the fraction passed). See [`code_reward`].

    Args:
        allow_execution (`bool`, *optional*, defaults to `False`):
            Opt-in to running code that a model wrote. The environment variable `TRL_BRIDGE_RUN_CODE=1` does the same.
        partial (`bool`, *optional*, defaults to `False`):
            Whether to pay the fraction of tests passed.
        seconds (`float`, *optional*, defaults to `5.0`):
            Wall-clock seconds (and seconds of CPU) for each test.
        memory_gb (`float`, *optional*, defaults to `1.0`):
            Address space of a program.
        batch_limit (`float`, *optional*, defaults to `300.0`):
            Seconds for a batch; what has not passed by then fails.
        workers (`int`, *optional*):
            Programs at a time. Defaults to the number of CPU cores.
    """

    def __init__(
        self,
        allow_execution: bool = False,
        partial: bool = False,
        seconds: float = 5.0,
        memory_gb: float = 1.0,
        batch_limit: float = 300.0,
        workers: int | None = None,
    ):
        self.__name__ = "code_reward"
        self.allow_execution = allow_execution
        self.partial = partial
        self.seconds = seconds
        self.memory = int(memory_gb * 1e9)
        self.batch_limit = batch_limit
        self.workers = workers or os.cpu_count() or 1

    def __call__(
        self,
        completions: Sequence[Completion],
        tests: Sequence[Any],
        log_extra: LogExtra | None = None,
        log_metric: LogMetric | None = None,
        **kwargs: Any,
    ) -> list[float | None]:
        if not (self.allow_execution or os.environ.get(OPT_IN) == "1"):
            raise CodeExecutionRefused(
                "code_reward runs programs that a model wrote. Read docs/rewards.md for what isolation it gives, then "
                f"set {OPT_IN}=1 in the environment or use CodeReward(allow_execution=True)."
            )
        check_lengths(completions, tests, "tests")
        programs = [last_program(visible_text(completion)) for completion in completions]
        parsed = [parse_tests(row) for row in tests]
        deadline = time.monotonic() + self.batch_limit
        with ThreadPoolExecutor(self.workers) as threads:
            rewards = list(
                threads.map(lambda row: self._score(programs[row], parsed[row], deadline), range(len(tests)))
            )
        log_answers(log_extra, tests, programs, "tests")
        if log_metric is not None:
            log_metric("code_reward/no_program_fraction", sum(p is None for p in programs) / max(1, len(programs)))
        return list(rewards)

    def _score(self, program: str | None, tests: list[dict[str, Any]], deadline: float) -> float:
        if program is None:
            return 0.0
        passed = 0
        for test in tests:
            if time.monotonic() < deadline and self._passes(program, test, deadline):
                passed += 1
            elif not self.partial:
                return 0.0
        return passed / len(tests)

    def _passes(self, program: str, test: dict[str, Any], deadline: float) -> bool:
        token = secrets.token_hex(16)
        request = {
            "program": program,
            "seconds": self.seconds,
            "memory": self.memory,
            "file_size": 2**20,
            "token": token,
        }
        request |= {key: value for key, value in test.items() if key != "expected"}
        output = self._run(request, min(self.seconds, max(0.1, deadline - time.monotonic())))
        if output is None:
            return False
        if test["kind"] == "assert":
            return output == token
        if test["kind"] == "stdin":
            return same_output(output, test["expected"])
        try:
            return json.loads(output) == test["expected"]
        except ValueError:
            return False

    @staticmethod
    def _run(request: dict[str, Any], seconds: float) -> str | None:
        with tempfile.TemporaryDirectory(prefix="program-") as folder, tempfile.TemporaryFile() as stdout:
            process = subprocess.Popen(
                [sys.executable, "-I", "-B", _RUNNER],
                stdin=subprocess.PIPE,
                stdout=stdout,
                stderr=subprocess.DEVNULL,
                cwd=folder,
                env={"PATH": "/usr/bin:/bin", "HOME": folder, "TMPDIR": folder, "OMP_NUM_THREADS": "1"},
                start_new_session=True,
            )
            try:
                # Start-up of the interpreter is not the program's time.
                process.communicate(json.dumps(request).encode() + b"\n", timeout=seconds + 1.0)
            except subprocess.TimeoutExpired:
                return None
            finally:
                try:
                    os.killpg(process.pid, signal.SIGKILL)
                except ProcessLookupError:
                    pass
                process.wait()
            if process.returncode != 0:
                return None
            stdout.seek(0)
            return stdout.read(2**20).decode("utf-8", "replace")


_default = CodeReward()


def code_reward(
    completions: Sequence[Completion],
    tests: Sequence[Any],
    log_extra: LogExtra | None = None,
    log_metric: LogMetric | None = None,
    **kwargs: Any,
) -> list[float | None]:
    """
    Reward 1.0 where the last fenced Python program of the completion passes all tests of its row, else 0.0.

    Each test runs in a subprocess of its own with limits on time, memory, file size and open files, without new
    processes and sockets (a seccomp filter), in an empty temporary directory with an empty environment. It can still
    READ every file that the training user can read: this is no container. Linux on x86_64 and aarch64 only; elsewhere
    every program fails.

    Args:
        completions (`list[str]` or `list[list[dict]]`):
            Completions, standard or conversational; the text after a think block counts.
        tests (`list`):
            Tests of each row; see [`~trl_bridge.rewards.code_rewards.parse_tests`].
        log_extra (`callable`, *optional*):
            Given by the trainer; gets the columns `tests` and `answer` (the program).
        log_metric (`callable`, *optional*):
            Given by the trainer; gets `code_reward/no_program_fraction`.
        **kwargs:
            Other columns of the dataset, ignored.

    Returns:
        `list[float | None]`:
            One reward per completion.

    Raises:
        [`~trl_bridge.rewards.code_rewards.CodeExecutionRefused`]:
            Unless `TRL_BRIDGE_RUN_CODE=1` is set; [`CodeReward`] has an argument for it.
        `ValueError`:
            If `tests` has an unknown form, or not one value per completion.
    """
    return _default(completions, tests, log_extra, log_metric, **kwargs)

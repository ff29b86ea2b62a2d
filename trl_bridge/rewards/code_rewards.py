"""Reward for programs: each runs against its tests in a sandbox, after the user has opted in."""

import ast
import json
import logging
import os
import re
import secrets
import threading
import time
import warnings
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from decimal import Decimal, InvalidOperation
from typing import Any

from .completions import Completion, LogExtra, LogMetric, cannot_judge, check_lengths, log_answers, visible_text
from .sandbox import WALLS, CodeExecutionRefused, Isolation, Sandbox, choose


logger = logging.getLogger(__name__)

OPT_IN = "TRL_BRIDGE_RUN_CODE"
_FENCE = re.compile(r"([ \t]*)(`{3,}|~{3,})(.*)")
_PYTHON = re.compile(r"[{.\s]*(?:python|py)[\d.]*(?![\w-])", re.IGNORECASE)


def last_program(text: str | None) -> str | None:
    """The last closed Python block of a text, or the last without a language where none says Python; `None` without."""
    tagged: str | None = None
    plain: str | None = None
    indent, mark, info = 0, "", ""
    lines: list[str] = []
    for line in (text or "").split("\n"):
        line = line.removesuffix("\r")
        fence = _FENCE.fullmatch(line)
        if mark:
            if fence and fence[2].startswith(mark) and not fence[3].strip() and len(fence[1]) <= indent + 3:
                block = "".join(f"{line}\n" for line in lines)
                if _PYTHON.match(info):
                    tagged = block
                elif not info:
                    plain = block
                mark = ""
            else:
                # A fence in a list is indented, and its lines are by as much.
                lines.append(line[min(indent, len(line) - len(line.lstrip(" \t"))) :])
        elif fence and "`" not in fence[3]:
            indent, mark, info, lines = len(fence[1]), fence[2], fence[3].strip(), []
    program = plain if tagged is None else tagged
    return program if program and program.strip() else None


def _can_fail(test: str) -> bool:
    """Whether a program that runs may still fail a test's statements."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            tree = ast.parse(test)
    except (SyntaxError, ValueError, MemoryError) as error:
        raise ValueError(f"a test is no Python: {error}") from error
    return any(isinstance(node, (ast.Assert, ast.Raise, ast.Call)) for node in ast.walk(tree))


def _text(value: Any) -> str:
    """Text of stdin or stdout: as it is, a number as written, a list as its lines."""
    if isinstance(value, list):
        return "\n".join(map(_text, value))
    if isinstance(value, bool) or not isinstance(value, (str, int, float)):
        raise ValueError(f"an input or output is of type {type(value).__name__}")
    return str(value)


def _json_lines(text: str) -> list[Any] | None:
    """The JSON value of each line of a text, or of all of it; `None` where it is no JSON."""
    try:
        return [json.loads(line) for line in text.splitlines() if line.strip()]
    except ValueError:
        pass
    try:
        return [json.loads(text)]
    except ValueError:
        return None


def _calls(pairs: Sequence[tuple[Any, Any]], name: str) -> list[dict[str, Any]]:
    """Tests that call a function: inputs and outputs as values, or as text that holds JSON or is the value itself."""
    inputs = [_json_lines(given) if isinstance(given, str) else [] for given, _ in pairs]
    outputs = [_json_lines(output) if isinstance(output, str) else [None] for _, output in pairs]
    # What is not JSON in one test of a row is plain text in all of them.
    read_inputs = None not in inputs
    read_outputs = all(values is not None and len(values) == 1 for values in outputs)
    # APPS puts each output in a list of one. A row whose function returns such lists looks the same, so either will do.
    wrapped = all(isinstance(output, list) and len(output) == 1 for _, output in pairs)
    calls = []
    for (given, output), arguments, values in zip(pairs, inputs, outputs, strict=True):
        if not isinstance(given, str):
            arguments = given if isinstance(given, list) else [given]
        elif not read_inputs:
            arguments = [given]
        expected = [output, *(output if wrapped else [])]
        if isinstance(output, str) and read_outputs:
            # Beside inputs that are values, an output may be text as well.
            expected = [*(values or []), *([] if isinstance(given, str) else [output])]
        calls.append({"kind": "function", "name": name, "arguments": arguments, "expected": expected})
    return calls


def _entries(tests: Any) -> list[Any]:
    """The tests of a row as a list of statements or of mappings."""
    if isinstance(tests, str):
        tests = json.loads(tests) if tests.lstrip().startswith(("[", "{")) else [tests]
    if isinstance(tests, dict):
        given, expected = tests.get("inputs"), tests.get("outputs")
        if not (isinstance(given, list) and isinstance(expected, list) and len(given) == len(expected)):
            raise ValueError("`inputs` and `outputs` are not two lists of the same length")
        extra = {"fn_name": tests["fn_name"], "testtype": "functional"} if tests.get("fn_name") else {}
        tests = [{"input": one, "output": other, **extra} for one, other in zip(given, expected, strict=True)]
    if not isinstance(tests, (list, tuple)):
        raise ValueError(f"`tests` is of type {type(tests).__name__}")
    return list(tests)


def parse_tests(tests: Any) -> list[dict[str, Any]]:
    """Tests of one row in one form; `ValueError` where they do not tell a right program from any that runs."""
    statements: list[str] = []
    pairs: list[tuple[str, str]] = []
    calls: dict[Any, list[tuple[Any, Any]]] = {}
    for test in _entries(tests):
        if isinstance(test, str):
            if test.strip():
                statements.append(test)
        elif not isinstance(test, dict):
            raise ValueError(f"`tests` has an entry of type {type(test).__name__}")
        elif "input" not in test or "output" not in test:
            raise ValueError(
                f"`tests` has an entry with the keys {sorted(map(str, test))}: see the docs for the three known forms."
            )
        elif test.get("testtype") == "functional":
            name = test.get("fn_name")
            if not isinstance(name, str) or not name.strip():
                raise ValueError("a test of a function does not name it")
            calls.setdefault(name.strip(), []).append((test["input"], test["output"]))
        else:
            pairs.append((_text(test["input"]), _text(test["output"])))
    if not (statements or pairs or calls):
        raise ValueError("`tests` is empty: a program without a test cannot be judged.")
    able = [_can_fail(test) for test in statements] + [bool(expected.strip()) for _, expected in pairs]
    if not (calls or any(able)):
        raise ValueError("`tests` has only tests that any program passes")
    parsed: list[dict[str, Any]] = [{"kind": "assert", "test": test} for test in statements]
    parsed += [{"kind": "stdin", "stdin": given, "expected": expected} for given, expected in pairs]
    for name, given_and_expected in calls.items():
        parsed += _calls(given_and_expected, name)
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
            Seconds for each test: of CPU, and on the clock without those in which the machine had no core for the program.
        memory_gb (`float`, *optional*, defaults to `1.0`):
            Address space of a program.
        batch_limit (`float`, *optional*):
            Seconds for a batch; a program that is not judged by then gets `None`. Defaults to 300, or the seconds of one
            test for each completion where that is more.
        workers (`int`, *optional*):
            Programs at a time. Defaults to the number of CPU cores.
        isolation (`str`, *optional*, defaults to `"auto"`):
            Wall between the program and the machine: `"bubblewrap"` (namespaces), `"kernel"` (Landlock), either with a
            filter that allows only the system calls that Python needs, or `"limits"` (the filter and limits; a program may
            read what its user may). `"auto"` is the wall that `TRL_BRIDGE_RUN_CODE` names, else the first of the first two
            that the machine gives. Where it cannot be had nothing runs.
    """

    def __init__(
        self,
        allow_execution: bool = False,
        partial: bool = False,
        seconds: float = 5.0,
        memory_gb: float = 1.0,
        batch_limit: float | None = None,
        workers: int | None = None,
        isolation: Isolation = "auto",
    ):
        if isolation not in ("auto", *WALLS):
            raise ValueError(f"`isolation` must be 'auto' or one of {list(WALLS)}, got {isolation!r}.")
        self.__name__ = "code_reward"
        self.allow_execution = allow_execution
        self.partial = partial
        self.seconds = seconds
        self.memory = int(memory_gb * 1e9)
        self.batch_limit = batch_limit
        self.workers = workers or os.cpu_count() or 1
        self.isolation = isolation
        self._said: set[str] = set()

    def __call__(
        self,
        completions: Sequence[Completion],
        tests: Sequence[Any],
        log_extra: LogExtra | None = None,
        log_metric: LogMetric | None = None,
        **kwargs: Any,
    ) -> list[float | None]:
        opted = os.environ.get(OPT_IN, "")
        if not (self.allow_execution or opted == "1" or opted in WALLS):
            raise CodeExecutionRefused(
                "code_reward runs programs that a model wrote. Read docs/rewards.md for what isolation it gives, then "
                f"set {OPT_IN}=1 in the environment or use CodeReward(allow_execution=True)."
            )
        check_lengths(completions, tests, "tests")
        programs = [last_program(visible_text(completion)) for completion in completions]
        rewards = self._judge(programs, [_parsed(row, value) for row, value in enumerate(tests)], opted)
        log_answers(log_extra, tests, programs, "tests")
        if log_metric is not None:
            log_metric("code_reward/no_program_fraction", sum(p is None for p in programs) / max(1, len(programs)))
        return rewards

    def _judge(
        self, programs: Sequence[str | None], tests: Sequence[list[dict[str, Any]] | None], opted: str
    ) -> list[float | None]:
        rewards: list[float | None] = [None if row is None else 0.0 for row in tests]
        rows = [row for row, program in enumerate(programs) if program is not None and tests[row] is not None]
        wall = choose(opted if self.isolation == "auto" and opted in WALLS else self.isolation)
        seconds = self.batch_limit
        if seconds is None:
            seconds = max(300.0, self.seconds * len(rows) / self.workers)
        deadline = time.monotonic() + seconds
        lost: list[str] = []
        sandboxes: list[Sandbox] = []
        mine = threading.local()

        def prepare() -> None:
            mine.sandbox = Sandbox(wall)
            sandboxes.append(mine.sandbox)

        def score(row: int) -> float | None:
            reward, why = self._score(mine.sandbox, programs[row] or "", tests[row] or [], deadline)
            if reward is None:
                lost.append(why)
            return reward

        try:
            with ThreadPoolExecutor(max(1, min(self.workers, len(rows))), initializer=prepare) as threads:
                for row, reward in zip(rows, threads.map(score, rows), strict=True):
                    rewards[row] = reward
        finally:
            for sandbox in sandboxes:
                sandbox.close()
        for why in ("cut", "killed"):
            if why in lost and why not in self._said:
                self._said.add(why)
                logger.warning(
                    "code_reward: %d of %d programs %s and are not rewarded (reward None).",
                    lost.count(why),
                    len(programs),
                    f"were not judged within the {seconds:.0f} seconds of their batch (`batch_limit`)"
                    if why == "cut"
                    else "were killed twice from outside, as a machine short of memory does,",
                )
        return rewards

    def _score(
        self, sandbox: Sandbox, program: str, tests: list[dict[str, Any]], deadline: float
    ) -> tuple[float | None, str]:
        """The reward of a program, or `None` and what kept it from being judged."""
        passed, why = 0, ""
        for test in tests:
            outcome = self._passes(sandbox, program, test, deadline)
            if isinstance(outcome, str):
                why = outcome
                if self.partial or outcome == "cut":
                    break
            elif outcome:
                passed += 1
            elif not self.partial:
                return 0.0, ""
        return (None, why) if why else (passed / len(tests), "")

    def _passes(self, sandbox: Sandbox, program: str, test: dict[str, Any], deadline: float) -> bool | str:
        token = secrets.token_hex(16)
        expected = test.get("expected", token)
        request = {
            "program": program,
            "seconds": self.seconds,
            "memory": self.memory,
            "file_size": 2**20 + 2 * len(str(expected)),
            "token": token,
        }
        request |= {key: value for key, value in test.items() if key != "expected"}
        for _ in range(2):
            remaining = deadline - time.monotonic()
            if remaining <= 0:
                return "cut"
            answer = sandbox.run(request | {"remaining": remaining})
            if answer["end"] != "killed":
                break
        if answer["end"] in ("cut", "killed"):
            return str(answer["end"])
        if answer["end"] == "limit" or answer["code"] != 0:
            return False
        output = answer["output"]
        if test["kind"] == "assert":
            return output == token
        if test["kind"] == "stdin":
            return same_output(output, expected)
        try:
            return json.loads(output) in expected
        except (ValueError, RecursionError):
            return False


def _parsed(row: int, tests: Any) -> list[dict[str, Any]] | None:
    """The tests of a row, or `None`, with a warning, where they are none."""
    try:
        return parse_tests(tests)
    except (ValueError, RecursionError) as error:
        cannot_judge("code_reward", "tests", row, tests, f"cannot be read ({error})")
        return None


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

    Each test runs in a fresh process behind a wall: bubblewrap where it works, else Landlock, with limits on time, memory,
    files and threads, and no new processes, sockets, capabilities or environment. Where neither wall can be had it refuses;
    see [`CodeReward`] for other choices and docs/rewards.md for what each keeps out.

    Args:
        completions (`list[str]` or `list[list[dict]]`):
            Completions, standard or conversational; the text after a think block counts.
        tests (`list`):
            Tests of each row: `{"input", "output"}` mappings, assert statements, or `{"inputs", "outputs", "fn_name"}`.
        log_extra (`callable`, *optional*):
            Given by the trainer; gets the columns `tests` and `answer` (the program).
        log_metric (`callable`, *optional*):
            Given by the trainer; gets `code_reward/no_program_fraction`.
        **kwargs:
            Other columns of the dataset, ignored.

    Returns:
        `list[float | None]`:
            One reward per completion; `None` where the row's tests cannot be read (with a warning that names the column),
            where the batch's deadline came first, and where the program was killed from outside, twice.

    Raises:
        [`~trl_bridge.rewards.code_rewards.CodeExecutionRefused`]:
            Unless `TRL_BRIDGE_RUN_CODE=1` (or the name of a wall) is set, and where the machine gives no wall.
        `ValueError`:
            If `tests` has not one value per completion.
    """
    return _default(completions, tests, log_extra, log_metric, **kwargs)

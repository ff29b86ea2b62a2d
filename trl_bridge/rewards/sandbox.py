"""The outer side of the sandbox for programs: which wall this machine gives, and a process behind it that runs tests."""

import functools
import json
import logging
import os
import select
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from typing import IO, Any, Literal

from . import code_runner


logger = logging.getLogger(__name__)

Isolation = Literal["auto", "bubblewrap", "kernel", "limits"]
WALLS = ("bubblewrap", "kernel", "limits")

_RUNNER = code_runner.__file__
_ADVICE = (
    "Install bubblewrap (`apt-get install bubblewrap`, `dnf install bubblewrap`, conda-forge) where user namespaces are "
    "allowed, or use Linux 5.13 or newer with Landlock enabled. Inside a container or a virtual machine of your own, with "
    'nothing in it that a program must not see, CodeReward(isolation="limits") does without both.'
)


class CodeExecutionRefused(RuntimeError):
    """Model-written code would run, and the user has not allowed it, or the wall that is wanted cannot be had."""


class _Lost(Exception):
    pass


def _python_links() -> list[str]:
    """Folders on the way from the interpreter's path to its file, and what tells a virtual environment."""
    path, folders = sys.executable, []
    while True:
        folders.append(os.path.dirname(path))
        if not os.path.islink(path):
            return [*folders, f"{sys.prefix}/pyvenv.cfg"]
        path = os.path.join(os.path.dirname(path), os.readlink(path))


@functools.cache
def _bubblewrap() -> list[str]:
    """Command that runs what follows it behind namespaces, with a writable /program and what Python needs read-only."""
    name = shutil.which("bwrap") or "bwrap"
    size = "--size" in subprocess.run([name, "--help"], capture_output=True, text=True, timeout=20).stdout
    command = [name, "--unshare-user-try", "--unshare-pid", "--unshare-net", "--unshare-ipc", "--unshare-uts"]
    command += ["--unshare-cgroup-try", "--die-with-parent", "--new-session", "--as-pid-1", "--cap-drop", "ALL"]
    command += ["--hostname", "sandbox", "--proc", "/proc"]
    for device in ("null", "zero", "random", "urandom"):
        command += ["--dev-bind", f"/dev/{device}", f"/dev/{device}"]
    for number, stream in enumerate(("stdin", "stdout", "stderr")):
        command += ["--symlink", f"/proc/self/fd/{number}", f"/dev/{stream}"]
    command += ["--symlink", "/proc/self/fd", "/dev/fd"]
    for path in (*code_runner.readable_paths(), *_python_links(), _RUNNER):
        command += ["--ro-bind-try", path, path]
    command += [*(["--size", str(code_runner.MAX_BYTES)] if size else []), "--tmpfs", "/program"]
    return [*command, "--remount-ro", "/", "--chdir", "/", "--"]


class Sandbox:
    """A warm process behind a wall, which runs one test at a time. It starts with the first test and again after a loss."""

    def __init__(self, wall: str):
        self.wall = wall
        self.landlock = 0
        self.problem = ""
        self._process: subprocess.Popen[bytes] | None = None
        self._folder: str | None = None
        self._errors: IO[bytes] | None = None

    def _start(self) -> subprocess.Popen[bytes]:
        self._folder = tempfile.mkdtemp(prefix="code-reward-")
        self._errors = tempfile.TemporaryFile()
        inside = self.wall == "bubblewrap"
        command = [sys.executable, "-I", "-B", "-X", "utf8", _RUNNER, "/program" if inside else self._folder]
        try:
            self._process = subprocess.Popen(
                [*_bubblewrap(), *command] if inside else command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=self._errors,
                cwd="/",
                env={"PATH": "/usr/bin:/bin", "OMP_NUM_THREADS": "1"},
                start_new_session=True,
            )
        except OSError as error:
            raise _Lost(str(error)) from error
        self.landlock = self._answer(self._process, 30.0)["landlock"]
        return self._process

    def _answer(self, process: subprocess.Popen[bytes], seconds: float) -> dict[str, Any]:
        assert process.stdout is not None
        end, line = time.monotonic() + seconds, bytearray()
        ready = select.poll()
        ready.register(process.stdout, select.POLLIN)
        while not line.endswith(b"\n"):
            if not ready.poll(max(0.0, end - time.monotonic()) * 1000):
                raise _Lost("no answer")
            part = os.read(process.stdout.fileno(), 2**20)
            if not part:
                raise _Lost("the process ended")
            line += part
        return json.loads(line)

    def run(self, request: dict[str, Any]) -> dict[str, Any]:
        """
        Run one test.

        Args:
            request (`dict`):
                Program, kind of test and limits, as `code_runner` reads them. `remaining` are the seconds after which the
                test is cut off.

        Returns:
            `dict`:
                `end`: `"exit"`, `"limit"` (the program's own), `"cut"` or `"killed"` (not by the program's doing), with
                `code` and `output`.
        """
        if self._process is not None and self._process.poll() is not None:
            self.close()
        try:
            process = self._process or self._start()
            assert process.stdin is not None
            process.stdin.write(json.dumps(request).encode() + b"\n")
            process.stdin.flush()
            answer = self._answer(process, request["remaining"] + 10.0)
        except (_Lost, BrokenPipeError) as error:
            self.close()
            self.problem = self.problem or str(error)
            return {"end": "killed"}
        self.problem = answer.get("problem", "")
        return answer

    def close(self) -> None:
        """End the process and remove its folder."""
        process, self._process = self._process, None
        if process is not None:
            assert process.stdin is not None and process.stdout is not None
            try:
                os.killpg(process.pid, signal.SIGKILL)
            except ProcessLookupError:
                pass
            process.wait()
            process.stdout.close()
            try:
                process.stdin.close()
            except BrokenPipeError:
                pass  # a request that nobody read
        if self._errors is not None:
            self._errors.seek(0)
            self.problem = self._errors.read(2000).decode("utf-8", "replace").strip()
            self._errors.close()
            self._errors = None
        if self._folder is not None:
            try:
                code_runner.empty_folder(self._folder)
                os.rmdir(self._folder)
            except FileNotFoundError:
                pass  # the process has done it
            except OSError as error:
                logger.warning("what a program left behind in %s could not be removed: %s", self._folder, error)
            self._folder = None


@functools.cache
def missing(wall: str) -> str | None:
    """Why a wall cannot be had on this machine, found by running a program behind it; `None` where it can."""
    if not code_runner.supported():
        return "programs can be confined on Linux (x86_64, aarch64) only"
    if wall == "bubblewrap" and shutil.which("bwrap") is None:
        return "bubblewrap (`bwrap`) is not installed"
    sandbox = Sandbox(wall)
    request = {"program": "print(6 * 7)", "kind": "stdin", "seconds": 20, "memory": 10**9, "file_size": 1000}
    try:
        answer = sandbox.run(request | {"remaining": 20})
        if answer["end"] != "exit" or answer["output"] != "42\n":
            return sandbox.problem or f"a program does not run behind it ({answer['end']})"
        if wall == "kernel" and not sandbox.landlock:
            return "the kernel has no Landlock, or does not enable it"
    finally:
        sandbox.close()
    return None


def choose(isolation: str) -> str:
    """The wall to use; raises [`CodeExecutionRefused`] where the machine does not have what is wanted."""
    if isolation not in ("auto", *WALLS):
        raise ValueError(f"`isolation` must be 'auto' or one of {list(WALLS)}, got {isolation!r}.")
    reasons = []
    for wall in WALLS[:2] if isolation == "auto" else (isolation,):
        reason = missing(wall)
        if reason is None:
            return wall
        reasons.append(f"{wall}: {reason}")
    raise CodeExecutionRefused(
        f"this machine does not give the isolation that is wanted ({'; '.join(reasons)}). {_ADVICE}"
    )


def report() -> str:
    """Which walls this machine gives, the one that is used first; for `trl-bridge env`."""
    reasons = {wall: missing(wall) for wall in WALLS[:2]}
    given = [wall for wall, reason in reasons.items() if reason is None]
    lacking = [f"no {wall}: {' '.join(reason.split())}" for wall, reason in reasons.items() if reason is not None]
    return ", ".join(given or ["none"]) + (f" ({'; '.join(lacking)})" if lacking else "")

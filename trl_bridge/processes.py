"""
What the processes of a command do when one of them is told to stop, or dies.

A signal ends each with one line; a process that another has started ends with it, even where that one is killed.
"""

import contextlib
import os
import select
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any


Handler = Callable[[int, FrameType | None], None]

_SIGNALS = (signal.SIGINT, signal.SIGTERM)
# In the environment of what the command starts: the machine and the process that it ends with.
_STARTER = "TRL_BRIDGE_STARTED_BY"
_GRACE = 30.0
# A terminal's Ctrl-C comes twice, from the terminal itself and handed on by the command.
_SAME = 2.0


class Stopped(KeyboardInterrupt):
    """A signal asks the process to end."""

    def __init__(self, number: int):
        super().__init__(number)
        self.number = number


def exit_code(returned: int) -> int:
    """The exit code for what `subprocess` returned: a shell counts signals from 128."""
    return 128 - returned if returned < 0 else returned


@contextlib.contextmanager
def stoppable(program: str, advice: Callable[[], str] = str) -> Iterator[None]:
    """Inside, SIGINT and SIGTERM end the process with one line: the signal's name, and what `advice` says."""
    owner, first = os.getpid(), 0.0

    def stop(number: int, frame: FrameType | None) -> None:
        nonlocal first
        if os.getpid() != owner:  # a forked child, which ends as if there were no handler
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
        elif not first:
            first = time.monotonic()
            if _keeps_exceptions(frame):
                say(number)
                os._exit(128 + number)
            raise Stopped(number)
        elif time.monotonic() - first > _SAME:  # it was asked before, and did not come to an end
            os._exit(128 + number)

    def say(number: int) -> None:
        if os.environ.get("LOCAL_RANK", "0") == "0":
            sys.stderr.write(f"\n{program}: stopped by {signal.Signals(number).name}{advice()}\n")
            sys.stderr.flush()

    before = _handle(stop)
    try:
        yield
    except KeyboardInterrupt as error:
        before = {}  # the handler stays, so that the same signal again does not interrupt the end
        number = getattr(error, "number", signal.SIGINT)
        say(number)
        raise SystemExit(128 + number) from None
    finally:
        _restore(before)


@contextlib.contextmanager
def handing_on() -> Iterator[None]:
    """Inside, signals go to the processes that this one has started and waits for; the second time they are killed."""
    import psutil

    asked = 0.0

    def hand_on(number: int, frame: FrameType | None) -> None:
        nonlocal asked
        children = psutil.Process().children()
        if not children:
            raise Stopped(number)
        again = asked and time.monotonic() - asked > _SAME
        if not asked:
            asked = time.monotonic()
            timer = threading.Timer(_GRACE, _send, (children, signal.SIGKILL))
            timer.daemon = True
            timer.start()
        _send(children, signal.SIGKILL if again else number)

    kept = os.environ.get(_STARTER)
    os.environ[_STARTER] = f"{socket.gethostname()}:{os.getpid()}"
    before = _handle(hand_on)
    try:
        yield
    finally:
        _restore(before)
        os.environ.pop(_STARTER)
        if kept is not None:
            os.environ[_STARTER] = kept


def end_with_starter() -> None:
    """End this process when the command that has started it, directly or through a launcher, is gone."""
    machine, _, number = os.environ.get(_STARTER, "").rpartition(":")
    if machine == socket.gethostname():
        end_with(int(number))


def end_with(number: int) -> None:
    """End this process when another one of this machine is gone (on Linux)."""
    if not hasattr(os, "pidfd_open"):
        return
    try:
        other = os.pidfd_open(number)
    except ProcessLookupError:
        os.kill(os.getpid(), signal.SIGTERM)
        return
    threading.Thread(target=_end_after, args=(other,), daemon=True).start()


def _end_after(other: int) -> None:
    select.select([other], [], [])
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(_GRACE)
    os.kill(os.getpid(), signal.SIGKILL)


def _keeps_exceptions(frame: FrameType | None) -> bool:
    """Whether an exception may not reach us: an import may turn it into its own or abort, a finalizer drops it."""
    while frame is not None:
        if frame.f_code.co_name == "__del__" or frame.f_code.co_filename.startswith("<frozen importlib"):
            return True
        frame = frame.f_back
    return False


def _send(processes: list[Any], number: int) -> None:
    for process in processes:
        if process.is_running():
            process.send_signal(number)


def _handle(handler: Handler) -> dict[int, Any]:
    """Set the handler of both signals; returns those that were there."""
    # Only a main thread may, and others are not interrupted either.
    signals = _SIGNALS if threading.current_thread() is threading.main_thread() else ()
    return {number: signal.signal(number, handler) for number in signals}


def _restore(handlers: dict[int, Any]) -> None:
    for number, handler in handlers.items():
        signal.signal(number, handler)

"""
Runs one program of a model: `python -I code_runner.py`, a JSON request as the first line of stdin. Standard library only.

The limits are set in this process before the program starts: seconds of CPU, memory, file size, open files, no new
processes, no sockets (a seccomp filter), no new privileges.
"""

import ctypes
import io
import json
import os
import platform
import resource
import struct
import sys


# Per machine: audit number, clone, clone3; forbidden: fork, vfork, ptrace, process_vm_*, bpf, mount, unshare, setns and
# signals to other processes; then socket and io_uring_setup, which reach the network.
_MACHINES = {
    "x86_64": (0xC000003E, 56, 435, (57, 58, 101, 310, 311, 321, 165, 272, 308, 62, 200, 234, 424), (41, 425)),
    "aarch64": (0xC00000B7, 220, 435, (117, 270, 271, 280, 40, 97, 268, 129, 130, 131, 424), (198, 425)),
}
_CLONE_THREAD = 0x00010000
_LOAD, _EQUAL, _SET, _RETURN = 0x20, 0x15, 0x45, 0x06
_ALLOW, _EPERM, _ENOSYS, _KILL = 0x7FFF0000, 0x00050001, 0x00050026, 0x80000000


def confine() -> None:
    """Deny new processes and sockets to this process for good."""
    if sys.platform != "linux" or platform.machine() not in _MACHINES:
        raise OSError(f"programs can be confined on Linux (x86_64, aarch64) only, not on {platform.platform()}")
    audit, clone, clone3, processes, network = _MACHINES[platform.machine()]
    code = [(_LOAD, 0, 0, 4), (_EQUAL, 1, 0, audit), (_RETURN, 0, 0, _KILL), (_LOAD, 0, 0, 0)]
    if platform.machine() == "x86_64":
        # Calls of the x32 interface carry this bit and would pass under other numbers.
        code += [(0x35, 0, 1, 0x40000000), (_RETURN, 0, 0, _KILL)]
    for call in (*processes, *network):
        code += [(_EQUAL, 0, 1, call), (_RETURN, 0, 0, _EPERM)]
    # glibc falls back from clone3, whose flags a filter cannot see, to clone, whose flags it can.
    code += [(_EQUAL, 0, 1, clone3), (_RETURN, 0, 0, _ENOSYS)]
    code += [(_EQUAL, 0, 4, clone), (_LOAD, 0, 0, 16), (_SET, 1, 0, _CLONE_THREAD), (_RETURN, 0, 0, _EPERM)]
    code += [(_RETURN, 0, 0, _ALLOW), (_RETURN, 0, 0, _ALLOW)]
    program = ctypes.create_string_buffer(b"".join(struct.pack("HBBI", *line) for line in code))
    header = struct.pack("HxxxxxxP", len(code), ctypes.addressof(program))
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(38, 1, 0, 0, 0) or libc.prctl(22, 2, ctypes.c_char_p(header), 0, 0):
        raise OSError(ctypes.get_errno(), "the kernel refuses the seccomp filter")


def limit(request: dict) -> None:
    """Bound this process's time (seconds), memory, file size (bytes) and open files, as the request says."""
    seconds = int(request["seconds"]) + 1
    for name, value in (
        (resource.RLIMIT_CPU, seconds),
        (resource.RLIMIT_AS, int(request["memory"])),
        (resource.RLIMIT_FSIZE, int(request["file_size"])),
        (resource.RLIMIT_NOFILE, 32),
        (resource.RLIMIT_CORE, 0),
    ):
        resource.setrlimit(name, (value, value))


def main() -> None:
    """Read one request from stdin, run its program confined, and answer on stdout."""
    request = json.loads(sys.stdin.buffer.readline())
    limit(request)
    confine()
    sys.stdin = io.TextIOWrapper(io.BytesIO(request.get("stdin", "").encode()), encoding="utf-8")
    sys.argv = ["main.py"]
    sys.path.insert(0, os.getcwd())
    answers = os.dup(1)
    namespace: dict = {"__name__": "__main__", "__builtins__": __builtins__}
    kind = request["kind"]
    if kind != "stdin":
        # What such a program prints is not its answer.
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    exec(compile(request["program"], "main.py", "exec"), namespace)
    if kind == "assert":
        exec(compile(request["test"], "test.py", "exec"), namespace)
        os.write(answers, request["token"].encode())
    elif kind == "function":
        holder = namespace["Solution"]() if "Solution" in namespace else None
        function = getattr(holder, request["name"]) if holder is not None else namespace[request["name"]]
        os.write(answers, json.dumps(function(*request["arguments"])).encode())


if __name__ == "__main__":
    main()

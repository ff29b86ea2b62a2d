"""
The inner side of the sandbox: `python -I -B code_runner.py FOLDER`, a line of JSON a test on stdin, a line of JSON for each
answer on stdout. Standard library only.

The process stays warm and forks for every test. The child confines itself for good before its program starts: no
capabilities, limits, Landlock where the kernel has it, and a seccomp filter that allows only what Python needs.
"""

import atexit
import contextlib
import ctypes
import gc
import json
import os
import platform
import resource
import select
import signal
import stat
import struct
import sys
import sysconfig
import time
import types


# What programs import most: loaded once here instead of in every test.
import bisect, collections, copy, dataclasses, datetime, decimal, fractions, functools, heapq, itertools, math  # isort: skip # noqa: E401, F401
import operator, random, re, string, threading, typing  # isort: skip # noqa: E401, F401


MAX_FILES, MAX_BYTES, MAX_THREADS = 1000, 2**26, 128
_SYSTEM_PATHS = "/usr/lib /usr/lib64 /usr/local/lib /lib /lib64 /usr/share/zoneinfo /etc/ld.so.cache /etc/localtime /etc/alternatives"

# What Python needs, with the numbers on x86_64 and aarch64; the most frequent first.
_CALLS = """
read 0 63, write 1 64, futex 202 98, mmap 9 222, munmap 11 215, brk 12 214, lseek 8 62, close 3 57, fstat 5 80,
newfstatat 262 79, rt_sigaction 13 134, rt_sigprocmask 14 135, clock_gettime 228 113, gettimeofday 96 169, mprotect 10 226,
madvise 28 233, mremap 25 216, stat 4 -, lstat 6 -, statx 332 291, getdents64 217 61, getdents 78 -, readlink 89 -,
readlinkat 267 78, access 21 -, faccessat 269 48, faccessat2 439 439, readv 19 65, writev 20 66, pread64 17 67, pwrite64 18 68,
preadv 295 69, pwritev 296 70, preadv2 327 286, pwritev2 328 287, close_range 436 436, msync 26 227, rt_sigreturn 15 139,
rt_sigtimedwait 128 137, rt_sigsuspend 130 133, rt_sigpending 127 136, sigaltstack 131 132, restart_syscall 219 128,
clock_getres 229 114, clock_nanosleep 230 115, nanosleep 35 101, time 201 -, times 100 153, getrusage 98 165,
getitimer 36 102, setitimer 38 103, alarm 37 -, pause 34 -, timer_create 222 107, timer_settime 223 110,
timer_gettime 224 108, timer_delete 226 111, timer_getoverrun 225 109, timerfd_create 283 85, timerfd_settime 286 86,
timerfd_gettime 287 87, getpid 39 172, getppid 110 173, gettid 186 178, getuid 102 174, geteuid 107 175, getgid 104 176,
getegid 108 177, getgroups 115 158, getpgrp 111 -, getresuid 118 148, getresgid 120 150, uname 63 160, sysinfo 99 179,
getrandom 318 278, getcpu 309 168, sched_yield 24 124, sched_getaffinity 204 123, rseq 334 293, membarrier 324 283,
set_robust_list 273 99, set_tid_address 218 96, arch_prctl 158 -, exit 60 93, exit_group 231 94, dup 32 23, dup2 33 -,
dup3 292 24, pipe 22 -, pipe2 293 59, poll 7 -, ppoll 271 73, select 23 -, pselect6 270 72, epoll_create 213 -,
epoll_create1 291 20, epoll_ctl 233 21, epoll_wait 232 -, epoll_pwait 281 22, epoll_pwait2 441 441, eventfd 284 -,
eventfd2 290 19, sendto 44 206, recvfrom 45 207, recvmsg 47 212, shutdown 48 210, getsockname 51 204, getpeername 52 205,
getsockopt 55 209, setsockopt 54 208, mkdir 83 -, mkdirat 258 34, rmdir 84 -, unlink 87 -, unlinkat 263 35, rename 82 -,
renameat 264 38, renameat2 316 276, link 86 -, linkat 265 37, symlink 88 -, symlinkat 266 36, creat 85 -, ftruncate 77 46,
fallocate 285 47, fsync 74 82, fdatasync 75 83, flock 73 32, umask 95 166, getcwd 79 17, chdir 80 49, fchdir 81 50,
statfs 137 43, fstatfs 138 44, fadvise64 221 223, sendfile 40 71, copy_file_range 326 285, getrlimit 97 163, setrlimit 160 164
"""
# These only with the arguments that `_conditions` lists: argument, mask, values; all of a call's must hold.
_CONDITIONAL = {
    "open": (2, None),
    "openat": (257, 56),
    "ioctl": (16, 29),
    "fcntl": (72, 25),
    "prctl": (157, 167),
    "prlimit64": (302, 261),
    "kill": (62, 129),
    "tgkill": (234, 131),
    "socketpair": (53, 199),
    "clone": (56, 220),
}
_CLONE3, _NEWEST = 435, 450
_MACHINES = {"x86_64": (0, 0xC000003E), "aarch64": (1, 0xC00000B7)}
_LOAD, _AND, _EQUAL, _AT_LEAST, _RETURN = 0x20, 0x54, 0x15, 0x35, 0x06
_ALLOW, _EPERM, _ENOSYS, _KILL = 0x7FFF0000, 0x00050001, 0x00050026, 0x80000000

_libc = ctypes.CDLL(None, use_errno=True)


def supported() -> bool:
    """Whether programs can be confined on this machine at all."""
    return sys.platform == "linux" and platform.machine() in _MACHINES


def _check(result: int, what: str) -> int:
    if result < 0:
        raise OSError(ctypes.get_errno(), f"{what}: {os.strerror(ctypes.get_errno())}")
    return result


def _conditions(pid: int) -> dict[str, list[tuple[int, int, list[int]]]]:
    every = 0xFFFFFFFF
    # A file is truncated only by who may write to it: older kernels' Landlock does not look.
    opening = (os.O_ACCMODE | os.O_TRUNC, [0, 1, 2, 1 | os.O_TRUNC, 2 | os.O_TRUNC])
    # A thread of this process; no namespaces, no tracing.
    thread, forbidden = 0x00010000, 0x7E022000
    own_signals = [number for number in range(65) if number not in (signal.SIGKILL, signal.SIGSTOP)]
    return {
        "open": [(1, *opening)],
        "openat": [(2, *opening)],
        # TCGETS, TIOCGWINSZ, FIONREAD, FIONBIO, FIONCLEX, FIOCLEX
        "ioctl": [(1, every, [0x5401, 0x5413, 0x541B, 0x5421, 0x5450, 0x5451])],
        # No F_SETOWN, which sends signals.
        "fcntl": [(1, every, [0, 1, 2, 3, 4, 5, 6, 7, 1030, 1032])],
        "prctl": [(0, every, [15, 16])],  # a thread's name
        "prlimit64": [(0, every, [0])],
        "kill": [(0, every, [pid]), (1, every, own_signals)],
        "tgkill": [(0, every, [pid]), (2, every, own_signals)],
        "socketpair": [(0, every, [1]), (1, 0xF, [1])],  # asyncio's: AF_UNIX, SOCK_STREAM
        "clone": [(0, thread | forbidden, [thread])],
    }


def call_filter(pid: int) -> list[tuple[int, int, int, int]]:
    """Instructions of a seccomp filter: the calls that Python needs; what reaches processes only for process `pid`."""
    column, audit = _MACHINES[platform.machine()]
    code = [(_LOAD, 0, 0, 4), (_EQUAL, 1, 0, audit), (_RETURN, 0, 0, _KILL), (_LOAD, 0, 0, 0)]
    if column == 0:
        # Calls of the x32 interface carry this bit and would pass under other numbers.
        code += [(_AT_LEAST, 0, 1, 0x40000000), (_RETURN, 0, 0, _KILL)]
    for call in _CALLS.split(","):
        listed = call.split()[1 + column]
        if listed != "-":
            code += [(_EQUAL, 0, 1, int(listed)), (_RETURN, 0, 0, _ALLOW)]
    for name, checks in _conditions(pid).items():
        number = _CONDITIONAL[name][column]
        if number is None:
            continue
        body = []
        for argument, mask, values in checks:
            body += [(_LOAD, 0, 0, 16 + 8 * argument), (_AND, 0, 0, mask)]
            body += [(_EQUAL, len(values) - index, 0, value) for index, value in enumerate(values)]
            body += [(_RETURN, 0, 0, _EPERM)]
        body += [(_RETURN, 0, 0, _ALLOW)]
        code += [(_EQUAL, 0, len(body), number), *body]
    # The C library falls back from clone3, whose flags a filter cannot see, to clone, and from calls it finds missing.
    code += [(_EQUAL, 0, 1, _CLONE3), (_RETURN, 0, 0, _ENOSYS), (_AT_LEAST, 0, 1, _NEWEST), (_RETURN, 0, 0, _ENOSYS)]
    return [*code, (_RETURN, 0, 0, _EPERM)]


def filter_calls(code: bytes) -> None:
    """Put a filter on this process and its threads, for good."""
    program = ctypes.create_string_buffer(code)
    header = struct.pack("HxxxxxxP", len(code) // 8, ctypes.addressof(program))
    _check(_libc.prctl(22, 2, ctypes.c_char_p(header), 0, 0), "the kernel refuses the seccomp filter")


def readable_paths() -> list[str]:
    """What a program may read beside its own folder: Python and its packages, shared libraries, time zones."""
    paths = [f"{prefix}/{lib}" for prefix in (sys.prefix, sys.base_prefix) for lib in ("lib", "lib64")]
    paths += [sysconfig.get_path(name) for name in ("stdlib", "platstdlib", "purelib", "platlib")]
    return [path for path in dict.fromkeys([*paths, *_SYSTEM_PATHS.split()]) if os.path.exists(path)]


def landlock_version() -> int:
    """Version of Landlock in the running kernel, 0 where it has none."""
    return max(0, _libc.syscall(444, None, ctypes.c_long(0), ctypes.c_long(1)))


def path_rules(folder: str, version: int) -> int:
    """Landlock's rules: read what Python needs, write to `folder` only; no TCP, signals or abstract sockets to the outside."""
    known = (1 << {1: 13, 2: 14, 3: 15, 4: 15}.get(version, 16)) - 1
    read_file, write_file, read_folder, truncate = 1 << 2, 1 << 1, 1 << 3, 1 << 14
    # In the folder all but: execute (0), devices, sockets and pipes with a name (6, 9, 10, 11), ioctl on devices (15).
    own = known & ~sum(1 << bit for bit in (0, 6, 9, 10, 11, 15))
    rules = struct.pack("QQQ", known, 3, 3)[: 8 if version < 4 else 16 if version < 6 else 24]
    ruleset = _check(_libc.syscall(444, rules, ctypes.c_long(len(rules)), ctypes.c_long(0)), "Landlock")
    allowed = [(path, read_file | read_folder) for path in readable_paths()]
    allowed += [(f"/dev/{name}", read_file) for name in ("zero", "random", "urandom")]
    allowed += [("/dev/null", (read_file | write_file | truncate) & known), (folder, own)]
    for path, access in allowed:
        descriptor = os.open(path, os.O_PATH)
        access &= ~0 if os.path.isdir(path) else ~read_folder
        rule = struct.pack("=Qi", access, descriptor)
        _check(_libc.syscall(445, ctypes.c_long(ruleset), ctypes.c_long(1), rule, ctypes.c_long(0)), path)
        os.close(descriptor)
    return ruleset


def drop_privileges() -> None:
    """No capabilities, no way to new ones, and no reading of this process by others of its user."""
    for capability in range(64):
        _libc.prctl(24, capability, 0, 0, 0)  # from the bounding set; only root can, and only root need
    _libc.prctl(47, 4, 0, 0, 0)  # the ambient set
    _check(_libc.capset(struct.pack("Ii", 0x20080522, 0), bytes(24)), "capset")
    _check(_libc.prctl(38, 1, 0, 0, 0), "no new privileges")
    _check(_libc.prctl(4, 0, 0, 0, 0), "not dumpable")


def limit(request: dict) -> None:
    """Bound this process's time (seconds), memory, file size (bytes) and open files, as the request says."""
    seconds = int(request["seconds"]) + 1
    for name, value, hard in (
        (resource.RLIMIT_CPU, seconds, seconds + 1),
        (resource.RLIMIT_AS, int(request["memory"]), int(request["memory"])),
        (resource.RLIMIT_FSIZE, int(request["file_size"]), int(request["file_size"])),
        (resource.RLIMIT_NOFILE, 32, 32),
        (resource.RLIMIT_CORE, 0, 0),
    ):
        resource.setrlimit(name, (value, hard))


def _confine(request: dict, version: int, code: list[bytes]) -> None:
    signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGCHLD])
    if version:
        _check(_libc.syscall(446, ctypes.c_long(5), ctypes.c_long(0)), "Landlock")
    os.close(5)
    limit(request)
    filter_calls(struct.pack("I", os.getpid()).join(code))


def _memory_file(data: bytes) -> int:
    descriptor = os.memfd_create("file")
    view = memoryview(data)
    while view:
        view = view[os.write(descriptor, view) :]
    os.lseek(descriptor, 0, os.SEEK_SET)
    return descriptor


def _fork(request: dict, version: int, code: list[bytes]) -> tuple[int, int, str]:
    """Fork for a test: the child's id (0 in the child, which is confined), the file of its answer, what went wrong."""
    given = _memory_file(request.get("stdin", "").encode(errors="replace"))
    answer, null = _memory_file(b""), os.open(os.devnull, os.O_RDWR)
    reader, writer = os.pipe()
    parent = os.getpid()
    pid = os.fork()
    if pid == 0:
        try:
            os.setsid()
            _check(_libc.prctl(1, signal.SIGKILL, 0, 0, 0), "parent's death")
            if os.getppid() != parent:
                os._exit(1)
            # 3 to 5 are this process's own pipes and rules. What a program prints is its answer only where it is asked for that.
            for source, target in (
                (given, 0),
                (answer if request["kind"] == "stdin" else null, 1),
                (null, 2),
                (answer, 3),
                (writer, 4),
            ):
                os.dup2(source, target)
            os.closerange(6, os.sysconf("SC_OPEN_MAX"))
            _confine(request, version, code)
            os.write(4, b"confined")
        except BaseException as error:
            os.write(4, repr(error)[:500].encode())
            os._exit(1)
        os.close(4)
        if request["kind"] == "stdin":
            os.close(3)
        return 0, 3, ""
    for descriptor in (given, null, writer):
        os.close(descriptor)
    said = os.read(reader, 1000).decode()
    os.close(reader)
    return pid, answer, "" if said == "confined" else said or "the process died"


def overfull(folder: str) -> bool:
    """Whether a program has written more files or bytes than it may, or hides what it has written."""
    files = size = 0
    pending = [folder]
    while pending:
        try:
            with os.scandir(pending.pop()) as entries:
                for entry in entries:
                    about = entry.stat(follow_symlinks=False)
                    files += 1
                    size += about.st_size
                    if files > MAX_FILES or size > MAX_BYTES:
                        return True
                    # Modes never change: a folder made without a right to write stays empty.
                    if stat.S_ISDIR(about.st_mode) and about.st_mode & 0o300 == 0o300:
                        pending.append(entry.path)
        except FileNotFoundError:
            continue  # removed meanwhile
        except OSError:
            return True
    return False


def empty_folder(folder: str) -> bool:
    """Empty a folder in whatever state a program has left it; `False` where that cannot be done. Never raises."""
    try:
        while entries := list(os.scandir(folder)):
            for entry in entries:
                if not entry.is_dir(follow_symlinks=False):
                    os.unlink(entry.path)
                    continue
                # Depth is taken off from the top: no path grows long, and nothing recurses.
                os.chmod(entry.path, 0o700)
                for inner in list(os.scandir(entry.path)):
                    if inner.is_dir(follow_symlinks=False):
                        os.chmod(inner.path, 0o700)
                        os.rename(inner.path, os.path.join(folder, os.urandom(12).hex()))
                    else:
                        os.unlink(inner.path)
                os.rmdir(entry.path)
    except OSError:
        return False
    return True


def _waited(pid: int) -> float:
    """Seconds that a process was ready to run and the machine had no core for it."""
    waits = [0.0]
    try:
        for thread in os.listdir(f"/proc/{pid}/task"):
            with open(f"/proc/{pid}/task/{thread}/schedstat") as file:
                waits.append(int(file.read().split()[1]) / 1e9)
    except (OSError, IndexError):
        pass  # ended meanwhile, or a kernel that does not count this
    return max(waits)


def _threads(pid: int) -> int:
    try:
        return os.stat(f"/proc/{pid}/task").st_nlink - 2
    except OSError:
        return 0


def _watch(pid: int, request: dict, folder: str, control: select.poll) -> dict:
    """Wait for a child and end it at its limits: how it ended ("exit", "limit", "cut" or "killed"), and its code."""
    begin, ended = time.monotonic(), ""
    while True:
        signal.sigtimedwait([signal.SIGCHLD], 0.05)
        done, status, usage = os.wait4(pid, 0 if ended else os.WNOHANG)
        if done:
            break
        passed = time.monotonic() - begin
        if passed > request["remaining"] or control.poll(0):
            ended = "cut"
        elif (passed > request["seconds"] and passed - _waited(pid) > request["seconds"]) or (
            _threads(pid) > MAX_THREADS or overfull(folder)
        ):
            ended = "limit"
        if ended:
            os.kill(pid, signal.SIGKILL)
    code = os.waitstatus_to_exitcode(status)
    if not ended and code == -signal.SIGKILL and usage.ru_utime + usage.ru_stime < int(request["seconds"]) + 1:
        ended = "killed"
    return {"end": ended or "exit", "code": code}


def serve(folder: str) -> dict | None:
    """Answer requests until the other side closes; in a child, return the request of its test."""
    os.dup2(0, 3)
    os.dup2(1, 4)
    null = os.open(os.devnull, os.O_RDWR)
    os.dup2(null, 0)
    os.dup2(null, 1)
    drop_privileges()
    os.chdir(folder)
    os.environ.clear()
    os.environ.update({"PATH": "/usr/bin:/bin", "HOME": folder, "TMPDIR": folder, "OMP_NUM_THREADS": "1"})
    version = landlock_version()
    os.dup2(path_rules(folder, version) if version else null, 5)
    placeholder = 0xABCD0123
    packed = b"".join(struct.pack("HBBI", *line) for line in call_filter(placeholder))
    code = packed.split(struct.pack("I", placeholder))
    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGCHLD])
    control = select.poll()
    control.register(3, 0)
    gc.freeze()
    # A child has other files under these numbers.
    with open(4, "w", closefd=False) as out, open(3, "rb", closefd=False) as lines:
        print(json.dumps({"landlock": version}), file=out, flush=True)
        for line in lines:
            request = json.loads(line)
            pid, answer, problem = _fork(request, version, code)
            if pid == 0:
                return request
            reply = _watch(pid, request, folder, control)
            reply |= {"end": "killed", "problem": problem} if problem else {}
            with os.fdopen(answer, "rb") as file:
                file.seek(0)
                reply["output"] = file.read(int(request["file_size"])).decode("utf-8", "replace")
            empty = empty_folder(folder)
            with contextlib.suppress(BrokenPipeError):
                print(json.dumps(reply), file=out, flush=True)
            if not empty:
                break  # the next test gets a folder without leftovers
    return None


def run(request: dict, namespace: dict) -> None:
    """Run the program of a request in a namespace, then its test, in this confined process."""
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        stream = open(sys.__dict__[name].fileno(), mode, encoding="utf-8", errors="surrogateescape", closefd=False)
        setattr(sys, name, stream)
        setattr(sys, f"__{name}__", stream)
    sys.argv = ["main.py"]
    sys.path.insert(0, os.getcwd())
    exec(compile(request["program"], "main.py", "exec"), namespace)
    if request["kind"] == "assert":
        exec(compile(request["test"], "test.py", "exec"), namespace)
        os.write(3, request["token"].encode())
    elif request["kind"] == "function":
        holder = namespace["Solution"]() if "Solution" in namespace else None
        function = getattr(holder, request["name"]) if holder is not None else namespace[request["name"]]
        # JSON makes text of a mapping's keys: numbers again, where all are, as APPS does.
        arguments = [
            {int(key): member for key, member in value.items()}
            if isinstance(value, dict) and value and all(re.fullmatch(r"-?\d+", key) for key in value)
            else value
            for value in request["arguments"]
        ]
        result = json.dumps(function(*arguments)).encode()
        while result:
            result = result[os.write(3, result) :]


def run_and_leave(request: dict) -> None:
    """Run a request and end the process as a script ends, but for taking the interpreter apart: most of the time it took."""
    module = sys.modules["__main__"] = types.ModuleType("__main__")
    code = 0
    try:
        run(request, module.__dict__)
    except SystemExit as leave:
        code = leave.code if isinstance(leave.code, int) else int(leave.code is not None)
    except BaseException:
        code = 1
    try:
        threading._shutdown()
        atexit._run_exitfuncs()
        for stream in (sys.stdout, sys.__stdout__):
            if stream is not None and not stream.closed:
                stream.flush()
        # Files of the program's that are still open are written.
        module.__dict__.clear()
        gc.collect()
    except BaseException:
        code = code or 120
    os._exit(code & 0xFF)


if __name__ == "__main__":
    task = serve(sys.argv[1])
    if task is not None:
        run_and_leave(task)
    elif empty_folder(sys.argv[1]):
        # The other side may have been killed and removes nothing.
        with contextlib.suppress(OSError):
            os.rmdir(sys.argv[1])

"""Locks its own process up, then runs a program that a model wrote: the child of nanochat/execution.py, and what it asks of the kernel.

| what the code might do | what stops it, and what stops it besides |
|---|---|
| run for ever, take all memory, dump core | limits of CPU time, address space and file size; the parent's clock |
| fork, start programs, open sockets, trace, watch or slow others, use keys, namespaces, io_uring, … | seccomp: a list of the system calls, and of their arguments, that a Python program needs; all else is refused |
| signal other processes, directly or by a file | seccomp; Landlock's scopes (Linux 6.12) |
| read your files, or /proc | Landlock: only its folder and Python's own files can be opened |
| write files | Landlock; a mount namespace in which everything is read-only but its folder |
| change times, modes and attributes of files, of which Landlock knows nothing | seccomp; the mount namespace |
| fill the disk | its folder is a small file system in memory, which ends with the process |
| use root's powers | all capabilities are dropped, no program gives new ones; seccomp |

Why not bubblewrap or nsjail: they put a process into namespaces, and are given the list of system calls by their caller. That list is most of this
file, and already keeps the program a single process without a network; of the namespaces it lacks but the one for mounts, which is a
handful of calls. Besides they are seldom installed, and need the same permission of the kernel.

A refused call fails with EPERM, which Python raises as PermissionError, and the program goes on: most of what is refused is asked for by
accident, for example by an import. Calls newer than this list, and clone3, fail with ENOSYS, for which C libraries have a second way;
extended attributes with ENOTSUP, which shutil takes well. Calls by another architecture's numbers (32 bits) kill.

It runs as a script and without `site`: it imports few modules, of the standard library only, and starts in 45 ms of CPU time.
"""
import builtins
import contextlib
import ctypes
import errno
import os
import signal
import struct
import sys
import types

FILE_BYTES = 16 * 2 ** 20  # the most a file may hold
FOLDER_BYTES, FOLDER_FILES = 64 * 2 ** 20, 1000
OPEN_FILES = 64

# -----------------------------------------------------------------------------
# What the kernel offers. Numbers are those of asm/unistd.h, linux/seccomp.h, filter.h, landlock.h, capability.h, mount.h, prctl.h.

_MACHINE = os.uname().machine if sys.platform == "linux" and sys.maxsize > 2 ** 32 else ""
_ARCHITECTURES = {"x86_64": (0, 0xC000003E), "aarch64": (1, 0xC00000B7)}  # column of the lists below, and the kernel's number for it
_LANDLOCK_CREATE_RULESET, _LANDLOCK_ADD_RULE, _LANDLOCK_RESTRICT_SELF, _MOUNT_SETATTR = 444, 445, 446, 442
_CAPSET = {"x86_64": 126, "aarch64": 91}
_SELF = -1  # stands for the process's own number
_Rule = list[tuple[int, int, tuple[int, ...]]]  # all of: where the value is, the bits of it that count, what they may be


def _low(argument: int) -> int:
    """Where the lower half of a system call's argument is for a filter; the kernel's ints have no upper one."""
    return 16 + 8 * argument


_ALL = 0xFFFFFFFF
_OWN: _Rule = [(_low(0), _ALL, (_SELF,))]
_OWN_OR_0: _Rule = [(_low(0), _ALL, (0, _SELF))]
_O_ACCMODE, _O_TRUNC, _O_ASYNC = 0o3, 0o1000, 0o20000

# System call: its number on x86_64 and aarch64. Those that can be allowed whatever their arguments: they concern the process itself and files that
# are open, or they take a path that Landlock judges, or only tell (stat).
_ALLOWED = {
    "read": (0, 63), "write": (1, 64), "readv": (19, 65), "writev": (20, 66), "pread64": (17, 67), "pwrite64": (18, 68), "preadv": (295, 69),
    "pwritev": (296, 70), "preadv2": (327, 286), "pwritev2": (328, 287), "lseek": (8, 62), "close": (3, 57), "close_range": (436, 436),
    "dup": (32, 23), "dup2": (33, None), "dup3": (292, 24), "pipe": (22, None), "pipe2": (293, 59), "sendfile": (40, 71),
    "copy_file_range": (326, 285),
    "stat": (4, None), "fstat": (5, 80), "lstat": (6, None), "newfstatat": (262, 79), "statx": (332, 291), "access": (21, None),
    "faccessat": (269, 48), "faccessat2": (439, 439), "readlink": (89, None), "readlinkat": (267, 78), "getcwd": (79, 17), "chdir": (80, 49),
    "fchdir": (81, 50), "getdents64": (217, 61),
    "mkdir": (83, None), "mkdirat": (258, 34), "rmdir": (84, None), "unlink": (87, None), "unlinkat": (263, 35), "rename": (82, None),
    "renameat": (264, 38), "renameat2": (316, 276), "link": (86, None), "linkat": (265, 37), "symlink": (88, None), "symlinkat": (266, 36),
    "ftruncate": (77, 46), "fallocate": (285, 47), "fsync": (74, 82), "fdatasync": (75, 83), "umask": (95, 166),
    "munmap": (11, 215), "mremap": (25, 216), "mprotect": (10, 226), "brk": (12, 214), "msync": (26, 227),
    "futex": (202, 98), "set_robust_list": (273, 99), "set_tid_address": (218, 96), "rseq": (334, 293), "sched_yield": (24, 124),
    "exit": (60, 93), "exit_group": (231, 94), "restart_syscall": (219, 128),
    "rt_sigaction": (13, 134), "rt_sigprocmask": (14, 135), "rt_sigreturn": (15, 139), "rt_sigtimedwait": (128, 137), "rt_sigsuspend": (130, 133),
    "rt_sigpending": (127, 136), "sigaltstack": (131, 132), "setitimer": (38, 103), "getitimer": (36, 102), "alarm": (37, None), "pause": (34, None),
    "nanosleep": (35, 101), "clock_nanosleep": (230, 115), "clock_gettime": (228, 113), "clock_getres": (229, 114), "gettimeofday": (96, 169),
    "time": (201, None), "times": (100, 153), "getrusage": (98, 165), "sysinfo": (99, 179), "uname": (63, 160), "getrandom": (318, 278),
    "getcpu": (309, 168),
    "getpid": (39, 172), "gettid": (186, 178), "getppid": (110, 173), "getuid": (102, 174), "geteuid": (107, 175), "getgid": (104, 176),
    "getegid": (108, 177), "getresuid": (118, 148), "getresgid": (120, 150), "getgroups": (115, 158), "getpgrp": (111, None), "getpgid": (121, 155),
    "getsid": (124, 156),
    "poll": (7, None), "ppoll": (271, 73), "select": (23, None), "pselect6": (270, 72), "epoll_create1": (291, 20), "epoll_ctl": (233, 21),
    "epoll_wait": (232, None), "epoll_pwait": (281, 22), "eventfd2": (290, 19), "recvfrom": (45, 207), "shutdown": (48, 210),
    "getsockopt": (55, 209), "getsockname": (51, 204), "getpeername": (52, 205),
}
# ... and those whose arguments have to fit one of the rules.
_ALLOWED_IF: dict[str, tuple[tuple[int, int | None], list[_Rule]]] = {
    # emptying a file that was opened for reading is not Landlock's business before version 3
    "open": ((2, None), [[(_low(1), _O_ACCMODE | _O_TRUNC, (0, 1, 2, 1 | _O_TRUNC, 2 | _O_TRUNC))]]),
    "openat": ((257, 56), [[(_low(2), _O_ACCMODE | _O_TRUNC, (0, 1, 2, 1 | _O_TRUNC, 2 | _O_TRUNC))]]),
    "mmap": ((9, 222), [[(_low(3), 0x42000, (0,))]]),  # neither locked nor of the machine's huge pages
    "madvise": ((28, 233), [[(_low(2), _ALL, (4, 8, 14, 15))]]),  # DONTNEED, FREE, HUGEPAGE, NOHUGEPAGE
    # nobody is sent a signal when something happens to a file (F_SETOWN, F_SETSIG, F_NOTIFY, leases, O_ASYNC; FIOSETOWN, FIOASYNC)
    "fcntl": ((72, 25), [[(_low(1), _ALL, (0, 1, 2, 3, 5, 6, 7, 1030))],  # DUPFD, GETFD, SETFD, GETFL, GETLK, SETLK, SETLKW, DUPFD_CLOEXEC
              [(_low(1), _ALL, (4,)), (_low(2), _O_ASYNC, (0,))]]),  # SETFL
    "ioctl": ((16, 29), [[(_low(1), _ALL, (0x5401, 0x802C542A, 0x5413, 0x541B, 0x5421, 0x5450, 0x5451))]]),  # TCGETS(2), TIOCGWINSZ, FIONREAD/NBIO/N?CLEX
    "prctl": ((157, 167), [[(_low(0), _ALL, (15, 16))]]),  # a thread's name
    "clone": ((56, 220), [[(_low(0), _ALL, (0x3D0F00, 0x7D0F00))]]),  # a thread: the flags of glibc and musl
    "kill": ((62, 129), [_OWN]), "tkill": ((200, 130), [_OWN]), "tgkill": ((234, 131), [_OWN]),
    "prlimit64": ((302, 261), [_OWN_OR_0]), "sched_getaffinity": ((204, 123), [_OWN_OR_0]), "sched_setaffinity": ((203, 122), [_OWN_OR_0]),
    # the pair that asyncio wakes itself with: unix streams, which cannot be sent elsewhere
    "socketpair": ((53, 199), [[(_low(0), _ALL, (1,)), (_low(1), 0xF, (1,))]]),
    "sendto": ((44, 206), [[(_low(4), _ALL, (0,)), (_low(4) + 4, _ALL, (0,))]]),  # no address
}
_UNSUPPORTED = {
    "setxattr": (188, 5), "lsetxattr": (189, 6), "fsetxattr": (190, 7), "getxattr": (191, 8), "lgetxattr": (192, 9), "fgetxattr": (193, 10),
    "listxattr": (194, 11), "llistxattr": (195, 12), "flistxattr": (196, 13), "removexattr": (197, 14), "lremovexattr": (198, 15),
    "fremovexattr": (199, 16),
}
_CLONE3, _NEWEST = 435, 469  # the same on both; _NEWEST: of Linux 6.18


def _call(function: str, *args) -> int:
    arguments = [ctypes.c_long(arg) if isinstance(arg, int) else arg for arg in args]
    result = ctypes.CDLL(None, use_errno=True)[function](*arguments)
    if result < 0:
        raise OSError(ctypes.get_errno(), f"{function}: {os.strerror(ctypes.get_errno())}")
    return result


def _prctl(*args) -> int:
    return _call("prctl", *args, *[0] * (5 - len(args)))


def has_seccomp() -> bool:
    """Whether a filter could be installed; asked with an address that is none."""
    if _MACHINE not in _ARCHITECTURES:
        return False
    try:
        _prctl(22, 2, 0)
    except OSError as error:
        return error.errno == errno.EFAULT
    return True


def landlock_version() -> int:
    """0 where there is no Landlock."""
    if _MACHINE not in _ARCHITECTURES:
        return 0
    try:
        return _call("syscall", _LANDLOCK_CREATE_RULESET, None, 0, 1)
    except OSError:
        return 0


# -----------------------------------------------------------------------------
# In the child


def _limit_resources(timeout: float, memory: int) -> None:
    import resource

    def limit(name: str, value: int) -> None:
        kind = getattr(resource, name, None)
        if kind is not None:
            hard = resource.getrlimit(kind)[1]
            value = value if hard == resource.RLIM_INFINITY else min(value, hard)
            resource.setrlimit(kind, (value, value))

    if memory and sys.platform != "darwin":  # macOS knows these limits, but does not keep them
        for name in ("RLIMIT_AS", "RLIMIT_DATA", "RLIMIT_STACK"):
            limit(name, memory)
    limit("RLIMIT_CPU", int(timeout) + 1)
    limit("RLIMIT_FSIZE", FILE_BYTES)
    limit("RLIMIT_NOFILE", OPEN_FILES)
    limit("RLIMIT_MEMLOCK", 0)
    limit("RLIMIT_CORE", 1)  # 1 keeps the kernel from starting a crash handler too, 0 does not
    if not has_seccomp():
        limit("RLIMIT_NPROC", 0)


def _mount_own_folder(folder: str) -> None:
    """A mount namespace in which all is read-only, but for a file system in memory that lies upon `folder`.

    Raises OSError where a user must not make namespaces (Docker's default, some hardened systems)."""
    user, group = os.getuid(), os.getgid()
    _call("unshare", 0x10020000)  # user and mount namespace
    for name, text in (("setgroups", "deny"), ("uid_map", f"{user} {user} 1"), ("gid_map", f"{group} {group} 1")):
        with open(f"/proc/self/{name}", "w") as file:
            file.write(text)
    options = f"size={FOLDER_BYTES},nr_inodes={FOLDER_FILES},mode=700".encode()
    _call("mount", b"tmpfs", os.fsencode(folder), b"tmpfs", 0b1110, options)  # no set-uid, no devices, no programs
    os.chdir(folder)
    for path, recursive, set_, clear in (b"/", 0x8000, 1, 0), (os.fsencode(folder), 0, 0, 1):  # read-only, and writable again. (Linux 5.12)
        _call("syscall", _MOUNT_SETATTR, -100, path, recursive, struct.pack("4Q", set_, clear, 0, 0), 32)


def _drop_capabilities() -> None:
    _call("syscall", _CAPSET[_MACHINE], struct.pack("Ii", 0x20080522, 0), bytes(24))


def _confine_to(folder: str, libraries: list[str]) -> None:
    """Landlock: `folder` may be written, Python's own files read, nothing else opened; no signal nor connection leaves."""
    version = landlock_version()
    everything = (1 << {1: 13, 2: 14, 3: 15, 4: 15}.get(version, 16)) - 1
    ruleset = _call("syscall", _LANDLOCK_CREATE_RULESET, struct.pack("3Q", everything, 3 * (version >= 4), 3 * (version >= 6)), 24, 0)
    write_file, read_file, rest = 1 << 1, 1 << 2, 1 << 3 | 1 << 4 | 1 << 5 | 1 << 7 | 1 << 8 | 1 << 12 | 1 << 13  # folders, links, moves
    truncate = 1 << 14

    def allow(path: str, rights: int) -> None:
        with contextlib.suppress(FileNotFoundError):
            handle = os.open(path, os.O_PATH | os.O_CLOEXEC)
            _call("syscall", _LANDLOCK_ADD_RULE, ruleset, 1, struct.pack("=Qi", rights & everything, handle), 0)
            os.close(handle)

    for path in {os.path.realpath(path) for path in (*libraries, "/usr/lib", "/usr/lib64", "/lib", "/lib64", "/usr/share/zoneinfo")}:
        allow(path, read_file | 1 << 3)
    for path in ("/etc/ld.so.cache", "/etc/localtime", "/dev/urandom"):
        allow(path, read_file)
    allow("/dev/null", read_file | write_file)
    allow(folder, read_file | write_file | rest | truncate)
    _call("syscall", _LANDLOCK_RESTRICT_SELF, ruleset, 0)
    os.close(ruleset)


def _filter() -> list[tuple[int, int, int, int]]:
    """The program that the kernel runs before every system call: operation, instructions to skip if true and if false, operand."""
    column, architecture = _ARCHITECTURES[_MACHINE]
    load, mask, equal, above, answer = 0x20, 0x54, 0x15, 0x25, 0x06
    allow, kill, refuse = (answer, 0, 0, 0x7FFF0000), (answer, 0, 0, 0x80000000), 0x00050000
    program = [(load, 0, 0, 4), (equal, 1, 0, architecture), kill, (load, 0, 0, 0)]
    for numbers in _ALLOWED.values():
        if (number := numbers[column]) is not None:
            program += [(equal, 0, 1, number), allow]
    for numbers, rules in _ALLOWED_IF.values():
        if (number := numbers[column]) is None:
            continue
        body: list[tuple[int, int, int, int]] = []
        for rule in rules:
            block = [allow]  # built from its end: a value that does not fit skips what is there already
            for where, bits, values in reversed(rule):
                last = len(values) - 1
                compare = [(equal, last - i, 0 if i < last else len(block), os.getpid() if value == _SELF else value) for i, value in enumerate(values)]
                block = [(load, 0, 0, where), (mask, 0, 0, bits), *compare, *block]
            body += block
        body.append((answer, 0, 0, refuse | errno.EPERM))
        program += [(equal, 0, len(body), number), *body]
    for numbers in _UNSUPPORTED.values():
        program += [(equal, 0, 1, numbers[column]), (answer, 0, 0, refuse | errno.ENOTSUP)]
    program += [(equal, 1, 0, _CLONE3), (above, 0, 1, _NEWEST), (answer, 0, 0, refuse | errno.ENOSYS), (answer, 0, 0, refuse | errno.EPERM)]
    return program


def _refuse_system_calls() -> None:
    """seccomp, for this process and its threads to be; cannot be undone."""
    program = _filter()
    code = ctypes.create_string_buffer(b"".join(struct.pack("HBBI", *instruction) for instruction in program))
    _prctl(22, 2, ctypes.c_char_p(struct.pack("HxxxxxxP", len(program), ctypes.addressof(code))))


def _disable_destructive_calls() -> None:
    """Against accidents: what a program under test could do to its own folder and process."""
    import shutil
    import subprocess

    for name in ("exit", "quit", "help"):
        setattr(builtins, name, None)
    for module, names in (
        (os, "kill system putenv remove removedirs rmdir fchdir setuid fork forkpty killpg rename renames truncate replace unlink fchmod "
             "fchown chmod chown chroot lchflags lchmod lchown getcwd chdir"),
        (shutil, "rmtree move chown"), (subprocess, "Popen"),
    ):
        for name in names.split():
            setattr(module, name, None)
    for name in ("ipdb", "joblib", "resource", "psutil", "tkinter"):
        sys.modules[name] = None  # type: ignore[assignment]


def _lock_up(parent: int, timeout: float, memory: int, libraries: list[str]) -> None:
    """All of the above, in an order in which each may still do what it needs."""
    folder = os.getcwd()
    _limit_resources(timeout, memory)
    if sys.platform == "linux":
        if _MACHINE in _ARCHITECTURES:
            with contextlib.suppress(OSError):  # then execution.py watches the folder instead
                _mount_own_folder(folder)
        _prctl(1, signal.SIGKILL)  # when the parent dies
        if os.getppid() != parent:
            os._exit(1)
        _prctl(38, 1)  # no new privileges: what the following ask for
        if _MACHINE in _ARCHITECTURES:
            _drop_capabilities()
        if landlock_version():
            _confine_to(folder, libraries)
        if has_seccomp():
            _refuse_system_calls()


# -----------------------------------------------------------------------------
# A program, or one of the two halves of a test. The halves talk by pipes, in values: what comes from the program is data that cannot run.


def _reduce(value):
    """Subclasses of plain types are sent as what they extend: Counter, defaultdict, namedtuple, IntEnum, …"""
    plain = next((kind for kind in (int, float, complex, str, bytes, bytearray, list, tuple, dict, set, frozenset) if isinstance(value, kind)), None)
    return NotImplemented if plain in (None, type(value)) else (plain, (plain(value),))


def _send(value, file) -> None:
    import io
    import pickle

    class Pickler(pickle.Pickler):
        def reducer_override(self, value):
            return _reduce(value)

    buffer = io.BytesIO()  # all of it or nothing
    Pickler(buffer).dump(value)
    file.write(buffer.getbuffer())
    file.flush()


_TYPES = {("builtins", name) for name in "bool int float complex str bytes bytearray list tuple dict set frozenset range slice".split()} | {
    ("decimal", "Decimal"), ("fractions", "Fraction")}


def _receive(file):
    import pickle

    class Unpickler(pickle._Unpickler):  # the one written in Python, from which an operation can be taken
        dispatch = {operation: load for operation, load in pickle._Unpickler.dispatch.items() if operation != pickle.BUILD[0]}  # it sets attributes, of classes too

        def find_class(self, module, name):
            if (module, name) not in _TYPES:
                raise TypeError(f"a test can compare plain values only, no {module}.{name}")
            return super().find_class(module, name)

    return Unpickler(file).load()


def _serve(program: dict, requests, answers) -> None:
    """Calls the program's functions for the test, as long as it asks."""
    import traceback

    _send([name for name, value in program.items() if callable(value)], answers)
    while True:
        try:
            name, args, kwargs = _receive(requests)
        except EOFError:
            return
        try:
            _send((None, program[name](*args, **kwargs)), answers)
        except Exception as error:  # not SystemExit: then the program ends, and the test learns that it has
            traceback.print_exc()
            _send((type(error).__name__, str(error)), answers)


def _program_of(requests, answers) -> dict:
    """The functions of the program in the other process, as functions here. None takes the place of what is built in."""
    def answer():
        try:
            return _receive(answers)
        except EOFError:
            raise RuntimeError("the program ended before its test did") from None

    def function(name: str):
        def call(*args, **kwargs):
            with contextlib.suppress(BrokenPipeError):
                _send((name, args, kwargs), requests)
            error, value = answer()
            if error is None:
                return value
            kind = getattr(builtins, error, None)
            raise kind(value) if isinstance(kind, type) and issubclass(kind, Exception) else RuntimeError(f"{error}: {value}")
        return call

    return {name: function(name) for name in answer() if type(name) is str and not name.startswith("__") and not hasattr(builtins, name)}


def _child(role: str, parent: str, timeout: str, memory: str, requests: str, answers: str, *libraries: str) -> None:
    """Reads code from stdin, locks this process up, and runs the code as `role`: main, program (to be tested) or test."""
    code = sys.stdin.buffer.read().decode("utf-8", "surrogatepass")
    null = os.open(os.devnull, os.O_RDONLY)
    os.dup2(null, 0)
    os.close(null)
    os.environ["OMP_NUM_THREADS"] = "1"
    del sys.argv[1:]
    sys.path += [path for path in libraries if path.endswith("-packages")]
    _lock_up(int(parent), float(timeout), int(memory), list(libraries))
    main = types.ModuleType("__main__")
    sys.modules["__main__"] = main
    sys.path.insert(0, "")
    if role == "test":
        with open(int(requests), "wb") as out, open(int(answers), "rb") as back:
            main.__dict__.update(_program_of(out, back))
            try:
                exec(compile(code, "<test>", "exec"), main.__dict__)
            except SystemExit:
                raise RuntimeError("the test was left before its last statement") from None
            return
    _disable_destructive_calls()
    exec(compile(code, "<llm>", "exec"), main.__dict__)
    if role == "program":
        with open(int(requests), "rb") as asked, open(int(answers), "wb") as out:
            _serve(main.__dict__, asked, out)


if __name__ == "__main__":
    _child(*sys.argv[1:])

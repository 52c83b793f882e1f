"""Runs a model's Python code in a process of its own: HumanEval programs, mostly wrong, sometimes harmful.

| what the code might do | what stops it |
|---|---|
| run for ever | wall clock limit (the process is killed), CPU-time limit |
| take all memory | address space limit |
| fill the disk, flood its output | every file is limited, stdout and stderr too; the folder is deleted afterwards |
| fork, start programs, signal, trace or slow other processes | system calls refused (seccomp); the process also dies with its parent |
| open sockets | system calls refused (seccomp) |
| write files, or read yours | only its temporary folder can be written, only that and Python's own files can be read (Landlock) |
| read secrets from the environment | it has none, and /proc cannot be read |
| use root's powers | all capabilities are dropped |
| break its own test by accident | exit, os.remove and the like are None, as in nanochat |

Linux on x86-64 and ARM64 has all of it, for any user and in most containers; where seccomp (kernel 3.17) or Landlock (5.13) is
missing, and on other systems, a warning says once what is not stopped.

What it does not stop: bugs of the kernel, code that fills the disk with many files while its seconds last, or slows the machine
down by then; reading the file names of Python's own folders; anything that CPU caches leak. For code from an enemy, use a virtual
machine.

The module runs itself as a script in the child, so it imports the standard library only.
"""
import builtins
import contextlib
import ctypes
import faulthandler
import functools
import logging
import os
import platform
import select
import shutil
import signal
import struct
import subprocess
import sys
import tempfile
import types
from dataclasses import dataclass

FILE_BYTES = 16 * 2 ** 20  # the most a file may hold
OPEN_FILES = 64


@dataclass
class ExecutionResult:
    success: bool
    stdout: str
    stderr: str
    error: str | None = None
    timeout: bool = False
    memory_exceeded: bool = False


def execute_code(code: str, timeout: float = 5.0, maximum_memory_bytes: int | None = 256 * 2 ** 20) -> ExecutionResult:
    """Runs `code` as a main program, in an empty folder, with nothing to read on stdin.

    Success is exit status 0. Otherwise `error` is the last line of stderr, such as `ValueError: no such thing`. After `timeout`
    seconds the process is killed and its output dropped.
    """
    _warn_of_missing_protection()
    folder = tempfile.mkdtemp(prefix="nanochat-sandbox-")
    command = [sys.executable, "-B", "-X", "utf8", "-I", os.path.abspath(__file__), str(os.getpid()), str(timeout), str(maximum_memory_bytes or 0)]
    try:
        with tempfile.TemporaryFile() as stdin, tempfile.TemporaryFile() as stdout, tempfile.TemporaryFile() as stderr:
            stdin.write(code.encode("utf-8", "surrogatepass"))
            stdin.seek(0)
            # files, not pipes: their size is limited, and nobody has to read along
            process = subprocess.Popen(command, cwd=folder, env={"PATH": "/usr/bin:/bin"}, stdin=stdin, stdout=stdout, stderr=stderr,
                                       start_new_session=True)
            try:
                if not _ends(process, timeout):
                    return ExecutionResult(False, "", "", f"no end after {timeout:g} seconds", timeout=True)
            finally:
                with contextlib.suppress(ProcessLookupError, PermissionError):  # macOS does not permit it when all have ended
                    os.killpg(process.pid, signal.SIGKILL)  # the process and whatever it may have started
                process.wait()
            status = process.returncode
            out, err = (_read(file) for file in (stdout, stderr))
    finally:
        try:
            shutil.rmtree(folder, ignore_errors=True)
        except RecursionError:  # folders nested too deep for Python
            subprocess.run(["rm", "-rf", folder], check=False)
    if status == 0:
        return ExecutionResult(True, out, err)
    how = f"exit status {status}" if status > 0 else f"killed by {signal.Signals(-status).name}"
    return ExecutionResult(False, out, err, (err.strip().splitlines() or [how])[-1], memory_exceeded="MemoryError" in err)


def _ends(process: subprocess.Popen, timeout: float) -> bool:
    """Whether the process ends within `timeout` seconds."""
    if hasattr(os, "pidfd_open"):  # subprocess would look every 50 ms only
        with contextlib.closing(os.fdopen(os.pidfd_open(process.pid))) as handle:
            poll = select.poll()
            poll.register(handle, select.POLLIN)
            return bool(poll.poll(timeout * 1000))
    try:
        process.wait(timeout)
        return True
    except subprocess.TimeoutExpired:
        return False


def _read(file) -> str:
    file.seek(0)
    return file.read().decode("utf-8", "replace")


# -----------------------------------------------------------------------------
# What the kernel offers. Numbers are those of linux/prctl.h, linux/seccomp.h, linux/filter.h, linux/landlock.h, asm/unistd.h.

_ARCHITECTURES = {"x86_64": (0, 0xC000003E), "aarch64": (1, 0xC00000B7)}  # column below, and the number the kernel calls it by

_REFUSED = {  # system call: its number on x86_64 and aarch64
    "fork": (57, None), "vfork": (58, None), "execve": (59, 221), "execveat": (322, 281),
    "tkill": (200, 130), "rt_sigqueueinfo": (129, 138), "rt_tgsigqueueinfo": (297, 240), "pidfd_open": (434, 434), "pidfd_send_signal": (424, 424),
    "ptrace": (101, 117), "process_vm_readv": (310, 270), "process_vm_writev": (311, 271), "setpriority": (141, 140), "ioprio_set": (251, 30),
    "socket": (41, 198), "io_uring_setup": (425, 425), "unshare": (272, 97), "setns": (308, 268), "bpf": (321, 280), "keyctl": (250, 219),
    "userfaultfd": (323, 282), "perf_event_open": (298, 241),
    # memory and messages that no limit counts or that outlive the process
    "memfd_create": (319, 279), "shmget": (29, 194), "semget": (64, 190), "msgget": (68, 186), "mq_open": (240, 180),
    # changes to files that Landlock does not know
    "truncate": (76, 45), "chmod": (90, None), "fchmod": (91, 52), "fchmodat": (268, 53), "fchmodat2": (452, 452),
    "chown": (92, None), "fchown": (93, 55), "lchown": (94, None), "fchownat": (260, 54), "utimensat": (280, 88),
    "setxattr": (188, 5), "lsetxattr": (189, 6), "fsetxattr": (190, 7),
}
_ITSELF_ONLY = {  # their first argument is a process, 0 for the caller
    "kill": (62, 129), "tgkill": (234, 131), "prlimit64": (302, 261), "sched_setaffinity": (203, 122), "sched_setparam": (142, 118),
    "sched_setscheduler": (144, 119), "sched_setattr": (314, 274),
}
_CLONE = (56, 220)  # allowed for threads
_CLONE3 = (435, 435)  # its flags are out of a filter's sight; libc goes back to clone where it is missing


@functools.cache
def _libc():
    return ctypes.CDLL(None, use_errno=True)


def _call(function: str, *args) -> int:
    arguments = [ctypes.c_long(arg) if isinstance(arg, int) else arg for arg in args]
    result = _libc()[function](*arguments)
    if result < 0:
        raise OSError(ctypes.get_errno(), f"{function}: {os.strerror(ctypes.get_errno())}")
    return result


def _prctl(*args) -> int:
    return _call("prctl", *args, *[0] * (5 - len(args)))


def _has_seccomp() -> bool:
    """Whether a filter could be installed; asked with an address that is none."""
    if sys.platform != "linux" or platform.machine() not in _ARCHITECTURES:
        return False
    try:
        _prctl(22, 2, 0)
    except OSError as error:
        return error.errno == 14  # EFAULT
    return True


def _landlock_version() -> int:
    """0 where there is no Landlock."""
    if sys.platform != "linux" or platform.machine() not in _ARCHITECTURES:
        return 0
    try:
        return _call("syscall", 444, None, 0, 1)
    except OSError:
        return 0


@functools.cache
def _warn_of_missing_protection() -> None:
    missing = []
    if not _has_seccomp():
        missing.append("use the network and start processes")
    if not _landlock_version():
        missing.append("read and write your files")
    if missing:
        logging.getLogger(__name__).warning(f"This system cannot stop a model's code from trying to {' and to '.join(missing)}; "
                                            "see nanochat/execution.py, and run it in a virtual machine if that matters")


# -----------------------------------------------------------------------------
# In the child


def _limit_resources(timeout: float, memory: int) -> None:
    import resource

    def limit(name: str, value: int) -> None:
        kind = getattr(resource, name)
        hard = resource.getrlimit(kind)[1]
        value = value if hard == resource.RLIM_INFINITY else min(value, hard)
        resource.setrlimit(kind, (value, value))

    if memory and sys.platform != "darwin":  # macOS knows these limits, but does not keep them
        for name in ("RLIMIT_AS", "RLIMIT_DATA", "RLIMIT_STACK"):
            limit(name, memory)
    limit("RLIMIT_CPU", int(timeout) + 1)
    limit("RLIMIT_FSIZE", FILE_BYTES)
    limit("RLIMIT_NOFILE", OPEN_FILES)
    limit("RLIMIT_CORE", 0)
    if not _has_seccomp():
        limit("RLIMIT_NPROC", 0)


def _drop_capabilities() -> None:
    capset = {"x86_64": 126, "aarch64": 91}[platform.machine()]
    _call("syscall", capset, struct.pack("Ii", 0x20080522, 0), bytes(24))


def _confine_to(folder: str) -> None:
    """Landlock: `folder` may be written, Python's own files read, nothing else opened."""
    version = _landlock_version()
    read, everything = 0b1101, (1 << {1: 13, 2: 14, 3: 15, 4: 15}.get(version, 16)) - 1  # execute, read files, list folders
    ruleset = _call("syscall", 444, struct.pack("Q", everything), 8, 0)

    def allow(path: str, rights: int) -> None:
        with contextlib.suppress(FileNotFoundError):
            handle = os.open(path, os.O_PATH | os.O_CLOEXEC)
            rights &= everything if os.path.isdir(path) else 0b110 | 1 << 14  # a file has no folder's rights
            _call("syscall", 445, ruleset, 1, struct.pack("=Qi", rights & everything, handle), 0)
            os.close(handle)

    libraries = {sys.prefix, sys.base_prefix, "/usr/lib", "/usr/lib64", "/lib", "/lib64", "/usr/share/zoneinfo"}
    for path in [os.path.realpath(path) for path in libraries] + ["/etc/ld.so.cache", "/etc/localtime", "/dev/urandom"]:
        allow(path, read)
    allow("/dev/null", everything)
    allow(folder, everything)
    _call("syscall", 446, ruleset, 0)
    os.close(ruleset)


def _refuse_system_calls() -> None:
    """seccomp: a filter that the kernel runs before every system call of this process and its threads."""
    column, architecture = _ARCHITECTURES[platform.machine()]
    program: list[tuple[int, int, int, int]] = []  # operation, instructions to skip if true and if false, operand
    load, equal, at_least, any_bit, answer = 0x20, 0x15, 0x35, 0x45, 0x06
    allow, refuse, unknown, kill = 0x7FFF0000, 0x00050001, 0x00050026, 0x80000000  # the middle two: EPERM and ENOSYS

    def on(number: int | None, *then: tuple[int, int, int, int]) -> None:
        if number is not None:
            program.extend([(equal, 0, len(then), number), *then])

    program += [(load, 0, 0, 4), (equal, 1, 0, architecture), (answer, 0, 0, kill), (load, 0, 0, 0)]
    if column == 0:
        program += [(at_least, 0, 1, 0x40000000), (answer, 0, 0, refuse)]  # the numbers of the x32 ABI
    for numbers in _REFUSED.values():
        on(numbers[column], (answer, 0, 0, refuse))
    first_argument = (load, 0, 0, 16)
    for numbers in _ITSELF_ONLY.values():
        on(numbers[column], first_argument, (equal, 1, 0, 0), (equal, 0, 1, os.getpid()), (answer, 0, 0, allow), (answer, 0, 0, refuse))
    on(_CLONE[column], first_argument, (any_bit, 0, 1, 0x00010000), (answer, 0, 0, allow), (answer, 0, 0, refuse))
    on(_CLONE3[column], (answer, 0, 0, unknown))
    program.append((answer, 0, 0, allow))

    code = ctypes.create_string_buffer(b"".join(struct.pack("HBBI", *instruction) for instruction in program))
    _prctl(22, 2, ctypes.c_char_p(struct.pack("HxxxxxxP", len(program), ctypes.addressof(code))))


def _disable_destructive_calls() -> None:
    """Against accidents: what a program under test could do to its own folder and process."""
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


def _child(parent: int, timeout: float, memory: int) -> None:
    """Reads a program from stdin, locks this process up, and runs it."""
    code = sys.stdin.buffer.read().decode("utf-8", "surrogatepass")
    null = os.open(os.devnull, os.O_RDONLY)
    os.dup2(null, 0)
    os.close(null)
    faulthandler.disable()
    os.environ["OMP_NUM_THREADS"] = "1"
    _limit_resources(timeout, memory)
    if sys.platform == "linux":
        _prctl(1, signal.SIGKILL)  # when the parent dies
        if os.getppid() != parent:
            os._exit(1)
        _prctl(38, 1)  # no new privileges: what both of the following ask for
        if platform.machine() in _ARCHITECTURES:
            _drop_capabilities()
        if _landlock_version():
            _confine_to(os.getcwd())
        if _has_seccomp():
            _refuse_system_calls()
    _disable_destructive_calls()
    main = types.ModuleType("__main__")
    sys.modules["__main__"] = main
    sys.path.insert(0, "")
    exec(compile(code, "<llm>", "exec"), main.__dict__)


if __name__ == "__main__":
    _child(int(sys.argv[1]), float(sys.argv[2]), int(sys.argv[3]))

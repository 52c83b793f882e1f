"""Runs a model's Python code in a process of its own: HumanEval programs, mostly wrong, sometimes harmful.

The process locks itself up before it runs the code (nanochat/sandbox.py says against what, and how). This side starts it, with an
environment of PATH (and LD_LIBRARY_PATH, where it is set), nothing to read and no file but its own; keeps the time and the size of its folder; kills it; reads its output; and
removes its folder, also one that an earlier process left when it was killed itself.

Linux on x86-64 and ARM64 has all of it, for any user and in most containers. Where seccomp (kernel 3.17) or Landlock (5.13) is missing,
and on other systems, a warning says once what is not stopped. Where a user must not make namespaces (Docker's default, Ubuntu's
AppArmor) the program's folder is on the disk, and its size is looked at 50 times a second: a program can overshoot by what it writes in
20 ms, and by 16 MiB for each of 60 files that it deletes while they are open.

What it does not stop, for any program:
* bugs of the kernel and of Python's own files, and what CPU caches and timings leak;
* asking whether a path exists, how large and how old it is, where a link points, which process numbers are in use (not what is in a file
  or a folder); reading Python's own files and the system's libraries; the machine's name, load and memory;
* keeping the CPUs and the memory it is allowed busy until its time is over.
For code from an enemy, use a virtual machine.
"""
import contextlib
import functools
import glob
import logging
import os
import select
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass

from nanochat import sandbox
from nanochat.cli import UsageError


@dataclass
class ExecutionResult:
    success: bool
    stdout: str
    stderr: str
    error: str | None = None
    timeout: bool = False
    memory_exceeded: bool = False


def execute_code(code: str, timeout: float = 5.0, maximum_memory_bytes: int | None = 256 * 2 ** 20, test: str | None = None) -> ExecutionResult:
    """Runs `code` as a main program, in an empty folder, with nothing to read on stdin.

    Success is exit status 0: the program is its own judge, and `sys.exit(0)` in its first line is success. Otherwise `error` is the last
    line of stderr, such as `ValueError: no such thing`. After `timeout` seconds the process is killed and its output dropped.

    With `test` the program is judged by another: the test runs in a second process, in which the functions of `code` have their names and
    are called by message. Success is that the test's last statement was reached, and nothing that the program does in its own
    process, to itself, to Python or to the rest of its memory, can bring that about: neither an exit nor a
    thread, no tracing, no patched `==`, no secret found in memory, for there is none. What passes between the two are plain values (numbers, strings,
    containers of them, Decimal, Fraction), by copy: a function that returns anything else, an iterator for example, fails its test, and a test
    does not see what is done to its arguments. What remains is a function that knows the test and returns the values it wants.
    """
    _warn_of_missing_protection()
    _remove_leftovers()
    deadline = time.monotonic() + timeout
    with contextlib.ExitStack() as stack:
        if test is None:
            processes = [stack.enter_context(_Process("main", code, timeout, maximum_memory_bytes))]
        else:
            requests, answers = os.pipe(), os.pipe()
            try:
                processes = [stack.enter_context(_Process("program", code, timeout, maximum_memory_bytes, requests[0], answers[1])),
                             stack.enter_context(_Process("test", test, timeout, maximum_memory_bytes, requests[1], answers[0]))]
            finally:
                for end in requests + answers:
                    os.close(end)
        judge = processes[-1]
        while not judge.ends(0.02):
            if time.monotonic() > deadline:
                return ExecutionResult(False, "", "", f"no end after {timeout:g} seconds", timeout=True)
            if any(_is_full(process.folder) for process in processes):
                return ExecutionResult(False, "", "", f"more than {sandbox.FOLDER_BYTES >> 20} MiB or {sandbox.FOLDER_FILES} files")
        for process in processes:
            process.kill()
        out, err = ("".join(_read(process.files[i]) for process in processes) for i in (1, 2))
        status = judge.popen.returncode
    if status == 0:
        return ExecutionResult(True, out, err)
    names = {member.value: member.name for member in signal.Signals}
    how = f"exit status {status}" if status > 0 else f"killed by {names.get(-status, f'signal {-status}')}"  # real-time signals have no names
    return ExecutionResult(False, out, err, (err.strip().splitlines() or [how])[-1][:1000], memory_exceeded="MemoryError" in err)


def check_sandbox() -> None:
    """Raises UsageError where a program that must pass does not, as it would be for all of them: another Python's library is missing, or the kernel refuses to lock up."""
    if os.name != "posix":
        raise UsageError("generated code runs in processes that lock themselves up as POSIX systems let them; on Windows take WSL, or leave HumanEval out: -a 'ARC-Easy|ARC-Challenge|MMLU|GSM8K'")
    result = execute_code("def one():\n    return 1", timeout=60, test="assert one() == 1")
    if not result.success:
        raise UsageError(f"the sandbox for generated code does not work here ({result.error}), and every program would count as wrong; leave HumanEval out: -a 'ARC-Easy|ARC-Challenge|MMLU|GSM8K'")


class _Process:
    """A sandboxed process, its folder and its files for stdin, stdout and stderr; killed and removed at the end of the `with` block."""

    def __init__(self, role: str, code: str, timeout: float, memory: int | None, requests: int = -1, answers: int = -1):
        self._stack = contextlib.ExitStack()
        with contextlib.ExitStack() as stack:
            self.folder = tempfile.mkdtemp(prefix=_PREFIX)
            stack.callback(_remove, self.folder)
            stack.enter_context(_locked(self.folder))
            # files, not pipes: their size is limited, and nobody has to read along
            self.files = [stack.enter_context(tempfile.TemporaryFile()) for _ in range(3)]
            self.files[0].write(code.encode("utf-8", "surrogatepass"))
            self.files[0].seek(0)
            libraries = [f"{prefix}/{name}" for prefix in {sys.prefix, sys.base_prefix} for name in ("lib", "lib64")]
            libraries += [path for path in sys.path if path.endswith("-packages")]
            command = [sys.executable, "-B", "-X", "utf8", "-I", "-S", os.path.abspath(sandbox.__file__), role, str(os.getpid()), str(timeout),
                       str(memory or 0), str(requests), str(answers), *libraries]
            stdin, stdout, stderr = self.files
            environment = {"PATH": "/usr/bin:/bin", **{name: value for name, value in os.environ.items() if name == "LD_LIBRARY_PATH"}}  # which Python's own library may need
            self.popen = subprocess.Popen(command, cwd=self.folder, env=environment, stdin=stdin, stdout=stdout, stderr=stderr,
                                          pass_fds=[end for end in (requests, answers) if end >= 0], start_new_session=True)
            stack.callback(self.kill)
            self._poll = None
            with contextlib.suppress(AttributeError, OSError):  # Linux 5.3; subprocess would look every 50 ms only
                handle = stack.enter_context(os.fdopen(os.pidfd_open(self.popen.pid)))
                self._poll = select.poll()
                self._poll.register(handle, select.POLLIN)
            self._stack = stack.pop_all()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self._stack.close()

    def ends(self, seconds: float) -> bool:
        """Whether the process ends within that time."""
        if self._poll is not None:
            return bool(self._poll.poll(seconds * 1000))
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.popen.wait(seconds)
        return self.popen.returncode is not None

    def kill(self) -> None:
        """Kills the process, if it goes on, and whatever it may have started; its exit status is there afterwards."""
        if self.popen.returncode is None:
            with contextlib.suppress(ProcessLookupError, PermissionError):  # macOS does not permit it when all have ended
                os.killpg(self.popen.pid, signal.SIGKILL)
            self.popen.wait()


def _read(file) -> str:
    file.seek(0)
    return file.read().decode("utf-8", "replace")


# -----------------------------------------------------------------------------
# Folders

_PREFIX = "nanochat-sandbox-"


def _is_full(folder: str) -> bool:
    """Whether too much has been written. Sees nothing where the program's folder is a file system of its own, which has its own limit."""
    size = number = 0
    folders = [folder]
    try:
        while folders:
            with os.scandir(folders.pop()) as entries:
                for entry in entries:
                    number += 1
                    size += entry.stat(follow_symlinks=False).st_blocks * 512
                    if number > sandbox.FOLDER_FILES or size > sandbox.FOLDER_BYTES:
                        return True
                    if entry.is_dir(follow_symlinks=False):
                        folders.append(entry.path)
    except FileNotFoundError:  # the program moves its files about: next time
        return False
    except OSError:  # a path too long to look into
        return True
    return False


def _remove(folder: str) -> None:
    try:
        shutil.rmtree(folder, ignore_errors=True)
    except RecursionError:  # folders nested too deep for Python
        subprocess.run(["rm", "-rf", folder], check=False)


@contextlib.contextmanager
def _locked(folder: str):
    """A lock upon `folder` that says that its owner lives. Raises BlockingIOError."""
    import fcntl  # there is none on Windows
    handle = os.open(folder, os.O_RDONLY | os.O_NOFOLLOW)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    finally:
        os.close(handle)


@functools.cache
def _remove_leftovers() -> None:
    """Removes the folders of processes that were killed before they could do it, once; not the newest, which may not be locked yet."""
    for folder in glob.glob(os.path.join(glob.escape(tempfile.gettempdir()), f"{_PREFIX}*")):
        with contextlib.suppress(OSError):
            state = os.lstat(folder)
            if state.st_uid == os.getuid() and time.time() - state.st_mtime > 60:
                with _locked(folder):
                    _remove(folder)


@functools.cache
def _warn_of_missing_protection() -> None:
    missing = []
    if not sandbox.has_seccomp():
        missing.append("use the network and start processes")
    if not sandbox.landlock_version():
        missing.append("read and write your files")
    if missing:
        logging.getLogger(__name__).warning(f"This system cannot stop a model's code from trying to {' and to '.join(missing)}; "
                                            "see nanochat/execution.py, and run it in a virtual machine if that matters")

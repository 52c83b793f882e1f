"""What a model's code must not be able to do, tried from inside the sandbox."""
import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import psutil
import pytest

from nanochat import execution
from nanochat.execution import execute_code

pytestmark = pytest.mark.skipif(not (execution._has_seccomp() and execution._landlock_version()), reason="this system has no seccomp or no Landlock")


def run(code: str, timeout: float = 5.0, **kwargs):
    return execute_code(textwrap.dedent(code), timeout=timeout, **kwargs)


def children() -> list:
    """Sandboxes that still run."""
    return [process for process in psutil.process_iter(["cmdline", "status"])
            if execution.__file__ in (process.info["cmdline"] or ()) and process.info["status"] != psutil.STATUS_ZOMBIE]


LIBC = """
    import ctypes, os
    libc = ctypes.CDLL(None, use_errno=True)
    def errno(result):
        return ctypes.get_errno() if result < 0 else 0
"""


@pytest.mark.parametrize("code", [
    "import os\nwhile True: os.posix_spawn('/bin/true', ['true'], {})",
    "import _posixsubprocess, os\nos.fork = __import__('posix').fork\nwhile True: os.fork()",
    "import multiprocessing\nmultiprocessing.Process(target=print).start()",
    "import subprocess, importlib\nimportlib.reload(subprocess).run(['true'])",
    "import os\nos.execv('/bin/true', ['true'])",
])
def test_no_processes(code):
    """Not even with what the guard has put out of reach fetched back, in an endless loop."""
    result = run(code)
    assert not result.success and not result.timeout
    assert not children()


def test_fork_bomb_by_system_call():
    result = run(LIBC + """
    for name in ("fork", "vfork"):
        print(errno(getattr(libc, name)()))
    print(errno(libc.syscall(56, 17, 0, 0, 0, 0)), errno(libc.syscall(435, 0, 0)))
    """)
    assert result.stdout == "1\n1\n1 38\n"


def test_threads_work_and_thread_bombs_do_not():
    result = run("""
        import threading, time
        def wait(): time.sleep(60)
        try:
            while True: threading.Thread(target=wait, daemon=True).start()
        except (RuntimeError, MemoryError):
            print(1 < threading.active_count() < 1000, flush=True)
        import os; os._exit(0)
    """)
    assert result.stdout == "True\n"


@pytest.mark.parametrize("code", [
    "x = []\nwhile True: x.append(bytearray(10 ** 7))",
    "x = 'a' * (1 << 40)",
    "x = [0]\nwhile True: x += x",
    "import mmap\nmmap.mmap(-1, 1 << 30)",
    "import os\nos.memfd_create('x')",
])
def test_memory_bombs(code):
    result = run(code)
    assert not result.success and not result.timeout


def test_memory_without_a_limit():
    assert run("print(len(bytearray(400 * 2 ** 20)))", maximum_memory_bytes=None).success


@pytest.mark.parametrize("code", [
    "while True: pass",
    "import time\ntime.sleep(100)",
    "import signal\nfor s in range(1, 32):\n    try: signal.signal(s, signal.SIG_IGN)\n    except OSError: pass\nwhile True: pass",
    "import threading\nfor _ in range(4): threading.Thread(target=lambda: any(iter(int, 1))).start()",
    "while True:\n    try:\n        while True: pass\n    except BaseException: pass",
])
def test_endless_loops_are_killed(code):
    result = run(code, timeout=0.5)
    assert result.timeout and not result.success and result.stdout == "" and result.error
    assert not children()


def test_cpu_time_limit_holds_without_the_parent():
    """The limit that the kernel keeps even when nobody waits."""
    assert run("import ctypes\nimport sys\nlimits = (ctypes.c_long * 2)()\nctypes.CDLL(None).getrlimit(0, limits)\nprint(list(limits))",
               timeout=3).stdout == "[4, 4]\n"


def test_dies_with_its_parent(tmp_path):
    code = "from nanochat.execution import execute_code; execute_code('while True: pass', timeout=50)"
    parent = subprocess.Popen([sys.executable, "-c", code], cwd=Path(__file__).parents[1], env={**os.environ, "TMPDIR": str(tmp_path)})
    while not children():
        assert parent.poll() is None
        time.sleep(0.01)
    parent.kill()
    parent.wait()
    deadline = time.monotonic() + 20
    while children() and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not children()


@pytest.mark.parametrize("write", [
    "open({path!r}, 'w')", "open({path!r}, 'a')", "import os; os.mkdir({path!r} + '.d')", "import os; os.symlink('/', {path!r} + '.l')",
    "import os; os.link({path!r}, 'mine')", "import posix; posix.unlink({path!r})", "import posix; posix.rename({path!r}, 'mine')",
    "import posix; posix.truncate({path!r}, 0)", "import posix; posix.chmod({path!r}, 0)", "import os; os.utime({path!r}, (0, 0))",
    "import os; os.mkfifo({path!r} + '.f')", "import os; os.setxattr({path!r}, 'user.x', b'1')", "import sqlite3; sqlite3.connect({path!r}).execute('create table t (x)')",
    "open('/proc/self/oom_score_adj', 'w')", "open('/dev/shm/nanochat-test', 'w')",
])
def test_no_writes_outside_its_folder(tmp_path, write):
    victim = tmp_path / "victim"
    victim.write_text("precious")
    before = victim.stat()
    result = run(write.format(path=str(victim)))
    assert not result.success and not result.timeout
    after = victim.stat()
    assert victim.read_text() == "precious" and (before.st_mode, before.st_mtime_ns) == (after.st_mode, after.st_mtime_ns)
    assert [path.name for path in tmp_path.iterdir()] == ["victim"]


def test_files_in_its_folder_and_only_for_its_time():
    result = run("""
        import os, posix, shutil
        os.makedirs('a/b')
        open('a/b/c', 'w').write('hello')
        shutil.copyfile('a/b/c', 'd')
        posix.unlink('a/b/c')
        print(open('d').read(), os.listdir('a/b'), posix.getcwd())
    """)
    text, folder = result.stdout.rsplit(" ", 1)
    assert text == "hello []"
    assert "nanochat-sandbox-" in folder and not os.path.exists(folder.strip())


def test_file_size_limit():
    result = run("f = open('big', 'wb')\nwhile True: f.write(bytes(10 ** 6))")
    assert not result.success and "File too large" in result.error


def test_a_flood_of_output():
    result = run("while True: print('x' * 1000)")
    assert not result.success and len(result.stdout) <= execution.FILE_BYTES


@pytest.mark.slow
def test_folders_too_deep_to_delete():
    result = run("""
        import os, posix
        for _ in range(1200):
            os.mkdir('a')
            posix.chdir('a')
        print(posix.getcwd().count('/a') > 500)
    """)
    assert not list(Path("/tmp").glob("nanochat-sandbox-*/a")), result


@pytest.mark.parametrize("code", [
    "import socket; socket.socket()",
    "import socket; socket.socket(socket.AF_UNIX)",
    "import socket; socket.create_connection(('127.0.0.1', 9))",
    "import urllib.request; urllib.request.urlopen('http://127.0.0.1:9')",
])
def test_no_sockets(code):
    result = run(code)
    assert not result.success and "not permitted" in result.error


def test_no_io_uring():
    """It opens sockets without the system call."""
    assert run(LIBC + "    print(errno(libc.syscall(425, 4, None)))\n").stdout == "1\n"


def test_no_secrets(tmp_path, monkeypatch):
    monkeypatch.setenv("SECRET_TOKEN", "swordfish")
    (tmp_path / "key").write_text("swordfish")
    result = run(f"""
        import os
        print(sorted(os.environ))
        for path in (f'/proc/{{os.getppid()}}/environ', '/proc/self/environ', '/etc/passwd', {str(tmp_path / "key")!r}):
            try: print(open(path).read())
            except OSError: print('refused')
        for folder in ('/', {str(tmp_path)!r}, os.path.expanduser('~')):
            try: print(os.listdir(folder))
            except OSError: print('refused')
    """)
    lines = result.stdout.splitlines()
    assert set(lines[0].strip("[]").replace("'", "").split(", ")) <= {"OMP_NUM_THREADS", "PATH", "LC_CTYPE"}
    assert lines[1:] == ["refused"] * 7


def test_no_signals_to_others():
    """A child cannot kill or stop the process that started it, nor slow it or change its limits; itself it can."""
    result = run("""
        import os, posix
        for process, signal in (os.getppid(), 0), (os.getppid(), 9), (-os.getppid(), 19), (-1, 9):
            try: posix.kill(process, signal); print('sent', flush=True)
            except PermissionError: print('refused', flush=True)
        for call in (lambda: os.sched_setaffinity(os.getppid(), {0}), lambda: os.setpriority(os.PRIO_PROCESS, os.getppid(), 19)):
            try: call(); print('done', flush=True)
            except PermissionError: print('refused', flush=True)
        os.sched_setaffinity(0, os.sched_getaffinity(0))
        posix.kill(os.getpid(), 15)
    """)
    assert result.stdout == "refused\n" * 6
    assert not result.success and result.error == f"killed by {signal.Signals.SIGTERM.name}"


def test_no_root_powers():
    assert run(LIBC + "    print(errno(libc.setuid(12345)), errno(libc.chroot(b'.')), errno(libc.mount(b'a', b'.', b'tmpfs', 0, None)))\n").stdout in (
        "1 1 1\n", "1 1 13\n")


def test_modules_of_its_own_and_main():
    result = run("""
        import pickle, sys
        open('helper.py', 'w').write('value = 42')
        import helper
        class C: pass
        print(helper.value, type(pickle.loads(pickle.dumps(C()))) is C, sys.modules['__main__'].C is C)
    """)
    assert result.stdout == "42 True True\n", result.stderr


def test_a_system_without_protection_says_so(monkeypatch, caplog):
    monkeypatch.setattr(execution, "_has_seccomp", lambda: False)
    monkeypatch.setattr(execution, "_landlock_version", lambda: 0)
    execution._warn_of_missing_protection.cache_clear()
    for _ in range(2):
        execution._warn_of_missing_protection()
    execution._warn_of_missing_protection.cache_clear()
    (message,) = caplog.messages
    assert "network" in message and "files" in message


def test_unencodable_text():
    assert run("print(len('\ud800'))").error.startswith(("SyntaxError", "UnicodeEncodeError", "ValueError"))

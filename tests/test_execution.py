"""What a model's code must not be able to do, tried from inside the sandbox; sandbox_corpus.py has most of what is tried."""
import functools
import json
import os
import signal
import struct
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

from nanochat import execution, sandbox
from nanochat.cli import UsageError
from nanochat.execution import execute_code
from tasks.humaneval import HumanEval
from tests.sandbox_corpus import BOMBS, ESCAPES, FORGERIES, PASSES, REFUSALS, TEST, running, without_mounts

pytestmark = pytest.mark.skipif(not (sandbox.has_seccomp() and sandbox.landlock_version()), reason="this system has no seccomp or no Landlock")
ROOT = Path(__file__).parents[1]


def run(code: str, timeout: float = 5.0, **kwargs):
    return execute_code(textwrap.dedent(code), timeout=timeout, **kwargs)


# -----------------------------------------------------------------------------
# The corpus, as whoever runs the tests (in CI often root), and as an ordinary user where root can become one

NOBODY = 65534


@functools.cache
def corpus(part: str, user: str, *without: str) -> dict:
    """What became of all programs of a part, run by a process of that user."""
    identity, interpreters = {}, [sys.executable]
    if user == "nobody":
        if os.getuid() != 0:
            pytest.skip("only root can become another user; the tests run as an ordinary one already")
        identity = {"user": NOBODY, "group": NOBODY, "extra_groups": []}
        interpreters.append("/usr/bin/python3")  # root's own is often in its home
    for interpreter in interpreters:
        try:
            subprocess.run([interpreter, "-c", "import nanochat.execution"], cwd=ROOT, check=True, capture_output=True, **identity)
            break
        except (OSError, subprocess.CalledProcessError):
            continue
    else:
        pytest.skip("the other user cannot read this folder, or has no Python")
    done = subprocess.run([interpreter, "-m", "tests.sandbox_corpus", part, *without], cwd=ROOT, capture_output=True, text=True, check=False, **identity)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.parametrize("name", ESCAPES)
def test_escape_is_refused(name):
    assert corpus("escapes", "self")["outcomes"].get(name, "the process ended before") in REFUSALS


identities = pytest.mark.parametrize(("user", "without"), [("self", ()), ("self", ("mount",)), ("nobody", ()), ("nobody", ("mount",))],
                                     ids=["self", "self without namespaces", "nobody", "nobody without namespaces"])


@identities
def test_escapes_are_refused_and_nothing_outside_has_changed(user, without):
    result = corpus("escapes", user, *without)
    assert result["success"], result["stderr"]
    assert {name: outcome for name, outcome in result["outcomes"].items() if outcome not in REFUSALS} == {}
    assert len(result["outcomes"]) == len(ESCAPES) and result["changes"] == []


def harmless(name: str, success: bool, error: str) -> bool:
    """Whether a bomb has failed in the way that it should."""
    expected = BOMBS[name][2]
    return not success and any(text in error for text in ((expected,) if isinstance(expected, str) else expected))


@pytest.mark.slow
@identities
def test_bombs(user, without):
    result = corpus("bombs", user, *without)
    results = result["outcomes"]
    assert {name: result["error"] for name, result in results.items() if not harmless(name, result["success"], result["error"])} == {}
    assert all(max(result["stdout"], result["stderr"]) <= sandbox.FILE_BYTES for result in results.values())
    assert len(results) == len(BOMBS) and result["running"] == []


@pytest.mark.parametrize("name", ["all signals blocked", "stops itself", "memory by pieces", "fork bomb", "a sparse file", "many files",
                                  "flood of output", "core dump", "threads without end"])
def test_some_bombs(name):
    code, arguments, _ = BOMBS[name]
    result = execute_code(code, **arguments)
    assert harmless(name, result.success, result.error), result.error
    if result.timeout:
        assert result.stdout == result.stderr == ""
    assert not running(os.getpid())


@pytest.mark.slow
@pytest.mark.parametrize("user", ["self", "nobody"])
def test_forgeries(user):
    results = corpus("forgeries", user)
    assert [name for name, result in results.items() if result["success"]] == [""]  # the one that is no forgery


@pytest.mark.parametrize("name", ["sys.exit(0)", "os._exit(0) in the call", "exit handler, then an error", "thread", "always equal", "answers by itself", "answers that change a class"])
def test_some_forgeries(name):
    assert not execute_code(FORGERIES[name], test=TEST).success


# -----------------------------------------------------------------------------
# A program and its test


def test_a_program_is_tested():
    result = execute_code(f"print('begin')\n{PASSES}", test=f"{TEST}\nprint('end')")
    assert result.success and result.stdout.endswith("end\n") and result.error is None


@pytest.mark.parametrize(("program", "test", "error"), [
    ("def f(): return 1 / 0", "f()", "ZeroDivisionError: division by zero"),
    ("def f(): return 1", "assert f() == 2, 'not two'", "AssertionError: not two"),
    ("def f(): return 1", "g()", "NameError: name 'g' is not defined"),
    ("def f(:", "f()", "RuntimeError: the program ended before its test did"),
    ("def f(): return f", "f()", "TypeError: a test can compare plain values only, no __main__.f"),
    ("def f(): return 1", "f(); raise SystemExit(0)", "RuntimeError: the test was left before its last statement"),
    ("def f(): return 'x' * 10 ** 10", "f()", "MemoryError"),
])
def test_a_failed_test_says_why(program, test, error):
    result = execute_code(program, test=test)
    assert not result.success and result.error.startswith(error)
    assert result.memory_exceeded == (error == "MemoryError")


@pytest.mark.skipif(not hasattr(signal, "SIGRTMIN"), reason="no real-time signals here")
def test_a_signal_without_a_name():
    assert execute_code(f"import signal; signal.raise_signal({signal.SIGRTMIN + 6})", timeout=60).error == f"killed by signal {signal.SIGRTMIN + 6}"


def test_a_test_that_does_not_end():
    assert execute_code("def f():\n    while True: pass", test="f()", timeout=0.3).timeout
    assert execute_code("while True: pass", test="f()", timeout=0.3).timeout
    assert execute_code("def f(): pass", test="while True: pass", timeout=0.3).timeout
    assert not running(os.getpid())


def test_values_pass_between_a_program_and_its_test():
    """All that compares equal in one process does so in two: also a Counter with a dict, a named tuple with a tuple."""
    result = execute_code("""
from collections import *
from decimal import Decimal
from fractions import Fraction
import enum
def same(x): return x
def counter(): return Counter("aab")
def default():
    d = defaultdict(lambda: 7, a=1)
    return d
def named(): return namedtuple("P", "x y")(1, 2)
def number(): return enum.IntEnum("N", "A B").B, Decimal("0.5"), Fraction(1, 2)
def raises(): raise KeyError("k")
""", test="""
for x in (None, True, -1, 10 ** 40, 1.5, float("inf"), 2j, "é", "\\ud800", b"x", bytearray(b"x"), [1, [2]], (1, (2,)), {1: "a"}, {1, 2}, frozenset([1]), range(3)):
    y = same(x)
    assert type(y) is type(x) and y == x
assert counter() == {"a": 2, "b": 1} and default() == {"a": 1} and named() == (1, 2) and number() == (2, 0.5, 0.5)
try: raises()
except KeyError as e: assert e.args == ("'k'",)
else: assert False
""")
    assert result.success, result.stderr


def human_eval(completion: str) -> bool:
    problem = {"messages": [{"content": "import math\n\ndef root(x):\n"}], "entry_point": "root",
               "test": "def check(candidate):\n    assert candidate(9) == 3\n    assert math.isclose(root(2), 2 ** 0.5)\n"}
    return HumanEval.evaluate(HumanEval.__new__(HumanEval), problem, completion)


def test_a_sandbox_that_does_not_work_is_no_verdict(monkeypatch):
    """Of a Python that cannot start every program would be wrong."""
    execution.check_sandbox()
    monkeypatch.setattr(execution.sys, "executable", "/bin/false")
    with pytest.raises(UsageError, match="the sandbox for generated code does not work here"):
        HumanEval()


def test_human_eval_is_passed_by_solutions_only():
    assert human_eval("def root(x):\n    return math.sqrt(x)")
    assert human_eval("```python\nprint('hello')\ndef root(x):\n    return x ** 0.5\n```")
    assert not human_eval("def root(x):\n    return x")
    assert not human_eval("import sys\nsys.exit(0)")


# -----------------------------------------------------------------------------
# What works, and what is told


def test_memory_without_a_limit():
    assert run("print(len(bytearray(400 * 2 ** 20)))", maximum_memory_bytes=None).success


def test_cpu_time_limit_holds_without_the_parent():
    """The limit that the kernel keeps even when nobody waits."""
    assert run("import ctypes\nimport sys\nlimits = (ctypes.c_long * 2)()\nctypes.CDLL(None).getrlimit(0, limits)\nprint(list(limits))",
               timeout=3).stdout == "[4, 4]\n"


@pytest.mark.parametrize("test", ["", ", test='f()'"], ids=["alone", "with a test"])
def test_dies_with_its_parent(tmp_path, test):
    code = f"from nanochat.execution import execute_code; execute_code('while True: pass', timeout=50{test})"
    parent = subprocess.Popen([sys.executable, "-c", code], cwd=Path(__file__).parents[1], env={**os.environ, "TMPDIR": str(tmp_path)})
    while not running(parent.pid):
        assert parent.poll() is None
        time.sleep(0.01)
    parent.kill()
    parent.wait()
    deadline = time.monotonic() + 20
    while running(parent.pid) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not running(parent.pid)


@pytest.mark.parametrize("code", [
    "import asyncio\nasync def f(): await asyncio.sleep(0.001); return 1\nassert asyncio.run(f()) == 1",
    "import threading\nx = []\nt = [threading.Thread(target=x.append, args=(i,)) for i in range(8)]\n[a.start() for a in t]; [a.join() for a in t]\nassert len(x) == 8",
    "import concurrent.futures as c\nassert list(c.ThreadPoolExecutor(4).map(abs, [-1, 2])) == [1, 2]",
    "import queue, select, os\nr, w = os.pipe(); os.write(w, b'x'); assert select.select([r], [], [], 1)[0] == [r]",
    "import sqlite3\nc = sqlite3.connect('a.db'); c.execute('create table t (x)'); c.execute('insert into t values (1)'); c.commit(); assert list(c.execute('select * from t')) == [(1,)]",
    "import tempfile\nwith tempfile.TemporaryFile(dir='.') as f: f.write(b'x'); f.seek(0); assert f.read() == b'x'",
    "import shutil\nopen('a', 'w').write('x'); shutil.copyfile('a', 'b'); shutil.copymode; assert open('b').read() == 'x'",
    "import mmap\nopen('a', 'wb').write(b'x' * 4096)\nwith open('a', 'r+b') as f: m = mmap.mmap(f.fileno(), 0); m[0:1] = b'y'; m.flush()\nassert open('a').read(1) == 'y'",
    "import signal, time\ndef f(*_): raise TimeoutError\nsignal.signal(signal.SIGALRM, f); signal.setitimer(signal.ITIMER_REAL, 0.01)\ntry: time.sleep(5)\nexcept TimeoutError: pass",
    "import os, signal\nx = []\nsignal.signal(signal.SIGUSR1, lambda *_: x.append(1)); signal.raise_signal(signal.SIGUSR1); assert x",
    "import datetime, zoneinfo, time, random, secrets, uuid, hashlib, decimal, statistics, platform\ndatetime.datetime.now(); secrets.token_hex(); uuid.uuid4(); platform.machine()",
    "import os\nassert os.cpu_count() and os.sched_getaffinity(0); os.urandom(4); os.nice; os.get_terminal_size; os.isatty(1); os.getlogin",
    "import ctypes\nassert ctypes.CFUNCTYPE(ctypes.c_int)(lambda: 3)() == 3",
    "import unittest, doctest, typing, dataclasses, json, csv, re, heapq, bisect, itertools, functools, string, pickle, copy, timeit, logging, argparse, warnings",
    "import fcntl\nf = open('a', 'w'); fcntl.lockf(f, fcntl.LOCK_EX); fcntl.fcntl(f, fcntl.F_GETFD)",
    "import os\nos.makedirs('a/b'); os.symlink('a', 'l'); os.mkdir('c'); assert sorted(os.listdir()) == ['a', 'c', 'l'] and [d for d, _, _ in os.walk('a')] == ['a', 'a/b']",
], ids=lambda code: code.split("\n")[0][7:40])
def test_ordinary_programs_work(code):
    result = run(code)
    assert result.success, result.stderr


def test_newer_calls_are_answered_as_an_old_kernel_would():
    """C libraries have a second way then."""
    result = run("import ctypes\nlibc = ctypes.CDLL(None, use_errno=True)\nfor n in 435, 500: libc.syscall(n, 0, 0); print(ctypes.get_errno())")
    assert result.stdout == "38\n38\n"


def judge(program, architecture: int, number: int, *arguments: int) -> int:
    """What the kernel makes of the filter for one call."""
    data = struct.pack("iIQ6Q", number, architecture, 0, *arguments, *[0] * (6 - len(arguments)))
    accumulator = position = 0
    while True:
        operation, if_true, if_false, operand = program[position]
        position += 1
        if operation == 0x06:
            return operand
        if operation == 0x20:
            (accumulator,) = struct.unpack_from("I", data, operand)
        elif operation == 0x54:
            accumulator &= operand
        else:
            position += if_true if {0x15: accumulator == operand, 0x25: accumulator > operand}[operation] else if_false


@pytest.mark.parametrize(("machine", "own", "other", "read", "openat", "fcntl", "clone", "kill", "socket", "sendto"), [
    ("x86_64", 0xC000003E, 0x40000003, 0, 257, 72, 56, 62, 41, 44),
    ("aarch64", 0xC00000B7, 0x40000028, 63, 56, 25, 220, 129, 198, 206),
])
def test_the_filter_of_each_machine(monkeypatch, machine, own, other, read, openat, fcntl, clone, kill, socket, sendto):
    """Also of the one that the tests do not run on."""
    monkeypatch.setattr(sandbox, "_MACHINE", machine)
    program = sandbox._filter()
    assert len(program) < 4096 and all(0 <= jump < 256 for line in program for jump in line[1:3])
    ask = functools.partial(judge, program, own)
    allow, kill_process, eperm, enosys = 0x7FFF0000, 0x80000000, 0x00050001, 0x00050026
    assert ask(read) == allow and judge(program, other, read) == kill_process
    assert ask(socket) == eperm and ask(435) == enosys and ask(470) == enosys and ask(469) == eperm
    assert ask(openat, 0, 0, os.O_RDONLY | 0o2000000) == ask(openat, 0, 0, os.O_RDWR | os.O_CREAT | os.O_TRUNC) == allow
    assert ask(openat, 0, 0, os.O_RDONLY | os.O_TRUNC) == eperm
    assert [ask(fcntl, 0, command) for command in (0, 3, 4, 8, 10, 15, 1024, 1026, 1030)] == [allow, allow, allow, *[eperm] * 5, allow]
    assert ask(fcntl, 0, 4, 0o4000) == allow and ask(fcntl, 0, 4, 0o24000) == eperm
    assert ask(clone, 0x3D0F00) == allow and ask(clone, 17) == ask(clone, 0x3D0F00 | 0x10000000) == eperm
    assert ask(kill, os.getpid(), 15) == allow and {ask(kill, process, 9) for process in (0, 1, os.getppid(), 2 ** 64 - 1)} == {eperm}
    assert ask(sendto, 3) == allow and ask(sendto, 3, 0, 0, 0, 1) == ask(sendto, 3, 0, 0, 0, 1 << 32) == eperm


def test_the_folder_of_a_killed_supervisor_is_removed(monkeypatch, tmp_path):
    monkeypatch.setattr(execution.tempfile, "tempdir", str(tmp_path))
    old, running, young = (tmp_path / f"nanochat-sandbox-{name}" for name in ("old", "running", "young"))
    for folder in (old, running, young):
        (folder / "deep" / "er").mkdir(parents=True)
    for folder in (old, running):
        os.utime(folder, (1, 1))
    execution._remove_leftovers.cache_clear()
    with execution._locked(str(running)):
        execution._remove_leftovers()
    assert {path.name for path in tmp_path.iterdir()} == {running.name, young.name}


def test_no_folder_is_left(monkeypatch, tmp_path):
    monkeypatch.setattr(execution.tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr(sandbox, "__file__", str(without_mounts(tmp_path)))
    run("import os\nos.makedirs('a/b/c'); open('a/b/c/d', 'w').write('x')")
    run("import os\nopen('d', 'w').write('x')\nwhile True: pass", timeout=0.1)
    run("import os\nopen('d', 'w').write('x')\nwhile True: pass", timeout=0.1, test="f()")
    assert not list(tmp_path.glob("nanochat-sandbox-*"))


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
    monkeypatch.setattr(sandbox, "has_seccomp", lambda: False)
    monkeypatch.setattr(sandbox, "landlock_version", lambda: 0)
    execution._warn_of_missing_protection.cache_clear()
    for _ in range(2):
        execution._warn_of_missing_protection()
    execution._warn_of_missing_protection.cache_clear()
    (message,) = caplog.messages
    assert "network" in message and "files" in message


def test_unencodable_text():
    assert run("print(len('\ud800'))").error.startswith(("SyntaxError", "UnicodeEncodeError", "ValueError"))

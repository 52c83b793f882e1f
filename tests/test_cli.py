"""Flags and error messages: what every command shares."""
import argparse
import dataclasses
import errno
import importlib
import os
import subprocess
import sys
from pathlib import Path

import pytest

from nanochat import cli
from nanochat.cli import REQUIRED, ArgumentParser, UsageError, command, flag, parse_settings, positive_int, positive_ints, settings_parser
from tests.tiny import ROOT


def parse(argv, **options):
    parser = ArgumentParser(prog="test")
    parser.add_argument("--model-tag", default="none", **options)
    parser.add_argument("--load_optimizer", type=int, default=1)
    parser.add_argument("rest", nargs="*")
    return parser.parse_args(argv)


@pytest.mark.parametrize("argv", [["--model-tag=a_b"], ["--model_tag=a_b"], ["--model-tag", "a_b"], ["--model_tag", "a_b"]])
def test_dashes_and_underscores_are_equal(argv):
    assert parse(argv).model_tag == "a_b"  # the value keeps its own


def test_what_is_no_flag_keeps_its_underscores():
    assert parse(["a_b", "--", "--model_tag=c"]).rest == ["a_b", "--model_tag=c"]


def test_sys_argv_is_read(monkeypatch):
    monkeypatch.setattr("sys.argv", ["test", "--model_tag=x"])
    assert parse(None).model_tag == "x"


@pytest.mark.parametrize("argv", [["--model=x"], ["--mod", "x"], ["--nothing"], ["--model-tag"], ["--model-tag=8"]])
def test_errors_are_one_line_and_status_2(capsys, argv):
    with pytest.raises(SystemExit) as exit:
        parse(argv, type=int, choices=[1, 2])
    assert exit.value.code == 2
    err = capsys.readouterr().err
    assert err.startswith("test: error: ") and err.count("\n") == 1


@pytest.mark.parametrize("name, good, bad", [
    ("positive_int", {"1": 1, "12": 12}, ["0", "-1", "1.5", "x", "", "nan", "1e3", "9" * 400, str(2 ** 63)]),
    ("seed", {"0": 0, str(2 ** 62 - 1): 2 ** 62 - 1}, ["-1", str(2 ** 62), "1.0"]),
    ("non_negative_int", {"0": 0, "7": 7}, ["-1", "0.5"]),
    ("int_or_off", {"-1": -1, "1": 1}, ["0", "-2"]),
    ("step_or_off", {"-1": -1, "0": 0, "5": 5}, ["-2"]),
    ("positive_float", {"0.5": 0.5, "1e-9": 1e-9}, ["0", "-1", "nan", "inf", "1e999"]),
    ("non_negative_float", {"0": 0.0, "2": 2.0}, ["-0.1", "nan", "-inf"]),
    ("finite_float", {"-3.5": -3.5}, ["nan", "inf", "x"]),
    ("fraction", {"0": 0.0, "1": 1.0, "0.65": 0.65}, ["-0.1", "1.1", "nan"]),
])
def test_numbers(capsys, name, good, bad):
    kind = getattr(cli, name)
    for text, value in good.items():
        assert kind(text) == value and type(kind(text)) is type(value)
    parser = ArgumentParser(prog="test")
    parser.add_argument("--x", type=kind)
    for text in bad:
        with pytest.raises(SystemExit):
            parser.parse_args([f"--x={text}"])
        assert "--x" in capsys.readouterr().err


def test_pictures():
    assert cli.picture_path("a/b.svg") == Path("a/b.svg")
    for text in ("curve", "curve.doc", "curve.PNG.txt"):
        with pytest.raises(argparse.ArgumentTypeError, match="does not end in .png"):
            cli.picture_path(text)


@pytest.mark.parametrize("text, good", [("d12", True), ("a.b_c", True), ("", True), (".d12", False), ("a/b", False), ("..", False), ("a\x00b", False), ("../x", False), ("a\\b", False)])
def test_folder_names(text, good):
    if good:
        assert cli.folder_name(text) == text
    else:
        with pytest.raises(argparse.ArgumentTypeError, match="plain name"):
            cli.folder_name(text)


def test_help_shows_defaults_that_say_something():
    parser = ArgumentParser(prog="test")
    parser.add_argument("--bare", default=7)
    parser.add_argument("--zero", default=0.0, help="zero")
    parser.add_argument("--absent", default=None, help="absent (default: the last)")
    parser.add_argument("--switch", action="store_true", help="switch")
    lines = [" ".join(line.split()) for line in parser.format_help().splitlines()]
    assert {"--bare BARE (default: 7)", "--zero ZERO zero (default: 0.0)", "--absent ABSENT absent (default: the last)", "--switch switch"} <= set(lines)


@dataclasses.dataclass
class Settings:
    source: str = flag(REQUIRED, "Where from", choices=("a", "b"), short="-i")
    what: str = flag("all", "What to do", positional=True, nargs="?")
    sizes: list[int] = flag("1,8", "Sizes", type=positive_ints)
    depths: list[int] = flag([4], "Depths", type=positive_int, nargs="+")
    names: list[str] = flag([], "Names", action="append")
    eager: bool = flag(False, "Run eagerly")


@pytest.mark.parametrize("argv, expected", [
    (["-i", "a"], Settings("a", "all", [1, 8], [4], [], False)),
    (["some", "--source=b", "--sizes=2", "--depths", "1", "2", "--names=x", "--names=y", "--eager"], Settings("b", "some", [2], [1, 2], ["x", "y"], True)),
])
def test_flags_are_the_fields_of_a_settings_class(argv, expected):
    assert parse_settings(Settings, argv, "") == expected


@pytest.mark.parametrize("argv, message", [([], "-i/--source"), (["-i", "c"], "'c'"), (["-i", "a", "--sizes=1,x"], "'x' is not a whole number above 0"), (["-i", "a", "--sizes=1,"], "'1,' is not a list"),
                                           (["-i", "a", "--depths", "0"], "above 0")])
def test_bad_settings(argv, message, capsys):
    with pytest.raises(SystemExit) as exit:
        parse_settings(Settings, argv, "")
    assert exit.value.code == 2 and message in capsys.readouterr().err


def test_lists_are_not_shared():
    parse_settings(Settings, ["-i", "a", "--names=x"], "")
    assert Settings("a").names == [] and Settings("a").names is not Settings("a").names


COMMANDS = ("scripts.base_eval", "scripts.base_train", "scripts.chat_cli", "scripts.chat_eval", "scripts.chat_rl", "scripts.chat_sft", "scripts.chat_web",
            "scripts.grow_checkpoint", "scripts.infer_bench", "scripts.tok_train", "nanochat.memory", "nanochat.report")


@pytest.mark.parametrize("name", COMMANDS)
def test_help_stands_alone(name):
    """Each begins with a capital, says more than a word, has no full stop before its default, and needs no other flag's help to be read."""
    for action in settings_parser(importlib.import_module(name).Settings, "")._actions[1:]:
        text = action.help or ""
        assert text[:1].isupper() and " " in text and not text.endswith("."), (action.dest, text)
        assert action.default != -1 or "-1: " in text, (action.dest, text)


def failing(error):
    @command
    def main(argv=None):
        raise error
    return main


@pytest.mark.parametrize("error, status, said", [
    (UsageError("no data; get some"), 2, "error: no data; get some\n"),
    (UsageError("two\n  lines"), 2, "error: two lines\n"),
    (OSError(errno.ENOSPC, "No space left on device"), 2, "error: No space left on device: while writing"),
    (PermissionError(errno.EACCES, "Permission denied", "/etc/x"), 2, "error: Permission denied: /etc/x; fix permissions"),
    (FileNotFoundError(errno.ENOENT, "No such file or directory", "a"), 2, "error: No such file or directory: a\n"),
    (KeyboardInterrupt(), 130, "interrupted\n"),
])
def test_errors_become_exit_statuses(capsys, error, status, said):
    assert failing(error)() == status
    assert capsys.readouterr().err.startswith(said)


@pytest.mark.parametrize("error", [MemoryError(), RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: 640 bytes\nmore")])
def test_full_memory_is_one_line(capsys, error):
    assert failing(error)() == 2
    err = capsys.readouterr().err
    assert err.startswith("error: out of memory (") and err.endswith("ask for a smaller model, context or batch\n") and err.count("\n") == 1


@pytest.mark.parametrize("error", [ValueError("a bug"), RuntimeError("a bug"), ConnectionResetError(errno.ECONNRESET, "reset")])
def test_bugs_keep_their_traceback(error):
    with pytest.raises(type(error)):
        failing(error)()


def test_status_of_success():
    assert command(lambda argv: None)() == 0
    assert command(lambda argv: 3)(["x"]) == 3


def test_other_ranks_speak_after_rank_0(capsys, monkeypatch):
    """They give torchrun the time to end them when rank 0 has said it."""
    pauses = []
    monkeypatch.setattr("time.sleep", pauses.append)
    for name, value in (("RANK", "3"), ("LOCAL_RANK", "1"), ("WORLD_SIZE", "4")):
        monkeypatch.setenv(name, value)
    assert failing(UsageError("only here"))() == 2
    assert capsys.readouterr().err == "error on rank 3: only here\n" and len(pauses) == 1
    monkeypatch.setenv("RANK", "0")
    assert failing(UsageError("here"))() == 2
    assert capsys.readouterr().err == "error: here\n" and len(pauses) == 1


@pytest.mark.parametrize("variables, rank", [({}, 0), ({"RANK": "2"}, 0), ({"RANK": "abc"}, 0), ({"RANK": "", "LOCAL_RANK": "0", "WORLD_SIZE": "4"}, 0),
                                             ({"RANK": "2", "LOCAL_RANK": "0", "WORLD_SIZE": "4"}, 2)])
def test_rank_is_torchrun_s_or_none(monkeypatch, variables, rank):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert cli.env_rank() == rank


# -----------------------------------------------------------------------------
# Standard streams

# prints what no narrow encoding has and more than a pipe holds, asks a question, opens a file, and leaves a mark when it is through
PROGRAM = r"""
import sys
from nanochat.cli import command
@command
def main(argv=None):
    print("caf\u00e9 \u4f60\u597d \ud800", "x" * 200_000, flush=True)
    print("an error \u4f60", file=sys.stderr, flush=True)
    try:
        input()
    except EOFError:
        pass
    with open(sys.argv[1], "w") as f:
        print("more")
        print("less", file=sys.stderr)
        f.write("through")
sys.exit(main())
"""


def through(tmp_path, how: str, **environment: str) -> tuple[subprocess.CompletedProcess, str]:
    """The program, started by this line of a shell: the shell's result, and the mark."""
    mark = tmp_path / "mark"
    result = subprocess.run(["bash", "-c", how.format(program='"$PYTHON" -c "$PROGRAM" "$MARK"')], cwd=ROOT, capture_output=True, timeout=60,
                            env={**os.environ, "PYTHON": sys.executable, "PROGRAM": PROGRAM, "MARK": str(mark), **environment})
    return result, mark.read_text() if mark.exists() else ""


@pytest.mark.parametrize("how", [
    "{program} </dev/null", "{program} <&-", "{program} </dev/null | head -c 1", "{program} </dev/null 2>&1 | true", "{program} </dev/null >&-",
    "{program} <&- >&- 2>&-", "{program} </dev/null >/dev/full 2>/dev/full", "PYTHONUNBUFFERED=1 {program} </dev/null | head -c 1",
])
@pytest.mark.parametrize("encoding", ["utf-8", "ascii"])
def test_no_command_dies_of_its_terminal(tmp_path, how, encoding):
    result, mark = through(tmp_path, how + "; exit ${{PIPESTATUS[0]}}", PYTHONIOENCODING=encoding)
    assert (result.returncode, mark) == (0, "through"), result.stderr[-2000:]


def test_what_an_encoding_lacks_is_shown_by_its_number(tmp_path):
    result, _ = through(tmp_path, "{program} </dev/null", PYTHONIOENCODING="latin-1")
    assert result.stdout.startswith(b"caf\xe9 \\u4f60\\u597d \\ud800 xxx") and result.stdout.endswith(b"x\nmore\n")
    assert result.stderr == b"an error \\u4f60\nless\n"


def test_replaced_streams_stay(capsys):
    before = sys.stdin, sys.stdout, sys.stderr
    assert command(lambda argv: print("\u4f60"))() == 0
    assert (sys.stdin, sys.stdout, sys.stderr) == before and capsys.readouterr().out == "\u4f60\n"

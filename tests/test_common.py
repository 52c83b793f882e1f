"""Files, devices, ranks and logging: what every module stands on. (Peak speeds: golden/test_small.py.)"""
import errno
import http.client
import io
import logging
import os
import random
import socket
import stat
import subprocess
import sys
import urllib.request
from pathlib import Path

import pytest
import torch

from nanochat import common, files
from nanochat.cli import UsageError
from tests.tiny import ROOT


def test_base_directory(tmp_path, monkeypatch):
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path / "a" / "b"))
    assert common.get_base_dir() == str(tmp_path / "a" / "b") and (tmp_path / "a" / "b").is_dir()
    monkeypatch.setenv("NANOCHAT_BASE_DIR", "")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert common.get_base_dir() == str(tmp_path / ".cache" / "nanochat")
    monkeypatch.setenv("NANOCHAT_BASE_DIR", "~/my base")
    assert common.get_base_dir() == str(tmp_path / "my base")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("NANOCHAT_BASE_DIR", "~nobody-of-this-name/base")
    with pytest.raises(UsageError, match="no home directory"):
        common.get_base_dir()
    assert not list(tmp_path.glob("~*"))
    (tmp_path / "file").touch()
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path / "file"))
    with pytest.raises(UsageError, match="set NANOCHAT_BASE_DIR"):
        common.get_base_dir()


def test_atomic_files(tmp_path):
    path = tmp_path / "new" / "file.txt"
    files.write_text_atomic(path, "één")
    assert path.read_text(encoding="utf-8") == "één"
    with pytest.raises(RuntimeError), files.atomic_path(path) as temporary:
        temporary.write_text("half")
        assert path.read_text(encoding="utf-8") == "één"
        raise RuntimeError
    assert path.read_text(encoding="utf-8") == "één"
    with files.atomic_path(str(path)) as temporary:
        temporary.write_bytes(b"whole")
    assert path.read_bytes() == b"whole" and list(path.parent.iterdir()) == [path]


def test_atomic_files_follow_the_umask(tmp_path):
    before = os.umask(0o027)
    try:
        files.write_text_atomic(tmp_path / "x", "")
    finally:
        os.umask(before)
    assert (tmp_path / "x").stat().st_mode & 0o777 == 0o640


HOLD = """
import sys
from nanochat.files import locked
with locked(sys.argv[1]):
    print("held", flush=True)
    sys.stdin.read()
"""


@pytest.fixture
def other(tmp_path):
    """Another process that holds the folder until its stdin is closed."""
    process = subprocess.Popen([sys.executable, "-c", HOLD, str(tmp_path / "d4")], cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.wait()


def test_one_process_holds_a_folder(tmp_path, other):
    (tmp_path / "link").symlink_to("d4")
    for name in ("d4", "link"):  # however it is called
        with pytest.raises(UsageError, match="another process is writing to .*d4"), files.locked(tmp_path / name, wait=False):
            pass
    other.kill()  # whatever ends it
    other.wait()
    with files.locked(tmp_path / "d4", wait=False), files.locked(tmp_path / "d4", wait=False):
        assert not (tmp_path / "d4").exists()


@pytest.mark.parametrize("number, known", [(errno.ENOLCK, True), (errno.EOPNOTSUPP, True), (errno.EINVAL, True), (errno.EIO, False)])
def test_a_file_system_without_locks(tmp_path, monkeypatch, number, known):
    def refuse(*args):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr("fcntl.flock", refuse)
    if known:
        with files.locked(tmp_path / "d4"):
            pass
    else:
        with pytest.raises(OSError), files.locked(tmp_path / "d5"):
            pass


def test_a_file_is_there_where_folders_cannot_be_synced_and_owners_not_changed(tmp_path, monkeypatch):
    fsync = os.fsync

    def only_files(handle):
        if stat.S_ISDIR(os.fstat(handle).st_mode):
            raise OSError(errno.EINVAL, "Invalid argument")
        fsync(handle)

    def chmod(*args, **kwargs):
        raise PermissionError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(os, "fsync", only_files)
    monkeypatch.setattr(os, "chmod", chmod)
    files.write_text_atomic(tmp_path / "x", "whole")
    assert [path.name for path in tmp_path.iterdir()] == ["x"] and (tmp_path / "x").read_text() == "whole"


def test_waiting_for_a_folder(tmp_path, other, capsys, monkeypatch):
    monkeypatch.setattr("builtins.print", lambda *args, print=print, **kwargs: (print(*args, **kwargs), other.stdin.close()))  # it ends once we wait
    with files.locked(tmp_path / "d4"):
        pass
    assert "Waiting for another process that is writing to" in capsys.readouterr().out


def test_a_folder_that_cannot_be_written_to(tmp_path):
    files.check_writable(tmp_path / "new")
    assert list((tmp_path / "new").iterdir()) == []
    (tmp_path / "file").touch()
    with pytest.raises(UsageError, match="cannot write to .*file"):
        files.check_writable(tmp_path / "file")


@pytest.mark.parametrize("text", ["[" * 100_000, '{"a":' * 100_000, "[" * 100_000 + "]" * 100_000, "{", "", "9" * 5000])
def test_json_that_cannot_be_read_is_a_value_error(text):
    with pytest.raises(ValueError):
        files.parse_json(text)


def test_progress(capsys, monkeypatch):
    assert list(common.with_progress(iter("abcd"), 4, "val bpb")) == list("abcd") and capsys.readouterr().out == ""
    monkeypatch.setattr(common, "PROGRESS_SECONDS", -1)
    assert list(common.with_progress(iter("abcd"), 4, "val bpb")) == list("abcd")
    assert capsys.readouterr().out.startswith("val bpb: 25%, eta ")


def test_download_once(base_dir, tmp_path_factory):
    source = tmp_path_factory.mktemp("web") / "source"
    source.write_bytes(b"content")
    seen = []
    path = common.download_file_with_lock(source.as_uri(), "copy", postprocess_fn=seen.append)
    assert path == str(base_dir / "copy") and Path(path).read_bytes() == b"content" and seen == [path]
    source.unlink()
    assert common.download_file_with_lock(source.as_uri(), "copy", postprocess_fn=seen.append) == path and seen == [path]
    with pytest.raises(UsageError, match="cannot download"):
        common.download_file_with_lock(source.as_uri(), "other")
    assert not (base_dir / "other").exists()


def test_a_download_that_ends_too_soon(base_dir, monkeypatch):
    class Response(io.BytesIO):
        def read(self):
            raise http.client.IncompleteRead(b"half")
    monkeypatch.setattr(urllib.request, "urlopen", lambda url, timeout: Response())
    with pytest.raises(UsageError, match="cannot download"):
        common.download_file_with_lock("https://example.org/x", "copy")
    assert not (base_dir / "copy").exists()


@pytest.mark.parametrize("name, dtype", [("float32", torch.float32), ("bfloat16", torch.bfloat16), ("float16", torch.float16)])
def test_compute_dtype_by_name(monkeypatch, name, dtype):
    monkeypatch.setenv("NANOCHAT_DTYPE", name)
    assert common._resolve_compute_dtype() == (dtype, "set by NANOCHAT_DTYPE")


def test_compute_dtype_by_device(monkeypatch):
    monkeypatch.delenv("NANOCHAT_DTYPE")
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    for capability, dtype in (((8, 0), torch.bfloat16), ((9, 0), torch.bfloat16), ((7, 5), torch.float32)):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
        assert common._resolve_compute_dtype()[0] == dtype
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for native, dtype in ((True, torch.bfloat16), (False, torch.float32)):
        monkeypatch.setattr(common, "_cpu_has_native_bf16", lambda: native)
        assert common._resolve_compute_dtype()[0] == dtype


@pytest.mark.slow
def test_unknown_compute_dtype():
    done = subprocess.run([sys.executable, "-m", "nanochat.dataset"], cwd=ROOT, env={**os.environ, "NANOCHAT_DTYPE": "float8"}, capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr == "error: NANOCHAT_DTYPE=float8 is unknown; use one of bfloat16, float16, float32\n"


def test_unreachable_hub(monkeypatch):
    """No name, nobody listening, somebody listening; and no question to a network that a proxy or a mirror stands for."""
    for name in ("HF_HUB_OFFLINE", "HF_ENDPOINT", *(name for name in os.environ if name.lower().endswith("_proxy"))):
        monkeypatch.delenv(name, raising=False)
    unreachable = common.hub_unreachable.__wrapped__

    def no_name(*args, **kwargs):
        raise socket.gaierror("Name or service not known")
    monkeypatch.setattr(socket, "getaddrinfo", no_name)
    assert unreachable()
    with socket.create_server(("127.0.0.1", 0)) as server:
        found = [(socket.AF_INET, socket.SOCK_STREAM, 6, "", server.getsockname())]
        monkeypatch.setattr(socket, "getaddrinfo", lambda *args, **kwargs: found)
        assert not unreachable()
    assert unreachable()
    for name in ("HF_ENDPOINT", "https_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
        assert not unreachable()
        monkeypatch.delenv(name)


def test_compute_init_seeds():
    draws = []
    for _ in range(2):
        ddp, rank, local_rank, world_size, device = common.compute_init("cpu")
        draws.append((random.random(), torch.rand(3).tolist()))
    assert (ddp, rank, local_rank, world_size, device) == (False, 0, 0, 1, torch.device("cpu"))
    assert draws[0] == draws[1]
    common.compute_cleanup()  # without a process group there is nothing to do


def test_unknown_device():
    with pytest.raises(UsageError, match="cuda, mps or cpu"):
        common.compute_init("tpu")


@pytest.mark.parametrize("rank, printed", [(None, "x\n"), ("0", "x\n"), ("1", "")])
def test_print0(capsys, monkeypatch, rank, printed):
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE") if rank else ():
        monkeypatch.setenv(name, rank)
    common.print0("x")
    assert capsys.readouterr().out == printed


def test_ranks_that_are_no_numbers(monkeypatch):
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE"):
        monkeypatch.setenv(name, "first")
    with pytest.raises(UsageError, match="'first', 'first', 'first' and no numbers; unset them"):
        common.get_dist_info()


def test_a_base_directory_whose_name_is_no_text(monkeypatch):
    monkeypatch.setenv("NANOCHAT_BASE_DIR", "/tmp/\udcff")
    with pytest.raises(UsageError, match="is no UTF-8"):
        common.get_base_dir()


def test_colors():
    record = logging.makeLogRecord({"levelname": "INFO", "msg": "Shard 3 is done: %d MB", "args": (12,)})
    line = common.ColoredFormatter("%(levelname)s - %(message)s").format(record)
    assert line == "\033[32m\033[1mINFO\033[0m - \033[32m\033[1mShard 3\033[0m is done: \033[1m12 MB\033[0m"
    assert record.levelname == "INFO"  # other handlers get it uncoloured
    record = logging.makeLogRecord({"levelname": "ERROR", "msg": "12 MB"})
    assert common.ColoredFormatter("%(levelname)s - %(message)s").format(record) == "\033[31m\033[1mERROR\033[0m - 12 MB"


def test_dummy_wandb():
    common.DummyWandb().log({"a": 1}, step=3)
    common.DummyWandb().finish()


def test_a_driver_that_is_too_old_does_not_mean_the_cpu(monkeypatch):
    """An hour of a cluster could pass before anyone looks."""
    def init():
        raise RuntimeError("The NVIDIA driver on your system is too old (found version 11040). Please update your GPU driver by downloading it.")

    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "init", init)
    with pytest.raises(UsageError, match=r"too old \(found version 11040\); update it, install a PyTorch for it .*CUDA 13.0.* or give --device-type=cpu"):
        common.autodetect_device_type()
    with pytest.raises(UsageError, match="sees no cuda device here .*too old"):
        common.compute_init("cuda")

    def no_driver():
        raise RuntimeError("Found no NVIDIA driver on your system.")

    monkeypatch.setattr(torch.cuda, "init", no_driver)
    assert common.autodetect_device_type() != "cuda"


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_a_live_line_is_taken_over_by_the_next(monkeypatch):
    """On a terminal: one line that changes, cut to its width, out of the way of what is printed in between; now and then one stays."""
    terminal = Terminal()
    monkeypatch.setattr(sys, "stdout", terminal)
    monkeypatch.setenv("COLUMNS", "20")
    monkeypatch.setattr(common, "_live", {"shown": False, "lasted": -1e9})
    for line in ("step 0 which stays", "step 1 which is far too long for it", "step 2"):
        common.live_line(line)
    common.print0("Validation")
    assert terminal.getvalue() == "step 0 which stays\nstep 1 which is far\r\033[Kstep 2\r\033[KValidation\n"


def test_in_a_pipe_every_line_stays(capsys):
    common.live_line("step 0")
    common.live_line("step 1")
    assert capsys.readouterr().out == "step 0\nstep 1\n"


def test_a_new_folder_takes_the_place_of_none(tmp_path):
    with pytest.raises(UsageError, match="exists already and is not overwritten; choose another --out"):
        with files.new_folder(tmp_path / "out", "--out") as folder:
            (folder / "file").write_text("mine")
            (tmp_path / "out").mkdir()  # somebody was faster
    assert not any((tmp_path / "out").iterdir()) and [path.name for path in tmp_path.iterdir()] == ["out"]

"""Kernels are chosen once, kept, and the same on every rank and after a resume. What the stopwatch says is replaced: it is not what is tested."""
import json

import pytest
import torch

from nanochat import common, kernel_choice
from nanochat.cli import UsageError
from nanochat.resume import get_exact_state, set_exact_state
from tests import tiny

FAST = {"attention": "blocked", "window": "torch", "backward": "torch", "long-backward": "blocked", "decode": "float32", "position": "vector"}
OTHER = {"attention": "torch", "window": "blocked", "backward": "blocked", "long-backward": "torch", "decode": "torch", "position": "matrix"}


MEASURE = kernel_choice.measure


@pytest.fixture
def fresh(base_dir, monkeypatch, caplog):
    """A process that has chosen nothing yet, on an idle machine; returns the list of its measurements."""
    monkeypatch.setattr(kernel_choice, "_settled", {})
    monkeypatch.delenv("NANOCHAT_KERNELS")
    caplog.set_level("INFO")
    measurements = []
    monkeypatch.setattr(kernel_choice, "measure", lambda: measurements.append(1) or FAST.copy())
    return measurements


def next_process(monkeypatch) -> None:
    monkeypatch.setattr(kernel_choice, "_settled", {})


def choices() -> dict[str, str]:
    return {kernel: kernel_choice.chosen(kernel) for kernel in kernel_choice.KERNELS}


def test_measured_once_and_kept(fresh, monkeypatch, base_dir, caplog):
    common.compute_init("cpu")
    assert choices() == FAST and len(fresh) == 1
    assert "Kernels: attention=blocked,window=torch,backward=torch,long-backward=blocked,decode=float32,position=vector (measured in " in caplog.text
    next_process(monkeypatch)
    assert choices() == FAST and len(fresh) == 1
    assert "(measured on this machine before)" in caplog.text
    monkeypatch.setattr(kernel_choice, "machine", lambda: "another")
    next_process(monkeypatch)
    assert choices() == FAST and len(fresh) == 2
    assert sorted(path.name for path in (base_dir / "kernels").iterdir()) == sorted(["another.json", next(
        path.name for path in (base_dir / "kernels").iterdir() if path.name != "another.json")])


ARM = """processor	: 0
BogoMIPS	: 243.75
Features	: {features}
CPU implementer	: 0x41
CPU part	: {part}

processor	: 1
CPU part	: 0xfff
"""


def test_arm_s_cpus_have_names_of_their_own(monkeypatch, request):
    """Theirs are numbers and lists of features; what is measured or compiled for one is nothing for another."""
    request.addfinalizer(kernel_choice.machine.cache_clear)

    def name(text: str) -> str:
        kernel_choice.machine.cache_clear()
        with monkeypatch.context() as patch:
            patch.setattr(kernel_choice.Path, "read_text", lambda path: text)
            return kernel_choice.machine()

    names = {name(ARM.format(features=features, part=part)) for features in ("fp asimd", "fp asimd sve") for part in ("0xd0c", "0xd40")}
    assert len(names) == 4 and all("0x41" in found and "0xfff" not in found for found in names)
    assert name("model name	: Some CPU\n\nmodel name	: Some CPU\n").startswith("some-cpu-")


@pytest.mark.parametrize("content", ["", "{", "[]", "{}", json.dumps(FAST | dict(of=kernel_choice._alternatives(), decode="gpu")),
                                     json.dumps(FAST | dict(of="fewer alternatives")), b"\xff\xfe"])
def test_an_unreadable_file_is_measured_anew(fresh, base_dir, content):
    path = kernel_choice._path()
    path.parent.mkdir()
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    assert choices() == FAST and len(fresh) == 1
    assert kernel_choice._remembered() == FAST


def test_a_folder_that_cannot_be_written_to(fresh, base_dir):
    (base_dir / "kernels").write_text("a file where the folder would be")
    assert choices() == FAST


def test_no_base_directory(fresh, base_dir, monkeypatch):
    (base_dir / "file").touch()
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(base_dir / "file" / "below"))
    assert choices() == FAST


def test_the_variable_has_the_last_word(fresh, monkeypatch, caplog):
    monkeypatch.setenv("NANOCHAT_KERNELS", "decode=torch, window=blocked")
    assert choices() == FAST | dict(decode="torch", window="blocked")
    assert kernel_choice._remembered() == FAST, "what was forced is not what was measured"
    next_process(monkeypatch)
    monkeypatch.setenv("NANOCHAT_KERNELS", kernel_choice.describe(FAST))
    fresh.clear()
    kernel_choice._path().unlink()
    assert choices() == FAST and not fresh, "nothing is left to measure"
    assert "(set by NANOCHAT_KERNELS)" in caplog.text


@pytest.mark.parametrize("value", ["decode", "decode=", "decode=fast", "loss=torch", "attention=torch decode=torch", "=torch"])
def test_a_bad_variable(fresh, monkeypatch, value):
    monkeypatch.setenv("NANOCHAT_KERNELS", value)
    with pytest.raises(UsageError, match=r"NANOCHAT_KERNELS: there is no .*decode=torch\|float32"):
        common.compute_init("cpu")


def test_a_resumed_run_keeps_its_kernels(fresh, monkeypatch, caplog):
    kernel_choice.settle()
    state = get_exact_state(torch.device("cpu"), None)
    next_process(monkeypatch)
    kernel_choice._path().unlink()
    monkeypatch.setattr(kernel_choice, "measure", OTHER.copy)  # the stopwatch says otherwise this time
    assert choices() == OTHER
    set_exact_state(state, torch.device("cpu"), None)
    assert choices() == FAST
    assert "(as in the checkpoint)" in caplog.text
    monkeypatch.setenv("NANOCHAT_KERNELS", "decode=torch")
    kernel_choice.restore(state["kernels"])
    assert choices() == FAST | dict(decode="torch")


@pytest.mark.parametrize("damage", [lambda s: None, lambda s: {}, lambda s: s | dict(machine="another"), lambda s: s | dict(choices={"decode": "torch"})])
def test_choices_of_another_machine_or_version_do_not_count(fresh, damage):
    kernel_choice.settle()
    kernel_choice.restore(damage(dict(machine=kernel_choice.machine(), choices=FAST | dict(decode="torch"))))
    assert choices() == FAST


def test_no_choice_on_a_gpu(fresh):
    assert kernel_choice.state() is None
    kernel_choice.restore(dict(machine=kernel_choice.machine(), choices=FAST))
    assert kernel_choice.state() is None and not fresh


@pytest.mark.slow
def test_measured_where_nothing_is_differentiated(fresh):
    """A model may be asked first inside of torch.inference_mode, and backward passes are measured all the same."""
    with torch.inference_mode():
        assert MEASURE().keys() == kernel_choice.KERNELS.keys()


def test_the_faster_one_wins_and_the_default_a_draw():
    assert kernel_choice._faster("decode", {"torch": [2.0, 9.0], "float32": [1.0, 99.0]}) == "float32"
    assert kernel_choice._faster("decode", {"torch": [1.02, 1.5], "float32": [1.0, 1.0]}) == "torch"
    assert kernel_choice._faster("backward", {"torch": [1.0], "blocked": [3.0]}) == "torch"


@pytest.mark.slow
def test_the_stopwatch():
    state, threads = torch.get_rng_state(), torch.get_num_threads()
    assert all(choice in kernel_choice.KERNELS[kernel] for kernel, choice in kernel_choice.measure().items())
    assert torch.equal(torch.get_rng_state(), state) and torch.get_num_threads() == threads


RANKS = """
import os, sys
from nanochat import kernel_choice
from nanochat.common import compute_cleanup, compute_init
rank = int(os.environ["RANK"])
measured = []
kernel_choice.measure = lambda: measured.append(1) or {kernel: names[-1 if rank == 0 else 0] for kernel, names in kernel_choice.KERNELS.items()}
compute_init("cpu")
sys.stdout.write(f"rank {rank}: {kernel_choice.chosen('attention')} {len(measured)}\\n")  # whole lines, also where ranks write at once
compute_cleanup()
"""


@pytest.mark.slow
def test_rank_0_decides_for_all(base_dir, tmp_path):
    script = tmp_path / "ranks.py"
    script.write_text(RANKS)
    process = tiny.start(base_dir, ranks=2, script=[str(script)], NANOCHAT_KERNELS="", PYTHONPATH=str(tiny.ROOT))
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    assert sorted(line for line in out.splitlines() if line.startswith("rank")) == ["rank 0: fused 1", "rank 1: fused 0"]
    assert err.count("Kernels:") == 1


@pytest.mark.slow
def test_the_bench_runs_and_fails_when_a_choice_is_wrong(monkeypatch, capsys):
    from dev import bench_kernels
    monkeypatch.setattr(bench_kernels, "in_turns", lambda works, *args, **kwargs: {name: [work() is None or 1.0] for name, work in works.items()})
    assert bench_kernels.main(["--small", "--rounds=1"]) == 0
    assert "7 of 7 right" in capsys.readouterr().out
    monkeypatch.setattr(bench_kernels, "in_turns", lambda works, *args, **kwargs: {name: [1.2 if name == "chunked" else 1.0] for name in works})
    assert bench_kernels.main(["--small", "--rounds=1"]) == 1
    assert "6 of 7 right; 1 took over 10% longer" in capsys.readouterr().out

"""Sweeps: what a file describes, claims, and runners that die, share and go on."""
import csv
import io
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from contextlib import nullcontext
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
import yaml

from analysis import claims, progress, runner, sweep
from analysis.claims import EXPIRES, take
from analysis.progress import Display, share_done, why
from analysis.runner import Runner, Work, cpu_places, cuda_places
from analysis.study import run_trials
from analysis.sweep_config import as_wandb, check_runs, read_sweep
from analysis.trial import Trial, folder_of, read, status_of
from nanochat.checkpoint_manager import list_steps
from nanochat.cli import UsageError
from nanochat.run_log import RunLog
from scripts import base_train
from tests import fake_runs, tiny

TINY = """
[fixed]
depth = 1
aspect-ratio = 32
head-dim = 32
max-seq-len = 64
window-pattern = "L"
device-type = "cpu"
device-batch-size = 2
total-batch-size = 128
num-iterations = 12
eval-every = 6
eval-tokens = 256
"""


# -----------------------------------------------------------------------------
# Claims


def test_one_has_a_claim_until_it_is_released(tmp_path):
    first = take(tmp_path)
    assert first and take(tmp_path) is None and first.beat()
    first.release()
    second = take(tmp_path)
    assert second and second.beat() and not first.beat()
    first.release()  # that of somebody who comes back late
    assert take(tmp_path) is None and claims.holder(tmp_path).endswith(f":{os.getpid()}")


@pytest.mark.parametrize("call", ["utime", "listdir"])
def test_a_file_system_that_fails_for_a_moment_takes_no_claim_away(tmp_path, monkeypatch, call):
    def fail(*args):
        raise OSError(116, "Stale file handle")

    claim, clock = take(tmp_path), time.monotonic
    for later, held in ((EXPIRES - 60, True), (EXPIRES + 1, False)):
        with monkeypatch.context() as patch:
            patch.setattr(os, call, fail)
            patch.setattr(time, "monotonic", lambda: clock() + later)
            assert claim.beat() is held
            claim.release()
    monkeypatch.setattr(time, "monotonic", lambda: clock() + EXPIRES)
    assert claim.beat(), "nobody has taken it meanwhile"
    monkeypatch.setattr(time, "monotonic", lambda: clock() + 2 * EXPIRES - 60)
    monkeypatch.setattr(os, call, fail)
    assert claim.beat(), "it counts from the last beat"


def elsewhere(folder: Path, age: float) -> None:
    """Somebody on another machine has the claim, whose last beat is so many seconds ago."""
    claim = take(folder)
    claim.path.write_text(json.dumps({"host": "other", "pid": os.getpid(), "machine": "another kernel"}))
    now = claims._now(folder)
    os.utime(claim.path, (now - age, now - age))


def test_a_claim_without_beats_expires_by_the_clock_of_its_folder(tmp_path, monkeypatch):
    elsewhere(tmp_path, EXPIRES - 60)
    assert take(tmp_path) is None
    now = claims._now(tmp_path)
    monkeypatch.setattr(claims, "_now", lambda folder: now + 61)
    assert take(tmp_path)


def test_the_claim_of_a_dead_process_of_this_machine_is_free_at_once(tmp_path):
    program = f"from pathlib import Path; from analysis.claims import take; take(Path({str(tmp_path)!r})); print('taken', flush=True); input()"
    with subprocess.Popen([sys.executable, "-c", program], cwd=tiny.ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "taken\n" and take(tmp_path) is None
        process.kill()
        process.wait()
        assert take(tmp_path)


def test_abandoned_claims_are_taken_over_by_exactly_one(tmp_path):
    """Four processes at once, in many folders; half of the claims are new ones."""
    folders = [tmp_path / str(number) for number in range(40)]
    for folder in folders[::2]:
        elsewhere(folder, EXPIRES + 10)
    program = ("from pathlib import Path; from analysis.claims import take; input(); "
               f"print(*[n for n in range(40) if take(Path({str(tmp_path)!r}, str(n)))], flush=True); input()")  # lives on: the claims of the dead are free
    processes = [subprocess.Popen([sys.executable, "-c", program], cwd=tiny.ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) for _ in range(4)]
    for process in processes:
        process.stdin.write("\n")
        process.stdin.flush()
    taken = [int(word) for process in processes for word in process.stdout.readline().split()]
    for process in processes:
        process.communicate("\n")
    assert sorted(taken) == list(range(40))
    assert all(len(list(folder.glob("claim-*"))) == 2 - number % 2 and not list(folder.glob(".*")) for number, folder in enumerate(folders))


def test_a_claim_that_a_power_cut_has_emptied_expires(tmp_path):
    elsewhere(tmp_path, EXPIRES - 60)
    path = tmp_path / "claim-1"
    beat = path.stat().st_mtime
    path.write_bytes(b"")
    os.utime(path, (beat, beat))
    assert take(tmp_path) is None and claims.holder(tmp_path) == "?:?"
    os.utime(path, (beat - 70, beat - 70))
    assert take(tmp_path)


def test_claims_are_for_whoever_shares_the_folder(tmp_path):
    before = os.umask(0o002)
    try:
        claim = take(tmp_path)
    finally:
        os.umask(before)
    assert claim.path.stat().st_mode & 0o777 == 0o664
    (tmp_path / "claim-9.bak").touch()
    assert claim.beat(), "what else lies there is no claim"


def test_where_there_are_no_hard_links(tmp_path, monkeypatch):
    def link(*args):
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(os, "link", link)
    with pytest.raises(UsageError, match="hard link .*choose another NANOCHAT_BASE_DIR"):
        take(tmp_path)
    assert os.listdir(tmp_path) == []


# -----------------------------------------------------------------------------
# Files


def test_what_a_file_describes():
    found = read_sweep("rates.toml", """
        tag = "mine_{depth}_{seed}"
        [fixed]
        num_iterations = 10
        [grid]
        seed = [1, 2]
        [[together]]
        depth = [2, 4]
        matrix-lr = [0.2, 0.1]
        """, "--num-iterations=20 --grow-freeze --save-every 5")
    trials = found.trials({})
    assert (found.name, found.swept) == ("rates", ["seed", "depth", "matrix-lr"])
    assert [trial.name for trial in trials] == ["mine_2_1", "mine_4_1", "mine_2_2", "mine_4_2"]
    assert trials[1].arguments() == ["--num-iterations=20", "--seed=1", "--depth=4", "--matrix-lr=0.1", "--grow-freeze", "--save-every=5", "--model-tag=mine_4_1"]
    assert found.label(trials[1]) == "seed=1 depth=4 matrix-lr=0.1"


def test_texts_stay_texts():
    found = read_sweep("x.toml", GOOD, "--blimp=007 --run=1_0 --matrix-lr=1e-1")
    assert found.overrides == {"blimp": "007", "run": "1_0", "matrix-lr": 0.1}
    assert read_sweep("x.toml", GOOD, "--grow-path=1x32,2x32 --grow-at=0.5").overrides["grow-at"] == 0.5, "as in the file"


def test_runs_are_those_of_studies_with_the_same_flags():
    (trial,) = read_sweep("x.toml", "[grid]\ndepth = [4]\n").trials({})
    assert trial.name == Trial({"depth": 4}).name
    assert "--save-every=-1" in trial.arguments() and trial.name != Trial({"depth": 5}).name


def test_drawn_values():
    text = """
        [search]
        method = "random"
        runs = {}
        [search.flags]
        matrix-lr = {{min = 0.01, max = 1, log = true}}
        rank = {{min = 16, max = 64, step = 16}}
        depth = {{min = 2, max = 5}}
        block = ["prenorm", "ngpt"]
        """
    found = read_sweep("x.toml", text.format(200))
    points = [found.random_point(number) for number in range(found.runs)]
    assert {point["rank"] for point in points} == {16, 32, 48, 64} and {point["depth"] for point in points} == {2, 3, 4, 5}
    assert {point["block"] for point in points} == {"prenorm", "ngpt"}
    rates = sorted(point["matrix-lr"] for point in points)
    assert 0.01 <= rates[0] < rates[-1] <= 1 and math.isclose(rates[100], 0.1, rel_tol=0.5)
    more = read_sweep("x.toml", text.format(300))
    assert [more.random_point(number) for number in range(200)] == points


GOOD = "[grid]\ndepth = [2, 4]\n"


@pytest.mark.parametrize("text, message", [
    ("[grid\n", "sweep.toml is not TOML: .*line 1"),
    ("", "nothing varies; give a .grid."),
    ("[grids]\ndepth = [1]\n", "line 1: 'grids' means nothing here; did you mean grid?"),
    ("[fixed]\nseed = 1\n\n[grid]\ndepht = [1]\n", "line 5: base_train has no flag --depht; did you mean depth?"),
    ("[grid]\ndepth = 4\n", r"line 2: depth needs a list of values here, as in depth = \[1, 2\]"),
    ("[grid]\ndepth = []\n", "line 2: depth needs a list"),
    ("[grid]\ndepth = [2, 'x']\n", "line 2: argument --depth: 'x' is not a whole number above 0"),
    ("[grid]\nblock = ['prenorm', 'post']\n", "line 2: argument --block: invalid choice: 'post'"),
    ("[grid]\nfp8 = [true, 1]\n", "line 2: --fp8 is a switch: give true or false"),
    ("[fixed]\ndepth = true\n" + GOOD.replace("depth", "seed"), "line 2: --depth is no switch"),
    ("[fixed]\ndepth = [1]\n" + GOOD.replace("depth", "seed"), r"line 2: --depth takes a text or a number, not \[1\]"),
    ("[fixed]\ndepth = 1\n" + GOOD, r"line 4: depth is set in \[fixed\] already"),
    ("[grid]\nmodel-tag = ['a', 'b']\n", "line 2: model-tag is not for sweeps: give a `tag`"),
    ("[[together]]\ndepth = [1]\n[[together]]\nseed = [1, 2]\nrank = [1]\n", "line 3: lists of one .*equally long, not seed: 2, rank: 1"),
    ("together = 4\n", "line 1: together must be a list of tables"),
    ("ranks = 0\n" + GOOD, "line 1: ranks = 0 must be 1 or more"),
    ("ranks = true\n" + GOOD, "line 1: ranks must be a whole number"),
    ("name = 'a/b'\n" + GOOD, "line 1: name: 'a/b' is not a plain name"),
    ("tag = 'mine'\n" + GOOD, "several runs have the tag 'mine'"),
    (GOOD + "[fixed]\nblock = 'ngpt'\nweight-decay = 0.1\n", "the run with depth=2: --weight-decay=0.1 means nothing"),
    ("[search]\nmethod = 'best'\n", "line 2: method must be"),
    ("[search]\nmethod = 'random'\n[search.flags]\ndepth = [1]\n", "line 1: runs must say how many"),
    ("[search]\nmethod = 'random'\nruns = 3\n", "line 1: .search.flags. must say"),
    ("[search]\nmethod = 'random'\nruns = 3\nflags.depth = {min = 4, max = 2}\n", "line 4: depth: min must be below max"),
    ("[search]\nmethod = 'random'\nruns = 3\n[search.flags]\nmatrix-lr = {min = 0, max = 2, log = true}\n", "line 5: matrix-lr: with log = true min must be above 0"),
    ("[search]\nmethod = 'random'\nruns = 3\n[search.flags]\ndepth = {min = 1, max = 4, step = 0}\n", "line 5: depth: step must be above 0"),
    ("[search]\nmethod = 'random'\nruns = 3\n[search.flags]\nmatrix-lr = {min = 0.1, max = 1, log = 1}\n", "line 5: matrix-lr: log must be true or false"),
    ("[search]\nmethod = 'random'\nruns = 3\n[search.flags]\nmatrix-lr = {min = 0.1, max = 1, step = nan}\n", "line 5: matrix-lr: step must be above 0"),
    ("[search]\nmethod = 'random'\nruns = 3\n[search.flags]\ndepth = {min = 1, max = 4, step = 0.5}\n", "line 5: argument --depth: '1.5'"),
    ("[search]\nmethod = 'optuna'\nruns = 3\nseed = -1\n", "line 4: optuna takes seeds from 0"),
    ("[search]\nmethod = 'random'\nruns = 3\n[search.flags]\nmatrix-lr = {min = 0.1, max = 1" + "0" * 400 + "}\n", "line 5: matrix-lr must be a list of values, or"),
    ("[grid]\ndepth = [" + "9" * 5000 + "]\n", "sweep.toml is not TOML"),
    ("[grid]\ndepth = " + "[" * 5000 + "]" * 5000 + "\n", "sweep.toml is not TOML"),
    ('name = "a\\u0000b"\n' + GOOD, "line 1: name: .* is not a plain name"),
    ("[search]\nmethod = 'random'\nruns = 3\n[search.flags]\ndepth = {from = 1, to = 4}\n", "line 5: depth must be a list of values, or"),
    ("[search]\nmethod = 'random'\nruns = 3\n[search.flags]\ndepth = {min = 1.5, max = 4}\n", "line 5: argument --depth: '1.5'"),
])
def test_bad_files(text, message, tmp_path, base_dir, capsys):
    path = tmp_path / "sweep.toml"
    path.write_text(text)
    assert sweep.main([str(path)]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1
    assert re.search(message, error)
    assert not (base_dir / "base_checkpoints").exists(), "nothing has run"


@pytest.mark.parametrize("arguments, message", [
    (["nowhere.toml"], "cannot read nowhere.toml"), (["SWEEP", "--flags=depth 4"], "'depth' belongs to no flag"), (["SWEEP", "--flags=--depht=4"], "no flag --depht; did you mean depth?"),
    (["SWEEP", "--flags=--depth='4"], "no closing quotation"),
    (["SWEEP", "--flags=--depth=x"], "'x' is not a whole number"), (["SWEEP", "--export", "ray", "x.yaml"], "--export=ray is unknown"), (["SWEEP", "--submit=2"], "give the flag device-type under .fixed."),
])
def test_bad_commands(arguments, message, tmp_path, base_dir, capsys):
    path = tmp_path / "sweep.toml"
    path.write_text(GOOD)
    assert sweep.main([str(path) if word == "SWEEP" else word for word in arguments]) == 2
    assert re.search(message, capsys.readouterr().err)


@pytest.mark.parametrize("path", sorted((tiny.ROOT / "analysis" / "sweeps").rglob("*.toml")), ids=lambda path: path.stem)
def test_the_files_that_come_along(path):
    text = path.read_text()
    for size in (text, re.sub(r"= .*# 9M: ", "= ", text)):  # the files of dials/ are of two sizes
        found = read_sweep(path.name, size)
        check_runs(found, found.trials({flag: values.ends()[0] for flag, values in found.search.items()}))


@pytest.mark.slow
def test_wandb_does_the_same_runs(tmp_path, capsys):
    """Its agents get a command that base_train understands."""
    utils = pytest.importorskip("wandb.sdk.launch.sweeps.utils")
    path, out = tmp_path / "rates.toml", tmp_path / "rates.yaml"
    path.write_text("[fixed]\nnum-iterations = 10\ngrow-freeze = true\n[grid]\nseed = [1]\n[search]\nmethod = 'optuna'\nruns = 7\n[search.flags]\n"
                    "matrix-lr = {min = 0.1, max = 1, log = true}\ndepth = {min = 2, max = 4}\nrank = {min = 10, max = 40, step = 8}\nblock = ['prenorm', 'ngpt']\n")
    assert sweep.main([str(path), "--export=wandb", str(out)]) == 0
    written = yaml.safe_load(out.read_text())
    assert (written["method"], written["run_cap"], written["metric"]) == ("bayes", 7, {"name": "val/bpb", "goal": "minimize"})
    assert "device-type" not in written["parameters"], "its agents' own, as of the sweep's runners"
    assert written["parameters"]["seed"] == {"values": [1]} and written["parameters"]["matrix-lr"] == {"distribution": "log_uniform_values", "min": 0.1, "max": 1}
    assert written["parameters"]["depth"]["distribution"] == "int_uniform" and written["parameters"]["rank"] == {"values": [10, 18, 26, 34]}
    drawn = {flag: {"value": entry["value"] if "value" in entry else entry["values"][0] if "values" in entry else entry["min"]} for flag, entry in written["parameters"].items()}
    words = utils.create_sweep_command_args({"args": drawn})["args_no_boolean_flags"]
    settings = base_train.parse(words)
    assert (settings.num_iterations, settings.grow_freeze, settings.seed, settings.depth, settings.run) == (10, True, 1, 2, "rates")
    with pytest.raises(UsageError, match="wandb cannot run each point of a .search. with every value of seed"):
        as_wandb(read_sweep("x.toml", path.read_text().replace("seed = [1]", "seed = [1, 2]")))
    with pytest.raises(UsageError, match="10,001 steps"):
        as_wandb(read_sweep("x.toml", "[search]\nmethod = 'random'\nruns = 1\n[search.flags]\nseed = {min = 0, max = 10000, step = 1}\n"))
    assert "torch.distributed.run --standalone --nproc_per_node=2 -m scripts.base_train" in str(as_wandb(read_sweep("x.toml", "ranks = 2\n[grid]\nseed = [1, 2]\n"))["command"])
    assert "save-every" not in as_wandb(read_sweep("x.toml", "tag = 'mine_{seed}'\n[grid]\nseed = [1, 2]\n"))["parameters"], "these runs keep what they make"


def test_wandb_gets_what_changes_together_as_lists_of_flags(tmp_path):
    """Through the shell that its agent starts, with a program in Python's place that says what it was asked for."""
    utils = pytest.importorskip("wandb.sdk.launch.sweeps.utils")
    text = ("[fixed]\nnum-iterations = 10\n[[together]]\ndepth = [2, 4]\ngrow-freeze = [true, false]\nnli = [\"it's $HOME\", 'b']\n"
            "[[together]]\nrank = [0, 8]\nseed = [1, 2]\n[[together]]\naspect-ratio = [32, 16]\nhead-dim = [8, 16]\n")
    written = as_wandb(read_sweep("x.toml", text, "--seed=7 --aspect-ratio=64 --head-dim=32"))
    parameters = written["parameters"]
    assert parameters["rank"] == {"values": [0, 8]} and parameters["seed"] == {"value": 7} and [name for name in parameters if "together" in name] == ["together-1"]
    echo = tmp_path / "echo"
    echo.write_text("#!/bin/bash\nprintf '%s\\n' \"$@\"\n")
    echo.chmod(0o755)
    said = []
    for number in (0, 1):
        words = utils.create_sweep_command_args({"args": {name: {"value": entry.get("value", entry.get("values", [None] * 2)[number])} for name, entry in parameters.items()}})
        shell = written["command"][written["command"].index("-c") + 1]
        done = subprocess.run(["bash", "-c", shell, str(echo), *words["args_no_boolean_flags"]], capture_output=True, text=True, check=True, env={**os.environ, "WANDB_RUN_ID": "abc"})
        said.append(done.stdout.splitlines())
    assert said[0][:3] == ["-m", "scripts.base_train", "--model-tag=wandb-abc"] and "together" not in str(said)
    one, other = (base_train.parse([word for word in words[2:] if not word.startswith("--nli")]) for words in said)
    assert (one.depth, one.grow_freeze, one.rank, one.seed, one.head_dim) == (2, True, 0, 7, 32) and (other.depth, other.grow_freeze, other.rank, other.seed) == (4, False, 8, 7)
    assert "--nli=it's $HOME" in said[0] and "--nli=b" in said[1]


# -----------------------------------------------------------------------------
# A runner, with runs that take no time


@pytest.fixture
def fake(monkeypatch, base_dir):
    monkeypatch.setattr(runner, "train", fake_runs.train)
    return str(base_dir)


def states(base_dir, trials, **options) -> list[str]:
    found = Runner(base_dir, Work(trials), cpu_places(2), **options)
    found.run(lambda _: None)
    return [found.state(trial) for trial in trials]


def test_runs_that_die_stop_no_others_and_are_tried_again_only_when_asked(fake):
    trials = [Trial({"seed": seed}) for seed in (fake_runs.RAISES, fake_runs.KILLED, fake_runs.REFUSED, 9)]
    assert states(fake, trials) == states(fake, trials) == ["failed", "failed", "failed", "done"]
    assert [status_of(fake, trial) for trial in trials] == [1, -9, 2, 0]
    assert [fake_runs.times(fake, trial) for trial in trials] == [1, 1, 1, 1]
    reasons = [why(fake, trial, status_of(fake, trial)) for trial in trials[:3]]
    assert "exit status 1, RuntimeError: what it died of" in reasons[0] and "signal 9, begun" in reasons[1] and "error: the loss of step 1 is nan" in reasons[2]
    assert states(fake, trials, again=True) == ["failed", "failed", "failed", "done"]
    assert [fake_runs.times(fake, trial) for trial in trials] == [2, 2, 2, 1]


def test_a_run_whose_claim_was_taken_over_is_ended(fake, monkeypatch):
    monkeypatch.setattr(runner, "BEAT", 0.0)
    trial = Trial({"seed": fake_runs.FOR_EVER})
    folder = folder_of(fake, trial)

    def tell(found):
        if found.running and (folder / "log.jsonl").exists():
            (folder / "claim-1").rename(folder / "claim-2")

    found = Runner(fake, Work([trial]), cpu_places(1), wait=False)
    found.run(tell)
    assert found.state(trial) == "elsewhere" and not (folder / "done.json").exists() and not found.running


def test_of_a_branch_the_share_is_of_what_it_adds(tmp_path):
    log = tmp_path / "log.jsonl"
    for step, share in ((0, 0.9), (640, 0.5)):
        log.write_text(json.dumps({"kind": "start", "step": step, "conditions": {"flops": 100}}) + "\n" + json.dumps({"kind": "train", "step": step, "flops": 80}) + "\n")
        assert share_done(log, {"flops": 90}) == share


def test_what_others_have_is_left_to_them(fake):
    trials = [Trial({"seed": 8}), Trial({"seed": 9})]
    elsewhere(folder_of(fake, trials[0]), 0)
    assert states(fake, trials, wait=False) == ["elsewhere", "done"]
    assert not (folder_of(fake, trials[0]) / "out.txt").exists()


def test_a_folder_in_which_somebody_trains_is_not_even_claimed(fake):
    """A claim would take it from the runner that has it, if that only sleeps."""
    trials = [Trial({"seed": 8}), Trial({"seed": 9})]
    folder = folder_of(fake, trials[0])
    program = f"from nanochat.files import locked; lock = locked({str(folder)!r}); lock.__enter__(); print('locked', flush=True); input()"
    with subprocess.Popen([sys.executable, "-c", program], cwd=tiny.ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "locked\n"
        assert states(fake, trials, wait=False) == ["elsewhere", "done"] and not folder.exists()
        process.communicate("\n")
    assert states(fake, trials) == ["done", "done"]


def test_a_full_disk_ends_no_run_that_goes_on(fake, monkeypatch):
    """Claims and results fail for a while, and are tried again; with nothing else to wait for, it is an error."""
    found = Runner(fake, Work([Trial({"seed": seed}) for seed in (8, 9, 10)]), cpu_places(2))
    left = {"take": 4, "write_text_atomic": 3}

    def failing(name):
        function = getattr(runner, name)

        def maybe(*args):
            if left[name] and (found.running if name == "take" else any(other.process.exitcode is None for other in found.running.values())):
                left[name] -= 1
                raise OSError(28, "No space left on device")
            return function(*args)
        return maybe

    with monkeypatch.context() as for_a_while:
        for name in left:  # the latter writes done.json
            for_a_while.setattr(runner, name, failing(name))
        found.run(lambda _: None)
    assert [found.state(trial) for trial in found.work.trials] == ["done"] * 3 and left["take"] < 4
    for name in left:
        with monkeypatch.context() as for_ever:
            for_ever.setattr(runner, name, lambda *args: os.stat("/nowhere"))
            with pytest.raises(FileNotFoundError):
                states(fake, [Trial({"seed": seed}) for seed in (11, 12)])


@pytest.mark.parametrize("damage, says", [(lambda text: text.replace('{"kind', "{kind", 1), "line 1 is not a log record"),
                                          (lambda text: "".join(line for line in text.splitlines(True) if '"eval", "step": 1' not in line), "the last validation is missing")])
def test_a_damaged_log_costs_its_own_numbers_only(fake, damage, says, capsys):
    trials = [Trial({"seed": seed}) for seed in (8, 9)]
    log = folder_of(fake, trials[0]) / "log.jsonl"
    done = Runner(fake, Work(trials), cpu_places(2))
    display = Display("runs")

    def tell(found):
        if found.state(trials[0]) == "done" != display.known.get(trials[0].name):
            log.write_text(damage(log.read_text()))
        display.show(found)

    done.run(tell)
    assert [done.state(trial) for trial in trials] == ["done", "done"] and says in capsys.readouterr().err
    with pytest.raises(UsageError, match=f"the log in .*{trials[0].name} is damaged .*{says}.*; delete that folder"):
        run_trials(fake, trials)
    shutil.rmtree(log.parent)
    assert [result.final for result in run_trials(fake, trials)] == [2.0, 2.0]


def test_the_end_is_not_before_the_last_run_s(tmp_path, monkeypatch):
    """Eight places, and one run with an hour to go."""
    going = SimpleNamespace(trial=Trial({}), started=time.monotonic() - 3600)
    found = SimpleNamespace(seconds=[7200.0], running={"x": going}, base_dir=str(tmp_path), work=Work([Trial({})]), state=lambda _: "running", places=8)
    display = Display("runs")
    for share, left in ((0.0, 7200), (0.5, 3600)):
        monkeypatch.setattr(progress, "share_done", lambda *_: share)
        assert display.eta(found) == pytest.approx(left, rel=1e-3)


def test_a_resumed_run_s_end_is_told_by_what_it_does_now(tmp_path, monkeypatch):
    """Begun with its log's 0.9, of which the checkpoint had 0.8; in ten minutes it came to 0.85."""
    found = SimpleNamespace(seconds=[], running={"x": SimpleNamespace(trial=Trial({}), started=time.monotonic() - 600)}, base_dir=str(tmp_path), work=Work([Trial({})]),
                            state=lambda _: "running", places=1)
    display = Display("runs")
    for share, left in ((0.9, 0), (0.8, 0), (0.85, 1800)):
        monkeypatch.setattr(progress, "share_done", lambda *_: share)
        assert display.eta(found) == pytest.approx(left, rel=1e-3)


def test_a_run_with_a_name_of_its_own_may_have_been_done_by_hand(fake):
    trial = Trial({"seed": 9}, tag="mine")
    folder_of(fake, trial).mkdir(parents=True)
    (folder_of(fake, trial) / "log.jsonl").write_text('{"kind": "start", "step": 0}\n{"kind": "end", "step": 1}\n')
    assert states(fake, [trial]) == ["done"] and not (folder_of(fake, trial) / "out.txt").exists()
    log = folder_of(fake, trial) / "log.jsonl"
    log.write_text(log.read_text().replace('"step": 0', '"step": 0, "config": {"seed": 9, "matrix_lr": 0.02}', 1))
    assert states(fake, [Trial({"seed": "9", "matrix-lr": 2e-2}, tag="mine")]) == ["done"]
    with pytest.raises(UsageError, match="mine was trained with another --seed"):
        states(fake, [Trial({"matrix-lr": 0.02, "seed": 8}, tag="mine")])


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_what_is_said(fake, monkeypatch, capsys):
    """A line for a run that ended, and on a terminal how far the others are."""
    trials = [Trial({"seed": 9}), Trial({"seed": fake_runs.FOR_EVER})]

    def show():
        display = Display("runs", lambda trial: f"seed={trial.flags['seed']}")

        def tell(found):
            display.show(found)
            if found.state(trials[0]) == "done" and (folder_of(fake, trials[1]) / "log.jsonl").exists() and display.eta(found):
                os.kill(os.getpid(), signal.SIGINT)

        with pytest.raises(KeyboardInterrupt):
            Runner(fake, Work(trials), cpu_places(2)).run(tell)

    show()
    lines = capsys.readouterr().err.splitlines()
    assert "seed=9: done, 2.0000 bits per byte" in lines and not any("\033" in line for line in lines)
    shutil.rmtree(folder_of(fake, trials[0]))
    monkeypatch.setattr(sys, "stderr", Terminal())
    show()
    drawn = sys.stderr.getvalue()
    assert "seed=9: done" in drawn and "  seed=4 | 25% | loss 2.5000 | " in drawn and "2 runs: 1 done, 1 running" in drawn and "\033[3A" in drawn
    assert not (folder_of(fake, trials[1]) / "done.json").exists(), "as if it had never run"


@pytest.mark.parametrize("content", ["", "{}", "[]", '{"status": "bad", "flags": {}}', '{"status": 0}'])
def test_a_damaged_end_is_said_in_a_line(fake, content):
    trial = Trial({"seed": 9}, tag="mine")
    assert states(fake, [trial]) == ["done"]
    (folder_of(fake, trial) / "done.json").write_text(content)
    with pytest.raises(UsageError, match="done.json is damaged .*delete that folder"):
        status_of(fake, trial)


def test_other_files_beside_the_weights(fake):
    trial = Trial({"seed": 9})
    folder_of(fake, trial).mkdir(parents=True)
    for name in ("model_best.pt", "weights.pt", "model_000004.pt"):
        (folder_of(fake, trial) / name).touch()
    assert list_steps(folder_of(fake, trial)) == [4] and states(fake, [trial]) == ["done"]
    assert sorted(path.name for path in folder_of(fake, trial).glob("*.pt")) == ["model_best.pt", "weights.pt"]


def test_runs_of_other_text_are_not_taken_for_these(fake, tmp_path, capsys):
    """What lies in the base directory may have been replaced since."""
    trial = Trial({"seed": 9, "device-type": "cpu"})
    assert states(fake, [trial]) == ["done"] and read(fake, trial)
    log = folder_of(fake, trial) / "log.jsonl"
    log.write_text(log.read_text().replace('"conditions": {', '"conditions": {"data": "stdlib", "tokenizer": "one", ', 1))
    assert read(fake, trial), "where there is no text one can still look at results"
    shards = Path(fake, "base_data_climbmix")
    shards.mkdir()
    (shards / "source.json").write_text('{"source": "stdlib"}')
    assert read(fake, trial)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("analysis.trial.COMPUTE_DTYPE", "another")
        assert read(fake, trial), "the log does not tell"
        whole = log.read_text()
        for here, device, refused in (("cpu", "cuda:0", False), ("cpu", "cpu", True), ("cuda", "cpu", True), ("cuda", "cuda:1", True)):
            log.write_text(whole.replace('"conditions": {', f'"device": "{device}", "dtype": "torch.float64", "conditions": {{', 1))
            patch.setattr("analysis.trial.default_device", lambda: here)
            with pytest.raises(UsageError, match="computed in torch.float64, and this machine would in another; say NANOCHAT_DTYPE=float64") if refused else nullcontext():
                read(fake, trial)
    log.write_text(whole)
    (shards / "source.json").write_text('{"source": "tinystories"}')
    for ask in (lambda: read(fake, trial), lambda: run_trials(str(fake), [trial])):
        with pytest.raises(UsageError, match=r"other text \(stdlib\) than is in NANOCHAT_BASE_DIR now"):
            ask()
    path = tmp_path / "seeds.toml"
    path.write_text("[grid]\nseed = [9, 10]\n")
    assert sweep.main([str(path)]) == 2 and "other text" in capsys.readouterr().err
    assert not folder_of(fake, Trial({"seed": 10, "device-type": "cpu"})).exists(), "nothing has begun"


@pytest.mark.parametrize("error, says", [(OSError("AF_UNIX path too long"), "AF_UNIX path too long"), (EOFError(), "no more processes")])
def test_where_no_process_can_be_started(fake, monkeypatch, error, says):
    def start(self):
        raise error

    trial = Trial({"seed": 9})
    with monkeypatch.context() as patch:
        patch.setattr("multiprocessing.context.ForkServerProcess.start", start)
        with pytest.raises(UsageError, match=f"cannot start the process of a run .*{says}.*TMPDIR"):
            states(fake, [trial])
    assert states(fake, [trial]) == ["done"], "its claim is free"


def test_a_process_that_cannot_be_started_ends_none_that_goes_on_and_is_not_tried_at_every_look(fake, monkeypatch):
    trials = [Trial({"seed": fake_runs.FOR_EVER}), *(Trial({"seed": seed}) for seed in range(9, 12))]
    started, tries, looks = ForkServerProcess.start, [], []

    def start(self):
        tries.append(self)
        if len(tries) > 1:
            raise OSError("no more processes")
        started(self)

    def tell(found):
        looks.append(len(tries))
        if len(looks) > 5 and (folder_of(fake, trials[0]) / "log.jsonl").exists():
            os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(ForkServerProcess, "start", start)
    with pytest.raises(KeyboardInterrupt):
        Runner(fake, Work(trials), cpu_places(2)).run(tell)
    assert len(tries) == 2 and len(list(Path(fake).glob("base_checkpoints/*/claim-*"))) == 2


def test_a_status_that_cannot_be_read_for_a_moment_ends_no_run_that_goes_on(fake, monkeypatch):
    trials = [Trial({"seed": seed}) for seed in (8, 9, 10)]
    real, failed = runner.status_of, []

    def status(base_dir, trial):
        if found.running and len(failed) < 3:
            failed.append(trial)
            raise OSError(5, "Input/output error")
        return real(base_dir, trial)

    monkeypatch.setattr(runner, "status_of", status)
    found = Runner(fake, Work(trials), cpu_places(2))
    found.run(lambda found: None)
    assert [found.state(trial) for trial in trials] == ["done"] * 3 and len(failed) == 3


def test_a_log_whose_last_loss_is_no_number(fake):
    """Of a time when a run that its last step had broken ended well."""
    trial = Trial({"seed": 9, "device-type": "cpu"})
    assert states(fake, [trial]) == ["done"]
    log = folder_of(fake, trial) / "log.jsonl"
    log.write_text(log.read_text().replace('"val_bpb": 2.0', '"val_bpb": null'))
    assert read(fake, trial).final == math.inf and "final_bpb" not in sweep.measures(fake, trial)


def test_gpus_are_dealt_out(monkeypatch):
    devices = lambda places: [place.environment["CUDA_VISIBLE_DEVICES"] for place in places]
    assert devices(cuda_places(["0", "1", "GPU-a"])) == ["0", "1", "GPU-a"]
    assert devices(cuda_places(["0", "1", "2", "3", "4"], ranks=2)) == ["0,1", "2,3"]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,5,7")
    found = read_sweep("x.toml", "ranks = 1\n[fixed]\ndevice-type = 'cuda'\n[grid]\ndepth = [1]\n")
    assert sweep.device_of(found) == "cuda" and devices(runner.places_for("cuda", 2)) == ["3", "5"]
    with pytest.raises(UsageError, match="needs 4 GPUs with CUDA, and 3 are to be seen"):
        runner.places_for("cuda", None, ranks=4)


def test_cores_are_dealt_out(monkeypatch):
    monkeypatch.setattr(runner, "usable_cpus", lambda: 8)
    places = lambda *args: (lambda found: (len(found), found[0].environment["OMP_NUM_THREADS"], found[0].ranks))(runner.places_for("cpu", *args))
    assert places(2) == (2, "1", 1), "studies: one thread, whatever the machine"
    assert places(2, 1, 0) == (2, "4", 1) and places(None, 2, 2) == (2, "2", 2) and places(None, 1, 0) == (8, "1", 1)


def test_table_and_picture(fake, tmp_path, capsys):
    path = tmp_path / "seeds.toml"
    path.write_text(f"[grid]\nseed = [{fake_runs.KILLED}, 9]\nmatrix-lr = [2, 4]\n")
    assert sweep.main([str(path), "--list"]) == 0
    assert [row["status"] for row in rows(fake, "seeds")] == ["waiting"] * 4
    assert sweep.main([str(path), f"--plot={tmp_path / 'seeds.png'}"]) == 1
    found = rows(fake, "seeds")
    assert [(row["seed"], row["matrix-lr"], row["status"], row["final_bpb"], row["min_bpb"]) for row in found] == [
        ("2", "2", "signal 9", "3.0", "3.0"), ("2", "4", "signal 9", "3.0", "3.0"), ("9", "2", "done", "2.0", "2.0"), ("9", "4", "done", "4.0", "3.0")]
    assert [found[2][name] for name in ("flops", "tokens", "seconds", "params", "peak_memory_mib")] == ["25", "10", "1.0", "7", "5.0"]
    assert (tmp_path / "seeds.png").read_bytes().startswith(b"\x89PNG")
    out = capsys.readouterr().out
    assert out.count("failed: seed=2") == 2 and "signal 9" in out
    assert sweep.main([str(path), "--retry"]) == 1
    assert [fake_runs.times(fake, Trial({"device-type": "cpu", "seed": seed, "matrix-lr": 2})) for seed in (fake_runs.KILLED, 9)] == [2, 1]


def test_what_is_kept_of_a_file_can_be_read_again(fake, tmp_path, capsys):
    """By the runners of a Slurm array; a name may stand below comments, and other tables may have names."""
    for number, head in enumerate(('# of rates\nname = "mine"\n', '# name = "x"\n')):
        path = tmp_path / f"file{number}.toml"
        path.write_text(head + '[grid]\nseed = [8, 9]\n[slurm]\nname = "job"\n')
        assert sweep.main([str(path), "--list"]) == 0
        name = ("mine", "file1")[number]
        kept = (Path(fake) / "sweeps" / name / "config.toml").read_text()
        assert read_sweep("config.toml", kept).name == name


def test_evaluations_of_whole_sets_are_columns(fake, tmp_path):
    path = tmp_path / "tasks.toml"
    path.write_text("[grid]\nseed = [8, 9]\n")
    assert sweep.main([str(path)]) == 0 and "blimp/pairs" not in rows(fake, "tasks")[0]
    path.write_text("[fixed]\neval-tasks = 'blimp'\n[grid]\nseed = [8, 9]\n")
    assert sweep.main([str(path)]) == 0
    assert [(row["seed"], row["blimp/pairs"], row["core"]) for row in rows(fake, "tasks")] == [("8", "0.625", "0.25"), ("9", "0.625", "0.25")]
    assert not any("field" in name for name in rows(fake, "tasks")[0])


def test_a_damaged_file_ends_no_run_that_goes_on(fake, tmp_path, monkeypatch, capsys):
    """It is told when there is nothing else to do."""
    path = tmp_path / "mine.toml"
    path.write_text("[grid]\nseed = [8, 9, 10]\n")
    trials = [Trial({"seed": seed, "device-type": "cpu"}) for seed in (8, 9, 10)]
    real, damaged = sweep.Table.write, []

    def write(table):
        done = folder_of(fake, trials[0]) / "done.json"
        if done.exists() and not damaged:
            damaged.append(done)
            done.write_text("{")
        return real(table)

    monkeypatch.setattr(sweep.Table, "write", write)
    assert sweep.main([str(path), "--jobs=1"]) == 2
    assert "done.json is damaged" in capsys.readouterr().err.splitlines()[-1] and [status_of(fake, trial) for trial in trials[1:]] == [0, 0]


def test_wandb_s_name_of_the_runs_is_no_column(fake, tmp_path):
    path = tmp_path / "named.toml"
    path.write_text("[grid]\nseed = [8, 9]\n")
    assert sweep.main([str(path), "--flags=--run=mine"]) == 0
    assert all(row["run"].startswith("trial-") for row in rows(fake, "named-*"))


def test_a_growing_run_has_the_size_of_its_last_model(fake, tmp_path):
    path = tmp_path / "sizes.toml"
    path.write_text("[grid]\nseed = [8]\n[fixed]\nnum-iterations = 10\n[[together]]\ngrow-path = ['', '2x128,4x256']\ndepth = [4, 4]\naspect-ratio = [64, 64]\n")
    assert sweep.main([str(path)]) == 0
    assert [row["params"] for row in rows(fake, "sizes")] == ["7", "9"]
    assert run_trials(fake, [Trial({"seed": 8, "grow-path": "2x128,4x256"})])[0].params == 9


def test_objectives_are_not_drawn_as_rivals(tmp_path, monkeypatch):
    lines = []
    monkeypatch.setattr("matplotlib.axes.Axes.plot", lambda axes, x, y, *args, **style: lines.append((list(x), list(y), style.get("label"))))
    monkeypatch.setattr("matplotlib.axes.Axes.legend", lambda axes, **style: None)
    found = read_sweep("x.toml", "[grid]\nseed = [1, 2]\n[[together]]\nobjective = ['next-token', 'mlm']\neval-tasks = ['bpb', 'pll']\n")
    rows = [{"status": "done", "seed": seed, "objective": objective, "eval-tasks": "", "final_bpb": loss}
            for objective, losses in (("next-token", (1.5, 1.25)), ("mlm", (2.0, 3.0))) for seed, loss in zip((1, 2), losses)]
    sweep.draw(found, rows, tmp_path / "x.png")
    assert [line for line in lines if line[2]] == [([1, 2], [1.5, 1.25], "next-token"), ([1, 2], [2.0, 3.0], "mlm")] and len(lines) == 4, "one panel"


def test_values_that_change_together_are_one_panel_and_of_seeds_the_mean_counts(tmp_path, monkeypatch):
    """The best by a single seed is not the best."""
    lines, ticks = [], []
    monkeypatch.setattr("matplotlib.axes.Axes.plot", lambda axes, x, y, *args, **style: lines.append((list(x), list(y))))
    monkeypatch.setattr("matplotlib.axes.Axes.set_xticks", lambda axes, places, labels=None, **_: ticks.append((list(places), labels)))
    found = read_sweep("x.toml", "[grid]\nseed = [1, 2]\nmatrix-lr = [0.5, 0.25]\n[[together]]\ndepth = [4, 16]\naspect-ratio = [32, 4]\nhead-dim = [8, 8]\n")
    losses = {(4, 0.25): (1.0, 3.0), (4, 0.5): (1.5, 1.75), (16, 0.25): (2.0, 2.0), (16, 0.5): (4.0, 4.0)}
    rows = [{"status": "done", "seed": seed, "matrix-lr": rate, "depth": depth, "aspect-ratio": {4: 32, 16: 4}[depth], "head-dim": 8, "final_bpb": losses[depth, rate][seed - 1]}
            for seed in (1, 2) for rate in (0.5, 0.25) for depth in (4, 16)]
    sweep.draw(found, rows, tmp_path / "x.png")
    assert lines[1] == ([0.25, 0.5], [2.0, 1.625]) and lines[3] == ([0, 1], [1.625, 2.0]) and len(lines) == 4
    assert ([0, 1], ["4\n32", "16\n4"]) in ticks


def test_a_value_of_which_a_seed_failed_has_no_mean(tmp_path, monkeypatch):
    """0.5 is the best by the one seed that survived, and of 1.0 nobody knows yet."""
    lines = []
    monkeypatch.setattr("matplotlib.axes.Axes.plot", lambda axes, x, y, *args, **style: lines.append((list(x), list(y), style.get("label"))))
    monkeypatch.setattr("matplotlib.axes.Axes.legend", lambda axes, **style: None)
    found = read_sweep("x.toml", "[grid]\nseed = [1, 2]\nmatrix-lr = [0.25, 0.5, 1.0]\n")
    of = lambda seed, rate, loss, status="done": {"status": status, "seed": seed, "matrix-lr": rate, "final_bpb": loss}
    rows = [of(1, 0.25, 2.0), of(2, 0.25, 2.5), of(1, 0.5, 1.0), of(2, 0.5, 3.0, "exit 2"), of(1, 1.0, 1.5), of(2, 1.0, 1.5, "unfinished")]
    sweep.draw(found, rows, tmp_path / "x.png")
    dots, means, crosses = lines
    assert sorted(zip(*dots[:2])) == [(0.25, 2.0), (0.25, 2.5), (0.5, 1.0), (1.0, 1.5)] and means[:2] == ([0.25], [2.25]) and crosses[0] == [0.5] and crosses[2] == "runs failed"
    rows[3] = of(2, 0.5, None)  # its last step has broken the weights
    sweep.draw(found, rows, tmp_path / "x.png")
    assert lines[3:] == lines[:3]


def rows(base_dir, name: str) -> list[dict]:
    """name: may be a pattern, of one."""
    (table,) = Path(base_dir, "sweeps").glob(f"{name}/results.csv")
    return list(csv.DictReader(table.open()))


def test_optuna_proposes_and_two_runners_share_its_points(fake, tmp_path):
    pytest.importorskip("optuna")
    text = """
        [grid]
        seed = [8, 9]
        [search]
        method = "optuna"
        runs = {}
        [search.flags]
        matrix-lr = {{min = 1.0, max = 3.0}}
        depth = {{min = 2, max = 8}}
        block = ["prenorm"]
        """
    path = tmp_path / "best.toml"
    path.write_text(text.format(12))
    found = read_sweep("best.toml", text.format(12))
    found.fixed["device-type"] = "cpu"
    first, second = (sweep.Search(found, fake, sweep.folder_of_sweep(fake, found)) for _ in range(2))
    assert first.more() and second.more() and first.points == second.points and len(first.trials) == 2, "the second takes up what the first proposed"
    assert sweep.main([str(path)]) == 0
    before = rows(fake, "best")
    assert len(before) == 24 and all(row["status"] == "done" for row in before)
    assert min(float(row["final_bpb"]) for row in before[20:]) < 2, "it has learned where it is best"
    path.write_text(text.format(13))
    assert sweep.main([str(path)]) == 0
    assert rows(fake, "best")[:24] == before and len(rows(fake, "best")) == 26


def test_points_that_are_no_runs_are_left_out_and_said(fake, tmp_path, capsys):
    """Their values go well one by one: a normalized model takes no weight decay."""
    pytest.importorskip("optuna")
    path = tmp_path / "both.toml"
    drawn = [("ngpt", 0.1), ("prenorm", 0.1), ("ngpt", 0.0), ("ngpt", 0.2), ("prenorm", 0.3)]
    for number, (block, decay) in enumerate(drawn):  # the last one is optuna's to propose
        claims.create_once(Path(fake, "sweeps", "both", "points", f"{number:05d}.json"), json.dumps({"block": block, "weight-decay": decay}))
    path.write_text("[fixed]\ndevice-type = 'cpu'\nseed = 9\n[search]\nmethod = 'optuna'\nruns = 6\n"
                    "[search.flags]\nblock = ['ngpt', 'prenorm']\nweight-decay = {min = 0.0, max = 0.3}\n")
    assert sweep.main([str(path), "--jobs=1"]) == 0
    out = capsys.readouterr().out
    points = [json.loads(found.read_text()) for found in sorted(Path(fake, "sweeps", "both", "points").iterdir())]
    refused = [number for number, point in enumerate(points) if point["block"] == "ngpt" and point["weight-decay"]]
    assert len(points) == 6 and {0, 3} <= set(refused) <= {0, 3, 5} and len(rows(fake, "both")) == 6 - len(refused)
    assert [f"not run: point {number}: both, the run with block=ngpt" in out for number in range(6)] == [number in refused for number in range(6)]
    assert sweep.main([str(path), "--list"]) == 0, "it can be looked at and gone on with"


def test_optuna_s_steps_may_have_many_digits(fake):
    pytest.importorskip("optuna")
    found = read_sweep("steps.toml", "[search]\nmethod = 'optuna'\nruns = 4\n[search.flags]\nmatrix-lr = {min = 0.10001, max = 0.2, step = 0.00333}\n")
    search = sweep.Search(found, fake, sweep.folder_of_sweep(fake, found))
    assert all(search.more() for _ in range(4)) and not search.more()
    assert [sweep.Search(found, fake, sweep.folder_of_sweep(fake, found)).points] == [search.points]
    (search.folder / "00001.json").write_text("")
    with pytest.raises(UsageError, match="00001.json is damaged .*; delete it"):
        sweep.Search(found, fake, sweep.folder_of_sweep(fake, found))


def test_optuna_keeps_away_from_where_runs_diverge(fake):
    """All rates above 1, which are most of those that it may draw, and where it would find the best if a run only ended there."""
    pytest.importorskip("optuna")
    found = read_sweep("far.toml", "[search]\nmethod = 'optuna'\nruns = 30\n[search.flags]\nmatrix-lr = {min = 0.0, max = 3.0}\n")
    search = sweep.Search(found, fake, sweep.folder_of_sweep(fake, found))
    for number in range(found.runs):
        assert search.more()
        folder, rate = folder_of(fake, search.trials[number]), search.points[number]["matrix-lr"]
        folder.mkdir(parents=True, exist_ok=True)
        log = RunLog(folder / "log.jsonl")
        log.log("start", 0, counts={"total": 7})
        log.log("eval", 1, val_bpb=3 - rate, flops=100, time=2.0)
        log.log("end", 1)
        log.close()
        (folder / "out.txt").write_text("error: training diverged\n")
        (folder / "done.json").write_text(json.dumps({"status": 2 if rate > 1 else 0, "flags": {}}))
    later = [point["matrix-lr"] for point in search.points[10:]]
    assert sum(rate > 1.1 for rate in later) <= 9, "6; 13 where it is told nothing of them"


def test_points_are_for_the_runs_that_they_were_proposed_for(fake, tmp_path, capsys):
    pytest.importorskip("optuna")
    path, text = tmp_path / "mine.toml", "{}\n[grid]\nseed = [{}]\n[search]\nmethod = 'optuna'\nruns = {}\n[search.flags]\nmatrix-lr = {{min = 1.0, max = 3.0}}\n"
    path.write_text(text.format("", "8", 1))
    assert sweep.main([str(path)]) == 0
    before = rows(fake, "mine")
    capsys.readouterr()
    for fixed, seeds, differs in (("[fixed]\ndepth = 2", "8", "depth"), ("", "8, 9", "seed")):
        path.write_text(text.format(fixed, seeds, 1))
        assert sweep.main([str(path)]) == 2
        error = capsys.readouterr().err
        assert f"other values of {differs}; give this sweep another name" in error and error.count("\n") == 1 and rows(fake, "mine") == before
    path.write_text(text.format("", "8", 1))
    assert sweep.main([str(path), "--flags=--depth=2"]) == 0 and rows(fake, "mine") == before, "another sweep, in a folder of its own"
    assert [row["depth"] for row in rows(fake, "mine-*")] == ["2"]
    path.write_text(text.format("", "8", 2))
    assert sweep.main([str(path)]) == 0 and rows(fake, "mine")[:1] == before
    for depths in ([1, 2], [2, 1]):  # the same values, and other runs
        found = read_sweep("x.toml", text.format(f"[[together]]\nrank = [4, 8]\ndepth = {depths}", "8", 1))
        with nullcontext() if depths == [1, 2] else pytest.raises(UsageError, match="other combinations of these values; give"):
            sweep.Search(found, fake, sweep.folder_of_sweep(fake, found)).more()


@pytest.mark.slow
@pytest.mark.parametrize("asked, got", [(None, "0"), ("1", "1")])
def test_runs_that_are_compared_are_all_compiled_or_none(tmp_path, monkeypatch, asked, got):
    """base_train itself would decide it for each by its length and the machine's load."""
    monkeypatch.delenv("TORCHDYNAMO_DISABLE")
    if asked:
        monkeypatch.setenv("TORCHDYNAMO_DISABLE", asked)
    code = """
import os, sys
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from analysis import runner
from scripts import base_train
base_train.main = lambda arguments: print("disabled:", os.environ["TORCHDYNAMO_DISABLE"])
runner.train(sys.argv[1], Path(sys.argv[1]), [], runner.cpu_places(1)[0])
"""
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=True)
    assert f"disabled: {got}\n" in (tmp_path / "out.txt").read_text()


# -----------------------------------------------------------------------------
# Real runs, in processes of their own


def start(base_dir, config: Path, *arguments: str) -> subprocess.Popen:
    return subprocess.Popen([sys.executable, "-m", "analysis.sweep", str(config), *arguments], cwd=tiny.ROOT, text=True, start_new_session=True,
                            env={**os.environ, **tiny.ENV, "NANOCHAT_BASE_DIR": str(base_dir)}, stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def wait_for(process: subprocess.Popen, word: str, times: int) -> None:
    """Until so many lines with this word have come."""
    for line in process.stderr:
        times -= word in line
        if times == 0:
            return
    raise AssertionError(f"the runner has ended with status {process.wait()}")


@pytest.fixture
def twelve(base_dir):
    tiny.prepare(base_dir)
    config = base_dir / "twelve.toml"
    config.write_text(TINY + "[grid]\nseed = [1, 2, 3, 4]\nmatrix-lr = [0.01, 0.02, 0.04]\n")
    return config


@pytest.mark.slow
def test_killed_runs_go_on_and_finished_ones_are_not_repeated(twelve, base_dir):
    process = start(base_dir, twelve, "--jobs=2")
    wait_for(process, ": done", 3)
    children = psutil.Process(process.pid).children(recursive=True)
    assert len(children) >= 2
    process.kill()
    process.communicate(timeout=300)
    assert not psutil.wait_procs(children, timeout=300)[1], "no child outlives its runner"
    done = {path: path.stat().st_mtime_ns for path in base_dir.glob("base_checkpoints/*/done.json")}
    assert 3 <= len(done) < 12
    process = start(base_dir, twelve, "--jobs=2")
    _, err = tiny.ended(process)
    assert process.returncode == 0, err
    assert err.count(": done") == 12 - len(done) and all(path.stat().st_mtime_ns == before for path, before in done.items())
    found = rows(base_dir, "twelve")
    assert len(found) == 12 and all(row["status"] == "done" and float(row["final_bpb"]) > 0 for row in found)
    assert not list(base_dir.glob("base_checkpoints/*/*.pt"))


@pytest.mark.slow
def test_two_runners_share_the_work(twelve, base_dir):
    processes = [start(base_dir, twelve, "--jobs=1") for _ in range(2)]
    told = [line for process in processes for line in tiny.ended(process)[1].splitlines() if ": done" in line]
    assert [process.returncode for process in processes] == [0, 0]
    assert len(told) == len(set(told)) == 12
    for folder in base_dir.glob("base_checkpoints/trial-*"):
        assert (folder / "claim-1").exists() and not (folder / "claim-2").exists()
        assert [json.loads(line)["kind"] for line in open(folder / "log.jsonl")].count("start") == 1
    assert len(rows(base_dir, "twelve")) == 12


@pytest.mark.slow
@pytest.mark.parametrize("number, status", [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_ends_the_children(twelve, base_dir, number, status):
    process = start(base_dir, twelve, "--jobs=2")
    wait_for(process, ": done", 1)
    children = psutil.Process(process.pid).children(recursive=True)
    assert len(children) >= 2  # one has just ended
    process.send_signal(number)
    process.communicate(timeout=300)
    assert process.returncode == status and not psutil.wait_procs(children, timeout=300)[1]
    ended = [json.loads(path.read_text())["status"] for path in base_dir.glob("base_checkpoints/*/done.json")]
    assert 1 <= len(ended) < 12 and set(ended) == {0}, "children that end with the runner are not written down"


@pytest.mark.slow
def test_a_slurm_array_of_runners(twelve, base_dir, capsys):
    """With submitit's executor of this machine, in the place of Slurm's."""
    pytest.importorskip("submitit")
    text = twelve.read_text() + "[slurm]\ncluster = 'local'\ntimeout_min = 20\n"
    found = read_sweep("twelve.toml", text)
    folder = sweep.folder_of_sweep(str(base_dir), found)
    folder.mkdir(parents=True)
    (folder / "config.toml").write_text(f'name = "twelve"\n{text}')
    jobs = sweep.submit(sweep.Settings(jobs=1), found, folder, 2)
    told = "".join(job.result() for job in jobs)
    assert all(row["status"] == "done" for row in rows(base_dir, "twelve")) and "twelve/results.csv" in told
    with pytest.raises(UsageError, match="slurm"):
        found.slurm["no_such_option"] = 1
        sweep.submit(sweep.Settings(), found, folder, 2)


def test_children_are_no_copies_of_a_process_that_has_seen_gpus(monkeypatch):
    """Runs on the CPU of such a machine either: PyTorch asks CUDA for its random state, which a fork cannot give."""
    for devices, method in (([], "forkserver"), (["0"], "spawn")):
        monkeypatch.setattr(runner, "gpus", lambda: devices)
        assert runner._processes(cpu_places(1)).get_start_method() == method

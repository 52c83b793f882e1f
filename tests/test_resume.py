"""A run that is killed and resumed gives the losses, weights, optimizer and random states of one that was not, bit for bit."""
import os
import shutil
import signal

import pytest
import torch

from nanochat import checkpoint_manager as checkpoints
from nanochat.resume import steps_of_last_run
from nanochat.run_log import read_run_log
from tests import tiny
from tests.ranks import PROCESSES


@pytest.fixture
def base(base_dir):
    tiny.prepare(base_dir)
    return base_dir


@pytest.fixture
def finished(finished_run, base_dir):
    """A copy of the uninterrupted run."""
    shutil.copytree(finished_run, base_dir, dirs_exist_ok=True)
    return base_dir


def assert_same(base, finished_run, **kwargs):
    assert tiny.losses(base) == tiny.losses(finished_run)
    assert tiny.same_checkpoint(base, finished_run, **kwargs)


def forget(base, step: int) -> None:
    for path in tiny.folder(base).glob(f"*_{step:06d}*"):
        path.unlink()


def test_the_run_spans_epochs_and_accumulates(finished_run):
    """What the tests below stand on."""
    start, *records = read_run_log(tiny.folder(finished_run) / "log.jsonl")
    epochs = {record["epoch"] for record in records if record["kind"] == "train"}
    assert len(epochs) > 1
    assert start["total_batch_size"] == 2 * 2 * 64  # two passes of two rows


def test_later_checkpoints_of_a_run_that_went_back_are_not_gone_on_with(finished, capsys):
    """Nor are those of a run before in the same folder."""
    for flags, steps in ((["--resume-from-step=4", "--num-iterations=6"], [5, 6]), (["--num-iterations=3"], [1, 2, 3])):
        assert tiny.train(*flags, "--save-every=1") == 0
        assert steps_of_last_run(tiny.folder(finished)) == steps and 8 in checkpoints.list_steps(tiny.folder(finished))
    for step in (1, 2, 3):  # as if it had been killed before its first save
        forget(finished, step)
    assert steps_of_last_run(tiny.folder(finished)) == []
    assert tiny.train("--resume") == 2 and "--resume-from-step=8" in capsys.readouterr().err, "an old run is not overwritten by mistake"
    (tiny.folder(finished) / "log.jsonl").unlink()
    assert steps_of_last_run(tiny.folder(finished)) == [4, 5, 6, 8], "all that there are"


def test_a_run_that_went_back_and_was_killed_before_its_first_save(finished):
    assert tiny.train("--resume-from-step=4", "--num-iterations=5", "--save-every=-1") == 0
    forget(finished, 5)
    assert steps_of_last_run(tiny.folder(finished)) == [4], "it began there"
    assert tiny.train("--resume", "--num-iterations=6", "--save-every=-1") == 0
    assert steps_of_last_run(tiny.folder(finished)) == [6] and 8 in checkpoints.list_steps(tiny.folder(finished)), "8 stays given up"


@pytest.mark.slow
def test_kill_9_between_saves(base, finished_run):
    process = tiny.start(base, "--save-every=2")
    for line in process.stdout:
        if line.startswith("step 00005"):
            break
    process.kill()
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    steps = checkpoints.list_steps(tiny.folder(base))
    assert steps[:2] == [2, 4] and 8 not in steps, "it was killed before its end"
    assert tiny.train("--resume") == 0
    assert_same(base, finished_run)


@pytest.mark.slow
def test_a_run_too_short_to_compile_goes_on_eagerly(base):
    """What was decided is kept, as compiled code rounds differently."""
    done = tiny.run(base, TORCHDYNAMO_DISABLE="")
    assert done.returncode == 0 and "Running eagerly, without torch.compile: in a run of about" in done.stdout, done.stderr
    forget(base, 8)
    done = tiny.run(base, "--resume", TORCHDYNAMO_DISABLE="")
    assert done.returncode == 0 and "Running eagerly, without torch.compile: this run began so" in done.stdout, done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("line", ["Step 00000", "step 00000", "step 00003", "Step 00004", "step 00004", "step 00007"])
def test_kill_9_after_any_line(base, finished_run, line):
    process = tiny.start(base)
    for printed in process.stdout:
        if printed.startswith(line):
            break
    process.kill()
    process.communicate()
    assert tiny.train("--resume") == 0
    assert_same(base, finished_run)


def killed_run(base, rename: int) -> None:
    """A run that is killed before it renames a finished file for the `rename`-th time."""
    process = PROCESSES.Process(target=train_and_die, args=(str(base), rename))
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL


def train_and_die(base: str, rename: int) -> None:
    os.environ["NANOCHAT_BASE_DIR"] = base  # the server's environment is that of the first test
    replace, calls = os.replace, []

    def replace_or_die(*args):
        calls.append(args)
        if len(calls) == rename:
            os.kill(os.getpid(), signal.SIGKILL)
        replace(*args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "replace", replace_or_die)
        tiny.train()


# the log is renamed first, then state, optimizer, meta and model of step 4 and, after the validation, the completed meta; then those of step 8
@pytest.mark.parametrize("rename, steps", [
    (5, []), (9, [4]), *(pytest.param(*case, marks=pytest.mark.slow)
                         for case in ((1, []), (2, []), (3, []), (4, []), (6, [4]), (7, [4]), (8, [4]), (10, [4]), (11, [4, 8])))])
def test_kill_9_during_a_save(base, finished_run, rename, steps):
    killed_run(base, rename)
    folder = tiny.folder(base)
    assert checkpoints.list_steps(folder) == steps
    for step in steps:
        assert tiny.same_checkpoint(base, finished_run, step)
    assert tiny.train("--resume") == 0
    assert_same(base, finished_run)
    assert not list(folder.glob(".*")), "what the kill left is gone"


def test_resume_with_nothing_there_begins_anew(base, finished_run, capsys):
    assert tiny.train("--resume") == 0
    assert "a new run begins" in capsys.readouterr().out
    assert_same(base, finished_run)


def test_resume_takes_the_newest_checkpoint_and_resume_from_step_any(finished, finished_run, capsys):
    forget(finished, 8)
    assert tiny.train("--save-every=2", "--resume") == 0
    assert "Resuming from step 4" in capsys.readouterr().out
    assert_same(finished, finished_run)
    assert checkpoints.list_steps(tiny.folder(finished)) == [4, 6, 8]
    assert tiny.train("--resume-from-step=4") == 0
    assert_same(finished, finished_run)


def test_resuming_a_finished_run_changes_nothing(finished, finished_run):
    times = {path: path.stat().st_mtime_ns for path in tiny.folder(finished).glob("*.pt")}
    assert tiny.train("--resume") == 0
    assert times == {path: path.stat().st_mtime_ns for path in tiny.folder(finished).glob("*.pt")}
    assert_same(finished, finished_run)


def test_a_longer_horizon_trains_on(finished):
    """Constant learning rate, so that the longer run is the shorter one continued; the schedules of Muon may differ."""
    assert tiny.train("--resume", "--num-iterations=10") == 0
    assert [step for kind, step, *_ in tiny.losses(finished) if kind == "train"] == list(range(10))


def test_learning_rates_may_change_on_resume(finished, finished_run):
    """The flags count, not what the checkpoint was trained with: at a rate of 0 the matrices stay, and the rest moves on."""
    assert tiny.train("--resume-from-step=4", "--matrix-lr=0") == 0
    before, after = (torch.load(tiny.folder(base) / f"model_{step:06d}.pt", weights_only=True) for base, step in ((finished_run, 4), (finished, 8)))
    matrices = {key for key in before if key.startswith("transformer.h.")}
    assert {key for key in before if torch.equal(before[key], after[key])} == matrices


@pytest.mark.slow
def test_several_streams_in_one_process(base_dir, tmp_path_factory, monkeypatch):
    """Four shares of the data, of which each step draws from all: every position is kept."""
    flags = ("--data-streams=4", "--device-batch-size=1", "--eval-every=-1")
    tiny.prepare(base_dir)
    assert tiny.train(*flags) == 0
    other = tmp_path_factory.mktemp("streams")
    shutil.copytree(base_dir, other, dirs_exist_ok=True)
    forget(other, 8)
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(other))
    assert tiny.train(*flags, "--resume") == 0
    assert_same(other, base_dir)


def test_a_new_run_over_an_old_one(finished, finished_run, capsys):
    """It says so, replaces the old log and the checkpoints of the same steps, and leaves others alone."""
    assert tiny.train("--matrix-lr=0.01", "--num-iterations=6") == 0
    assert "another run" in capsys.readouterr().out
    assert checkpoints.list_steps(tiny.folder(finished)) == [4, 6, 8]
    assert not tiny.same_checkpoint(finished, finished_run, 4) and tiny.same_checkpoint(finished, finished_run, 8)
    assert len([kind for kind, *_ in tiny.losses(finished) if kind == "train"]) == 6


def test_a_checkpoint_is_never_of_two_runs(finished):
    """Killed while it replaces an older run's checkpoint: incomplete rather than mixed."""
    killed_run(finished, 4)
    assert checkpoints.list_steps(tiny.folder(finished)) == [8]


@pytest.mark.slow
@pytest.mark.parametrize("env", [{"NANOCHAT_DTYPE": "float16"}, {"NANOCHAT_DTYPE": "bfloat16"}, {"TORCHDYNAMO_DISABLE": "0"}], ids=str)
def test_other_dtypes_and_compiled(base, tmp_path_factory, env):
    done = tiny.run(base, **env)
    assert done.returncode == 0, done.stderr
    assert f"torch.{env.get('NANOCHAT_DTYPE', 'float32')}" in done.stdout
    first, *_, last = (loss for kind, _, loss, *_ in tiny.losses(base) if kind == "train")
    assert last < first
    other = tmp_path_factory.mktemp("other")
    shutil.copytree(base, other, dirs_exist_ok=True)
    forget(other, 8)
    done = tiny.run(other, "--resume", **env)
    assert done.returncode == 0, done.stderr
    assert_same(other, base)

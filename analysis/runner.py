"""The one runner of trainings: many runs of base_train, each in a process of its own and each done once, whoever else works through the same list.

* Runners of one or more machines share a base directory by claims (claims.py).
* A run that dies, of an exception or a signal, is written down as such (`done.json`) and stops no other.
* A run that was killed with its runner is taken up again, from its newest checkpoint if --save-every left one. No child outlives its runner.
"""
import contextlib
import json
import multiprocessing
import multiprocessing.connection
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from analysis.claims import BEAT, Claim, holder, take
from analysis.trial import Trial, folder_of, says_diverged, status_of
from nanochat.checkpoint_manager import list_steps
from nanochat.cli import UsageError
from nanochat.files import locked, write_text_atomic
from nanochat.resources import usable_cpus

LOOK = 2.0  # seconds between two looks at a run that another runner has
POLL = 0.5  # seconds between two looks at everything


# -----------------------------------------------------------------------------
# Where runs run


@dataclass(frozen=True)
class Place:
    """What one run at a time has to itself."""

    environment: dict[str, str]
    ranks: int = 1  # processes of a run; more than one are started by torchrun


def cpu_places(jobs: int, threads: int = 1, ranks: int = 1) -> list[Place]:
    return [Place({"OMP_NUM_THREADS": str(threads)}, ranks)] * jobs


def cuda_places(devices: Sequence[str], ranks: int = 1) -> list[Place]:
    """As many as there are groups of `ranks` devices."""
    groups = zip(*[iter(devices)] * ranks)
    allocator = os.environ.get("PYTORCH_ALLOC_CONF", "expandable_segments:True")  # base_train's, which sets it too late in a child that has imported PyTorch before
    return [Place({"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ",".join(group), "PYTORCH_ALLOC_CONF": allocator}, ranks) for group in groups]


def gpus() -> list[str]:
    """Those that this process may use, by the names that CUDA_VISIBLE_DEVICES takes."""
    import torch
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    return [name for name in visible.split(",") if name] if visible is not None else [str(number) for number in range(torch.cuda.device_count())]


def places_for(device_type: str, jobs: int | None, ranks: int = 1, threads: int = 1) -> list[Place]:
    """One device for each of `ranks` ranks of a run. jobs: runs at a time, on MPS one; None: as many as there are devices. threads: of a rank on the CPU; 0: what the other runs leave.

    Raises UsageError where there are fewer GPUs than a run needs.
    """
    if device_type == "cuda":
        if len(names := gpus()) < ranks:
            raise UsageError(f"a run needs {ranks} GPU{'s' if ranks > 1 else ''} with CUDA, and {len(names)} are to be seen; take fewer ranks, or the flag device-type=cpu")
        return cuda_places(names, ranks)[:jobs]
    if device_type == "mps":  # there is one
        jobs = 1
    jobs = jobs or max(1, usable_cpus() // (ranks * max(1, threads)))
    return cpu_places(jobs, threads or max(1, usable_cpus() // (jobs * ranks)), ranks)


def train(base_dir: str, folder: Path, arguments: list[str], place: Place) -> None:
    """The child process of one run; its exit status is base_train's."""
    os.setsid()  # Ctrl-C is for the runner
    threading.Thread(target=_end_with_parent, daemon=True).start()
    os.environ.update(place.environment, NANOCHAT_BASE_DIR=base_dir)
    # Compiled code rounds differently, so runs that are compared are all compiled or none, and not each as its length or the machine's load has it; those of one shape wait once
    os.environ.setdefault("TORCHDYNAMO_DISABLE", "0")
    out = os.open(folder / "out.txt", os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666)
    for number, name in ((1, "stdout"), (2, "stderr")):
        os.dup2(out, number)
        setattr(sys, name, open(number, "w", encoding="utf-8", errors="backslashreplace", buffering=1, closefd=False))
    if place.ranks > 1:
        signal.signal(signal.SIGTERM, lambda *_: None)  # torchrun gets it too, ends its ranks, and so this
        torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={place.ranks}"]
        sys.exit(subprocess.run([*torchrun, "-m", "scripts.base_train", *arguments]).returncode)
    import torch

    from scripts import base_train
    torch.set_num_threads(int(place.environment["OMP_NUM_THREADS"]))  # what this is a copy of may have been told otherwise
    sys.exit(base_train.main(arguments))


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent:
        multiprocessing.connection.wait([parent.sentinel])
        os.killpg(0, signal.SIGTERM)  # with torchrun, which ends its ranks


def _processes(places: list[Place]) -> Any:
    """How children start. Without GPUs as copies of a process that has imported PyTorch once; a copy of one that has seen GPUs cannot use CUDA, nor its random states."""
    if any("CUDA_VISIBLE_DEVICES" in place.environment for place in places) or gpus():
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["analysis.runner", "scripts.base_train", "torch._dynamo"])  # the latter every optimizer asks for
    return context


@contextlib.contextmanager
def _environment(variables: dict[str, str]) -> Iterator[None]:
    before = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


@contextlib.contextmanager
def _caught() -> Iterator[list[int]]:
    """The list of the SIGINTs (Ctrl-C) and SIGTERMs (Slurm, a shutdown) that have come meanwhile: they interrupt nothing, so that no child is lost in its start."""
    caught: list[int] = []
    ours = (signal.SIGINT, signal.SIGTERM) if threading.current_thread() is threading.main_thread() else ()
    before = {number: signal.signal(number, lambda number, frame: caught.append(number)) for number in ours}
    try:
        yield caught
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


# -----------------------------------------------------------------------------
# The runner


class Work:
    """What a runner has to do; more may come while it is at it."""

    def __init__(self, trials: Sequence[Trial]):
        self.trials = list(trials)
        self.refused: list[str] = []  # what was asked for and can be no run, and why

    @property
    def total(self) -> int:
        """How many there will be."""
        return len(self.trials)

    def more(self) -> bool:
        """Adds trials, when places are free and there is nothing to start. False if there are no more for now."""
        return False


@dataclass
class Running:
    trial: Trial
    claim: Claim
    process: Any
    place: Place
    started: float = field(default_factory=time.monotonic)
    beat: float = field(default_factory=time.monotonic)


class Runner:
    """kept: by a trial's name the steps whose checkpoints must stay.
    again: whether trials that had failed before this runner came to them are run again.
    wait: also for the runs that others have, of which it takes over those that are abandoned; without it ends when there is nothing to take.
    """

    def __init__(self, base_dir: str, work: Work, places: list[Place], kept: dict[str, set[int]] | None = None,
                 again: bool = False, wait: bool = True):
        if not hasattr(os, "setsid"):
            raise UsageError("studies and sweeps start and end their runs as POSIX systems do; on Windows take WSL")
        self.base_dir, self.work, self.free, self.kept, self.again, self.wait = base_dir, work, list(places), kept or {}, again, wait
        self.places = len(places)
        self.states: dict[str, str] = {}  # by name: running, elsewhere, done or failed; all others wait
        self.running: dict[str, Running] = {}
        self.tried: set[str] = set()
        self.seconds: list[float] = []  # that the runs of this runner took
        self._looked: dict[str, float] = {}
        self._full = False  # the disk, when a run should have begun
        self._again_at = 0.0  # when the next run may begin, after one could not
        self._processes = _processes(places)

    def state(self, trial: Trial) -> str:
        return self.states.get(trial.name, "waiting")

    def run(self, tell: Callable[["Runner"], None]) -> None:
        """Until nothing is left to do. `tell` is called twice a second and after every change. Raises KeyboardInterrupt or SystemExit after a signal."""
        with _caught() as caught:
            try:
                while not caught:
                    self._full = False
                    self._reap()
                    self._start()
                    while self.free and not self._full and self._more():
                        self._start()
                    tell(self)
                    states = {self.state(trial) for trial in self.work.trials}
                    if not self.running and "waiting" not in states and not (self.wait and "elsewhere" in states):
                        return
                    multiprocessing.connection.wait([running.process.sentinel for running in self.running.values() if running.process.exitcode is None], POLL)
            finally:
                self._stop()
        if caught[0] == signal.SIGINT:
            raise KeyboardInterrupt
        sys.exit(128 + caught[0])

    def _more(self) -> bool:
        try:
            return self.work.more()
        except (UsageError, OSError):  # told when it ends no run that goes on
            if not self.running:
                raise
            return False

    def _ended(self, trial: Trial) -> bool:
        """Sets its state if there is nothing to do about it."""
        status = status_of(self.base_dir, trial)
        if status is None:
            return False
        if trial.name not in self.tried:
            complete = self.kept.get(trial.name, set()) <= set(list_steps(folder_of(self.base_dir, trial)))
            if not complete if status == 0 else self.again:
                return False
        self.states[trial.name] = "failed" if status else "done"
        return True

    def _start(self) -> None:
        for trial in self.work.trials:
            if self.state(trial) in ("running", "done", "failed"):
                continue
            now, new = time.monotonic(), self.free and self.state(trial) == "waiting"
            if not new and now - self._looked.get(trial.name, -LOOK) < LOOK:
                continue
            if trial.parent is not None and any(other.name == trial.parent.name for other in self.work.trials) and self.state(trial.parent) not in ("done", "failed"):
                continue
            if trial.parent is not None and self.state(trial.parent) == "failed":
                self.states[trial.name] = "failed"  # for this time: there is no telling what it would be
                continue
            self._looked[trial.name] = now
            try:
                ended = self._ended(trial)
            except (UsageError, OSError):  # a damaged file, or a file system that fails for a moment, ends no run that goes on
                if not self.running:
                    raise
                continue
            if not ended and self.free and now >= self._again_at:
                self._try(trial)

    def _try(self, trial: Trial) -> None:
        folder = folder_of(self.base_dir, trial)
        claim = None
        try:
            if not holder(folder) and not _held(folder):
                claim = take(folder)
            if claim is None:
                self.states[trial.name] = "elsewhere"
                return
            if self._ended(trial):  # while others had it
                claim.release()
                return
            if _held(folder):  # since
                claim.release()
                self.states[trial.name] = "elsewhere"
                return
            have = set(list_steps(folder))
            if (folder / "done.json").exists():
                self.kept[trial.name] = self.kept.get(trial.name, set()) | have  # of branches that are not asked for now
                (folder / "done.json").unlink()
        except (UsageError, OSError):  # the disk is full, perhaps for a while, which ends no run that goes on
            if claim:
                claim.release()
            if not self.running:
                raise
            self._full = True
            return
        place = self.free.pop(0)
        wanted = self.kept.get(trial.name, set()) - have
        resume = ["--resume"] if have and all(step > max(have) for step in wanted) else []  # one that is missing before them takes a new run
        process = self._processes.Process(target=train, args=(self.base_dir, folder, [*trial.arguments(), *resume], place))
        try:
            with _environment(place.environment):
                process.start()
        except (EOFError, OSError) as error:  # no memory, no more processes; the former where the fork server met it
            self.free.insert(0, place)
            claim.release()
            if not self.running:
                raise UsageError(f"cannot start the process of a run ({getattr(error, 'strerror', None) or str(error) or 'no more processes'}); "
                                 "make room for it, or set TMPDIR to a shorter path") from error
            self._full, self._again_at = True, time.monotonic() + BEAT  # each try takes a claim
            return
        self.running[trial.name] = Running(trial, claim, process, place)
        self.states[trial.name] = "running"
        self.tried.add(trial.name)

    def _reap(self) -> None:
        for name, running in list(self.running.items()):
            if (status := running.process.exitcode) is not None:
                try:
                    self._finish(running, status)
                except OSError:  # a full disk: tried again as long as others go on
                    if all(other.process.exitcode is not None for other in self.running.values()):
                        raise
                    continue
            elif time.monotonic() - running.beat > BEAT:
                running.beat = time.monotonic()
                if running.claim.beat():
                    continue
                _signal(running, signal.SIGKILL)
                running.process.join()
                self.states[name] = "elsewhere"
            else:
                continue
            del self.running[name]
            self.free.append(running.place)

    def _finish(self, running: Running, status: int) -> None:
        trial, folder = running.trial, folder_of(self.base_dir, running.trial)
        if not running.claim.beat():  # the result is another's to write
            self.states[trial.name] = "elsewhere"
            return
        if not trial.tag and (status == 0 or says_diverged(folder, status)):  # else there may be something to go on from
            for path in sorted(folder.glob("*.pt")):  # the model first: without it there is no checkpoint, whatever ends this
                if (number := re.search(r"_(\d+)", path.stem)) and int(number[1]) not in self.kept.get(trial.name, ()):
                    path.unlink()
        write_text_atomic(folder / "done.json", json.dumps({"status": status, "flags": trial.flags}))
        running.claim.release()
        self.seconds.append(time.monotonic() - running.started)
        self.states[trial.name] = "failed" if status else "done"

    def _stop(self) -> None:
        """Ends the children. Their runs are as if a power cut had ended them."""
        for running in self.running.values():
            _signal(running, signal.SIGTERM)
        deadline = time.monotonic() + 15  # torchrun ends its ranks first
        for running in self.running.values():
            running.process.join(max(0.0, deadline - time.monotonic()))
            _signal(running, signal.SIGKILL)
            running.process.join()
            running.claim.release()
        self.running = {}


def _held(folder: Path) -> bool:
    """Whether a training writes there, also one that made no claim (somebody's base_train), or one whose runner sleeps: a claim would take that away from it.

    The look takes the lock itself for a moment, so it is for folders that nobody claims, and what it meets may be another one's look: hence two.
    """
    for pause in (0.05, 0.0):
        try:
            with locked(folder, wait=False):
                return False
        except UsageError:
            time.sleep(pause)
    return True


def _signal(running: Running, number: int) -> None:
    """To the child and those that it started."""
    try:
        os.killpg(running.process.pid, number)
    except ProcessLookupError:  # it has ended, or is not yet far enough to have a group
        with contextlib.suppress(ProcessLookupError):
            if running.process.is_alive():
                os.kill(running.process.pid, number)

"""Trials: many short trainings by `base_train` itself, side by side, each done once; and what studies made of them share.

A trial is a set of base_train's flags, and perhaps a checkpoint of another trial that it branches off. Its log stays in its checkpoint folder below the base
directory, named by a hash of the flags, so a study that was interrupted, or that shares trials with another, does not train them again. The weights are deleted,
but for those that branches begin with.
"""
import contextlib
import hashlib
import json
import math
import multiprocessing
import os
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from nanochat.cli import ArgumentParser, positive_int
from nanochat.common import get_base_dir
from nanochat.dataset import parquets_iter_batched
from nanochat.files import atomic_path, locked, write_text_atomic
from nanochat.run_log import read_run_log
from nanochat.tokenizer import get_tokenizer

# four layers of width 128: a minute a run on one core
SHAPE = {"depth": 4, "aspect-ratio": 32, "head-dim": 32, "max-seq-len": 256, "window-pattern": "L", "device-batch-size": 16, "total-batch-size": 4096,
         "eval-every": 125, "eval-tokens": 65536}
TUNED = {"unembedding-lr": 0.08, "embedding-lr": 0.15, "scalar-lr": 0.15, "matrix-lr": 0.48}
STEPS = 250
INTERRUPTED = 130  # base_train's exit status after Ctrl-C
DEFAULTS = {"device-type": "cpu", "core-metric-every": -1, "sample-every": -1, "save-every": -1}


@dataclass
class Result:
    flags: dict
    steps: list[int]  # of the validations
    bpb: list[float]  # validation bits per byte there
    flops: list[float]  # spent until there
    seconds: float  # of training
    params: int  # all parameters
    begin: float = 0.0  # FLOPs of the trunk that a branch begins with
    rows: dict = field(default_factory=dict)  # of the last evaluations (--eval-tasks), by key

    @property
    def final(self) -> float:
        """Last validation bits per byte, infinite if the training diverged."""
        return self.bpb[-1] if self.bpb else float("inf")


@dataclass(frozen=True)
class Trial:
    """One training. A branch begins where its parent stands after `step` steps (base_train's --branch-from), and takes over its flags."""

    flags: dict
    parent: "Trial | None" = None
    step: int = 0

    def branch(self, step: int, **flags) -> "Trial":
        return Trial({name.replace("_", "-"): value for name, value in flags.items()}, self, step)

    @property
    def name(self) -> str:
        """Of its folder."""
        identity = {**DEFAULTS, **self.flags} if self.parent is None else {"": f"{self.parent.name}@{self.step}", **self.flags}
        return "trial-" + hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:12]

    def arguments(self) -> list[str]:
        begin = {**DEFAULTS} if self.parent is None else {**DEFAULTS, "branch-from": f"{self.parent.name}@{self.step}"}
        return [*(f"--{key}={value}" for key, value in {**begin, **self.flags}.items()), f"--model-tag={self.name}"]


def folder_of(base_dir: str, trial: Trial) -> Path:
    return Path(base_dir, "base_checkpoints", trial.name)


def read(base_dir: str, trial: Trial) -> Result | None:
    """A finished trial's result, or None."""
    folder = folder_of(base_dir, trial)
    if not (folder / "done.json").exists():
        return None
    records = list(read_run_log(folder / "log.jsonl")) if json.loads((folder / "done.json").read_text(encoding="utf-8"))["status"] == 0 else []
    evals = [record for record in records if record["kind"] == "eval"]
    start = next((record for record in records if record["kind"] == "start"), {"counts": {"total": 0}})
    return Result(trial.flags, [r["step"] for r in evals], [r["val_bpb"] for r in evals], [r["flops"] for r in evals],
                  evals[-1]["time"] if evals else 0.0, start["counts"]["total"], _begin([record for record in records if record["kind"] == "train"]),
                  next((record["rows"] for record in reversed(records) if record["kind"] == "evals"), {}))


def _begin(trains: list[dict]) -> float:
    """FLOPs before the first of these steps."""
    return max(0.0, 2 * trains[0]["flops"] - trains[1]["flops"]) if len(trains) > 1 else 0.0


def _run(base_dir: str, trial: Trial, kept: set[int]) -> None:
    """One trial, in a worker process; of its checkpoints those of the steps in `kept` stay, for its branches."""
    os.environ["NANOCHAT_BASE_DIR"] = base_dir
    import torch

    from scripts import base_train
    torch.set_num_threads(1)
    torch._dynamo.config.recompile_limit = 1000  # type: ignore  # one process trains models of many shapes
    folder = folder_of(base_dir, trial)
    weights = lambda: {int(path.stem[6:]) for path in folder.glob("model_*.pt")}
    with locked(folder):
        if read(base_dir, trial) is not None and kept <= weights():  # by another study, while this one waited
            return
        folder.mkdir(parents=True, exist_ok=True)
        if (folder / "done.json").exists():
            kept = kept | weights()  # of branches that are not asked for now
            (folder / "done.json").unlink()
        resume = ["--resume"] if weights() else []
        with open(folder / "out.txt", "a", encoding="utf-8", errors="backslashreplace") as out, contextlib.redirect_stdout(out), contextlib.redirect_stderr(out):
            status = base_train.main([*trial.arguments(), *resume])
        if status == INTERRUPTED:  # it is not done, and goes on next time
            raise KeyboardInterrupt
        for path in folder.glob("*.pt"):
            if int(path.stem.split("_")[1]) not in kept:
                path.unlink()
        write_text_atomic(folder / "done.json", json.dumps({"status": status, "flags": trial.flags}))


def run_trials(base_dir: str, trials: Iterable[Trial | dict], jobs: int = 2) -> list[Result]:
    """Results in the order of the trials; those not on disk are trained, `jobs` at a time with one thread each, parents before their branches.

    A trial that is a parent keeps the checkpoints that its branches begin with.
    """
    trials = [trial if isinstance(trial, Trial) else Trial(trial) for trial in trials]
    kept: dict[str, set[int]] = {}
    order: dict[str, Trial] = {}

    def add(trial: Trial) -> None:
        if trial.name in order:
            return
        if trial.parent is not None:
            add(trial.parent)
            kept.setdefault(trial.parent.name, set()).add(trial.step)
        order[trial.name] = trial

    for trial in trials:
        add(trial)
    missing = lambda trial: read(base_dir, trial) is None
    wanted = {name for name, trial in order.items() if missing(trial)}
    for name in reversed(order):  # a parent that is done must still have what the missing ones begin with
        trial = order[name]
        if name in wanted and trial.parent is not None:
            if not (folder_of(base_dir, trial.parent) / f"model_{trial.step:06d}.pt").exists():
                wanted.add(trial.parent.name)
    todo = [(base_dir, trial, kept.get(name, set())) for name, trial in order.items() if name in wanted]
    if todo:
        started = time.perf_counter()
        os.environ["OMP_NUM_THREADS"] = "1"
        done = 0
        with multiprocessing.get_context("spawn").Pool(jobs) as pool:
            while todo:
                names = {trial.name for _, trial, _ in todo}
                ready = [entry for entry in todo if entry[1].parent is None or entry[1].parent.name not in names]
                for _ in pool.imap_unordered(_run_one, ready):
                    done += 1
                    spent, total = time.perf_counter() - started, len(wanted)
                    print(f"{done} of {total} trials, {spent / 60:.1f} min, eta {spent / done * (total - done) / 60:.1f} min", file=sys.stderr, flush=True)
                todo = [entry for entry in todo if entry not in ready]
    results = [read(base_dir, trial) for trial in trials]
    assert all(results)
    return results  # type: ignore[return-value]


def _run_one(entry: tuple) -> None:
    _run(*entry)


# -----------------------------------------------------------------------------
# Studies


def run_by_seed(plan: Callable[[int], dict[str, Trial]], seeds: int, jobs: int) -> list[dict[str, Result]]:
    """For each of `seeds` seeds, from 42 on, the results of the trials that `plan` makes of it, by their names there."""
    plans = [plan(seed) for seed in range(42, 42 + seeds)]
    results = iter(run_trials(get_base_dir(), [trial for found in plans for trial in found.values()], jobs))
    return [{name: next(results) for name in found} for found in plans]


def study_parser(doc: str) -> ArgumentParser:
    """A parser with the flags of all studies."""
    parser = ArgumentParser(description=doc.splitlines()[0])
    parser.add_argument("--jobs", type=positive_int, default=2, help="trials at a time, one thread each")
    parser.add_argument("--out", type=Path, help="write the numbers to this JSON file")
    parser.add_argument("--plot", type=Path, help="draw them into this picture")
    return parser


@contextlib.contextmanager
def pictures(path: Path, width: float, height: float, columns: int):
    """Yields the axes of so many pictures side by side, of that many inches in all, which are written to one file afterwards."""
    from matplotlib.figure import Figure
    figure = Figure(figsize=(width, height), layout="constrained")
    yield figure.subplots(1, columns, squeeze=False)[0]
    with atomic_path(path) as temporary:
        figure.savefig(temporary, format=path.suffix[1:], dpi=150)


@contextlib.contextmanager
def picture(path: Path, width: float, height: float):
    """One of `pictures`."""
    with pictures(path, width, height, 1) as (axes,):
        yield axes


def cost_with(loss: float, costs: Sequence[float], losses: Sequence[float]) -> float:
    """The steps, FLOPs or seconds at which runs of these costs would end with `loss`: losses against the log of the cost, by a straight line
    through the two runs around it, or the last two."""
    pairs = sorted(zip(costs, losses))
    (c0, l0), (c1, l1) = next(((a, b) for a, b in zip(pairs, pairs[1:]) if b[1] <= loss), (pairs[-2], pairs[-1]))
    return math.exp(math.log(c0) + (math.log(c1) - math.log(c0)) * (l0 - loss) / (l0 - l1))


def nats_per_bpb() -> float:
    """Nats per token for one bit per byte, on the validation text of the base directory."""
    tokenizer = get_tokenizer()
    texts = next(parquets_iter_batched("val"))
    tokens = sum(map(len, tokenizer.encode(texts)))
    return math.log(2) * sum(len(text.encode()) for text in texts) / tokens

"""A trial: one run of base_train, as studies and sweeps want it, and what it left on disk.

It is a set of flags, and perhaps a checkpoint of another trial that it branches off. Its log stays in its checkpoint folder below the base directory, named by a hash
of the flags, so what was interrupted, or is wanted by two studies, is not trained again. Its weights are deleted, but for those that branches begin with. A
trial with a `tag` is a run like any other: named by it, and its weights are kept.
"""
import functools
import hashlib
import json
import math
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from nanochat.cli import UsageError
from nanochat.common import COMPUTE_DTYPE, default_device, get_base_dir
from nanochat.data_shards import data_source
from nanochat.files import parse_json
from nanochat.run_log import FILENAME, is_finished, read_run_log
from nanochat.tokenizer import get_tokenizer

DEFAULTS = {"device-type": "cpu", "core-metric-every": -1, "sample-every": -1, "save-every": -1}
REFUSED = 2  # exit status of what a user's flags lead to, divergence among it, but also of a full disk
DIVERGED = "training diverged"  # in what base_train then says


class Growth(NamedTuple):
    flops: float  # spent until then
    seconds: float
    before: float  # validation bits per byte right before it
    after: float


@dataclass
class Result:
    flags: dict
    steps: list[int]  # of the validations
    bpb: list[float]  # validation bits per byte there
    flops: list[float]  # spent until there
    seconds: float  # of training
    params: int  # all parameters, of its last model
    begin: float = 0.0  # FLOPs of the trunk that a branch begins with
    growths: list[Growth] = field(default_factory=list)
    rows: dict = field(default_factory=dict)  # of the last evaluations (--eval-tasks), by key
    tokens: int = 0  # seen in all
    counts: dict = field(default_factory=dict)  # parameters by part, likewise
    memory: float = math.nan  # peak, MiB
    times: list[float] = field(default_factory=list)  # seconds of training until the validations

    @property
    def final(self) -> float:
        """Last validation bits per byte, infinite if the training diverged."""
        return self.bpb[-1] if self.bpb else float("inf")

    @property
    def blocks(self) -> int:
        """Parameters of attention and MLP."""
        return self.counts.get("transformer_matrices", 0)

    @property
    def scaling_params(self) -> int:
        """Those of blocks and head, in which tokens per parameter are stated."""
        return self.blocks + self.counts.get("lm_head", 0)

    @property
    def grown(self) -> tuple[float, float]:
        """The loss right before and right after the last growth."""
        return self.growths[-1][2:] if self.growths else (math.nan, math.nan)


@dataclass(frozen=True)
class Trial:
    """One training. A branch begins where its parent stands after `step` steps (base_train's --branch-from), and takes over its flags."""

    flags: dict  # True: a switch
    parent: "Trial | None" = None
    step: int = 0
    tag: str = ""  # of its folder, instead of a hash

    def branch(self, step: int, **flags) -> "Trial":
        return Trial({name.replace("_", "-"): value for name, value in flags.items()}, self, step)

    @property
    def begin(self) -> dict:
        """The flags that its own come on top of."""
        if self.tag:
            return {}
        return DEFAULTS if self.parent is None else {**DEFAULTS, "branch-from": f"{self.parent.name}@{self.step}"}

    @property
    def name(self) -> str:
        """Of its folder."""
        identity = {**DEFAULTS, **self.flags} if self.parent is None else {"": f"{self.parent.name}@{self.step}", **self.flags}
        if os.environ.get("TORCHDYNAMO_DISABLE", "0") not in ("", "0"):  # rounds otherwise than compiled code, which runner.py has by default
            identity["eager"] = True
        return self.tag or "trial-" + hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:12]

    def arguments(self) -> list[str]:
        return [*as_words({**self.begin, **self.flags}), f"--model-tag={self.name}"]


def as_words(flags: dict) -> list[str]:
    """As on a command line; a true value is a switch, a false one is left out."""
    return [f"--{key}" if value is True else f"--{key}={value}" for key, value in flags.items() if value is not False]


def folder_of(base_dir: str, trial: Trial) -> Path:
    return Path(base_dir, "base_checkpoints", trial.name)


def status_of(base_dir: str, trial: Trial) -> int | None:
    """The exit status of a trial that has ended, below 0 the signal that killed it; None if it has not. Raises UsageError for a tag that stands for other flags."""
    folder = folder_of(base_dir, trial)
    if (done := folder / "done.json").exists():
        try:
            ended = parse_json(done.read_bytes())
            status, flags = int(ended["status"]), ended["flags"]
        except (ValueError, KeyError, TypeError) as error:
            raise UsageError(f"{done} is damaged ({error}); delete that folder, and the same command trains it again") from None
        if trial.tag and flags != trial.flags:
            raise UsageError(f"{trial.name} was trained with other flags ({folder}); give the new runs another name, or delete that folder")
        return status
    if trial.tag and (last := last_record(folder / FILENAME)) and last["kind"] == "end":  # without a runner
        try:
            had = read_run_log(folder / FILENAME)[0].get("config") or {}
        except (UsageError, IndexError):  # whoever reads it will be told
            had = {}
        if differ := [flag for flag, value in trial.flags.items() if not _same(had.get(flag.replace("-", "_"), value), value)]:
            raise UsageError(f"{trial.name} was trained with another --{differ[0]} ({folder}); give the new runs another name, or delete that folder")
        return 0
    return None


def _same(one: object, other: object) -> bool:
    """As values of a flag, which may be a text for a number, or for several."""
    if isinstance(one, list):
        one = ",".join(map(str, one))
    try:
        return float(one) == float(other)  # type: ignore[arg-type]
    except (TypeError, ValueError):
        return str(one) == str(other)


def diverged(base_dir: str, trial: Trial) -> bool:
    """Whether it would do so again, by itself or with what it begins with."""
    if trial.parent is not None and diverged(base_dir, trial.parent):
        return True
    return says_diverged(folder_of(base_dir, trial), status_of(base_dir, trial))


def says_diverged(folder: Path, status: int | None) -> bool:
    """Of a run that ended so, by its last words."""
    return status == REFUSED and DIVERGED in (folder / "out.txt").read_text(encoding="utf-8", errors="replace")[-2000:]


def last_record(log: Path) -> dict | None:
    """Of a run's log, of which only the end is read; None while there is none."""
    try:
        with open(log, "rb") as f:
            f.seek(max(0, f.seek(0, os.SEEK_END) - 65536))
            lines = f.read().split(b"\n")[:-1]
        return parse_json(lines[-1])
    except (FileNotFoundError, IndexError, ValueError):
        return None


def read(base_dir: str, trial: Trial) -> Result | None:
    """A finished trial's result, or None. One that diverged, or whose parent did, has no validations. Raises UsageError for a damaged log, as a full disk leaves it,
    and for a run of other text or another tokenizer than those that are there now."""
    status = status_of(base_dir, trial)
    if status != 0 and not diverged(base_dir, trial):
        return None
    folder = folder_of(base_dir, trial)
    try:
        records = read_run_log(folder / FILENAME) if status == 0 else []
        if status == 0 and not is_finished(records):
            raise UsageError("the last validation is missing")
    except UsageError as error:
        raise UsageError(f"the log in {folder} is damaged ({error}); delete that folder, and the same command trains it again") from None
    check_conditions(base_dir, trial)
    evals, trains = ([record for record in records if record["kind"] == kind] for kind in ("eval", "train"))
    if evals and evals[-1]["val_bpb"] is None:  # no number: its last step has broken the weights
        evals = []
    counts = last_counts(records)
    growths = [Growth(r["flops"], r["time"], r["loss_before"], r["loss_after"]) for r in records if r["kind"] == "grow"]
    return Result(trial.flags, [r["step"] for r in evals], [r["val_bpb"] for r in evals], [r["flops"] for r in evals],
                  evals[-1]["time"] if evals else 0.0, counts.get("total", 0), _begin(trains), growths, last_evaluations(records), evals[-1].get("tokens", 0) if evals else 0,
                  counts, next((record.get("peak_memory_mib") for record in reversed(records) if record["kind"] == "end"), None) or math.nan,
                  [r["time"] for r in evals])


def last_counts(records: list[dict]) -> dict[str, int]:
    """Parameters by part of the model that a run's log was last of: what it began or was resumed with, or grew to."""
    return next((record["counts"] for record in reversed(records) if record["kind"] in ("start", "grow") and "counts" in record), {})


def last_evaluations(records: list[dict]) -> dict[str, dict]:
    """By key the last result of each: CORE and --eval-tasks write records of their own."""
    return {key: row for record in records if record["kind"] == "evals" for key, row in record["rows"].items()}


def check_conditions(base_dir: str, trial: Trial) -> None:
    """Raises UsageError for a trial that was trained with other text or another tokenizer than those that are in the base directory now, by their names and checksums, or
    computed in another dtype than this machine would: what is compared must not differ in these."""
    folder = folder_of(base_dir, trial)
    try:
        with open(folder / FILENAME, "rb") as f:
            start = parse_json(f.readline())
        had, dtype, device = start["conditions"], start.get("dtype"), str(start.get("device")).split(":")[0]
    except (OSError, ValueError, KeyError, TypeError):  # not begun, or of an earlier version
        return
    if dtype and device in ("cpu", default_device()) and dtype != str(COMPUTE_DTYPE):  # a machine without GPUs may look at the results of those that have some
        raise UsageError(f"the run in {folder} computed in {dtype}, and this machine would in {COMPUTE_DTYPE}; say NANOCHAT_DTYPE={dtype.removeprefix('torch.')} for the others too, "
                         f"or choose another NANOCHAT_BASE_DIR")
    for what, now in (("data", data_source), ("tokenizer", _tokenizer)):
        if what in had and (here := now()) and had[what] != here:
            raise UsageError(f"the run in {folder} is of {'other text (' + str(had[what]) + ')' if what == 'data' else 'another tokenizer'} than is in NANOCHAT_BASE_DIR now; choose another "
                             f"NANOCHAT_BASE_DIR, or {'give the new runs another name' if trial.tag else 'delete that folder, and the same command trains it again'}")


def _tokenizer() -> str:
    """The checksum of the one in the base directory, empty where there is none."""
    path = Path(get_base_dir(), "tokenizer", "tokenizer.pkl")
    return _checksum(str(path), path.stat().st_mtime_ns) if path.exists() else ""


@functools.lru_cache(maxsize=8)
def _checksum(path: str, changed: int) -> str:
    return get_tokenizer().checksum()


def _begin(trains: list[dict]) -> float:
    """FLOPs before the first of these steps."""
    return max(0.0, 2 * trains[0]["flops"] - trains[1]["flops"]) if len(trains) > 1 else 0.0

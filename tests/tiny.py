"""A run that trains in a second: three layers of width 96 on the golden shards with 320 tokens."""
import atexit
import functools
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from nanochat.run_log import read_run_log
from scripts import base_train, tok_train
from tests.golden.fixtures import HERE

ROOT = Path(__file__).parents[1]
MODEL = ["--depth=3", "--aspect-ratio=32", "--head-dim=32", "--max-seq-len=64", "--window-pattern=SL", "--device-type=cpu"]
QUIET = ["--core-metric-every=-1", "--sample-every=-1"]
# two micro-batches per step; the shards are so small that epochs end within the run
FLAGS = [*MODEL, *QUIET, "--device-batch-size=2", "--total-batch-size=256", "--num-iterations=8", "--eval-every=4", "--eval-tokens=512",
         "--save-every=4", "--warmup-steps=2"]
ENV = {"NANOCHAT_DTYPE": "float32", "TORCHDYNAMO_DISABLE": "1"}


def prepare(base_dir, as_they_are: bool = False) -> None:
    """Puts data and tokenizer into a base directory, which must be the one of NANOCHAT_BASE_DIR.

    The golden shards as they are serve three streams at most and make short batches of documents. Unless that is wanted,
    they are written anew with each document twice, in four row groups a file or more.
    """
    shutil.copytree(_prepared(as_they_are), base_dir, dirs_exist_ok=True)


@functools.cache
def _prepared(as_they_are: bool) -> Path:
    """Made once by each process."""
    base_dir = Path(tempfile.mkdtemp(prefix="nanochat-tests-data-"))
    atexit.register(shutil.rmtree, base_dir, ignore_errors=True)
    folder = base_dir / "base_data_climbmix"
    shutil.copytree(HERE / "shards", folder)
    for path in () if as_they_are else folder.glob("*.parquet"):
        table = pa.concat_tables([pq.read_table(path)] * 2)
        pq.write_table(table, path, row_group_size=len(table) // 4)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("NANOCHAT_BASE_DIR", str(base_dir))
        assert tok_train.main(["--vocab-size=320"]) == 0
    return base_dir


def train(*flags: str) -> int:
    """base_train in this process: the exit status. Later flags override the tiny ones."""
    return base_train.main([*FLAGS, *flags])


def train_apart(base_dir, *flags: str) -> None:
    """`prepare` and `train` in a base directory that is not the one of NANOCHAT_BASE_DIR, for tests to share."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("NANOCHAT_BASE_DIR", str(base_dir))
        prepare(base_dir)
        assert train(*flags) == 0


def start(base_dir, *flags: str, ranks: int = 0, script: list[str] | None = None, **env: str) -> subprocess.Popen:
    """base_train (or python with `script`) in a process of its own, with stdout and stderr as text; `ranks`: under torchrun."""
    launcher = [] if not ranks else ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"]
    command = [sys.executable, *launcher, *(script or ["-m", "scripts.base_train"]), *FLAGS, *flags]
    return subprocess.Popen(command, cwd=ROOT, env={**os.environ, **ENV, "NANOCHAT_BASE_DIR": str(base_dir), **env},
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def run(base_dir, *flags: str, **kwargs) -> subprocess.CompletedProcess:
    process = start(base_dir, *flags, **kwargs)
    out, err = ended(process)
    return subprocess.CompletedProcess(process.args, process.returncode, out, err)


def ended(process: subprocess.Popen) -> tuple[str, str]:
    """(stdout, stderr) of a process that ends. One that hangs is killed after a time that even a loaded machine does not need, and does not slow what comes after."""
    try:
        return process.communicate(timeout=1200)
    except subprocess.TimeoutExpired:
        process.kill()
        raise


def folder(base_dir, tag: str = "d3") -> Path:
    return Path(base_dir) / "base_checkpoints" / tag


def losses(base_dir, tag: str = "d3") -> list:
    """What a run measured, step by step, without the timings."""
    return [(record["kind"], record["step"], record.get("raw_loss"), record.get("loss"), record.get("val_bpb"), record.get("epoch"))
            for record in read_run_log(folder(base_dir, tag) / "log.jsonl") if record["kind"] in ("train", "eval")]


def identical(a, b) -> bool:
    """Bit for bit, through nested dicts and lists."""
    if torch.is_tensor(a):
        return torch.is_tensor(b) and a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(identical(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(identical, a, b))
    return a == b


def same_checkpoint(one, other, step: int = 8, ranks: int = 1) -> bool:
    """Do two base directories hold the same weights, optimizer, data position and random states?"""
    names = [f"model_{step:06d}.pt", *(f"{kind}_{step:06d}_rank{rank}.pt" for kind in ("optim", "state") for rank in range(ranks))]
    return all(identical(*(torch.load(folder(base) / name, weights_only=True) for base in (one, other))) for name in names)

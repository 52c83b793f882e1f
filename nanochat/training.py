"""What all trainings share besides the loop (train_loop.py): flags, wandb, and checks before anything is trained: ranks of one mind, a folder that can be written."""
import gc
import os
import shutil
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NamedTuple

import torch

from nanochat.cli import UsageError, flag, int_or_off, step_or_off
from nanochat.common import COMPUTE_DTYPE, DummyWandb, get_base_dir, print0
from nanochat.distributed import check_agreement
from nanochat.files import check_writable, locked
from nanochat.flash_attention import agree_on_kernels
from nanochat.gpt import GPT


@dataclass
class RunSettings:
    """The flags of all trainings."""

    run: str = flag(os.environ.get("WANDB_RUN") or "dummy", "Name of the run for wandb; dummy: no wandb; torchrun takes --run for its own, use WANDB_RUN")
    device_type: str = flag("", "Device to run on: cuda, mps or cpu (default: the best one here)")
    resume_from_step: int = flag(-1, "Step of the checkpoint to continue from; -1: a new run", type=step_or_off)
    resume: bool = flag(False, "Continue from the newest complete checkpoint, or begin if there is none")
    save_every: int = flag(-1, "Steps between checkpoints; -1: only at the end", type=int_or_off)


class Process(NamedTuple):
    """This process among those of a run."""

    rank: int
    world_size: int
    device: torch.device

    @property
    def master(self) -> bool:
        return self.rank == 0

    def alone_in(self, folder: Path) -> AbstractContextManager:
        """Rank 0 holds the folder against other trainings. Raises UsageError where one writes there."""
        return locked(folder, wait=False) if self.master else nullcontext()


class Wandb:
    """A wandb run that may break at any time: from then on the training goes on without it."""

    def __init__(self, run):
        self.run = run

    def _try(self, method: str, *args) -> None:
        try:
            getattr(self.run, method)(*args)
        except Exception as error:
            print0(f"wandb failed ({type(error).__name__}: {str(error).partition(chr(10))[0]}); training goes on without")
            self.run = DummyWandb()

    def log(self, values: dict) -> None:
        self._try("log", values)

    def finish(self) -> None:
        self._try("finish")


def init_wandb(settings: RunSettings, user_config: dict, rank: int, project: str = "nanochat"):
    """A wandb run on rank 0, kept below the base directory; when wandb cannot be reached it stays on disk, and training goes on in any case."""
    if settings.run in ("", "dummy") or rank != 0:
        return DummyWandb()
    folder = os.environ.get("WANDB_DIR") or get_base_dir()
    try:
        import wandb
        patience = wandb.Settings(init_timeout=30)
        try:
            return Wandb(wandb.init(project=project, name=settings.run, config=user_config, settings=patience, dir=folder))
        except Exception as error:
            print0(f"wandb cannot be reached ({type(error).__name__}): the run is logged offline in {folder}/wandb, `wandb sync` uploads it later")
            return Wandb(wandb.init(project=project, name=settings.run, config=user_config, settings=patience, mode="offline", dir=folder))
    except Exception as error:
        print0(f"No wandb ({type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}); training goes on without")
        return DummyWandb()


def check_ranks(settings: RunSettings) -> None:
    """Several ranks must be of one mind, or one would wait for ever for what the others never send. Raises UsageError where they are not."""
    flags = {key: value for key, value in asdict(settings).items() if key != "run"}  # its default is a variable that rank 0's node alone may have
    check_agreement("the flags", flags, "start all nodes with the same command")
    check_agreement("the software", {"torch": torch.__version__, "dtype": str(COMPUTE_DTYPE)}, "install the same on all nodes, or set NANOCHAT_DTYPE on all")
    agree_on_kernels()


def check_output(folder: Path, models: Sequence[GPT], master: bool) -> None:
    """Fails before the training instead of after it. Raises UsageError if a checkpoint of each of these models cannot be written to `folder`."""
    check_writable(folder)
    for unfinished in folder.glob(".*.tmp") if master else ():  # a kill while saving leaves them
        unfinished.unlink()
    needed = sum(3 * p.numel() * p.element_size() for model in models for p in model.parameters())  # weights and at most two moments
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise UsageError(f"{'a checkpoint needs' if len(models) == 1 else f'{len(models)} checkpoints, one before each growth and the last, need'} "
                         f"{needed / 2**20:,.0f} MiB, {folder} has {free / 2**20:,.0f} MiB free; make room or move NANOCHAT_BASE_DIR")


def collect_garbage_rarely(step: int, first_step: int) -> None:
    """To be called after each step. The collector's pauses cost up to half a second each: what lives after the first step is taken
    out of its sight, and it runs rarely."""
    if step == first_step + 1:
        gc.collect()
        gc.freeze()
        gc.disable()
    elif step % 5000 == 0:
        gc.collect()

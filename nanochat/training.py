"""What the loop of all trainings (train_loop.py) stands on.

* common flags, wandb, a check that checkpoints can be written before anything is trained
* exact resume: all that is neither in the model nor in the optimizer
* gradient accumulation in passes that fit into memory: where it runs out, passes are halved and the step is repeated
"""
import gc
import itertools
import os
import random
import shutil
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed as dist

from nanochat import compiler, kernel_choice
from nanochat.checkpoint_manager import list_steps, load_meta
from nanochat.cli import UsageError, flag, int_or_off, is_out_of_memory, step_or_off
from nanochat.common import COMPUTE_DTYPE, DummyWandb, get_base_dir, is_ddp_initialized, print0
from nanochat.distributed import check_agreement
from nanochat.files import check_writable, locked
from nanochat.flash_attention import agree_on_kernels
from nanochat.gpt import GPT
from nanochat.objectives import Loss, cross_entropy
from nanochat.optim import MuonAdamW
from nanochat.run_log import FILENAME, last_of_each_kind, read_run_log


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


# -----------------------------------------------------------------------------
# Exact resume


def find_resume_step(settings: RunSettings, folder: Path) -> int | None:
    """The step to continue from, or None for a new run. Raises UsageError if the ranks do not see the same checkpoints."""
    if settings.resume_from_step >= 0:
        return settings.resume_from_step
    steps = steps_of_last_run(folder) if settings.resume else list_steps(folder)
    check_agreement(f"the checkpoints in {folder}", steps if settings.resume else None, "all nodes need the same NANOCHAT_BASE_DIR, on a file system that they share")
    if settings.resume and steps:
        return steps[-1]
    if settings.resume and (others := list_steps(folder)):
        raise UsageError(f"the run that {folder / FILENAME} tells of has saved nothing yet, and the checkpoints there are of another one (last step {others[-1]}): "
                         f"go on with that by --resume-from-step={others[-1]}, or begin anew without --resume")
    if settings.resume:
        print0(f"Nothing to resume in {folder}: a new run begins")
    elif steps:
        print0(f"{folder} holds checkpoints of another run (last step {steps[-1]}): this one replaces those of the same steps only; "
               "delete them, or keep both apart with --model-tag")
    return None


def is_left_by(folder: Path, step: int, run_id: str) -> bool:
    """Whether a checkpoint is of that run; also where it is damaged, so that whoever takes it up says so."""
    try:
        return load_meta(folder, step).get("run_id") == run_id
    except UsageError:
        return True


def steps_of_last_run(folder: Path) -> list[int]:
    """Of its checkpoints: later ones may be left of a run that this one has replaced, or of what came after an earlier step that it went back to.

    The log tells which run is the last, and where it began; without one (nanochat's own) all checkpoints are its.
    """
    steps = list_steps(folder)
    try:
        begun = last_of_each_kind(read_run_log(folder / FILENAME))["start"]
        run_id = begun["run_id"]
    except (UsageError, KeyError):
        return steps
    own = [step for step in steps if is_left_by(folder, step, run_id)]
    return own or [step for step in steps if step == begun.get("resumed")]


def check_same(then: dict, now: dict) -> None:
    """Raises UsageError for a checkpoint of other settings than those of now, which the continued run would mix."""
    if differing := [f"{key} {then[key]} -> {value}" for key, value in now.items() if then[key] != value]:
        raise UsageError(f"the checkpoint was written with other settings: {', '.join(differing)}; give those of then, or start a new run")


def get_exact_state(device: torch.device, scaler) -> dict:
    """Random states, the loss scaler's state, and what rounds differently: the kernels, and whether the model is compiled."""
    rng = {"python": list(random.getstate()[1]), "cpu": torch.get_rng_state()}
    if device.type == "cuda":
        rng["cuda"] = torch.cuda.get_rng_state(device)
    return dict(rng=rng, scaler=scaler.state_dict() if scaler else None, kernels=kernel_choice.state(), compiled=compiler.state())


def set_exact_state(state: dict, device: torch.device, scaler) -> None:
    rng = state["rng"]
    random.setstate((3, tuple(rng["python"]), None))
    torch.set_rng_state(rng["cpu"].cpu())
    if device.type == "cuda" and "cuda" in rng:
        torch.cuda.set_rng_state(rng["cuda"].cpu(), device)
    if scaler and state.get("scaler"):
        scaler.load_state_dict(state["scaler"])
    kernel_choice.restore(state.get("kernels"))


# -----------------------------------------------------------------------------
# One optimizer step, in passes that fit into memory


def release_memory(device: torch.device) -> None:
    """Gives back what nothing refers to any longer, after a growth or a failed attempt."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def fit_device_batch(model: GPT, rows: int, sequence_len: int) -> int:
    """The most rows per pass that fit, found by trying: the divisors of `rows` (this rank's rows per step), largest first.

    On a CPU memory is not the limit: about 8,192 tokens per pass keep both cores and caches busy.
    """
    device = model.get_device()
    if device.type == "cpu":
        best = max(1, 8192 // sequence_len)
        return next(n for n in range(min(best, rows), 0, -1) if rows % n == 0)
    # what the optimizer will need on top: two moments at most, and the gathered updates
    reserve_bytes = sum(3 * p.numel() * p.element_size() for p in model.parameters())
    for n in (n for n in range(rows, 0, -1) if rows % n == 0):
        try:
            reserve = torch.empty(reserve_bytes, dtype=torch.uint8, device=device)
            tokens = torch.zeros(n, sequence_len, dtype=torch.long, device=device)
            model(tokens, tokens).backward()
            fits = True
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            fits = False
        finally:
            reserve = tokens = torch.empty(0)  # noqa: F841 (frees the memory)
            model.zero_grad(set_to_none=True)
            release_memory(device)
        if fits:
            break
    else:
        raise UsageError("not even one row fits in this device's memory; lower --depth or --max-seq-len")
    if is_ddp_initialized():
        smallest = torch.tensor(n, device=device)
        dist.all_reduce(smallest, op=dist.ReduceOp.MIN)
        n = int(smallest)
    return n


class Accumulator:
    """Forward and backward over the batches of one step, in passes of as many rows as fit."""

    def __init__(self, model, raw_model: GPT, scaler, loss: Loss = cross_entropy):
        self.model, self.raw_model, self.scaler, self.loss = model, raw_model, scaler, loss
        self.rows: int | None = None  # rows per pass, None: whole batches

    def __call__(self, batches: Iterator, count: int) -> list[torch.Tensor]:
        """Adds up the gradient of the mean loss of `count` batches (objectives.py); returns the loss of each.

        Batches are drawn one by one, so that reading the next overlaps with the device's work. When memory runs out,
        the step starts again with the same batches and half the rows per pass.
        """
        drawn: list = []
        batches = iter(batches)

        def draw():
            while True:
                try:
                    batch = next(batches, None)
                except RuntimeError as error:
                    if not is_out_of_memory(error):
                        raise
                    raise UsageError("out of memory while the batches of a step were made (in chat_rl: answers sampled); lower --device-batch-size") from None
                if batch is None:
                    return
                drawn.append(batch)
                yield batch

        rest = draw()
        while True:
            try:
                return [self._one(batch, count) for batch in itertools.chain(tuple(drawn), rest)]
            except RuntimeError as error:
                if not is_out_of_memory(error):
                    raise
                rows = self.rows or drawn[-1][0].size(0)
                if rows == 1:
                    raise UsageError("out of memory with one row per pass; lower --depth or --max-seq-len") from None
                self.rows = -(-rows // 2)
            self.raw_model.zero_grad(set_to_none=True)
            release_memory(self.raw_model.get_device())
            print(f"Out of memory: {self.rows} rows per pass from here on, the same batches", flush=True)

    def _one(self, batch: tuple[torch.Tensor, ...], count: int) -> torch.Tensor:
        """Adds the gradient of the mean loss over one batch's targets, divided by `count`; returns that mean."""
        rows = self.rows or batch[0].size(0)
        trained = (batch[1] >= 0).sum().clamp(min=1)
        loss = torch.zeros((), device=batch[0].device)
        for piece in zip(*(tensor.split(rows) for tensor in batch), strict=True):
            mean = self.loss(self.model, *piece) / trained
            (self.scaler.scale(mean / count) if self.scaler else mean / count).backward()
            loss = loss + mean.detach()
        return loss


def optimizer_step(optimizer: MuonAdamW, scaler) -> None:
    """Raises UsageError when memory runs out: the activations are gone by now, so fewer rows per pass would not help."""
    try:
        _optimizer_step(optimizer, scaler)
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        raise UsageError("out of memory in the optimizer's step: this device is too small for the weights, their gradients and the optimizer's state; "
                         "lower --depth, or share the state among more ranks") from None


def _optimizer_step(optimizer: MuonAdamW, scaler) -> None:
    if scaler is None:
        optimizer.step()
        return
    scaler.unscale_(optimizer)
    if is_ddp_initialized():  # every rank skips the step, or none
        for found_inf in scaler._found_inf_per_device(optimizer).values():
            dist.all_reduce(found_inf, op=dist.ReduceOp.MAX)
    scaler.step(optimizer)
    scaler.update()

"""The loop that all trainings share: steps, and what happens between them.

    text ─ loader ─▶ batch ─ loss(model, batch) ─▶ loss ─ accumulate ─▶ optimizer ─▶ next step
                                                              every n steps: save, validate, evaluate, sample, grow

`TrainLoop` is subclassed by what is trained (scripts/base_train.py, chat_sft.py, chat_rl.py), which says what its batches are, how its schedule runs,
what it measures between the steps and what its checkpoints hold besides the model.

Notable:
* What is essential comes first: a checkpoint is written before anything is evaluated on it, and completed afterwards.
* A killed run continues bit-identically (CPU): model, optimizer, position in the data, random states, kernels, schedule.
* Compilation does not count as training time: neither the first steps do, nor those after a resume or a growth.
"""
import gc
import math
import sys
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any, NamedTuple

import torch

from nanochat import checkpoint_manager as checkpoints
from nanochat.accumulation import Accumulator, optimizer_step, release_memory
from nanochat.cli import UsageError, is_out_of_memory
from nanochat.common import (
    COMPUTE_DTYPE,
    COMPUTE_DTYPE_REASON,
    autodetect_device_type,
    compute_cleanup,
    compute_init,
    get_peak_flops,
    live_line,
    print0,
    with_progress,
)
from nanochat.gpt import GPT
from nanochat.loss_eval import evaluate_bpb
from nanochat.objectives import Loss, cross_entropy
from nanochat.optim import MuonAdamW
from nanochat.report import get_report
from nanochat.resume import get_exact_state, is_left_by, set_exact_state
from nanochat.run_log import FILENAME, RunLog
from nanochat.training import Process, RunSettings, check_ranks, collect_garbage_rarely, init_wandb

UNTIMED_STEPS = 10  # at the beginning of a run: caches fill, and kernels are compiled


@contextmanager
def training_process(settings: RunSettings) -> Iterator[Process]:
    """Joins the other ranks, and leaves them at the end. Raises UsageError where they are not of one mind."""
    _, rank, _, world_size, device = compute_init(settings.device_type or autodetect_device_type())
    try:
        print0(f"Compute dtype: {COMPUTE_DTYPE} ({COMPUTE_DTYPE_REASON})")
        check_ranks(settings)
        yield Process(rank, world_size, device)
    finally:
        compute_cleanup()


class Event(NamedTuple):
    """Something that happens every so many steps, and at the end; never where `every` is below 1."""

    every: int
    action: Callable[[], None]
    at_start: bool = False
    at_end: bool = True


class TrainLoop:
    """One run: what its steps share, and what each leaves to the next.

    A subclass calls `set_model` with the model and the optimizer, `restore` if it continues a run, and `run`. It says what a step is made of
    (`batches`, `schedule`, `done`), what is validated (`validation_batches`) and kept (`meta_data`, `data_position`), and lists its `events`.
    """

    loss: Loss = staticmethod(cross_entropy)
    project = "nanochat"  # of wandb
    section: str  # title in the report
    advice = "lower the learning rates (--matrix-lr, --embedding-lr) or resume an earlier checkpoint"  # to those whose run diverges
    wandb_every = 100  # steps
    first_number = 0  # of the steps as they are shown: the number of a step, or (1) how many are done
    digits = 6  # of the validation loss
    mfu_name = "bf16_mfu"

    settings: RunSettings
    model: GPT
    optimizer: MuonAdamW

    def __init__(self, settings: RunSettings, process: Process, folder: Path, user_config: dict):
        self.settings, self.folder, self.user_config = settings, folder, user_config
        self.rank, self.world_size, self.device = process
        self.gpu_peak_flops = get_peak_flops(torch.cuda.get_device_name(self.device)) if self.device.type == "cuda" else float("inf")
        self.scaler = torch.amp.GradScaler(self.device.type) if COMPUTE_DTYPE == torch.float16 else None
        self.report = get_report()
        self.events: list[Event] = []
        self.eval_every = self.eval_steps = -1
        self.resume_step: int | None = None
        self.saved_step: int | None = None
        # what the loop carries from step to step
        self.run_id = uuid.uuid4().hex  # shared by all checkpoints of one run, however often it was resumed
        self.step = self.first_step = 0
        self.val_bpb: float | None = None
        self.min_val_bpb = float("inf")
        self.smooth_train_loss = 0.0
        self.total_training_time = 0.0  # seconds
        self.stage_time, self.stage_flops, self.pace = 0.0, 0, 0.0  # of the timed steps of this model; seconds per FLOP
        self.flops = 0
        self.mfu = 0.0

    # -- what a subclass says

    accumulation: int  # batches per step
    total_batch_size: int  # tokens per step
    token_bytes: torch.Tensor

    @property
    def done(self) -> bool:
        raise NotImplementedError

    def batches(self) -> Iterator[tuple[torch.Tensor, ...]]:
        """Those of one step, in passes of this rank."""
        raise NotImplementedError

    def schedule(self) -> float:
        """Sets the hyper-parameters of the optimizer's groups for this step; returns the multiplier of the learning rates."""
        raise NotImplementedError

    def validation_batches(self) -> Iterator:
        raise NotImplementedError

    def meta_data(self) -> dict:
        raise NotImplementedError

    def data_position(self) -> dict:
        """Where the data go on after a resume: behind the last batch trained on. The one in hand is read again."""
        raise NotImplementedError

    def progress(self) -> float:
        """The share of the run that is done, from 0 to 1."""
        raise NotImplementedError

    def shown_progress(self) -> float:
        """The share that stands in a step's line."""
        return min(1.0, self.progress())

    def of_how_many(self) -> str:
        """What stands behind the number of a step, where the last one is known."""
        return ""

    def data_facts(self) -> dict[str, Any]:
        """What a step's line tells about the data, by name; the log keeps the epoch of it."""
        return {}

    def step_record(self) -> dict[str, Any]:
        """What a step's record tells besides what all trainings tell."""
        return {}

    def between_steps(self) -> None:
        """Last thing before a step."""

    def final_report(self, peak_memory: float) -> list[dict]:
        raise NotImplementedError

    # -- setting up

    def set_model(self, model: GPT, optimizer: MuonAdamW, compiled: Any) -> None:
        """Goes on with this model; `compiled` is what is called in training."""
        self.model, self.optimizer = model, optimizer
        # on a CPU compiling a second, gradient-free graph takes longer than most evaluations
        self.eval_model = compiled if self.device.type == "cuda" else model
        self.flops_per_token = model.estimate_flops()
        self.stage_time, self.stage_flops = 0.0, 0  # the pace is that of the model before until this one's is known
        self.accumulate = Accumulator(compiled, model, self.scaler, self.loss)

    def restore(self, meta: dict, train_state: dict | None) -> None:
        """Takes up the loop where a checkpoint left it. Raises UsageError for a meta file of something else."""
        try:
            self.step, self.val_bpb, loop_state = meta["step"], meta["val_bpb"], meta["loop_state"]
            self.min_val_bpb = loop_state["min_val_bpb"] if loop_state["min_val_bpb"] is not None else float("inf")
            self.smooth_train_loss, self.total_training_time = loop_state["smooth_train_loss"], loop_state["total_training_time"]
            self.flops = loop_state.get("flops", self.flops_per_token * self.tokens)
        except (KeyError, TypeError) as error:
            raise UsageError(f"{self.folder}/meta_{meta.get('step', 0):06d}.json is corrupt or not of such a run ({error}); use another step") from error
        if train_state is not None:
            set_exact_state(train_state, self.device, self.scaler)
        self.first_step = self.step
        if self.resume_step is not None:
            self.go_on_with(meta)

    def go_on_with(self, meta: dict) -> None:
        """Makes this the run that has left the checkpoint; another one if that has left later ones too, which are given up."""
        run_id = meta.get("run_id", self.run_id)
        assert self.resume_step is not None
        if not any(is_left_by(self.folder, step, run_id) for step in checkpoints.list_steps(self.folder) if step > self.resume_step):
            self.run_id = run_id

    def loop_state(self) -> dict:
        """What `restore` takes up, for the meta data."""
        return dict(min_val_bpb=self.min_val_bpb if math.isfinite(self.min_val_bpb) else None, smooth_train_loss=self.smooth_train_loss,
                    total_training_time=self.total_training_time)

    def open_log(self, **facts) -> None:
        """Begins the run's log, of which a resumed run keeps what is before its first step, and that of wandb."""
        self.log = RunLog(self.folder / FILENAME if self.rank == 0 else None, resume_step=None if self.resume_step is None else self.first_step)
        self.wandb_run = init_wandb(self.settings, self.user_config, self.rank, project=self.project)
        self.log.log("start", self.step, run_id=self.run_id, resumed=self.resume_step, config=self.user_config, **facts, device=str(self.device), dtype=str(COMPUTE_DTYPE), world_size=self.world_size)

    # -- between the steps

    @property
    def tokens(self) -> int:
        return self.step * self.total_batch_size

    def spent(self) -> dict:
        return dict(tokens=self.tokens, flops=self.flops, time=self.total_training_time)

    def log_wandb(self, **values: Any) -> None:
        self.wandb_run.log({"step": self.step, "total_training_flops": self.flops, "total_training_time": self.total_training_time, **values})

    @contextmanager
    def evaluating(self):
        self.model.eval()
        with self.as_evaluated():
            yield
        self.model.train()

    def as_evaluated(self):
        """A context in which the model computes as it will be used."""
        return nullcontext()

    def measure(self, steps: int) -> float:
        """Bits per byte on the first `steps` validation batches of every rank."""
        with self.evaluating():
            return evaluate_bpb(self.eval_model, with_progress(self.validation_batches(), steps, "Validation"), steps, self.token_bytes)

    def validate(self) -> None:
        self.val_bpb = self.measure(self.eval_steps)
        if math.isnan(self.val_bpb):  # of the last step's weights there is no training loss any more
            raise UsageError(f"the validation loss after step {self.step} is {self.val_bpb}: training diverged; {self.advice}")
        self.min_val_bpb = min(self.min_val_bpb, self.val_bpb)
        print0(f"Step {self.step:05d} | Validation bpb: {self.val_bpb:.{self.digits}f}")
        self.log.log("eval", self.step, val_bpb=self.val_bpb, **self.spent())
        self.log_wandb(**{"val/bpb": self.val_bpb})

    @property
    def checkpoint_step(self) -> int:
        """The step that a checkpoint written now is named after."""
        return self.step

    def whole_meta_data(self) -> dict:
        return self.meta_data() | dict(run_id=self.run_id)

    def save(self) -> None:
        self.saved_step = self.checkpoint_step
        exact = dict(**self.data_position(), **get_exact_state(self.device, self.scaler))
        checkpoints.save_checkpoint(self.folder, self.saved_step, self.model.state_dict(), self.optimizer.state_dict(), self.whole_meta_data(),
                                    rank=self.rank, train_state=exact)

    # -- one step

    def train_step(self) -> None:
        synchronize = torch.cuda.synchronize if self.device.type == "cuda" else lambda: None
        synchronize()
        started = time.perf_counter()
        losses = self.accumulate(self.batches(), self.accumulation)
        multiplier = self.schedule()
        optimizer_step(self.optimizer, self.scaler)
        self.model.zero_grad(set_to_none=True)
        raw_loss = losses[-1].item()  # waits for the device
        synchronize()
        dt = time.perf_counter() - started
        if not math.isfinite(raw_loss):
            raise UsageError(f"the loss of step {self.step} is {raw_loss}: training diverged; {self.advice}")
        self.smooth_train_loss = 0.9 * self.smooth_train_loss + 0.1 * raw_loss
        flops = self.flops_per_token * self.total_batch_size
        if self.step > UNTIMED_STEPS and self.step != self.first_step:
            self.total_training_time += dt
            self.stage_time, self.stage_flops = self.stage_time + dt, self.stage_flops + flops
            self.pace = self.stage_time / self.stage_flops if self.stage_flops else 0.0  # the steps of chat_rl count no tokens
        self.flops += flops
        self.tell_step(losses, multiplier, dt)
        self.step += 1

    def tell_step(self, losses: list[torch.Tensor], multiplier: float, dt: float) -> None:
        """The line and the records of a step that took `dt` seconds."""
        debiased = self.smooth_train_loss / (1 - 0.9 ** (self.step + 1))
        speed = self.total_batch_size / dt  # tokens/s
        self.mfu = 100 * self.flops_per_token * speed / (self.gpu_peak_flops * self.world_size)
        progress, number, facts = self.progress(), self.step + self.first_number, self.data_facts()
        # FLOPs of the models to come are taken to last as long as this one's; they are rather faster, so the time left does not climb at a growth
        eta = f" | eta: {self.pace * self.flops * max(0.0, 1 / progress - 1) / 60:.1f}m" if self.pace and progress > 0 else ""
        live_line(f"step {number:05d}{self.of_how_many()} ({100 * self.shown_progress():.2f}%) | loss: {debiased:.6f} | lrm: {multiplier:.2f} | dt: {dt * 1000:.2f}ms | "
                  f"tok/sec: {int(speed):,} | {self.mfu_name}: {self.mfu:.2f} | {' '.join(f'{name}: {value}' for name, value in facts.items())} | "
                  f"total time: {self.total_training_time / 60:.2f}m{eta}")
        self.log.log("train", self.step, loss=debiased, raw_loss=losses[-1].item(), lrm=multiplier, dt=dt, tok_per_sec=int(speed), mfu=self.mfu,
                     epoch=facts.get("epoch"), **self.step_record(), **(self.spent() | dict(tokens=self.tokens + self.total_batch_size)))
        if number % self.wandb_every == 0:
            self.log_wandb(**{"step": number, "train/loss": debiased, "train/lrm": multiplier, "train/dt": dt, "train/tok_per_sec": int(speed), "train/mfu": self.mfu,
                                      "train/epoch": facts.get("epoch")})

    # -- the whole run

    def due(self, every: int, at_start: bool = False) -> bool:
        return every > 0 and (self.done or self.step % every == 0 and (at_start or self.step > 0))

    def must_save(self) -> bool:
        at = self.checkpoint_step
        every = self.settings.save_every
        return at != self.saved_step and (self.done or (every > 0 and at > 0 and at % every == 0))

    def must_validate(self) -> bool:
        return self.due(self.eval_every, at_start=True)

    def take_place(self, event: Event) -> None:
        """What does not fit into memory beside the training is left out; not with several ranks, as the others would wait for it, nor at the end, where nothing is lost."""
        try:
            event.action()
        except RuntimeError as error:
            if not is_out_of_memory(error) or self.world_size > 1 or self.done:
                raise
            self.model.zero_grad(set_to_none=True)
            self.model.train()
            print0(f"Step {self.step:05d} | Out of memory in an evaluation: it is left out; a checkpoint can be evaluated by itself")
        else:
            return
        release_memory(self.device)  # here, as the error holds on to what it was raised in

    def run(self) -> None:
        while True:
            saving, validating = self.must_save(), self.must_validate()
            if saving:
                if validating:
                    self.val_bpb = None  # that of this model is not known yet
                self.save()  # first: whatever happens to the evaluations, the weights are there
            if validating:
                completing = saving or (self.step == self.resume_step and self.val_bpb is None)  # the run before ended in its validation
                self.validate()
                if completing and self.rank == 0:
                    checkpoints.save_meta(self.folder, self.checkpoint_step, self.whole_meta_data())
            for event in self.events:
                if self.due(event.every, event.at_start) and (event.at_end or not self.done):
                    self.take_place(event)
            if self.done:
                break
            self.between_steps()
            self.train_step()
            collect_garbage_rarely(self.step, self.first_step)
        gc.unfreeze()
        gc.enable()
        self.finish()

    def finish(self) -> None:
        """The last words: log, report, wandb."""
        peak_memory = peak_memory_mib(self.device)
        print0(f"Peak memory usage: {peak_memory:.2f}MiB")
        print0(f"Total training time: {self.total_training_time / 60:.2f}m")
        if math.isfinite(self.min_val_bpb):
            print0(f"Minimum validation bpb: {self.min_val_bpb:.{self.digits}f}")
        self.log.log("end", self.step, min_val_bpb=self.min_val_bpb, total_training_time=self.total_training_time, total_flops=self.flops, peak_memory_mib=peak_memory)
        self.report.log(section=self.section, data=[self.user_config, *self.final_report(peak_memory)])
        self.log.close()
        self.wandb_run.finish()


def peak_memory_mib(device: torch.device) -> float:
    """Of the device, or without one of this process; 0 where the system does not tell."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2 ** 20
    if sys.platform == "win32":
        return 0.0
    import resource
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2 ** 20 if sys.platform == "darwin" else 2 ** 10)

"""Pretrains a base model.

    python -m scripts.base_train --depth=4 --max-seq-len=512 --device-batch-size=-1 --num-iterations=500
    torchrun --nproc_per_node=8 -m scripts.base_train --depth=20

Depth is the one dial; recipe.py says what follows from it. Checkpoints, the run log and all else go below NANOCHAT_BASE_DIR.
A killed run continues with `--resume` bit-identically (CPU): model, optimizer, data position, random states, schedule.
"""
import os

os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")  # before torch is imported

import sys
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch

from nanochat import checkpoint_manager as checkpoints
from nanochat import compiler, evaluations, flash_attention, origin
from nanochat.accumulation import release_memory
from nanochat.cli import (
    UsageError,
    command,
    flag,
    folder_name,
    int_or_off,
    parse_settings,
)
from nanochat.common import autodetect_device_type, get_base_dir, print0, print_banner
from nanochat.dataloader import TrainingData, batches_in_turn
from nanochat.dataset import data_source
from nanochat.distributed import agreed, attempt, check_agreement, share_weights
from nanochat.engine import Engine
from nanochat.evals.results import Results, forget_results, headlines, write_results
from nanochat.evaluations import EvaluationSettings, Subject, requests
from nanochat.fp8 import RECIPES, Float8LinearConfig, convert_to_float8_training, disable_fp8, worth_converting
from nanochat.gpt import GPT
from nanochat.growth import family
from nanochat.growth.controller import GrowthSettings
from nanochat.growth.optimizer import leave_out_frozen
from nanochat.layered_gpt import empty_gpt
from nanochat.loss_eval import FirstBatches
from nanochat.objectives import OBJECTIVES
from nanochat.optim import MuonAdamW
from nanochat.origin import as_json
from nanochat.recipe import HorizonSettings, scaling_params
from nanochat.resume import check_same, find_resume_step
from nanochat.run_log import FILENAME
from nanochat.run_plan import PlanSettings, RunPlan, show_memory
from nanochat.run_report import TrainingRun
from nanochat.schedules import Branch, Now, ScheduleSettings
from nanochat.tokenizer import get_token_bytes, get_tokenizer
from nanochat.train_loop import Event, TrainLoop, training_process
from nanochat.training import Process, check_output

# flags that a growing run has made something of that its checkpoints hold
SET_BY_GROWTH = {field.name for settings in (GrowthSettings, HorizonSettings, ScheduleSettings) for field in fields(settings)} - {"grow_family", "device_batch_size"}


@dataclass
class Settings(PlanSettings, EvaluationSettings):
    fp8: bool = flag(False, "Multiply matrices in FP8 (CUDA compute capability 8.9 and newer)")
    fp8_recipe: str = flag("tensorwise", "How FP8 numbers are scaled", choices=RECIPES)
    grow_plan: bool = flag(False, "Print the stages of growth and end")
    memory: bool = flag(False, "Print what a training step of each stage takes, also on a device that is not here, and end")
    core_metric_every: int = flag(2000, "Steps between evaluations on CORE; -1: never", type=int_or_off)
    core_metric_max_per_task: int = flag(500, "Rows of each task of CORE; -1: all", type=int_or_off)
    eval_tasks: list[str] | None = flag(None, "Further evaluations in the course of the training, as for base_eval --eval, such as blimp:10,core:50", type=requests)
    eval_tasks_every: int = flag(2000, "Steps between them; -1: never", type=int_or_off)
    sample_every: int = flag(2000, "Steps between samples; -1: never", type=int_or_off)
    model_tag: str | None = flag(None, "Name of the checkpoint folder (default: d<depth>)", type=folder_name)


def parse(argv) -> Settings:
    """The flags, of which a branch takes its trunk's as defaults. Raises UsageError for those that contradict each other."""
    settings = parse_settings(Settings, argv, "Pretrain a base model")
    settings.check_origin()
    trunk = origin.inherited(Settings, settings.branch_from.meta()) if settings.branch_from else {}
    first = settings.origin_config()
    normalized = settings.block == "ngpt" if first is None else first.normalized
    if normalized and trunk.get("block") != "ngpt":  # it did not know that it was
        trunk = {name: value for name, value in trunk.items() if name not in ("weight_decay", "warmup_steps")}
    if defaults := (dict(weight_decay=0.0, warmup_steps=0) if normalized else {}) | trunk:
        settings = parse_settings(Settings, argv, "Pretrain a base model", **defaults)
    if settings.branch_from:
        settings.check_branch(trunk)
    if normalized and settings.weight_decay:
        raise UsageError(f"--weight-decay={settings.weight_decay:g} means nothing for --block=ngpt, whose weights are put back to length 1 after every step; "
                         "leave it out")
    if settings.grow_family:
        settings.path()  # there must be one
        if not 0 < settings.warmdown_ratio < 1:
            raise UsageError(f"--grow-family needs rates that fall at the end; give --warmdown-ratio a share between 0 and 1, not {settings.warmdown_ratio:g}")
    return settings


@command
def main(argv=None) -> None:
    settings = parse(argv)
    print_banner()
    if settings.memory:
        show_memory(settings, settings.device_type or autodetect_device_type())
        if settings.fp8:
            print0("Counted without FP8")
        return
    with training_process(settings) as process:
        if settings.grow_plan:
            Pretraining(settings, process)
        elif not settings.grow_family:
            train(settings, process)
        else:
            folder, last = train(family.trunk(settings), process)
            for branch in family.branches(settings, folder, last):
                train(branch, process)
            print0(TrainingRun(folder / FILENAME).branches_table())


def train(settings: Settings, process: Process) -> tuple[Path, int]:
    """The folder of the run and its last step."""
    release_memory(process.device)  # that of a run before is to be forgotten
    if process.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    training = Pretraining(settings, process)
    with process.alone_in(training.folder):
        training.start()
        training.run()
    agreed(None)  # rank 0 has written all that the others may want to read
    return training.folder, training.step


class Pretraining(TrainLoop):
    section = "Base model training"
    settings: Settings

    def __init__(self, settings: Settings, process: Process):
        super().__init__(settings, process, Path(), {field.name: as_json(getattr(settings, field.name)) for field in fields(settings)})
        if self.device.type == "cuda":
            print0(f"Attention: {flash_attention.describe()}")
        self.tokenizer = get_tokenizer()
        check_agreement("the tokenizer", self.tokenizer.checksum(), "all nodes need the same files below NANOCHAT_BASE_DIR")
        self.token_bytes = get_token_bytes(device=self.device)
        self.plan = plan = RunPlan(settings, self.tokenizer.get_vocab_size(), process)
        self.settings, self.model, self.horizon, self.growth, self.budget = plan.settings, plan.model, plan.horizon, plan.growth, plan.budget  # type: ignore[assignment]
        del plan.model  # or it would stay when the run has grown out of it
        self.growth_history: list[dict] = []  # of a model that does not grow in this run
        self.total_batch_size, self.accumulation = plan.horizon.total_batch_size, plan.passes
        self.eval_every, self.eval_steps = settings.eval_every, plan.eval_steps
        objective = OBJECTIVES[settings.objective]
        self.loss = objective.loss
        self.prepare = objective.prepare(self.tokenizer, settings)
        self.prepare_validation = objective.prepare(self.tokenizer, replace(settings, masking="static", causal_share=1.0))
        self.rows = self.tokenizer, plan.rows, self.settings.max_seq_len  # what batches are made of
        self.my_streams = range(self.rank, plan.streams, self.world_size)
        self.validation = FirstBatches(self.draw_validation, self.eval_steps if self.eval_every > 0 else plan.check_steps, plan.rows * self.settings.max_seq_len)
        depth = self.growth.stages[-1].shape.depth if self.growth else self.model.config.n_layer
        self.folder = Path(get_base_dir(), "base_checkpoints", settings.model_tag or (str(settings.branch_from) if settings.branch_from else f"d{depth}"))
        settings.check_folder(self.folder)

    # -- before the first step

    def start(self) -> None:
        """The state before the first step: that of a new run, or that of a checkpoint."""
        settings, horizon = self.settings, self.horizon
        models = [empty_gpt(stage.config) for stage in self.growth.stages] if self.growth else [self.model]  # a growing run writes one of each stage at least
        check_output(self.folder, models, self.rank == 0)
        self.resume_step = self.saved_step = find_resume_step(settings, self.folder)
        meta = train_state = None
        moments: tuple[Path, int] | None = None  # the checkpoint whose optimizer goes on
        if self.resume_step is not None:
            moments = self.folder, self.resume_step
            meta, train_state = self.load(*moments)
            if not self.by_flops and self.resume_step > horizon.num_iterations:
                raise UsageError(f"the checkpoint of step {self.resume_step} is beyond the horizon of {horizon.num_iterations} steps; raise it to train on")
        elif settings.branch_from:
            self.saved_step = settings.branch_from.meta()["step"]
            moments = settings.branch_from.folder, self.saved_step
            meta, train_state = self.load(*moments)
        elif settings.init_from:
            begin = settings.init_from.folder, settings.init_from.meta()["step"]
            self.load(*begin)
            if settings.init_optimizer == "keep":
                moments = begin
        share_weights(self.model)
        core_every, sample_every = settings.core_metric_every, settings.sample_every
        if not self.model.config.causal and max(core_every, sample_every) > 0:
            print0("No samples and no CORE metric in this run: a model that looks both ways does not tell the next token")
            core_every = sample_every = -1
        if core_every > 0:
            missing = attempt(lambda: evaluations.core_bundle(self.subject()))
            if missing and settings.eval_bundle:
                raise missing
            if missing:
                print0(f"No CORE metric in this run: {missing}")
                core_every = -1
            else:
                evaluations.check_core(self.subject(), None)  # bad data shows now, not at the first evaluation
        self.chosen = evaluations.choose(settings.eval_tasks or (), self.model)
        evaluations.check(self.chosen, self.subject())
        self.core_metric: float | None = None
        self.events = [Event(core_every, self.measure_core), Event(settings.eval_tasks_every if self.chosen else -1, self.evaluate), Event(sample_every, self.sample)]

        self.optimizer_setup: dict[str, Any] = dict(
            unembedding_lr=settings.unembedding_lr * horizon.lr_scale, embedding_lr=settings.embedding_lr * horizon.lr_scale,
            matrix_lr=settings.matrix_lr * horizon.lr_scale, weight_decay=self.plan.weight_decay, scalar_lr=settings.scalar_lr * horizon.lr_scale,
            matrix_optimizer=settings.matrix_optimizer)
        optimizer = leave_out_frozen(self.model.setup_optimizer(**self.optimizer_setup))
        if moments is not None:
            checkpoints.load_optimizer(*moments, optimizer, self.rank, self.world_size)
        # checkpoints that do not say so were trained compiled
        compiler.decide(self.device.type, self.budget / self.world_size, None if train_state is None else train_state.get("compiled", True))
        self.use_model(self.model, optimizer)

        # Data, at the exact position where the checkpoint left it
        positions = None
        if train_state is not None:
            positions = train_state["loader_states"]
            if len(positions) != len(self.my_streams):
                raise UsageError(f"the checkpoint was written with --data-streams={len(positions) * self.world_size}, not {self.plan.streams}; use the same number")
        elif meta is not None:
            positions = [meta["dataloader_state_dict"]] * len(self.my_streams)
            print0("The checkpoint has no exact data position (nanochat's own): some documents may be seen twice or skipped")
        self.data = TrainingData(*self.rows, self.device, self.my_streams, self.plan.streams, positions)

        if self.growth:
            self.growth.begin_stage(self)
        if meta is not None:
            self.restore(meta, train_state)
        if self.rank == 0:
            forget_results(self.folder, -1 if self.resume_step is None else self.resume_step)
        self.open_log(
            model_config=asdict(self.model.config), conditions=self.conditions(), counts=self.model.num_scaling_params(), flops_per_token=self.flops_per_token,
            num_iterations=None if self.by_flops else horizon.num_iterations, total_batch_size=self.total_batch_size,
            total_tokens=None if self.by_flops else horizon.total_tokens,
            device_name=torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else self.device.type)

    def load(self, folder: Path, step: int) -> tuple:
        """Meta data and exact training state of the checkpoint to continue; its weights go into the model."""
        growth = self.growth
        print0(f"{'Resuming' if folder == self.folder else 'Beginning'} from step {step} in {folder}")
        model_data, _, meta = checkpoints.load_checkpoint(folder, step, self.device)
        train_state = checkpoints.load_train_state(folder, step, self.rank, self.world_size)
        self.growth_history = meta.get("growth", [])
        if growth and folder == self.folder:  # of this run
            then = {**meta.get("user_config", {}), "total_batch_size": meta.get("total_batch_size")}
            now = {**self.user_config, "total_batch_size": self.total_batch_size}
            check_same(then, {name: now[name] for name in sorted(SET_BY_GROWTH & then.keys())})
            growth.history = self.growth_history[len(growth.earlier):]
            if 0 < len(growth.history) < len(growth.stages):
                self.model = empty_gpt(growth.stage().config)
        origin.check_shape(self.model.config, meta)
        checkpoints.check_tokenizer(self.tokenizer, self.model.config, meta)
        checkpoints.load_weights(self.model, model_data, self.device)
        for name, parameter in self.model.named_parameters():
            parameter.requires_grad_(self.settings.init_from is not None and folder != self.folder or name not in meta.get("frozen", ()))  # a new run trains all
        return meta, train_state

    def restore(self, meta: dict, train_state: dict | None) -> None:
        super().restore(meta, train_state)
        if self.growth and self.resume_step is not None:
            try:
                self.growth.restore(meta["loop_state"], self)
            except (KeyError, TypeError) as error:
                raise UsageError(f"the checkpoint of step {self.step} in {self.folder} is not of a growing run ({error}); use another step") from error

    def use_model(self, model: GPT, optimizer: MuonAdamW) -> None:
        """Goes on with this model, whose layers are still plain ones: FP8 is put on here."""
        if self.settings.fp8:
            convert_to_float8_training(model, config=Float8LinearConfig.from_recipe_name(self.settings.fp8_recipe), module_filter_fn=worth_converting)
        # compiled for a CPU by PyTorch 2.13, FP8 layers make NaN of gradients that are 0
        compiled = model if self.settings.fp8 and self.device.type == "cpu" else compiler.compile_model(model, self.device.type)
        self.set_model(model, optimizer, compiled)

    # -- a step

    def batches(self) -> Iterator:
        first = self.step * self.accumulation
        return (self.prepare(x, y, number * self.world_size + self.rank) for number, (x, y) in enumerate(self.data.take(self.accumulation), first))

    def at(self, flops: float, step: float) -> Now:
        """The hyper-parameters of a moment. With growth the steps of the smaller models count by their FLOPs, but for the warm-up."""
        schedule = self.plan.schedule
        if isinstance(schedule, Branch) or not self.growth:
            return schedule.at(step)
        return schedule.at(self.horizon.num_iterations * min(1.0, flops / self.budget), step)

    def schedule(self) -> float:
        now = self.at(self.flops, self.step)
        if self.growth:
            now = now._replace(lr=now.lr * self.growth.rewarming(self.step))
        now.set(self.optimizer.param_groups)
        return now.lr

    def schedule_shares(self) -> tuple[float, float]:
        """Of the learning rates and the weight decay, for those that branch off."""
        now = self.at(self.flops, self.step)
        return now.lr, now.weight_decay / self.plan.weight_decay if self.plan.weight_decay else 0.0

    def conditions(self) -> dict[str, Any]:
        """What another run must share, besides the shape of its model, to end with about the same loss; `flops` is the horizon."""
        settings = self.settings
        shared = ("objective", "warmup_steps", "warmdown_ratio", "warmdown_shape", "final_lr_frac", "embedding_lr", "unembedding_lr", "matrix_lr", "scalar_lr",
                  "weight_decay", "matrix_optimizer", *{"mlm": ("mask_rate",), "mixed": ("mask_rate", "causal_share")}.get(settings.objective, ()))
        return dict(data=data_source(), origin=str(settings.branch_from or settings.init_from or ""), tokenizer=self.tokenizer.checksum(), flops=self.budget,
                    total_batch_size=self.total_batch_size, **{name: getattr(settings, name) for name in shared})

    def tell_step(self, losses: list[torch.Tensor], *args) -> None:
        super().tell_step(losses, *args)
        if self.growth:
            self.growth.observe(torch.stack(losses).mean().item())
        if self.step == self.first_step + 9:
            print0(f"Data: {self.data.used_share():.0%} of the tokens of the documents read so far are trained on; the rest are ends that no row had room for"
                   + ("" if self.data.used_share() >= 0.5 else ". Raise --max-seq-len, or cut the documents (python -m nanochat.dataset does)"))

    # -- between the steps

    @property
    def by_flops(self) -> bool:
        """How long the run is: it is not known in steps how long one is that grows in its course."""
        return self.growth is not None and not self.settings.branch_from

    @property
    def done(self) -> bool:
        return self.flops >= self.budget if self.by_flops else self.step == self.horizon.num_iterations

    def progress(self) -> float:
        return self.flops / self.budget

    def shown_progress(self) -> float:
        return super().shown_progress() if self.by_flops else self.step / self.horizon.num_iterations  # nanochat's: before the step

    def of_how_many(self) -> str:
        return "" if self.by_flops else f"/{self.horizon.num_iterations:05d}"

    def data_facts(self) -> dict:
        return dict(epoch=self.data.state["epoch"], pq=self.data.state["pq_idx"], rg=self.data.state["rg_idx"])

    def as_evaluated(self):
        return disable_fp8(self.model) if self.settings.fp8 else nullcontext()

    def check(self) -> float:
        """A brief validation, by which a growth is decided."""
        return self.measure(self.plan.check_steps)

    def draw_validation(self) -> Iterator:
        batches = batches_in_turn(*self.rows, "val", self.device, self.my_streams, self.plan.streams)
        return (self.prepare_validation(x, y, 0)[:2] for x, y, _ in batches)

    def validation_batches(self) -> Iterator:
        return iter(self.validation)

    def subject(self) -> Subject:
        settings = self.settings
        return Subject(self.model, self.tokenizer, self.device, settings, self.step, self.plan.rows, settings.eval_tokens, settings.core_metric_max_per_task)

    def measure_core(self) -> None:
        with self.evaluating():
            core = evaluations.core_of(self.subject(), None)
        self.core_metric = core["core_metric"]
        print0(f"Step {self.step:05d} | CORE metric: {self.core_metric:.4f}")
        limit = self.settings.core_metric_max_per_task
        name = "core" if limit < 0 else f"core:{limit}"
        self.keep({f"{name}/{key}".rstrip("/"): row for key, row in core.pop("rows").items()})
        self.log.log("core", self.step, **core, **self.spent())
        self.log_wandb(core_metric=self.core_metric, centered_results=core["centered_results"])

    def evaluate(self) -> None:
        with self.evaluating():
            results, _ = evaluations.evaluate(self.chosen, self.subject())
        print0(f"Step {self.step:05d} | " + " | ".join(f"{label}: {value:.4f}" for label, value in headlines(results).items()))
        self.keep(results)
        self.log_wandb(**{f"eval/{key}": row.value for key, row in results.items() if row.label})

    def keep(self, results: Results) -> None:
        """In the log and in the file of this step."""
        self.log.log("evals", self.step, rows={key: asdict(row) for key, row in results.items()}, **self.spent())
        if self.rank == 0:
            try:
                write_results(self.folder, self.step, results, tokens=self.tokens, flops=self.flops)
            except OSError as error:  # a full disk
                print0(f"The results of step {self.step} are in the log alone: {error.strerror}")

    def sample(self) -> None:
        if self.rank == 0:
            with self.evaluating():
                samples = evaluations.sample_prompts(Engine(self.model, self.tokenizer), self.tokenizer)
            for sample in samples:
                print0(sample)
            self.log.log("sample", self.step, samples=samples)

    def between_steps(self) -> None:
        if self.growth:
            self.growth.maybe_grow(self)

    def data_position(self) -> dict:
        return dict(loader_states=self.data.positions)

    def meta_data(self) -> dict:
        frozen = [name for name, p in self.model.named_parameters() if not p.requires_grad]
        growing = dict(frozen=frozen) if self.growth or frozen else {}  # a branch has them from its trunk
        return dict(
            step=self.step, val_bpb=self.val_bpb, model_config=asdict(self.model.config), user_config=self.user_config, device_batch_size=self.plan.rows,
            max_seq_len=self.settings.max_seq_len, total_batch_size=self.total_batch_size, world_size=self.world_size,
            tokenizer=self.tokenizer.checksum(), growth=self.growth.earlier + self.growth.history if self.growth else self.growth_history,
            dataloader_state_dict={key: self.data.state[key] for key in ("pq_idx", "rg_idx", "epoch")},
            loop_state=self.loop_state() | dict(flops=self.flops, schedule=self.schedule_shares(), weight_decay_scale=self.horizon.weight_decay_scale) | (self.growth.loop_state() if self.growth else {}), **growing)

    def final_report(self, peak_memory: float) -> list[dict]:
        return [{
            "Number of parameters": self.model.num_scaling_params()["total"],
            "Number of FLOPs per token": f"{self.flops_per_token:e}",
            "Calculated number of iterations": self.step,
            "Number of training tokens": self.tokens,
            "Share of the documents' tokens used": f"{self.data.used_share():.1%}",
            "Tokens : Scaling params ratio": self.tokens / scaling_params(self.model),
            "DDP world size": self.world_size,
            "warmup_steps": self.settings.warmup_steps,
            "warmdown_ratio": self.settings.warmdown_ratio,
            "final_lr_frac": self.settings.final_lr_frac,
        }, {
            "Minimum validation bpb": self.loop_state()["min_val_bpb"],
            "Final validation bpb": self.val_bpb,
            "CORE metric estimate": self.core_metric,
            "MFU %": f"{self.mfu:.2f}%" if self.step > self.first_step else None,
            "Total training flops": f"{self.flops:e}",
            "Total training time": f"{self.total_training_time / 60:.2f}m",
            "Peak memory usage": f"{peak_memory:.2f}MiB",
        }]


if __name__ == "__main__":
    sys.exit(main())

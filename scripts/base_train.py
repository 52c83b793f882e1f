"""Pretrains a base model.

    python -m scripts.base_train --depth=4 --max-seq-len=512 --device-batch-size=-1 --num-iterations=500
    torchrun --nproc_per_node=8 -m scripts.base_train --depth=20

Depth is the one dial; recipe.py says what follows from it. Checkpoints, the run log and all else go below NANOCHAT_BASE_DIR.
A killed run continues with `--resume` bit-identically (CPU): model, optimizer, data position, random states, schedule.
"""
import os

os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")  # before torch is imported

import itertools
import sys
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from nanochat import checkpoint_manager as checkpoints
from nanochat import flash_attention, origin
from nanochat.cli import (
    UsageError,
    command,
    flag,
    folder_name,
    int_or_off,
    non_negative_float,
    parse_settings,
    positive_int,
    seed,
)
from nanochat.common import (
    autodetect_device_type,
    check_agreement,
    get_base_dir,
    locked,
    print0,
    print_banner,
    share_weights,
    with_progress,
)
from nanochat.compiler import compile_model
from nanochat.core_eval import load_bundle
from nanochat.dataloader import tokenizing_distributed_data_loader_with_state_bos_bestfit as data_loader
from nanochat.engine import Engine
from nanochat.fp8 import RECIPES, Float8LinearConfig, convert_to_float8_training, disable_fp8, worth_converting
from nanochat.gpt import GPT, GPTConfig
from nanochat.growth.controller import GrowthController, GrowthSettings
from nanochat.growth.model import empty_model
from nanochat.growth.optimizer import leave_out_frozen
from nanochat.growth.plan import Shape, describe, plan_stages
from nanochat.layered_gpt import build_gpt
from nanochat.memory import memory_table
from nanochat.optim import MATRIX_OPTIMIZERS, MuonAdamW
from nanochat.origin import Checkpoint, OriginSettings
from nanochat.recipe import HorizonSettings, ModelSettings, plan_horizon, scaling_params
from nanochat.schedules import Branch, Schedule, ScheduleSettings
from nanochat.tokenizer import get_token_bytes, get_tokenizer
from nanochat.train_loop import Event, Process, TrainLoop, training_process
from nanochat.training import RunSettings, check_output, find_resume_step, fit_device_batch, load_optimizer
from scripts.base_eval import evaluate_core, find_eval_bundle, sample_prompts


@dataclass
class Settings(ScheduleSettings, HorizonSettings, GrowthSettings, ModelSettings, OriginSettings, RunSettings):
    fp8: bool = flag(False, "FP8 matmuls (CUDA compute capability 8.9 and newer)")
    fp8_recipe: str = flag("tensorwise", "how FP8 numbers are scaled", choices=RECIPES)
    grow_plan: bool = flag(False, "print the stages of growth and end")
    memory: bool = flag(False, "print what a training step of each stage takes, also on a device that is not here, and end")
    # optimization
    embedding_lr: float = flag(0.3, "learning rate of the embeddings", type=non_negative_float)
    unembedding_lr: float = flag(0.008, "learning rate of the head", type=non_negative_float)
    weight_decay: float = flag(0.28, "of the blocks' matrices, at the reference batch and tokens; ngpt: 0", type=non_negative_float)
    matrix_lr: float = flag(0.02, "learning rate of the blocks' matrices", type=non_negative_float)
    matrix_optimizer: str = flag("muon", "of the blocks' matrices", choices=MATRIX_OPTIMIZERS)
    scalar_lr: float = flag(0.5, "learning rate of the residual scalars", type=non_negative_float)
    # evaluation
    eval_every: int = flag(250, "steps between validations; -1: never", type=int_or_off)
    eval_tokens: int = flag(80 * 524288, "tokens of a validation", type=positive_int)
    core_metric_every: int = flag(2000, "steps between CORE evaluations; -1: never", type=int_or_off)
    core_metric_max_per_task: int = flag(500, "problems of each task of CORE; -1: all", type=int_or_off)
    sample_every: int = flag(2000, "steps between samples; -1: never", type=int_or_off)
    # output and data
    model_tag: str | None = flag(None, "name of the checkpoint folder (default: d<depth>)", type=folder_name)
    seed: int = flag(42, "of the initialization; the data keep their order", type=seed)
    data_streams: int = flag(-1, "shares that the row groups are dealt into; -1: one per rank. With the same number, runs on fewer ranks see the same batches",
                             type=int_or_off)

    def path(self) -> list[Shape]:
        return self.growth_path(self.depth, self.aspect_ratio, self.head_dim, self.eval_every)

    def first_and_final(self, vocab_size: int) -> tuple[GPTConfig, GPTConfig]:
        """The models that the run begins and ends with."""
        path = self.path()
        first, final = (self.config(vocab_size, shape.depth, shape.width, shape.rank) for shape in (path[0], path[-1])) if path else [self.config(vocab_size)] * 2
        return first, final


def parse(argv) -> Settings:
    """The flags, of which a branch takes its trunk's as defaults. Raises UsageError for those that contradict each other."""
    settings = parse_settings(Settings, argv, "Pretrain a base model")
    settings.check_origin()
    defaults = origin.inherited(Settings, settings.branch_from.meta()) if settings.branch_from else {}
    if defaults.get("block", settings.block) == "ngpt":
        defaults = dict(weight_decay=0.0, warmup_steps=0) | defaults
    if defaults:
        settings = parse_settings(Settings, argv, "Pretrain a base model", **defaults)
    if settings.block == "ngpt":
        if settings.weight_decay:
            raise UsageError(f"--weight-decay={settings.weight_decay:g} means nothing for --block=ngpt, whose weights are put back to length 1 after every step; "
                             "leave it out")
    return settings


def show_memory(settings: Settings, device_type: str) -> None:
    """The memory of each stage, without a GPU, data or a tokenizer (whose vocabulary would be nanochat's)."""
    if settings.device_batch_size == -1:
        raise UsageError("--memory needs the rows per pass; give --device-batch-size a positive number")
    try:
        vocab_size = get_tokenizer().get_vocab_size()
    except UsageError:
        vocab_size = GPTConfig.vocab_size
    first, _ = settings.first_and_final(vocab_size)
    stages = [stage.config for stage in plan_stages(first, path, settings.grow_depth_mode)] if (path := settings.path()) else [first]
    print0(memory_table([(describe(stage), stage) for stage in stages], settings.device_batch_size, device_type, matrix_optimizer=settings.matrix_optimizer))
    if settings.fp8:
        print0("Counted without FP8")


@command
def main(argv=None) -> None:
    settings = parse(argv)
    print_banner()
    if settings.memory:
        show_memory(settings, settings.device_type or autodetect_device_type())
        return
    with training_process(settings) as process:
        training = Pretraining(settings, process)
        if not settings.grow_plan:
            with locked(training.folder, wait=False) if process.master else nullcontext():
                training.start()
                training.run()


class Pretraining(TrainLoop):
    section = "Base model training"
    settings: Settings

    def __init__(self, settings: Settings, process: Process):
        super().__init__(settings, process, Path(), {name: str(value) if isinstance(value, Checkpoint) else value for name, value in asdict(settings).items()})
        if self.device.type == "cuda":
            print0(f"Attention: {flash_attention.describe()}")
        self.tokenizer = get_tokenizer()
        check_agreement("the tokenizer", self.tokenizer.checksum(), "all nodes need the same files below NANOCHAT_BASE_DIR")
        self.token_bytes = get_token_bytes(device=self.device)
        self.streams = self.world_size if settings.data_streams == -1 else settings.data_streams
        if self.streams % self.world_size:
            raise UsageError(f"--data-streams={self.streams} cannot be shared by {self.world_size} ranks; use a multiple")
        self.my_streams = range(self.rank, self.streams, self.world_size)
        self.plan()
        depth = self.growth.stages[-1].shape.depth if self.growth else self.model.config.n_layer
        self.folder = Path(get_base_dir(), "base_checkpoints", settings.model_tag or (str(settings.branch_from) if settings.branch_from else f"d{depth}"))

    # -- before the first step

    def plan(self) -> None:
        """The model at its initialization, the horizon and the sizes of the batches."""
        settings = self.settings
        if settings.max_seq_len < 2:
            raise UsageError("--max-seq-len=1 has nothing to predict from; use 2 or more")
        vocab_size = self.tokenizer.get_vocab_size()
        first, final = settings.first_and_final(vocab_size)
        if settings.init_from:  # its shape counts, not that of the flags
            first = checkpoints.model_from_config(settings.init_from.meta()["model_config"]).config
            final = plan_stages(first, path, settings.grow_depth_mode)[-1].config if (path := settings.path()) else first
            self.settings = settings = replace(settings, max_seq_len=first.sequence_len)
        for remark in settings.dials().remarks(final):
            print0(remark)
        torch.manual_seed(settings.seed)
        with torch.device("meta"):
            self.model, final_model = build_gpt(first), build_gpt(final)
        self.initialize()
        padded_vocab = self.model.transformer.wte.num_embeddings
        if padded_vocab != vocab_size:
            print0(f"Padding the vocabulary from {vocab_size} to {padded_vocab}: faster matmuls")
        for key, value in self.model.num_scaling_params().items():
            print0(f"{key:24s}: {value:,}")
        print0(f"Estimated FLOPs per token: {self.model.estimate_flops():e}")
        shape = dict(aspect_ratio=settings.aspect_ratio, head_dim=settings.head_dim, sequence_len=settings.max_seq_len, vocab_size=vocab_size,
                     window_pattern=settings.window_pattern)
        self.horizon = plan_horizon(final_model, shape, settings.num_iterations, settings.target_flops, settings.target_param_data_ratio,
                                    settings.total_batch_size, settings.dials())
        self.total_batch_size = total = self.horizon.total_batch_size
        self.budget = final_model.estimate_flops() * self.horizon.total_tokens
        self.growth: GrowthController | None = None
        self.growth_history: list[dict] = []
        if path := settings.path():
            self.growth = GrowthController(settings, first, path, self.budget, padded_vocab, settings.seed, measured=settings.eval_every > 0)
            self.budget, self.growth_history = self.growth.budget, self.growth.history
            if self.budget < self.growth.stages[0].flops_per_token * total:
                raise UsageError(f"--grow-budget={settings.grow_budget:g} pays for less than one step; raise it, or lower --total-batch-size")
            print0(self.growth.show_plan())
        self.schedule_of_run: Schedule | Branch = Schedule(settings, self.horizon.num_iterations, settings.weight_decay * self.horizon.weight_decay_scale)
        if settings.branch_from:
            final_model = self.model = self.branch_off(settings.branch_from)
        T, B = settings.max_seq_len, settings.device_batch_size
        if B == -1:
            rows, rest = divmod(total, T * self.streams)
            if rest:
                raise UsageError(f"--total-batch-size={total} is no multiple of {T * self.streams} (context * streams)")
            B = fit_device_batch(self.model, rows, T)
            for stage in self.growth.stages[1:] if self.growth else ():  # all of them must fit
                B = min(B, fit_device_batch(empty_model(stage.config, padded_vocab, self.device), rows, T))
            print0(f"Device batch size: {B} rows per pass")
        self.accumulation = settings.passes(total, B, T, self.world_size, self.streams)
        self.device_batch = B
        self.eval_every, self.eval_steps = settings.eval_every, settings.eval_tokens // (B * T * self.streams) * len(self.my_streams)
        if settings.eval_every > 0 and self.eval_steps == 0:
            raise UsageError(f"--eval-tokens={settings.eval_tokens} is less than one batch; use at least {B * T * self.streams}")
        print0(f"Total batch size {total:,} => gradient accumulation steps: {self.accumulation}")
        tokens = self.horizon.total_tokens
        print0(f"Number of iterations{' of the final model alone' if self.growth else ''}: {self.horizon.num_iterations:,} = {tokens:,} tokens, "
               f"{tokens / scaling_params(final_model):.2f} per parameter, {final_model.estimate_flops() * tokens:e} FLOPs")

    def branch_off(self, trunk: Checkpoint) -> GPT:
        """Makes the rest of the run a warm-down from where the trunk stands; a trunk that grows does so no further. Returns its model, still empty."""
        meta, steps = trunk.meta(), self.settings.warmdown_steps or 0
        model = checkpoints.model_from_config(meta["model_config"])
        step, flops = meta["step"], meta["loop_state"].get("flops", model.estimate_flops() * meta["step"] * self.total_batch_size)
        now = self.schedule_of_run.at(self.horizon.num_iterations * flops / self.budget if self.growth else step)
        self.schedule_of_run = Branch(self.settings, now, step, steps)
        self.growth = None
        self.horizon = replace(self.horizon, num_iterations=step + steps)
        self.budget = flops + steps * self.total_batch_size * model.estimate_flops()
        return model

    def initialize(self) -> None:
        """Fills the model, which is still empty."""
        self.model.to_empty(device=self.device)
        self.model.init_weights()

    def start(self) -> None:
        """The state before the first step: that of a new run, or that of a checkpoint."""
        settings, horizon = self.settings, self.horizon
        with torch.device("meta"):  # a growing run writes one of each stage at least
            check_output(self.folder, [build_gpt(stage.config) for stage in self.growth.stages] if self.growth else [self.model], self.rank == 0)
        self.resume_step = self.saved_step = find_resume_step(settings, self.folder)
        meta = train_state = optimizer_data = None
        if self.resume_step is not None:
            meta, train_state, optimizer_data = self.load(self.folder, self.resume_step)
            if not self.growth and self.resume_step > horizon.num_iterations:
                raise UsageError(f"the checkpoint of step {self.resume_step} is beyond the horizon of {horizon.num_iterations} steps; raise it to train on")
        elif settings.branch_from:
            self.saved_step = settings.branch_from.meta()["step"]
            meta, train_state, optimizer_data = self.load(settings.branch_from.folder, self.saved_step)
        elif settings.init_from:
            _, _, optimizer_data = self.load(settings.init_from.folder, settings.init_from.meta()["step"])
            if settings.init_optimizer == "new":
                optimizer_data = None
            if self.growth:  # it counts the growths of this run
                self.growth_history = self.growth.history = []
        share_weights(self.model)
        core_every = settings.core_metric_every
        if core_every > 0:
            try:
                bundle = find_eval_bundle()
            except UsageError as error:
                print0(f"No CORE metric in this run: {error}")
                core_every = -1
            else:
                load_bundle(bundle, settings.core_metric_max_per_task)  # bad data shows now, not at the first evaluation
        self.core_metric: float | None = None
        self.events = [Event(core_every, self.measure_core), Event(settings.sample_every, self.sample)]

        self.optimizer_setup: dict[str, Any] = dict(
            unembedding_lr=settings.unembedding_lr * horizon.lr_scale, embedding_lr=settings.embedding_lr * horizon.lr_scale,
            matrix_lr=settings.matrix_lr * horizon.lr_scale, weight_decay=settings.weight_decay * horizon.weight_decay_scale, scalar_lr=settings.scalar_lr * horizon.lr_scale,
            matrix_optimizer=settings.matrix_optimizer)
        optimizer = leave_out_frozen(self.model.setup_optimizer(**self.optimizer_setup))
        if optimizer_data is not None:
            load_optimizer(optimizer, optimizer_data)
        self.take(self.model, optimizer)

        # Data, at the exact position where the checkpoint left it
        self.positions: list = [None] * len(self.my_streams)
        if train_state is not None:
            self.positions = train_state["loader_states"]
            if len(self.positions) != len(self.my_streams):
                raise UsageError(f"the checkpoint was written with other --data-streams than {self.streams}; use the same number")
        elif meta is not None:
            self.positions = [meta["dataloader_state_dict"]] * len(self.my_streams)
            print0("The checkpoint has no exact data position (nanochat's own): some documents may be seen twice or skipped")
        self.train_loader = self.loader("train", self.positions)

        if self.growth:
            self.growth.begin_stage(self)
        if meta is not None:
            self.restore(meta, train_state)
        self.open_log(
            model_config=asdict(self.model.config), counts=self.model.num_scaling_params(), flops_per_token=self.flops_per_token,
            num_iterations=None if self.growth else horizon.num_iterations, total_batch_size=self.total_batch_size,
            total_tokens=None if self.growth else horizon.total_tokens,
            device_name=torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else self.device.type)
        self.x, self.y, self.loader_state = next(self.train_loader)  # always one batch ahead

    def load(self, folder: Path, step: int) -> tuple:
        """Meta data, exact training state and optimizer state of the checkpoint to continue; its weights go into the model."""
        growth = self.growth
        print0(f"{'Resuming' if folder == self.folder else 'Beginning'} from step {step} in {folder}")
        written_by = checkpoints.load_meta(folder, step).get("world_size") or len(list(folder.glob(f"optim_{step:06d}_rank*.pt")))
        if written_by not in (0, self.world_size):
            raise UsageError(f"the checkpoint of step {step} was written by {written_by} ranks, not {self.world_size}; use as many as then")
        model_data, optimizer_data, meta = checkpoints.load_checkpoint(folder, step, self.device, load_optimizer=True, rank=self.rank)
        train_state = checkpoints.load_train_state(folder, step, self.rank)
        self.growth_history = meta.get("growth", [])
        if growth:
            growth.history = self.growth_history
            if 0 < len(growth.history) < len(growth.stages):
                with torch.device("meta"):
                    self.model = build_gpt(growth.stage().config)
        origin.check_shape(self.model.config, meta)
        checkpoints.check_tokenizer(self.tokenizer, self.model.config, meta)
        checkpoints.load_weights(self.model, model_data, self.device)
        for name, parameter in self.model.named_parameters():
            parameter.requires_grad_(name not in meta.get("frozen", ()))
        return meta, train_state, optimizer_data

    def restore(self, meta: dict, train_state: dict | None) -> None:
        super().restore(meta, train_state)
        if self.growth:
            try:
                self.growth.restore(meta["loop_state"])
            except (KeyError, TypeError) as error:
                raise UsageError(f"the checkpoint of step {self.step} in {self.folder} is not of a growing run ({error}); use another step") from error

    def take(self, model: GPT, optimizer: MuonAdamW) -> None:
        """Goes on with this model, whose layers are still plain ones: FP8 is put on here."""
        if self.settings.fp8:
            convert_to_float8_training(model, config=Float8LinearConfig.from_recipe_name(self.settings.fp8_recipe), module_filter_fn=worth_converting)
        # compiled for a CPU by PyTorch 2.13, FP8 layers make NaN of gradients that are 0
        compiled = model if self.settings.fp8 and self.device.type == "cpu" else compile_model(model, self.device.type)
        self.adopt(model, optimizer, compiled)

    def loader(self, split: str, positions: list | None = None) -> Iterator:
        """Batches (x, y, state) of this rank's streams in turn."""
        loaders = [data_loader(self.tokenizer, self.device_batch, self.settings.max_seq_len, split=split, device=self.device, resume_state_dict=position,
                               stream=stream, num_streams=self.streams)
                   for stream, position in zip(self.my_streams, positions or [None] * len(self.my_streams), strict=True)]
        return itertools.chain.from_iterable(zip(*loaders, strict=True))

    # -- a step

    def batches(self) -> Iterator:
        for micro_step in range(self.accumulation):
            self.positions[micro_step % len(self.my_streams)] = self.loader_state
            yield self.x, self.y
            self.x, self.y, self.loader_state = next(self.train_loader)

    def schedule(self) -> float:
        now = self.schedule_of_run.at(self.position)
        if self.growth:
            now = now._replace(lr=now.lr * self.growth.rewarming(self.step))
        now.set(self.optimizer.param_groups)
        return now.lr

    @property
    def position(self) -> float:
        """Where the schedules stand, in steps of the final model: with growth the steps of the smaller models count by their FLOPs."""
        if not self.growth:
            return self.step
        return max(self.horizon.num_iterations * min(1.0, self.flops / self.budget), min(self.step, self.settings.warmup_steps))

    def tell_step(self, *args) -> None:
        super().tell_step(*args)
        if self.step == self.first_step + 9:
            print0(f"Data: {self.used_share():.0%} of the tokens of the documents read so far are trained on; the rest are ends that no row had room for"
                   + ("" if self.used_share() >= 0.5 else ". Raise --max-seq-len, or cut the documents (python -m nanochat.dataset does)"))

    # -- between the steps

    @property
    def done(self) -> bool:
        return self.flops >= self.budget if self.growth else self.step == self.horizon.num_iterations

    def progress(self) -> float:
        return self.flops / self.budget

    def shown_progress(self) -> float:
        return super().shown_progress() if self.growth else self.step / self.horizon.num_iterations  # nanochat's: before the step

    def of_how_many(self) -> str:
        return "" if self.growth else f"/{self.horizon.num_iterations:05d}"

    def data_facts(self) -> dict:
        return dict(epoch=self.loader_state["epoch"], pq=self.loader_state["pq_idx"], rg=self.loader_state["rg_idx"])

    def as_evaluated(self):
        return disable_fp8(self.model) if self.settings.fp8 else nullcontext()

    def must_validate(self) -> bool:
        return super().must_validate() or self.eval_every > 0 and self.growth is not None and self.growth.at_cap(self.flops)

    def validation_batches(self) -> Iterator:
        return ((x, y) for x, y, _ in with_progress(self.loader("val"), self.eval_steps, "Validation"))

    def measure_core(self) -> None:
        with self.evaluating():
            core = evaluate_core(self.model, self.tokenizer, self.device, max_per_task=self.settings.core_metric_max_per_task)
        self.core_metric = core["core_metric"]
        print0(f"Step {self.step:05d} | CORE metric: {self.core_metric:.4f}")
        self.log.log("core", self.step, **core, **self.spent())
        self.log_wandb(core_metric=self.core_metric, centered_results=core["centered_results"])

    def sample(self) -> None:
        if self.rank == 0:
            with self.evaluating():
                samples = sample_prompts(Engine(self.model, self.tokenizer), self.tokenizer)
            for sample in samples:
                print0(sample)
            self.log.log("sample", self.step, samples=samples)

    def between_steps(self, validated: bool) -> None:
        if self.growth and self.growth.trigger and (validated or self.growth.at_cap(self.flops)):
            self.growth.maybe_grow(self)

    def used_share(self) -> float:
        return self.loader_state["used"] / max(1, self.loader_state["read"])

    def data_position(self) -> dict:
        return dict(loader_states=self.positions)

    def meta_data(self) -> dict:
        growing = dict(frozen=[name for name, p in self.model.named_parameters() if not p.requires_grad]) if self.growth else {}
        return dict(
            step=self.step, val_bpb=self.val_bpb, model_config=asdict(self.model.config), user_config=self.user_config, device_batch_size=self.device_batch,
            max_seq_len=self.settings.max_seq_len, total_batch_size=self.total_batch_size, world_size=self.world_size,
            tokenizer=self.tokenizer.checksum(), growth=self.growth_history,
            dataloader_state_dict={key: self.loader_state[key] for key in ("pq_idx", "rg_idx", "epoch")},
            loop_state=self.loop_state() | dict(flops=self.flops) | (self.growth.loop_state() if self.growth else {}), **growing)

    def final_report(self, peak_memory: float) -> list[dict]:
        return [{
            "Number of parameters": self.model.num_scaling_params()["total"],
            "Number of FLOPs per token": f"{self.flops_per_token:e}",
            "Calculated number of iterations": self.step,
            "Number of training tokens": self.tokens,
            "Share of the documents' tokens used": f"{self.used_share():.1%}",
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

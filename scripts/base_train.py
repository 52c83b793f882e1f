"""Pretrains a base model.

    python -m scripts.base_train --depth=4 --max-seq-len=512 --device-batch-size=-1 --num-iterations=500
    torchrun --nproc_per_node=8 -m scripts.base_train --depth=20

Depth is the one dial; recipe.py says what follows from it. Checkpoints, the run log and all else go below NANOCHAT_BASE_DIR.
A killed run continues with `--resume` bit-identically (CPU): model, optimizer, data position, random states, schedule.
"""
import os

os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")  # before torch is imported

import copy
import gc
import itertools
import json
import math
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, replace
from pathlib import Path

import torch

from nanochat import checkpoint_manager as checkpoints
from nanochat import compiler, flash_attention
from nanochat.cli import (
    ArgumentParser,
    UsageError,
    command,
    finite_float,
    folder_name,
    fraction,
    int_or_off,
    non_negative_float,
    non_negative_int,
    positive_float,
    positive_int,
    seed,
)
from nanochat.common import (
    COMPUTE_DTYPE,
    COMPUTE_DTYPE_REASON,
    agreed,
    autodetect_device_type,
    check_agreement,
    compute_cleanup,
    compute_init,
    get_base_dir,
    get_peak_flops,
    locked,
    print0,
    print_banner,
    share_weights,
    with_progress,
)
from nanochat.core_eval import load_bundle
from nanochat.dataloader import tokenizing_distributed_data_loader_with_state_bos_bestfit as data_loader
from nanochat.engine import Engine
from nanochat.fp8 import RECIPES, Float8LinearConfig, convert_to_float8_training, disable_fp8, worth_converting
from nanochat.gpt import GPT, GPTConfig
from nanochat.growth import grow
from nanochat.growth.kappa import Decision, GrowthTrigger, Prediction, final_loss_of_earlier_run
from nanochat.growth.model import OPTIMIZER_MODES, empty_model
from nanochat.growth.model_maps import model_maps
from nanochat.growth.modes import MODES, width_mode
from nanochat.growth.optimizer import leave_out_frozen
from nanochat.growth.plan import (
    Shape,
    describe,
    dial_path,
    growth_record,
    latest_growths,
    parse_fractions,
    parse_path,
    plan_stages,
    show_plan,
)
from nanochat.growth.target import DEPTH_MODES, spelled_out
from nanochat.layered_gpt import ACTIVATIONS, BLOCKS, ORDERS, build_gpt
from nanochat.loss_eval import evaluate_bpb
from nanochat.lowrank import RANK_SCHEDULES
from nanochat.memory import memory_table
from nanochat.optim import MATRIX_OPTIMIZERS, MuonAdamW
from nanochat.recipe import LayerDials, gpt_config, lr_multiplier, muon_momentum, muon_weight_decay, plan_horizon, scaling_params
from nanochat.report import get_report
from nanochat.run_log import RunLog
from nanochat.tokenizer import get_token_bytes, get_tokenizer
from nanochat.training import (
    Accumulator,
    check_output,
    check_ranks,
    collect_garbage_rarely,
    find_resume_step,
    fit_device_batch,
    get_exact_state,
    init_wandb,
    load_optimizer,
    optimizer_step,
    set_exact_state,
    training_parser,
)
from scripts.base_eval import evaluate_core, find_eval_bundle, sample_prompts


def build_parser() -> ArgumentParser:
    parser = training_parser("Pretrain a base model")
    add = parser.add_argument
    add("--fp8", action="store_true", help="FP8 matmuls (CUDA compute capability 8.9 and newer)")
    add("--fp8-recipe", default="tensorwise", choices=RECIPES)
    # model
    add("--depth", type=positive_int, default=20, help="layers; width and all else follow")
    add("--aspect-ratio", type=positive_int, default=64, help="width = depth * this, rounded up to whole heads")
    add("--head-dim", type=positive_int, default=128)
    add("--max-seq-len", type=positive_int, default=2048, help="context length in tokens")
    add("--window-pattern", default="SSSL", help="attention span per layer, repeated: L full context, S a quarter")
    # layers that differ from the stock ones (layered_gpt.py)
    add("--rank", type=non_negative_int, default=0, help="low-rank attention and MLP: W = U V; 0: dense")
    add("--attn-rank", type=non_negative_int, default=None, help="of the attention alone; default --rank")
    add("--mlp-rank", type=non_negative_int, default=None, help="of the MLP alone; default --rank")
    add("--lm-head-rank", type=non_negative_int, default=0)
    add("--rank-schedule", default="constant", choices=RANK_SCHEDULES, help="how the ranks are spread over depth, at the same budget")
    add("--n-head", type=int_or_off, default=-1, help="query heads; -1: width / head-dim")
    add("--n-kv-head", type=int_or_off, default=-1, help="key and value heads; -1: as many as query heads")
    add("--qk-dim", type=int_or_off, default=-1, help="width of a query and a key; -1: head-dim")
    add("--mlp-ratio", type=positive_float, default=-1, help="hidden width of the MLP / width; default 4, or 8/3 for swiglu (as many parameters)")
    add("--mlp-depth", type=positive_int, default=1, help="hidden layers of the MLP")
    add("--activation", default="relu2", choices=ACTIVATIONS)
    add("--order", default="attn-mlp", choices=ORDERS)
    add("--block", default="prenorm", choices=BLOCKS, help="prenorm: nanochat's; ngpt: hidden states and weights on the unit sphere (ngpt.py)")
    # horizon, the first positive one counts
    add("--num-iterations", type=int_or_off, default=-1, help="optimizer steps")
    add("--target-flops", type=finite_float, default=-1.0, help="training FLOPs")
    add("--target-param-data-ratio", type=finite_float, default=12, help="tokens per parameter of blocks and head")
    # growth (nanochat/growth): start smaller than --depth and grow into it; the horizon becomes a budget of FLOPs
    add("--grow-from", type=positive_int, default=None, help="depth of the first model; width and heads follow as for --depth")
    add("--grow-stages", type=positive_int, default=1, help="growths between --grow-from and --depth")
    add("--grow-path", default=None, help="all shapes instead, depth x width [x rank], the first and the last included: 10x640,15x960,20x1280")
    add("--kappa", type=fraction, default=None, help="grow when this share of the gain that the model can still make is left: loss <= p + kappa (s - p)")
    add("--kappa-final-loss", type=positive_float, default=None, help="p in bits per byte; default: of a finished run of that shape, else from the curve")
    add("--grow-at", default=None, help="grow at these shares of the FLOPs instead, one for each growth: 0.2,0.5")
    add("--grow-budget", type=positive_float, default=1.0, help="FLOPs of the whole run, as a share of what the final model would get without growth")
    add("--grow-mode", default="lossless", choices=MODES, help="how width grows")
    add("--grow-depth-mode", default="identity", choices=DEPTH_MODES, help="how depth grows")
    add("--grow-optimizer", default="transport", choices=OPTIMIZER_MODES, help="what becomes of the optimizer's state")
    add("--grow-noise", type=non_negative_float, default=None, help="of the lossless mode, relative to the weights")
    add("--grow-theta", type=finite_float, default=None, help="of the lossless mode, in degrees: 45 copies channels, 0 adds fresh ones")
    add("--grow-spread", type=fraction, default=None, help="of the lossless mode: how unequally copies of heads and units are read")
    add("--grow-rewarm", type=non_negative_int, default=0, help="steps over which the learning rates come back after a growth")
    add("--grow-freeze", action="store_true", help="train only what a growth adds in depth; layers that were there stay as they are")
    add("--grow-plan", action="store_true", help="print the stages and end")
    add("--memory", action="store_true", help="print what a training step of each stage takes, also on a device that is not here, and end")
    # optimization
    add("--device-batch-size", type=int_or_off, default=32, help="rows per rank and pass; -1: as many as fit")
    add("--total-batch-size", type=int_or_off, default=-1, help="tokens per step; -1: from model and horizon")
    add("--embedding-lr", type=non_negative_float, default=0.3)
    add("--unembedding-lr", type=non_negative_float, default=0.008)
    add("--weight-decay", type=non_negative_float, default=0.28, help="of the blocks' matrices, at the reference batch and tokens; ngpt: 0")
    add("--matrix-lr", type=non_negative_float, default=0.02)
    add("--matrix-optimizer", default="muon", choices=MATRIX_OPTIMIZERS, help="of the blocks' matrices")
    add("--scalar-lr", type=non_negative_float, default=0.5)
    add("--warmup-steps", type=non_negative_int, default=40, help="default of ngpt: 0")
    add("--warmdown-ratio", type=fraction, default=0.65, help="share of the run over which the learning rates fall")
    add("--final-lr-frac", type=fraction, default=0.05)
    # evaluation
    add("--eval-every", type=int_or_off, default=250, help="steps between validations; -1: never")
    add("--eval-tokens", type=positive_int, default=80 * 524288)
    add("--core-metric-every", type=int_or_off, default=2000, help="-1: never")
    add("--core-metric-max-per-task", type=int_or_off, default=500)
    add("--sample-every", type=int_or_off, default=2000, help="-1: never")
    add("--seed", type=seed, default=42, help="of the initialization; the data keep their order")
    # output
    add("--save-every", type=int_or_off, default=-1, help="steps between checkpoints; -1: only at the end")
    add("--model-tag", type=folder_name, default=None, help="name of the checkpoint folder (default: d<depth>)")
    # data
    add("--data-streams", type=int_or_off, default=-1,
        help="shares that the row groups are dealt into; -1: one per rank. With the same number, runs on fewer ranks see the same batches")
    return parser


# -----------------------------------------------------------------------------
# Setting up


def layer_dials(args) -> LayerDials:
    return LayerDials(
        attn_rank=args.rank if args.attn_rank is None else args.attn_rank, mlp_rank=args.rank if args.mlp_rank is None else args.mlp_rank,
        lm_head_rank=args.lm_head_rank, rank_schedule=args.rank_schedule, n_head=args.n_head, n_kv_head=args.n_kv_head, qk_dim=args.qk_dim,
        mlp_ratio=args.mlp_ratio, mlp_depth=args.mlp_depth, block=args.block, activation=args.activation, order=args.order)


def parse_args(argv):
    """The flags. Raises UsageError for weight decay of normalized layers."""
    parser = build_parser()
    args = parser.parse_args(argv)
    if args.block == "ngpt":
        parser.set_defaults(weight_decay=0.0, warmup_steps=0)
        args = parser.parse_args(argv)
        if args.weight_decay:
            raise UsageError(f"--weight-decay={args.weight_decay:g} means nothing for --block=ngpt, whose weights are put back to length 1 after every step; "
                             "leave it out")
    return args


def growth_path(args) -> list[Shape]:
    """The shapes of all stages; none without growth. Raises UsageError for flags that contradict each other."""
    if args.grow_path and args.grow_from:
        raise UsageError("--grow-path and --grow-from both say where to start; give one of them")
    if not (args.grow_path or args.grow_from):
        for flag in ("kappa", "grow_at"):
            if getattr(args, flag) is not None:
                raise UsageError(f"--{flag.replace('_', '-')} says when to grow, but not into what; add --grow-from or --grow-path")
        return []
    if args.kappa is not None and args.grow_at:
        raise UsageError("--kappa and --grow-at both decide when to grow; give one of them")
    if args.kappa is None and not args.grow_at:
        raise UsageError("nothing says when to grow; add --kappa=0.15, or --grow-at with the shares of the FLOPs")
    if args.kappa is not None and args.eval_every < 1:
        raise UsageError("kappa is decided by validations; give --eval-every a positive number")
    if args.grow_path:
        path = parse_path(args.grow_path)
    else:
        path = dial_path(args.grow_from, args.depth, args.grow_stages, args.aspect_ratio, args.head_dim)
    if len(path) < 2:
        raise UsageError(f"--grow-path={args.grow_path} has one shape; write the last one too")
    return path


def model_config(args, vocab_size: int, shape: Shape | None = None) -> GPTConfig:
    """The configuration that the flags ask for, of another depth, width and rank than theirs if a shape is given."""
    depth = shape.depth if shape else args.depth
    config = gpt_config(depth, args.aspect_ratio, args.head_dim, args.max_seq_len, vocab_size, args.window_pattern)
    dials = layer_dials(args)
    if shape:
        if shape.width % args.head_dim:
            raise UsageError(f"a width of {shape.width} is not made of heads of {args.head_dim}; use a multiple, or another --head-dim")
        n_head = shape.width // args.head_dim
        config = replace(config, n_embd=shape.width, n_head=n_head, n_kv_head=n_head)
        if shape.rank is not None:
            dials = replace(dials, attn_rank=shape.rank, mlp_rank=shape.rank)
    return dials.apply(config)


def build_initialized(config: GPTConfig, device: torch.device) -> GPT:
    with torch.device("meta"):
        model = build_gpt(config)
    model.to_empty(device=device)
    model.init_weights()
    return model


def interleave(loaders: list):
    """One batch of each loader in turn, for ever."""
    return itertools.chain.from_iterable(zip(*loaders, strict=True))


# -----------------------------------------------------------------------------


def _number(value: float | None) -> str:
    return "unknown" if value is None else f"{value:.6f}"


def show_memory(args, device_type: str) -> None:
    """The memory of each stage, without a GPU, data or a tokenizer (whose vocabulary would be nanochat's)."""
    if args.device_batch_size == -1:
        raise UsageError("--memory needs the rows per pass; give --device-batch-size a positive number")
    try:
        vocab_size = get_tokenizer().get_vocab_size()
    except UsageError:
        vocab_size = GPTConfig.vocab_size
    path = growth_path(args)
    config = model_config(args, vocab_size, path[0] if path else None)
    stages = [stage.config for stage in plan_stages(config, path, args.grow_depth_mode)] if path else [config]
    print0(memory_table([(describe(stage), stage) for stage in stages], args.device_batch_size, device_type, matrix_optimizer=args.matrix_optimizer))
    if args.fp8:
        print0("Counted without FP8")


@command
def main(argv=None) -> None:
    args = parse_args(argv)
    user_config = vars(args).copy()
    print_banner()
    device_type = args.device_type or autodetect_device_type()
    if args.memory:
        show_memory(args, device_type)
        return
    ddp, rank, local_rank, world_size, device = compute_init(device_type)
    try:
        training = Training(args, user_config, rank, world_size, device)
        if not args.grow_plan:
            with locked(training.folder, wait=False) if rank == 0 else nullcontext():
                training.run()
    finally:
        compute_cleanup()


class Training:
    """One run: what its steps share, and what each leaves to the next."""

    def __init__(self, args, user_config: dict, rank: int, world_size: int, device: torch.device):
        self.args, self.user_config, self.rank, self.world_size, self.device = args, user_config, rank, world_size, device
        print0(f"Compute dtype: {COMPUTE_DTYPE} ({COMPUTE_DTYPE_REASON})")
        check_ranks(args)
        if device.type == "cuda":
            print0(f"Attention: {flash_attention.describe()}")
        self.gpu_peak_flops = get_peak_flops(torch.cuda.get_device_name(device)) if device.type == "cuda" else float("inf")
        self.tokenizer = get_tokenizer()
        check_agreement("the tokenizer", self.tokenizer.checksum(), "all nodes need the same files below NANOCHAT_BASE_DIR")
        self.token_bytes = get_token_bytes(device=device)
        self.streams = world_size if args.data_streams == -1 else args.data_streams
        if self.streams % world_size:
            raise UsageError(f"--data-streams={self.streams} cannot be shared by {world_size} ranks; use a multiple")
        self.my_streams = range(rank, self.streams, world_size)

        self.model = self.plan()
        depth = self.stages[-1].shape.depth if self.stages else args.depth
        self.folder = Path(get_base_dir(), "base_checkpoints", args.model_tag or f"d{depth}")

    # -- before the first step

    def plan(self) -> GPT:
        """The model at its initialization, the horizon and the sizes of the batches."""
        args = self.args
        if args.max_seq_len < 2:
            raise UsageError("--max-seq-len=1 has nothing to predict from; use 2 or more")
        vocab_size = self.tokenizer.get_vocab_size()
        path = growth_path(args)
        config = model_config(args, vocab_size, path[0] if path else None)
        final = model_config(args, vocab_size, path[-1]) if path else config
        self.stages = plan_stages(config, path, args.grow_depth_mode) if path else []
        for remark in layer_dials(args).remarks(final):
            print0(remark)
        torch.manual_seed(args.seed)
        model = build_initialized(config, self.device)
        padded_vocab = model.transformer.wte.num_embeddings
        if padded_vocab != vocab_size:
            print0(f"Padding the vocabulary from {vocab_size} to {padded_vocab}: faster matmuls")
        for key, value in model.num_scaling_params().items():
            print0(f"{key:24s}: {value:,}")
        print0(f"Estimated FLOPs per token: {model.estimate_flops():e}")
        with torch.device("meta"):
            final_model = build_gpt(final)
        shape = dict(aspect_ratio=args.aspect_ratio, head_dim=args.head_dim, sequence_len=args.max_seq_len, vocab_size=vocab_size,
                     window_pattern=args.window_pattern)
        self.horizon = plan_horizon(final_model, shape, args.num_iterations, args.target_flops, args.target_param_data_ratio, args.total_batch_size,
                                    layer_dials(args))
        self.budget = final_model.estimate_flops() * self.horizon.total_tokens
        self.growth_parameters = {name: value for name in ("theta", "spread", "noise") if (value := getattr(args, f"grow_{name}")) is not None}
        if self.stages:
            width = width_mode(args.grow_mode, **self.growth_parameters)
            for before, after in zip(self.stages, self.stages[1:]):  # what cannot grow is refused now, not in the middle of the run
                model_maps(width, spelled_out(before.config), spelled_out(after.config), after.layers, padded_vocab)
            self.budget = round(args.grow_budget * self.budget)
            if self.budget < self.stages[0].flops_per_token * self.horizon.total_batch_size:
                raise UsageError(f"--grow-budget={args.grow_budget:g} pays for less than one step; raise it, or lower --total-batch-size")
            growths = len(self.stages) - 1
            self.growths_at = parse_fractions(args.grow_at) if args.grow_at else latest_growths(growths)
            if len(self.growths_at) != growths:
                raise UsageError(f"--grow-at={args.grow_at} has {len(self.growths_at)} moments for {growths} growths")
            print0(show_plan(self.stages, self.budget, self.growths_at, fixed=bool(args.grow_at)))
        total, T, streams = self.horizon.total_batch_size, args.max_seq_len, self.streams
        B = args.device_batch_size
        if B == -1:
            rows, rest = divmod(total, T * streams)
            if rest:
                raise UsageError(f"--total-batch-size={total} is no multiple of {T * streams} (context * streams)")
            B = fit_device_batch(model, rows, T)
            for stage in self.stages[1:]:  # all of them must fit
                B = min(B, fit_device_batch(empty_model(stage.config, padded_vocab, self.device), rows, T))
            print0(f"Device batch size: {B} rows per pass")
        self.accumulation, rest = divmod(total, B * T * self.world_size)
        if rest or self.accumulation % len(self.my_streams):
            fitting = next((n for n in range(min(B, total // (T * streams)), 0, -1) if total % (n * T * streams) == 0), None)
            raise UsageError(
                f"a total batch of {total} tokens cannot be made of passes of {B} rows * {T} tokens * {streams} "
                f"{'ranks' if streams == self.world_size else 'streams'}; "
                + (f"use --device-batch-size={fitting}, or -1 to have it found" if fitting else f"use a --total-batch-size that is a multiple of {T * streams}"))
        self.device_batch = B
        self.eval_steps = args.eval_tokens // (B * T * streams) * len(self.my_streams)
        if args.eval_every > 0 and self.eval_steps == 0:
            raise UsageError(f"--eval-tokens={args.eval_tokens} is less than one batch; use at least {B * T * streams}")
        print0(f"Total batch size {total:,} => gradient accumulation steps: {self.accumulation}")
        tokens = self.horizon.total_tokens
        print0(f"Number of iterations{' of the final model alone' if self.stages else ''}: {self.horizon.num_iterations:,} = {tokens:,} tokens, "
               f"{tokens / scaling_params(final_model):.2f} per parameter, {final_model.estimate_flops() * tokens:e} FLOPs")
        return model

    def start(self, model: GPT) -> None:
        """The state before the first step: that of a new run, or that of a checkpoint."""
        args, horizon = self.args, self.horizon
        with torch.device("meta"):  # a growing run writes one of each stage at least
            check_output(self.folder, [build_gpt(stage.config) for stage in self.stages] or [model], self.rank == 0)
        self.report = get_report()
        self.resume_step = find_resume_step(args, self.folder)
        meta = train_state = optimizer_data = None
        self.growth_history: list[dict] = []
        if self.resume_step is not None:
            model, meta, train_state, optimizer_data = self.load(model)
        share_weights(model)
        self.core_every = args.core_metric_every
        if self.core_every > 0:
            try:
                bundle = find_eval_bundle()
            except UsageError as error:
                print0(f"No CORE metric in this run: {error}")
                self.core_every = -1
            else:
                load_bundle(bundle, args.core_metric_max_per_task)  # bad data shows now, not at the first evaluation

        self.weight_decay = args.weight_decay * horizon.weight_decay_scale
        self.optimizer_setup = dict(
            unembedding_lr=args.unembedding_lr * horizon.lr_scale, embedding_lr=args.embedding_lr * horizon.lr_scale,
            matrix_lr=args.matrix_lr * horizon.lr_scale, weight_decay=self.weight_decay, scalar_lr=args.scalar_lr * horizon.lr_scale,
            matrix_optimizer=args.matrix_optimizer)
        optimizer = leave_out_frozen(model.setup_optimizer(**self.optimizer_setup))
        if optimizer_data is not None:
            load_optimizer(optimizer, optimizer_data)
        self.scaler = torch.amp.GradScaler(self.device.type) if COMPUTE_DTYPE == torch.float16 else None
        # checkpoints that do not say so were trained compiled
        compiler.decide(self.device.type, self.budget / self.world_size, None if train_state is None else train_state.get("compiled", True))
        self.adopt(model, optimizer)

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

        # What the loop carries from step to step
        self.saved_step = self.resume_step
        self.step = 0
        self.val_bpb: float | None = None
        self.core_metric: float | None = None
        self.min_val_bpb = float("inf")
        self.smooth_train_loss = 0.0
        self.total_training_time = 0.0
        self.mfu = 0.0
        self.flops = 0
        self.grown_at = -1
        self.trigger = self.new_trigger()
        if meta is not None:
            try:
                self.step, self.val_bpb, loop_state = meta["step"], meta["val_bpb"], meta["loop_state"]
                self.min_val_bpb = loop_state["min_val_bpb"] if loop_state["min_val_bpb"] is not None else float("inf")
                self.smooth_train_loss, self.total_training_time = loop_state["smooth_train_loss"], loop_state["total_training_time"]
                self.flops = loop_state.get("flops", self.flops_per_token * self.tokens)
                self.grown_at = loop_state.get("grown_at", -1)
                if self.trigger is not None:
                    self.trigger = GrowthTrigger(**loop_state["growth_trigger"])
            except (KeyError, TypeError) as error:
                raise UsageError(f"{self.folder}/meta_{self.resume_step:06d}.json is corrupt or not of a pretraining run ({error}); use another step") from error
        if train_state is not None:
            set_exact_state(train_state, self.device, self.scaler)
        self.first_step = self.step

        self.log = RunLog(self.folder / "log.jsonl" if self.rank == 0 else None, resume_step=self.resume_step)
        self.wandb_run = init_wandb(args, self.user_config, self.rank)
        device = self.device
        self.log.log("start", self.step, config=self.user_config, model_config=asdict(model.config), counts=model.num_scaling_params(),
                     flops_per_token=self.flops_per_token, num_iterations=None if self.stages else horizon.num_iterations, total_batch_size=horizon.total_batch_size,
                     total_tokens=None if self.stages else horizon.total_tokens, device=str(device), dtype=str(COMPUTE_DTYPE), world_size=self.world_size,
                     device_name=torch.cuda.get_device_name(device) if device.type == "cuda" else device.type)
        self.x, self.y, self.loader_state = next(self.train_loader)  # always one batch ahead

    def load(self, model: GPT) -> tuple:
        """Meta data, exact training state and optimizer state of the checkpoint to continue; its weights go into `model`."""
        step, folder = self.resume_step, self.folder
        assert step is not None
        print0(f"Resuming from step {step} in {folder}")
        written_by = checkpoints.load_meta(folder, step).get("world_size") or len(list(folder.glob(f"optim_{step:06d}_rank*.pt")))
        if written_by not in (0, self.world_size):
            raise UsageError(f"the checkpoint of step {step} was written by {written_by} ranks, not {self.world_size}; use as many as then")
        model_data, optimizer_data, meta = checkpoints.load_checkpoint(folder, step, self.device, load_optimizer=True, rank=self.rank)
        train_state = checkpoints.load_train_state(folder, step, self.rank)
        self.growth_history = meta.get("growth", [])
        if self.stages and len(self.growth_history) < len(self.stages):
            if self.growth_history:
                with torch.device("meta"):
                    model = build_gpt(self.stages[len(self.growth_history)].config)
                model.to_empty(device=self.device)
                model.init_buffers()
        elif not self.stages and step > self.horizon.num_iterations:
            raise UsageError(f"the checkpoint of step {step} is beyond the horizon of {self.horizon.num_iterations} steps; raise it to train on")
        if meta["model_config"] != (mine := json.loads(json.dumps(asdict(model.config)))):  # JSON knows no tuples
            differing = ", ".join(f"{key} {meta['model_config'].get(key)} -> {value}" for key, value in mine.items() if meta["model_config"].get(key) != value)
            raise UsageError(f"the checkpoint is of another shape than these flags ask for: {differing}; give the flags of then, or another --model-tag")
        checkpoints.check_tokenizer(self.tokenizer, model.config, meta)
        checkpoints.load_weights(model, model_data, self.device)
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(name not in meta.get("frozen", ()))
        return model, meta, train_state, optimizer_data

    def adopt(self, model: GPT, optimizer: MuonAdamW) -> None:
        """Goes on with this model, whose layers are still plain ones: FP8 is put on here."""
        if self.args.fp8:
            convert_to_float8_training(model, config=Float8LinearConfig.from_recipe_name(self.args.fp8_recipe), module_filter_fn=worth_converting)
        self.model, self.optimizer = model, optimizer
        self.flops_per_token = model.estimate_flops()
        # compiled for a CPU by PyTorch 2.13, FP8 layers make NaN of gradients that are 0
        compiled = model if self.args.fp8 and self.device.type == "cpu" else compiler.compile_model(model, self.device.type)
        # on a CPU compiling a second, gradient-free graph takes longer than most evaluations
        self.evaluated = compiled if self.device.type == "cuda" else model
        self.accumulate = Accumulator(compiled, model, self.scaler)
        self.engine = Engine(model, self.tokenizer)

    def loader(self, split: str, positions: list | None = None):
        """Batches (x, y, state) of this rank's streams in turn."""
        return interleave([
            data_loader(self.tokenizer, self.device_batch, self.args.max_seq_len, split=split, device=self.device, resume_state_dict=position,
                        stream=stream, num_streams=self.streams)
            for stream, position in zip(self.my_streams, positions or [None] * len(self.my_streams), strict=True)])

    # -- between the steps

    @property
    def tokens(self) -> int:
        return self.step * self.horizon.total_batch_size

    def spent(self) -> dict:
        return dict(tokens=self.tokens, flops=self.flops, time=self.total_training_time)

    @property
    def done(self) -> bool:
        return self.flops >= self.budget if self.stages else self.step == self.horizon.num_iterations

    @property
    def position(self) -> float:
        """Where the schedules stand, in steps of the final model: with growth the steps of the smaller models count by their FLOPs."""
        if not self.stages:
            return self.step
        return max(self.horizon.num_iterations * min(1.0, self.flops / self.budget), min(self.step, self.args.warmup_steps))

    def log_wandb(self, **values) -> None:
        self.wandb_run.log({"step": self.step, "total_training_flops": self.spent()["flops"], "total_training_time": self.total_training_time, **values})

    @contextmanager
    def evaluating(self):
        self.model.eval()
        with disable_fp8(self.model) if self.args.fp8 else nullcontext():
            yield
        self.model.train()

    def validate(self, log: bool = True) -> None:
        with self.evaluating():
            batches = with_progress(self.loader("val"), self.eval_steps, "Validation")
            self.val_bpb = evaluate_bpb(self.evaluated, ((x, y) for x, y, _ in batches), self.eval_steps, self.token_bytes)
        self.min_val_bpb = min(self.min_val_bpb, self.val_bpb)
        if not log:
            return
        print0(f"Step {self.step:05d} | Validation bpb: {self.val_bpb:.6f}")
        self.log.log("eval", self.step, val_bpb=self.val_bpb, **self.spent())
        self.log_wandb(**{"val/bpb": self.val_bpb})

    def measure_core(self) -> None:
        with self.evaluating():
            core = evaluate_core(self.model, self.tokenizer, self.device, max_per_task=self.args.core_metric_max_per_task)
        self.core_metric = core["core_metric"]
        print0(f"Step {self.step:05d} | CORE metric: {self.core_metric:.4f}")
        self.log.log("core", self.step, **core, **self.spent())
        self.log_wandb(core_metric=self.core_metric, centered_results=core["centered_results"])

    def sample(self) -> None:
        with self.evaluating():
            samples = sample_prompts(self.engine, self.tokenizer)
        for sample in samples:
            print0(sample)
        self.log.log("sample", self.step, samples=samples)

    def meta_data(self) -> dict:
        meta_data = dict(
            step=self.step, val_bpb=self.val_bpb, model_config=asdict(self.model.config), user_config=self.user_config, device_batch_size=self.device_batch,
            max_seq_len=self.args.max_seq_len, total_batch_size=self.horizon.total_batch_size, world_size=self.world_size,
            tokenizer=self.tokenizer.checksum(), growth=self.growth_history,
            dataloader_state_dict={key: self.loader_state[key] for key in ("pq_idx", "rg_idx", "epoch")},
            loop_state=dict(min_val_bpb=self.min_val_bpb if math.isfinite(self.min_val_bpb) else None, smooth_train_loss=self.smooth_train_loss,
                            total_training_time=self.total_training_time, flops=self.flops))
        if self.stages:
            meta_data["loop_state"] |= dict(grown_at=self.grown_at, growth_trigger=self.trigger and self.trigger.state())
            meta_data["frozen"] = [name for name, p in self.model.named_parameters() if not p.requires_grad]
        return meta_data

    def save(self) -> None:
        # the positions are those after the last batch trained on: the one in hand is read again after a resume
        self.saved_step = self.step
        exact = dict(loader_states=self.positions, **get_exact_state(self.device, self.scaler))
        checkpoints.save_checkpoint(self.folder, self.step, self.model.state_dict(), self.optimizer.state_dict(), self.meta_data(), rank=self.rank, train_state=exact)

    # -- growth

    def new_trigger(self) -> GrowthTrigger | None:
        """Decides when the present stage ends; None for the last one."""
        args, stage = self.args, len(self.growth_history)
        if stage + 1 >= len(self.stages):
            return None
        final = None
        if args.kappa is not None:
            final = Prediction(args.kappa_final_loss, "--kappa-final-loss") if args.kappa_final_loss else \
                agreed(final_loss_of_earlier_run(self.folder.parent, self.stages[stage].config))
        return GrowthTrigger(args.kappa, cap=self.growths_at[stage] * self.budget, horizon=self.budget, final=final)

    def maybe_grow(self) -> None:
        """Grows if the trigger says so; the latest validation, if there is any, must be of this step. Checkpoints of the step are of the model before."""
        assert self.trigger is not None
        measured = self.args.eval_every > 0
        if not measured:
            self.val_bpb = None  # a checkpoint of other flags may have brought one
        before_it = copy.deepcopy(self.trigger)
        decision = agreed(Decision(True, "its share of the FLOPs is spent") if self.val_bpb is None else self.trigger.observe(self.flops, self.val_bpb))
        if not decision.grow:
            return
        if self.saved_step != self.step:  # nothing is lost if the larger model does not fit
            self.trigger = before_it
            self.save()
        args, number = self.args, len(self.growth_history) + 1
        source, target = self.model.config, self.stages[number]
        before, history = self.val_bpb, self.growth_history
        with disable_fp8(self.model):
            model, optimizer = grow(
                self.model, target.config, self.optimizer, mode=args.grow_mode, depth_mode=args.grow_depth_mode, layers=target.layers,
                optimizer_mode=args.grow_optimizer, setup=self.optimizer_setup, freeze=args.grow_freeze,
                generator=torch.Generator().manual_seed(args.seed + number), **self.growth_parameters)
        assert optimizer is not None
        self.adopt(model, optimizer)
        gc.unfreeze()  # the small model is to be forgotten
        gc.collect()
        self.grown_at, self.first_step = self.step, self.step
        if measured:
            self.validate(log=False)
        history.append(growth_record(self.step, source, model.config, args.grow_mode, args.grow_depth_mode, args.seed, tokens=self.tokens, flops=self.flops,
                                     loss_before=before, loss_after=self.val_bpb))
        self.trigger = self.new_trigger()
        if self.trigger is not None and self.val_bpb is not None:
            self.trigger.observe(self.flops, self.val_bpb)
        share = self.flops / self.budget
        kappa = "" if args.kappa is None else f" | kappa: {args.kappa:g} p: {_number(decision.predicted)} target: {_number(decision.target)}"
        print0(f"Step {self.step:05d} | Growth {describe(source)} -> {describe(model.config)} | bpb {_number(before)} -> {_number(self.val_bpb)}{kappa} | "
               f"FLOPs spent: {100 * share:.1f}% | {decision.reason}")
        values = dict(loss_before=before, loss_after=self.val_bpb, kappa=args.kappa, predicted=decision.predicted, target=decision.target, share=share)
        self.log.log("grow", self.step, label=f"{describe(source)} → {describe(model.config)}", reason=decision.reason, mode=args.grow_mode,
                     depth_mode=args.grow_depth_mode, flops_per_token=self.flops_per_token, counts=model.num_scaling_params(), model_config=asdict(model.config), **values, **self.spent())
        self.log_wandb(**{f"grow/{key}": value for key, value in values.items() if value is not None}, **{"grow/params": model.num_scaling_params()["total"]})

    # -- one step

    def step_batches(self) -> Iterator:
        for micro_step in range(self.accumulation):
            self.positions[micro_step % len(self.my_streams)] = self.loader_state
            yield self.x, self.y
            self.x, self.y, self.loader_state = next(self.train_loader)

    def train_step(self) -> None:
        args, N, step, position = self.args, self.horizon.num_iterations, self.step, self.position
        synchronize = torch.cuda.synchronize if self.device.type == "cuda" else lambda: None
        synchronize()
        started = time.perf_counter()
        loss = self.accumulate(self.step_batches(), self.accumulation)
        multiplier = lr_multiplier(position, N, args.warmup_steps, args.warmdown_ratio, args.final_lr_frac)
        if self.grown_at >= 0 and args.grow_rewarm:
            multiplier *= min(1.0, (step - self.grown_at + 1) / args.grow_rewarm)
        for group in self.optimizer.param_groups:
            group["lr"] = group["initial_lr"] * multiplier
            if group["kind"] == "muon":
                group["momentum"] = muon_momentum(position, N, args.warmdown_ratio)
                group["weight_decay"] = muon_weight_decay(position, N, self.weight_decay)
        optimizer_step(self.optimizer, self.scaler)
        self.model.zero_grad(set_to_none=True)
        raw_loss = loss.item()  # waits for the device
        synchronize()
        dt = time.perf_counter() - started

        if not math.isfinite(raw_loss):
            raise UsageError(f"the loss of step {step} is {raw_loss}: training diverged; lower the learning rates (--matrix-lr, --embedding-lr) "
                             "or resume an earlier checkpoint")
        self.smooth_train_loss = 0.9 * self.smooth_train_loss + 0.1 * raw_loss
        debiased = self.smooth_train_loss / (1 - 0.9 ** (step + 1))
        if step > 10 and step != self.grown_at:
            self.total_training_time += dt  # the others compile
        batch = self.horizon.total_batch_size
        self.flops += self.flops_per_token * batch
        tokens_per_second = int(batch / dt)
        self.mfu = 100 * self.flops_per_token * batch / dt / (self.gpu_peak_flops * self.world_size)
        progress = self.flops / self.budget
        eta = f" | eta: {self.total_training_time * max(0.0, 1 / progress - 1) / 60:.1f}m" if step > 10 else ""
        of = "" if self.stages else f"/{N:05d}"
        epoch = f"{self.loader_state['epoch']} pq: {self.loader_state['pq_idx']} rg: {self.loader_state['rg_idx']}"
        print0(f"step {step:05d}{of} ({100 * position / N:.2f}%) | loss: {debiased:.6f} | lrm: {multiplier:.2f} | dt: {dt * 1000:.2f}ms | "
               f"tok/sec: {tokens_per_second:,} | bf16_mfu: {self.mfu:.2f} | epoch: {epoch} | total time: {self.total_training_time / 60:.2f}m{eta}", flush=True)
        self.log.log("train", step, loss=debiased, raw_loss=raw_loss, lrm=multiplier, dt=dt, tok_per_sec=tokens_per_second, mfu=self.mfu,
                     epoch=self.loader_state["epoch"], **(self.spent() | dict(tokens=self.tokens + batch)))
        if step % 100 == 0:
            self.log_wandb(**{"train/loss": debiased, "train/lrm": multiplier, "train/dt": dt, "train/tok_per_sec": tokens_per_second,
                              "train/mfu": self.mfu, "train/epoch": epoch})
        self.step += 1
        if self.step == self.first_step + 10:
            print0(f"Data: {self.used_share():.0%} of the tokens of the documents read so far are trained on; the rest are ends that no row had room for"
                   + ("" if self.used_share() >= 0.5 else ". Raise --max-seq-len, or cut the documents (python -m nanochat.dataset does)"))

    def used_share(self) -> float:
        return self.loader_state["used"] / max(1, self.loader_state["read"])

    # -- the whole run

    def run(self) -> None:
        self.start(self.model)
        args = self.args
        while True:
            step, last = self.step, self.done

            def due(every: int) -> bool:
                return last or (step > 0 and step % every == 0)

            at_cap = self.trigger is not None and self.trigger.at_cap(self.flops)
            validating = args.eval_every > 0 and (due(args.eval_every) or step == 0 or at_cap)
            saving = step != self.saved_step and (last or (args.save_every > 0 and due(args.save_every)))
            if saving:
                if validating:
                    self.val_bpb = None  # that of this model is not known yet
                self.save()  # first: whatever happens to the evaluations, the weights are there
            if validating:
                completing = saving or (step == self.resume_step and self.val_bpb is None)  # the run before ended in its validation
                self.validate()
                if completing and self.rank == 0:
                    checkpoints.save_meta(self.folder, step, self.meta_data())
            if self.core_every > 0 and due(self.core_every):
                self.measure_core()
            if args.sample_every > 0 and self.rank == 0 and due(args.sample_every):
                self.sample()
            if last:
                break
            if self.trigger is not None and (validating or at_cap):
                self.maybe_grow()
            self.train_step()
            collect_garbage_rarely(self.step, self.first_step)
        gc.unfreeze()
        gc.enable()
        self.finish()

    def finish(self) -> None:
        """The last words: log, report, wandb."""
        peak_memory = torch.cuda.max_memory_allocated(self.device) / 2 ** 20 if self.device.type == "cuda" else 0.0
        if not peak_memory and sys.platform != "win32":
            import resource
            peak_memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2 ** 20 if sys.platform == "darwin" else 2 ** 10)
        print0(f"Peak memory usage: {peak_memory:.2f}MiB")
        print0(f"Total training time: {self.total_training_time / 60:.2f}m")
        min_val_bpb = self.min_val_bpb if math.isfinite(self.min_val_bpb) else None
        if min_val_bpb is not None:
            print0(f"Minimum validation bpb: {min_val_bpb:.6f}")
        tokens, flops = self.tokens, self.spent()["flops"]
        self.log.log("end", self.step, min_val_bpb=self.min_val_bpb, total_training_time=self.total_training_time, total_flops=flops, peak_memory_mib=peak_memory)
        self.report.log(section="Base model training", data=[
            self.user_config,
            {
                "Number of parameters": self.model.num_scaling_params()["total"],
                "Number of FLOPs per token": f"{self.flops_per_token:e}",
                "Calculated number of iterations": self.step,
                "Number of training tokens": tokens,
                "Share of the documents' tokens used": f"{self.used_share():.1%}",
                "Tokens : Scaling params ratio": tokens / scaling_params(self.model),
                "DDP world size": self.world_size,
                "warmup_steps": self.args.warmup_steps,
                "warmdown_ratio": self.args.warmdown_ratio,
                "final_lr_frac": self.args.final_lr_frac,
            },
            {
                "Minimum validation bpb": min_val_bpb,
                "Final validation bpb": self.val_bpb,
                "CORE metric estimate": self.core_metric,
                "MFU %": f"{self.mfu:.2f}%" if self.step > self.first_step else None,
                "Total training flops": f"{flops:e}",
                "Total training time": f"{self.total_training_time / 60:.2f}m",
                "Peak memory usage": f"{peak_memory:.2f}MiB",
            },
        ])
        self.log.close()
        self.wandb_run.finish()


if __name__ == "__main__":
    sys.exit(main())

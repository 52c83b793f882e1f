"""Pretrains a base model.

    python -m scripts.base_train --depth=4 --max-seq-len=512 --device-batch-size=-1 --num-iterations=500
    torchrun --nproc_per_node=8 -m scripts.base_train --depth=20

Depth is the one dial; recipe.py says what follows from it. Checkpoints, the run log and all else go below NANOCHAT_BASE_DIR.
A killed run continues with `--resume` bit-identically (CPU): model, optimizer, data position, random states, schedule.
"""
import os

os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")  # before torch is imported

import gc
import itertools
import json
import math
import random
import shutil
import sys
import time
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path

import torch
import torch.distributed as dist

from nanochat import checkpoint_manager as checkpoints
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
    step_or_off,
)
from nanochat.common import (
    COMPUTE_DTYPE,
    COMPUTE_DTYPE_REASON,
    DummyWandb,
    autodetect_device_type,
    compute_cleanup,
    compute_init,
    get_base_dir,
    get_peak_flops,
    is_ddp_initialized,
    print0,
    print_banner,
)
from nanochat.compiler import compile_model
from nanochat.core_eval import load_bundle
from nanochat.dataloader import tokenizing_distributed_data_loader_with_state_bos_bestfit as data_loader
from nanochat.engine import Engine
from nanochat.flash_attention import USE_FA3, WHY_NOT_FA3
from nanochat.fp8 import RECIPES, Float8LinearConfig, convert_to_float8_training, disable_fp8, worth_converting
from nanochat.gpt import GPT
from nanochat.layered_gpt import ORDERS, build_gpt
from nanochat.loss_eval import evaluate_bpb
from nanochat.lowrank import RANK_SCHEDULES
from nanochat.optim import MuonAdamW
from nanochat.recipe import LayerDials, gpt_config, lr_multiplier, muon_momentum, muon_weight_decay, plan_horizon
from nanochat.report import get_report
from nanochat.run_log import RunLog
from nanochat.tokenizer import get_token_bytes, get_tokenizer
from scripts.base_eval import evaluate_core, find_eval_bundle, sample_prompts


def build_parser() -> ArgumentParser:
    parser = ArgumentParser(description="Pretrain a base model")
    add = parser.add_argument
    add("--run", default=os.environ.get("WANDB_RUN", "dummy"), help="wandb run name; dummy: no wandb; torchrun takes --run for its own, use WANDB_RUN")
    add("--device-type", default="", help="cuda, mps or cpu (default: autodetect)")
    add("--fp8", action="store_true", help="FP8 matmuls (CUDA compute capability 8.9 and newer)")
    add("--fp8-recipe", default="tensorwise", choices=RECIPES)
    # model
    add("--depth", type=positive_int, default=20, help="layers; width and all else follow")
    add("--aspect-ratio", type=positive_int, default=64, help="width = depth * this, rounded up to whole heads")
    add("--head-dim", type=positive_int, default=128)
    add("--max-seq-len", type=positive_int, default=2048, help="context length in tokens")
    add("--window-pattern", default="SSSL", help="attention span per layer, repeated: L full context, S a quarter")
    # layers that differ from the stock ones (layered_gpt.py)
    add("--rank", type=non_negative_int, default=0, help="low-rank attention and MLP: W = U V; 0: dense. The update of the factors is not tuned yet")
    add("--attn-rank", type=non_negative_int, default=None, help="of the attention alone; default --rank")
    add("--mlp-rank", type=non_negative_int, default=None, help="of the MLP alone; default --rank")
    add("--lm-head-rank", type=non_negative_int, default=0)
    add("--rank-schedule", default="constant", choices=RANK_SCHEDULES, help="how the ranks are spread over depth, at the same budget")
    add("--n-head", type=int_or_off, default=-1, help="query heads; -1: width / head-dim")
    add("--n-kv-head", type=int_or_off, default=-1, help="key and value heads; -1: as many as query heads")
    add("--qk-dim", type=int_or_off, default=-1, help="width of a query and a key; -1: head-dim")
    add("--mlp-ratio", type=positive_float, default=4.0, help="hidden width of the MLP / width")
    add("--mlp-depth", type=positive_int, default=1, help="hidden layers of the MLP")
    add("--order", default="attn-mlp", choices=ORDERS)
    # horizon, the first positive one counts
    add("--num-iterations", type=int, default=-1, help="optimizer steps")
    add("--target-flops", type=finite_float, default=-1.0, help="training FLOPs")
    add("--target-param-data-ratio", type=finite_float, default=12, help="tokens per parameter of blocks and head")
    # optimization
    add("--device-batch-size", type=int_or_off, default=32, help="rows per rank and pass; -1: as many as fit")
    add("--total-batch-size", type=int_or_off, default=-1, help="tokens per step; -1: from model and horizon")
    add("--embedding-lr", type=non_negative_float, default=0.3)
    add("--unembedding-lr", type=non_negative_float, default=0.008)
    add("--weight-decay", type=non_negative_float, default=0.28, help="of Muon's matrices, at the reference batch and tokens")
    add("--matrix-lr", type=non_negative_float, default=0.02)
    add("--scalar-lr", type=non_negative_float, default=0.5)
    add("--warmup-steps", type=non_negative_int, default=40)
    add("--warmdown-ratio", type=fraction, default=0.65, help="share of the run over which the learning rates fall")
    add("--final-lr-frac", type=fraction, default=0.05)
    # resuming
    add("--resume-from-step", type=step_or_off, default=-1, help="continue from this checkpoint; -1: a new run")
    add("--resume", action="store_true", help="continue from the newest complete checkpoint, or begin if there is none")
    # evaluation
    add("--eval-every", type=int_or_off, default=250, help="steps between validations; -1: never")
    add("--eval-tokens", type=positive_int, default=80 * 524288)
    add("--core-metric-every", type=int_or_off, default=2000, help="-1: never")
    add("--core-metric-max-per-task", type=int_or_off, default=500)
    add("--sample-every", type=int_or_off, default=2000, help="-1: never")
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
        mlp_ratio=args.mlp_ratio, mlp_depth=args.mlp_depth, order=args.order)


def build_initialized(args, vocab_size: int, device: torch.device) -> tuple[GPT, dict]:
    """An initialized model, and the arguments of `gpt_config` besides depth."""
    shape = dict(aspect_ratio=args.aspect_ratio, head_dim=args.head_dim, sequence_len=args.max_seq_len, vocab_size=vocab_size,
                 window_pattern=args.window_pattern)
    dials = layer_dials(args)
    config = dials.apply(gpt_config(args.depth, **shape))
    for remark in dials.remarks(config):
        print0(remark)
    if args.max_seq_len < 2:
        raise UsageError("--max-seq-len=1 has nothing to predict from; use 2 or more")
    with torch.device("meta"):
        model = build_gpt(config)
    model.to_empty(device=device)
    model.init_weights()
    return model, shape


def init_wandb(args, user_config: dict, rank: int):
    """A wandb run on rank 0; when wandb cannot be reached the run is kept on disk, and training goes on in any case."""
    if args.run == "dummy" or rank != 0:
        return DummyWandb()
    try:
        import wandb
        settings = wandb.Settings(init_timeout=30)
        try:
            return wandb.init(project="nanochat", name=args.run, config=user_config, settings=settings)
        except Exception as error:
            print0(f"wandb cannot be reached ({type(error).__name__}): the run is logged offline, `wandb sync` uploads it later")
            return wandb.init(project="nanochat", name=args.run, config=user_config, settings=settings, mode="offline")
    except Exception as error:
        print0(f"No wandb ({type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}); training goes on without")
        return DummyWandb()


def check_output(folder: Path, model: GPT, master: bool) -> None:
    """Fails before the training instead of after it. Raises UsageError if no checkpoint can be written to `folder`."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for unfinished in folder.glob(".*.tmp") if master else ():  # a kill while saving leaves them
            unfinished.unlink()
        probe = folder / f".probe.{os.getpid()}"
        probe.write_bytes(b"x")
        probe.unlink()
    except OSError as error:
        raise UsageError(f"cannot write to {folder} ({error.strerror}); set NANOCHAT_BASE_DIR to a folder you can write to") from error
    needed = sum(3 * p.numel() * p.element_size() for p in model.parameters())  # weights and at most two moments
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise UsageError(f"a checkpoint needs {needed / 2**20:,.0f} MiB, {folder} has {free / 2**20:,.0f} MiB free; make room or move NANOCHAT_BASE_DIR")


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
        except torch.OutOfMemoryError:
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


def release_memory(device: torch.device) -> None:
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def interleave(loaders: list):
    """One batch of each loader in turn, for ever."""
    return itertools.chain.from_iterable(zip(*loaders, strict=True))


# -----------------------------------------------------------------------------
# Exact resume: everything that is neither in the model nor in the optimizer


def get_rng_state(device: torch.device) -> dict:
    state = {"python": list(random.getstate()[1]), "cpu": torch.get_rng_state()}
    if device.type == "cuda":
        state["cuda"] = torch.cuda.get_rng_state(device)
    return state


def set_rng_state(state: dict, device: torch.device) -> None:
    random.setstate((3, tuple(state["python"]), None))
    torch.set_rng_state(state["cpu"].cpu())
    if device.type == "cuda" and "cuda" in state:
        torch.cuda.set_rng_state(state["cuda"].cpu(), device)


def find_resume_step(args, folder: Path) -> int | None:
    """The step to continue from, or None for a new run."""
    if args.resume_from_step >= 0:
        return args.resume_from_step
    steps = checkpoints.list_steps(folder)
    if args.resume and steps:
        return steps[-1]
    if args.resume:
        print0(f"Nothing to resume in {folder}: a new run begins")
    elif steps:
        print0(f"{folder} holds checkpoints of another run (last step {steps[-1]}): this one replaces those of the same steps only; "
               "delete them, or keep both apart with --model-tag")
    return None


# -----------------------------------------------------------------------------
# One optimizer step


class Accumulator:
    """Forward and backward over the batches of one step, in passes of as many rows as fit."""

    def __init__(self, model, raw_model: GPT, scaler):
        self.model, self.raw_model, self.scaler = model, raw_model, scaler
        self.rows: int | None = None  # rows per pass, None: whole batches

    def __call__(self, batches: Iterator, count: int) -> torch.Tensor:
        """Adds up the gradient of the mean loss of `count` batches; returns the last one's loss.

        Batches are drawn one by one, so that reading the next overlaps with the device's work. When memory runs out,
        the step starts again with the same batches and half the rows per pass.
        """
        drawn: list = []

        def draw():
            for batch in batches:
                drawn.append(batch)
                yield batch

        rest = draw()
        while True:
            try:
                for x, y in itertools.chain(tuple(drawn), rest):
                    loss = self._one(x, y, count)
                return loss
            except torch.OutOfMemoryError:
                rows = self.rows or x.size(0)
                if rows == 1:
                    raise UsageError("out of memory with one row per pass; lower --depth or --max-seq-len") from None
                self.rows = -(-rows // 2)
            self.raw_model.zero_grad(set_to_none=True)
            release_memory(self.raw_model.get_device())
            print(f"Out of memory: {self.rows} rows per pass from here on, the same batches", flush=True)

    def _one(self, x, y, count: int) -> torch.Tensor:
        loss = torch.zeros((), device=x.device)
        for piece_x, piece_y in zip(x.split(self.rows or x.size(0)), y.split(self.rows or x.size(0)), strict=True):
            share = piece_x.size(0) / x.size(0)
            piece = self.model(piece_x, piece_y)
            scaled = piece * (share / count) if share < 1 else piece / count
            (self.scaler.scale(scaled) if self.scaler else scaled).backward()
            loss = loss + piece.detach() * share
        return loss


def optimizer_step(optimizer: MuonAdamW, scaler) -> None:
    if scaler is None:
        optimizer.step()
        return
    scaler.unscale_(optimizer)
    if is_ddp_initialized():  # every rank skips the step, or none
        for found_inf in scaler._found_inf_per_device(optimizer).values():
            dist.all_reduce(found_inf, op=dist.ReduceOp.MAX)
    scaler.step(optimizer)
    scaler.update()


# -----------------------------------------------------------------------------


@command
def main(argv=None) -> None:
    args = build_parser().parse_args(argv)
    user_config = vars(args).copy()
    print_banner()
    device_type = args.device_type or autodetect_device_type()
    ddp, rank, local_rank, world_size, device = compute_init(device_type)
    try:
        train(args, user_config, rank, world_size, device)
    finally:
        compute_cleanup()


def train(args, user_config: dict, rank: int, world_size: int, device: torch.device) -> None:
    master = rank == 0
    synchronize = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    print0(f"Compute dtype: {COMPUTE_DTYPE} ({COMPUTE_DTYPE_REASON})")
    if device.type == "cuda":
        print0("Attention: " + ("FlashAttention-3" if USE_FA3 else f"PyTorch's kernels, slower than FlashAttention-3 ({WHY_NOT_FA3 or COMPUTE_DTYPE})"))
    gpu_peak_flops = get_peak_flops(torch.cuda.get_device_name(device)) if device.type == "cuda" else float("inf")

    # Tokenizer and data
    tokenizer = get_tokenizer()
    token_bytes = get_token_bytes(device=device)
    vocab_size = tokenizer.get_vocab_size()
    T = args.max_seq_len
    streams = world_size if args.data_streams == -1 else args.data_streams
    if streams % world_size:
        raise UsageError(f"--data-streams={streams} cannot be shared by {world_size} ranks; use a multiple")
    my_streams = range(rank, streams, world_size)

    # Model, batch size and horizon
    model, shape = build_initialized(args, vocab_size, device)
    padded_vocab = model.transformer.wte.num_embeddings
    if padded_vocab != vocab_size:
        print0(f"Padding the vocabulary from {vocab_size} to {padded_vocab}: faster matmuls")
    counts = model.num_scaling_params()
    flops_per_token = model.estimate_flops()
    for key, value in counts.items():
        print0(f"{key:24s}: {value:,}")
    print0(f"Estimated FLOPs per token: {flops_per_token:e}")
    horizon = plan_horizon(model, shape, args.num_iterations, args.target_flops, args.target_param_data_ratio, args.total_batch_size,
                           layer_dials(args))
    B = args.device_batch_size
    if B == -1:
        rows, rest = divmod(horizon.total_batch_size, T * streams)
        if rest:
            raise UsageError(f"--total-batch-size={horizon.total_batch_size} is no multiple of {T * streams} (context * streams)")
        B = fit_device_batch(model, rows, T)
        print0(f"Device batch size: {B} rows per pass")
    accumulation, rest = divmod(horizon.total_batch_size, B * T * world_size)
    if rest or accumulation % len(my_streams):
        fitting = next((n for n in range(min(B, horizon.total_batch_size // (T * streams)), 0, -1) if horizon.total_batch_size % (n * T * streams) == 0), None)
        raise UsageError(
            f"a total batch of {horizon.total_batch_size} tokens cannot be made of passes of {B} rows * {T} tokens * {streams} "
            f"{'ranks' if streams == world_size else 'streams'}; "
            + (f"use --device-batch-size={fitting}, or -1 to have it found" if fitting else f"use a --total-batch-size that is a multiple of {T * streams}"))
    eval_steps = args.eval_tokens // (B * T * streams) * len(my_streams)
    if args.eval_every > 0 and eval_steps == 0:
        raise UsageError(f"--eval-tokens={args.eval_tokens} is less than one batch; use at least {B * T * streams}")
    print0(f"Total batch size {horizon.total_batch_size:,} => gradient accumulation steps: {accumulation}")
    N = horizon.num_iterations
    print0(f"Number of iterations: {N:,} = {horizon.total_tokens:,} tokens, {horizon.total_tokens / (counts['transformer_matrices'] + counts['lm_head']):.2f} "
           f"per parameter, {flops_per_token * horizon.total_tokens:e} FLOPs")

    # Output, and the checkpoint to continue from
    folder = Path(get_base_dir(), "base_checkpoints", args.model_tag or f"d{args.depth}")
    check_output(folder, model, master)
    resume_step = find_resume_step(args, folder)
    model_data = optimizer_data = meta = train_state = None
    if resume_step is not None:
        print0(f"Resuming from step {resume_step} in {folder}")
        written_by = checkpoints.load_meta(folder, resume_step).get("world_size") or len(list(folder.glob(f"optim_{resume_step:06d}_rank*.pt")))
        if written_by not in (0, world_size):
            raise UsageError(f"the checkpoint of step {resume_step} was written by {written_by} ranks, not {world_size}; use as many as then")
        model_data, optimizer_data, meta = checkpoints.load_checkpoint(folder, resume_step, device, load_optimizer=True, rank=rank)
        train_state = checkpoints.load_train_state(folder, resume_step, rank)
        if resume_step > N:
            raise UsageError(f"the checkpoint of step {resume_step} is beyond the horizon of {N} steps; raise it to train on")
        if meta["model_config"] != (mine := json.loads(json.dumps(asdict(model.config)))):  # JSON knows no tuples
            differing = ", ".join(f"{key} {meta['model_config'].get(key)} -> {value}" for key, value in mine.items() if meta["model_config"].get(key) != value)
            raise UsageError(f"the checkpoint is of another shape than these flags ask for: {differing}; give the flags of then, or another --model-tag")
        checkpoints.load_weights(model, model_data, device)
        del model_data

    if args.fp8:
        convert_to_float8_training(model, config=Float8LinearConfig.from_recipe_name(args.fp8_recipe), module_filter_fn=worth_converting)
    core_every = args.core_metric_every
    if core_every > 0:
        try:
            bundle = find_eval_bundle()
        except UsageError as error:
            print0(f"No CORE metric in this run: {error}")
            core_every = -1
        else:
            load_bundle(bundle, args.core_metric_max_per_task)  # bad data shows now, not at the first evaluation

    weight_decay = args.weight_decay * horizon.weight_decay_scale
    optimizer = model.setup_optimizer(
        unembedding_lr=args.unembedding_lr * horizon.lr_scale, embedding_lr=args.embedding_lr * horizon.lr_scale,
        matrix_lr=args.matrix_lr * horizon.lr_scale, weight_decay=weight_decay, scalar_lr=args.scalar_lr * horizon.lr_scale)
    if optimizer_data is not None:
        learning_rates = [group["initial_lr"] for group in optimizer.param_groups]
        try:
            optimizer.load_state_dict(optimizer_data)
        except (ValueError, KeyError) as error:
            raise UsageError(f"the optimizer state of step {resume_step} does not fit this model: {error}") from error
        for group, learning_rate in zip(optimizer.param_groups, learning_rates, strict=True):
            group["initial_lr"] = learning_rate  # the flags of now, not those of the checkpoint
        del optimizer_data
    scaler = torch.amp.GradScaler(device.type) if COMPUTE_DTYPE == torch.float16 else None

    compiled = compile_model(model, device.type)
    # on a CPU compiling a second, gradient-free graph takes longer than most evaluations
    evaluated = compiled if device.type == "cuda" else model
    accumulate = Accumulator(compiled, model, scaler)
    engine = Engine(model, tokenizer)

    # Data, at the exact position where the checkpoint left it
    positions: list = [None] * len(my_streams)
    if train_state is not None:
        positions = train_state["loader_states"]
        if len(positions) != len(my_streams):
            raise UsageError(f"the checkpoint was written with other --data-streams than {streams}; use the same number")
    elif meta is not None:
        positions = [meta["dataloader_state_dict"]] * len(my_streams)
        print0("The checkpoint has no exact data position (nanochat's own): some documents may be seen twice or skipped")
    train_loader = interleave([
        data_loader(tokenizer, B, T, split="train", device=device, resume_state_dict=position, stream=stream, num_streams=streams)
        for stream, position in zip(my_streams, positions, strict=True)])

    def val_batches():
        loaders = [data_loader(tokenizer, B, T, split="val", device=device, stream=stream, num_streams=streams) for stream in my_streams]
        return ((x, y) for x, y, _ in interleave(loaders))

    # What the loop carries from step to step
    step = 0
    val_bpb: float | None = None
    min_val_bpb = float("inf")
    smooth_train_loss = 0.0
    total_training_time = 0.0
    if meta is not None:
        try:
            step, val_bpb, loop_state = meta["step"], meta["val_bpb"], meta["loop_state"]
            min_val_bpb = loop_state["min_val_bpb"] if loop_state["min_val_bpb"] is not None else float("inf")
            smooth_train_loss, total_training_time = loop_state["smooth_train_loss"], loop_state["total_training_time"]
        except (KeyError, TypeError) as error:
            raise UsageError(f"{folder}/meta_{resume_step:06d}.json is corrupt or not of a pretraining run ({error}); use another step") from error
    if train_state is not None:
        set_rng_state(train_state["rng"], device)
        if scaler and train_state.get("scaler"):
            scaler.load_state_dict(train_state["scaler"])
        del train_state

    log = RunLog(folder / "log.jsonl" if master else None, resume_step=resume_step)
    wandb_run = init_wandb(args, user_config, rank)
    log.log("start", step, config=user_config, model_config=asdict(model.config), counts=counts, flops_per_token=flops_per_token,
            num_iterations=N, total_batch_size=horizon.total_batch_size, total_tokens=horizon.total_tokens, device=str(device),
            device_name=torch.cuda.get_device_name(device) if device.type == "cuda" else device.type, dtype=str(COMPUTE_DTYPE), world_size=world_size)

    x, y, loader_state = next(train_loader)  # always one batch ahead

    def step_batches():
        nonlocal x, y, loader_state
        for micro_step in range(accumulation):
            positions[micro_step % len(my_streams)] = loader_state
            yield x, y
            x, y, loader_state = next(train_loader)

    core_metric: float | None = None
    first_step = step
    while True:
        last = step == N
        tokens = step * horizon.total_batch_size
        spent = dict(tokens=tokens, flops=flops_per_token * tokens, time=total_training_time)

        if args.eval_every > 0 and (last or step % args.eval_every == 0):
            model.eval()
            with disable_fp8(model) if args.fp8 else nullcontext():
                val_bpb = evaluate_bpb(evaluated, val_batches(), eval_steps, token_bytes)
            model.train()
            min_val_bpb = min(min_val_bpb, val_bpb)
            print0(f"Step {step:05d} | Validation bpb: {val_bpb:.6f}")
            log.log("eval", step, val_bpb=val_bpb, **spent)
            wandb_run.log({"step": step, "total_training_flops": spent["flops"], "total_training_time": total_training_time, "val/bpb": val_bpb})

        if core_every > 0 and (last or (step > 0 and step % core_every == 0)):
            model.eval()
            with disable_fp8(model) if args.fp8 else nullcontext():
                core = evaluate_core(model, tokenizer, device, max_per_task=args.core_metric_max_per_task)
            model.train()
            core_metric = core["core_metric"]
            print0(f"Step {step:05d} | CORE metric: {core_metric:.4f}")
            log.log("core", step, **core, **spent)
            wandb_run.log({"step": step, "total_training_flops": spent["flops"], "core_metric": core_metric, "centered_results": core["centered_results"]})

        if args.sample_every > 0 and master and (last or (step > 0 and step % args.sample_every == 0)):
            model.eval()
            with disable_fp8(model) if args.fp8 else nullcontext():
                samples = sample_prompts(engine, tokenizer)
            model.train()
            for sample in samples:
                print0(sample)
            log.log("sample", step, samples=samples)

        if step != resume_step and (last or (step > 0 and args.save_every > 0 and step % args.save_every == 0)):
            meta_data = dict(
                step=step, val_bpb=val_bpb, model_config=asdict(model.config), user_config=user_config, device_batch_size=B, max_seq_len=T,
                total_batch_size=horizon.total_batch_size, world_size=world_size,
                dataloader_state_dict={key: loader_state[key] for key in ("pq_idx", "rg_idx", "epoch")},
                loop_state=dict(min_val_bpb=min_val_bpb if math.isfinite(min_val_bpb) else None, smooth_train_loss=smooth_train_loss,
                                total_training_time=total_training_time))
            # the positions are those after the last batch trained on: the one in hand is read again after a resume
            exact = dict(loader_states=positions, rng=get_rng_state(device), scaler=scaler.state_dict() if scaler else None)
            checkpoints.save_checkpoint(folder, step, model.state_dict(), optimizer.state_dict(), meta_data, rank=rank, train_state=exact)

        if last:
            break

        synchronize()
        started = time.perf_counter()
        loss = accumulate(step_batches(), accumulation)
        multiplier = lr_multiplier(step, N, args.warmup_steps, args.warmdown_ratio, args.final_lr_frac)
        for group in optimizer.param_groups:
            group["lr"] = group["initial_lr"] * multiplier
            if group["kind"] == "muon":
                group["momentum"] = muon_momentum(step, N, args.warmdown_ratio)
                group["weight_decay"] = muon_weight_decay(step, N, weight_decay)
        optimizer_step(optimizer, scaler)
        model.zero_grad(set_to_none=True)
        raw_loss = loss.item()  # waits for the device
        synchronize()
        dt = time.perf_counter() - started

        if not math.isfinite(raw_loss):
            raise UsageError(f"the loss of step {step} is {raw_loss}: training diverged; lower the learning rates (--matrix-lr, --embedding-lr) "
                             "or resume an earlier checkpoint")
        smooth_train_loss = 0.9 * smooth_train_loss + 0.1 * raw_loss
        debiased = smooth_train_loss / (1 - 0.9 ** (step + 1))
        if step > 10:
            total_training_time += dt  # the first steps compile
        tokens_per_second = int(horizon.total_batch_size / dt)
        mfu = 100 * flops_per_token * horizon.total_batch_size / dt / (gpu_peak_flops * world_size)
        eta = f" | eta: {(N - step) * total_training_time / (step - 10) / 60:.1f}m" if step > 10 else ""
        epoch = f"{loader_state['epoch']} pq: {loader_state['pq_idx']} rg: {loader_state['rg_idx']}"
        print0(f"step {step:05d}/{N:05d} ({100 * step / N:.2f}%) | loss: {debiased:.6f} | lrm: {multiplier:.2f} | dt: {dt * 1000:.2f}ms | "
               f"tok/sec: {tokens_per_second:,} | bf16_mfu: {mfu:.2f} | epoch: {epoch} | total time: {total_training_time / 60:.2f}m{eta}", flush=True)
        done = dict(tokens=tokens + horizon.total_batch_size, flops=flops_per_token * (tokens + horizon.total_batch_size))
        log.log("train", step, loss=debiased, raw_loss=raw_loss, lrm=multiplier, dt=dt, tok_per_sec=tokens_per_second, mfu=mfu,
                time=total_training_time, epoch=loader_state["epoch"], **done)
        if step % 100 == 0:
            wandb_run.log({"step": step, "total_training_flops": spent["flops"], "total_training_time": total_training_time, "train/loss": debiased,
                           "train/lrm": multiplier, "train/dt": dt, "train/tok_per_sec": tokens_per_second, "train/mfu": mfu, "train/epoch": epoch})
        step += 1

        # the collector's pauses cost up to half a second each: take what there is out of its sight and run it rarely
        if step == first_step + 1:
            gc.collect()
            gc.freeze()
            gc.disable()
        elif step % 5000 == 0:
            gc.collect()

    gc.unfreeze()
    gc.enable()
    peak_memory = torch.cuda.max_memory_allocated(device) / 2 ** 20 if device.type == "cuda" else 0.0
    if not peak_memory and sys.platform != "win32":
        import resource
        peak_memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2 ** 20 if sys.platform == "darwin" else 2 ** 10)
    print0(f"Peak memory usage: {peak_memory:.2f}MiB")
    print0(f"Total training time: {total_training_time / 60:.2f}m")
    if math.isfinite(min_val_bpb):
        print0(f"Minimum validation bpb: {min_val_bpb:.6f}")
    log.log("end", step, min_val_bpb=min_val_bpb, total_training_time=total_training_time, total_flops=flops_per_token * horizon.total_tokens,
            peak_memory_mib=peak_memory)
    get_report().log(section="Base model training", data=[
        user_config,
        {
            "Number of parameters": counts["total"],
            "Number of FLOPs per token": f"{flops_per_token:e}",
            "Calculated number of iterations": N,
            "Number of training tokens": horizon.total_tokens,
            "Tokens : Scaling params ratio": horizon.total_tokens / (counts["transformer_matrices"] + counts["lm_head"]),
            "DDP world size": world_size,
            "warmup_steps": args.warmup_steps,
            "warmdown_ratio": args.warmdown_ratio,
            "final_lr_frac": args.final_lr_frac,
        },
        {
            "Minimum validation bpb": min_val_bpb if math.isfinite(min_val_bpb) else None,
            "Final validation bpb": val_bpb,
            "CORE metric estimate": core_metric,
            "MFU %": f"{mfu:.2f}%" if step > first_step else None,
            "Total training flops": f"{flops_per_token * horizon.total_tokens:e}",
            "Total training time": f"{total_training_time / 60:.2f}m",
            "Peak memory usage": f"{peak_memory:.2f}MiB",
        },
    ])
    log.close()
    wandb_run.finish()


if __name__ == "__main__":
    sys.exit(main())

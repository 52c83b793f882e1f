"""Supervised fine-tuning: turns a base model into a chat model, by training it on conversations.

    python -m scripts.chat_sft                                   # nanochat's mixture, from the Hugging Face hub
    python -m scripts.chat_sft --mixture=spelling                # spelling and letter counting only; needs no network
    python -m scripts.chat_sft --mixture=smoltalk,mmlu,gsm8k,spelling,mine.jsonl
    torchrun --nproc_per_node=8 -m scripts.chat_sft

Only what the assistant says is trained on. Rows are packed with whole conversations. What is not given on the command line (context,
batch sizes, learning rates) is the base model's own. Resuming works as in base_train, bit-identically on a CPU.
"""
import os

os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")  # before torch is imported

import gc
import math
import sys
import time
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from nanochat import checkpoint_manager as checkpoints
from nanochat.cli import (
    ArgumentParser,
    UsageError,
    command,
    folder_name,
    fraction,
    int_or_off,
    non_negative_float,
    non_negative_int,
    positive_int,
)
from nanochat.common import (
    COMPUTE_DTYPE,
    COMPUTE_DTYPE_REASON,
    autodetect_device_type,
    compute_cleanup,
    compute_init,
    get_dist_info,
    get_peak_flops,
    is_ddp_initialized,
    locked,
    print0,
    share_weights,
    with_progress,
)
from nanochat.compiler import compile_model
from nanochat.engine import Engine
from nanochat.gpt import GPT
from nanochat.loss_eval import evaluate_bpb
from nanochat.report import get_report
from nanochat.run_log import RunLog
from nanochat.tokenizer import get_token_bytes, get_tokenizer
from nanochat.training import (
    Accumulator,
    check_output,
    check_ranks,
    collect_garbage_rarely,
    find_resume_step,
    get_exact_state,
    init_wandb,
    optimizer_step,
    set_exact_state,
    training_parser,
)
from scripts.chat_eval import GUESSING, TASKS, chatcore, evaluate
from tasks.common import Task, TaskMixture
from tasks.customjson import CustomJSON
from tasks.gsm8k import GSM8K
from tasks.mmlu import MMLU
from tasks.smoltalk import SmolTalk
from tasks.spellingbee import SimpleSpelling, SpellingBee


def parts(text: str) -> str:
    """A list as people write it, with blanks after its commas."""
    return ",".join(part.strip() for part in text.split(",") if part.strip())


def build_parser() -> ArgumentParser:
    parser = training_parser("Fine-tune a base model on conversations")
    add = parser.add_argument
    # the base model
    add("--model-tag", type=folder_name, default=None, help="base model to start from (default: the largest); the chat model gets the same tag")
    add("--model-step", type=non_negative_int, default=None, help="its checkpoint (default: the last)")
    add("--load-optimizer", type=int, default=1, choices=(0, 1), help="1: go on with its optimizer state")
    # data
    add("--mixture", type=parts, default="smoltalk,mmlu,gsm8k",
        help="what to train on: smoltalk, mmlu, gsm8k, spelling and files of conversations (.jsonl, .json), joined by commas")
    add("--mmlu-epochs", type=positive_int, default=3, help="passes over MMLU in one over the mixture")
    add("--gsm8k-epochs", type=positive_int, default=4, help="passes over GSM8K in one over the mixture")
    # horizon and batch
    add("--num-iterations", type=int_or_off, default=-1, help="batches of --device-batch-size rows that each rank trains on; -1: once through the mixture")
    add("--max-seq-len", type=positive_int, default=None, help="context length in tokens")
    add("--device-batch-size", type=positive_int, default=None, help="rows per rank and pass")
    add("--total-batch-size", type=positive_int, default=None, help="tokens per step")
    # optimization
    add("--embedding-lr", type=non_negative_float, default=None)
    add("--unembedding-lr", type=non_negative_float, default=None)
    add("--matrix-lr", type=non_negative_float, default=None)
    add("--init-lr-frac", type=non_negative_float, default=0.8, help="share of the learning rates to begin with")
    add("--warmup-ratio", type=fraction, default=0.0, help="share of the run over which the learning rates rise")
    add("--warmdown-ratio", type=fraction, default=0.5, help="share of the run over which they fall")
    add("--final-lr-frac", type=fraction, default=0.0)
    # evaluation
    add("--eval-every", type=int_or_off, default=200, help="steps between validations; -1: never")
    add("--eval-tokens", type=positive_int, default=40 * 524288)
    add("--chatcore-every", type=int_or_off, default=200, help="steps between evaluations on tasks; -1: never")
    add("--chatcore-max-cat", type=int_or_off, default=-1, help="problems of each multiple-choice task; -1: all")
    add("--chatcore-max-sample", type=int_or_off, default=24, help="problems of each other task; -1: all")
    # output
    add("--save-every", type=int_or_off, default=-1, help="steps between checkpoints; -1: only at the end")
    return parser


# -----------------------------------------------------------------------------
# Data


def first(task: Task, count: int) -> Task:
    """The same task, cut to its first `count` examples if it has more."""
    task.stop = min(count, task.num_examples())
    return task


def build_mixture(mixture: str, mmlu_epochs: int, gsm8k_epochs: int) -> tuple[TaskMixture, TaskMixture]:
    """(training, validation) conversations. A file of conversations has no validation part. Raises UsageError for data that cannot be had."""
    train: list[Task] = []
    val: list[Task] = []
    for name in mixture.split(","):
        if name == "smoltalk":
            train.append(SmolTalk("train"))
            val.append(SmolTalk("test"))
        elif name == "mmlu":
            train += [MMLU("all", "auxiliary_train")] * mmlu_epochs
            val.append(first(MMLU("all", "test"), 5200))
        elif name == "gsm8k":
            train += [GSM8K("main", "train")] * gsm8k_epochs
            val.append(first(GSM8K("main", "test"), 420))
        elif name == "spelling":
            tokenizer = get_tokenizer()
            train += [SimpleSpelling(200_000, tokenizer=tokenizer), SpellingBee(80_000, tokenizer=tokenizer)]
            val += [SimpleSpelling(1000, "test"), SpellingBee(1000, "test")]
        elif name.lower().endswith(CustomJSON.suffixes):
            train.append(CustomJSON(os.path.expanduser(name)))
        else:
            raise UsageError(f"--mixture: unknown part {name!r}; use smoltalk, mmlu, gsm8k, spelling or a .jsonl file, joined by commas")
    return TaskMixture(train), TaskMixture(val)


def evaluation_tasks(mixture: str) -> dict[str, Task]:
    """What to evaluate on during the training: the tasks of ChatCORE where they can be had, and letter counting if it is trained."""
    tasks: dict[str, Task] = {}
    if mixture != "spelling":
        try:
            tasks = {name: TASKS[name]() for name in GUESSING}
        except UsageError as error:
            print0(f"No ChatCORE in this run: {error}")
    if "spelling" in mixture.split(","):
        tasks["SpellingBee"] = TASKS["SpellingBee"]()
    return tasks


def pack_conversations(dataset: Task, tokenizer, B: int, T: int, device: str | torch.device, num_iterations: int = -1, buffer_size: int = 100,
                       resume_state: dict[str, Any] | None = None) -> Iterator[tuple[torch.Tensor, torch.Tensor, dict[str, Any]]]:
    """Endless (inputs int32 (B, T), targets int64 (B, T), state) of this rank, which reads every W-th conversation.

    A row takes the longest buffered conversation that still fits, until none does; then it is padded. Targets are -1 where the
    assistant does not speak. Conversations longer than a row wait until they are more than 9/10 of the buffer, then the first is cut
    to a row, or left out if it has no answer within that. So every row has something to learn.

    state: `progress` through the run (1 at its end) and whether it is at its end, `epoch`, and the position in the data, from which
    `resume_state` continues exactly. The run ends after `num_iterations` batches, or when all conversations were used.
    """
    _, rank, _, world_size = get_dist_info()
    capacity = T + 1  # a row holds its inputs and the last target
    size, bos = len(dataset), tokenizer.get_bos_token_id()
    if size < world_size:
        raise UsageError(f"{size} conversations are too few for {world_size} processes; use fewer, or more data")

    def render(index: int) -> tuple[int, list[int], list[int]]:
        ids, mask = tokenizer.render_conversation(dataset[index], max_tokens=max(2048, capacity))
        return index, ids, mask

    cursor, epoch, consumed, iteration = rank, 1, rank, 0
    buffer: list[tuple[int, list[int], list[int]]] = []
    if resume_state is not None:
        cursor, epoch, consumed, iteration = (resume_state[key] for key in ("cursor", "epoch", "consumed", "iteration"))
        for index, length in resume_state["buffer"]:
            if index >= size or len((conversation := render(index))[1]) != length:
                raise UsageError("the conversations or the tokenizer changed since the checkpoint was written; bring the old ones back, or start a new run")
            buffer.append(conversation)

    def refill() -> None:
        nonlocal cursor, epoch
        while len(buffer) < buffer_size:
            buffer.append(render(cursor))
            cursor += world_size
            if cursor >= size:
                cursor, epoch = cursor % size, epoch + 1

    def take(room: int) -> tuple[list[int], list[int]] | None:
        """The longest conversation of at most `room` tokens, None if there is none; or one that is longer than a row, cut to it.

        Nothing is left of one without an answer.
        """
        fitting = [position for position, (_, ids, _) in enumerate(buffer) if len(ids) <= room]
        if room == capacity and len(fitting) < len(buffer) / 10:
            chosen = next(position for position, (_, ids, _) in enumerate(buffer) if len(ids) > capacity)
        elif fitting:
            chosen = max(fitting, key=lambda position: len(buffer[position][1]))
        else:
            return None
        _, ids, mask = buffer.pop(chosen)
        return (ids[:room], mask[:room]) if any(mask[:room]) else ([], [])

    cuda = torch.device(device).type == "cuda"
    while True:
        rows = torch.full((B, capacity), bos, dtype=torch.long, pin_memory=cuda)
        learned = torch.zeros((B, capacity), dtype=torch.bool, pin_memory=cuda)
        for row, row_learned in zip(rows.numpy(), learned.numpy(), strict=True):
            filled = tried = 0
            while filled < capacity:
                refill()
                if (taken := take(capacity - filled)) is None:
                    break
                end = filled + len(taken[0])
                row[filled:end], row_learned[filled:end] = taken
                filled = end
                consumed += world_size
                tried += 1
                if filled == 0 and tried > size:
                    raise UsageError(f"no conversation has an answer within a context of {T} tokens; raise --max-seq-len")
        iteration += 1
        progress = iteration / num_iterations if num_iterations > 0 else consumed / size
        state = {"progress": progress, "last": progress >= 1, "epoch": epoch, "cursor": cursor, "consumed": consumed, "iteration": iteration,
                 "buffer": [(index, len(ids)) for index, ids, _ in buffer]}
        rows, learned = rows.to(device, non_blocking=cuda), learned.to(device, non_blocking=cuda)
        yield rows[:, :-1].int(), rows[:, 1:].masked_fill(~learned[:, 1:], -1), state


# -----------------------------------------------------------------------------
# Schedules


def lr_multiplier(progress: float, warmup_ratio: float, warmdown_ratio: float, final_lr_frac: float) -> float:
    """Linear warm-up, constant, linear warm-down to `final_lr_frac`, over the run's progress from 0 to 1."""
    if progress < warmup_ratio:
        return (progress + 1e-8) / warmup_ratio
    if progress <= 1 - warmdown_ratio:
        return 1.0
    decay = (progress - (1 - warmdown_ratio)) / warmdown_ratio
    return max(0.0, 1 - decay) + min(1.0, decay) * final_lr_frac


def muon_momentum(step: int) -> float:
    """0.85 to 0.95 over 300 steps."""
    return 0.85 + (0.95 - 0.85) * min(step / 300, 1)


def furthest(state: dict, device: torch.device) -> tuple[bool, float]:
    """(at the end, progress) of the rank that is furthest, so that all ranks stop at the same step and use the same learning rates."""
    values = torch.tensor([float(state["last"]), state["progress"]], device=device, dtype=torch.float32 if device.type == "mps" else torch.float64)
    if is_ddp_initialized():
        dist.all_reduce(values, op=dist.ReduceOp.MAX)
    last, progress = values.tolist()
    return bool(last), progress


# -----------------------------------------------------------------------------


def with_context(model: GPT, sequence_len: int) -> GPT:
    """The model, rebuilt for another context length: the attention windows of a stock model follow from it."""
    if model.config.sequence_len == sequence_len:
        return model
    rebuilt = checkpoints.model_from_config({**asdict(model.config), "sequence_len": sequence_len})
    checkpoints.load_weights(rebuilt, model.state_dict(), model.get_device())
    return rebuilt.train()


def inherit(args, meta: dict) -> None:
    """Fills in what the command line left open: the base model's own values, or nanochat's defaults."""
    fallbacks = dict(max_seq_len=2048, device_batch_size=32, total_batch_size=524288, embedding_lr=0.3, unembedding_lr=0.004, matrix_lr=0.02)
    for name, fallback in fallbacks.items():
        if getattr(args, name) is None:
            values = meta.get("user_config", {}) if name.endswith("_lr") else meta  # the base run may have chosen its batch itself
            setattr(args, name, fallback if values.get(name) is None else values[name])


@command
def main(argv=None) -> None:
    args = build_parser().parse_args(argv)
    _, rank, _, world_size, device = compute_init(args.device_type or autodetect_device_type())
    try:
        base_folder, base_step = checkpoints.find_checkpoint(checkpoints.checkpoints_dir_of("base"), args.model_tag, args.model_step)
        folder = Path(checkpoints.checkpoints_dir_of("sft"), base_folder.name)
        with locked(folder, wait=False) if rank == 0 else nullcontext():
            train(args, vars(args).copy(), rank, world_size, device, base_folder, base_step, folder)
    finally:
        compute_cleanup()


def train(args, user_config: dict, rank: int, world_size: int, device: torch.device, base_folder: Path, base_step: int, folder: Path) -> None:
    master = rank == 0
    synchronize = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    print0(f"Compute dtype: {COMPUTE_DTYPE} ({COMPUTE_DTYPE_REASON})")
    check_ranks(args)
    gpu_peak_flops = get_peak_flops(torch.cuda.get_device_name(device)) if device.type == "cuda" else float("inf")
    report = get_report()
    train_data, val_data = build_mixture(args.mixture, args.mmlu_epochs, args.gsm8k_epochs)
    print0(f"Training mixture: {len(train_data):,} conversations; validation: {len(val_data):,}")
    tasks = evaluation_tasks(args.mixture) if args.chatcore_every > 0 else {}

    # The base model, or the checkpoint to continue from
    resume_step = find_resume_step(args, folder)
    train_state = meta = None
    if resume_step is None:
        base_meta = checkpoints.load_meta(base_folder, base_step)
        inherit(args, base_meta)
        model, tokenizer, _ = checkpoints.build_model(base_folder, base_step, device, phase="train")
    else:
        print0(f"Resuming from step {resume_step} in {folder}")
        model, tokenizer, meta = checkpoints.build_model(folder, resume_step, device, phase="train")
        train_state = checkpoints.load_train_state(folder, resume_step, rank)
        if train_state is None or "base_step" not in meta:
            raise UsageError(f"the checkpoint of step {resume_step} in {folder} has no data position to resume from; start a new run")
        base_step = meta["base_step"]
        base_meta = checkpoints.load_meta(base_folder, base_step)
        inherit(args, base_meta)
        now = dict(mixture=args.mixture, mmlu_epochs=args.mmlu_epochs, gsm8k_epochs=args.gsm8k_epochs, max_seq_len=args.max_seq_len, world_size=world_size)
        then = {**meta["user_config"], "mixture": parts(meta["user_config"]["mixture"]), "max_seq_len": meta["model_config"]["sequence_len"], "world_size": meta["world_size"]}
        if differing := [f"{key} {then[key]} -> {value}" for key, value in now.items() if then[key] != value]:
            raise UsageError(f"the checkpoint was written with other settings: {', '.join(differing)}; give those of then, or start a new run")
    B, T, total_batch_size = args.device_batch_size, args.max_seq_len, args.total_batch_size
    model = with_context(model, T)
    share_weights(model)
    check_output(folder, [model], master)
    accumulation, rest = divmod(total_batch_size, B * T * world_size)
    if rest or accumulation == 0:
        raise UsageError(f"a total batch of {total_batch_size} tokens cannot be made of passes of {B} rows * {T} tokens * {world_size} ranks; "
                         f"use a --total-batch-size that is a multiple of {B * T * world_size}, or another --device-batch-size")
    eval_every = args.eval_every if len(val_data) else -1
    eval_steps = args.eval_tokens // (B * T * world_size)
    if eval_every > 0 and eval_steps == 0:
        raise UsageError(f"--eval-tokens={args.eval_tokens} is less than one batch; use at least {B * T * world_size}")
    print0(f"Total batch size {total_batch_size:,} => gradient accumulation steps: {accumulation}")

    # Optimizer
    matrix_optimizer = base_meta.get("user_config", {}).get("matrix_optimizer", "muon")
    optimizer = model.setup_optimizer(unembedding_lr=args.unembedding_lr, embedding_lr=args.embedding_lr, matrix_lr=args.matrix_lr, weight_decay=0.0,
                                      matrix_optimizer=matrix_optimizer)
    for group in optimizer.param_groups:
        group["initial_lr"] = group["lr"] * args.init_lr_frac
    if resume_step is not None:
        checkpoints.load_optimizer(folder, resume_step, optimizer, rank, world_size)
    elif args.load_optimizer and checkpoints.saved_ranks(base_folder, base_step):
        checkpoints.load_optimizer(base_folder, base_step, optimizer, rank, world_size)
    scaler = torch.amp.GradScaler(device.type) if COMPUTE_DTYPE == torch.float16 else None

    compiled = compile_model(model, device.type)
    evaluated = compiled if device.type == "cuda" else model  # as in base_train
    accumulate = Accumulator(compiled, model, scaler)
    engine = Engine(model, tokenizer)
    token_bytes = get_token_bytes(device)
    flops_per_token = model.estimate_flops()

    # What the loop carries from step to step
    step = 0
    val_bpb: float | None = None
    min_val_bpb = float("inf")
    smooth_train_loss = total_training_time = 0.0
    position: dict | None = None
    if train_state is not None and meta is not None:
        step, val_bpb, loop_state = meta["step"], meta["val_bpb"], meta["loop_state"]
        min_val_bpb = loop_state["min_val_bpb"] if loop_state["min_val_bpb"] is not None else float("inf")
        smooth_train_loss, total_training_time = loop_state["smooth_train_loss"], loop_state["total_training_time"]
        position = train_state["loader_state"]
        set_exact_state(train_state, device, scaler)
    train_loader = pack_conversations(train_data, tokenizer, B, T, device, args.num_iterations, resume_state=position)

    log = RunLog(folder / "log.jsonl" if master else None, resume_step=resume_step)
    wandb_run = init_wandb(args, user_config, rank, project="nanochat-sft")
    log.log("start", step, config=user_config, model_config=asdict(model.config), flops_per_token=flops_per_token, total_batch_size=total_batch_size,
            base_tag=base_folder.name, base_step=base_step, device=str(device), dtype=str(COMPUTE_DTYPE), world_size=world_size)

    x, y, state = next(train_loader)  # always one batch ahead

    def step_batches():
        nonlocal x, y, state, position
        for _ in range(accumulation):
            position = state
            yield x, y
            x, y, state = next(train_loader)

    def meta_data() -> dict:
        return dict(
            step=step, val_bpb=val_bpb, model_config=asdict(model.config), user_config=user_config, base_step=base_step, device_batch_size=B,
            max_seq_len=T, total_batch_size=total_batch_size, world_size=world_size, matrix_optimizer=matrix_optimizer, growth=base_meta.get("growth", []),
            tokenizer=tokenizer.checksum(),
            loop_state=dict(min_val_bpb=min_val_bpb if math.isfinite(min_val_bpb) else None, smooth_train_loss=smooth_train_loss,
                            total_training_time=total_training_time))

    metrics: dict = {}
    last, progress = furthest(state, device)
    last = last and step > 0  # however few batches there are, there is one step
    first_step = step
    while True:
        spent = dict(flops=flops_per_token * total_batch_size * step, time=total_training_time)

        validating = eval_every > 0 and (last or step % eval_every == 0)
        saving = step != resume_step and (last or (step > 0 and args.save_every > 0 and step % args.save_every == 0))
        if saving:
            if validating:
                val_bpb = None  # that of this model is not known yet
            # first: whatever happens to the evaluations, the weights are there. The position is that after the last batch trained on:
            # the one in hand is made again after a resume
            exact = dict(loader_state=position, **get_exact_state(device, scaler))
            checkpoints.save_checkpoint(folder, step, model.state_dict(), optimizer.state_dict(), meta_data(), rank=rank, train_state=exact)

        if validating:
            completing = saving or (step == resume_step and val_bpb is None)  # the run before ended in its validation
            model.eval()
            val_batches = with_progress(pack_conversations(val_data, tokenizer, B, T, device), eval_steps, "Validation")
            val_bpb = evaluate_bpb(evaluated, ((x, y) for x, y, _ in val_batches), eval_steps, token_bytes)
            model.train()
            min_val_bpb = min(min_val_bpb, val_bpb)
            print0(f"Step {step:05d} | Validation bpb: {val_bpb:.4f}")
            if completing and master:
                checkpoints.save_meta(folder, step, meta_data())
            log.log("eval", step, val_bpb=val_bpb, **spent)
            wandb_run.log({"step": step, "total_training_flops": spent["flops"], "total_training_time": total_training_time, "val/bpb": val_bpb})

        if tasks and (last or (step > 0 and step % args.chatcore_every == 0)):
            model.eval()
            metrics = evaluate_tasks(tasks, args, model, tokenizer, engine, B)
            model.train()
            print0(f"Step {step:05d} | " + " | ".join(f"{name}: {value:.4f}" for name, value in metrics.items()))
            log.log("chatcore", step, **metrics, **spent)
            wandb_run.log({"step": step, "total_training_flops": spent["flops"], **{
                name if name.startswith("chatcore") else f"chatcore/{name}": value for name, value in metrics.items()}})

        if last:
            break

        synchronize()
        started = time.perf_counter()
        loss = accumulate(step_batches(), accumulation)
        last, progress = furthest(state, device)
        only = last and step == 0  # its learning rate is that of a beginning, as it would be 0 at the end
        multiplier = lr_multiplier(0.0 if only else progress, args.warmup_ratio, args.warmdown_ratio, args.final_lr_frac)
        for group in optimizer.param_groups:
            group["lr"] = group["initial_lr"] * multiplier
            if group["kind"] == "muon":
                group["momentum"] = muon_momentum(step)
        optimizer_step(optimizer, scaler)
        model.zero_grad(set_to_none=True)
        raw_loss = loss.item()  # waits for the device
        synchronize()
        dt = time.perf_counter() - started

        if not math.isfinite(raw_loss):
            raise UsageError(f"the loss of step {step} is {raw_loss}: training diverged; lower --init-lr-frac, or resume an earlier checkpoint")
        step += 1
        smooth_train_loss = 0.9 * smooth_train_loss + 0.1 * raw_loss
        debiased = smooth_train_loss / (1 - 0.9 ** step)
        if step > 10:
            total_training_time += dt  # the first steps compile
        tokens_per_second = int(total_batch_size / dt)
        mfu = 100 * flops_per_token * total_batch_size / dt / (gpu_peak_flops * world_size)
        print0(f"step {step:05d} ({100 * min(1.0, progress):.2f}%) | loss: {debiased:.6f} | lrm: {multiplier:.2f} | dt: {dt * 1000:.2f}ms | "
               f"tok/sec: {tokens_per_second:,} | mfu: {mfu:.2f} | epoch: {state['epoch']} | total time: {total_training_time / 60:.2f}m", flush=True)
        log.log("train", step - 1, loss=debiased, raw_loss=raw_loss, lrm=multiplier, progress=progress, dt=dt, tok_per_sec=tokens_per_second, mfu=mfu,
                epoch=state["epoch"], flops=flops_per_token * total_batch_size * step, time=total_training_time)
        if step % 10 == 0:
            wandb_run.log({"step": step, "total_training_flops": flops_per_token * total_batch_size * step, "total_training_time": total_training_time,
                           "train/loss": debiased, "train/lrm": multiplier, "train/dt": dt, "train/tok_per_sec": tokens_per_second, "train/mfu": mfu,
                           "train/epoch": state["epoch"]})
        collect_garbage_rarely(step, first_step)

    gc.unfreeze()
    gc.enable()
    print0(f"Total training time: {total_training_time / 60:.2f}m")
    if math.isfinite(min_val_bpb):
        print0(f"Minimum validation bpb: {min_val_bpb:.4f}")
    log.log("end", step, min_val_bpb=min_val_bpb, total_training_time=total_training_time)
    report.log(section="Chat SFT", data=[
        user_config,
        {"Number of iterations": step, "DDP world size": world_size},
        {"Minimum validation bpb": min_val_bpb if math.isfinite(min_val_bpb) else None, **metrics},
    ])
    log.close()
    wandb_run.finish()


def evaluate_tasks(tasks: dict[str, Task], args, model: GPT, tokenizer, engine: Engine, batch_size: int) -> dict[str, float]:
    """Accuracy by task; before them, where all of its tasks are there, chatcore_metric and chatcore_cat (multiple choice only)."""
    accuracies = {}
    for name, task in tasks.items():
        limit = args.chatcore_max_cat if task.eval_type == "categorical" else args.chatcore_max_sample
        accuracies[name] = evaluate(task, model, tokenizer, engine, batch_size=batch_size, max_problems=limit if limit > 0 else None)
    if not GUESSING.keys() <= accuracies.keys():
        return accuracies
    core = {name: accuracies[name] for name in GUESSING}
    categorical = {name: accuracies[name] for name in GUESSING if tasks[name].eval_type == "categorical"}
    return {"chatcore_metric": chatcore(core), "chatcore_cat": chatcore(categorical), **accuracies}


if __name__ == "__main__":
    sys.exit(main())

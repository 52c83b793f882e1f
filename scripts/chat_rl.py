"""Reinforcement learning on problems whose answers can be checked: the model tries, and what worked becomes more likely.

    python -m scripts.chat_rl                                                    # GSM8K
    python -m scripts.chat_rl --task-name=SpellingBee --num-iterations=100       # letter counting; needs no network
    torchrun --nproc_per_node=8 -m scripts.chat_rl

Of GRPO (2402.03300) what is left without reference model, ratio clipping and division by the standard deviation is REINFORCE with
the mean reward of a problem's samples as the baseline; tokens are averaged over the pass (as in DAPO, 2503.14476). One update per batch
of samples, so they are always the model's own. Resuming works as in base_train, bit-identically on a CPU.
"""
import os

os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")  # before torch is imported

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
    folder_name,
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
    is_ddp_initialized,
    locked,
    print0,
    share_weights,
    with_progress,
)
from nanochat.engine import Engine
from nanochat.report import get_report
from nanochat.run_log import RunLog
from nanochat.training import (
    check_output,
    check_ranks,
    find_resume_step,
    get_exact_state,
    init_wandb,
    optimizer_step,
    set_exact_state,
    training_parser,
)
from tasks.gsm8k import GSM8K
from tasks.spellingbee import SpellingBee

TASKS = {  # (training, test) problems
    "GSM8K": lambda: (GSM8K("main", "train"), GSM8K("main", "test")),
    "SpellingBee": lambda: (SpellingBee(80_000), SpellingBee(400, "test")),
}


def build_parser() -> ArgumentParser:
    parser = training_parser("Improve a chat model by reinforcement learning")
    add = parser.add_argument
    add("--model-tag", type=folder_name, default=None, help="fine-tuned model to start from (default: the largest)")
    add("--model-step", type=non_negative_int, default=None, help="its checkpoint (default: the last)")
    add("--task-name", default="GSM8K", choices=TASKS, help="what to get better at")
    # horizon
    add("--num-epochs", type=positive_int, default=1, help="passes over the training problems")
    add("--num-iterations", type=int_or_off, default=-1, help="optimizer steps; -1: all epochs")
    # samples
    add("--device-batch-size", type=positive_int, default=8, help="samples generated or trained on in one pass")
    add("--examples-per-step", type=positive_int, default=16, help="problems per step, over all ranks")
    add("--num-samples", type=positive_int, default=16, help="answers to each problem")
    add("--max-new-tokens", type=positive_int, default=256, help="longest answer")
    add("--temperature", type=non_negative_float, default=1.0)
    add("--top-k", type=non_negative_int, default=50, help="sample among this many tokens; 0: among all")
    # optimization
    add("--embedding-lr", type=non_negative_float, default=0.2)
    add("--unembedding-lr", type=non_negative_float, default=0.004)
    add("--matrix-lr", type=non_negative_float, default=0.02)
    add("--weight-decay", type=non_negative_float, default=0.0)
    add("--init-lr-frac", type=non_negative_float, default=0.05, help="share of the learning rates to begin with; they fall linearly to 0")
    # evaluation and output
    add("--eval-every", type=int_or_off, default=60, help="steps between evaluations; -1: never")
    add("--eval-examples", type=positive_int, default=400, help="test problems to evaluate on")
    add("--save-every", type=int_or_off, default=60, help="steps between checkpoints; -1: only at the end")
    return parser


def run_gsm8k_eval(task, tokenizer, engine: Engine, max_examples: int | None = None, num_samples: int = 1, max_completion_tokens: int = 256,
                   temperature: float = 0.0, top_k: int = 50) -> Iterator[dict]:
    """This rank's share of the problems, one by one: {"idx": number, "outcomes": [{"is_correct": bool} for each sample]}."""
    _, rank, _, world_size = get_dist_info()
    for index in range(rank, min(len(task), max_examples or len(task)), world_size):
        problem = task[index]
        prompt = tokenizer.render_for_completion(problem)
        answers, _ = engine.generate_batch(prompt, num_samples=num_samples, max_tokens=max_completion_tokens, temperature=temperature, top_k=top_k)
        outcomes = [{"is_correct": bool(task.evaluate(problem, tokenizer.decode(answer[len(prompt):])))} for answer in answers]
        yield {"idx": index, "outcomes": outcomes}


def mean_over_ranks(sums: torch.Tensor, count: int, device: torch.device) -> list[float]:
    """sums / count, both added up over the ranks."""
    values = torch.cat((sums.float(), torch.tensor([float(count)]))).to(device)
    if is_ddp_initialized():
        dist.all_reduce(values)
    return (values[:-1] / values[-1]).tolist()


def pass_at_k(records: list[dict], k_max: int, device: torch.device) -> list[float]:
    """For k = 1 to k_max, the share of problems (over all ranks) that one of the first k samples solves."""
    correct = torch.tensor([[outcome["is_correct"] for outcome in record["outcomes"]] for record in records], dtype=torch.bool).view(-1, k_max)
    return mean_over_ranks(correct.cummax(dim=1).values.sum(dim=0) if len(correct) else torch.zeros(k_max), len(correct), device)


class Rollout:
    """Samples of one problem, as a batch to train on.

    inputs (N, T), targets (N, T) with -1 for what the model did not sample itself (prompt, calculator's answers, padding),
    rewards (N,), advantages (N,): rewards minus their mean. `lengths` of the sequences in tokens, prompt included.
    """

    def __init__(self, task, problem: dict, tokenizer, engine: Engine, args, step: int, index: int):
        prompt = tokenizer.render_for_completion(problem)
        sequences: list[list[int]] = []
        masks: list[list[int]] = []
        for sampling_step in range(args.num_samples // args.device_batch_size):
            seed = hash((step, index, sampling_step)) & 0x7FFFFFFF  # the same in every Python process, as these are numbers
            generated = engine.generate_batch(prompt, num_samples=args.device_batch_size, max_tokens=args.max_new_tokens,
                                              temperature=args.temperature, top_k=args.top_k, seed=seed)
            sequences += generated[0]
            masks += generated[1]
        device, padding = engine.model.get_device(), tokenizer.encode_special("<|assistant_end|>")
        self.lengths = [len(sequence) for sequence in sequences]
        longest = max(self.lengths)
        ids = torch.tensor([sequence + [padding] * (longest - len(sequence)) for sequence in sequences], device=device)
        sampled = torch.tensor([mask + [0] * (longest - len(mask)) for mask in masks], device=device)
        self.inputs, self.targets = ids[:, :-1], ids[:, 1:].masked_fill(sampled[:, 1:] == 0, -1)
        self.rewards = torch.tensor([task.reward(problem, tokenizer.decode(sequence[len(prompt):])) for sequence in sequences], device=device)
        self.advantages = self.rewards - self.rewards.mean()


def pass_objective(model, inputs: torch.Tensor, targets: torch.Tensor, advantages: torch.Tensor) -> torch.Tensor:
    """Mean over the sampled tokens of log-probability times the advantage of their sequence."""
    log_probs = -model(inputs, targets, loss_reduction="none").view_as(inputs)
    return (log_probs * advantages[:, None]).sum() / (targets >= 0).sum().clamp(min=1)


@command
def main(argv=None) -> None:
    args = build_parser().parse_args(argv)
    _, rank, _, world_size, device = compute_init(args.device_type or autodetect_device_type())
    try:
        sft_folder, sft_step = checkpoints.find_checkpoint(checkpoints.checkpoints_dir_of("sft"), args.model_tag, args.model_step)
        folder = Path(checkpoints.checkpoints_dir_of("rl"), sft_folder.name)
        with locked(folder, wait=False) if rank == 0 else nullcontext():
            train(args, vars(args).copy(), rank, world_size, device, sft_folder, sft_step, folder)
    finally:
        compute_cleanup()


def train(args, user_config: dict, rank: int, world_size: int, device: torch.device, sft_folder: Path, sft_step: int, folder: Path) -> None:
    master = rank == 0
    print0(f"Compute dtype: {COMPUTE_DTYPE} ({COMPUTE_DTYPE_REASON})")
    check_ranks(args)
    if args.examples_per_step % world_size:
        raise UsageError(f"--examples-per-step={args.examples_per_step} cannot be shared by {world_size} ranks; use a multiple")
    if args.num_samples % args.device_batch_size:
        raise UsageError(f"--num-samples={args.num_samples} cannot be made in passes of {args.device_batch_size}; use a multiple of --device-batch-size")
    train_task, test_task = TASKS[args.task_name]()
    num_steps = args.num_iterations if args.num_iterations > 0 else len(train_task) // args.examples_per_step * args.num_epochs
    if num_steps == 0:
        raise UsageError(f"{args.task_name} has {len(train_task)} problems, fewer than --examples-per-step={args.examples_per_step}; lower it")
    examples_per_rank = args.examples_per_step // world_size
    my_examples = range(rank, len(train_task), world_size)
    print0(f"Number of steps: {num_steps}, {examples_per_rank} problems per rank and step")

    # The fine-tuned model, or the checkpoint to continue from
    report = get_report()
    resume_step = find_resume_step(args, folder)
    first_step = 0
    train_state = None
    if resume_step is None:
        model, tokenizer, meta = checkpoints.build_model(sft_folder, sft_step, device, phase="train")
    else:
        print0(f"Resuming after step {resume_step} in {folder}")
        model, tokenizer, meta = checkpoints.build_model(folder, resume_step, device, phase="train")
        train_state = checkpoints.load_train_state(folder, resume_step, rank)
        if train_state is None:
            raise UsageError(f"the checkpoint of step {resume_step} in {folder} has no optimizer state to resume from; start a new run")
        names = ("task_name", "examples_per_step", "num_samples", "device_batch_size", "max_new_tokens", "temperature", "top_k")
        now, then = {**user_config, "world_size": world_size}, {**meta["user_config"], "world_size": meta["world_size"]}
        if differing := [f"{key} {then[key]} -> {now[key]}" for key in (*names, "world_size") if then[key] != now[key]]:
            raise UsageError(f"the checkpoint was written with other settings: {', '.join(differing)}; give those of then, or start a new run")
        first_step = resume_step + 1
    share_weights(model)
    check_output(folder, [model], master)
    engine = Engine(model, tokenizer)

    optimizer = model.setup_optimizer(unembedding_lr=args.unembedding_lr, embedding_lr=args.embedding_lr, matrix_lr=args.matrix_lr,
                                      weight_decay=args.weight_decay, matrix_optimizer=meta.get("matrix_optimizer", "muon"))
    for group in optimizer.param_groups:
        group["initial_lr"] = group["lr"] * args.init_lr_frac
    scaler = torch.amp.GradScaler(device.type) if COMPUTE_DTYPE == torch.float16 else None
    if resume_step is not None and train_state is not None:
        checkpoints.load_optimizer(folder, resume_step, optimizer, rank, world_size)
        set_exact_state(train_state, device, scaler)

    log = RunLog(folder / "log.jsonl" if master else None, resume_step=None if resume_step is None else first_step)
    wandb_run = init_wandb(args, user_config, rank, project="nanochat-rl")
    log.log("start", first_step, config=user_config, model_config=asdict(model.config), num_steps=num_steps, sft_step=sft_step, device=str(device),
            dtype=str(COMPUTE_DTYPE), world_size=world_size)
    for step in range(first_step, num_steps):
        started = time.perf_counter()
        last = step == num_steps - 1
        if args.eval_every > 0 and step % args.eval_every == 0:
            model.eval()
            problems = run_gsm8k_eval(test_task, tokenizer, engine, max_examples=args.eval_examples, num_samples=args.device_batch_size, temperature=1.0)
            records = list(with_progress(problems, -(-min(len(test_task), args.eval_examples) // world_size), "Evaluation"))
            scores = {f"pass@{k}": value for k, value in enumerate(pass_at_k(records, args.device_batch_size, device), 1)}
            print0(f"Step {step:05d} | " + ", ".join(f"{name}: {value:.4f}" for name, value in scores.items()), flush=True)
            log.log("eval", step, **scores)
            wandb_run.log({"step": step, **scores})

        num_passes = args.num_samples // args.device_batch_size
        totals = torch.zeros(2)  # rewards, lengths
        for i in range(examples_per_rank):
            index = my_examples[(step * examples_per_rank + i) % len(my_examples)]
            model.eval()
            rollout = Rollout(train_task, train_task[index], tokenizer, engine, args, step, index)
            model.train()
            for rows in torch.arange(args.num_samples).split(args.device_batch_size):
                rows = rows.to(device)
                objective = pass_objective(model, rollout.inputs[rows], rollout.targets[rows], rollout.advantages[rows])
                loss = -objective / (num_passes * examples_per_rank)
                (scaler.scale(loss) if scaler else loss).backward()
                log.log("pass", step, loss=loss.item(), reward=rollout.rewards[rows].mean().item())
            totals += torch.tensor([rollout.rewards.sum().item(), float(sum(rollout.lengths))])
        reward, sequence_length = mean_over_ranks(totals, examples_per_rank * args.num_samples, device)

        multiplier = 1 - step / num_steps
        for group in optimizer.param_groups:
            group["lr"] = group["initial_lr"] * multiplier
        optimizer_step(optimizer, scaler)
        model.zero_grad(set_to_none=True)
        dt = time.perf_counter() - started
        print0(f"step {step:05d}/{num_steps:05d} | reward: {reward:.4f} | sequence length: {sequence_length:.2f} | lrm: {multiplier:.2f} | dt: {dt:.2f}s", flush=True)
        log.log("train", step, reward=reward, sequence_length=sequence_length, lrm=multiplier, dt=dt)
        wandb_run.log({"step": step, "reward": reward, "sequence_length": sequence_length})
        wandb_run.log({"step": step, "lrm": multiplier})

        if last or (step > 0 and args.save_every > 0 and step % args.save_every == 0):
            meta_data = dict(step=step, model_config=asdict(model.config), user_config=user_config, sft_step=sft_step, world_size=world_size,
                             matrix_optimizer=meta.get("matrix_optimizer", "muon"), growth=meta.get("growth", []),
                             tokenizer=tokenizer.checksum())
            checkpoints.save_checkpoint(folder, step, model.state_dict(), optimizer.state_dict(), meta_data, rank=rank,
                                        train_state=get_exact_state(device, scaler))

    report.log(section="Chat RL", data=[user_config])
    log.close()
    wandb_run.finish()


if __name__ == "__main__":
    sys.exit(main())

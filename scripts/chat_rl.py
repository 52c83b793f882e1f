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
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from nanochat import checkpoint_manager as checkpoints
from nanochat.cli import (
    UsageError,
    command,
    flag,
    folder_name,
    int_or_off,
    non_negative_float,
    non_negative_int,
    parse_settings,
    positive_int,
)
from nanochat.common import get_dist_info, live_line, print0, with_progress
from nanochat.distributed import share_weights, sum_over_ranks
from nanochat.engine import Engine
from nanochat.objectives import policy_gradient
from nanochat.resume import check_same, find_resume_step, set_exact_state
from nanochat.train_loop import Event, TrainLoop, training_process
from nanochat.training import Process, RunSettings, check_output
from tasks.registry import TASKS

PROBLEMS = {name: entry.problems for name, entry in TASKS.items() if entry.problems}


@dataclass
class Settings(RunSettings):
    model_tag: str | None = flag(None, "Fine-tuned model to start from (default: the largest)", type=folder_name)
    model_step: int | None = flag(None, "Checkpoint of the fine-tuned model (default: the last)", type=non_negative_int)
    task_name: str = flag("GSM8K", "Task to get better at", choices=PROBLEMS)
    # horizon
    num_epochs: int = flag(1, "Passes over the training problems", type=positive_int)
    num_iterations: int = flag(-1, "Optimizer steps; -1: all epochs", type=int_or_off)
    # samples
    device_batch_size: int = flag(8, "Samples generated or trained on in one pass", type=positive_int)
    examples_per_step: int = flag(16, "Problems per step, over all ranks", type=positive_int)
    num_samples: int = flag(16, "Answers to each problem", type=positive_int)
    max_new_tokens: int = flag(256, "Length of the longest answer in tokens that is learned from; evaluations give 256, as nanochat's", type=positive_int)
    temperature: float = flag(1.0, "How freely answers are sampled; 0 always takes the likeliest token", type=non_negative_float)
    top_k: int = flag(50, "Number of likeliest tokens to sample among for that, 0: all tokens; evaluations take 50", type=non_negative_int)
    # optimization
    embedding_lr: float = flag(0.2, "Learning rate of the embeddings", type=non_negative_float)
    unembedding_lr: float = flag(0.004, "Learning rate of the head", type=non_negative_float)
    matrix_lr: float = flag(0.02, "Learning rate of the blocks' matrices", type=non_negative_float)
    weight_decay: float = flag(0.0, "Weight decay of the blocks' matrices", type=non_negative_float)
    init_lr_frac: float = flag(0.05, "Share of the learning rates to begin with; they fall linearly to 0", type=non_negative_float)
    # evaluation and output
    eval_every: int = flag(60, "Steps between evaluations; -1: never", type=int_or_off)
    eval_examples: int = flag(400, "Test problems to evaluate on", type=positive_int)
    save_every: int = flag(60, "Steps between checkpoints; -1: only at the end", type=int_or_off)


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


def mean_over_ranks(sums: torch.Tensor, count: int) -> list[float]:
    """sums / count, both added up over the ranks."""
    values = sum_over_ranks(torch.cat((sums.float(), torch.tensor([float(count)]))))
    return (values[:-1] / values[-1]).tolist()


def pass_at_k(records: list[dict], k_max: int) -> list[float]:
    """For k = 1 to k_max, the share of problems (over all ranks) that one of the first k samples solves."""
    correct = torch.tensor([[outcome["is_correct"] for outcome in record["outcomes"]] for record in records], dtype=torch.bool).view(-1, k_max)
    return mean_over_ranks(correct.cummax(dim=1).values.sum(dim=0) if len(correct) else torch.zeros(k_max), len(correct))


class Rollout:
    """Samples of one problem, as a batch to train on.

    inputs (N, T), targets (N, T) with -1 for what the model did not sample itself (prompt, calculator's answers, padding),
    rewards (N,), advantages (N,): rewards minus their mean. `lengths` of the sequences in tokens, prompt included.
    """

    def __init__(self, task, problem: dict, tokenizer, engine: Engine, settings: Settings, step: int, index: int):
        prompt = tokenizer.render_for_completion(problem)
        sequences: list[list[int]] = []
        masks: list[list[int]] = []
        for sampling_step in range(settings.num_samples // settings.device_batch_size):
            seed = hash((step, index, sampling_step)) & 0x7FFFFFFF  # the same in every Python process, as these are numbers
            generated = engine.generate_batch(prompt, num_samples=settings.device_batch_size, max_tokens=settings.max_new_tokens,
                                              temperature=settings.temperature, top_k=settings.top_k, seed=seed)
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


@command
def main(argv=None) -> None:
    settings = parse_settings(Settings, argv, "Improve a chat model by reinforcement learning")
    with training_process(settings) as process:
        sft_folder, sft_step = checkpoints.find_checkpoint(checkpoints.checkpoints_dir_of("sft"), settings.model_tag, settings.model_step)
        folder = Path(checkpoints.checkpoints_dir_of("rl"), sft_folder.name)
        with process.alone_in(folder):
            Reinforcement(settings, process, folder, sft_folder, sft_step).run()


class Reinforcement(TrainLoop):
    """Shapes change from problem to problem, so nothing is compiled. A checkpoint is named after the last step that is in it."""

    loss = staticmethod(policy_gradient)
    project = "nanochat-rl"
    section = "Chat RL"
    advice = "lower --init-lr-frac, or resume an earlier checkpoint"
    settings: Settings

    def __init__(self, settings: Settings, process: Process, folder: Path, sft_folder: Path, sft_step: int):
        super().__init__(settings, process, folder, asdict(settings))
        if settings.examples_per_step % self.world_size:
            raise UsageError(f"--examples-per-step={settings.examples_per_step} cannot be shared by {self.world_size} ranks; use a multiple")
        self.passes, rest = divmod(settings.num_samples, settings.device_batch_size)
        if rest:
            raise UsageError(f"--num-samples={settings.num_samples} cannot be made in passes of {settings.device_batch_size}; use a multiple of --device-batch-size")
        self.train_task, self.test_task = PROBLEMS[settings.task_name]()
        self.num_steps = settings.num_iterations if settings.num_iterations > 0 else len(self.train_task) // settings.examples_per_step * settings.num_epochs
        if self.num_steps == 0:
            raise UsageError(f"{settings.task_name} has {len(self.train_task)} problems, fewer than --examples-per-step={settings.examples_per_step}; lower it")
        self.examples_per_rank = settings.examples_per_step // self.world_size
        self.accumulation, self.total_batch_size = self.passes * self.examples_per_rank, 0
        self.my_examples = range(self.rank, len(self.train_task), self.world_size)
        print0(f"Number of steps: {self.num_steps}, {self.examples_per_rank} problems per rank and step")

        # The fine-tuned model, or the checkpoint to continue from
        self.sft_step = sft_step
        self.resume_step = self.saved_step = find_resume_step(settings, folder)
        train_state = None
        if self.resume_step is None:
            model, self.tokenizer, self.meta = checkpoints.build_model(sft_folder, sft_step, self.device, phase="train")
        else:
            print0(f"Resuming after step {self.resume_step} in {folder}")
            model, self.tokenizer, self.meta = checkpoints.build_model(folder, self.resume_step, self.device, phase="train")
            train_state = checkpoints.load_train_state(folder, self.resume_step, self.rank)
            if train_state is None:
                raise UsageError(f"the checkpoint of step {self.resume_step} in {folder} has no optimizer state to resume from; start a new run")
            names = ("task_name", "examples_per_step", "num_samples", "device_batch_size", "max_new_tokens", "temperature", "top_k", "world_size")
            now = {**self.user_config, "world_size": self.world_size}
            check_same({**self.meta["user_config"], "world_size": self.meta["world_size"]}, {name: now[name] for name in names})
            self.step = self.first_step = self.resume_step + 1
            self.go_on_with(self.meta)
        share_weights(model)
        check_output(folder, [model], self.rank == 0)
        self.engine = Engine(model, self.tokenizer)
        optimizer = model.setup_optimizer(unembedding_lr=settings.unembedding_lr, embedding_lr=settings.embedding_lr, matrix_lr=settings.matrix_lr,
                                          weight_decay=settings.weight_decay, matrix_optimizer=checkpoints.matrix_optimizer(self.meta))
        for group in optimizer.param_groups:
            group["initial_lr"] = group["lr"] * settings.init_lr_frac
        if self.resume_step is not None and train_state is not None:
            checkpoints.load_optimizer(folder, self.resume_step, optimizer, self.rank, self.world_size)
            set_exact_state(train_state, self.device, self.scaler)
        self.set_model(model, optimizer, model)
        self.events = [Event(settings.eval_every, self.evaluate, at_start=True, at_end=False)]
        self.open_log(model_config=asdict(model.config), num_steps=self.num_steps, sft_step=sft_step)

    # -- a step

    def batches(self) -> Iterator:
        """Samples of this rank's problems, made when they are needed."""
        totals = torch.zeros(2)  # rewards, lengths
        self.rewards: list[float] = []  # by pass
        for i in range(self.examples_per_rank):
            index = self.my_examples[(self.step * self.examples_per_rank + i) % len(self.my_examples)]
            self.model.eval()
            rollout = Rollout(self.train_task, self.train_task[index], self.tokenizer, self.engine, self.settings, self.step, index)
            self.model.train()
            totals += torch.tensor([rollout.rewards.sum().item(), float(sum(rollout.lengths))])
            for rows in torch.arange(self.settings.num_samples, device=self.device).split(self.settings.device_batch_size):
                self.rewards.append(rollout.rewards[rows].mean().item())
                yield rollout.inputs[rows], rollout.targets[rows], rollout.advantages[rows]
        self.reward, self.sequence_length = mean_over_ranks(totals, self.examples_per_rank * self.settings.num_samples)

    def schedule(self) -> float:
        multiplier = 1 - self.step / self.num_steps
        for group in self.optimizer.param_groups:
            group["lr"] = group["initial_lr"] * multiplier
        return multiplier

    def tell_step(self, losses: list[torch.Tensor], multiplier: float, dt: float) -> None:
        for loss, reward in zip(losses, self.rewards, strict=True):
            self.log.log("pass", self.step, loss=loss.item() / self.accumulation, reward=reward)
        live_line(f"step {self.step:05d}/{self.num_steps:05d} | reward: {self.reward:.4f} | sequence length: {self.sequence_length:.2f} | lrm: {multiplier:.2f} | dt: {dt:.2f}s")
        self.log.log("train", self.step, reward=self.reward, sequence_length=self.sequence_length, lrm=multiplier, dt=dt)
        self.wandb_run.log({"step": self.step, "reward": self.reward, "sequence_length": self.sequence_length})
        self.wandb_run.log({"step": self.step, "lrm": multiplier})

    # -- between the steps

    @property
    def done(self) -> bool:
        return self.step == self.num_steps

    @property
    def checkpoint_step(self) -> int:
        return self.step - 1

    def evaluate(self) -> None:
        settings = self.settings
        with self.evaluating():
            problems = run_gsm8k_eval(self.test_task, self.tokenizer, self.engine, max_examples=settings.eval_examples,
                                      num_samples=settings.device_batch_size, temperature=1.0)
            records = list(with_progress(problems, -(-min(len(self.test_task), settings.eval_examples) // self.world_size), "Evaluation"))
        scores = {f"pass@{k}": value for k, value in enumerate(pass_at_k(records, settings.device_batch_size), 1)}
        print0(f"Step {self.step:05d} | " + ", ".join(f"{name}: {value:.4f}" for name, value in scores.items()), flush=True)
        self.log.log("eval", self.step, **scores)
        self.wandb_run.log({"step": self.step, **scores})

    def data_position(self) -> dict:
        return {}

    def meta_data(self) -> dict:
        return dict(step=self.checkpoint_step, model_config=asdict(self.model.config), user_config=self.user_config, sft_step=self.sft_step,
                    world_size=self.world_size, matrix_optimizer=checkpoints.matrix_optimizer(self.meta), growth=self.meta.get("growth", []),
                    tokenizer=self.tokenizer.checksum())

    def final_report(self, peak_memory: float) -> list[dict]:
        return []


if __name__ == "__main__":
    sys.exit(main())

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

import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from nanochat import checkpoint_manager as checkpoints
from nanochat.cli import (
    UsageError,
    command,
    flag,
    folder_name,
    fraction,
    int_or_off,
    non_negative_float,
    non_negative_int,
    parse_settings,
    positive_int,
)
from nanochat.common import print0
from nanochat.compiler import compile_model
from nanochat.conversation_loader import furthest, pack_conversations
from nanochat.distributed import check_agreement, share_weights
from nanochat.engine import Engine, check_causal
from nanochat.gpt import GPT
from nanochat.layered_gpt import LayeredGPTConfig
from nanochat.loss_eval import FirstBatches
from nanochat.resume import check_same, find_resume_step
from nanochat.schedules import WARMDOWN_SHAPES
from nanochat.schedules import sft_lr_multiplier as lr_multiplier
from nanochat.schedules import sft_muon_momentum as muon_momentum
from nanochat.tokenizer import get_token_bytes
from nanochat.train_loop import Event, TrainLoop, training_process
from nanochat.training import Process, RunSettings, check_output
from tasks.common import Task
from tasks.evaluation import evaluate
from tasks.registry import CHATCORE, TASKS, build_mixture, chatcore, parts


@dataclass
class Settings(RunSettings):
    # the base model
    model_tag: str | None = flag(None, "Base model to start from (default: the largest); the chat model gets the same tag", type=folder_name)
    model_step: int | None = flag(None, "Checkpoint of the base model (default: the last)", type=non_negative_int)
    load_optimizer: int = flag(1, "Optimizer to start with; 1: with the base model's state, 0: a new one", type=int, choices=(0, 1))
    # data
    mixture: str = flag("smoltalk,mmlu,gsm8k", "What to train on: smoltalk, mmlu, gsm8k, spelling and files of conversations (.jsonl, .json), joined by commas",
                        type=parts)
    mmlu_epochs: int = flag(3, "Passes over MMLU in one over the mixture", type=positive_int)
    gsm8k_epochs: int = flag(4, "Passes over GSM8K in one over the mixture", type=positive_int)
    # horizon and batch; where the default is None, `inherit` fills in the base model's
    num_iterations: int = flag(-1, "Batches of --device-batch-size rows that each rank trains on; -1: once through the mixture", type=int_or_off)
    max_seq_len: int = flag(None, "Context length in tokens (default: the base model's)", type=positive_int)
    device_batch_size: int = flag(None, "Rows per rank and pass (default: the base model's)", type=positive_int)
    total_batch_size: int = flag(None, "Tokens per step (default: the base model's)", type=positive_int)
    # optimization
    embedding_lr: float = flag(None, "Learning rate of the embeddings (default: the base model's)", type=non_negative_float)
    unembedding_lr: float = flag(None, "Learning rate of the head (default: the base model's)", type=non_negative_float)
    matrix_lr: float = flag(None, "Learning rate of the blocks' matrices (default: the base model's)", type=non_negative_float)
    init_lr_frac: float = flag(0.8, "Share of the learning rates to begin with", type=non_negative_float)
    warmup_ratio: float = flag(0.0, "Share of the run over which the learning rates rise", type=fraction)
    warmdown_ratio: float = flag(0.5, "Share of the run over which the learning rates fall", type=fraction)
    warmdown_shape: str = flag("linear", "Curve on which the learning rates fall", choices=WARMDOWN_SHAPES)
    final_lr_frac: float = flag(0.0, "Share of the learning rates that is left at the end", type=fraction)
    # evaluation
    eval_every: int = flag(200, "Steps between validations; -1: never", type=int_or_off)
    eval_tokens: int = flag(40 * 524288, "Tokens of a validation", type=positive_int)
    chatcore_every: int = flag(200, "Steps between evaluations on tasks; -1: never", type=int_or_off)
    chatcore_max_cat: int = flag(-1, "Problems of each multiple-choice task; -1: all", type=int_or_off)
    chatcore_max_sample: int = flag(24, "Problems of each other task; -1: all", type=int_or_off)


def inherit(settings: Settings, meta: dict) -> Settings:
    """The settings with what the command line left open filled in: the base model's own values, or nanochat's defaults."""
    fallbacks = dict(max_seq_len=2048, device_batch_size=32, total_batch_size=524288, embedding_lr=0.3, unembedding_lr=0.004, matrix_lr=0.02)
    missing: dict[str, Any] = {}
    for name, fallback in fallbacks.items():
        if getattr(settings, name) is None:
            values = meta.get("user_config", {}) if name.endswith("_lr") else meta  # the base run may have chosen its batch itself
            missing[name] = fallback if values.get(name) is None else values[name]
    return replace(settings, **missing)


def evaluation_tasks(mixture: str) -> dict[str, Task]:
    """What to evaluate on during the training: the tasks of ChatCORE where they can be had, and letter counting if it is trained."""
    tasks: dict[str, Task] = {}
    if mixture != "spelling":
        try:
            tasks = {name: TASKS[name].test() for name in CHATCORE}
        except UsageError as error:
            print0(f"No ChatCORE in this run: {error}")
    if "spelling" in mixture.split(","):
        tasks["SpellingBee"] = TASKS["SpellingBee"].test()
    return tasks


def with_context(model: GPT, sequence_len: int) -> GPT:
    """The model, rebuilt for another context length, from which the attention windows follow."""
    config = model.config
    if config.sequence_len == sequence_len:
        return model
    longer = config.with_context(sequence_len) if isinstance(config, LayeredGPTConfig) else replace(config, sequence_len=sequence_len)
    rebuilt = checkpoints.model_from_config(asdict(longer))
    checkpoints.load_weights(rebuilt, model.state_dict(), model.get_device())
    return rebuilt.train()


@command
def main(argv=None) -> None:
    settings = parse_settings(Settings, argv, "Fine-tune a base model on conversations")
    with training_process(settings) as process:
        base_folder, base_step = checkpoints.find_checkpoint(checkpoints.checkpoints_dir_of("base"), settings.model_tag, settings.model_step)
        folder = Path(checkpoints.checkpoints_dir_of("sft"), base_folder.name)
        with process.alone_in(folder):
            FineTuning(settings, process, folder, base_folder, base_step).run()


class FineTuning(TrainLoop):
    project = "nanochat-sft"
    section = "Chat SFT"
    advice = "lower --init-lr-frac, or resume an earlier checkpoint"
    wandb_every = 10
    first_number = 1
    digits = 4
    mfu_name = "mfu"
    settings: Settings

    def __init__(self, settings: Settings, process: Process, folder: Path, base_folder: Path, base_step: int):
        super().__init__(settings, process, folder, asdict(settings))
        self.train_data, self.val_data = build_mixture(settings.mixture, settings.mmlu_epochs, settings.gsm8k_epochs)
        print0(f"Training mixture: {len(self.train_data):,} conversations; validation: {len(self.val_data):,}")
        self.tasks = evaluation_tasks(settings.mixture) if settings.chatcore_every > 0 else {}
        check_agreement("the tasks to evaluate on", sorted(self.tasks), "let all of them see the same data, or give --chatcore-every=-1")

        # The base model, or the checkpoint to continue from
        self.resume_step = self.saved_step = find_resume_step(settings, folder)
        meta: dict = {}
        train_state = None
        if self.resume_step is None:
            model, self.tokenizer, _ = checkpoints.build_model(base_folder, base_step, self.device, phase="train")
        else:
            print0(f"Resuming from step {self.resume_step} in {folder}")
            model, self.tokenizer, meta = checkpoints.build_model(folder, self.resume_step, self.device, phase="train")
            train_state = checkpoints.load_train_state(folder, self.resume_step, self.rank)
            if train_state is None or "base_step" not in meta:
                raise UsageError(f"the checkpoint of step {self.resume_step} in {folder} has no data position to resume from; start a new run")
            base_step = meta["base_step"]
        self.base_step, self.base_meta = base_step, checkpoints.load_meta(base_folder, base_step)
        self.settings = settings = inherit(settings, self.base_meta)
        if meta:
            then = {**meta["user_config"], "mixture": parts(meta["user_config"]["mixture"]), "max_seq_len": meta["model_config"]["sequence_len"], "world_size": meta["world_size"]}
            check_same(then, dict(mixture=settings.mixture, mmlu_epochs=settings.mmlu_epochs, gsm8k_epochs=settings.gsm8k_epochs,
                                  max_seq_len=settings.max_seq_len, world_size=self.world_size))
        B, T, self.total_batch_size = settings.device_batch_size, settings.max_seq_len, settings.total_batch_size
        self.B, self.T = B, T
        check_causal(model)
        model = with_context(model, T)
        share_weights(model)
        check_output(folder, [model], self.rank == 0)
        unit = B * T * self.world_size
        self.accumulation, rest = divmod(self.total_batch_size, unit)
        if rest or self.accumulation == 0:
            raise UsageError(f"a total batch of {self.total_batch_size} tokens cannot be made of passes of {B} rows * {T} tokens * {self.world_size} ranks; "
                             f"use a --total-batch-size that is a multiple of {unit}, or another --device-batch-size")
        self.eval_every = settings.eval_every if len(self.val_data) else -1
        self.eval_steps = settings.eval_tokens // unit
        if self.eval_every > 0 and self.eval_steps == 0:
            raise UsageError(f"--eval-tokens={settings.eval_tokens} is less than one batch; use at least {unit}")
        self.validation = FirstBatches(self.draw_validation, self.eval_steps, B * T)
        print0(f"Total batch size {self.total_batch_size:,} => gradient accumulation steps: {self.accumulation}")

        # Optimizer
        self.matrix_optimizer = checkpoints.matrix_optimizer(self.base_meta)
        optimizer = model.setup_optimizer(unembedding_lr=settings.unembedding_lr, embedding_lr=settings.embedding_lr, matrix_lr=settings.matrix_lr,
                                          weight_decay=0.0, matrix_optimizer=self.matrix_optimizer)
        for group in optimizer.param_groups:
            group["initial_lr"] = group["lr"] * settings.init_lr_frac
        if self.resume_step is not None:
            checkpoints.load_optimizer(folder, self.resume_step, optimizer, self.rank, self.world_size)
        elif settings.load_optimizer and checkpoints.saved_ranks(base_folder, base_step):
            checkpoints.load_optimizer(base_folder, base_step, optimizer, self.rank, self.world_size)
        self.set_model(model, optimizer, compile_model(model, self.device.type))
        self.token_bytes = get_token_bytes(self.device)
        self.metrics: dict[str, float] = {}
        self.events = [Event(settings.chatcore_every if self.tasks else -1, self.evaluate_tasks)]
        self.position: dict | None = None
        if train_state is not None:
            self.restore(meta, train_state)
            self.position = train_state["loader_state"]
        self.train_loader = pack_conversations(self.train_data, self.tokenizer, B, T, self.device, settings.num_iterations, resume_state=self.position)
        self.open_log(model_config=asdict(model.config), flops_per_token=self.flops_per_token, total_batch_size=self.total_batch_size,
                      base_tag=base_folder.name, base_step=base_step)
        self.x, self.y, self.state = next(self.train_loader)  # always one batch ahead
        self.last, self.share = furthest(self.state, self.device)

    # -- a step

    def batches(self) -> Iterator:
        for _ in range(self.accumulation):
            self.position = self.state
            yield self.x, self.y
            self.x, self.y, self.state = next(self.train_loader)

    def schedule(self) -> float:
        settings = self.settings
        self.last, self.share = furthest(self.state, self.device)
        only = self.last and self.step == 0  # its learning rate is that of a beginning, as it would be 0 at the end
        multiplier = lr_multiplier(0.0 if only else self.share, settings.warmup_ratio, settings.warmdown_ratio, settings.final_lr_frac, settings.warmdown_shape)
        for group in self.optimizer.param_groups:
            group["lr"] = group["initial_lr"] * multiplier
            if group["kind"] == "muon":
                group["momentum"] = muon_momentum(self.step)
        return multiplier

    # -- between the steps

    @property
    def done(self) -> bool:
        return self.last and self.step > 0  # however few batches there are, there is one step

    def progress(self) -> float:
        return self.share

    def data_facts(self) -> dict:
        return dict(epoch=self.state["epoch"])

    def step_record(self) -> dict:
        return dict(progress=self.share)

    def draw_validation(self) -> Iterator:
        batches = pack_conversations(self.val_data, self.tokenizer, self.B, self.T, self.device)
        return ((x, y) for x, y, _ in batches)

    def validation_batches(self) -> Iterator:
        return iter(self.validation)

    def evaluate_tasks(self) -> None:
        """Accuracy by task; before them, where all of its tasks are there, chatcore_metric and chatcore_cat (multiple choice only)."""
        settings, engine, accuracies = self.settings, Engine(self.model, self.tokenizer), {}
        with self.evaluating():
            for name, task in self.tasks.items():
                limit = settings.chatcore_max_cat if task.eval_type == "categorical" else settings.chatcore_max_sample
                accuracies[name] = evaluate(task, self.model, self.tokenizer, engine, batch_size=self.B, max_problems=limit if limit > 0 else None)
        self.metrics = accuracies
        if CHATCORE.keys() <= accuracies.keys():
            core = {name: accuracies[name] for name in CHATCORE}
            categorical = {name: value for name, value in core.items() if self.tasks[name].eval_type == "categorical"}
            self.metrics = {"chatcore_metric": chatcore(core), "chatcore_cat": chatcore(categorical), **accuracies}
        print0(f"Step {self.step:05d} | " + " | ".join(f"{name}: {value:.4f}" for name, value in self.metrics.items()))
        self.log.log("chatcore", self.step, **self.metrics, **self.spent())
        self.log_wandb(**{name if name.startswith("chatcore") else f"chatcore/{name}": value for name, value in self.metrics.items()})

    def data_position(self) -> dict:
        return dict(loader_state=self.position)

    def meta_data(self) -> dict:
        return dict(
            step=self.step, val_bpb=self.val_bpb, model_config=asdict(self.model.config), user_config=self.user_config, base_step=self.base_step,
            device_batch_size=self.B, max_seq_len=self.T, total_batch_size=self.total_batch_size, world_size=self.world_size,
            matrix_optimizer=self.matrix_optimizer, growth=self.base_meta.get("growth", []), tokenizer=self.tokenizer.checksum(), loop_state=self.loop_state())

    def final_report(self, peak_memory: float) -> list[dict]:
        return [{"Number of iterations": self.step, "DDP world size": self.world_size},
                {"Minimum validation bpb": self.loop_state()["min_val_bpb"], **self.metrics}]


if __name__ == "__main__":
    sys.exit(main())

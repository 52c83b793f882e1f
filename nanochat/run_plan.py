"""What a run of pretraining will be, settled before anything is trained: its models, horizon, growths, schedule and the sizes of its batches."""
from dataclasses import dataclass, fields, replace
from typing import Any

import torch

from nanochat.accumulation import fit_device_batch
from nanochat.cli import UsageError, flag, int_or_off, non_negative_float, positive_int, seed
from nanochat.common import check_device_type, print0
from nanochat.gpt import GPT, GPTConfig
from nanochat.growth.controller import GrowthController, GrowthOperatorSettings, GrowthSettings
from nanochat.growth.model import empty_model
from nanochat.growth.stages import Shape, Stage, describe, plan_stages
from nanochat.layered_gpt import empty_gpt
from nanochat.memory import memory_table
from nanochat.objectives import OBJECTIVES, ObjectiveSettings
from nanochat.optim import MATRIX_OPTIMIZERS
from nanochat.origin import Checkpoint, OriginSettings
from nanochat.recipe import Horizon, HorizonSettings, ModelSettings, batch_scale, plan_horizon, scaling_params
from nanochat.schedules import Branch, Schedule, ScheduleSettings
from nanochat.tokenizer import get_tokenizer
from nanochat.training import Process, RunSettings

CHECK_SHARE = 0.01  # of the run's tokens, at most, in a validation by which a growth is decided; it is without a backward pass


@dataclass
class LearningSettings(ScheduleSettings, ModelSettings):
    """The flags that decide what a model learns from a given number of tokens: with the sizes, all that a scaling law depends on."""

    embedding_lr: float = flag(0.3, "Learning rate of the embeddings", type=non_negative_float)
    unembedding_lr: float = flag(0.008, "Learning rate of the head", type=non_negative_float)
    matrix_lr: float = flag(0.02, "Learning rate of the blocks' matrices", type=non_negative_float)
    scalar_lr: float = flag(0.5, "Learning rate of the residual scalars", type=non_negative_float)
    weight_decay: float = flag(0.28, "Weight decay of the blocks' matrices, at the reference batch and tokens; ngpt: 0", type=non_negative_float)
    matrix_optimizer: str = flag("muon", "Optimizer of the blocks' matrices", choices=MATRIX_OPTIMIZERS)


@dataclass
class PlanSettings(LearningSettings, HorizonSettings, GrowthSettings, OriginSettings, RunSettings):
    """The flags that the plan follows from."""

    seed: int = flag(42, "Seed of the initialization; the data keep their order", type=seed)
    eval_every: int = flag(250, "Steps between validations; -1: never", type=int_or_off)
    eval_tokens: int = flag(80 * 524288, "Tokens of a validation", type=positive_int)
    data_streams: int = flag(-1, "Shares that the row groups are dealt into; -1: one per rank; with the same number, runs on fewer ranks see the same batches",
                             type=int_or_off)

    def path(self) -> list[Shape]:
        """The shapes of all stages; none without growth. A branch grows to --grow-to alone, whatever its trunk was told."""
        if not self.branch_from:
            return self.growth_path(self.depth, self.aspect_ratio, self.head_dim)
        trunk = self.origin_config()
        return [Shape(trunk.n_layer, trunk.n_embd), self.grow_to] if trunk and self.grow_to else []

    def check_branch(self, trunk: dict[str, Any]) -> None:
        """Raises UsageError for flags of a branch that its trunk, whose flags are given, has not, and that a branch has no choice of."""
        names = {field.name for field in fields(ModelSettings)} - {field.name for field in fields(ObjectiveSettings)}
        names |= {field.name for field in fields(GrowthSettings)} - {field.name for field in fields(GrowthOperatorSettings) if self.grow_to}
        for field in fields(self):
            if field.name in names and getattr(self, field.name) != trunk.get(field.name, field.default):
                raise UsageError(f"--{field.name.replace('_', '-')} is not for a branch, which has its trunk's model and grows to --grow-to alone; leave it out")

    def first_and_final(self, vocab_size: int) -> tuple[GPTConfig, GPTConfig]:
        """The models that the run begins and ends with; of a run that begins with a checkpoint its shape counts, not that of the flags."""
        path, first = self.path(), self.origin_config()
        if first is not None:
            return first, self.stages(first)[-1].config if path else first
        first, final = (self.config(vocab_size, shape.depth, shape.width, shape.rank) for shape in (path[0], path[-1])) if path else [self.config(vocab_size)] * 2
        return first, final

    def stages(self, first: GPTConfig) -> list[Stage]:
        return plan_stages(first, self.path(), self.grow_depth_mode)


def show_memory(settings: PlanSettings, device_type: str) -> None:
    """The memory of each stage, without a GPU, data or a tokenizer (whose vocabulary would be nanochat's)."""
    if settings.device_batch_size == -1:
        raise UsageError("--memory needs the rows per pass; give --device-batch-size a positive number")
    check_device_type(device_type)
    try:
        vocab_size = get_tokenizer().get_vocab_size()
    except UsageError:
        vocab_size = GPTConfig.vocab_size
    first, _ = settings.first_and_final(vocab_size)
    stages = [stage.config for stage in settings.stages(first)] if settings.path() else [first]
    print0(memory_table([(describe(stage), stage) for stage in stages], settings.device_batch_size, device_type, matrix_optimizer=settings.matrix_optimizer))


class RunPlan:
    """Raises UsageError for what cannot be trained.

    model: initialized, on the device; of the checkpoint that the run begins with the shape only, where it begins with one.
    schedule: by `position`, in steps of the final model.
    budget: FLOPs at the end of the run.
    """

    def __init__(self, settings: PlanSettings, vocab_size: int, process: Process):
        _, self.world_size, device = process
        self.streams = self.world_size if settings.data_streams == -1 else settings.data_streams
        if self.streams % self.world_size:
            raise UsageError(f"--data-streams={self.streams} cannot be shared by {self.world_size} ranks; use a multiple")
        first, final = settings.first_and_final(vocab_size)
        if first.causal != OBJECTIVES[settings.objective].causal:
            raise UsageError(f"the weights of {settings.branch_from or settings.init_from} were trained with another objective than --objective={settings.objective}, and attention sees other "
                             "tokens with it; give the objective of then")
        settings.check_objective()
        self.settings = settings = replace(settings, max_seq_len=first.sequence_len)
        for remark in settings.changes().remarks(final):
            print0(remark)
        torch.manual_seed(settings.seed)
        self.model, self.final_model = empty_gpt(first), empty_gpt(final)
        self.model.to_empty(device=device)
        self.model.init_weights()
        self.padded_vocab = self.model.transformer.wte.num_embeddings
        if self.padded_vocab != vocab_size:
            print0(f"Padding the vocabulary from {vocab_size} to {self.padded_vocab}: faster matmuls")
        for key, value in self.model.num_scaling_params().items():
            print0(f"{key:24s}: {value:,}")
        print0(f"Estimated FLOPs per token: {self.model.estimate_flops():e}")
        shape = dict(aspect_ratio=settings.aspect_ratio, head_dim=settings.head_dim, sequence_len=settings.max_seq_len, vocab_size=vocab_size,
                     window_pattern=settings.window_pattern)
        trunk = settings.branch_from.meta() if settings.branch_from else {}
        scale = trunk.get("loop_state", {}).get("weight_decay_scale")
        if scale is None:
            self.horizon = plan_horizon(self.planned_model(vocab_size, first), shape, settings.num_iterations, settings.target_flops, settings.target_param_data_ratio,
                                        settings.total_batch_size, settings.changes())
        else:  # of a branch, whose trunk has planned
            total = settings.total_batch_size if settings.total_batch_size > 0 else trunk["total_batch_size"]
            self.horizon = Horizon(total, settings.branch_steps, settings.branch_steps * total, batch_scale(total), scale)
        self.weight_decay = settings.weight_decay * self.horizon.weight_decay_scale
        self.schedule: Schedule | Branch = Schedule(settings, self.horizon.num_iterations, self.weight_decay)
        self.budget = self.final_model.estimate_flops() * self.horizon.total_tokens
        self.growth: GrowthController | None = None
        if settings.branch_from:
            self.branch_off(settings.branch_from, first)
        elif settings.path():
            self.plan_growth(first)
        self.fit_batches(device)

    def planned_model(self, vocab_size: int, first: GPTConfig) -> GPT:
        """The one that the horizon is planned for: the final one. Of a branch, the one that its trunk was planned for, of which older checkpoints and nanochat's hold the flags alone."""
        settings = self.settings
        if not settings.branch_from:
            return self.final_model
        trunk = replace(settings, branch_from=None, grow_to=None)
        return empty_gpt(trunk.first_and_final(vocab_size)[1] if trunk.path() else first)

    def plan_growth(self, first: GPTConfig) -> None:
        settings = self.settings
        self.growth = GrowthController(settings, settings.stages(first), self.budget, self.padded_vocab, settings.seed, measured=settings.eval_every > 0 or settings.kappa is not None)
        self.budget = self.growth.budget
        if self.budget < self.growth.stages[0].flops_per_token * self.horizon.total_batch_size:
            raise UsageError(f"--grow-budget={settings.grow_budget:g} pays for less than one step; raise it, or lower --total-batch-size")
        print0(self.growth.show_plan())
        planned, grown = self.final_model.estimate_flops(), self.growth.stages[-1].flops_per_token
        if abs(grown / planned - 1) > 0.01:
            print0(f"The grown model has {grown:,} FLOPs per token, one of these flags that does not grow {planned:,}, whose budget it gets: growth keeps the width of heads, "
                   "the ratio of key heads and the ranks of layers")

    def branch_off(self, trunk: Checkpoint, first: GPTConfig) -> None:
        """Makes the rest of the run one of its own schedule from where the trunk, a model of the configuration `first`, stands."""
        settings, meta, batch = self.settings, trunk.meta(), self.horizon.total_batch_size
        step, loop_state = meta["step"], meta.get("loop_state", {})
        flops = loop_state.get("flops", self.model.estimate_flops() * meta["step"] * batch)
        if "schedule" in loop_state:  # the trunk may be a branch itself
            lr, decay = loop_state["schedule"]
            now = self.schedule.at(0)._replace(lr=lr, weight_decay=self.weight_decay * decay)
        else:
            now = self.schedule.at(step)
        if settings.steady_rate:
            now = now._replace(lr=settings.steady_rate, weight_decay=self.weight_decay * settings.steady_rate)
        self.schedule = Branch(settings, now, step, settings.steady_steps, settings.warmdown_steps or 0)
        self.horizon = replace(self.horizon, num_iterations=step + settings.branch_steps)
        self.budget = flops + settings.branch_steps * batch * self.final_model.estimate_flops()
        if settings.grow_to:  # at once, whatever the trunk was told
            self.growth = GrowthController(replace(settings, kappa=None, grow_at=None, grow_budget=1.0), settings.stages(first), self.budget, self.padded_vocab, settings.seed,
                                           measured=settings.eval_every > 0, growths_at=[0.0], earlier=meta.get("growth", []))

    def fit_batches(self, device: torch.device) -> None:
        """Rows per pass, passes per step, and those of a validation, for each rank."""
        settings, total, T, B = self.settings, self.horizon.total_batch_size, self.settings.max_seq_len, self.settings.device_batch_size
        if B == -1:
            rows, rest = divmod(total, T * self.streams)
            if rest:
                raise UsageError(f"--total-batch-size={total} is no multiple of {T * self.streams} (context * streams)")
            B = fit_device_batch(self.model, rows, T)
            for stage in self.growth.stages[1:] if self.growth else ():  # all of them must fit
                B = min(B, fit_device_batch(empty_model(stage.config, self.padded_vocab, device), rows, T))
            print0(f"Device batch size: {B} rows per pass")
        self.rows, self.passes = B, settings.passes(total, B, T, self.world_size, self.streams)
        self.eval_steps = settings.eval_tokens // (B * T * self.streams) * (self.streams // self.world_size)
        brief = max(1, min(settings.eval_tokens, round(CHECK_SHARE * self.horizon.total_tokens)) // (B * T * self.streams))
        self.check_tokens, self.check_steps = brief * B * T * self.streams, brief * (self.streams // self.world_size)
        if settings.eval_every > 0 and self.eval_steps == 0:
            raise UsageError(f"--eval-tokens={settings.eval_tokens} is less than one batch; use at least {B * T * self.streams}")
        if settings.objective == "mixed" and self.passes * self.world_size * min(settings.causal_share, 1 - settings.causal_share) < 1:
            print0(f"Few passes make a step ({self.passes * self.world_size}), so some steps learn next tokens alone and others hidden ones; a lower --device-batch-size mixes them")
        print0(f"Total batch size {total:,} => gradient accumulation steps: {self.passes}")
        tokens, final = self.horizon.total_tokens, self.final_model
        print0(f"Number of iterations{' of the final model alone' if self.growth else ''}: {self.horizon.num_iterations:,} = {tokens:,} tokens, "
               f"{tokens / scaling_params(final):.2f} per parameter, {final.estimate_flops() * tokens:e} FLOPs")

"""Which model to train in a given time: for each depth the tokens that the time allows, and of these the one with the lowest predicted loss.

* Depth is the one dial (recipe.py). The time of a step is step_time.py's, the loss scaling_law.py's, the memory memory.py's.
* A text that is read again and again counts for less (scaling_law.effective_tokens).
* Growth: the tokens D_small of the small model count for the large one as rho * D_small, but for no more than takes the large one to the loss that the small
  one had, so L(N_large, D_large + min(rho * D_small, those)). The upper bound is a growth that loses nothing, as in analysis/growth_bound.py. How little is
  known of rho is part of the error.
"""
import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

import numpy as np

from nanochat.cli import UsageError
from nanochat.gpt import GPTConfig
from nanochat.layered_gpt import empty_gpt
from nanochat.memory import RESERVED, ROLES, training_memory
from nanochat.planning.scaling_law import Law, effective_tokens
from nanochat.planning.step_time import Card, Speed
from nanochat.recipe import plan_horizon, scaling_params
from nanochat.run_plan import LearningSettings, PlanSettings

MOST_DEPTH = 64
FEWEST_TOKENS = 0.5  # fresh ones, or worth as much, per parameter: a larger model is not worth looking at
MOST_EPOCHS = 16  # of a text; from there on reading it once more gives next to nothing (2305.16264)
PATIENCE = 3  # depths without a lower loss after which no larger one is looked at
FEWEST_STEPS, ENOUGH_STEPS = 20, 250  # a run of fewer is none; while it has fewer than that many, smaller batches are better (dev/LOG.md)
VALIDATIONS, SHARE_OF_TOKENS, FORWARD = 5, 0.02, 1 / 3  # of a run; each of that share of its tokens, at that share of a training pass
GROWTH_SHARES = 0.3, 0.5, 0.7  # of the time, for the small model
RHO_ERROR = 0.25  # 95 % of what was measured lies within (0.25 to 0.61 in the growths of docs/planning.md)
CPU_PASS = 8192  # tokens that keep it busy, as in accumulation.fit_device_batch
NOT_LEARNED = {"depth", "aspect_ratio"}  # of LearningSettings, what is planned
RECIPE = [field.name for field in fields(LearningSettings) if field.name not in NOT_LEARNED]


@dataclass(frozen=True)
class Size:
    """What is fixed about a model of some depth, whatever the budget."""

    config: GPTConfig
    params: int  # of blocks and head
    total_params: int
    flops_per_token: int
    batch: int  # tokens of a step, by the recipe


@dataclass(frozen=True)
class Candidate:
    """One way to spend the budget. `small`: the model that grows into this one, after the share `grow_at` of the FLOPs."""

    size: Size
    batch: int
    rows: int
    steps: int  # of this model, had it all the FLOPs
    tokens: int  # that are read, those of the small model too
    worth: float  # fresh tokens that they are worth
    flops: float
    seconds: float
    loss: float  # that the law foretells, in its unit
    error: float  # of it, in the same unit: 95 % of what is to be expected lies within loss ± error
    small: GPTConfig | None = None
    grow_at: float = 0.0

    @property
    def name(self) -> str:
        shapes = ([self.small] if self.small else []) + [self.size.config]
        return " → ".join(f"{config.n_layer}x{config.n_embd}" for config in shapes)


class Memory:
    """Bytes of a training step: counted for one model (memory.py) with two numbers of rows, and carried over to others like it.

    Weights, gradients and optimizer go with the parameters; of the rest a part goes with rows, layers and width, and a part stays.
    """

    def __init__(self, device_type: str, compiled: bool, matrix_optimizer: str):
        self.options: dict[str, Any] = dict(device_type=device_type, compiled=compiled, matrix_optimizer=matrix_optimizer)
        self.per_param = self.per_channel = self.constant = 0.0

    def count(self, size: Size, rows: int) -> None:
        """rows: of a pass; from 8 on their memory is a straight line, as the pieces of the loss have their full size."""
        many = min(8, max(2, rows))
        few = many // 2
        counted = [training_memory(size.config, n, **self.options) for n in (few, many)]
        states, rest = (np.array([sum(one[role] for role in roles) for one in counted]) for roles in (ROLES[:3], ROLES[3:]))
        per_row = max(0.0, (rest[1] - rest[0]) / (many - few))
        self.per_param = states[1] / size.total_params
        self.per_channel = per_row / (size.config.n_layer * size.config.n_embd)
        self.constant = rest[1] - many * per_row

    def bytes(self, size: Size, rows: int) -> float:
        return self.per_param * size.total_params + self.constant + rows * self.per_channel * size.config.n_layer * size.config.n_embd


@dataclass
class Planner:
    """budget: seconds, or with `in_flops` FLOPs. rows, batch: -1 to have them found; unique: tokens of the text, inf where it is not there."""

    settings: LearningSettings
    vocab_size: int
    budget: float
    in_flops: bool
    law: Law
    device_type: str
    devices: int = 1
    rows: int = -1
    batch: int = -1
    unique: float = math.inf
    rho: float = 0.5
    most_rows: int = 32
    speed: Speed = Card(1, 1, 1)

    def __post_init__(self) -> None:
        self._sizes: dict[int, Size] = {}

    def change_vocabulary(self, vocab_size: int) -> None:
        self.vocab_size = vocab_size
        self._sizes.clear()

    def size(self, depth: int) -> Size:
        if depth not in self._sizes:
            config, settings = self.settings.config(self.vocab_size, depth=depth), self.settings
            model = empty_gpt(config)
            shape = dict(aspect_ratio=settings.aspect_ratio, head_dim=settings.head_dim, sequence_len=settings.max_seq_len, vocab_size=self.vocab_size,
                         window_pattern=settings.window_pattern)
            horizon = plan_horizon(model, shape, 1, -1, 12, self.batch, settings.changes())
            self._sizes[depth] = Size(config, scaling_params(model), model.num_scaling_params()["total"], model.estimate_flops(), horizon.total_batch_size)
        return self._sizes[depth]

    # -- one model

    def candidate(self, depth: int) -> Candidate | None:
        """All of the budget for this depth; None where it is too little for it."""
        size = self.size(depth)
        unit = self.smallest_batch()
        batch = self.whole_rows(size.batch)
        while True:
            rows = self.rows_of(batch, size)
            step = self.speed.seconds(size.config, size.flops_per_token, batch, rows)
            per_step = size.flops_per_token * batch if self.in_flops else step * self.with_validations()
            steps = int(min(self.budget / per_step, MOST_EPOCHS * self.unique / batch))
            if self.batch != -1 or steps >= ENOUGH_STEPS or batch // 2 < unit or batch // 2 % unit:
                break
            batch //= 2
        tokens = steps * batch
        worth = effective_tokens(tokens, self.unique)
        if steps < FEWEST_STEPS or worth < FEWEST_TOKENS * size.params:
            return None
        return Candidate(size, batch, rows, steps, tokens, worth, size.flops_per_token * tokens, steps * step * self.with_validations(), *self.law.predict(size.params, worth))

    def whole_rows(self, batch: int) -> int:
        """The batch, of whole rows on each device unless it was given."""
        unit = self.smallest_batch()
        return unit * max(1, round(batch / unit)) if self.batch == -1 else self.batch

    def smallest_batch(self) -> int:
        """Tokens of one pass of all devices: of one row each, or of --device-batch-size."""
        return self.settings.max_seq_len * self.devices * max(1, self.rows)

    @staticmethod
    def with_validations() -> float:
        """The time of a run over that of its steps."""
        return 1 + VALIDATIONS * SHARE_OF_TOKENS * FORWARD

    def rows_of(self, batch: int, size: Size) -> int:
        """Rows of a pass: as many as divide the batch, and no more than `most_rows` and what keeps a CPU busy. Raises UsageError."""
        rows, rest = divmod(batch, size.config.sequence_len * self.devices)
        if rest or rows == 0:
            raise UsageError(f"--total-batch-size={batch} is no multiple of {size.config.sequence_len * self.devices} (context * devices)")
        if self.rows != -1:
            if rows % self.rows:
                raise UsageError(f"a batch of {batch} tokens cannot be made of passes of --device-batch-size={self.rows} rows; leave that out to have it found")
            return self.rows
        most = max(1, CPU_PASS // size.config.sequence_len) if self.device_type == "cpu" else self.most_rows
        return next(n for n in range(min(most, rows), 0, -1) if rows % n == 0)

    def candidates(self, depths: list[int]) -> list[Candidate]:
        """By depth; of all depths if none are given, until the loss falls no more or the budget is too small."""
        found: list[Candidate] = []
        for depth in depths or range(1, MOST_DEPTH + 1):
            one = self.candidate(depth)
            if one is not None:
                found.append(one)
            if one is None or depth > lowest(found).size.config.n_layer + PATIENCE:
                break
        return found

    # -- growth

    def growths(self, finals: list[Candidate]) -> Iterator[Candidate]:
        """Of every model below `finals` into each of them."""
        for final in finals:
            for depth in range(1, final.size.config.n_layer):
                small = self.size(depth)
                if small.config.n_embd <= final.size.config.n_embd:
                    yield from (self.growth(small, final, share) for share in GROWTH_SHARES)

    def growth(self, small: Size, final: Candidate, share: float) -> Candidate:
        """The share of the budget for the small model, the rest for the final one, in batches of the latter."""
        large = final.size
        if self.in_flops:
            tokens = [self.budget * part / size.flops_per_token for part, size in ((share, small), (1 - share, large))]
        else:
            tokens = [self.budget * part / self.seconds_per_token(size, final) for part, size in ((share, small), (1 - share, large))]
        tokens = [min(n, part * MOST_EPOCHS * self.unique) for n, part in zip(tokens, (share, 1 - share))]
        before = effective_tokens(tokens[0], self.unique)
        lossless = self.law.tokens_for(large.params, self.law.predict(small.params, before)[0])
        worth, at_worst = (effective_tokens(min(max(rho, 0.0) * before, lossless) + tokens[1], self.unique) for rho in (self.rho, self.rho - RHO_ERROR))
        flops = [n * size.flops_per_token for n, size in zip(tokens, (small, large))]
        seconds = sum(n * self.seconds_per_token(size, final) for n, size in zip(tokens, (small, large)))
        loss, error = self.law.predict(large.params, worth)
        error = math.hypot(error, self.law.predict(large.params, at_worst)[0] - loss)
        return replace(final, steps=int(sum(flops) / (large.flops_per_token * final.batch)), tokens=int(sum(tokens)), worth=worth, flops=sum(flops), seconds=seconds,
                       small=small.config, grow_at=flops[0] / sum(flops), loss=loss, error=error)

    def seconds_per_token(self, size: Size, final: Candidate) -> float:
        """In the batches and passes of `final`."""
        return self.speed.seconds(size.config, size.flops_per_token, final.batch, final.rows) / final.batch * self.with_validations()

    # -- what to type

    def command(self, one: Candidate) -> list[str]:
        """The words of the command that trains it."""
        config = one.size.config
        plain = {field.name: field.default for field in fields(PlanSettings)}
        learned = {name: value for name, value in asdict(self.settings).items() if name in {*RECIPE, "aspect_ratio"} and value != plain[name]}
        unit = one.rows * config.sequence_len * self.devices
        flags: dict[str, Any] = dict(depth=config.n_layer, **learned, device_batch_size=one.rows, total_batch_size=one.batch)
        if one.small:
            flags |= dict(target_flops=f"{one.flops:.4g}", grow_path=f"{one.small.n_layer}x{one.small.n_embd},{config.n_layer}x{config.n_embd}", grow_at=f"{one.grow_at:.3g}")
        else:
            flags |= dict(num_iterations=one.steps)
        flags |= dict(eval_every=-(-one.steps // (VALIDATIONS - 1)), eval_tokens=min(max(1, round(SHARE_OF_TOKENS * one.steps * one.batch / unit)) * unit, PlanSettings.eval_tokens // unit * unit), core_metric_every=-1, model_tag=f"plan_d{config.n_layer}" + "_grown" * bool(one.small))
        launcher = ["python"] if self.devices == 1 else ["torchrun", "--standalone", f"--nproc_per_node={self.devices}"]
        return [*launcher, "-m", "scripts.base_train", *(f"--{name.replace('_', '-')}={value:g}" if isinstance(value, float) else f"--{name.replace('_', '-')}={value}"
                                                        for name, value in flags.items())]


def lowest(candidates: list[Candidate]) -> Candidate:
    return min(candidates, key=lambda one: one.loss)


def fitting(candidates: list[Candidate], planner: Planner, memory: Memory, limit: float) -> tuple[Candidate, list[str]]:
    """The best candidate that fits into `limit` bytes, its rows as many as do, and what did not fit. Raises UsageError where none fits."""
    too_large: list[str] = []
    for one in sorted(candidates, key=lambda one: one.loss):
        if not too_large or memory.bytes(one.size, 1) < 1.2 * limit:  # else it is plain enough
            memory.count(one.size, one.rows)
        all_rows = one.batch // (one.size.config.sequence_len * planner.devices)
        rows = one.rows
        while rows > 1 and memory.bytes(one.size, rows) > limit and planner.rows == -1:
            rows = next(n for n in range(rows - 1, 0, -1) if all_rows % n == 0)
        if memory.bytes(one.size, rows) <= limit:
            return replace(one, rows=rows), too_large
        too_large.append(one.name)
    raise UsageError(f"{', '.join(too_large)}: none of them fits into {limit / 2 ** 30:.1f} GiB; give a shorter --max-seq-len or a smaller --depth")


def usable(bytes_of_device: float, device_type: str) -> float:
    """Bytes that a training may take: off CUDA the system and other programs share the memory."""
    return bytes_of_device - RESERVED * 2 ** 30 if device_type == "cuda" else 0.8 * bytes_of_device


def vocabulary_rule(size: Size) -> int:
    """The best vocabulary for a model of this size, rounded to a power of two (Tao et al., 2407.13623, approach 1: N_nv = 0.08 C^0.50, N_v = 0.20 C^0.42)."""
    body = size.params - size.config.vocab_size * size.config.n_embd
    flops = (body / 0.08) ** 2
    return 2 ** round(math.log2(max(1024, 0.20 * flops ** 0.42 / size.config.n_embd)))

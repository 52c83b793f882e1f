"""How learning rates, Muon's momentum and weight decay change over a run.

A learning rate rises over a warm-up, stays, and falls over a warm-down (Zhai et al. 2106.04560 call it warm-up, stable, decay). Pretraining counts its
position in steps (in a growing run in FLOPs, as if they were steps of the final model), fine-tuning in its share of the data.
"""
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

from nanochat.cli import flag, fraction, non_negative_int

# By the share of the warm-down that is done, the share of the fall that is left
WARMDOWN_SHAPES: dict[str, Callable[[float], float]] = {
    "linear": lambda done: 1 - done,  # nanochat's
    "sqrt": lambda done: 1 - math.sqrt(done),  # 1-sqrt (Haegele et al. 2405.18392)
    "cosine": lambda done: 0.5 * (1 + math.cos(math.pi * done)),
    "log": lambda done: 1 - math.log2(1 + done),
}


def lr_multiplier(step: float, num_iterations: int, warmup_steps: int, warmdown_ratio: float, final_lr_frac: float, shape: str = "linear") -> float:
    """Of pretraining: linear warm-up over steps, constant, warm-down over the last share of the run to `final_lr_frac`."""
    warmdown = round(warmdown_ratio * num_iterations)
    if step < warmup_steps:
        return min(1.0, (step + 1) / warmup_steps)  # a growing run has steps between the whole ones
    if not warmdown or step <= num_iterations - warmdown:
        return 1.0
    left = max(0.0, (num_iterations - step) / warmdown)  # a growing run's last step may lie beyond its budget
    if shape != "linear":  # which would be 1 - (1 - left), rounded otherwise than nanochat's
        left = WARMDOWN_SHAPES[shape](min(1.0, 1 - left))
    return left + (1 - left) * final_lr_frac


def muon_momentum(step: float, num_iterations: int, warmdown_ratio: float) -> float:
    """Of pretraining: 0.85 to 0.97 over 400 steps, back to 0.90 over the warm-down; the warm-up has priority."""
    warmdown = round(warmdown_ratio * num_iterations)
    if step < 400:
        return 0.85 + (0.97 - 0.85) * step / 400
    if warmdown and step >= num_iterations - warmdown:
        return 0.97 + (0.90 - 0.97) * min(1.0, (step - (num_iterations - warmdown)) / warmdown)
    return 0.97


def muon_weight_decay(step: float, num_iterations: int, weight_decay: float) -> float:
    """Of pretraining: half a cosine from `weight_decay` to 0."""
    return weight_decay * 0.5 * (1 + math.cos(math.pi * min(1.0, step / num_iterations)))


class Now(NamedTuple):
    """The hyper-parameters of a step."""

    lr: float  # multiplier of the learning rates
    momentum: float  # Muon's
    weight_decay: float  # of the blocks' matrices

    def set(self, param_groups: list[dict]) -> None:
        for group in param_groups:
            group["lr"] = group["initial_lr"] * self.lr
            if group["kind"] == "muon":
                group["momentum"], group["weight_decay"] = self.momentum, self.weight_decay


@dataclass
class ScheduleSettings:
    """The flags of pretraining's schedule."""

    warmup_steps: int = flag(40, "Steps over which the learning rates rise; ngpt: 0", type=non_negative_int)
    warmdown_ratio: float = flag(0.65, "Share of the run over which the learning rates fall", type=fraction)
    warmdown_shape: str = flag("linear", "Curve on which the learning rates fall", choices=WARMDOWN_SHAPES)
    final_lr_frac: float = flag(0.05, "Share of the learning rates that is left at the end", type=fraction)


@dataclass(frozen=True)
class Schedule:
    """Of a run of pretraining with `num_iterations` steps; weight_decay is that of its beginning.

    A growing run is at a `position` in steps of its final model, and has made more `steps` than that, by which learning rates rise.
    """

    settings: ScheduleSettings
    num_iterations: int
    weight_decay: float

    def at(self, position: float, steps: float | None = None) -> Now:
        settings, N = self.settings, self.num_iterations
        steps = position if steps is None else steps
        rising = steps < settings.warmup_steps
        return Now(lr_multiplier(steps if rising else position, N, settings.warmup_steps if rising else 0, settings.warmdown_ratio, settings.final_lr_frac,
                                 settings.warmdown_shape),
                   muon_momentum(position, N, settings.warmdown_ratio),
                   muon_weight_decay(position, N, self.weight_decay) if settings.warmdown_ratio else self.weight_decay)  # a trunk at a constant rate keeps it


@dataclass(frozen=True)
class Branch:
    """Off another run, the trunk, whose hyper-parameters were `trunk` where it stood at step `start`: `steady` steps as they were, then a warm-down over `steps`.

    Learning rates and weight decay fall together. Muon's momentum is that of a run of this length.
    """

    settings: ScheduleSettings
    trunk: Now
    start: int
    steady: int
    steps: int

    def at(self, step: float) -> Now:
        N = self.start + self.steady + self.steps
        share = self.steps / N
        left = lr_multiplier(step, N, 0, share, self.settings.final_lr_frac, self.settings.warmdown_shape)
        return Now(self.trunk.lr * left, muon_momentum(step, N, share), self.trunk.weight_decay * left)


def sft_lr_multiplier(progress: float, warmup_ratio: float, warmdown_ratio: float, final_lr_frac: float, shape: str = "linear") -> float:
    """Of fine-tuning: linear warm-up, constant, warm-down to `final_lr_frac`, over the run's progress from 0 to 1 (and a little beyond)."""
    if progress < warmup_ratio:
        return (progress + 1e-8) / warmup_ratio
    if not warmdown_ratio or progress <= 1 - warmdown_ratio:  # the last batch may lie a little beyond 1
        return 1.0
    done = min(1.0, (progress - (1 - warmdown_ratio)) / warmdown_ratio)
    left = WARMDOWN_SHAPES[shape](done)
    return left + (1 - left) * final_lr_frac


def sft_muon_momentum(step: int) -> float:
    """Of fine-tuning: 0.85 to 0.95 over 300 steps."""
    return 0.85 + (0.95 - 0.85) * min(step / 300, 1)

"""How long training steps of any size take: on this machine, from a few steps of small models, or on a card by its data sheet.

The seconds of a pass are rest(width) + depth * layer(width), and so are those of the optimizer. Two depths at a width tell both parts, three widths their curves
(straight lines in logarithms between and beyond them). What is measured is what base_train does: its text, kernels, passes and optimizer.
"""
import contextlib
import io
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Protocol

import numpy as np
import torch

from nanochat import compiler
from nanochat.accumulation import Accumulator, optimizer_step, release_memory
from nanochat.common import COMPUTE_DTYPE
from nanochat.gpt import GPTConfig
from nanochat.layered_gpt import empty_gpt

DEPTHS = 2, 4  # of the models that are measured; even, as every other layer has value embeddings
WARM_UP, ENOUGH = 2, 3  # passes that do not count, and those that do at least
Batch = tuple[torch.Tensor, torch.Tensor]


class Speed(Protocol):
    def seconds(self, config: GPTConfig, flops_per_token: float, tokens: int, rows: int) -> float:
        """Of one optimizer step of so many tokens, in passes of `rows` rows a device."""


@dataclass(frozen=True)
class Card:
    """`number` cards that reach this share of their peak (FLOP/s)."""

    peak: float
    number: int
    share: float

    def seconds(self, config: GPTConfig, flops_per_token: float, tokens: int, rows: int) -> float:
        return flops_per_token * tokens / (self.number * self.peak * self.share)


@dataclass(frozen=True)
class Timing:
    """Seconds of one pass of `rows` rows, and of the optimizer."""

    rows: int
    of_pass: float
    of_optimizer: float


def measure(config: GPTConfig, rows: int, device: torch.device, batches: Iterator[Batch], compiled: bool = False, patience: float = 1.5) -> Timing:
    """Trains a model of this configuration for a few steps of one pass. patience: seconds after which no step begins."""
    synchronize = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    scaler = torch.amp.GradScaler(device.type) if COMPUTE_DTYPE == torch.float16 else None
    model = empty_gpt(config)
    with contextlib.redirect_stdout(io.StringIO()):
        model.to_empty(device=device)
        model.init_weights()
        optimizer = model.setup_optimizer()
        accumulate = Accumulator(compiler.compile_model(model, device.type) if compiled else model, model, scaler)
    passes: list[float] = []
    updates: list[float] = []
    for number in range(WARM_UP + 100):
        synchronize()
        started = time.perf_counter()
        if number == WARM_UP:
            end = started + patience
        accumulate(iter([next(batches)]), 1)[0].item()
        between = time.perf_counter()
        optimizer_step(optimizer, scaler)
        model.zero_grad(set_to_none=True)
        synchronize()
        ended = time.perf_counter()
        if number >= WARM_UP:
            passes.append(between - started)
            updates.append(ended - between)
        if len(passes) >= ENOUGH and ended > end:
            break
    del model, optimizer, accumulate
    release_memory(device)
    return Timing(rows, statistics.median(passes), statistics.median(updates))


def random_batches(config: GPTConfig, rows: int, device: torch.device) -> Iterator[Batch]:
    """Where there is no text yet."""
    generator = torch.Generator().manual_seed(0)
    while True:
        tokens = torch.randint(config.vocab_size, (rows, config.sequence_len), generator=generator).to(device)
        yield tokens, tokens.roll(-1, 1)


@dataclass
class Measured:
    """`devices` devices like this one, that share the passes of a step and, as is assumed, lose no time over it."""

    make_config: Callable[[int, int], GPTConfig]  # of a depth and a width
    batches: Callable[[GPTConfig, int], Iterator[Batch]]  # of so many rows
    device: torch.device
    devices: int = 1
    correction: float = 1.0  # of a pass: what a direct measurement said of the prediction; compiling is in it too
    _widths: dict[int, tuple[Timing, Timing]] = field(default_factory=dict)

    def probe(self, width: int, rows: int) -> None:
        """Measures steps of models of this width and the numbers of layers in DEPTHS, of `rows` rows a pass."""
        self._widths[width] = tuple(measure(config := self.make_config(depth, width), rows, self.device, self.batches(config, rows)) for depth in DEPTHS)  # type: ignore[assignment]

    def correct(self, config: GPTConfig, rows: int, compiled: bool) -> None:
        """Measures this very model, and corrects all predictions of its passes by it."""
        timing = measure(config, rows, self.device, self.batches(config, rows), compiled, patience=5.0)
        self.correction = timing.of_pass / rows / self._predict(config, lambda one: one.of_pass / one.rows)

    def head_share(self, config: GPTConfig, rows: int, tokens: int) -> float:
        """Of a step's time, what the vocabulary takes, as a second one of the same size would take it once more."""
        small = self.make_config(DEPTHS[0], config.n_embd)
        one, two = (measure(sized, rows, self.device, random_batches(sized, rows, self.device)).of_pass
                    for sized in (small, replace(small, vocab_size=2 * config.vocab_size)))
        passes = tokens / config.sequence_len / self.devices / rows
        return min(0.95, max(0.0, two - one) * passes / self.seconds(config, 0, tokens, rows))

    def seconds(self, config: GPTConfig, flops_per_token: float, tokens: int, rows: int) -> float:
        rows_of_step = tokens / config.sequence_len / self.devices
        return rows_of_step * self.correction * self._predict(config, lambda one: one.of_pass / one.rows) + self._predict(config, lambda one: one.of_optimizer)

    def _predict(self, config: GPTConfig, part: Callable[[Timing], float]) -> float:
        widths = sorted(self._widths)
        layers, rests = [], []
        for width in widths:
            few, many = map(part, self._widths[width])
            layer = max((many - few) / (DEPTHS[1] - DEPTHS[0]), 0.05 * many / DEPTHS[1])  # noise may turn it round
            layers.append(layer)
            rests.append(max(few - DEPTHS[0] * layer, 0.02 * few))
        return _in_logarithms(config.n_embd, widths, rests) + config.n_layer * _in_logarithms(config.n_embd, widths, layers)


def _in_logarithms(x: float, xs: list[int], ys: list[float]) -> float:
    """The value at x of the straight lines through (log xs, log ys), of which the outermost go on."""
    if len(xs) == 1:
        return ys[0]
    i = min(max(int(np.searchsorted(xs, x)), 1), len(xs) - 1)
    slope = np.clip(np.log(ys[i] / ys[i - 1]) / np.log(xs[i] / xs[i - 1]), 0, 3)
    return float(ys[i] * (x / xs[i]) ** slope)

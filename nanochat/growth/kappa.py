"""When to grow: as soon as the current model has given most of what it can.

With the loss s at the start of a stage and p, what the stage's model would end with, the stage ends when the loss reaches

    target = p + kappa · (s - p),

so kappa is the share of the achievable gain that is left on the table: 0.15 grows after 85 % of it. (It has also been described as the
share to extract; the formula is what counts.)

p is the validation loss that the *current* model would have at the end of the whole budget under the run's own schedule, its warm-down included, if it
did not grow: not an asymptote, and not what the present learning rate would lead to. So kappa can be checked in hindsight by training on without
the growth (dev/bench_kappa.py does). p comes, in this order, from the user, from finished runs of the same shape on the same data with the same
tokenizer, horizon and schedule, or from the stage's own losses and what was known before (forecast.py).

After every step the probability that no more than kappa of the gain is left is asked for; above 1/2 one validation is made, and the stage ends only if
it confirms that. If it does not, it has made the forecast better, and some steps must pass before the next one, so that validations stay cheap.
A cap on the FLOPs ends a stage in any case.
"""
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import numpy as np

from nanochat.cli import UsageError
from nanochat.gpt import GPTConfig
from nanochat.growth.forecast import GROWN, Forecast, Points, Prior, fit, new_model
from nanochat.growth.target import layered_config
from nanochat.layered_gpt import config_from
from nanochat.run_log import FILENAME, is_finished, last_of_each_kind, read_run_log


def kappa_target(start: float, final: float, kappa: float) -> float:
    """The loss at which a stage ends."""
    return final + kappa * (start - final)


@dataclass(frozen=True)
class Prediction:
    loss: float  # that the model would end with, in bits per byte
    source: str
    error: float = 0.0  # one standard deviation

    def __str__(self) -> str:
        return f"{self.loss:.4f} ± {self.error:.4f} ({self.source})"


# -----------------------------------------------------------------------------
# From earlier runs


def shape_of(config: GPTConfig) -> tuple:
    """What two models must share to end with about the same loss: all sizes, but neither windows nor value embeddings."""
    config = layered_config(config)
    layers = sorted(repr(replace(layer, window=-1, value_embed=False)) for layer in config.layers)
    return config.vocab_size, config.sequence_len, config.n_embd, config.lm_head_rank, config.causal, config.loops, *layers


def earlier_runs(runs: str | Path, config: GPTConfig, conditions: dict | None = None) -> list[tuple[Path, float]]:
    """(log, last validation loss in bits per byte) of all finished runs of this shape that never grew; `runs` holds a folder for each run.

    conditions: what their start records must have under `conditions` too, numbers to 2 %; logs that do not tell do not count. Without, all that began from scratch.
    """
    found = []
    for path in sorted(Path(runs).glob(f"*/{FILENAME}")):
        try:
            records = read_run_log(path)
            if not is_finished(records) or "grow" in last_of_each_kind(records):
                continue
            start = next(record for record in records if record["kind"] == "start")
            if shape_of(config_from(start["model_config"])) != shape_of(config):
                continue
            if conditions is None and any(start.get("config", {}).get(flag) for flag in ("branch_from", "init_from")):
                continue  # it may be the decay of a model that grew
            if conditions is not None and not _alike(start["conditions"], conditions):
                continue
            if (last := [record["val_bpb"] for record in records if record["kind"] == "eval"][-1]) is not None:  # else its last step has broken it
                found.append((path, last))
        except (UsageError, KeyError, IndexError, StopIteration, TypeError, AttributeError, ValueError, AssertionError):
            continue  # the log of something else
    return found


def _alike(one: dict, other: dict) -> bool:
    return one.keys() == other.keys() and all(math.isclose(one[key], other[key], rel_tol=0.02) if isinstance(one[key], (int, float)) else one[key] == other[key]
                                              for key in one)


SEED_ERROR = 0.01  # of the final loss: how far two runs that differ in the seed alone end from each other, here up to 1 % (dev/stage_curves.json.gz)


def final_loss_of_earlier_runs(runs: str | Path, config: GPTConfig, conditions: dict, grown: bool = False) -> Prediction | None:
    """The mean last validation loss (bits per byte) of the earlier runs of this shape under these conditions: data, tokenizer, horizon in FLOPs, schedule.

    grown: the stage's model began as a smaller one; that it ends like one from scratch is less sure.
    """
    found = earlier_runs(runs, config, conditions)
    if not found:
        return None
    losses = [loss for _, loss in found]
    source = f"the run {found[0][0].parent.name}" if len(found) == 1 else f"{len(found)} earlier runs"
    return Prediction(float(np.mean(losses)), source, (GROWN_ERROR if grown else SEED_ERROR) * float(np.mean(losses)) * math.sqrt(1 + 1 / len(losses)))


GROWN_ERROR = 0.03  # likewise, of one that began as a smaller model


# -----------------------------------------------------------------------------
# The trigger


@dataclass(frozen=True)
class Decision:
    grow: bool
    reason: str
    left: float | None = None  # share of the gain, as it was predicted
    predicted: Prediction | None = None
    target: float | None = None


MIN_STEPS = 3  # before a stage may end by kappa
MAX_POINTS = 20  # means that the steps of a stage are kept as
CHECK_SHARE = 0.05  # of what a stage's steps so far have cost, at most, for validations
CHECK_DISTANCE = 0.01  # of the stage's steps, at least, between two of them


@dataclass
class GrowthTrigger:
    """Decides when a stage ends. FLOPs are those of the whole run; `state` and `GrowthTrigger(**...)` carry it through a checkpoint.

    kappa: None to grow at the cap only.
    cap: FLOPs spent at which the stage ends in any case.
    steps: those of the stage if it went on to the end of the budget without growth.
    rates: the multiplier of the learning rates at equidistant moments of these steps, from the first to the end.
    check_steps: what a validation costs, in steps.
    final: the final loss of this stage's model, if it is known beforehand.
    prior: what is known beforehand otherwise; None: what is usual for a new model.
    ratio: validation loss per training loss at the stage's start; None: by the first step, for a new model.
    """

    kappa: float | None
    cap: float
    steps: float = 1.0
    rates: Sequence[float] = (1.0, 1.0)
    check_steps: float = 1.0
    final: Prediction | None = None
    prior: Prior | None = None
    ratio: float | None = None
    start: float | None = None  # validation loss
    seen: int = 0  # steps
    width: int = 1  # steps that one of `losses` is the mean of
    losses: list[float] = field(default_factory=list)
    open_losses: list[float] = field(default_factory=list)  # of the latest steps, fewer than `width`
    recent: list[float] = field(default_factory=list)  # training losses of the last steps
    checks: list[tuple[int, float]] = field(default_factory=list)  # (steps, validation loss) that did not confirm

    def __post_init__(self):  # out of a checkpoint's JSON
        if isinstance(self.final, dict):
            self.final = Prediction(**self.final)
        self.checks = [(step, loss) for step, loss in self.checks]
        if isinstance(self.prior, dict):
            self.prior = Prior(**self.prior)
        elif self.prior is None:
            self.prior = new_model(self.steps)

    def state(self) -> dict:
        return asdict(self)

    def at_cap(self, flops: float) -> bool:
        return flops >= self.cap

    def begin(self, loss: float) -> None:
        """To be told the validation loss at the stage's start."""
        self.start = loss

    def observe(self, loss: float) -> None:
        """To be told the training loss of every step."""
        if self.kappa is None:
            return
        self.seen += 1
        self.recent = [*self.recent[-7:], loss]
        self.open_losses.append(loss)
        if len(self.open_losses) == self.width:
            self.losses.append(math.fsum(self.open_losses) / self.width)
            self.open_losses = []
        if len(self.losses) == 2 * MAX_POINTS:
            self.losses = [(a + b) / 2 for a, b in zip(self.losses[::2], self.losses[1::2])]
            self.width *= 2
        if self.ratio is None and self.start is not None and loss > 0:  # 0: no token of a small batch was hidden
            self.ratio = self.start / loss

    def forecast(self, *checks: tuple[int, float]) -> Forecast:
        """Of the stage as it stands, with validations at these steps besides those that there were."""
        assert self.start is not None and self.ratio is not None and self.prior is not None
        losses = self.losses + ([math.fsum(self.open_losses) / len(self.open_losses)] if self.open_losses else [])
        counts = np.array([self.width] * len(self.losses) + ([len(self.open_losses)] if self.open_losses else []), dtype=float)
        ends = np.cumsum(counts)
        found = [(0, self.start), *self.checks, *checks]
        train = self._points(ends - counts / 2, np.array(losses) * self.ratio, counts)
        validations = self._points(np.array([step for step, _ in found], dtype=float), np.array([loss for _, loss in found]))
        now, end = self._points(np.array([float(self.seen)])), self._points(np.array([self.steps]))
        known = None if self.final is None else (self.final.loss, self.final.error)
        return fit(train, validations, now, end, self.start, self.prior, known)

    def _points(self, steps: np.ndarray, losses: np.ndarray | None = None, counts: np.ndarray | None = None) -> Points:
        rates, moments = np.array(self.rates), np.linspace(0, self.steps, len(self.rates))
        sums = np.concatenate(([0.0], np.cumsum((rates[1:] + rates[:-1]) / 2 * np.diff(moments))))
        nothing = np.zeros(len(steps))
        return Points(steps, np.interp(steps, moments, sums), np.interp(steps, moments, rates), nothing if losses is None else losses,
                      np.ones(len(steps)) if counts is None else counts)

    def predict(self) -> Prediction:
        """p as it is known now."""
        assert self.start is not None and self.prior is not None
        if self.seen == 0:
            return self.final or Prediction(self.prior.final * self.start, self.prior.source, self.prior.final_error * self.start)
        loss, error = self.forecast().final()
        return Prediction(loss, self._source(), error)

    def _source(self) -> str:
        return f"{self.seen} steps of the stage" if self.final is None else self.final.source

    def due(self) -> bool:
        """To be asked after every step: is it time for a validation?"""
        affordable = (len(self.checks) + 1) * self.check_steps / CHECK_SHARE
        if self.kappa is None or self.ratio is None or self.seen < max(MIN_STEPS, affordable):
            return False
        if self.checks and self.seen < self.checks[-1][0] + CHECK_DISTANCE * self.steps:
            return False
        return self.forecast().probability(self.kappa) > 0.5

    def decide(self, flops: float, loss: float | None) -> Decision:
        """What a validation loss, if there is one, says."""
        if loss is None or self.kappa is None:
            return Decision(self.at_cap(flops), "its share of the FLOPs is spent")
        if self.ratio is None:
            return Decision(self.at_cap(flops), "its share of the FLOPs is spent before the first step")
        assert self.start is not None
        p, error = self.forecast((self.seen, loss)).final()
        target = kappa_target(self.start, p, self.kappa)
        left = (loss - p) / (self.start - p) if self.start > p else 0.0
        facts = left, Prediction(p, self._source(), error), target
        if loss <= target:
            return Decision(True, f"kappa: a loss of {loss:.4f} is below the target of {target:.4f}, so {left:.0%} of the gain are left", *facts)
        if self.at_cap(flops):
            return Decision(True, f"its share of the FLOPs is spent: before the loss of {loss:.4f} reached the target of {target:.4f}", *facts)
        self.checks.append((self.seen, loss))
        return Decision(False, f"a loss of {loss:.4f} is above the target of {target:.4f}", *facts)

    def follow(self, before: "GrowthTrigger", loss: float) -> None:
        """Takes up what the stage before has taught; it ended at this validation loss."""
        self.prior = GROWN
        if before.ratio is None:
            return
        forecast = before.forecast((before.seen, loss))
        p, error = forecast.final()
        self.prior = GROWN.after(p / loss, error / loss, *forecast.exponent())
        self.ratio = loss / (math.fsum(before.recent) / len(before.recent))

"""When to grow: as soon as the current model has given most of what it can.

With the loss s at the start of a stage and the predicted final loss p of the stage's model, the stage ends when the validation loss reaches

    target = p + kappa · (s - p),

so kappa is the share of the achievable gain that is left on the table: 0.15 grows after 85 % of it. (It has also been described as the
share to extract; the formula is what counts.) p comes, in this order, from the user, from a finished run of the same shape on disk, or
from a saturating power law fitted to the stage's own validation curve. A cap on the FLOPs ends a stage in any case.

Losses may be in any unit, nats or bits per byte, as long as it is always the same one.
"""
import math
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import numpy as np

from nanochat.cli import UsageError
from nanochat.gpt import GPTConfig
from nanochat.growth.target import layered_config
from nanochat.layered_gpt import LayeredGPTConfig
from nanochat.run_log import FILENAME, read_run_log


def kappa_target(start: float, final: float, kappa: float) -> float:
    """The loss at which a stage ends."""
    return final + kappa * (start - final)


@dataclass(frozen=True)
class Prediction:
    loss: float  # that the model would end with
    source: str


# -----------------------------------------------------------------------------
# From earlier runs


def shape_of(config: GPTConfig) -> tuple:
    """What two models must share to end with about the same loss: all sizes, but neither windows nor value embeddings."""
    config = layered_config(config)
    layers = sorted(repr(replace(layer, window=-1, value_embed=False)) for layer in config.layers)
    return config.vocab_size, config.sequence_len, config.n_embd, config.lm_head_rank, config.causal, *layers


def earlier_runs(runs: str | Path, config: GPTConfig | dict) -> list[tuple[Path, float]]:
    """(log, last validation loss in bits per byte) of all finished runs of this shape that never grew; `runs` holds a folder for each run."""
    found = []
    for path in sorted(Path(runs).glob(f"*/{FILENAME}")):
        try:
            records = read_run_log(path)
            kinds = {record["kind"] for record in records}
            if "end" not in kinds or "grow" in kinds:
                continue
            shape = next(record["model_config"] for record in records if record["kind"] == "start")
            if shape_of(read_config(shape)) != shape_of(read_config(config)):
                continue
            found.append((path, [record["val_bpb"] for record in records if record["kind"] == "eval" and record["val_bpb"] is not None][-1]))
        except (UsageError, KeyError, IndexError, StopIteration, TypeError, ValueError, AssertionError):
            continue  # the log of something else
    return found


def read_config(config: GPTConfig | dict) -> GPTConfig:
    if isinstance(config, GPTConfig):
        return config
    return LayeredGPTConfig(**config) if "layers" in config else GPTConfig(**config)


def final_loss_of_earlier_run(runs: str | Path, config: GPTConfig) -> Prediction | None:
    """The lowest last validation loss (bits per byte) of the earlier runs of this shape."""
    found = earlier_runs(runs, config)
    if not found:
        return None
    path, loss = min(found, key=lambda run: run[1])
    return Prediction(loss, f"the run {path.parent.name}")


# -----------------------------------------------------------------------------
# From the curve


@dataclass(frozen=True)
class PowerLaw:
    """L(t) = p + a (t + t0)^-b."""

    p: float
    a: float
    b: float
    t0: float

    def __call__(self, t: float) -> float:
        return self.p + self.a * (t + self.t0) ** -self.b


def fit_power_law(t, losses) -> PowerLaw:
    """The curve with 0 <= p < min(losses), a > 0, b from 0.1 to 3 and the least mean absolute error, which single outliers do not bend.

    b and t0 are searched on a grid that is refined around the best pair, p and a follow from weighted least squares (iterated, weights 1/|error|).
    """
    t, losses = np.asarray(t, dtype=float), np.asarray(losses, dtype=float)
    unit = float(t.max())
    b_range, t0_range = (0.1, 3.0), (1e-3, 3.0)
    best = PowerLaw(float(losses.min()), 0.0, 1.0, unit)  # for a curve that does not fall
    for _ in range(4):
        b, t0 = np.geomspace(*b_range, 25)[:, None, None], np.geomspace(*t0_range, 25)[:, None]
        p, a, error = _lines((t / unit + t0) ** -b, losses)
        error = np.where((a > 0) & (p < losses.min()), error, np.inf)
        i, j = np.unravel_index(error.argmin(), error.shape)
        if not np.isfinite(error[i, j]):
            break
        exponent, shift = float(b[i, 0, 0]), float(t0[j, 0])
        best = PowerLaw(float(p[i, j]), float(a[i, j]) * unit ** exponent, exponent, shift * unit)
        b_range, t0_range = ((center / width ** 0.15, center * width ** 0.15)
                             for center, width in ((exponent, b_range[1] / b_range[0]), (shift, t0_range[1] / t0_range[0])))
    return best


def _lines(x: np.ndarray, losses: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """x (..., points) -> p, a and mean absolute error (...) of the lines p + a x through `losses` with p >= 0."""
    weight = np.ones_like(x)
    for _ in range(10):
        total = weight.sum(-1)
        mean_x, mean_loss = (weight * x).sum(-1) / total, (weight * losses).sum(-1) / total
        dx = x - mean_x[..., None]
        a = (weight * dx * losses).sum(-1) / (weight * dx * dx).sum(-1).clip(1e-30)
        p = mean_loss - a * mean_x
        a = np.where(p < 0, (weight * x * losses).sum(-1) / (weight * x * x).sum(-1), a)  # a loss is never negative
        p = p.clip(0)
        error = np.abs(p[..., None] + a[..., None] * x - losses)
        weight = 1 / error.clip(1e-6 * losses.std() + 1e-12)
    return p, a, error.mean(-1)


MIN_POINTS = 6


def forecast(t, losses, horizon: float) -> tuple[Prediction | None, str]:
    """(the fitted curve's value at `horizon`, or None if it is not to be trusted; the reason why not).

    horizon: where the model's training would end, in the unit of t; inf for the asymptote p, which is far less certain.
    Trusted are fits to 6 points or more whose first two thirds foretold the rest: the last loss to 5 % of the gain so far, and
    the loss at the horizon to 15 % of the gain up to there. Until then a stage does not end by its own curve.
    """
    if len(t) < MIN_POINTS:
        return None, f"{len(t)} points, {MIN_POINTS} are needed"
    whole, part = fit_power_law(t, losses), fit_power_law(t[:2 * len(t) // 3 + 1], losses[:2 * len(t) // 3 + 1])
    end, foretold = (law.p if math.isinf(horizon) else law(horizon) for law in (whole, part))
    gain = losses[0] - losses[-1]
    if gain <= 0 or whole.a == 0:
        return None, "the loss does not fall"
    if abs(part(t[-1]) - losses[-1]) > 0.05 * gain:
        return None, f"two thirds of the curve foretell {part(t[-1]):.4f} where {losses[-1]:.4f} was measured"
    if abs(end - foretold) > 0.15 * (losses[0] - end):
        return None, f"two thirds of the curve foretell a final loss of {foretold:.4f}, all of it {end:.4f}"
    return Prediction(end, "the curve"), ""


# -----------------------------------------------------------------------------
# The trigger


@dataclass(frozen=True)
class Decision:
    grow: bool
    reason: str
    predicted: float | None = None
    target: float | None = None


@dataclass
class GrowthTrigger:
    """Decides when a stage ends. FLOPs are those of the whole run; `asdict` and `GrowthTrigger(**...)` carry it through a checkpoint.

    kappa: None to grow at the cap only.
    cap: FLOPs spent at which the stage ends in any case.
    horizon: FLOPs at which training would end without growth, the whole budget.
    final: the final loss of this stage's model, if it is known beforehand.
    """

    kappa: float | None
    cap: float
    horizon: float
    final: Prediction | None = None
    flops: list[float] = field(default_factory=list)  # of the stage's validations
    losses: list[float] = field(default_factory=list)

    def __post_init__(self):
        if isinstance(self.final, dict):  # out of a checkpoint's JSON
            self.final = Prediction(**self.final)

    def state(self) -> dict:
        return asdict(self)

    def at_cap(self, flops: float) -> bool:
        """To be asked at every step."""
        return flops >= self.cap

    def observe(self, flops: float, loss: float) -> Decision:
        """To be told every validation of the stage, its first one at the very start."""
        self.flops.append(flops)
        self.losses.append(loss)
        prediction, why_not = self._predict()
        target = None
        if prediction is not None and self.kappa is not None:
            target = kappa_target(self.losses[0], prediction.loss, self.kappa)
        predicted = prediction.loss if prediction is not None else None
        if self.at_cap(flops):
            unreached = f"before the loss of {loss:.4f} reached the target of {target:.4f}" if target is not None else why_not
            return Decision(True, "its share of the FLOPs is spent" + (f": {unreached}" if self.kappa is not None else ""), predicted, target)
        if prediction is not None and target is not None and len(self.losses) > 1 and loss <= target:
            return Decision(True, f"kappa: a loss of {loss:.4f} is below the target of {target:.4f} (by {prediction.source})", predicted, target)
        return Decision(False, why_not, predicted, target)

    def _predict(self) -> tuple[Prediction | None, str]:
        if self.kappa is None:
            return None, ""
        if self.final is not None:
            return self.final, ""
        begin = self.flops[0]
        prediction, why_not = forecast([f - begin for f in self.flops], self.losses, self.horizon - begin)
        return prediction, f"no prediction of the final loss: {why_not}" if why_not else ""

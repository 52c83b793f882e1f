"""What a stage's model would end with: a Bayesian fit of the stage's own losses, from its first steps on.

The loss at step i of the stage is taken to be

    L(i) = p + A h(S(i)) + c (lr(i) - lr(N)),    h(S) falls from 1 at the start to 0 at the end N like (S + t0)^-b,

a saturating power law in the sum S of the learning rates so far plus what a falling rate gains (Tissue et al. 2408.11029 have both terms; they are
measured there on constant rates, warm-downs and cosines alike). p is therefore the loss *at the end of the budget under the run's own schedule*, its
warm-down included: not an asymptote, and not what a constant rate would give.

For given b and t0 this is linear in p, A, c, so a Gaussian prior gives a Gaussian posterior in closed form; b and t0 are a grid whose nodes are
weighted by their evidence. The answer is a mixture of Gaussians: how sure it is comes with it, and it is there at the first step, when it is the prior.

Notable:
* Training losses (nats per token) tell of validations (bits per byte) by a ratio that is measured at the stage's start; how it drifts
  with the gain made so far is one more unknown of the fit, which later validations pin down.
* No curve is a power law. What is left over is correlated over times that grow with the time itself, so each e-fold of time counts as a few
  independent measurements, however many steps it has; 10,000 steps do not make the fit 100 times as sure as one.
"""
import math
from dataclasses import dataclass, replace

import numpy as np

EXPONENTS = np.geomspace(0.15, 1.5, 9)
SHIFTS = np.geomspace(5.0, 5000.0, 13)  # t0, in steps at the full learning rate


@dataclass(frozen=True)
class Prior:
    """What is known of a stage before it begins. Losses are relative to the one at its start.

    final, final_error: p and its standard deviation. exponent, shift: the likeliest b and t0 (in steps at the full rate), with their spreads on a log scale.
    """

    final: float
    final_error: float
    exponent: float
    exponent_spread: float
    shift: float
    shift_spread: float
    source: str

    def after(self, final: float, error: float, exponent: float, spread: float) -> "Prior":
        """That of a stage whose predecessor foretold p / s and b, each with its error. The larger model ends near where the smaller one would have."""
        return replace(self, final=final, final_error=math.hypot(error, self.final_error), exponent=exponent, exponent_spread=math.hypot(spread, 0.6),
                       source="the stage before")


def new_model(steps: float) -> Prior:
    """Of a model with new weights. Long runs end at a quarter of the start's loss (ln V), those of 300 steps at 0.6 of it."""
    return Prior(0.2 + 0.4 * (1 + steps / 300) ** -0.25 / 2 ** -0.25, 0.1, 0.5, 0.5, 25.0, 0.4, "what is usual")


# the constants below and those of the two priors: by search on the first nine of the recorded stages (dev/bench_kappa.py), the others judge them
GROWN = Prior(0.92, 0.085, 1.0, 1.0, 190.0, 0.5, "what is usual")

MISFIT = 0.08  # of the power law, as a share of the start's loss, over a quarter of an e-fold of time
CHECK_MISFIT = 0.008  # the same for a validation
DRIFT = 0.035  # of the ratio of validation to training loss, per gain
OFFSET = 0.003  # of the same, as a share of the start's loss
ANNEAL, ANNEAL_ERROR = 0.016, 0.022  # c, as a share of the start's loss
START_MISFIT = 0.08  # how far the power law, continued to the start, may be from its loss


@dataclass(frozen=True)
class Points:
    """Losses of a stage. steps: of the stage; times: S in steps at the full rate; rates: lr; counts: steps they are the mean of; all (n,)."""

    steps: np.ndarray
    times: np.ndarray
    rates: np.ndarray
    losses: np.ndarray
    counts: np.ndarray


@dataclass(frozen=True)
class Forecast:
    """A mixture over the nodes of the grid: weights (g,), means (g, 5) and covariances (g, 5, 5) of p, A, c, drift, offset; and the stage's present."""

    weights: np.ndarray
    means: np.ndarray
    covariances: np.ndarray
    now: np.ndarray  # (g, 5): the loss now is now · parameters
    start: float

    def final(self) -> tuple[float, float]:
        """p and its standard error."""
        p = float(self.weights @ self.means[:, 0])
        variance = self.weights @ (self.covariances[:, 0, 0] + (self.means[:, 0] - p) ** 2)
        return p, math.sqrt(variance)

    def exponent(self) -> tuple[float, float]:
        logs = np.log(np.repeat(EXPONENTS, len(SHIFTS)))
        mean = float(self.weights @ logs)
        return math.exp(mean), math.sqrt(self.weights @ (logs - mean) ** 2)

    def probability(self, kappa: float) -> float:
        """That the share of the gain that is left is kappa or less: L - p <= kappa (s - p), which is linear in the parameters."""
        x = self.now.copy()
        x[:, 0] -= 1 - kappa
        mean = (x * self.means).sum(-1) - kappa * self.start
        spread = np.sqrt((x[:, None] @ self.covariances @ x[..., None])[:, 0, 0])
        return float(self.weights @ [0.5 * math.erfc(z / math.sqrt(2)) for z in mean / spread])


def fit(train: Points, checks: Points, now: Points, end: Points, start: float, prior: Prior, known: tuple[float, float] | None = None) -> Forecast:
    """All losses in the unit of the validations; those of training by the ratio at the start.

    now, end: one point each, whose losses do not count. known: p and its error, from elsewhere.
    """
    b, t0 = (grid.reshape(-1, 1) for grid in np.meshgrid(EXPONENTS, SHIFTS, indexing="ij"))

    def rows(points: Points, training: bool) -> np.ndarray:  # (g, n, 5)
        h = ((points.times + t0) ** -b - (end.times + t0) ** -b) / (t0 ** -b - (end.times + t0) ** -b)
        x = np.zeros((*h.shape, 5))
        x[..., 0], x[..., 1], x[..., 2] = 1, h, points.rates - end.rates
        if training:
            x[..., 3], x[..., 4] = start - points.losses, 1
        return x

    scatter = 0.02 * start  # of one step's training loss
    if len(train.losses) > 4:
        scatter = float(np.median(np.abs(np.diff(train.losses)) * np.sqrt(train.counts[1:]))) / 0.954
    quarters = 4 * train.counts / (train.steps + 10)  # of an e-fold
    x = np.concatenate((rows(train, True), rows(checks, False)), 1)
    y = np.concatenate((train.losses, checks.losses))
    variance = np.concatenate((scatter ** 2 / train.counts + (MISFIT * start) ** 2 / quarters,
                               np.where(checks.steps > 0, CHECK_MISFIT * start, START_MISFIT * start) ** 2))
    if known is not None:
        row = np.zeros((len(x), 1, 5))
        row[..., 0] = 1
        x, y, variance = np.concatenate((x, row), 1), np.append(y, known[0]), np.append(variance, max(known[1], 1e-4 * start) ** 2)
    mean = np.array([prior.final * start, (1 - prior.final) * start, ANNEAL * start, 0.0, 0.0])
    error = np.array([prior.final_error * start, 1.0 * start, ANNEAL_ERROR * start, DRIFT, OFFSET * start])
    precision = np.diag(error ** -2)
    weighted = (x / variance[:, None]).swapaxes(1, 2)
    information = weighted @ x + precision
    posterior = np.linalg.inv(information)
    means = (posterior @ (weighted @ y + precision @ mean)[..., None])[..., 0]
    residual, deviation = y - (x @ means[..., None])[..., 0], means - mean
    evidence = -0.5 * ((residual ** 2 / variance).sum(-1) + (deviation ** 2 / error ** 2).sum(-1) + np.linalg.slogdet(information)[1])
    evidence -= 0.5 * ((np.log(b / prior.exponent) / prior.exponent_spread) ** 2 + (np.log(t0 / prior.shift) / prior.shift_spread) ** 2)[:, 0]
    weights = np.exp(evidence - evidence.max())
    return Forecast(weights / weights.sum(), means, posterior, rows(now, False)[:, 0], start)

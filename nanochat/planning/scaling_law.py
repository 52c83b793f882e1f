"""The loss that a run will end with, from its size and its tokens, and how far that can be trusted:

    L(N, D) = E + A / N^a + B / D^b       (Hoffmann et al., 2203.15556, eq. 10)

N counts the parameters of blocks and head, D the tokens. A handful of small runs does not settle five constants, so none is chosen: every pair of
exponents on a grid is fitted (E, A, B >= 0 by least squares) and weighs as much as the runs speak for it. The prediction is the mean over all of them, and
its error grows by itself where they disagree, that is far away from the runs.
"""
import itertools
from dataclasses import dataclass

import numpy as np

E, A, B, a, b = 1.69, 406.4, 410.7, 0.34, 0.28  # of Hoffmann et al., nats per token of their tokenizer and text
PUBLISHED_UNIT = "nats per token"
PUBLISHED_ERROR = 0.3  # of those constants for another text and tokenizer: a guess, and a large one
MIN_RUNS, MIN_DIFFERENT = 6, 3  # what a fit takes: runs, and different sizes and numbers of tokens among them

_EXPONENTS = np.geomspace(0.1, 1.2, 16)
_PRIOR_SPREAD = 0.7  # of the exponents' logarithms about the published ones: runs of few tokens have steeper curves
_SEED_NOISE = 0.003  # of a loss: what another seed changes, so that a fit through all points is not taken for certain


@dataclass(frozen=True)
class Law:
    """A mixture of K laws. unit: of the loss; source: where the law is from, in words."""

    unit: str
    source: str
    exponents_K2: np.ndarray  # a, b
    factors_K3: np.ndarray  # E, A, B, with N and D in `scale`
    weights_K: np.ndarray
    covariances_K33: np.ndarray  # of the factors
    noise_K: np.ndarray  # variance of a single run
    scale: tuple[float, float] = (1.0, 1.0)
    largest: tuple[float, float] = (np.inf, np.inf)  # N and D of the runs that it was fitted to

    def predict(self, params: float, tokens: float) -> tuple[float, float]:
        """(loss, its error: the range from loss - error to loss + error holds 95 % of what is to be expected)."""
        x_K3 = _features(self.exponents_K2, params / self.scale[0], tokens / self.scale[1])
        losses_K = (x_K3 * self.factors_K3).sum(-1)
        mean = float(self.weights_K @ losses_K)
        within_K = np.einsum("ki,kij,kj->k", x_K3, self.covariances_K33, x_K3) + self.noise_K
        return mean, 2 * float(np.sqrt(self.weights_K @ (within_K + (losses_K - mean) ** 2)))

    def tokens_for(self, params: float, loss: float) -> float:
        """The tokens after which a model of this size has this loss; inf where it never has."""
        low, high = 1.0, 1e15
        if self.predict(params, high)[0] > loss:
            return float("inf")
        for _ in range(60):
            middle = (low * high) ** 0.5
            low, high = (middle, high) if self.predict(params, middle)[0] > loss else (low, middle)
        return high


def _features(exponents_K2: np.ndarray, n, d) -> np.ndarray:
    """The three terms without their factors (K, 3) of one run."""
    return np.stack([np.ones(len(exponents_K2)), n ** -exponents_K2[:, 0], d ** -exponents_K2[:, 1]], axis=-1)


def published() -> Law:
    return Law(PUBLISHED_UNIT, "by the published constants of Hoffmann et al. (2203.15556): of another text and tokenizer, so only the order of the rows means something",
               np.array([[a, b]]), np.array([[E, A, B]]), np.ones(1), np.zeros((1, 3, 3)), np.array([(PUBLISHED_ERROR / 2) ** 2]))


def enough(params, tokens) -> bool:
    """Whether runs of these sizes and tokens can tell a law."""
    return len(params) >= MIN_RUNS and min(len(set(params)), len(set(tokens))) >= MIN_DIFFERENT


def fit(params, tokens, losses, unit: str, source: str) -> Law:
    """The law of runs of `params` parameters, `tokens` tokens and final `losses`, one entry each a run. Raises ValueError where they are not `enough`."""
    if not enough(params, tokens):
        raise ValueError(f"a law takes {MIN_RUNS} runs of {MIN_DIFFERENT} sizes and numbers of tokens")
    params, tokens, losses = (np.asarray(values, dtype=float) for values in (params, tokens, losses))
    scale = tuple(float(np.exp(np.log(values).mean())) for values in (params, tokens))
    floor = len(losses) * (_SEED_NOISE * losses.mean()) ** 2
    freedom = len(losses) - 3
    pairs = list(itertools.product(_EXPONENTS, _EXPONENTS))
    factors, covariances, noise, log_weights = [], [], [], []
    for pair in pairs:
        x_R3 = np.stack([np.ones_like(losses), (params / scale[0]) ** -pair[0], (tokens / scale[1]) ** -pair[1]], axis=-1)
        factor, used = nonnegative_least_squares(x_R3, losses)
        squares = ((x_R3 @ factor - losses) ** 2).sum() + floor
        covariance = np.zeros((3, 3))
        covariance[np.ix_(used, used)] = np.linalg.pinv(x_R3[:, used].T @ x_R3[:, used])
        factors.append(factor)
        noise.append(squares / freedom)
        covariances.append(covariance * noise[-1])
        prior = sum((np.log(exponent / known) / _PRIOR_SPREAD) ** 2 for exponent, known in zip(pair, (a, b)))
        log_weights.append(-0.5 * freedom * np.log(squares) - 0.5 * prior)  # the noise's size is unknown, and integrated out
    weights = np.exp(np.array(log_weights) - max(log_weights))
    return Law(unit, source, np.array(pairs), np.array(factors), weights / weights.sum(), np.array(covariances), np.array(noise), scale,  # type: ignore[arg-type]
               (float(params.max()), float(tokens.max())))


def nonnegative_least_squares(x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, list[int]]:
    """The factors >= 0 of the few columns of x (rows, columns) that come nearest to y, and the columns that have one: all subsets are tried."""
    best, best_squares, best_columns = np.zeros(x.shape[1]), np.inf, [0]
    for size in range(1, x.shape[1] + 1):
        for subset in itertools.combinations(range(x.shape[1]), size):
            columns = list(subset)
            factor = np.linalg.lstsq(x[:, columns], y, rcond=None)[0]
            squares = ((x[:, columns] @ factor - y) ** 2).sum()
            if (factor >= 0).all() and squares < best_squares:
                best, best_squares, best_columns = np.zeros(x.shape[1]), squares, columns
                best[columns] = factor
    return best, best_columns


def effective_tokens(tokens: float, unique: float) -> float:
    """Fresh tokens that are worth as much as `tokens` tokens of a text of `unique` ones, read again and again (Muennighoff et al., 2305.16264, eq. 5: R* = 15.4)."""
    if tokens <= unique:
        return tokens
    repetitions = tokens / unique - 1
    return unique + unique * 15.4 * (1 - np.exp(-repetitions / 15.4))

"""Means over seeds with their 95 % intervals, and verdicts on claims."""
import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

T95 = (12.71, 4.30, 3.18, 2.78, 2.57, 2.45, 2.36, 2.31, 2.26)  # Student's t for 95 %, by degrees of freedom


def verdict(low: float, high: float, nothing: float = 0.0) -> str:
    """On a claim that the true value is above `nothing`."""
    return "confirmed" if low > nothing else "opposite" if high < nothing else "not confirmed"


@dataclass(frozen=True)
class Estimate:
    """A mean, and half of its 95 % interval; infinite if nothing tells it."""

    value: float
    half: float

    @classmethod
    def of(cls, values: Sequence[float], error: float = 0.0) -> "Estimate":
        """Of one value a seed. error: a standard error that more seeds would not lower, such as that of the rows of a test; the wider of the two intervals counts."""
        n = len(values)
        seeds = T95[min(n - 1, len(T95)) - 1] * statistics.stdev(values) / math.sqrt(n) if n > 1 else math.inf
        return cls(statistics.mean(values), max(seeds, 1.96 * error))

    @property
    def loss_verdict(self) -> str:
        """Of the difference of a loss from another one: better, worse, or not told apart."""
        return "better" if self.value < -self.half else "worse" if self.value > self.half else "not told apart"

    def shown(self, digits: int, sign: bool = True) -> str:
        value = f"{self.value:{'+' if sign else ''}.{digits}f}"
        return value if math.isinf(self.half) else f"{value} ± {self.half:.{digits}f}"

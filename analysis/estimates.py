"""Means over seeds with their 95 % intervals, and verdicts on claims."""
import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

# Student's t by degrees of freedom, for 95 % and for 99 %
T95 = (12.71, 4.30, 3.18, 2.78, 2.57, 2.45, 2.36, 2.31, 2.26)
T99 = (63.66, 9.92, 5.84, 4.60, 4.03, 3.71, 3.50, 3.36, 3.25)


def verdict(low: float, high: float, nothing: float = 0.0) -> str:
    """On a claim that the true value is above `nothing`."""
    return "confirmed" if low > nothing else "opposite" if high < nothing else "not confirmed"


@dataclass(frozen=True)
class Estimate:
    """A mean, and half of its 95 % interval; infinite if nothing tells it."""

    value: float
    half: float
    half99: float  # half of the interval for 99 %: of many comparisons some pass 95 % by chance

    @classmethod
    def of(cls, values: Sequence[float], error: float = 0.0) -> "Estimate":
        """Of one value a seed. error: a standard error that more seeds would not lower, such as that of the rows of a test, and that comes on top of theirs."""
        n = len(values)
        spread = statistics.stdev(values) / math.sqrt(n) if n > 1 and all(map(math.isfinite, values)) else math.inf
        row = min(max(n, 2) - 2, len(T95) - 1)
        return cls(statistics.mean(values), math.hypot(T95[row] * spread, 1.96 * error), math.hypot(T99[row] * spread, 2.58 * error))

    def verdict(self, above: bool = True) -> str:
        """On a claim that the true value is above 0, or below."""
        value = self.value if above else -self.value
        return verdict(value - self.half, value + self.half) + self._sure

    @property
    def loss_verdict(self) -> str:
        """Of the difference of a loss from another one: better, worse, or not told apart."""
        return ("better" if self.value < -self.half else "worse" if self.value > self.half else "not told apart") + self._sure

    @property
    def _sure(self) -> str:
        return " (p < 0.01)" if abs(self.value) > self.half99 else ""

    def shown(self, digits: int, sign: bool = True) -> str:
        value = f"{self.value:{'+' if sign else ''}.{digits}f}"
        return value if math.isinf(self.half) else f"{value} ± {self.half:.{digits}f}"

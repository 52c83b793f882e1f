"""The best learning rate of each arm of a study, by runs that are not the ones reported."""
import math
from collections.abc import Callable, Hashable, Sequence
from typing import TypeVar

from nanochat.cli import UsageError

Arm = TypeVar("Arm", bound=Hashable)
FARTHEST = 6  # rates beyond either end


def try_rates(arms: Sequence[Arm], rates: Sequence[float], losses: Callable[[list[tuple[Arm, float]]], Sequence[float]]) -> dict[Arm, dict[float, float]]:
    """For each arm the rates that were tried, from low to high, with their losses.

    The grid goes on beyond its ends, by its own factors, until the best rate has a worse one on either side. A single rate is taken as it is.

    losses: trains those asked for; infinite or NaN for what diverged. Raises UsageError for an arm that always does, and for rates that are not above 0.
    """
    if min(rates) <= 0:
        raise UsageError(f"the rate {min(rates):g}: give some above 0, of which the best is taken")
    tried: dict[Arm, dict[float, float]] = {arm: {} for arm in arms}
    grid = sorted(set(rates))
    asked = [(arm, rate) for arm in tried for rate in grid]
    while asked:
        for (arm, rate), loss in zip(asked, losses(asked)):
            tried[arm][rate] = loss if math.isfinite(loss) else math.inf
        tried = {arm: dict(sorted(found.items())) for arm, found in tried.items()}
        asked = [(arm, beyond) for arm, found in tried.items() if (beyond := _beyond(grid, found)) is not None]
    for arm, found in tried.items():
        if math.isinf(min(found.values())):
            raise UsageError(f"{arm}: the training diverges at every rate of {', '.join(f'{rate:g}' for rate in found)}; give lower ones")
    return tried


def best_rate(tried: dict[float, float]) -> float:
    return min(tried, key=lambda rate: tried[rate])


def _beyond(grid: Sequence[float], tried: dict[float, float]) -> float | None:
    """The rate to try next, if the best is at an end. While all diverge, that is the lower one."""
    found, best = list(tried), best_rate(tried)
    down, up = sum(rate < grid[0] for rate in found), sum(rate > grid[-1] for rate in found)
    if len(grid) == 1:
        return None
    if best == found[0]:
        return float(f"{best * grid[0] / grid[1]:.4g}") if down < FARTHEST else None
    return float(f"{best * grid[-1] / grid[-2]:.4g}") if best == found[-1] and up < FARTHEST else None


def rates_table(tried: dict[Arm, dict[float, float]], digits: int = 4) -> str:
    """One line an arm; the best in bold."""
    rates = sorted({rate for found in tried.values() for rate in found})

    def cell(found: dict[float, float], rate: float) -> str:
        text = "diverged" if math.isinf(found.get(rate, 0.0)) else f"{found[rate]:.{digits}f}" if rate in found else ""
        return f"**{text}**" if rate == best_rate(found) else text
    lines = ["| | " + " | ".join(f"{rate:g}" for rate in rates) + " |", "|---|" + "---:|" * len(rates)]
    return "\n".join(lines + [f"| {arm} | " + " | ".join(cell(found, rate) for rate in rates) + " |" for arm, found in tried.items()])

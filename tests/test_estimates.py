"""Means over seeds, their intervals and verdicts."""
import math

import pytest

from analysis.estimates import Estimate


def test_intervals_of_three_seeds():
    """Student's t with two degrees of freedom: 4.30 for 95 %, 9.92 for 99 %, over a standard error of 1 / sqrt(3)."""
    found = Estimate.of([1.0, 2.0, 3.0])
    assert (found.value, found.half, found.half99) == pytest.approx((2.0, 4.30 / 3 ** 0.5, 9.92 / 3 ** 0.5))


def test_the_error_of_the_rows_comes_on_top_of_that_of_the_seeds():
    assert Estimate.of([1.0, 2.0, 3.0], 1.0).half == pytest.approx(math.hypot(4.30 / 3 ** 0.5, 1.96))
    assert Estimate.of([2.0, 2.0], 1.0).half == pytest.approx(1.96)


@pytest.mark.parametrize("spread, above, below, loss", [
    (0.01, "confirmed (p < 0.01)", "opposite (p < 0.01)", "worse (p < 0.01)"), (0.3, "confirmed", "opposite", "worse"), (1.0, "not confirmed", "not confirmed", "not told apart")])
def test_verdicts(spread, above, below, loss):
    found = Estimate.of([1 - spread, 1.0, 1 + spread])
    assert (found.verdict(), found.verdict(above=False), found.loss_verdict) == (above, below, loss)


def test_one_seed_tells_nothing():
    found = Estimate.of([5.0])
    assert found.verdict() == "not confirmed" and found.shown(1) == "+5.0" and math.isinf(found.half99)


def test_a_value_that_nothing_tells_is_shown_as_such():
    found = Estimate.of([math.nan, 1.0, 2.0])
    assert found.shown(2) == "+nan" and found.verdict() == "not confirmed" and found.loss_verdict == "not told apart"

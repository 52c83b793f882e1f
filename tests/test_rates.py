"""Learning rates that a study tries."""
import math

import pytest

from analysis.rates import best_rate, rates_table, try_rates
from nanochat.cli import UsageError


def search(liked, rates=(1.0, 2.0, 4.0), most=math.inf):
    """Of arms that like these rates best, and diverge from `most` on; the rates asked for, too."""
    asked = []

    def losses(some):
        asked.extend(some)
        return [abs(math.log2(rate / liked[arm])) if rate < most else math.nan for arm, rate in some]
    return try_rates(list(liked), rates, losses), asked


def test_the_grid_goes_on_until_the_best_rate_is_not_at_an_end():
    tried, asked = search({"low": 0.26, "middle": 2.0, "high": 8.1})
    assert {arm: best_rate(found) for arm, found in tried.items()} == {"low": 0.25, "middle": 2.0, "high": 8.0}
    assert {arm: list(found) for arm, found in tried.items()} == {"low": [0.125, 0.25, 0.5, 1, 2, 4], "middle": [1, 2, 4], "high": [1, 2, 4, 8, 16]}
    assert len(asked) == len(set(asked)), "none is trained twice"


def test_a_search_without_end_ends():
    tried, _ = search({"arm": 1e30})
    assert best_rate(tried["arm"]) == 4 * 2 ** 6


def test_a_single_rate_is_taken_as_it_is():
    assert search({"arm": 30.0}, [2.0])[1] == [("arm", 2.0)]


def test_a_rate_of_nothing():
    with pytest.raises(UsageError, match="the rate 0: give some above 0"):
        search({"arm": 1.0}, [0.0, 0.1])


def test_rates_that_diverge_are_not_the_best_and_lower_ones_are_tried():
    tried, _ = search({"arm": 4.0}, most=0.3)
    assert best_rate(tried["arm"]) == 0.25 and tried["arm"][0.5] == math.inf
    table = rates_table(tried).splitlines()
    assert "**4.0000**" in table[2] and "diverged" in table[2]
    with pytest.raises(UsageError, match="arm: the training diverges at every rate of .*1, 2, 4; give lower ones"):
        search({"arm": 4.0}, most=0.0)

"""Low-rank layers: optimal copies, exact products, budgets that add up."""
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nanochat.cli import UsageError
from nanochat.gpt import Linear
from nanochat.lowrank import RANK_SCHEDULES, LowRankLinear, break_even_rank, schedule_ranks, spectral_factors


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 1000), rows=st.integers(1, 20), columns=st.integers(1, 20), data=st.data())
def test_from_dense_is_the_best_approximation(seed, rows, columns, data):
    rank = data.draw(st.integers(1, min(rows, columns)))
    torch.manual_seed(seed)
    dense = Linear(columns, rows)
    layer = LowRankLinear.from_dense(dense, rank)
    tail = torch.linalg.svdvals(dense.weight.double())[rank:]
    error = (layer.to_dense().weight - dense.weight).double().norm()
    torch.testing.assert_close(error, tail.norm(), rtol=1e-4, atol=1e-5)  # Eckart and Young
    # both factors carry the same share of the scale
    torch.testing.assert_close(layer.U.weight.norm(dim=0), layer.V.weight.norm(dim=1), rtol=1e-4, atol=1e-6)


def test_to_dense_is_the_same_function():
    torch.manual_seed(0)
    layer = LowRankLinear.from_dense(Linear(12, 7), 3)
    x = torch.randn(4, 12)
    torch.testing.assert_close(layer.to_dense()(x), layer(x), rtol=1e-5, atol=1e-6)


def test_spectral_factors_of_zero_are_zero():
    U, V = spectral_factors(torch.zeros(4, 6), 2)
    assert not U.any() and not V.any()


def test_break_even():
    assert break_even_rank(100, 100) == 50 and break_even_rank(100, 400) == 80


@given(schedule=st.sampled_from(RANK_SCHEDULES), rank=st.integers(1, 100), n_layer=st.integers(1, 40))
def test_schedules_spend_the_same_budget(schedule, rank, n_layer):
    ranks = schedule_ranks(schedule, rank, n_layer, largest=10 * rank)
    assert sum(ranks) == rank * n_layer and min(ranks) >= 1
    assert ranks == sorted(ranks) or schedule == "constant"


def test_constant_is_constant():
    assert schedule_ranks("constant", 7, 5, 64) == [7] * 5


@pytest.mark.parametrize("schedule, rank, reason", [("linear", 0, "use 1 to 64"), ("linear", 65, "use 1 to 64"), ("linear", -3, "use 1 to 64"),
                                                    ("linear", 60, "use a rank of 42"), ("cubic", 8, "unknown rank schedule")])
def test_budgets_that_cannot_be_met(schedule, rank, reason):
    with pytest.raises(UsageError, match=reason):
        schedule_ranks(schedule, rank, 12, largest=64)

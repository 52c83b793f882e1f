"""Low-rank layers: optimal copies, exact products, budgets that add up."""
import copy
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nanochat.cli import UsageError
from nanochat.common import COMPUTE_DTYPE
from nanochat.engine import Engine
from nanochat.gpt import Linear
from nanochat.layered_gpt import LayeredGPT, LayeredGPTConfig, LayerSpec
from nanochat.lowrank import DECODE_ROWS, RANK_SCHEDULES, LowRankLinear, break_even_rank, call_cost, schedule_ranks, spectral_factors
from tests.examples import examples


@settings(max_examples=examples(30), deadline=None)
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


def test_a_product_decodes_like_its_factors_and_leaves_prompts_to_them():
    torch.manual_seed(0)
    factors = LowRankLinear.from_dense(Linear(48, 40), 20)
    merged = copy.deepcopy(factors)
    merged.merge()
    step, prompt = torch.randn(DECODE_ROWS, 1, 48), torch.randn(1, DECODE_ROWS + 1, 48)
    with torch.no_grad():
        torch.testing.assert_close(merged(step), factors(step), rtol=1e-5, atol=1e-5)
        assert not torch.equal(merged(step), factors(step)) and torch.equal(merged(prompt), factors(prompt))
    assert merged.state_dict().keys() == factors.state_dict().keys()


def test_a_product_is_kept_only_where_it_reads_little_more_than_the_factors():
    affordable = call_cost("cpu", COMPUTE_DTYPE)
    side = int((4 * affordable) ** 0.5)
    for rank, kept in ((side // 8, False), (7 * side // 16, True), (side // 2, True)):
        layer = LowRankLinear(side, side, rank)
        assert layer.product is None
        layer.merge_if_faster()
        assert (layer.product is not None) == kept == (side * side - 2 * rank * side <= affordable)


def test_a_model_decodes_alike_with_factors_and_products():
    layer = LayerSpec(n_head=2, n_kv_head=2, head_dim=16, qk_dim=16, mlp_hidden=128, attn_rank=8, mlp_rank=24)
    with torch.device("meta"):
        model = LayeredGPT(LayeredGPTConfig(sequence_len=64, vocab_size=50, n_layer=2, n_head=2, n_kv_head=2, n_embd=32, layers=(layer, layer)))
    model.to_empty(device="cpu")
    torch.manual_seed(0)
    model.init_weights()
    for p in model.parameters():
        p.data += 0.1 * torch.randn_like(p)
    engine = Engine(model, SimpleNamespace(get_bos_token_id=lambda: -1, encode_special=lambda name: -1))
    tokens, logits = list(range(20)), []
    for _ in range(2):
        cache = engine._new_cache(1, 21)
        engine._forward([tokens], cache)
        logits.append(engine._forward([[7]], cache))
        model.cast_for_inference()
    assert any(module.product is not None for module in model.modules() if isinstance(module, LowRankLinear))
    torch.testing.assert_close(logits[1], logits[0], rtol=1e-4, atol=1e-4)

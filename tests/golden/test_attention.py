"""Attention, plain and against a cache, against nanochat's numbers."""
import numpy as np
import pytest
import torch

from nanochat.flash_attention import flash_attn
from tests.golden import inputs
from tests.golden.fixtures import arrays, load, tensor

FIXTURE = load("attention")


def shapes(case, length):
    kv = (case["B"], length, case["Hkv"], case["D"])
    return [(case["B"], length, case["H"], case["D"]), kv, kv]


@pytest.mark.parametrize("case", FIXTURE["plain"], ids=lambda case: case["name"])
def test_plain(case):
    q, k, v = map(tensor, inputs.normals(case["seed"], shapes(case, case["T"])))
    y = flash_attn.flash_attn_func(q, k, v, causal=True, window_size=tuple(case["window_size"]))
    np.testing.assert_allclose(y, arrays("attention")[f"plain/{case['name']}"], rtol=0, atol=1e-5)


@pytest.mark.parametrize("case", FIXTURE["cached"], ids=lambda case: case["name"])
def test_cached(case):
    expected = arrays("attention")
    k_cache = torch.zeros(case["B"], case["capacity"], case["Hkv"], case["D"])
    v_cache = torch.zeros_like(k_cache)
    filled = torch.zeros(case["B"], dtype=torch.int32)
    for j, length in enumerate(case["chunks"]):
        q, k, v = map(tensor, inputs.normals(case["seed_base"] + j, shapes(case, length)))
        y = flash_attn.flash_attn_with_kvcache(q, k_cache, v_cache, k=k, v=v, cache_seqlens=filled, causal=True, window_size=tuple(case["window_size"]))
        np.testing.assert_allclose(y, expected[f"cached/{case['name']}/{j}"], rtol=0, atol=1e-5)
        filled += length
    np.testing.assert_array_equal(k_cache, expected[f"cached/{case['name']}/k_cache"])

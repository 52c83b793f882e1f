"""Every attention path against the definition: softmax over exactly the keys that the window allows."""
import sys
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nanochat import flash_attention as fa
from nanochat import kernel_choice


def by_definition(q, k, v, window: int):
    """q (B, Tq, H, D), k and v (B, Tk, Hkv, D), aligned at the end; in float64."""
    q, k, v = (x.double().transpose(1, 2) for x in (q, k, v))
    k, v = (x.repeat_interleave(q.size(1) // k.size(1), dim=1) for x in (k, v))
    distance = torch.arange(k.size(2) - q.size(2), k.size(2))[:, None] - torch.arange(k.size(2))[None, :]
    hidden = (distance < 0) | (distance > window) if window >= 0 else distance < 0
    scores = (q @ k.mT) * q.size(-1) ** -0.5
    return (scores.masked_fill(hidden, -float("inf")).softmax(-1) @ v).transpose(1, 2)


def qkv(seed, batch, length, heads, kv_heads, dim, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(batch, length, h, dim, generator=generator).to(dtype).requires_grad_() for h in (heads, kv_heads, kv_heads)]


def choose(patch, **choices: str) -> None:
    kernel_choice.settle()
    patch.setattr(kernel_choice, "_settled", kernel_choice._settled | choices)


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 1000), length=st.integers(2, 400), kv_heads=st.sampled_from([1, 2]), group=st.sampled_from([1, 3]),
       window=st.one_of(st.just(-1), st.integers(0, 500)), forward=st.sampled_from(["torch", "blocked"]), backward=st.sampled_from(["torch", "blocked"]))
def test_forward_and_backward_equal_the_definition(seed, length, kv_heads, group, window, forward, backward):
    q, k, v = qkv(seed, 2, length, kv_heads * group, kv_heads, 8)
    with pytest.MonkeyPatch.context() as patch:
        choose(patch, attention=forward, window=forward, backward=backward)
        y = fa.flash_attn_func(q, k, v, causal=True, window_size=(window, 0))
    want = by_definition(q, k, v, window)
    torch.testing.assert_close(y.double(), want, rtol=0, atol=2e-6)
    upstream = torch.randn_like(y)
    for got, expected in zip(torch.autograd.grad(y, (q, k, v), upstream), torch.autograd.grad(want, (q, k, v), upstream.double())):
        torch.testing.assert_close(got, expected, rtol=0, atol=2e-5)


@pytest.mark.parametrize("backward", ["torch", "blocked"])
@pytest.mark.parametrize("forward", ["torch", "blocked"])
@pytest.mark.parametrize("window", [-1, 0, 5, 128, 200])
def test_every_bfloat16_kernel_is_accurate(monkeypatch, window, forward, backward):
    """The error must stay of the size that rounding to bf16 makes anyway."""
    choose(monkeypatch, attention=forward, window=forward, backward=backward)
    q, k, v = qkv(1, 2, 300, 4, 2, 64, torch.bfloat16)
    want = by_definition(q, k, v, window)
    y = fa.flash_attn_func(q, k, v, causal=True, window_size=(window, 0))
    assert y.dtype == torch.bfloat16
    upstream = torch.randn_like(y)
    got = torch.autograd.grad(y, (q, k, v), upstream)
    expected = torch.autograd.grad(want, (q, k, v), upstream.double())
    for a, b in zip((y, *got), (want, *expected)):
        assert (a.double() - b.double()).norm() <= 0.012 * b.double().norm() + 1e-6


def test_long_sequences_have_a_backward_of_their_own(monkeypatch):
    choose(monkeypatch, **{"backward": "torch", "long-backward": "blocked"})
    monkeypatch.setattr(kernel_choice, "LONG", 20)
    blocked = []
    monkeypatch.setattr(fa, "_pieces", lambda *args: blocked.append(args[0].size(2)) or ())
    for length in (19, 20):
        fa.flash_attn_func(*qkv(1, 1, length, 1, 1, 4), causal=True).sum().backward()
    assert blocked == [20]


@pytest.mark.parametrize("window", [-1, 3])
@pytest.mark.parametrize("kernel", ["torch", "blocked"])
def test_attention_is_a_well_behaved_operator(kernel, window):
    q, k, v = (x.detach().transpose(1, 2).requires_grad_() for x in qkv(2, 2, 9, 2, 2, 4))
    torch.library.opcheck(fa._forward, (q, k, v, window, kernel))


def test_values_of_another_width():
    q, k, _ = qkv(9, 2, 150, 2, 2, 8)
    v = torch.randn(2, 150, 2, 16)
    for window in (-1, 5):
        torch.testing.assert_close(fa.flash_attn_func(q, k, v, causal=True, window_size=(window, 0)).double(), by_definition(q, k, v, window), rtol=0, atol=2e-6)


@pytest.mark.parametrize("dtype, cache_dtype", [(torch.float32, torch.float32), (torch.bfloat16, torch.bfloat16), (torch.bfloat16, torch.float32)])
@pytest.mark.parametrize("window", [-1, 0, 3, 7, 100])
@pytest.mark.parametrize("kv_heads", [1, 4])
def test_cache_in_chunks_equals_one_pass(dtype, cache_dtype, window, kv_heads):
    q, k, v = (x.detach() for x in qkv(3, 2, 12, 4, kv_heads, 16, dtype))
    want = by_definition(q, k, v, window)
    k_cache, v_cache = (torch.zeros(2, 12, kv_heads, 16, dtype=cache_dtype) for _ in range(2))
    outputs, start = [], 0
    for size in (5, 1, 4, 1, 1):  # a prompt, single tokens, a later chunk
        part = slice(start, start + size)
        filled = torch.full((2,), start, dtype=torch.int32)
        outputs.append(fa.flash_attn_with_kvcache(q[:, part], k_cache, v_cache, k=k[:, part], v=v[:, part], cache_seqlens=filled, causal=True,
                                                  window_size=(window, 0)))
        assert outputs[-1].dtype == dtype
        assert filled[0] == start, "advancing the position is the caller's business"
        start += size
    torch.testing.assert_close(torch.cat(outputs, dim=1).double(), want, rtol=0, atol=2e-6 if dtype == torch.float32 else 0.02)
    assert torch.equal(k_cache.to(dtype), k) and torch.equal(v_cache.to(dtype), v)


def test_a_full_cache_says_so():
    q, k, v = (x.detach() for x in qkv(4, 1, 3, 1, 1, 4))
    with pytest.raises(ValueError, match="holds 2 positions, 3 are needed"):
        fa.flash_attn_with_kvcache(q, torch.zeros(1, 2, 1, 4), torch.zeros(1, 2, 1, 4), k=k, v=v, cache_seqlens=torch.zeros(1, dtype=torch.int32))


@pytest.mark.parametrize("kernel", ["torch", "blocked"])
def test_no_mask_of_the_whole_context(monkeypatch, kernel):
    """The additive masks stay of the block's size however long the context is."""
    choose(monkeypatch, window=kernel)
    sizes = []
    real = fa._additive_mask
    monkeypatch.setattr(fa, "_additive_mask", lambda rows, columns, *rest: sizes.append(rows * columns) or real(rows, columns, *rest))
    q, k, v = (x.detach() for x in qkv(5, 1, 2048, 1, 1, 8))
    fa.flash_attn_func(q, k, v, causal=True, window_size=(256, 0))
    assert sizes and max(sizes) <= fa.BLOCK * (fa.BLOCK + 256)


@pytest.mark.parametrize("window", [0, 5, 300])
def test_flex_attention_mask_is_the_same_window(window):
    """FlexAttention itself runs compiled on CUDA; its eager form shows on any machine that the band is right."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention
    q, k, v = (x.detach().transpose(1, 2) for x in qkv(6, 1, 257, 4, 2, 16))
    mask = create_block_mask(fa._in_window(window), None, None, 257, 257, device="cpu")
    y = flex_attention(q, k, v, block_mask=mask, enable_gqa=True)
    want = by_definition(*(x.transpose(1, 2) for x in (q, k, v)), window)
    torch.testing.assert_close(y.transpose(1, 2).double(), want, rtol=0, atol=2e-6)


def test_override(monkeypatch):
    monkeypatch.setattr(fa, "_override_impl", "sdpa")
    assert fa._resolve_use_fa3() is False
    monkeypatch.setattr(fa, "_override_impl", "fa3")
    monkeypatch.setattr(fa, "HAS_FA3", False)
    with pytest.raises(AssertionError):
        fa._resolve_use_fa3()


@pytest.mark.parametrize("available", [True, False])
def test_finding_flash_attention_3(monkeypatch, available):
    def get_kernel(repo_id: str, *, revision=None, version=None, trust_remote_code=False):
        """As in `kernels`: without a version or revision, or trust for a publisher it does not know, it refuses."""
        assert (revision is None) != (version is None)
        assert trust_remote_code or repo_id.startswith("kernels-community/")
        if not available:
            raise RuntimeError(f"no build of {repo_id}\nfor this machine")
        return SimpleNamespace(flash_attn_interface="interface")

    monkeypatch.setitem(sys.modules, "kernels", SimpleNamespace(get_kernel=get_kernel))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    want = ("interface", "") if available else (None, "RuntimeError: no build of kernels-community/flash-attn3")
    assert fa._load_fa3() == want


def test_cpu_tensors_never_go_to_flash_attention_3(monkeypatch):
    """A model can run on the CPU of a machine that has the GPU kernels."""
    monkeypatch.setattr(fa, "USE_FA3", True)
    q, k, v = (x.detach() for x in qkv(7, 1, 4, 2, 2, 8))
    want = by_definition(q, k, v, -1)
    torch.testing.assert_close(fa.flash_attn_func(q, k, v, causal=True).double(), want, rtol=0, atol=2e-6)
    caches = torch.zeros_like(k), torch.zeros_like(v)
    y = fa.flash_attn_with_kvcache(q, *caches, k=k, v=v, cache_seqlens=torch.zeros(1, dtype=torch.int32), causal=True)
    torch.testing.assert_close(y.double(), want, rtol=0, atol=2e-6)

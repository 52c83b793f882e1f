"""Every attention path against the definition: softmax over exactly the keys that the window allows."""
import os
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from nanochat import blocked_attention as blocked
from nanochat import flash_attention as fa
from nanochat import kernel_choice
from nanochat.engine import Engine
from tests.examples import examples
from tests.golden.fixtures import build_model


def by_definition(q, k, v, window: int, right: int = 0):
    """q (B, Tq, H, D), k and v (B, Tk, Hkv, D), aligned at the end; in float64. A negative window or right side has no limit."""
    q, k, v = (x.double().transpose(1, 2) for x in (q, k, v))
    k, v = (x.repeat_interleave(q.size(1) // k.size(1), dim=1) for x in (k, v))
    distance = torch.arange(k.size(2) - q.size(2), k.size(2))[:, None] - torch.arange(k.size(2))[None, :]
    hidden = (distance > window) & (window >= 0) | (distance < -right) & (right >= 0)
    scores = (q @ k.mT) * q.size(-1) ** -0.5
    return (scores.masked_fill(hidden, -float("inf")).softmax(-1) @ v).transpose(1, 2)


def qkv(seed, batch, length, heads, kv_heads, dim, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(batch, length, h, dim, generator=generator).to(dtype).requires_grad_() for h in (heads, kv_heads, kv_heads)]


def choose(patch, **choices: str) -> None:
    kernel_choice.settle()
    patch.setattr(kernel_choice, "_settled", kernel_choice._settled | choices)


@settings(max_examples=examples(60), deadline=None)
@given(seed=st.integers(0, 1000), length=st.integers(2, 400), kv_heads=st.sampled_from([1, 2]), group=st.sampled_from([1, 3]),
       window=st.one_of(st.just(-1), st.integers(0, 500)), forward=st.sampled_from(["torch", "blocked", "fused"]), backward=st.sampled_from(["torch", "blocked", "fused"]))
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


@settings(max_examples=examples(60), deadline=None)
@given(seed=st.integers(0, 1000), length=st.integers(1, 400), kv_heads=st.sampled_from([1, 2]), group=st.sampled_from([1, 3]),
       window=st.one_of(st.just((-1, -1)), st.integers(0, 500).map(lambda w: (w, w)), st.tuples(st.integers(-1, 500), st.integers(-1, 500))),
       widths=st.sampled_from([(8, 8), (8, 16)]), kernel=st.sampled_from(["torch", "blocked", "fused"]), backward=st.sampled_from(["torch", "blocked", "fused"]))
def test_both_sides_equal_the_definition(seed, length, kv_heads, group, window, widths, kernel, backward):
    q, k, _ = qkv(seed, 2, length, kv_heads * group, kv_heads, widths[0])
    _, _, v = qkv(seed + 1, 2, length, kv_heads * group, kv_heads, widths[1])
    with pytest.MonkeyPatch.context() as patch:
        choose(patch, attention=kernel, window=kernel, backward=backward)
        y = fa.flash_attn_func(q, k, v, causal=False, window_size=window)
    want = by_definition(q, k, v, *window)
    torch.testing.assert_close(y.double(), want, rtol=0, atol=2e-6)
    upstream = torch.randn_like(y)
    for got, expected in zip(torch.autograd.grad(y, (q, k, v), upstream), torch.autograd.grad(want, (q, k, v), upstream.double())):
        torch.testing.assert_close(got, expected, rtol=0, atol=2e-5)


@pytest.mark.parametrize("window", [(-1, -1), (64, 64), (-1, 3)])
def test_both_sides_on_other_devices(monkeypatch, window):
    """Shapes only, of what runs elsewhere without FlexAttention: PyTorch's kernel and blocks."""
    monkeypatch.setattr(fa, "_can_use_flex", lambda q: False)
    q, k, v = (x.detach().to("meta") for x in qkv(1, 2, 300, 2, 1, 8))
    assert fa.flash_attn_func(q, k, v, causal=False, window_size=window).shape == q.shape


def test_causal_hides_the_right_side_whatever_the_window_says():
    q, k, v = (x.detach() for x in qkv(3, 1, 40, 2, 2, 8))
    assert torch.equal(fa.flash_attn_func(q, k, v, causal=True, window_size=(-1, -1)), fa.flash_attn_func(q, k, v, causal=False, window_size=(-1, 0)))
    assert torch.equal(fa.flash_attn_func(q, k, v, causal=True, window_size=(5, 7)), fa.flash_attn_func(q, k, v, causal=False, window_size=(5, 0)))


def test_what_has_no_meaning_is_refused():
    q, k, v = (x.detach() for x in qkv(4, 1, 3, 1, 1, 4))
    with pytest.raises(ValueError, match="KV cache is causal"):
        fa.flash_attn_with_kvcache(q, torch.zeros(1, 4, 1, 4), torch.zeros(1, 4, 1, 4), k=k, v=v, cache_seqlens=torch.zeros(1, dtype=torch.int32))
    with pytest.raises(ValueError, match="2 queries and 3 keys"):
        fa.flash_attn_func(q[:, :2], k, v)


def needs_fused() -> None:
    """Without it the blocked kernel takes its place, which has tests of its own."""
    if not blocked.has_fused():
        pytest.skip("no AVX512-BF16, or no compiler")


@pytest.mark.parametrize("backward", ["torch", "blocked", "fused"])
@pytest.mark.parametrize("forward", ["torch", "blocked", "fused"])
@pytest.mark.parametrize("window", [(-1, 0), (0, 0), (5, 0), (128, 0), (200, 0), (-1, -1), (60, 60)])
def test_every_bfloat16_kernel_is_accurate(monkeypatch, window, forward, backward):
    """The error must stay of the size that rounding to bf16 makes anyway."""
    if "fused" in (forward, backward):
        needs_fused()
    choose(monkeypatch, attention=forward, window=forward, backward=backward)
    q, k, v = qkv(1, 1, 300, 2, 1, 64, torch.bfloat16)
    want = by_definition(q, k, v, *window)
    y = fa.flash_attn_func(q, k, v, causal=False, window_size=window)
    assert y.dtype == torch.bfloat16
    upstream = torch.randn_like(y)
    got = torch.autograd.grad(y, (q, k, v), upstream)
    expected = torch.autograd.grad(want, (q, k, v), upstream.double())
    for a, b in zip((y, *got), (want, *expected)):
        assert (a.double() - b.double()).norm() <= 0.012 * b.double().norm() + 1e-4  # with a window of 0 scores have no gradient at all


HELD = """
import torch
from nanochat import blocked_attention as blocked
from nanochat import flash_attention as fa
q, k, v = (torch.randn(1, 2, 200, 32, generator=torch.Generator().manual_seed(seed)).bfloat16().requires_grad_() for seed in range(3))
want = torch.nn.functional.scaled_dot_product_attention(q.double(), k.double(), v.double(), is_causal=True)
for backward in ("torch", "blocked"):
    y = blocked.band_attention(q, k, v, -1, 0, "torch", backward)
    for got, expected in zip((y, *torch.autograd.grad(y.float().sum(), (q, k, v))), (want, *torch.autograd.grad(want.sum(), (q, k, v), retain_graph=True))):
        assert (got.double() - expected.double()).norm() <= 0.02 * expected.double().norm() + 1e-3
print("attends")
"""


@pytest.mark.slow
@pytest.mark.parametrize("capability", ["avx2", "default"])
def test_pytorch_held_below_what_the_cpu_can(capability):
    """Its kernel asks the CPU and not the limit, and on some raises."""
    env = {name: value for name, value in os.environ.items() if name not in ("ONEDNN_MAX_CPU_ISA", "MKL_CBWR")} | {"ATEN_CPU_CAPABILITY": capability}
    done = subprocess.run([sys.executable, "-c", HELD], env=env, capture_output=True, text=True)
    assert done.stdout.strip() == "attends", done.stderr


def test_long_sequences_have_a_backward_of_their_own(monkeypatch):
    choose(monkeypatch, **{"backward": "torch", "long-backward": "blocked"})
    monkeypatch.setattr(kernel_choice, "LONG", 20)
    blocked = []
    monkeypatch.setattr("nanochat.blocked_attention._pieces", lambda *args: blocked.append(args[0].size(2)) or ())
    for length in (19, 20):
        fa.flash_attn_func(*qkv(1, 1, length, 1, 1, 4), causal=True).sum().backward()
    assert blocked == [20]


@pytest.mark.slow
@pytest.mark.parametrize("window", [(-1, 0), (-1, -1), (3, 0), (3, 2)])
@pytest.mark.parametrize("kernel", ["torch", "blocked"])
def test_attention_is_a_well_behaved_operator(kernel, window):
    q, k, v = (x.detach().transpose(1, 2).requires_grad_() for x in qkv(2, 2, 9, 2, 2, 4))
    torch.library.opcheck(blocked._forward, (q, k, v, *window, kernel, "blocked"))


@pytest.mark.parametrize("window", [(-1, 0), (3, 2)])
def test_fused_attention_is_a_well_behaved_operator(window):
    needs_fused()
    q, k, v = (x.detach().transpose(1, 2).requires_grad_() for x in qkv(2, 2, 9, 2, 2, 32, torch.bfloat16))
    torch.library.opcheck(blocked._forward, (q, k, v, *window, "fused", "fused"))


@pytest.mark.parametrize("kernel", ["torch", "blocked", "fused"])
def test_no_number_goes_unnoticed(monkeypatch, kernel):
    """A NaN in one query's row of scores must reach its output, whatever tricks the exponential plays."""
    if kernel == "fused":
        needs_fused()
    choose(monkeypatch, attention=kernel, backward="blocked")
    q, k, v = (x.detach() for x in qkv(2, 1, 150, 1, 1, 32, torch.bfloat16))
    q[0, 140, 0, 3] = float("nan")
    y = fa.flash_attn_func(q, k, v, causal=True)
    assert y[0, 140].isnan().all() and y[0, :140].isfinite().all() and y[0, 141:].isfinite().all()


@pytest.mark.parametrize("width", [2, 6, 40, 96, 256])
def test_fused_attention_of_any_even_width(monkeypatch, width):
    """Also with operands whose rows do not begin at even numbers."""
    needs_fused()
    choose(monkeypatch, attention="fused", backward="fused")
    q, k, v = qkv(5, 1, 90, 2, 1, width, torch.bfloat16)
    odd = torch.randn(1, 90, 1, width + 1).bfloat16()[..., 1:]
    for values in (v, odd):
        y, want = fa.flash_attn_func(q, k, values, causal=True), by_definition(q, k, values, -1)
        assert (y.double() - want).norm() <= 0.012 * want.norm()


def test_the_result_does_not_depend_on_the_number_of_threads(monkeypatch):
    needs_fused()
    choose(monkeypatch, attention="fused", backward="fused")
    answers = []
    for threads in (1, 2, 3):
        monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
        q, k, v = qkv(6, 2, 200, 3, 3, 32, torch.bfloat16)
        y = fa.flash_attn_func(q, k, v, causal=True)
        answers.append((y, *torch.autograd.grad(y, (q, k, v), torch.ones_like(y))))
    assert all(torch.equal(a, b) for answer in answers[1:] for a, b in zip(answers[0], answer))


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
        fa.flash_attn_with_kvcache(q, torch.zeros(1, 2, 1, 4), torch.zeros(1, 2, 1, 4), k=k, v=v, cache_seqlens=torch.zeros(1, dtype=torch.int32), causal=True)


@pytest.mark.parametrize("kernel", ["torch", "blocked"])
def test_no_mask_of_the_whole_context(monkeypatch, kernel):
    """The additive masks stay of the block's size however long the context is."""
    choose(monkeypatch, window=kernel)
    sizes = []
    real = blocked.additive_mask
    monkeypatch.setattr(blocked, "additive_mask", lambda rows, columns, *rest: sizes.append(rows * columns) or real(rows, columns, *rest))
    q, k, v = (x.detach() for x in qkv(5, 1, 2048, 1, 1, 8))
    fa.flash_attn_func(q, k, v, causal=True, window_size=(256, 0))
    assert sizes and max(sizes) <= blocked.BLOCK * (blocked.BLOCK + 256)
    fa.flash_attn_func(q, k, v, causal=False, window_size=(256, 128))
    assert max(sizes) <= blocked.BLOCK * (blocked.BLOCK + 256 + 128)


class LargestTensor(TorchDispatchMode):
    """The most elements of any tensor that an operator returns."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, (tuple, list)) else (result,):
            self.elements = max(self.elements, tensor.numel() if torch.is_tensor(tensor) else 0)
        return result


@pytest.mark.parametrize("length", [100, 128, 257, 1000])
@pytest.mark.parametrize("left", [0, 5, 127, 128, 129, 300, 5000])
@pytest.mark.parametrize("right", [0, 1, 127, 128, 300])
def test_flex_attention_mask_is_the_same_window(length, left, right):
    from torch.nn.attention.flex_attention import create_block_mask
    band = fa._band(length, left, right, torch.device("cpu"))
    want = create_block_mask(fa._in_window(left, right), None, None, length, length, device="cpu")
    assert torch.equal(band.to_dense(), want.to_dense()) and band.shape == want.shape


@pytest.mark.parametrize("window", [(70, 0), (70, 40), (-1, 40), (70, -1)])
def test_flex_attention_with_it(window):
    """FlexAttention itself runs compiled on CUDA; its eager form shows on any machine that the band is right."""
    from torch.nn.attention.flex_attention import flex_attention
    q, k, v = (x.detach().transpose(1, 2) for x in qkv(6, 1, 257, 4, 2, 16))
    y = flex_attention(q, k, v, block_mask=fa._band(257, *window, q.device), enable_gqa=True)
    want = by_definition(*(x.transpose(1, 2) for x in (q, k, v)), *window)
    torch.testing.assert_close(y.transpose(1, 2).double(), want, rtol=0, atol=2e-6)


def test_flex_attention_mask_is_never_the_whole_context():
    with LargestTensor() as largest:
        fa._band(8192, 2048, 0, torch.device("cpu"))
    assert 0 < largest.elements <= 4 * (8192 // blocked.BLOCK) ** 2


def test_flex_attention_only_where_it_is_compiled(monkeypatch):
    """Run eagerly it would compute T x T scores; the blocks below serve instead."""
    monkeypatch.setattr(fa, "FLEX_DEVICES", ("cpu",))
    q = torch.zeros(1, 2, 300, 16)
    monkeypatch.setattr(fa, "why_not_compile", lambda device_type: "no working Triton")
    assert not fa._can_use_flex(q)
    monkeypatch.setattr(fa, "why_not_compile", lambda device_type: "")
    assert fa._can_use_flex(q) and not fa._can_use_flex(q[..., :8])


def test_override(monkeypatch):
    monkeypatch.setattr(fa, "_override_impl", "sdpa")
    assert fa._resolve_use_fa3() is False
    monkeypatch.setattr(fa, "_override_impl", "fa3")
    monkeypatch.setattr(fa, "HAS_FA3", False)
    with pytest.raises(AssertionError):
        fa._resolve_use_fa3()


@pytest.mark.parametrize("capability, built", [((7, 5), False), ((8, 0), True), ((8, 9), True), ((9, 0), True), ((10, 0), False), ((12, 0), False)])
def test_flash_attention_3_where_it_was_built_for(monkeypatch, capability, built):
    """On a Blackwell the kernels load, and the first attention crashes."""
    monkeypatch.setitem(sys.modules, "kernels", SimpleNamespace(get_kernel=lambda *args, **kwargs: SimpleNamespace(flash_attn_interface="interface")))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
    found, why_not = fa._load_fa3()
    assert (found == "interface") == built and (why_not == "" or "compute capability" in why_not)


class StandIn:
    """FlashAttention-3's two functions with its signatures and its demands, computed by definition."""

    @staticmethod
    def flash_attn_func(q, k, v, softmax_scale=None, causal=False, qv=None, q_descale=None, k_descale=None, v_descale=None, window_size=(-1, -1)):
        assert causal and window_size[1] in (0, -1) and q.shape[:2] == k.shape[:2] == v.shape[:2]
        assert q.size(2) % k.size(2) == 0 and q.size(-1) == k.size(-1) == v.size(-1)
        assert all(x.stride(-1) == 1 for x in (q, k, v))
        return by_definition(q, k, v, window_size[0]).to(q.dtype)

    @staticmethod
    def flash_attn_with_kvcache(q, k_cache, v_cache, k=None, v=None, qv=None, rotary_cos=None, rotary_sin=None, cache_seqlens=None, cache_batch_idx=None,
                                cache_leftpad=None, page_table=None, cu_seqlens_q=None, cu_seqlens_k_new=None, max_seqlen_q=None, rotary_seqlens=None,
                                q_descale=None, k_descale=None, v_descale=None, softmax_scale=None, causal=False, window_size=(-1, -1)):
        assert causal and cache_seqlens.dtype == torch.int32 and cache_seqlens.shape == (q.size(0),) and k.shape[:2] == q.shape[:2]
        rows = []
        for row, filled in enumerate(cache_seqlens.tolist()):
            end = filled + q.size(1)
            k_cache[row, filled:end], v_cache[row, filled:end] = k[row], v[row]
            rows.append(by_definition(q[row:row + 1], k_cache[row:row + 1, :end], v_cache[row:row + 1, :end], window_size[0]))
        return torch.cat(rows).to(q.dtype)


def test_a_model_calls_flash_attention_3_as_it_wants_to_be_called(monkeypatch):
    """Training pass, prompt, decoding step and chunk, with windows and grouped queries; the answers are those of the fallback."""
    model = build_model(dict(sequence_len=512, vocab_size=50, n_layer=4, n_head=4, n_kv_head=2, n_embd=64, window_pattern="SL"), seed=1)
    idx = torch.randint(0, 50, (2, 300), generator=torch.Generator().manual_seed(0))

    def answers():
        engine = Engine(model, SimpleNamespace(get_bos_token_id=lambda: -1, encode_special=lambda name: -1))
        cache = engine._new_cache(2, 300)
        cache.last_logits_only = False
        with torch.no_grad():
            return [model(idx), *(model(idx[:, part], kv_cache=cache) for part in (slice(0, 200), slice(200, 201), slice(201, 300)))]

    want = answers()
    monkeypatch.setattr(fa, "_fa3", StandIn)
    monkeypatch.setattr(fa, "USE_FA3", True)
    monkeypatch.setattr(fa, "_takes_fa3", lambda q, v: True)
    for got, expected in zip(answers(), want, strict=True):
        torch.testing.assert_close(got, expected, rtol=0, atol=1e-4)


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
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
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

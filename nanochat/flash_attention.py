"""Causal attention, with an optional sliding window, behind FlashAttention-3's two function signatures.

| where | what runs |
|---|---|
| Hopper and newer with the `kernels` package, bf16 | FlashAttention-3 |
| other CUDA, sliding window | FlexAttention: blocks outside the band are never computed |
| other CUDA, full causal | PyTorch's built-in causal kernel |
| CPU in bf16; anywhere else, sliding window | blocks of queries, each against just the keys it sees |
| anywhere else, full causal | PyTorch's built-in causal kernel |

No T x T mask is ever built for training or for a prompt; only a chunk appended to a non-empty cache has a mask.
A window `w` lets query i see the keys j with i - w <= j <= i, so w + 1 of them; a negative one means no limit.
"""
import functools
import os
from types import SimpleNamespace

import torch
import torch.nn.functional as F

from nanochat.common import COMPUTE_DTYPE


def _load_fa3():
    """FlashAttention-3's interface from the `kernels` package, or None where there is none for this machine; and why not."""
    if not torch.cuda.is_available():
        return None, "no CUDA"
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    try:
        import kernels
        # Ampere to Hopper, any torch from 2.9 on; from a publisher that `kernels` trusts by itself
        return kernels.get_kernel("kernels-community/flash-attn3", version=1).flash_attn_interface, ""
    except Exception as error:  # no package, no network, no build for this GPU and torch: the fallbacks below serve
        return None, f"{type(error).__name__}: {(str(error) or 'kernels-community/flash-attn3').splitlines()[0]}"


BLOCK = 128  # queries per block
CPU_BYTES = 1 << 20  # score bytes per thread and piece: about an L2 cache
GPU_BYTES = 1 << 28

_fa3, WHY_NOT_FA3 = _load_fa3()
HAS_FA3 = _fa3 is not None
_override_impl: str | None = None  # tests set "fa3" or "sdpa" and resolve again


def _resolve_use_fa3() -> bool:
    if _override_impl == "fa3":
        assert HAS_FA3, "FlashAttention-3 was asked for, but this machine has none"
        return True
    if _override_impl == "sdpa":
        return False
    return HAS_FA3 and COMPUTE_DTYPE == torch.bfloat16


USE_FA3 = _resolve_use_fa3()


def _in_window(window: int):
    def mask(batch, head, query, key):
        return (key <= query) & (query - key <= window)
    return mask


@functools.lru_cache(maxsize=8)
def _block_mask(length: int, window: int, device: torch.device):
    from torch.nn.attention.flex_attention import create_block_mask
    return create_block_mask(_in_window(window), None, None, length, length, device=device)


@functools.lru_cache(maxsize=1)
def _compiled_flex():
    from torch.nn.attention.flex_attention import flex_attention
    return torch.compile(flex_attention, dynamic=True)  # prompts come in all lengths


def _flex_attention(q, k, v, window: int, enable_gqa: bool):
    """Sliding window on CUDA. q (B, H, T, D), k and v (B, Hkv, T, D)."""
    if torch.compiler.is_compiling():  # one graph with the model around it; equal masks are computed once
        from torch.nn.attention.flex_attention import create_block_mask, flex_attention
        mask = create_block_mask(_in_window(window), None, None, q.size(2), q.size(2), device=q.device)
        return flex_attention(q, k, v, block_mask=mask, enable_gqa=enable_gqa)
    return _compiled_flex()(q, k, v, block_mask=_block_mask(q.size(2), window, q.device), enable_gqa=enable_gqa)


def _can_use_flex(q: torch.Tensor) -> bool:
    from torch.utils._triton import has_triton
    return q.is_cuda and q.size(-1) >= 16 and has_triton()


@functools.lru_cache(maxsize=64)
def _additive_mask(rows: int, columns: int, offset: int, window: int, dtype: torch.dtype, device: torch.device):
    """(rows, columns), 0 where row r, standing at column offset + r, may look and -inf elsewhere."""
    distance = torch.arange(rows, device=device)[:, None] + offset - torch.arange(columns, device=device)[None, :]
    hidden = (distance < 0) if window < 0 else (distance < 0) | (distance > window)
    return torch.zeros(rows, columns, dtype=dtype, device=device).masked_fill(hidden, -float("inf"))


def _pieces(q, k, window: int):
    """Yields (heads, queries, keys, q piece, k piece, probabilities) for the whole causal band: three slices and their content.

    q (already scaled) and k (N, T, D). A piece is BLOCK queries of a few heads with every key that they see, small enough
    to stay in the processor's cache until it is used. Its operands are made contiguous: a batched matmul of strided
    ones copies them too, and a transposed one slowly.
    """
    bytes_at_once = torch.get_num_threads() * CPU_BYTES if q.device.type == "cpu" else GPU_BYTES
    heads_at_once = max(1, bytes_at_once // (BLOCK * q.size(1) * q.element_size()))
    for first_head in range(0, q.size(0), heads_at_once):
        heads = slice(first_head, first_head + heads_at_once)
        for start in range(0, q.size(1), BLOCK):
            end = min(start + BLOCK, q.size(1))
            first_key = 0 if window < 0 else max(0, start - window)
            queries, keys = slice(start, end), slice(first_key, end)
            q_piece, k_piece = q[heads, queries].contiguous(), k[heads, keys].contiguous()
            scores = torch.bmm(q_piece, k_piece.mT)
            edge = start if window < 0 else first_key  # keys before it are seen by every query of the block
            scores[:, :, edge - first_key:] += _additive_mask(end - start, end - edge, start - edge, window, q.dtype, q.device)
            yield heads, queries, keys, q_piece, k_piece, torch.softmax(scores, dim=-1)


@torch.library.custom_op("nanochat::blocked_attention", mutates_args=())
def _blocked_forward(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, window: int) -> torch.Tensor:
    out = torch.empty_like(v)  # as many heads and positions as q, but the width of the values
    for heads, queries, keys, _, _, probs in _pieces(q * q.size(-1) ** -0.5, k, window):
        out[heads, queries] = torch.bmm(probs, v[heads, keys].contiguous())
    return out


@torch.library.custom_op("nanochat::blocked_attention_backward", mutates_args=())
def _blocked_backward(grad: torch.Tensor, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor,
                      window: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Recomputes the probabilities piece by piece (Dao et al., 2205.14135) instead of keeping them."""
    scale = q.size(-1) ** -0.5
    grad_q = torch.empty_like(q)
    grad_k, grad_v = (torch.zeros_like(x, dtype=torch.float32) for x in (k, v))
    for heads, queries, keys, q_piece, k_piece, probs in _pieces(q * scale, k, window):
        g = grad[heads, queries].contiguous()
        grad_v[heads, keys] += torch.bmm(probs.mT, g)
        grad_probs = torch.bmm(g, v[heads, keys].contiguous().mT)
        grad_scores = torch.ops.aten._softmax_backward_data(grad_probs, probs, -1, probs.dtype)
        grad_k[heads, keys] += torch.bmm(grad_scores.mT, q_piece)
        grad_q[heads, queries] = torch.bmm(grad_scores, k_piece)
    return grad_q * scale, grad_k.to(k.dtype), grad_v.to(v.dtype)


@_blocked_forward.register_fake
def _(q, k, v, window):
    return torch.empty_like(v)


@_blocked_backward.register_fake
def _(grad, q, k, v, window):
    return torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)


def _setup_context(ctx, inputs, output):
    q, k, v, ctx.window = inputs
    ctx.save_for_backward(q, k, v)


_blocked_forward.register_autograd(
    lambda ctx, grad: (*_blocked_backward(grad.contiguous(), *ctx.saved_tensors, ctx.window), None), setup_context=_setup_context)


def _blocked_attention(q, k, v, window: int, enable_gqa: bool):
    """O(T * window) time, no T x T tensor. q (B, H, T, D), k and v (B, Hkv, T, D) -> (B, H, T, D).

    On a CPU in bf16 this is also 2 to 3 times as fast as the built-in causal kernel (dev/LOG.md).
    """
    if enable_gqa:
        k, v = (x.repeat_interleave(q.size(1) // k.size(1), dim=1) for x in (k, v))
    flat = (x.reshape(-1, x.size(2), x.size(3)).contiguous() for x in (q, k, v))
    return _blocked_forward(*flat, window).view(*q.shape[:3], v.size(3))


def _attend_to_all(q, k, v):
    """One query per head against every key, the decoding step. q (B, H, 1, D), k and v (B, Hkv, T, D) -> (B, H, 1, D).

    Query heads that share a key head become rows of one small matrix. The 16-bit kernel for CPUs is several times slower
    than the float32 one here (dev/LOG.md), so one row of the batch at a time is widened.
    """
    grouped = q.reshape(k.size(0), k.size(1), -1, q.size(3))
    if q.device.type == "cpu" and q.dtype in (torch.bfloat16, torch.float16):
        rows = zip(grouped.split(1), k.split(1), v.split(1))
        y = torch.cat([F.scaled_dot_product_attention(*(x.float() for x in row)) for row in rows]).to(q.dtype)
    else:
        y = F.scaled_dot_product_attention(grouped, k, v)
    return y.reshape(*q.shape[:3], v.size(3))


def _sdpa_attention(q, k, v, window_size: tuple[int, int], enable_gqa: bool, unused: int = 0):
    """Always causal, aligned to the end of the keys. q (B, H, Tq, D), k and v (B, Hkv, Tk, D), Tq <= Tk. Behind a filled cache the last `unused` keys are none."""
    window, queries, keys = window_size[0], q.size(2), k.size(2) - unused
    limited = 0 <= window < keys - 1  # a window of Tk - 1 already sees every key
    if queries == 1:
        if limited:
            k, v = k[:, :, keys - window - 1:], v[:, :, keys - window - 1:]
        return _attend_to_all(q, k, v)
    if queries == keys:
        if not limited and not (q.device.type == "cpu" and q.dtype == torch.bfloat16):
            return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=enable_gqa)
        if limited and _can_use_flex(q):
            return _flex_attention(q, k, v, window, enable_gqa)
        return _blocked_attention(q, k, v, window if limited else -1, enable_gqa)
    # a chunk behind a filled cache: its first query sees the most keys back
    first = max(0, keys - queries - window) // BLOCK * BLOCK if limited else 0
    k, v = k[:, :, first:], v[:, :, first:]
    rows = torch.arange(keys - queries, keys, device=q.device)[:, None]
    columns = torch.arange(first, first + k.size(2), device=q.device)[None, :]
    mask = columns <= rows
    if limited:
        mask &= rows - columns <= window
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=enable_gqa)


def _attend_by_row(q, k_cache, v_cache, k, v, starts: list[int], window: int):
    """The decoding step of rows at different positions. Arguments as for `flash_attn_with_kvcache`, with one new position per row.

    On a CPU each row is attended to by itself, so that none pays for the longest one; elsewhere a mask saves the calls.
    """
    assert q.size(1) == 1, "rows at different positions take one new position each"
    positions = torch.tensor(starts, device=q.device)
    if k is not None:
        rows = torch.arange(len(starts), device=q.device)
        k_cache[rows, positions] = k[:, 0]
        v_cache[rows, positions] = v[:, 0]
    if q.device.type == "cpu":
        spans = [slice(0 if window < 0 else max(0, end - window), end + 1) for end in starts]
        q = q.transpose(1, 2)
        y = [_attend_to_all(q[i:i + 1], k_cache[i:i + 1, span].transpose(1, 2), v_cache[i:i + 1, span].transpose(1, 2)) for i, span in enumerate(spans)]
        return torch.cat(y).transpose(1, 2)
    longest = max(starts) + 1
    distance = positions[:, None] - torch.arange(longest, device=q.device)
    seen = (distance >= 0) if window < 0 else (distance >= 0) & (distance <= window)
    q, k, v = (x.transpose(1, 2) for x in (q, k_cache[:, :longest], v_cache[:, :longest]))
    return F.scaled_dot_product_attention(q, k, v, attn_mask=seen[:, None, None, :], enable_gqa=q.size(1) != k.size(1)).transpose(1, 2)


def flash_attn_func(q, k, v, causal: bool = False, window_size: tuple[int, int] = (-1, -1)):
    """Self-attention without a cache: q (B, T, H, D), k and v (B, T, Hkv, D) -> (B, T, H, D).

    Query head h reads key head h // (H / Hkv). Softmax scale 1/sqrt(D). The fallbacks are causal whatever `causal` says.
    """
    if USE_FA3 and q.is_cuda and q.size(-1) == v.size(-1):
        return _fa3.flash_attn_func(q, k, v, causal=causal, window_size=window_size)
    y = _sdpa_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), window_size, q.size(2) != k.size(2))
    return y.transpose(1, 2)


def flash_attn_with_kvcache(q, k_cache, v_cache, k=None, v=None, cache_seqlens=None, causal: bool = False, window_size: tuple[int, int] = (-1, -1)):
    """Attention of Tn new positions against a cache that they are first written into, in place.

    q (B, Tn, H, D), k and v (B, Tn, Hkv, D), caches (B, Tmax, Hkv, D), cache_seqlens int32 (B,): positions already
    filled, for each row; the caller advances it. Rows at different positions take one new one each. Returns (B, Tn, H, D).
    Raises ValueError when the cache is full.
    """
    if USE_FA3 and q.is_cuda and q.size(-1) == v_cache.size(-1):
        return _fa3.flash_attn_with_kvcache(q, k_cache, v_cache, k=k, v=v, cache_seqlens=cache_seqlens, causal=causal, window_size=window_size)
    starts = cache_seqlens.tolist()
    start, end = starts[0], max(starts) + q.size(1)
    if end > k_cache.size(1):
        raise ValueError(f"KV cache holds {k_cache.size(1)} positions, {end} are needed")
    if any(other != start for other in starts):
        return _attend_by_row(q, k_cache, v_cache, k, v, starts, window_size[0])
    if k is not None:
        k_cache[:, start:end] = k
        v_cache[:, start:end] = v
    padded = end
    if start and q.size(1) > 1 and q.device.type == "cpu":  # PyTorch keeps code for every length that it met in 16 bits: whole blocks bound its memory
        padded = min(-(-end // BLOCK) * BLOCK, k_cache.size(1))
        k_cache[:, end:padded] = v_cache[:, end:padded] = 0  # whatever was there before, hidden by a mask it must be finite
    y = _sdpa_attention(q.transpose(1, 2), k_cache[:, :padded].transpose(1, 2), v_cache[:, :padded].transpose(1, 2), window_size,
                        q.size(2) != k_cache.size(2), padded - end)
    return y.transpose(1, 2)


flash_attn = SimpleNamespace(flash_attn_func=flash_attn_func, flash_attn_with_kvcache=flash_attn_with_kvcache)

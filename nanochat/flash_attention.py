"""Attention, causal or to both sides, with an optional sliding window, behind FlashAttention-3's two function signatures.

| where | what runs |
|---|---|
| Ampere to Hopper with the `kernels` package, bf16 | FlashAttention-3 |
| other CUDA with a working Triton, sliding window | FlexAttention: blocks outside the band are never computed |
| other CUDA, whole context | PyTorch's built-in kernel |
| CPU | PyTorch's kernel, blocks of queries by batched matmuls, or fused_attention.cpp (blocked_attention.py): what is fastest there (kernel_choice.py), forward and backward apart |
| anywhere else, whole context | PyTorch's built-in kernel |
| anywhere else, sliding window | blocks of queries, each against just the keys it sees |

No T x T mask is ever built for training or for a prompt; only a chunk appended to a non-empty cache has a mask.
A window (left, right) lets query i see the keys j with i - left <= j <= i + right; a negative one means no limit, and causal attention has 0 on
the right. Below it is a band of two such numbers, where -1 stands for every limit that hides nothing.
"""
import contextlib
import functools
import os
import threading
from types import SimpleNamespace

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from nanochat.blocked_attention import BLOCK, band_attention
from nanochat.common import COMPUTE_DTYPE, is_ddp_initialized
from nanochat.compiler import compiled, why_not_compile
from nanochat.kernel_choice import chosen, chosen_backward


def _load_fa3():
    """FlashAttention-3's interface from the `kernels` package, or None where there is none for this machine; and why not."""
    if not torch.cuda.is_available():
        return None, "no CUDA"
    major, minor = torch.cuda.get_device_capability()
    if not 8 <= major < 10:  # the kernels are compiled for 8.0 and 9.0a; the latter runs on no later GPU
        return None, f"built for compute capability 8 and 9, and this GPU has {major}.{minor}"
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    try:
        import kernels
        # any torch from 2.9 on; from a publisher that `kernels` trusts by itself
        return kernels.get_kernel("kernels-community/flash-attn3", version=1).flash_attn_interface, ""
    except Exception as error:  # no package, no network, no build for this GPU and torch: the fallbacks below serve
        return None, f"{type(error).__name__}: {(str(error) or 'kernels-community/flash-attn3').splitlines()[0]}"


NOT_CUDNN = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]

_fa3, WHY_NOT_FA3 = _load_fa3()
HAS_FA3 = _fa3 is not None
_override_impl: str | None = None  # tests set "fa3" or "sdpa" and resolve again


def describe() -> str:
    """What CUDA computes attention with."""
    return "FlashAttention-3" if USE_FA3 else f"PyTorch's kernels, slower than FlashAttention-3 ({WHY_NOT_FA3 or COMPUTE_DTYPE})"


def _resolve_use_fa3() -> bool:
    if _override_impl == "fa3":
        assert HAS_FA3, "FlashAttention-3 was asked for, but this machine has none"
        return True
    if _override_impl == "sdpa":
        return False
    return HAS_FA3 and COMPUTE_DTYPE == torch.bfloat16


USE_FA3 = _resolve_use_fa3()


def agree_on_kernels() -> None:
    """With several ranks: FlashAttention-3 on all of them or on none, so that none waits for a slower one and all round alike."""
    global USE_FA3, WHY_NOT_FA3
    if not is_ddp_initialized():
        return
    reasons: list = [None] * dist.get_world_size()
    dist.all_gather_object(reasons, "" if USE_FA3 else WHY_NOT_FA3 or str(COMPUTE_DTYPE))
    without = [f"rank {rank}: {reason}" for rank, reason in enumerate(reasons) if reason]
    if USE_FA3 and without:
        USE_FA3, WHY_NOT_FA3 = False, without[0]


def _in_window(left: int, right: int):
    def mask(batch, head, query, key):
        return (key - query <= right) & (query - key <= left)
    return mask


def _band(length: int, left: int, right: int, device: torch.device):
    """FlexAttention's mask of a band, written down block by block: PyTorch's `create_block_mask` evaluates it at all T x T pairs."""
    from torch.nn.attention.flex_attention import BlockMask
    left, right = (length if limit < 0 else limit for limit in (left, right))
    blocks = torch.arange(-(-length // BLOCK), dtype=torch.int32, device=device)
    distance = (blocks[:, None] - blocks[None, :]) * BLOCK  # query less key; of the pairs in two blocks up to BLOCK - 1 more or less
    touched = (distance + BLOCK > -right) & (distance - BLOCK < left)
    full = (distance - BLOCK >= -right - 1) & (distance + BLOCK <= left + 1)

    def listed(chosen: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """For each block of queries how many blocks of keys are chosen, (1, 1, n), and a permutation, (1, 1, n, n), that has them first, in order."""
        order = torch.argsort(chosen.int(), dim=-1, descending=True, stable=True)
        return chosen.sum(dim=-1, dtype=torch.int32)[None, None], order.int()[None, None]

    (count, order), (full_count, full_order) = listed(touched & ~full), listed(full)
    return BlockMask.from_kv_blocks(count, order, full_count, full_order, BLOCK_SIZE=BLOCK, mask_mod=_in_window(left, right), seq_lengths=(length, length))


_cached_band = functools.lru_cache(maxsize=8)(_band)


@functools.cache
def _compiled_flex(thread: int):
    from torch.nn.attention.flex_attention import flex_attention
    return compiled(flex_attention, dynamic=True)  # prompts come in all lengths


def _flex_attention(q, k, v, left: int, right: int, enable_gqa: bool):
    """Sliding window on CUDA. q (B, H, T, D), k and v (B, Hkv, T, D)."""
    if torch.compiler.is_compiling():  # one graph with the layer around it
        from torch.nn.attention.flex_attention import flex_attention
        return flex_attention(q, k, v, block_mask=_band(q.size(2), left, right, q.device), enable_gqa=enable_gqa)
    return _compiled_flex(threading.get_ident())(q, k, v, block_mask=_cached_band(q.size(2), left, right, q.device), enable_gqa=enable_gqa)


FLEX_DEVICES = ("cuda",)


def _can_use_flex(q: torch.Tensor) -> bool:
    """Only compiled: run eagerly FlexAttention computes all T x T scores. While tracing nothing has to be asked, and asking would break the graph."""
    return q.device.type in FLEX_DEVICES and q.size(-1) >= 16 and (torch.compiler.is_compiling() or not why_not_compile(q.device.type))


# -----------------------------------------------------------------------------


def attend_to_all(q, k, v):
    """One query per head against every key, the decoding step. q (B, H, 1, D), k and v (B, Hkv, T, D), float32 where that is
    faster than the compute dtype -> (B, H, 1, D).

    Query heads that share a key head become rows of one small matrix.
    """
    grouped = q.reshape(k.size(0), k.size(1), -1, q.size(3)).to(k.dtype)
    return F.scaled_dot_product_attention(grouped, k, v).to(q.dtype).reshape(*q.shape[:3], v.size(3))


def band(window_size: tuple[int, int], causal: bool, length: int) -> tuple[int, int]:
    """(left, right), where -1 is a limit that hides none of `length` keys from any of as many queries."""
    left, right = window_size[0], 0 if causal else window_size[1]
    # one key at least is to the right of the first query, so that "no limit" is never taken for a causal 0
    return left if 0 <= left < length - 1 else -1, right if 0 <= right < max(length - 1, 1) else -1


def _sdpa_attention(q, k, v, window_size: tuple[int, int], enable_gqa: bool, unused: int = 0, causal: bool = True):
    """q (B, H, Tq, D), k and v (B, Hkv, Tk, D), Tq <= Tk, aligned to the end of the keys; less than all of them are causal, always. Behind a
    filled cache the last `unused` keys are none."""
    queries, keys = q.size(2), k.size(2) - unused
    left, right = band(window_size, causal, keys)
    if queries == 1:
        if left >= 0:
            k, v = k[:, :, keys - left - 1:], v[:, :, keys - left - 1:]
        return attend_to_all(q, k, v)
    k, v = k.to(q.dtype), v.to(q.dtype)
    if queries == keys:
        whole = left < 0 and right <= 0
        if q.device.type == "cpu":
            return band_attention(q, k, v, left, right, chosen("attention" if whole else "window"), chosen_backward(keys))
        if whole:
            return F.scaled_dot_product_attention(q, k, v, is_causal=right == 0, enable_gqa=enable_gqa)
        if _can_use_flex(q):
            return _flex_attention(q, k, v, left, right, enable_gqa)
        return band_attention(q, k, v, left, right, "blocked")
    # a chunk behind a filled cache: its first query sees the most keys back
    first = max(0, keys - queries - left) // BLOCK * BLOCK if left >= 0 else 0
    k, v = k[:, :, first:], v[:, :, first:]
    rows = torch.arange(keys - queries, keys, device=q.device)[:, None]
    columns = torch.arange(first, first + k.size(2), device=q.device)[None, :]
    mask = columns <= rows
    if left >= 0:
        mask &= rows - columns <= left
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=enable_gqa)


def _without_cudnn(q: torch.Tensor):
    """For attention to a cache: on Hopper PyTorch prefers cuDNN's kernel, and a step took 48 ms there, as if that were prepared for each
    length anew: suspected, not proved (dev/LOG.md)."""
    return sdpa_kernel(NOT_CUDNN) if q.is_cuda else contextlib.nullcontext()


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
        y = [attend_to_all(q[i:i + 1], k_cache[i:i + 1, span].transpose(1, 2), v_cache[i:i + 1, span].transpose(1, 2)) for i, span in enumerate(spans)]
        return torch.cat(y).transpose(1, 2)
    longest = max(starts) + 1
    distance = positions[:, None] - torch.arange(longest, device=q.device)
    seen = (distance >= 0) if window < 0 else (distance >= 0) & (distance <= window)
    q, k, v = (x.transpose(1, 2) for x in (q, k_cache[:, :longest], v_cache[:, :longest]))
    with _without_cudnn(q):
        return F.scaled_dot_product_attention(q, k, v, attn_mask=seen[:, None, None, :], enable_gqa=q.size(1) != k.size(1)).transpose(1, 2)


def _takes_fa3(q: torch.Tensor, v: torch.Tensor) -> bool:
    return USE_FA3 and q.is_cuda and q.size(-1) == v.size(-1)


def flash_attn_func(q, k, v, causal: bool = False, window_size: tuple[int, int] = (-1, -1)):
    """Self-attention without a cache: q (B, T, H, D), k and v (B, T, Hkv, D) -> (B, T, H, D).

    Query head h reads key head h // (H / Hkv). Softmax scale 1/sqrt(D). Query i sees the keys from i - left to i + right, and none after i if causal.
    Raises ValueError where there are not as many keys as queries.
    """
    if q.size(1) != k.size(1):
        raise ValueError(f"{q.size(1)} queries and {k.size(1)} keys: attention without a cache takes as many of both")
    if _takes_fa3(q, v):
        return _fa3.flash_attn_func(q, k, v, causal=causal, window_size=window_size)
    y = _sdpa_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), window_size, q.size(2) != k.size(2), causal=causal)
    return y.transpose(1, 2)


def flash_attn_with_kvcache(q, k_cache, v_cache, k=None, v=None, cache_seqlens=None, causal: bool = False, window_size: tuple[int, int] = (-1, -1)):
    """Attention of Tn new positions against a cache that they are first written into, in place.

    q (B, Tn, H, D), k and v (B, Tn, Hkv, D), caches (B, Tmax, Hkv, D), cache_seqlens int32 (B,): positions already
    filled, for each row; the caller advances it. Rows at different positions take one new one each. Returns (B, Tn, H, D).
    Raises ValueError when the cache is full, and without `causal`: what a position sees must not depend on what comes later.
    """
    if not causal:
        raise ValueError("attention to a KV cache is causal: pass causal=True")
    if _takes_fa3(q, v_cache):
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
    with _without_cudnn(q):
        y = _sdpa_attention(q.transpose(1, 2), k_cache[:, :padded].transpose(1, 2), v_cache[:, :padded].transpose(1, 2), window_size,
                            q.size(2) != k_cache.size(2), padded - end)
    return y.transpose(1, 2)


flash_attn = SimpleNamespace(flash_attn_func=flash_attn_func, flash_attn_with_kvcache=flash_attn_with_kvcache)

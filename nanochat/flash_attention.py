"""Causal attention, with an optional sliding window, behind FlashAttention-3's two function signatures.

| where | what runs |
|---|---|
| Ampere to Hopper with the `kernels` package, bf16 | FlashAttention-3 |
| other CUDA with a working Triton, sliding window | FlexAttention: blocks outside the band are never computed |
| other CUDA, full causal | PyTorch's built-in causal kernel |
| CPU | PyTorch's kernel, or blocks of queries by batched matmuls: what is faster there (kernel_choice.py), forward and backward apart |
| anywhere else, full causal | PyTorch's built-in causal kernel |
| anywhere else, sliding window | blocks of queries, each against just the keys it sees |

No T x T mask is ever built for training or for a prompt; only a chunk appended to a non-empty cache has a mask.
A window `w` lets query i see the keys j with i - w <= j <= i, so w + 1 of them; a negative one means no limit.
"""
import contextlib
import functools
import os
from types import SimpleNamespace

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from nanochat.common import COMPUTE_DTYPE, is_ddp_initialized
from nanochat.compiler import why_not_compile
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


BLOCK = 128  # queries per block, and keys per block of FlexAttention
_cpu: dict = getattr(torch.cpu, "get_capabilities", dict)()  # torch 2.13 and newer
CPU_BYTES = _cpu.get("l2_cache_size") or 1 << 20  # score bytes per thread and piece: an L2 cache
GPU_BYTES = 1 << 28
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


def _in_window(window: int):
    def mask(batch, head, query, key):
        return (key <= query) & (query - key <= window)
    return mask


def _band(length: int, window: int, device: torch.device):
    """FlexAttention's mask of a causal band, written down block by block: PyTorch's `create_block_mask` evaluates it at all T x T pairs."""
    from torch.nn.attention.flex_attention import BlockMask
    blocks = torch.arange(-(-length // BLOCK), dtype=torch.int32, device=device)
    query, key = blocks[:, None], blocks[None, :]
    touched = (key <= query) & ((query - key - 1) * BLOCK < window)  # the nearest pair of two blocks is that far apart, less one
    full = (key < query) & ((query - key + 1) * BLOCK <= window + 1)  # and the farthest pair

    def listed(chosen: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """For each block of queries how many blocks of keys are chosen, (1, 1, n), and a permutation, (1, 1, n, n), that has them first, in order."""
        order = torch.argsort(chosen.int(), dim=-1, descending=True, stable=True)
        return chosen.sum(dim=-1, dtype=torch.int32)[None, None], order.int()[None, None]

    (count, order), (full_count, full_order) = listed(touched & ~full), listed(full)
    return BlockMask.from_kv_blocks(count, order, full_count, full_order, BLOCK_SIZE=BLOCK, mask_mod=_in_window(window), seq_lengths=(length, length))


_cached_band = functools.lru_cache(maxsize=8)(_band)


@functools.lru_cache(maxsize=1)
def _compiled_flex():
    from torch.nn.attention.flex_attention import flex_attention
    return torch.compile(flex_attention, dynamic=True)  # prompts come in all lengths


def _flex_attention(q, k, v, window: int, enable_gqa: bool):
    """Sliding window on CUDA. q (B, H, T, D), k and v (B, Hkv, T, D)."""
    if torch.compiler.is_compiling():  # one graph with the layer around it
        from torch.nn.attention.flex_attention import flex_attention
        return flex_attention(q, k, v, block_mask=_band(q.size(2), window, q.device), enable_gqa=enable_gqa)
    return _compiled_flex()(q, k, v, block_mask=_cached_band(q.size(2), window, q.device), enable_gqa=enable_gqa)


FLEX_DEVICES = ("cuda",)


def _can_use_flex(q: torch.Tensor) -> bool:
    """Only compiled: run eagerly FlexAttention computes all T x T scores. While tracing nothing has to be asked, and asking would break the graph."""
    return q.device.type in FLEX_DEVICES and q.size(-1) >= 16 and (torch.compiler.is_compiling() or not why_not_compile(q.device.type))


@functools.lru_cache(maxsize=64)
def _additive_mask(rows: int, columns: int, offset: int, window: int, dtype: torch.dtype, device: torch.device):
    """(rows, columns), 0 where row r, standing at column offset + r, may look and -inf elsewhere."""
    distance = torch.arange(rows, device=device)[:, None] + offset - torch.arange(columns, device=device)[None, :]
    hidden = (distance < 0) if window < 0 else (distance < 0) | (distance > window)
    return torch.zeros(rows, columns, dtype=dtype, device=device).masked_fill(hidden, -float("inf"))


def _pieces(q, k, window: int):
    """Yields (queries, keys, q piece, k piece, probabilities) for the whole causal band: two indices into (B, H, T), and their content.

    q and k (B, H, T, D). A piece is BLOCK queries of a few heads with every key that they see, small enough to stay in the
    processor's cache until it is used: (n, BLOCK, D), (n, keys, D) and (n, BLOCK, keys). Its operands are made contiguous: a batched matmul of
    strided ones copies them too, and a transposed one slowly.
    """
    B, H, T, D = q.shape
    bytes_at_once = torch.get_num_threads() * CPU_BYTES if q.device.type == "cpu" else GPU_BYTES
    heads_at_once = max(1, bytes_at_once // (BLOCK * T * q.element_size()))
    rows_at_once = max(1, heads_at_once // H)
    for row in range(0, B, rows_at_once):
        for head in range(0, H, heads_at_once):
            for start in range(0, T, BLOCK):
                end = min(start + BLOCK, T)
                first_key = 0 if window < 0 else max(0, start - window)
                heads = slice(row, row + rows_at_once), slice(head, head + heads_at_once)
                queries, keys = (*heads, slice(start, end)), (*heads, slice(first_key, end))
                q_piece, k_piece = _flat(q[queries]) * D ** -0.5, _flat(k[keys])
                scores = torch.bmm(q_piece, k_piece.mT)
                edge = start if window < 0 else first_key  # keys before it are seen by every query of the block
                scores[:, :, edge - first_key:].add_(_additive_mask(end - start, end - edge, start - edge, window, q.dtype, q.device))
                yield queries, keys, q_piece, k_piece, torch.softmax(scores, dim=-1)


def _flat(x):
    """(B, H, T, D) -> (B*H, T, D), contiguous."""
    return x.reshape(-1, x.size(2), x.size(3)).contiguous()


def _empty(x, width: int, **kwargs):
    """(B, H, T, width) for x (B, H, T, D), laid out as (B, T, H, width): the layout of the projections before and after attention."""
    return x.new_empty(x.size(0), x.size(2), x.size(1), width, **kwargs).transpose(1, 2)


def _builtin(q, k, v, mask=None):
    """PyTorch's CPU kernel, with an additive mask or causal: (B, H, T, D), laid out as by `_empty`."""
    return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, mask is None, attn_mask=mask)[0]


@torch.library.custom_op("nanochat::causal_attention", mutates_args=())
def _forward(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, window: int, kernel: str) -> torch.Tensor:
    if kernel == "torch" and window < 0:
        return _builtin(q, k, v)
    out = _empty(q, v.size(3))
    if kernel == "blocked":
        for queries, keys, _, _, probs in _pieces(q, k, window):
            out[queries] = torch.bmm(probs, _flat(v[keys])).view_as(out[queries])
    else:
        for start in range(0, q.size(2), BLOCK):
            end, first_key = min(start + BLOCK, q.size(2)), max(0, start - window)
            mask = _additive_mask(end - start, end - first_key, start - first_key, window, q.dtype, q.device)
            out[:, :, start:end] = _builtin(q[:, :, start:end], k[:, :, first_key:end], v[:, :, first_key:end], mask)
    return out


@torch.library.custom_op("nanochat::causal_attention_backward", mutates_args=())
def _backward(grad: torch.Tensor, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, window: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Recomputes the probabilities piece by piece (Dao et al., 2205.14135) instead of keeping them."""
    scale = q.size(-1) ** -0.5
    grad_q = _empty(q, q.size(3))
    grad_k, grad_v = (_empty(x, x.size(3), dtype=torch.float32).zero_() for x in (k, v))
    for queries, keys, q_piece, k_piece, probs in _pieces(q, k, window):
        g = _flat(grad[queries])
        grad_v[keys].add_(torch.bmm(probs.mT, g).view_as(grad_v[keys]))  # not +=, which would copy the sum onto itself
        grad_probs = torch.bmm(g, _flat(v[keys]).mT)
        grad_scores = torch.ops.aten._softmax_backward_data(grad_probs, probs, -1, probs.dtype)
        grad_k[keys].add_(torch.bmm(grad_scores.mT, q_piece).view_as(grad_k[keys]))
        grad_q[queries] = torch.bmm(grad_scores, k_piece).view_as(grad_q[queries])
    return grad_q.mul_(scale), grad_k.to(k.dtype), grad_v.to(v.dtype)


@_forward.register_fake
def _(q, k, v, window, kernel):
    return _empty(q, v.size(3))


@_backward.register_fake
def _(grad, q, k, v, window):
    return _empty(q, q.size(3)), _empty(k, k.size(3)), _empty(v, v.size(3))


def _setup_context(ctx, inputs, output):
    q, k, v, ctx.window, _ = inputs
    ctx.save_for_backward(q, k, v)


_forward.register_autograd(lambda ctx, grad: (*_backward(grad, *ctx.saved_tensors, ctx.window), None, None), setup_context=_setup_context)


def causal_attention(q, k, v, window: int, forward: str, backward: str = "blocked"):
    """O(T * window) time, no T x T tensor. q (B, H, T, D), k and v (B, Hkv, T, D) -> (B, H, T, D); the kernels by the names of kernel_choice.py."""
    if q.size(1) != k.size(1):
        k, v = (x.repeat_interleave(q.size(1) // k.size(1), dim=1) for x in (k, v))
    if q.size(3) != v.size(3):  # PyTorch's kernel takes one width
        forward = backward = "blocked"
    if window < 0 and forward == backward == "torch":
        return F.scaled_dot_product_attention(q, k, v, is_causal=True)
    return _forward(q, k, v, window, forward)


def attend_to_all(q, k, v):
    """One query per head against every key, the decoding step. q (B, H, 1, D), k and v (B, Hkv, T, D), float32 where that is
    faster than the compute dtype -> (B, H, 1, D).

    Query heads that share a key head become rows of one small matrix.
    """
    grouped = q.reshape(k.size(0), k.size(1), -1, q.size(3)).to(k.dtype)
    return F.scaled_dot_product_attention(grouped, k, v).to(q.dtype).reshape(*q.shape[:3], v.size(3))


def _sdpa_attention(q, k, v, window_size: tuple[int, int], enable_gqa: bool, unused: int = 0):
    """Always causal, aligned to the end of the keys. q (B, H, Tq, D), k and v (B, Hkv, Tk, D), Tq <= Tk. Behind a filled cache the last `unused` keys are none."""
    window, queries, keys = window_size[0], q.size(2), k.size(2) - unused
    limited = 0 <= window < keys - 1  # a window of Tk - 1 already sees every key
    if queries == 1:
        if limited:
            k, v = k[:, :, keys - window - 1:], v[:, :, keys - window - 1:]
        return attend_to_all(q, k, v)
    k, v = k.to(q.dtype), v.to(q.dtype)
    if queries == keys:
        if q.device.type == "cpu":
            return causal_attention(q, k, v, window if limited else -1, chosen("window" if limited else "attention"), chosen_backward(keys))
        if not limited:
            return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=enable_gqa)
        if _can_use_flex(q):
            return _flex_attention(q, k, v, window, enable_gqa)
        return causal_attention(q, k, v, window, "blocked")
    # a chunk behind a filled cache: its first query sees the most keys back
    first = max(0, keys - queries - window) // BLOCK * BLOCK if limited else 0
    k, v = k[:, :, first:], v[:, :, first:]
    rows = torch.arange(keys - queries, keys, device=q.device)[:, None]
    columns = torch.arange(first, first + k.size(2), device=q.device)[None, :]
    mask = columns <= rows
    if limited:
        mask &= rows - columns <= window
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

    Query head h reads key head h // (H / Hkv). Softmax scale 1/sqrt(D). The fallbacks are causal whatever `causal` says.
    """
    if _takes_fa3(q, v):
        return _fa3.flash_attn_func(q, k, v, causal=causal, window_size=window_size)
    y = _sdpa_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), window_size, q.size(2) != k.size(2))
    return y.transpose(1, 2)


def flash_attn_with_kvcache(q, k_cache, v_cache, k=None, v=None, cache_seqlens=None, causal: bool = False, window_size: tuple[int, int] = (-1, -1)):
    """Attention of Tn new positions against a cache that they are first written into, in place.

    q (B, Tn, H, D), k and v (B, Tn, Hkv, D), caches (B, Tmax, Hkv, D), cache_seqlens int32 (B,): positions already
    filled, for each row; the caller advances it. Rows at different positions take one new one each. Returns (B, Tn, H, D).
    Raises ValueError when the cache is full.
    """
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

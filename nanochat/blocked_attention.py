"""Attention of queries in blocks, each to just the keys that it sees: whole contexts and sliding windows on CPUs, and windows wherever nothing better is (flash_attention.py has the table).

An operator of its own for PyTorch, forward and backward, in three kernels: PyTorch's, batched matmuls, fused_attention.cpp.
"""
import functools

import torch
import torch.nn.functional as F

from nanochat.fused_attention import empty, fused_backward, fused_forward, has_fused


def _builtin_takes_bf16() -> bool:
    """PyTorch's CPU kernel asks the CPU what it can do; where ATEN_CPU_CAPABILITY holds PyTorch below that, it lacks the code and raises ("pack_vnni2 is only supported ...")."""
    x = torch.zeros(1, 1, 64, 8, dtype=torch.bfloat16)  # it happens from 64 queries on
    try:
        torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(x, x, x)
        return True
    except RuntimeError:
        return False


BUILTIN_BF16 = _builtin_takes_bf16()
if not BUILTIN_BF16 and not torch.cuda.is_available():
    torch.backends.cuda.enable_flash_sdp(False)  # one switch for both: GPUs need no CPU's kernel, and keep their own

BLOCK = 128  # queries per block, and keys per block of FlexAttention
_cpu: dict = getattr(torch.cpu, "get_capabilities", dict)()  # torch 2.13 and newer
CPU_BYTES = _cpu.get("l2_cache_size") or 1 << 20  # score bytes per thread and piece: an L2 cache
GPU_BYTES = 1 << 28


@functools.lru_cache(maxsize=64)
def additive_mask(rows: int, columns: int, offset: int, left: int, right: int, dtype: torch.dtype, device: torch.device):
    """(rows, columns), 0 where row r, standing at column offset + r, may look and -inf elsewhere."""
    distance = torch.arange(rows, device=device)[:, None] + offset - torch.arange(columns, device=device)[None, :]
    hidden = torch.zeros_like(distance, dtype=torch.bool)
    if left >= 0:
        hidden |= distance > left
    if right >= 0:
        hidden |= distance < -right
    return torch.zeros(rows, columns, dtype=dtype, device=device).masked_fill(hidden, -float("inf"))


def _span(start: int, end: int, length: int, left: int, right: int) -> tuple[int, int]:
    """The keys, from and to, that any of the queries [start, end) sees."""
    return 0 if left < 0 else max(0, start - left), length if right < 0 else min(length, end + right)


def _pieces(q, k, left: int, right: int):
    """Yields (queries, keys, q piece, k piece, probabilities) for the whole band: two indices into (B, H, T), and their content.

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
                first_key, last_key = _span(start, end, T, left, right)
                heads = slice(row, row + rows_at_once), slice(head, head + heads_at_once)
                queries, keys = (*heads, slice(start, end)), (*heads, slice(first_key, last_key))
                q_piece, k_piece = _flat(q[queries]) * D ** -0.5, _flat(k[keys])
                scores = torch.bmm(q_piece, k_piece.mT)
                if left >= 0 or right >= 0:
                    edge = min(start + right, last_key) if left < 0 else first_key  # keys before it are seen by every query of the block
                    mask = additive_mask(end - start, last_key - edge, start - edge, left, right, q.dtype, q.device)
                    scores[:, :, edge - first_key:].add_(mask)
                yield queries, keys, q_piece, k_piece, torch.softmax(scores, dim=-1)


def _flat(x):
    """(B, H, T, D) -> (B*H, T, D), contiguous."""
    return x.reshape(-1, x.size(2), x.size(3)).contiguous()


def _builtin(q, k, v, causal: bool, mask=None):
    """PyTorch's CPU kernel, the mask is added: (B, H, T, D), laid out as by `empty`, and (B, H, T), the logarithm of the sum of each query's exponentials."""
    dtype = q.dtype
    if dtype == torch.bfloat16 and not BUILTIN_BF16:
        q, k, v, mask = (x if x is None else x.float() for x in (q, k, v, mask))
    out, log_sum = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, causal, attn_mask=mask)
    return out.to(dtype), log_sum


@torch.library.custom_op("nanochat::attention", mutates_args=())
def _forward(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, left: int, right: int, kernel: str, backward: str) -> tuple[torch.Tensor, torch.Tensor]:
    """The output and what the fused backward wants: (B, H, T) float32, empty for another one."""
    if kernel == "fused":
        out, log_sum = fused_forward(q, k, v, left, right)
    elif kernel == "torch" and left < 0 and right <= 0:
        out, log_sum = _builtin(q, k, v, right == 0)
    elif kernel == "torch":
        out, log_sum = empty(q, v.size(3)), q.new_empty(q.shape[:3], dtype=torch.float32)
        for start in range(0, q.size(2), BLOCK):
            end = min(start + BLOCK, q.size(2))
            first_key, last_key = _span(start, end, q.size(2), left, right)
            mask = additive_mask(end - start, last_key - first_key, start - first_key, left, right, q.dtype, q.device)
            piece = _builtin(q[:, :, start:end], k[:, :, first_key:last_key], v[:, :, first_key:last_key], False, mask)
            out[:, :, start:end], log_sum[:, :, start:end] = piece
    else:
        out, log_sum = empty(q, v.size(3)), q.new_empty(0, dtype=torch.float32)
        for queries, keys, _, _, probs in _pieces(q, k, left, right):
            out[queries] = torch.bmm(probs, _flat(v[keys])).view_as(out[queries])
    return out, log_sum.contiguous() if backward == "fused" else q.new_empty(0, dtype=torch.float32)


@torch.library.custom_op("nanochat::attention_backward", mutates_args=())
def _backward(grad: torch.Tensor, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, left: int,
              right: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Recomputes the probabilities piece by piece (Dao et al., 2205.14135) instead of keeping them."""
    scale = q.size(-1) ** -0.5
    grad_q = empty(q, q.size(3))
    grad_k, grad_v = (empty(x, x.size(3), dtype=torch.float32).zero_() for x in (k, v))
    for queries, keys, q_piece, k_piece, probs in _pieces(q, k, left, right):
        g = _flat(grad[queries])
        grad_v[keys].add_(torch.bmm(probs.mT, g).view_as(grad_v[keys]))  # not +=, which would copy the sum onto itself
        grad_probs = torch.bmm(g, _flat(v[keys]).mT)
        grad_scores = torch.ops.aten._softmax_backward_data(grad_probs, probs, -1, probs.dtype)
        grad_k[keys].add_(torch.bmm(grad_scores.mT, q_piece).view_as(grad_k[keys]))
        grad_q[queries] = torch.bmm(grad_scores, k_piece).view_as(grad_q[queries])
    return grad_q.mul_(scale), grad_k.to(k.dtype), grad_v.to(v.dtype)


@torch.library.custom_op("nanochat::attention_fused_backward", mutates_args=())
def _fused_backward(grad: torch.Tensor, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, out: torch.Tensor, log_sum: torch.Tensor, left: int,
                    right: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return fused_backward(grad, q, k, v, out, log_sum, left, right)


@_forward.register_fake
def _(q, k, v, left, right, kernel, backward):
    return empty(q, v.size(3)), q.new_empty(q.shape[:3] if backward == "fused" else (0,), dtype=torch.float32)


def _fake_backward(grad, q, k, v, *rest):
    return empty(q, q.size(3)), empty(k, k.size(3)), empty(v, v.size(3))


_backward.register_fake(_fake_backward)
_fused_backward.register_fake(_fake_backward)


def _setup_context(ctx, inputs, output):
    q, k, v, *ctx.band, _, ctx.backward = inputs
    ctx.save_for_backward(q, k, v, *(output if ctx.backward == "fused" else ()))
    ctx.set_materialize_grads(False)


def _gradients(ctx, grad, _):
    backward = _fused_backward if ctx.backward == "fused" else _backward
    return *backward(grad, *ctx.saved_tensors, *ctx.band), None, None, None, None


_forward.register_autograd(_gradients, setup_context=_setup_context)


def band_attention(q, k, v, left: int, right: int, forward: str, backward: str = "blocked"):
    """O(T * band) time, no T x T tensor. q (B, H, T, D), k and v (B, Hkv, T, D) -> (B, H, T, D); the kernels by the names of kernel_choice.py.

    What a kernel cannot do another one does: PyTorch's takes one width, and no window backward; the fused one takes bfloat16 of one even width, and
    its backward pass wants what the blocked forward pass does not compute.
    """
    if q.size(1) != k.size(1):
        k, v = (x.repeat_interleave(q.size(1) // k.size(1), dim=1) for x in (k, v))
    fused = "fused" in (forward, backward) and q.dtype == torch.bfloat16 and q.size(3) % 2 == 0 and (q.device.type == "meta" or has_fused())
    if q.size(3) != v.size(3):
        forward = backward = "blocked"
    elif not fused:
        forward, backward = ("blocked" if kernel == "fused" else kernel for kernel in (forward, backward))
    elif forward == "blocked" and backward == "fused":
        forward = "fused"
    if left < 0 and right <= 0 and forward == backward == "torch":
        return F.scaled_dot_product_attention(q, k, v, is_causal=right == 0)
    return _forward(q, k, v, left, right, forward, backward)[0]

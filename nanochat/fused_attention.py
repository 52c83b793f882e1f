"""fused_attention.cpp for Python: attention in bfloat16 by tiles that stay in the cache, on CPUs with AVX512-BF16 or AMX."""
import ctypes
import functools
from pathlib import Path

import torch
from torch.utils._python_dispatch import _disable_current_modes

from nanochat.compiler import before_compiling, native


@functools.cache
def _library():
    """The compiled file, or None: without such instructions, without a compiler, and where oneDNN was told to do without."""
    if not (torch.backends.mkldnn.is_available() and getattr(torch.cpu, "_is_avx512_bf16_supported", bool)()):
        return None
    library = native(Path(__file__).with_suffix(".cpp"))
    try:
        with _disable_current_modes():  # the first call may come while something is traced
            _forward(library, *torch.zeros(3, 1, 1, 2, 32, dtype=torch.bfloat16), -1, -1)
    except (AttributeError, RuntimeError):
        return None
    return library


def has_fused() -> bool:
    """Whether this CPU can run it. The first call may compile it, once per machine, in 5 to 10 seconds."""
    return _library() is not None


before_compiling(lambda: torch.compiler.assume_constant_result(has_fused))


def empty(x, width: int, **kwargs):
    """(B, H, T, width) for x (B, H, T, D), laid out as (B, T, H, width): the layout of the projections before and after attention."""
    return x.new_empty(x.size(0), x.size(2), x.size(1), width, **kwargs).transpose(1, 2)


def _matrix(x):
    """(B, H, T, D) as the library's `Matrix`."""
    assert x.dtype == torch.bfloat16 and x.stride(3) == 1
    return (ctypes.c_int64 * 4)(x.data_ptr(), *x.stride()[:3])


def _rows(x):
    """`x` if its rows are whole and begin at an even number, as the library wants them, else a copy."""
    return x if x.stride(3) == 1 and not any(stride % 2 for stride in (*x.stride()[:3], x.storage_offset())) else x.contiguous()


def _call(function, q, left: int, right: int, *tensors) -> None:
    """Tensors in the order of the function's arguments: of four dimensions a `Matrix`, else float32."""
    pointers = [_matrix(x) if x.dim() == 4 else ctypes.c_void_p(x.data_ptr()) for x in tensors]
    if function((ctypes.c_int64 * 6)(*q.shape, left, right), torch.get_num_threads(), *pointers):
        raise RuntimeError("oneDNN has no bfloat16 tiles on this CPU")


def _forward(library, q, k, v, left: int, right: int):
    out, log_sum = empty(q, v.size(3)), q.new_empty(q.shape[:3], dtype=torch.float32)
    _call(library.attention_forward, q, left, right, *map(_rows, (q, k, v)), out, log_sum)
    return out, log_sum


def fused_forward(q, k, v, left: int, right: int) -> tuple[torch.Tensor, torch.Tensor]:
    """q, k and v (B, H, T, D) of one even width -> (B, H, T, D), and (B, H, T) float32, the logarithm of the sum of each query's exponentials.

    Query i sees the keys from i - left to i + right; a negative limit is none.
    """
    return _forward(_library(), q, k, v, left, right)


def fused_backward(grad, q, k, v, out, log_sum, left: int, right: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The gradients of q, k and v; out and log_sum are what the forward pass returned."""
    grads = empty(q, q.size(3)), empty(k, k.size(3)), empty(v, v.size(3))
    _call(_library().attention_backward, q, left, right, *map(_rows, (grad, q, k, v, out)), log_sum, *grads)
    return grads

"""Cross-entropy of soft-capped logits straight from hidden states, without ever holding all logits.

For a large vocabulary the float32 logits (tokens x vocabulary) are the largest tensor of a training step. Here
rows are processed in chunks, and each chunk's gradient is computed right after its loss, while its logits are
still in the cache. PyTorch's own `linear_cross_entropy` (2.12 and newer) works that way too, but it has no place for
the tanh between the matmul and the softmax, hence this file.

With z = h Wᵀ, c = cap·tanh(z/cap), p = softmax(c):  dL/dz = (p - onehot) · (1 - tanh²(z/cap)).
Three savings: |c| <= cap, so the softmax needs no maximum; with r = 1/(exp(2z/cap) + 1), tanh = 1 - 2r and
1 - tanh² = 4r(1 - r), so one exponential serves both the tanh and its derivative; and the softmax's denominator is a factor
of whole rows, which the matmuls' narrow sides can take: on a CPU in bfloat16 one pass over the logits is enough (cross_entropy.cpp).
"""
import ctypes
from pathlib import Path

import torch
import torch.nn.functional as F

from nanochat.compiler import jit, native

CHUNK_ELEMENTS = {"cpu": 1 << 21, "cuda": 1 << 28, "mps": 1 << 26}  # logits held at once: the cache, or a share of the memory


def _chunk_rows(rows: int, vocab: int, device: torch.device) -> int:
    wanted = max(CHUNK_ELEMENTS.get(device.type, 1 << 26) // vocab, 64)
    chunks = -(-rows // wanted)
    return -(-rows // chunks)  # equal chunks, so that at most two shapes are compiled


@jit("cpu", "cuda")
def _capped_exp_sum(z, cap: float):
    """z (n, V) in the compute dtype -> float32 row sums (n,) of exp(cap tanh(z/cap))."""
    r = 1 / (torch.exp(z.float() * (2 / cap)) + 1)
    e = torch.exp(cap - (2 * cap) * r)
    return e.sum(dim=-1)


@jit("cpu", "cuda")
def _capped_softmax_grad(z, total, cap: float):
    """softmax(cap tanh(z/cap)) · (1 - tanh²) in z's dtype; total (n,) float32."""
    r = 1 / (torch.exp(z.float() * (2 / cap)) + 1)
    e = torch.exp(cap - (2 * cap) * r)
    return (e * (r * (1 - r)) * (4 / total)[:, None]).to(z.dtype)


def _gather_target(z, targets, cap: float):
    """The target's capped logit and 1 - tanh² at it, float32 (n,)."""
    tanh = torch.tanh(z.gather(1, targets[:, None])[:, 0].float() / cap)
    return cap * tanh, 1 - tanh * tanh


def _fused(z, cap: float):
    """Puts exp(cap tanh(z/cap)) · (1 - tanh²) in the place of z. Returns the row sums (n,) of the exponentials, or None where this cannot be done."""
    library = native(Path(__file__).with_suffix(".cpp")) if z.dtype == torch.bfloat16 and z.device.type == "cpu" else None
    if library is None:
        return None
    total = torch.empty(z.size(0))
    library.capped_softmax(ctypes.c_void_p(z.data_ptr()), ctypes.c_int64(z.size(0)), ctypes.c_int64(z.size(1)), ctypes.c_float(cap),
                           ctypes.c_void_p(total.data_ptr()), torch.get_num_threads())
    return total


@torch.library.custom_op("nanochat::softcap_cross_entropy", mutates_args=())
def _forward(hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor, cap: float,
             need_grad: bool) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(summed loss, its gradients with respect to hidden and, in float32, weight); the gradients are empty if not needed.

    The sum and not the mean, whose gradients of single logits would vanish in float16.
    """
    rows, vocab = hidden.size(0), weight.size(0)
    chunk = _chunk_rows(rows, vocab, hidden.device)
    loss = torch.zeros((), device=hidden.device)
    grad_hidden = torch.empty_like(hidden if need_grad else hidden[:0])
    grad_weight = torch.zeros_like(weight if need_grad else weight[:0], dtype=torch.float32)
    for start in range(0, rows, chunk):
        h, t = hidden[start:start + chunk], targets[start:start + chunk]
        valid = (t >= 0).float()
        t = t.clamp(min=0)
        z = h @ weight.t()
        logit, slope = _gather_target(z, t, cap)
        fused = _fused(z, cap)
        total = _capped_exp_sum(z, cap) if fused is None else fused
        loss += ((total.log() - logit) * valid).sum()
        if need_grad:
            # dL/dz is `scale` times `grad`, row by row: 1 or, fused, the denominator is left out of the large matrix
            grad, scale = (_capped_softmax_grad(z, total, cap), valid) if fused is None else (z, valid / total)
            at_target = grad.gather(1, t[:, None]) - (slope if fused is None else slope * total).to(grad.dtype)[:, None]
            grad.scatter_(1, t[:, None], at_target)  # scatter_add_ would copy a bfloat16 matrix there and back
            scale = scale[:, None].to(grad.dtype)
            torch.mm(grad, weight, out=grad_hidden[start:start + chunk])
            grad_hidden[start:start + chunk] *= scale
            grad_weight += grad.t() @ (h * scale)
    return loss, grad_hidden, grad_weight


@_forward.register_fake
def _(hidden, weight, targets, cap, need_grad):
    some = slice(None) if need_grad else slice(0)
    return hidden.new_empty((), dtype=torch.float32), torch.empty_like(hidden[some]), torch.empty_like(weight[some], dtype=torch.float32)


def _setup_context(ctx, inputs, output):
    ctx.save_for_backward(output[1], output[2])
    ctx.weight_dtype = inputs[1].dtype
    ctx.set_materialize_grads(False)


def _backward(ctx, grad_loss, _grad_hidden, _grad_weight):
    grad_hidden, grad_weight = ctx.saved_tensors
    return grad_hidden * grad_loss.to(grad_hidden.dtype), (grad_weight * grad_loss).to(ctx.weight_dtype), None, None, None


_forward.register_autograd(_backward, setup_context=_setup_context)


def softcap_cross_entropy(hidden, weight, targets, cap: float, reduction: str = "mean") -> torch.Tensor:
    """-log softmax(cap * tanh(hidden @ weight.T / cap))[target]; rows with target -1 do not count.

    hidden (N, C) and weight (V, C) in the compute dtype, targets int64 (N,), 0 < cap <= 50 (beyond it the exponential
    would overflow). Returns a float32 scalar for `mean` (NaN if no row counts, as in PyTorch) and `sum`, (N,) for `none`, where
    rows that do not count are 0. Raises ValueError for another reduction. No double backward.
    """
    if reduction == "none":  # evaluation, and losses that weight each token: plain autograd
        chunk = _chunk_rows(hidden.size(0), weight.size(0), hidden.device)
        losses = [F.cross_entropy(cap * torch.tanh((h @ weight.t()).float() / cap), t, ignore_index=-1, reduction="none")
                  for h, t in zip(hidden.split(chunk), targets.split(chunk))]
        return torch.cat(losses)
    if reduction not in ("mean", "sum"):
        raise ValueError(f"unknown reduction {reduction!r}: use mean, sum or none")
    need_grad = torch.is_grad_enabled() and (hidden.requires_grad or weight.requires_grad)
    loss = _forward(hidden, weight, targets, cap, need_grad)[0]
    return loss / (targets >= 0).sum() if reduction == "mean" else loss

"""The normalized block (nGPT, Loshchilov et al., 2410.01131): hidden states and weights live on the unit sphere.

* A block takes a unit vector h and steps towards each module's normalized output: h <- unit(h + alpha * (unit(f(h)) - h)).
  alpha is a signed number per channel: with abs(alpha), as in the paper's code, a layer that starts at 0 would never wake.
* All vectors along the model's width have length 1: the rows of what reads the stream, the columns of what writes it, the
  embeddings, the rows of the head. `NormalizedWeights` restores that after every optimizer step.
* What the lengths would have expressed is left to learned scales: s_qk sharpens the attention, s_u (and s_v) scale the hidden
  units, s_head the heads' outputs, s_z the logits. The paper stores each scale divided by a constant, which changes nothing but its
  learning rate under Adam; here the parameters are the values themselves and have learning rates relative to where they start.
  So no constant in the forward pass depends on the width, and a model can be widened without any.
* s_qk multiplies the queries alone, where the paper puts it on queries and keys: the scores depend on the product only.
* A low-rank W = U V is on the sphere when the product is: the factor that faces the stream has unit vectors, and the other one is
  scaled so that the rows (of a reader) or columns (of a writer) of U V have length 1. By the Gram matrix G = V V^T of the first,
  |row i of U V|^2 = u_i G u_i^T, so the product itself is never formed.
"""
import math
from typing import Any

import torch
import torch.nn as nn
import torch.nn.functional as F

from nanochat.compiler import jit
from nanochat.gpt import VE_GATE_CHANNELS, CausalSelfAttention, Linear
from nanochat.lowrank import LowRankLinear, linear_or_low_rank
from nanochat.optim import adamw_group, inert, matrix_groups

S_Z = 10.0  # where the scale of the logits starts: cosines below 1 would leave the softmax flat
# Learning rates in the unit of the stock model's flags, so that flags tuned for one block suit the other (dev/LOG.md)
HEAD_SHARE, EMBEDDING_SHARE, RESID_SHARE, SCALES_SHARE = 12.0, 16.0, 0.25, 0.5
GATE_LR = 0.005


def unit(x: torch.Tensor) -> torch.Tensor:
    """x (..., C) scaled to length 1 along the last dimension, in float32 or better; zero stays zero."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    return (wide * wide.square().sum(dim=-1, keepdim=True).clamp_min(1e-24).rsqrt()).to(x.dtype)


def step_towards(h: torch.Tensor, alpha: tuple, *outputs: torch.Tensor) -> torch.Tensor:
    """The unit vector reached from h (..., C) by stepping, per channel, alpha[i] (C,) of the way towards each output (2410.01131, equations 10, 11)."""
    dtype = torch.promote_types(h.dtype, torch.float32)
    start = end = h.to(dtype)
    for a, output in zip(alpha, outputs):
        end = end + a * (unit(output.to(dtype)) - start)
    return unit(end).to(h.dtype)


class NormalizedAttention(CausalSelfAttention):
    """The stock attention between unit queries and keys, with the shapes of a `LayerSpec` and a scale for each head's output."""

    c_q: Any
    c_k: Any
    c_v: Any
    c_proj: Any

    def __init__(self, n_embd: int, spec, layer_idx: int):
        nn.Module.__init__(self)
        self.layer_idx = layer_idx
        self.n_head, self.n_kv_head = spec.n_head, spec.n_kv_head
        self.root = math.sqrt(spec.qk_dim)
        self.c_q = linear_or_low_rank(n_embd, spec.n_head * spec.qk_dim, spec.attn_rank)
        self.c_k = linear_or_low_rank(n_embd, spec.n_kv_head * spec.qk_dim, spec.attn_rank)
        self.c_v = linear_or_low_rank(n_embd, spec.n_kv_head * spec.head_dim, spec.attn_rank)
        self.c_proj = linear_or_low_rank(spec.n_head * spec.head_dim, n_embd, spec.attn_rank)
        self.s_qk = nn.Parameter(torch.empty(spec.n_head, spec.qk_dim))
        self.s_head = nn.Parameter(torch.empty(spec.n_head))
        self.ve_gate = Linear(VE_GATE_CHANNELS, spec.n_kv_head) if spec.value_embed else None

    def sharpen(self, q, k):
        """For scores of sqrt(D) * cosine (the paper's choice): the kernel divides by sqrt(D) once."""
        return unit(q) * (self.root * self.s_qk).to(q.dtype), unit(k) * self.root

    def attend(self, *args):
        y = super().attend(*args)
        s_head = self.s_head if self.n_head > 1 else inert(self.s_head)  # the block takes only the direction of what comes out
        return y * s_head.to(y.dtype).unsqueeze(-1)


class NormalizedMLP(nn.Module):
    """ReLU² or SwiGLU of scaled projections of a unit vector."""

    def __init__(self, n_embd: int, spec):
        super().__init__()
        self.c_fc = linear_or_low_rank(n_embd, spec.mlp_hidden, spec.mlp_rank)
        self.s_u = nn.Parameter(torch.empty(spec.mlp_hidden))
        self.c_gate = linear_or_low_rank(n_embd, spec.mlp_hidden, spec.mlp_rank) if spec.activation == "swiglu" else None
        self.s_v = nn.Parameter(torch.empty(spec.mlp_hidden)) if spec.activation == "swiglu" else None
        self.c_hidden = nn.ModuleList(linear_or_low_rank(spec.mlp_hidden, spec.mlp_hidden, spec.mlp_rank) for _ in range(spec.mlp_depth - 1))
        self.s_hidden = nn.ParameterList(torch.empty(spec.mlp_hidden) for _ in self.c_hidden)
        self.c_proj = linear_or_low_rank(spec.mlp_hidden, n_embd, spec.mlp_rank)

    def forward(self, h):
        u = self.c_fc(h) * self.s_u.to(h.dtype)
        u = F.relu(u).square() if self.c_gate is None else F.silu(self.c_gate(h) * self.s_v.to(h.dtype)) * u
        for layer, scale in zip(self.c_hidden, self.s_hidden):
            u = F.relu(layer(unit(u)) * scale.to(u.dtype)).square()
        return self.c_proj(u)


class NormalizedBlock(nn.Module):
    def __init__(self, n_embd: int, spec, layer_idx: int):
        super().__init__()
        self.attn = NormalizedAttention(n_embd, spec, layer_idx)
        self.mlp = NormalizedMLP(n_embd, spec)
        self.alpha_attn = nn.Parameter(torch.empty(n_embd))
        self.alpha_mlp = nn.Parameter(torch.empty(n_embd))
        self.order = spec.order

    def forward(self, x, ve, cos_sin, window_size, kv_cache):
        h = unit(x)  # what enters is a mix of the stream and the first embedding
        if self.order == "parallel":
            return step_towards(h, (self.alpha_attn, self.alpha_mlp), self.attn(h, ve, cos_sin, window_size, kv_cache), self.mlp(h))
        if self.order == "mlp-attn":
            h = step_towards(h, (self.alpha_mlp,), self.mlp(h))
            return step_towards(h, (self.alpha_attn,), self.attn(h, ve, cos_sin, window_size, kv_cache))
        h = step_towards(h, (self.alpha_attn,), self.attn(h, ve, cos_sin, window_size, kv_cache))
        return step_towards(h, (self.alpha_mlp,), self.mlp(h))


def init_normalized(model) -> None:
    """Random directions and the paper's scales (alpha of its order, 1 / layers), in a LayeredGPT whose scalars are initialized already."""
    root, alpha = math.sqrt(model.config.n_embd), 1 / model.config.n_layer
    for module in (model.transformer.wte, *model.lm_head.modules(), *model.transformer.h.modules()):
        if isinstance(module, (Linear, nn.Embedding)):
            nn.init.normal_(module.weight)
    nn.init.constant_(model.s_z, S_Z)
    for block in model.transformer.h:
        attn, mlp = block.attn, block.mlp
        for scale, start in ((block.alpha_attn, alpha), (block.alpha_mlp, alpha), (attn.s_qk, 1.0), (attn.s_head, 1.0),
                             (mlp.s_u, root), (mlp.s_v, root), *((scale, math.sqrt(scale.numel())) for scale in mlp.s_hidden)):
            if scale is not None:
                nn.init.constant_(scale, start)  # s_u, s_v, s_hidden: projections of a unit vector get a variance of 1
        if attn.ve_gate is not None:
            nn.init.uniform_(attn.ve_gate.weight, 0.0, 0.02)
    for gate in (model.smear_gate, *(block.attn.ve_gate for block in model.transformer.h if block.attn.ve_gate is not None)):
        gate.weight.mul_(root)  # the same gates as from a stream of RMS 1
    NormalizedWeights(model)()


# -----------------------------------------------------------------------------
# The weights' side


def normalized_groups(model, unembedding_lr, embedding_lr, matrix_lr, weight_decay, scalar_lr, matrix_optimizer) -> list[dict]:
    """Groups of a normalized model, for the flags of a stock one.

    A learning rate of a vector on the sphere is an angle in radians per step, so it holds at any width n: entries of AdamW move
    by lr / sqrt(n). Muon's step already turns each row of a reader by its learning rate. Scales move by a share of
    where they start. There is no weight decay.
    """
    root = model.config.n_embd ** 0.5
    modules = [module for block in model.transformer.h for module in (block.attn, block.mlp)]
    gates = [block.attn.ve_gate for block in model.transformer.h if block.attn.ve_gate is not None]
    matrices = [module for block in model.transformer.h for module in block.modules() if isinstance(module, Linear) and module not in gates]

    def scales(start: float, *names: str) -> dict:
        params = [p for module in (*model.transformer.h, *modules) for name in names for p in _tensors(getattr(module, name, None))]
        return adamw_group(params, start * scalar_lr * SCALES_SHARE, (0.9, 0.95), 0.0)

    return [
        adamw_group(model.lm_head.parameters(), unembedding_lr * HEAD_SHARE / root, (0.8, 0.96), 0.0),
        adamw_group(model.transformer.wte.parameters(), embedding_lr * EMBEDDING_SHARE / root, (0.8, 0.995), 0.0),
        adamw_group(model.value_embeds.parameters(), embedding_lr * EMBEDDING_SHARE / root, (0.8, 0.995), 0.0),
        adamw_group([model.resid_lambdas], scalar_lr * RESID_SHARE, (0.8, 0.95), 0.0),
        adamw_group([model.x0_lambdas], scalar_lr, (0.96, 0.95), 0.0),
        adamw_group([model.smear_lambda, model.backout_lambda], 0.2, (0.8, 0.95), 0.0),
        adamw_group([model.smear_gate.weight], 0.2 * root, (0.8, 0.95), 0.0),
        adamw_group([gate.weight for gate in gates], GATE_LR * root, (0.8, 0.95), 0.0),
        scales(1 / model.config.n_layer, "alpha_attn", "alpha_mlp"),
        scales(1.0, "s_qk", "s_head"),
        scales(root, "s_u", "s_v"),
        scales(root * 2, "s_hidden"),
        adamw_group([model.s_z], S_Z * scalar_lr * SCALES_SHARE, (0.9, 0.95), 0.0),
        *matrix_groups([module.weight for module in matrices], matrix_lr, 0.0, matrix_optimizer),
    ]


def _tensors(value) -> list:
    return [] if value is None else [value] if isinstance(value, torch.Tensor) else list(value)


def _normalize(weight: torch.Tensor, dim: int) -> None:
    weight.mul_(weight.square().sum(dim=dim, keepdim=True).clamp_min(1e-24).rsqrt())


@jit("cuda")
def _normalize_all(first: torch.Tensor, matrices: list, products: list) -> None:
    for weight, dim in matrices:
        _normalize(weight, dim)
    for facing, other, dim in products:
        _normalize(facing, dim)
        if dim == 1:  # a reader: rows of other @ facing
            lengths = (other @ (facing @ facing.T) * other).sum(dim=1, keepdim=True)
        else:  # a writer: columns of facing @ other
            lengths = ((facing.T @ facing) @ other * other).sum(dim=0, keepdim=True)
        other.mul_(lengths.clamp_min(1e-24).rsqrt())


class NormalizedWeights:
    """All weights of a model that live on the sphere; calling it puts them back there, in one compiled pass on CUDA."""

    def __init__(self, model):
        self.matrices: list[tuple[torch.Tensor, int]] = [(model.transformer.wte.weight, 1)]
        self.products: list[tuple[torch.Tensor, torch.Tensor, int]] = []
        self._add(1, model.lm_head)
        for block in model.transformer.h:
            attn, mlp = block.attn, block.mlp
            self._add(1, attn.c_q, attn.c_k, attn.c_v, mlp.c_fc, mlp.c_gate, *mlp.c_hidden)
            self._add(0, attn.c_proj, mlp.c_proj)

    def _add(self, dim: int, *layers) -> None:
        """Rows (dim 1) or columns (dim 0) of these layers have length 1."""
        for layer in layers:
            if isinstance(layer, LowRankLinear):
                facing, other = (layer.V, layer.U) if dim == 1 else (layer.U, layer.V)
                self.products.append((facing.weight, other.weight, dim))
            elif layer is not None:
                self.matrices.append((layer.weight, dim))

    @torch.no_grad()
    def __call__(self) -> None:
        _normalize_all(self.matrices[0][0], self.matrices, self.products)

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
from operator import attrgetter
from typing import Any

import torch
import torch.nn as nn
import torch.nn.functional as F

from nanochat.compiler import jit
from nanochat.gpt import Linear
from nanochat.layered_gpt import ORDERS, SCALES_LR_SCALE, LayeredAttention, LayeredBlock, LayeredGPT, LayeredMLP, LayerSpec, Names, Scales
from nanochat.lowrank import LowRankLinear
from nanochat.optim import MuonAdamW, adamw_group, inert, matrix_groups

S_Z = 10.0  # where the scale of the logits starts: cosines below 1 would leave the softmax flat
# Learning rates in the unit of the stock model's flags, so that flags tuned for one block suit the other (dev/LOG.md)
HEAD_LR_SCALE, EMBEDDING_LR_SCALE, RESID_LR_SCALE = 12.0, 16.0, 0.25
GATE_LR = 0.005


def unit(x: torch.Tensor) -> torch.Tensor:
    """x (..., C) scaled to length 1 along the last dimension, in float32 or better; zero stays zero."""
    y = x.to(torch.promote_types(x.dtype, torch.float32))
    return (y * y.square().sum(dim=-1, keepdim=True).clamp_min(1e-24).rsqrt()).to(x.dtype)


def step_towards(h: torch.Tensor, alpha: list, outputs: list) -> torch.Tensor:
    """The unit vector reached from h (..., C) by stepping, per channel, alpha[i] (C,) of the way towards each output (2410.01131, equations 10, 11)."""
    dtype = torch.promote_types(h.dtype, torch.float32)
    start = end = h.to(dtype)
    for a, output in zip(alpha, outputs):
        end = end + a * (unit(output.to(dtype)) - start)
    return unit(end).to(h.dtype)


class NormalizedAttention(LayeredAttention):
    """Between unit queries and keys, with a scale for each head's output."""

    def __init__(self, n_embd: int, spec: LayerSpec, layer_idx: int):
        super().__init__(n_embd, spec, layer_idx)
        self.root = math.sqrt(spec.qk_dim)
        self.s_qk = nn.Parameter(torch.empty(spec.n_head, spec.qk_dim))
        self.s_head = nn.Parameter(torch.empty(spec.n_head))

    def axes(self) -> Names:
        return super().axes() | {"s_qk": (".query[head]",), "s_head": (".attended[scale]",)}

    def sharpen(self, q_BTHD, k_BTKD):
        """For scores of sqrt(D) * cosine (the paper's choice): the kernel divides by sqrt(D) once."""
        return unit(q_BTHD) * (self.root * self.s_qk).to(q_BTHD.dtype), unit(k_BTKD) * self.root

    def attend(self, *args):
        y = super().attend(*args)
        s_head = self.s_head if self.n_head > 1 else inert(self.s_head)  # the block takes only the direction of what comes out
        return y * s_head.to(y.dtype).unsqueeze(-1)


class NormalizedMLP(LayeredMLP):
    """ReLU² or SwiGLU of scaled projections of a unit vector."""

    def __init__(self, n_embd: int, spec: LayerSpec):
        super().__init__(n_embd, spec)
        self.s_u = nn.Parameter(torch.empty(spec.mlp_hidden))
        self.s_v = nn.Parameter(torch.empty(spec.mlp_hidden)) if spec.activation == "swiglu" else None
        self.s_hidden = nn.ParameterList(torch.empty(spec.mlp_hidden) for _ in self.c_hidden)
        self.c_proj: Any = self._modules.pop("c_proj")  # comes last: the order of parameters is part of the format

    def axes(self) -> Names:
        hidden: Names = {f"s_hidden.{k}": (f".hidden.{k + 1}[scale]",) for k in range(len(self.s_hidden))}
        return super().axes() | {"s_u": (".hidden.0[scale]",), "s_v": (".gate[scale]",)} | hidden

    def forward(self, h):
        u = self.c_fc(h) * self.s_u.to(h.dtype)
        u = F.relu(u).square() if self.c_gate is None else F.silu(self.c_gate(h) * self.s_v.to(h.dtype)) * u
        for layer, scale in zip(self.c_hidden, self.s_hidden):
            u = F.relu(layer(unit(u)) * scale.to(u.dtype)).square()
        return self.c_proj(u)


class NormalizedBlock(LayeredBlock):
    normalized = True
    alpha_start: float
    Attention, MLP = NormalizedAttention, NormalizedMLP

    def __init__(self, n_embd: int, spec: LayerSpec, layer_idx: int):
        super().__init__(n_embd, spec, layer_idx)
        self.alpha_attn = nn.Parameter(torch.empty(n_embd))
        self.alpha_mlp = nn.Parameter(torch.empty(n_embd))

    @classmethod
    def model(cls) -> type[LayeredGPT]:
        return NormalizedGPT

    def init_weights(self) -> None:
        """Random directions, to be normalized; hidden units get a variance of 1, as they are projections of a unit vector."""
        for module in self.modules():
            if isinstance(module, Linear):
                nn.init.normal_(module.weight)
        for start, scales in self.scales().values():
            for scale in scales:
                nn.init.constant_(scale, start)
        for scale in self.mlp.s_hidden:
            nn.init.constant_(scale, math.sqrt(scale.numel()))

    def init_as_identity(self) -> None:
        nn.init.zeros_(self.alpha_attn)
        nn.init.zeros_(self.alpha_mlp)

    def axes(self) -> Names:
        return super().axes() | {"alpha_attn": ("stream[scale]",), "alpha_mlp": ("stream[scale]",)}

    def scales(self) -> Scales:
        attn, mlp, root = self.attn, self.mlp, self.alpha_attn.numel() ** 0.5
        return {"alpha": (self.alpha_start, [self.alpha_attn, self.alpha_mlp]), "heads": (1.0, [attn.s_qk, attn.s_head]),
                "hidden": (root, [mlp.s_u] if mlp.s_v is None else [mlp.s_u, mlp.s_v]), "deeper": (2 * root, [*mlp.s_hidden])}

    def matrices(self) -> list[nn.Parameter]:
        return [p for p in super().matrices() if self.attn.ve_gate is None or p is not self.attn.ve_gate.weight]  # the gates have a group of their own

    def forward(self, x, *attention):
        h = unit(x)  # what enters is a mix of the stream and the first embedding
        for modules in ORDERS[self.order]:
            outputs = [self.attn(h, *attention) if name == "attn" else self.mlp(h) for name in modules]
            h = step_towards(h, [self.alpha_attn if name == "attn" else self.alpha_mlp for name in modules], outputs)
        return h


class NormalizedGPT(LayeredGPT):
    """The model around normalized blocks: embeddings and rows of the head are unit vectors, too."""

    norm = staticmethod(unit)
    s_z: nn.Parameter

    def make_head(self, padded_vocab: int) -> nn.Module:
        self.s_z = nn.Parameter(torch.empty(padded_vocab))  # of the logits
        return super().make_head(padded_vocab)

    def make_block(self, layer_idx: int) -> nn.Module:
        block: Any = super().make_block(layer_idx)
        block.alpha_start = 1 / (self.config.n_layer * self.loops)  # the paper's order
        return block

    @torch.no_grad()
    def init_weights(self) -> None:
        """Random directions, and scales at their starts."""
        self._init_scalars_and_embeddings()
        for module in (self.transformer.wte, *self.lm_head.modules()):
            if isinstance(module, (Linear, nn.Embedding)):
                nn.init.normal_(module.weight)
        nn.init.constant_(self.s_z, S_Z)
        for block in self.transformer.h:
            block.init_weights()
        for block in self.transformer.h:
            block.attn.init_gate()
        for gate in self._gates():
            gate.mul_(math.sqrt(self.config.n_embd))  # the same gates as from a stream of RMS 1
        NormalizedWeights(self)()

    def _gates(self) -> list[nn.Parameter]:
        return [self.smear_gate.weight, *(block.attn.ve_gate.weight for block in self.transformer.h if block.attn.ve_gate is not None)]

    def _cast_embeddings(self) -> None:
        """bfloat16 cannot hold vectors to the length of 1."""

    def axes(self) -> Names:
        return super().axes() | {"s_z": ("logits[scale]",)}

    def _scalars(self) -> list[torch.Tensor]:
        return [*super()._scalars(), self.s_z]

    def _mixes(self) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """Stream and first embedding are one vector before the first layer, which takes only its direction; not so when it is run again."""
        first, *others = super()._mixes()
        return [(inert(first[0]), inert(first[1])) if self.loops == 1 else first, *others]

    def _cap(self, logits: torch.Tensor) -> torch.Tensor:
        return super()._cap(logits * self.s_z)

    def head_scale(self, weight: torch.Tensor) -> torch.Tensor:
        return weight * self.s_z[:, None]

    # -------------------------------------------------------------------------
    # Optimizer

    def setup_optimizer(self, *args, **kwargs) -> MuonAdamW:
        """As for the stock model; the weights return to the unit sphere after every step."""
        optimizer = super().setup_optimizer(*args, **kwargs)
        normalize = NormalizedWeights(self)
        optimizer.register_step_post_hook(lambda *_: normalize())
        return optimizer

    def _param_groups(self, unembedding_lr, embedding_lr, matrix_lr, weight_decay, scalar_lr, matrix_optimizer) -> list[dict]:
        """For the flags of a stock model.

        A learning rate of a vector on the sphere is an angle in radians per step, so it holds at any width n: entries of AdamW move
        by lr / sqrt(n). Muon's step already turns each row of a reader by its learning rate. Scales move by a share of
        where they start. There is no weight decay.
        """
        root = self.config.n_embd ** 0.5
        smear_gate, *gates = self._gates()
        return [
            adamw_group(self.lm_head.parameters(), unembedding_lr * HEAD_LR_SCALE / root, (0.8, 0.96), 0.0),
            adamw_group(self.transformer.wte.parameters(), embedding_lr * EMBEDDING_LR_SCALE / root, (0.8, 0.995), 0.0),
            adamw_group(self.value_embeds.parameters(), embedding_lr * EMBEDDING_LR_SCALE / root, (0.8, 0.995), 0.0),
            adamw_group([self.resid_lambdas], scalar_lr * RESID_LR_SCALE, (0.8, 0.95), 0.0),
            adamw_group([self.x0_lambdas], scalar_lr, (0.96, 0.95), 0.0),
            adamw_group([self.smear_lambda, self.backout_lambda], 0.2, (0.8, 0.95), 0.0),
            adamw_group([smear_gate], 0.2 * root, (0.8, 0.95), 0.0),
            adamw_group(gates, GATE_LR * root, (0.8, 0.95), 0.0),
            *self._scale_groups(scalar_lr),
            adamw_group([self.s_z], S_Z * scalar_lr * SCALES_LR_SCALE, (0.9, 0.95), 0.0),
            *matrix_groups(self._matrices(), matrix_lr, 0.0, matrix_optimizer),
        ]


# -----------------------------------------------------------------------------
# The weights' side


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
    """All weights of a model that live on the sphere: columns of what writes the stream, rows of all other matrices. Calling it puts them back there, in
    one compiled pass on CUDA."""

    def __init__(self, model):
        self.matrices: list[tuple[torch.Tensor, int]] = [(model.transformer.wte.weight, 1)]
        self.products: list[tuple[torch.Tensor, torch.Tensor, int]] = []
        for name, axes in model.axes().items():
            if len(axes) == 2 and not axes[1].startswith("stream["):  # a matrix, and no gate
                self._add(0 if axes[0] == "stream" else 1, attrgetter(name)(model))

    def _add(self, dim: int, layer: Linear | LowRankLinear | None) -> None:
        """Rows (dim 1) or columns (dim 0) of the layer have length 1."""
        if isinstance(layer, LowRankLinear):
            facing, other = (layer.V, layer.U) if dim == 1 else (layer.U, layer.V)
            self.products.append((facing.weight, other.weight, dim))
        elif layer is not None:
            self.matrices.append((layer.weight, dim))

    @torch.no_grad()
    def __call__(self) -> None:
        _normalize_all(self.matrices[0][0], self.matrices, self.products)

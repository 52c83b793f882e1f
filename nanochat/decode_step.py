"""The decoding step of a GPT, one new position for each row of a cache, in as few calls as PyTorch allows.

`GPT.forward` says what is computed; this is the same for weights that no longer change. On a CPU a small model spends half of its step between
the matrix products, so:

* queries, keys, values and the value gate come out of one product; queries and keys are rotated and normalized together
* scalars are Python numbers, and what depends on the position alone is made once for all layers
* one row is multiplied as a vector where that is faster (kernel_choice.py)

`GPT.cast_for_inference` makes it for models of the stock kinds of blocks, at any shape and rank; all others decode by `forward`.
"""
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from nanochat.flash_attention import flash_attn
from nanochat.gpt import GPT, MLP, SMEAR_GATE_CHANNELS, VE_GATE_CHANNELS, Block, CausalSelfAttention, Linear, norm
from nanochat.kernel_choice import chosen
from nanochat.layered_gpt import LayeredAttention, LayeredBlock, LayeredGPT, LayeredMLP
from nanochat.lowrank import DECODE_ROWS, LowRankLinear


def product(weight: torch.Tensor) -> Callable:
    """Multiplication of positions (B, in) with weight (out, in): (B, out)."""
    transposed = weight.t()
    vector = weight.device.type == "cpu" and chosen("position") == "vector"
    return lambda x: torch.mv(weight, x.view(-1)).view(1, -1) if vector and x.size(0) == 1 else torch.mm(x, transposed)


def call(layer: Any) -> Callable:
    """The same of a layer: of a low-rank one its product, if it has that and the rows are few, or else its factors."""
    if type(layer) is Linear:
        return product(layer.weight.detach())
    if not isinstance(layer, LowRankLinear) or layer.product is None:
        return layer
    merged = product(layer.product)
    return lambda x: (merged if x.size(0) <= DECODE_ROWS else layer)(x)


class AttentionStep:
    def __init__(self, attn: CausalSelfAttention):
        self.layer_idx, self.heads, self.kv_heads = attn.layer_idx, attn.n_head, attn.n_kv_head
        self.proj = call(attn.c_proj)
        parts, gate = (attn.c_q, attn.c_k, attn.c_v), attn.ve_gate
        rows = [part.out_features for part in parts]
        gates = padding = 0
        if all(type(part) is Linear for part in parts):
            weights = [part.weight for part in parts]
            if gate is not None:  # it reads the first channels only; more rows make whole blocks, which a product is faster with
                gates, padding = self.kv_heads, -self.kv_heads % 64
                weights.append(F.pad(gate.weight, (0, attn.c_q.in_features - VE_GATE_CHANNELS, 0, padding)))
            fused = torch.cat(weights).detach()
            for part, weight in zip(parts, fused.split([*rows, gates + padding])):
                part.weight.data = weight  # a view: nothing is kept twice
            self.project = product(fused)
        else:
            calls = [call(part) for part in parts]
            if gate is not None:
                gates = self.kv_heads
                calls.append(lambda u: gate(u[:, :VE_GATE_CHANNELS]))
            self.project = lambda u: torch.cat([part(u) for part in calls], dim=-1)
        self.sizes = [rows[0] + rows[1], rows[2], gates, padding]

    def __call__(self, x, u, ve, rotary, window_size, kv_cache):
        """x the stream and u the same, normed (B, C); ve (B, Hkv*D) or None; rotary two (1 or B, 1, D) -> the stream behind (B, C)."""
        B = x.size(0)
        qk, v, gate, _ = self.project(u).split(self.sizes, dim=-1)
        qk = qk.view(B, self.heads + self.kv_heads, -1)
        cos, sin = rotary
        qk = norm(torch.addcmul(qk * cos, qk.roll(cos.size(-1) // 2, dims=-1), sin)).mul_(1.2).unsqueeze(1)
        v = v.view(B, self.kv_heads, -1)
        if ve is not None:
            v = torch.addcmul(v, torch.sigmoid(gate).mul_(3).unsqueeze(-1), ve.view(v.shape))
        q, k = qk.split([self.heads, self.kv_heads], dim=2)
        k_cache, v_cache = kv_cache.get_layer_cache(self.layer_idx)
        y = flash_attn.flash_attn_with_kvcache(
            q, k_cache, v_cache, k=k, v=v.unsqueeze(1), cache_seqlens=kv_cache.cache_seqlens, causal=True, window_size=window_size)
        return self.proj(y.reshape(B, -1)).add_(x)


class MLPStep:
    def __init__(self, mlp: nn.Module):
        self.mlp: Any = mlp
        self.plain = type(mlp) is MLP or type(mlp) is LayeredMLP and mlp.c_gate is None and not mlp.gelu and not len(mlp.c_hidden)
        if self.plain:
            self.fc, self.proj = call(self.mlp.c_fc), call(self.mlp.c_proj)

    def __call__(self, x, u):
        """As for attention."""
        if not self.plain:
            return x + self.mlp(u)
        hidden = self.fc(u).relu_()
        return self.proj(hidden.mul_(hidden)).add_(x)


class DecodeStep:
    """Holds the weights as they are now; after any change it must be made anew."""

    @staticmethod
    def suits(model: GPT) -> bool:
        return type(model) in (GPT, LayeredGPT) and all(
            type(block) in (Block, LayeredBlock) and getattr(block, "order", "attn-mlp") == "attn-mlp"
            and type(block.attn) in (CausalSelfAttention, LayeredAttention) for block in model.transformer.h) and all(
                ahead == 0 for _, ahead in model.window_sizes)

    @torch.no_grad()
    def __init__(self, model: GPT):
        self.layers = [(AttentionStep(block.attn), MLPStep(block.mlp)) for block in model.transformer.h]
        self.resid_lambdas = model.resid_lambdas.tolist()
        self.x0_lambdas = model.x0_lambdas.detach()[:, None, None]
        self.smear_lambda, self.backout_lambda = model.smear_lambda.item(), model.backout_lambda.item()
        self.head = call(model.lm_head)

    def __call__(self, model: GPT, idx: torch.Tensor, kv_cache) -> torch.Tensor:
        """idx (B, 1), appended to the cache -> float32 logits (B, 1, V)."""
        embedded, previous = model.embed(idx), kv_cache.prev_embedding
        rotary = {}
        for cos, sin in (tables := model.cos_sin(kv_cache.get_pos(), 1)):
            if id(cos) not in rotary:
                rotary[id(cos)] = torch.cat((cos, cos), dim=-1)[:, 0], torch.cat((sin, -sin), dim=-1)[:, 0]
        kv_cache.prev_embedding = embedded
        x = embedded[:, 0]
        if previous is not None:
            x = x + self.smear_lambda * torch.sigmoid(model.smear_gate(x[:, :SMEAR_GATE_CHANNELS])) * previous[:, 0]
        x_mid = x
        from_x0 = (self.x0_lambdas * x).to(x.dtype).unbind()
        for i, (attend, mlp) in enumerate(self.layers):
            ve = model.value_embeds[str(i)](idx) if str(i) in model.value_embeds else None
            for use in range(model.loops):
                kv_cache.first_slot = use * len(self.layers)
                x = torch.add(from_x0[i], x, alpha=self.resid_lambdas[i])
                x = attend(x, norm(x), ve, rotary[id(tables[i][0])], model.window_sizes[i], kv_cache)
                x = mlp(x, norm(x))
            if i == model.backout_layer:
                x_mid = x
        kv_cache.advance(1)
        return model._cap(self.head(norm(torch.sub(x, x_mid, alpha=self.backout_lambda))))[:, None]

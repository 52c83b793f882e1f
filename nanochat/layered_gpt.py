"""LayeredGPT: a GPT described layer by layer.

The stock GPT derives everything from a few numbers. Here each layer states all that it is in a `LayerSpec`, so that
layers may differ, and inserting or widening one is an edit of a list that changes no other. Embeddings, smear,
residual scalars, backout, loss, counting and optimizer are the stock model's own, and so are the parameter names of
dense layers: `from_gpt` is exact.
"""
import math
from dataclasses import dataclass, fields
from typing import Any

import torch
import torch.nn as nn
import torch.nn.functional as F

from nanochat.common import COMPUTE_DTYPE
from nanochat.gpt import (
    GPT,
    SMEAR_GATE_CHANNELS,
    VE_GATE_CHANNELS,
    CausalSelfAttention,
    GPTConfig,
    Linear,
    norm,
    rotary_rows,
    run_layer,
)
from nanochat.lowrank import LowRankLinear, linear_or_low_rank
from nanochat.ngpt import NormalizedBlock, NormalizedWeights, init_normalized, normalized_groups, unit
from nanochat.optim import MuonAdamW, inert

BLOCKS = ("prenorm", "ngpt")
ACTIVATIONS = ("relu2", "swiglu")
ORDERS = ("attn-mlp", "mlp-attn", "parallel")


@dataclass(frozen=True)
class LayerSpec:
    """All that one layer is. Ranks of 0 are dense; a negative window sees the whole context."""

    n_head: int
    n_kv_head: int
    head_dim: int  # of the values
    qk_dim: int  # of queries and keys
    mlp_hidden: int
    mlp_depth: int = 1  # hidden layers of the MLP
    attn_rank: int = 0
    mlp_rank: int = 0
    block: str = "prenorm"
    activation: str = "relu2"
    order: str = "attn-mlp"
    window: int = -1
    value_embed: bool = False

    def check(self, n_embd: int) -> None:
        """Raises ValueError with the reason if there is no such layer in a model of this width."""
        if min(self.n_head, self.n_kv_head, self.head_dim, self.qk_dim, self.mlp_hidden, self.mlp_depth) < 1:
            raise ValueError("heads, head sizes, MLP width and MLP depth must be 1 or more")
        if self.n_head % self.n_kv_head:
            raise ValueError(f"{self.n_head} query heads cannot share {self.n_kv_head} key heads evenly")
        if self.qk_dim % 2:
            raise ValueError(f"queries of width {self.qk_dim} cannot be rotated in pairs; use an even number")
        for name, value, known in (("block", self.block, BLOCKS), ("activation", self.activation, ACTIVATIONS), ("order", self.order, ORDERS)):
            if value not in known:
                raise ValueError(f"unknown {name} {value!r}: use one of {', '.join(known)}")
        if self.activation == "swiglu" and self.mlp_depth > 1:
            raise ValueError("a SwiGLU MLP has one hidden layer; use relu2 for more")
        if not 0 <= self.attn_rank <= min(n_embd, self.n_head * self.head_dim, self.n_kv_head * min(self.head_dim, self.qk_dim)):
            raise ValueError(f"an attention rank of {self.attn_rank} exceeds the smallest attention matrix")
        if not 0 <= self.mlp_rank <= min(n_embd, self.mlp_hidden):
            raise ValueError(f"an MLP rank of {self.mlp_rank} exceeds the smaller side of the MLP, {min(n_embd, self.mlp_hidden)}")


@dataclass
class LayeredGPTConfig(GPTConfig):
    """The stock fields (of which n_head, n_kv_head and window_pattern only say where the layers came from), and the layers."""

    layers: tuple[LayerSpec, ...] = ()
    backout_layer: int = 0  # the stream after this layer is subtracted before the head
    lm_head_rank: int = 0

    def __post_init__(self):
        # a checkpoint's JSON holds the layers as plain dicts
        self.layers = tuple(layer if isinstance(layer, LayerSpec) else LayerSpec(**layer) for layer in self.layers)
        if self.n_layer != len(self.layers):
            raise ValueError(f"n_layer is {self.n_layer}, but {len(self.layers)} layers are given")
        if not 0 <= self.backout_layer < self.n_layer:
            raise ValueError(f"there is no layer {self.backout_layer} to back out")
        if not 0 <= self.lm_head_rank <= self.n_embd:
            raise ValueError(f"a head rank of {self.lm_head_rank} exceeds the width of {self.n_embd}")
        for index, layer in enumerate(self.layers):
            try:
                layer.check(self.n_embd)
            except ValueError as error:
                raise ValueError(f"layer {index}: {error}") from error
        if len({layer.block for layer in self.layers}) > 1:
            raise ValueError("pre-norm and normalized layers cannot be mixed: the stream is on the unit sphere for all of them or for none")

    @property
    def normalized(self) -> bool:
        return self.layers[0].block == "ngpt"

    @classmethod
    def from_gpt(cls, gpt: GPT) -> "LayeredGPTConfig":
        """The stock model's configuration, spelled out."""
        config = gpt.config
        layers = tuple(
            LayerSpec(n_head=heads, n_kv_head=kv_heads, head_dim=v_dim, qk_dim=qk_dim, mlp_hidden=4 * config.n_embd,
                      window=window, value_embed=str(i) in gpt.value_embeds)
            for i, ((heads, kv_heads, qk_dim, v_dim), (window, _)) in enumerate(zip(gpt.attention_shapes(), gpt.window_sizes)))
        return cls(**{field.name: getattr(config, field.name) for field in fields(GPTConfig)}, layers=layers, backout_layer=gpt.backout_layer)


class LayeredAttention(CausalSelfAttention):
    """The stock attention with the shapes of a `LayerSpec`."""

    c_q: Any
    c_k: Any
    c_v: Any
    c_proj: Any

    def __init__(self, n_embd: int, spec: LayerSpec, layer_idx: int):
        nn.Module.__init__(self)
        self.layer_idx = layer_idx
        self.n_head, self.n_kv_head, self.head_dim = spec.n_head, spec.n_kv_head, spec.head_dim
        self.c_q = linear_or_low_rank(n_embd, spec.n_head * spec.qk_dim, spec.attn_rank)
        self.c_k = linear_or_low_rank(n_embd, spec.n_kv_head * spec.qk_dim, spec.attn_rank)
        self.c_v = linear_or_low_rank(n_embd, spec.n_kv_head * spec.head_dim, spec.attn_rank)
        self.c_proj = linear_or_low_rank(spec.n_head * spec.head_dim, n_embd, spec.attn_rank)
        self.ve_gate = Linear(VE_GATE_CHANNELS, spec.n_kv_head) if spec.value_embed else None


class LayeredMLP(nn.Module):
    """ReLU² after each of `mlp_depth` hidden layers of width `mlp_hidden`, or one layer of SwiGLU (Shazeer, 2002.05202)."""

    def __init__(self, n_embd: int, spec: LayerSpec):
        super().__init__()
        self.c_fc = linear_or_low_rank(n_embd, spec.mlp_hidden, spec.mlp_rank)
        self.c_gate = linear_or_low_rank(n_embd, spec.mlp_hidden, spec.mlp_rank) if spec.activation == "swiglu" else None
        if spec.mlp_depth > 1:
            self.c_hidden = nn.ModuleList(linear_or_low_rank(spec.mlp_hidden, spec.mlp_hidden, spec.mlp_rank) for _ in range(spec.mlp_depth - 1))
        else:
            self.c_hidden = ()  # type: ignore[assignment]
        self.c_proj = linear_or_low_rank(spec.mlp_hidden, n_embd, spec.mlp_rank)

    def forward(self, x):
        x = F.relu(self.c_fc(x)).square() if self.c_gate is None else F.silu(self.c_gate(x)) * self.c_fc(x)
        for layer in self.c_hidden:
            x = F.relu(layer(norm(x))).square()  # squares of squares would leave any number format
        return self.c_proj(x)


class LayeredBlock(nn.Module):
    def __init__(self, n_embd: int, spec: LayerSpec, layer_idx: int):
        super().__init__()
        self.attn = LayeredAttention(n_embd, spec, layer_idx)
        self.mlp = LayeredMLP(n_embd, spec)
        self.order = spec.order

    def forward(self, x, ve, cos_sin, window_size, kv_cache):
        if self.order == "parallel":
            u = norm(x)
            return x + self.attn(u, ve, cos_sin, window_size, kv_cache) + self.mlp(u)
        if self.order == "mlp-attn":
            x = x + self.mlp(norm(x))
            return x + self.attn(norm(x), ve, cos_sin, window_size, kv_cache)
        x = x + self.attn(norm(x), ve, cos_sin, window_size, kv_cache)
        return x + self.mlp(norm(x))


class LayeredGPT(GPT):
    """Built like the stock model: under the meta device, then `to_empty` and `init_weights`."""

    config: LayeredGPTConfig
    lm_head: Any

    def __init__(self, config: LayeredGPTConfig, pad_vocab_size_to: int = 64):
        nn.Module.__init__(self)
        self.config = config
        self.window_sizes = [(layer.window, 0) for layer in config.layers]
        self.backout_layer = config.backout_layer
        self.run_layer = run_layer
        padded_vocab = -(-config.vocab_size // pad_vocab_size_to) * pad_vocab_size_to
        self.transformer = nn.ModuleDict({
            "wte": nn.Embedding(padded_vocab, config.n_embd),
            "h": nn.ModuleList((NormalizedBlock if config.normalized else LayeredBlock)(config.n_embd, layer, i) for i, layer in enumerate(config.layers)),
        })
        self.s_z = nn.Parameter(torch.empty(padded_vocab)) if config.normalized else None
        if config.normalized:
            self.norm = unit  # type: ignore[method-assign]
        self.lm_head = linear_or_low_rank(config.n_embd, padded_vocab, config.lm_head_rank)
        self.resid_lambdas = nn.Parameter(torch.empty(config.n_layer))
        self.x0_lambdas = nn.Parameter(torch.empty(config.n_layer))
        self.smear_gate = Linear(SMEAR_GATE_CHANNELS, 1)
        self.smear_lambda = nn.Parameter(torch.empty(1))
        self.backout_lambda = nn.Parameter(torch.empty(1))
        self.value_embeds = nn.ModuleDict({
            str(i): nn.Embedding(padded_vocab, layer.n_kv_head * layer.head_dim) for i, layer in enumerate(config.layers) if layer.value_embed})
        self.rotary_seq_len = config.sequence_len * 10
        for qk_dim in {layer.qk_dim for layer in config.layers}:
            for name in (f"cos_{qk_dim}", f"sin_{qk_dim}"):
                self.register_buffer(name, torch.empty(1, self.rotary_seq_len, 1, qk_dim // 2, dtype=COMPUTE_DTYPE), persistent=False)

    @classmethod
    def from_gpt(cls, gpt: GPT) -> "LayeredGPT":
        """The same model, layer by layer: equal parameters under equal names, equal logits."""
        with torch.device("meta"):
            model = cls(LayeredGPTConfig.from_gpt(gpt), pad_vocab_size_to=gpt.lm_head.weight.size(0))
        model.to_empty(device=gpt.get_device())
        model.init_buffers()
        model.load_state_dict(gpt.state_dict(), strict=True)
        return model

    # The rotary tables depend on the width of a head, so there is one pair for each width.

    @property
    def cos(self) -> torch.Tensor:  # type: ignore[override]
        return getattr(self, f"cos_{self.config.layers[0].qk_dim}")

    def init_buffers(self) -> None:
        for qk_dim in {layer.qk_dim for layer in self.config.layers}:
            for name, table in zip(("cos", "sin"), self._precompute_rotary_embeddings(self.rotary_seq_len, qk_dim)):
                setattr(self, f"{name}_{qk_dim}", table)
        self._cast_embeddings()

    def cos_sin(self, start: int | torch.Tensor, length: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
        widths = [layer.qk_dim for layer in self.config.layers]
        tables = {qk_dim: tuple(rotary_rows(getattr(self, f"{name}_{qk_dim}"), start, length) for name in ("cos", "sin")) for qk_dim in set(widths)}
        return [tables[qk_dim] for qk_dim in widths]  # type: ignore[misc]

    @torch.no_grad()
    def init_weights(self) -> None:
        """The stock initialization, drawn in the stock order; low-rank layers start as the best copy of what they replace."""
        config = self.config
        bound = math.sqrt(3) / math.sqrt(config.n_embd)
        if config.normalized:
            self._init_scalars_and_embeddings()
            init_normalized(self)
            return
        nn.init.normal_(self.transformer.wte.weight, std=0.8)
        _init(self.lm_head, lambda weight: nn.init.normal_(weight, std=0.001))
        for block in self.transformer.h:
            for projection in (block.attn.c_q, block.attn.c_k, block.attn.c_v):
                _init(projection, lambda weight: nn.init.uniform_(weight, -bound, bound))
            _init_to_zero(block.attn.c_proj)
            _init(block.mlp.c_fc, lambda weight: nn.init.uniform_(weight, -0.4 * bound, 0.4 * bound))
            if block.mlp.c_gate is not None:
                _init(block.mlp.c_gate, lambda weight: nn.init.uniform_(weight, -bound, bound))
            for layer in block.mlp.c_hidden:
                _init(layer, lambda weight: nn.init.uniform_(weight, -math.sqrt(3 / weight.size(1)), math.sqrt(3 / weight.size(1))))
            _init_to_zero(block.mlp.c_proj)
        self._init_scalars_and_embeddings()

    def _cast_embeddings(self) -> None:
        if not self.config.normalized:  # bfloat16 cannot hold vectors to the length of 1
            super()._cast_embeddings()

    def _scalars(self) -> list[torch.Tensor]:
        return super()._scalars() + ([] if self.s_z is None else [self.s_z])

    def _mixes(self) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """Stream and first embedding are one vector before the first layer, and a normalized layer takes only its direction."""
        mixes = super()._mixes()
        if self.config.normalized:
            mixes[0] = (inert(mixes[0][0]), inert(mixes[0][1]))
        return mixes

    def _cap(self, logits: torch.Tensor) -> torch.Tensor:
        return super()._cap(logits if self.s_z is None else logits * self.s_z)

    def head_scale(self, weight: torch.Tensor) -> torch.Tensor:
        return weight if self.s_z is None else weight * self.s_z[:, None]

    def attention_shapes(self) -> list[tuple[int, int, int, int]]:
        return [(layer.n_head, layer.n_kv_head, layer.qk_dim, layer.head_dim) for layer in self.config.layers]

    def head_input(self, x: torch.Tensor) -> tuple[torch.Tensor, nn.Module]:
        return (self.lm_head.V(x), self.lm_head.U) if isinstance(self.lm_head, LowRankLinear) else (x, self.lm_head)

    def cast_for_inference(self) -> None:
        """As for the stock model; low-rank layers that decode faster as one matrix keep that too."""
        for module in self.modules():
            if isinstance(module, LowRankLinear):
                module.merge_if_faster()
        super().cast_for_inference()

    def setup_optimizer(self, *args, **kwargs) -> MuonAdamW:
        """As for the stock model; the weights of normalized layers return to the unit sphere after every step."""
        optimizer = super().setup_optimizer(*args, **kwargs)
        if self.config.normalized:
            normalize = NormalizedWeights(self)
            optimizer.register_step_post_hook(lambda *_: normalize())
        return optimizer

    def _param_groups(self, *args, **kwargs) -> list[dict]:
        return normalized_groups(self, *args, **kwargs) if self.config.normalized else super()._param_groups(*args, **kwargs)


def build_gpt(config: GPTConfig) -> GPT:
    """The model class that a configuration asks for."""
    return LayeredGPT(config) if isinstance(config, LayeredGPTConfig) else GPT(config)


def _init(layer: Any, fill) -> None:
    if isinstance(layer, LowRankLinear):
        layer.init_from_dense(fill(torch.empty(layer.out_features, layer.in_features, device=layer.U.weight.device)))
    else:
        fill(layer.weight)


def _init_to_zero(layer: Any) -> None:
    if isinstance(layer, LowRankLinear):
        _init(layer, lambda weight: nn.init.uniform_(weight, -math.sqrt(3 / weight.size(1)), math.sqrt(3 / weight.size(1))))
        nn.init.zeros_(layer.U.weight)
    else:
        nn.init.zeros_(layer.weight)

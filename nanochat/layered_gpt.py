"""LayeredGPT: a GPT described layer by layer.

The stock GPT derives everything from a few numbers. Here each layer states all that it is in a `LayerSpec`, so that
layers may differ, and inserting or widening one is an edit of a list that changes no other. Embeddings, smear,
residual scalars, backout, loss, counting and optimizer are the stock model's own, and so are the parameter names of
dense layers: `from_gpt` is exact.
"""
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
import torch.nn as nn
import torch.nn.functional as F

from nanochat.gpt import GPT, SMEAR_GATE_CHANNELS, VE_GATE_CHANNELS, CausalSelfAttention, GPTConfig, Linear, norm, rotary_rows, uniform
from nanochat.lowrank import LowRankLinear, linear_or_low_rank
from nanochat.optim import adamw_group

SCALES_LR_SCALE = 0.5  # learning rate of scales, in units of `scalar_lr` and of where they start (tuned for nGPT, dev/LOG.md)
ACTIVATIONS = ("relu2", "gelu", "swiglu")
ORDERS = {"attn-mlp": (("attn",), ("mlp",)), "mlp-attn": (("mlp",), ("attn",)), "parallel": (("attn", "mlp"),)}  # the modules of each step
Scales = dict[str, tuple[float, list[nn.Parameter]]]  # by name where they start, and which they are
Names = dict[str, tuple[str | None, ...]]  # of the axes of each part, see `LayeredGPT.axes`


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

    @property
    def kind(self) -> "type[LayeredBlock]":
        """The class of its block."""
        from nanochat.blocks import BLOCKS  # it imports this file
        return BLOCKS[self.block]

    def check(self, n_embd: int) -> None:
        """Raises ValueError with the reason if there is no such layer in a model of this width."""
        if min(self.n_head, self.n_kv_head, self.head_dim, self.qk_dim, self.mlp_hidden, self.mlp_depth) < 1:
            raise ValueError("heads, head sizes, MLP width and MLP depth must be 1 or more")
        if self.n_head % self.n_kv_head:
            raise ValueError(f"{self.n_head} query heads cannot share {self.n_kv_head} key heads evenly")
        if self.qk_dim % 2:
            raise ValueError(f"queries of width {self.qk_dim} cannot be rotated in pairs; use an even number")
        from nanochat.blocks import BLOCKS  # it imports this file
        for name, value, known in (("block", self.block, BLOCKS), ("activation", self.activation, ACTIVATIONS), ("order", self.order, ORDERS)):
            if value not in known:
                raise ValueError(f"unknown {name} {value!r}: use one of {', '.join(known)}")
        if self.activation != "relu2" and self.mlp_depth > 1:
            raise ValueError(f"an MLP of {self.activation} has one hidden layer; use relu2 for more")
        if self.activation == "gelu" and self.kind.normalized:  # a growth scales units there, and GELU of a multiple is no multiple of GELU
            raise ValueError("normalized layers have no gelu, which could not grow without loss; use relu2 or swiglu")
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
    causal: bool = True  # False: attention sees what comes after, too; such a model does not decode
    loops: int = 1  # times that each layer is run before the next one, with the same weights, scalars and value embedding (MobileLLM-LS, 2402.14905)

    def __post_init__(self):
        # a checkpoint's JSON holds the layers as plain dicts
        self.layers = tuple(layer if isinstance(layer, LayerSpec) else LayerSpec(**layer) for layer in self.layers)
        if self.n_layer != len(self.layers):
            raise ValueError(f"n_layer is {self.n_layer}, but {len(self.layers)} layers are given")
        if not 0 <= self.backout_layer < max(self.n_layer, 1):
            raise ValueError(f"there is no layer {self.backout_layer} to back out")
        if self.loops < 1:
            raise ValueError(f"layers cannot be run {self.loops} times")
        if not 0 <= self.lm_head_rank <= min(self.n_embd, self.vocab_size):
            raise ValueError(f"a head rank of {self.lm_head_rank} exceeds the width of {self.n_embd} or the vocabulary of {self.vocab_size}")
        for index, layer in enumerate(self.layers):
            try:
                layer.check(self.n_embd)
            except ValueError as error:
                raise ValueError(f"layer {index}: {error}") from error
        if len({layer.kind.model() for layer in self.layers}) > 1:
            raise ValueError("pre-norm and normalized layers cannot be mixed: the stream is on the unit sphere for all of them or for none")

    def with_context(self, sequence_len: int) -> "LayeredGPTConfig":
        """For another length; windows that are a stock model's at the old one become those at the new."""
        longer = replace(self, sequence_len=sequence_len)
        windows = {old: longer.windows[letter] for letter, old in self.windows.items()}
        return replace(longer, layers=tuple(replace(layer, window=windows.get(layer.window, layer.window)) for layer in self.layers))

    @property
    def kind(self) -> "type[LayeredBlock]":
        """One of the blocks; in what concerns the whole model they are alike. A model without layers is a pre-norm one."""
        return self.layers[0].kind if self.layers else LayeredBlock

    @property
    def head_dim(self) -> int:
        """The width of a head's values, in the first layer."""
        return self.layers[0].head_dim if self.layers else self.n_embd // self.n_head

    @property
    def normalized(self) -> bool:
        """Are hidden states and weights on the unit sphere?"""
        return self.kind.normalized

    def stock(self, **changes: Any) -> GPTConfig:
        """Its fields that stock models have, with changes."""
        return GPTConfig(**{field.name: getattr(self, field.name) for field in fields(GPTConfig)} | changes)

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

    def axes(self) -> Names:
        return {"c_q": (".query", "stream"), "c_k": (".key", "stream"), "c_v": (".value", "stream"), "c_proj": ("stream", ".attended"),
                "ve_gate": (".value[head]", f"stream[:{VE_GATE_CHANNELS}]")}


class LayeredMLP(nn.Module):
    """ReLU² after each of `mlp_depth` hidden layers of width `mlp_hidden`, or one layer of GELU (1606.08415, exact) or of SwiGLU (Shazeer, 2002.05202)."""

    c_hidden: Any

    def __init__(self, n_embd: int, spec: LayerSpec):
        super().__init__()
        self.gelu = spec.activation == "gelu"
        self.c_fc = linear_or_low_rank(n_embd, spec.mlp_hidden, spec.mlp_rank)
        self.c_gate = linear_or_low_rank(n_embd, spec.mlp_hidden, spec.mlp_rank) if spec.activation == "swiglu" else None
        self.c_hidden = nn.ModuleList(linear_or_low_rank(spec.mlp_hidden, spec.mlp_hidden, spec.mlp_rank) for _ in range(spec.mlp_depth - 1))
        self.c_proj = linear_or_low_rank(spec.mlp_hidden, n_embd, spec.mlp_rank)

    def axes(self) -> Names:
        """Hidden units are another axis before the activation than after it, where they may have another scale."""
        between: Names = {f"c_hidden.{k}": (f".hidden.{k + 1}", f".hidden.{k}.active") for k in range(len(self.c_hidden))}
        return {"c_fc": (".hidden.0", "stream"), "c_gate": (".gate", "stream"), **between, "c_proj": ("stream", f".hidden.{len(self.c_hidden)}.active")}

    def activate(self, x):
        return F.gelu(x) if self.gelu else F.relu(x).square()

    def init_weights(self) -> None:
        self.c_fc.init(uniform(0.4))
        for layer in (self.c_gate, *self.c_hidden):
            if layer is not None:
                layer.init(uniform())
        self.c_proj.init_to_zero()

    def forward(self, x):
        x = self.activate(self.c_fc(x)) if self.c_gate is None else F.silu(self.c_gate(x)) * self.c_fc(x)
        for layer in self.c_hidden:
            x = F.relu(layer(norm(x))).square()  # squares of squares would leave any number format
        return self.c_proj(x)


class LayeredBlock(nn.Module):
    """nanochat's block, and what a kind of block says of itself. Another kind inherits from it (or does all of the same), and is entered in blocks.py.

    Of its parts, `attn` has keys and values that can be cached; all others are its own affair.
    """

    normalized = False  # is what it takes and gives on the unit sphere?
    Attention: type[nn.Module] = LayeredAttention
    MLP: type[nn.Module] = LayeredMLP

    def __init__(self, n_embd: int, spec: LayerSpec, layer_idx: int):
        super().__init__()
        self.attn: Any = self.Attention(n_embd, spec, layer_idx)
        self.mlp: Any = self.MLP(n_embd, spec)
        self.order = spec.order

    @classmethod
    def model(cls) -> "type[LayeredGPT]":
        """What such blocks are the layers of."""
        return LayeredGPT

    def init_weights(self) -> None:
        """The block passes the stream on as it is: what writes to it starts at zero. The value-embedding gate is drawn later, with all others."""
        self.attn.init_weights()
        self.mlp.init_weights()

    def init_as_identity(self) -> None:
        """For a layer that is new in a trained model, after `init_weights`."""

    def axes(self) -> Names:
        """The axes of its parts, by name (`LayeredGPT.axes`). Those that begin with a dot are the layer's own."""
        return {f"{name}.{part}": axes for name in ("attn", "mlp") for part, axes in getattr(self, name).axes().items()}

    def scales(self) -> Scales:
        """What AdamW trains: numbers that multiply single entries. Those of one name, of all blocks, are one group."""
        return {}

    def matrices(self) -> list[nn.Parameter]:
        """What the matrices' optimizer trains: all the rest."""
        scales = {p for _, params in self.scales().values() for p in params}
        return [p for p in self.parameters() if p not in scales]

    def forward(self, x, *attention):
        """x (B, T, C) -> (B, T, C); the other arguments are those of the attention, after its first."""
        for modules in ORDERS[self.order]:
            u = norm(x)
            for name in modules:
                x = x + (self.attn(u, *attention) if name == "attn" else self.mlp(u))
        return x


class LayeredGPT(GPT):
    """Built like the stock model: by `build_gpt` under the meta device, then `to_empty` and `init_weights`."""

    config: LayeredGPTConfig

    def __init__(self, config: LayeredGPTConfig, pad_vocab_size_to: int = 64):
        super().__init__(config, pad_vocab_size_to)
        self.backout_layer = config.backout_layer

    def make_block(self, layer_idx: int) -> nn.Module:
        spec = self.config.layers[layer_idx]
        return spec.kind(self.config.n_embd, spec, layer_idx)

    def make_head(self, padded_vocab: int) -> nn.Module:
        return linear_or_low_rank(self.config.n_embd, padded_vocab, self.config.lm_head_rank)

    def make_window_sizes(self) -> list[tuple[int, int]]:
        return [(layer.window, 0 if self.config.causal else layer.window) for layer in self.config.layers]

    def make_rotary(self) -> dict[str, torch.Tensor]:
        """They depend on the width of a head, so there is one pair for each width."""
        return {f"{name}_{qk_dim}": table for qk_dim in set(self._rotated())
                for name, table in zip(("cos", "sin"), self._precompute_rotary_embeddings(self.rotary_seq_len, qk_dim))}

    @classmethod
    def from_gpt(cls, gpt: GPT) -> "LayeredGPT":
        """The same model, layer by layer: equal parameters under equal names, equal logits."""
        with torch.device("meta"):
            model = cls(LayeredGPTConfig.from_gpt(gpt), pad_vocab_size_to=gpt.lm_head.weight.size(0))
        model.to_empty(device=gpt.get_device())
        model.init_buffers()
        model.load_state_dict(gpt.state_dict(), strict=True)
        return model

    @property
    def cos(self) -> torch.Tensor:  # type: ignore[override]
        return getattr(self, f"cos_{self._rotated()[0]}")

    def _rotated(self) -> list[int]:
        """The width of each layer's queries; without layers, that of a stock model's."""
        return [layer.qk_dim for layer in self.config.layers] or [self.config.n_embd // self.config.n_head]

    def cos_sin(self, start: int | torch.Tensor, length: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
        widths = [layer.qk_dim for layer in self.config.layers]
        tables = {qk_dim: tuple(rotary_rows(getattr(self, f"{name}_{qk_dim}"), start, length) for name in ("cos", "sin")) for qk_dim in set(widths)}
        return [tables[qk_dim] for qk_dim in widths]  # type: ignore[misc]

    def axes(self) -> Names:
        """Along which spaces of the network the dimensions of its parts run, by name: what growth needs to know (growth/axes.py).

        Of a matrix the axis that it writes and the one that it reads (None if that never grows), of an embedding the one that it writes, of other
        parameters those of their dimensions. A part that a layer may have and has not may be named all the same.
        """
        axes: Names = {"transformer.wte": ("stream",), "lm_head": ("logits", "stream"), "resid_lambdas": ("depth",), "x0_lambdas": ("depth",),
                       "smear_gate": (None, f"stream[:{SMEAR_GATE_CHANNELS}]"), "smear_lambda": (), "backout_lambda": ()}
        for i, block in enumerate(self.transformer.h):
            for part, names in block.axes().items():
                axes[f"transformer.h.{i}.{part}"] = tuple(f"{i}{name}" if name and name.startswith(".") else name for name in names)
        return axes | {f"value_embeds.{i}": (f"{i}.value",) for i in self.value_embeds}

    def head_input(self, x: torch.Tensor) -> tuple[torch.Tensor, nn.Module]:
        return (self.lm_head.V(x), self.lm_head.U) if isinstance(self.lm_head, LowRankLinear) else (x, self.lm_head)

    def cast_for_inference(self) -> None:
        """As for the stock model; low-rank layers that decode faster as one matrix keep that too."""
        for module in self.modules():
            if isinstance(module, LowRankLinear):
                module.merge_if_faster()
        super().cast_for_inference()

    def _param_groups(self, unembedding_lr, embedding_lr, matrix_lr, weight_decay, scalar_lr, matrix_optimizer) -> list[dict]:
        stock = super()._param_groups(unembedding_lr, embedding_lr, matrix_lr, weight_decay, scalar_lr, matrix_optimizer)
        return stock + self._scale_groups(scalar_lr)

    def _scale_groups(self, scalar_lr: float) -> list[dict]:
        """They move by a share of where they start."""
        groups: Scales = {}
        for block in self.transformer.h:
            for name, (start, scales) in block.scales().items():
                groups.setdefault(name, (start, []))[1].extend(scales)
        return [adamw_group(scales, start * scalar_lr * SCALES_LR_SCALE, (0.9, 0.95), 0.0) for start, scales in groups.values()]


def config_from(model_config: dict) -> GPTConfig:
    """Of a checkpoint's or a log's `model_config`. Raises TypeError or ValueError if it is none of ours."""
    for name, least in (("sequence_len", 1), ("vocab_size", 1), ("n_layer", 0), ("n_head", 1), ("n_kv_head", 1), ("n_embd", 1)):
        if name in model_config and not (type(model_config[name]) is int and model_config[name] >= least):
            raise ValueError(f"{name} is {model_config[name]!r}")
    return LayeredGPTConfig(**model_config) if "layers" in model_config else GPTConfig(**model_config)


def build_gpt(config: GPTConfig, pad_vocab_size_to: int = 64) -> GPT:
    """The model that a configuration asks for."""
    return config.kind.model()(config, pad_vocab_size_to) if isinstance(config, LayeredGPTConfig) else GPT(config, pad_vocab_size_to)


def empty_gpt(config: GPTConfig, pad_vocab_size_to: int = 64) -> GPT:
    """The same on the meta device: shapes without memory, until `to_empty(device=...)` and `init_weights()`, or `init_buffers()` and weights from elsewhere."""
    with torch.device("meta"):
        return build_gpt(config, pad_vocab_size_to)

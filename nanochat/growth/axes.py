"""The axes of every parameter: along which spaces of the network its dimensions run, and whether it writes or reads there.

This is all that growth knows about layers. A weight (out, in) writes the axis of its rows and reads that of its columns; a
kind of layer that names its axes here can grow.

| axis | entries |
|---|---|
| `stream` | channels of the residual stream |
| `depth` | layers |
| `3.query`, `3.key`, `3.value` | head by head, what c_q, c_k, c_v of layer 3 write |
| `3.mixed` | head by head, what c_proj of the attention reads |
| `3.hidden.0` | hidden units of the MLP as c_fc writes them, before the activation |
| `3.hidden.0.active` | the same units as the next matrix reads them, after it |
| `3.gate` | the gate branch of SwiGLU |
| `3.attn.c_q.rank` | between the factors U and V of a low-rank matrix |
| `logits` | rows of the head |

A name in brackets is a part or a view of an axis: `stream[:12]` the channels that a gate reads, `3.query[head]` one entry per
head, `3.hidden.0[scale]` a factor per entry.
"""
from typing import NamedTuple

from nanochat.gpt import SMEAR_GATE_CHANNELS, VE_GATE_CHANNELS
from nanochat.layered_gpt import LayeredGPTConfig, LayerSpec


class Write(NamedTuple):
    axis: str


class Read(NamedTuple):
    axis: str


Axes = tuple[Write | Read | None, ...]  # of the leading dimensions; None for one that no growth touches


def layer_matrices(spec: LayerSpec) -> dict[str, tuple[str, str, int]]:
    """The matrices of one layer: (axis written, axis read, rank); axes of the layer itself begin with a dot."""
    last = spec.mlp_depth - 1
    matrices = {
        "attn.c_q": (".query", "stream", spec.attn_rank),
        "attn.c_k": (".key", "stream", spec.attn_rank),
        "attn.c_v": (".value", "stream", spec.attn_rank),
        "attn.c_proj": ("stream", ".mixed", spec.attn_rank),
        "mlp.c_fc": (".hidden.0", "stream", spec.mlp_rank),
        "mlp.c_proj": ("stream", f".hidden.{last}.active", spec.mlp_rank),
    }
    for k in range(last):
        matrices[f"mlp.c_hidden.{k}"] = (f".hidden.{k + 1}", f".hidden.{k}.active", spec.mlp_rank)
    if spec.activation == "swiglu":
        matrices["mlp.c_gate"] = (".gate", "stream", spec.mlp_rank)
    return matrices


def layer_vectors(spec: LayerSpec) -> dict[str, str]:
    """The scales and step sizes of one layer, which multiply the entries of an axis."""
    if spec.block != "ngpt":
        return {}
    vectors = {"attn.s_qk": ".query[head]", "attn.s_head": ".mixed[scale]", "mlp.s_u": ".hidden.0[scale]",
               "alpha_attn": "stream[scale]", "alpha_mlp": "stream[scale]"}
    for k in range(spec.mlp_depth - 1):
        vectors[f"mlp.s_hidden.{k}"] = f".hidden.{k + 1}[scale]"
    if spec.activation == "swiglu":
        vectors["mlp.s_v"] = ".gate[scale]"
    return vectors


def factors(name: str, written: str, read: str, rank: int, layer: str = "") -> dict[str, Axes]:
    """The parameters of one matrix: a weight, or the factors U and V with an axis of their own between them."""
    written, read = (layer + axis if axis.startswith(".") else axis for axis in (written, read))
    if not rank:
        return {f"{name}.weight": (Write(written), Read(read))}
    between = f"{name.removeprefix('transformer.h.')}.rank"
    return {f"{name}.U.weight": (Write(written), Read(between)), f"{name}.V.weight": (Write(between), Read(read))}


def parameter_axes(config: LayeredGPTConfig) -> dict[str, Axes]:
    """The axes of each parameter of a model, by name."""
    axes: dict[str, Axes] = {
        "transformer.wte.weight": (None, Write("stream")),
        "resid_lambdas": (Write("depth"),),
        "x0_lambdas": (Write("depth"),),
        "smear_gate.weight": (None, Read(f"stream[:{SMEAR_GATE_CHANNELS}]")),
        "smear_lambda": (),
        "backout_lambda": (),
        **factors("lm_head", "logits", "stream", config.lm_head_rank),
    }
    if config.normalized:
        axes["s_z"] = (Write("logits[scale]"),)
    for i, spec in enumerate(config.layers):
        block = f"transformer.h.{i}"
        for name, matrix in layer_matrices(spec).items():
            axes |= factors(f"{block}.{name}", *matrix, layer=str(i))
        for name, axis in layer_vectors(spec).items():
            axes[f"{block}.{name}"] = (Write(f"{i}{axis}" if axis.startswith(".") else axis),)
        if spec.value_embed:
            axes[f"{block}.attn.ve_gate.weight"] = (Write(f"{i}.value[head]"), Read(f"stream[:{VE_GATE_CHANNELS}]"))
            axes[f"value_embeds.{i}.weight"] = (None, Write(f"{i}.value"))
    return axes

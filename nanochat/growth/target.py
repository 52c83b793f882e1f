"""What a model grows into: its configuration, and which layer of it continues which.

Ways to deepen n layers to n' (`layers[t]` is the layer that layer t continues, None for a new one):

| mode | layers of 3 -> 6 | | preserves |
|---|---|---|---|
| `identity` | 0 - 1 - 2 - | new layers, spread evenly, that pass the stream on as it is | the function |
| `append` | 0 1 2 - - - | the same, all on top | the function |
| `fresh` | 0 - 1 - 2 - | new layers as those of a new model are: they write nothing yet, but mix stream and first embedding as theirs do | each old layer |
| `random` | 0 - 1 - 2 - | new layers of random matrices, those that a new model has at 0 too; the stream enters them as it is (2511.04981) | each old layer |
| `stack` | 0 1 2 0 1 2 | copies of the whole stack (G_stack, 2405.15319) | each old layer and its first neighbours |
| `interleave` | 0 0 1 1 2 2 | copies of each layer | each old layer and the order |

With masks that open (added.py) a new layer's outputs start at 0, so that `random` too begins as the function that was there. On the sphere (nGPT)
the layers of a new model write at once.

A layer keeps its window and its value embedding, and the backout layer stays the one it was, wherever they come to stand. A new layer has
the shape of the one below it. A model without layers gets those of a stock model, and its function stays too: what they pass on is the stream.
"""
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from nanochat.cli import UsageError
from nanochat.gpt import GPT, GPTConfig
from nanochat.layered_gpt import LayeredGPTConfig, LayerSpec

GROWING = ("n_head", "n_kv_head", "mlp_hidden")  # of a layer; ranks grow too, or to 0 (dense)
FIXED = ("head_dim", "qk_dim", "mlp_depth", "block", "activation", "order", "window", "value_embed")


@dataclass(frozen=True)
class DepthMode:
    """A new one is a line in `DEPTH_MODES`."""

    layers: Callable[[int, int], list[int | None]]  # (old, new): for each of `new` layers the one of `old` >= 1 that it continues, or None; all are continued
    begin: str = "identity"  # how a layer begins that continues none, "identity", "fresh" or "random"
    copies: bool = False  # does it make new layers of old ones?


def evenly(old: int, new: int) -> list[int | None]:
    return [None if t and t * old // new == (t - 1) * old // new else t * old // new for t in range(new)]


DEPTH_MODES: dict[str, DepthMode] = {
    "identity": DepthMode(evenly),
    "append": DepthMode(lambda old, new: [*range(old), *[None] * (new - old)]),
    "fresh": DepthMode(evenly, begin="fresh"),
    "random": DepthMode(evenly, begin="random"),
    "stack": DepthMode(lambda old, new: [t % old for t in range(new)], copies=True),
    "interleave": DepthMode(lambda old, new: [t * old // new for t in range(new)], copies=True),
}


def deepening(name: str) -> DepthMode:
    """The mode of that name. Raises UsageError."""
    if name not in DEPTH_MODES:
        raise UsageError(f"unknown depth mode {name!r}: use one of {', '.join(DEPTH_MODES)}")
    return DEPTH_MODES[name]


def continued_layers(old: int, new: int, mode: str = "identity") -> list[int | None]:
    """For each of `new` layers the one that it continues, or None. Raises UsageError."""
    way = deepening(mode)
    if new < old:
        raise UsageError(f"{old} layers cannot become {new}: a model only grows")
    if not old and new and way.copies:
        raise UsageError(f"there is no layer that {mode} could copy; use the depth mode identity, fresh or random to grow from 0 layers")
    return way.layers(old, new) if old else [None] * new


def layered_config(config: GPTConfig) -> LayeredGPTConfig:
    """The configuration layer by layer, for the stock model too."""
    if isinstance(config, LayeredGPTConfig):
        return config
    with torch.device("meta"):
        return LayeredGPTConfig.from_gpt(GPT(config))


def grown_config(config: GPTConfig, n_layer: int | None = None, n_embd: int | None = None, layers: Sequence[int | None] | None = None,
                 depth_mode: str = "identity", **changes: int) -> LayeredGPTConfig:
    """The configuration of a model grown from `config` to this depth and width.

    Heads (of the old size) and hidden units grow in proportion to the width, and are rounded up. `changes` may set n_head, n_kv_head,
    mlp_hidden, attn_rank, mlp_rank of all layers, and lm_head_rank. Raises UsageError.
    """
    source = layered_config(config)
    n_layer, n_embd = source.n_layer if n_layer is None else n_layer, n_embd or source.n_embd
    if layers is None:
        layers = continued_layers(source.n_layer, n_layer, depth_mode)
    lm_head_rank = changes.pop("lm_head_rank", source.lm_head_rank)
    if not source.layers:
        return first_layers(source, n_layer, n_embd, lm_head_rank, changes)

    def grown(spec: LayerSpec) -> LayerSpec:
        up = lambda n: -(-n * n_embd // source.n_embd)
        n_kv_head = up(spec.n_kv_head)
        wider = dict(n_head=n_kv_head * (spec.n_head // spec.n_kv_head), n_kv_head=n_kv_head, mlp_hidden=up(spec.mlp_hidden))
        return replace(spec, **(wider | changes))

    shapes, below = [], 0  # a new layer has the shape of the layer below
    for layer in layers:
        below = below if layer is None else layer
        shapes.append(grown(source.layers[below]))
    try:
        return replace(source, n_layer=n_layer, n_embd=n_embd, n_head=shapes[0].n_head, n_kv_head=shapes[0].n_kv_head, layers=tuple(shapes),
                       backout_layer=list(layers).index(source.backout_layer), lm_head_rank=lm_head_rank)
    except (ValueError, TypeError) as error:
        raise UsageError(f"there is no such model to grow into: {error}") from error


def first_layers(source: LayeredGPTConfig, n_layer: int, n_embd: int, lm_head_rank: int, changes: dict[str, Any]) -> LayeredGPTConfig:
    """What a model without layers grows into: heads of its own size, all else as in a stock model."""
    n_head, n_kv_head = (-(-n * n_embd // source.n_embd) for n in (source.n_head, source.n_kv_head))
    stock = source.stock(n_layer=n_layer, n_embd=n_embd, n_head=n_head, n_kv_head=n_kv_head)
    try:
        target = layered_config(stock)
        layers = tuple(replace(layer, **changes) for layer in target.layers)
        first = layers[0] if layers else target
        return replace(target, layers=layers, n_head=first.n_head, n_kv_head=first.n_kv_head, lm_head_rank=lm_head_rank, causal=source.causal, loops=source.loops)
    except (ValueError, TypeError, AssertionError) as error:
        raise UsageError(f"there is no such model to grow into: {error}") from error


def layered_target(source: LayeredGPTConfig, target: GPTConfig, layers: Sequence[int | None]) -> LayeredGPTConfig:
    """The target layer by layer, checked. Raises UsageError with the reason why `source` cannot become it."""
    if not isinstance(target, LayeredGPTConfig):
        head_dim = source.head_dim
        if target.n_head * head_dim != target.n_embd:
            raise UsageError(f"a width of {target.n_embd} with {target.n_head} heads is not made of heads of {head_dim}, the size that growth keeps; "
                             f"use a multiple of {head_dim}")
        for name in ("vocab_size", "sequence_len", "window_pattern"):
            check_kept(name, getattr(source, name), getattr(target, name))
        target = grown_config(source, target.n_layer, target.n_embd, layers, n_head=target.n_head, n_kv_head=target.n_kv_head)
    check_growth(source, target, layers)
    return target


def stock_config(config: LayeredGPTConfig) -> GPTConfig:
    """The stock configuration of the same model, or `config` itself if it is no stock model."""
    stock = config.stock()
    try:
        return stock if layered_config(stock) == config else config
    except AssertionError:  # widths that are no multiple of the head count
        return config


def check_growth(source: LayeredGPTConfig, target: LayeredGPTConfig, layers: Sequence[int | None]) -> None:
    """Raises UsageError with the reason why `source` cannot become `target`."""
    for name in ("vocab_size", "sequence_len", "causal", "loops"):
        check_kept(name, getattr(source, name), getattr(target, name))
    if target.n_embd < source.n_embd:
        raise UsageError(f"a width of {source.n_embd} cannot become {target.n_embd}: a model only grows")
    missing = set(range(source.n_layer)) - set(layers)
    if len(layers) != target.n_layer or missing:
        raise UsageError(f"{source.n_layer} layers cannot become {target.n_layer}: a model only grows" if len(layers) != target.n_layer
                         else f"layer {min(missing)} is continued by no layer of the target")
    check_rank("the head", source.lm_head_rank, target.lm_head_rank)
    if source.layers and layers[target.backout_layer] != source.backout_layer:
        raise UsageError(f"the backout layer {target.backout_layer} of the target does not continue layer {source.backout_layer}, that of the model")
    for t, layer in enumerate(layers):
        if layer is None:
            continue
        old, new = source.layers[layer], target.layers[t]
        for name in FIXED:
            if getattr(old, name) != getattr(new, name):
                raise UsageError(f"layer {t} of the target continues layer {layer} with another {name}: {getattr(old, name)} -> {getattr(new, name)}")
        for name in GROWING:
            if getattr(new, name) < getattr(old, name):
                raise UsageError(f"layer {t} of the target has a smaller {name} than layer {layer}, which it continues: "
                                 f"{getattr(old, name)} -> {getattr(new, name)}")
        check_rank(f"the attention of layer {t}", old.attn_rank, new.attn_rank)
        check_rank(f"the MLP of layer {t}", old.mlp_rank, new.mlp_rank)


def check_kept(name: str, old, new) -> None:
    if old != new:
        raise UsageError(f"growth keeps {name}: the model has {old}, the target {new}")


def check_rank(where: str, old: int, new: int) -> None:
    if new and new < (old or new + 1):
        raise UsageError(f"the rank of {where} cannot go from {old or 'dense'} to {new}: a model only grows")

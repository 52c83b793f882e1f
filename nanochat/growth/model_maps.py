"""The maps of all axes between a model and the one that it grows into.

How the conditions meet in a layer. Let (a, b) be the map of what the next matrix reads.

* ReLU² is homogeneous of degree 2: units that are to be `a` times as large are written sqrt(a) times as large.
* Queries and keys are divided by their lengths, so a factor common to a head does nothing.
* On the sphere a reader's rows keep the length 1, so noise of relative length rho leaves cos(phi) = 1 / sqrt(1 + rho²) for the copy.
  Whatever multiplies that matrix's outputs takes the rest: s_u, s_v, s_hidden, s_head, s_z. A writer's columns keep the length 1
  too, so the unequal shares of heads and units are in the same scales.
"""
import re
from dataclasses import replace

import torch

from nanochat.growth.axes import ModelAxes
from nanochat.growth.maps import Map, head_index, identity, tile
from nanochat.growth.modes import Mode
from nanochat.layered_gpt import LayeredGPTConfig, LayerSpec


def model_maps(mode: Mode, source: LayeredGPTConfig, target: LayeredGPTConfig, layers: list[int | None], padded_vocab: int) -> dict[str, Map]:
    """The map of each axis of `target`, by name. `layers` says which layer of `source` each layer continues."""
    sphere, old, new = source.normalized, ModelAxes(source), ModelAxes(target)
    stream = mode.stream(source.n_embd, target.n_embd, 1.0 if sphere else target.n_embd / source.n_embd)
    head_rank = source.lm_head_rank if target.lm_head_rank else 0  # factors that are multiplied out grow as their product
    logits = identity(padded_vocab).times(copied_share(stream, head_rank, sphere))
    maps = {
        "stream": stream, "stream[scale]": stream.before_scale().of_scale(),
        "depth": depth_map(source.n_layer, layers),
        "logits": logits, "logits[scale]": identity(padded_vocab).of_scale(1 / logits.write),
    }
    for i, layer in enumerate(layers):
        if layer is not None:
            maps |= {f"{i}.{name}": map for name, map in layer_maps(mode, source.layers[layer], target.layers[i], stream, sphere).items()}

    readers = {read: between for between, (_, read) in new.factors.items()}
    for axis, size in new.sizes.items():
        if axis in maps or axis in new.factors or (name := continued_axis(axis, layers)) is None:
            continue
        if part := re.fullmatch(r"stream\[:(\d+)\]", axis):
            maps[axis] = stream.part(int(part[1]))
        else:  # one that only this kind of layer has
            rank = old.sizes.get(continued_axis(readers[axis], layers) or "", 0) if axis in readers else 0
            maps[axis] = free_map(mode, tile(old.sizes[name], size), old.sizes[name], rank, sphere)
    for axis, (written, read) in new.factors.items():
        if name := continued_axis(axis, layers):
            maps[axis] = rank_map(mode, old.sizes[name], new.sizes[axis], written, maps[read], sphere)
    return maps


def continued_axis(axis: str, layers: list[int | None]) -> str | None:
    """The name in the source of the axis that this one of the target continues, None in a new layer."""
    number, _, name = axis.partition(".")
    if not number.isdecimal():
        return axis
    layer = layers[int(number)]
    return None if layer is None else f"{layer}.{name}"


def layer_maps(mode: Mode, source: LayerSpec, target: LayerSpec, stream: Map, sphere: bool) -> dict[str, Map]:
    """The maps of one layer's own axes, by name without the layer."""
    ranks = {"attn": source.attn_rank if target.attn_rank else 0, "mlp": source.mlp_rank if target.mlp_rank else 0}
    heads, kv_heads = head_index((source.n_head, source.n_kv_head), (target.n_head, target.n_kv_head))
    attended = free_map(mode, heads, source.n_head, ranks["attn"], sphere)
    query = attended.before_scale()
    kv = key_map(query, kv_heads, source)
    cos = copied_share(stream, ranks["attn"], sphere)
    maps = {
        "query": query.times(cos).repeat(source.qk_dim), "query[head]": query.of_scale(),
        "key": kv.times(cos).repeat(source.qk_dim),
        "value": kv.times(cos).repeat(source.head_dim), "value[head]": kv,
        "attended": attended.repeat(source.head_dim), "attended[scale]": attended.of_scale(1 / cos),
    }
    read = stream  # by the next matrix of the MLP
    for k in range(source.mlp_depth):
        cos = copied_share(read, ranks["mlp"], sphere)
        if k == source.mlp_depth - 1:
            active = free_map(mode, tile(source.mlp_hidden, target.mlp_hidden), source.mlp_hidden, ranks["mlp"], sphere)
        else:
            active = mode.hidden(source.mlp_hidden, target.mlp_hidden, 1.0 if sphere else target.mlp_hidden / source.mlp_hidden)
        # a unit that is written k times as large is k² times as large behind ReLU², k times behind SwiGLU; GELU's are copied as they are (write is 1 or 0)
        before = active.times(1 / nonzero(active.write).sqrt()) if source.activation == "relu2" else active
        maps |= {f"hidden.{k}": before.before_scale().times(cos) if sphere else before, f"hidden.{k}[scale]": before.of_scale(1 / cos),
                 f"hidden.{k}.active": active}
        if source.activation == "swiglu":
            maps |= {"gate": active.before_scale().times(cos), "gate[scale]": active.before_scale().of_scale(1 / cos)}
        read = active
    return maps


def copied_share(read: Map, rank: int, sphere: bool) -> float:
    """cos(phi), the share of the length 1 that noise leaves to the copied weights of a reader on the sphere."""
    quiet = not sphere or (rank and not read.has_room(rank))
    return 1.0 if quiet else 1 / (1 + read.row_noise ** 2) ** 0.5


def free_map(mode: Mode, index: torch.Tensor, old: int, rank: int, sphere: bool) -> Map:
    map = mode.free(index, old, sphere)
    if rank == 1:  # one dimension between the factors leaves no direction for noise
        map = replace(map, column_noise=None)
    return map.on_sphere() if sphere else map


def key_map(query: Map, index: torch.Tensor, spec: LayerSpec) -> Map:
    """Keys and values are copied; their gradients come from the queries that they serve, in these queries' shares.

    Exact for gradients if the queries of one copy of a key head all have the same share, else their mean.
    """
    share = query.read.view(len(index), -1).sum(dim=1) / (spec.n_head // spec.n_kv_head)
    return Map(spec.n_kv_head, index, (share > 0).double(), share, random_side=query.random_side)


def rank_map(mode: Mode, old: int, new: int, writes: str, read: Map, sphere: bool) -> Map:
    """Between the factors of a matrix that writes and reads these axes. V is random and U zero at fresh ranks; but on the sphere the
    factor that faces the stream cannot be zero, and in a matrix that writes the stream that is U."""
    map = mode.rank(old, new)
    if not sphere:
        return map
    return replace(map.on_sphere(), random_side="readers") if writes == "stream" else map.times(copied_share(read, old, sphere))


def depth_map(old: int, layers: list[int | None]) -> Map:
    """Of layers: the old one that each continues, None for a new one, which is fresh."""
    continued = torch.tensor([layer is not None for layer in layers]).double()
    return Map(old, torch.tensor([layer or 0 for layer in layers]), continued, continued)


def nonzero(x: torch.Tensor) -> torch.Tensor:
    return torch.where(x == 0, 1.0, x)

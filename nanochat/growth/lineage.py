"""Where each parameter of a grown model comes from: the one that it continues, the maps of its dimensions, and what of it is new."""
import re

import torch

from nanochat.growth.axes import ModelAxes, Write
from nanochat.growth.maps import Map, Maps, along, mapped
from nanochat.growth.model_maps import model_maps
from nanochat.growth.modes import Mode
from nanochat.layered_gpt import LayeredGPTConfig


class Lineage:
    """Of the parameters of `target`, by name. It follows from the configurations alone, so that a resumed run finds it again.

    layers: for each layer of `target` the one of `source` that it continues, or None.
    origin: the name in the small model of what a parameter continues, None in a new layer.
    depth: the map of the axis of layers.
    """

    def __init__(self, mode: Mode, source: LayeredGPTConfig, target: LayeredGPTConfig, layers: list[int | None], padded_vocab: int):
        self._maps = model_maps(mode, source, target, layers, padded_vocab)
        self._axes = ModelAxes(target).parameters
        self.origin = {name: continued_parameter(name, layers) for name in self._axes}
        self.depth: Map = self._maps["depth"]

    def maps_of(self, name: str) -> Maps:
        """Of a parameter that continues one, those of its leading dimensions."""
        return [axis and (self._maps[axis.axis], isinstance(axis, Write)) for axis in self._axes[name]]

    def is_added(self, name: str) -> bool:
        """Is all of it in a layer that is new, or a further copy of one?"""
        layer = layer_of(name)
        return layer is not None and bool(self.depth.added[layer])

    def added(self, name: str, shape: torch.Size) -> torch.Tensor:
        """Which entries of a parameter (of that shape, bool) are not those that the small model had, but fresh or further copies."""
        if self.is_added(name):
            return torch.ones(shape, dtype=torch.bool)
        return either(shape, [(dim, map.added) for dim, map, _ in mapped(self.maps_of(name))])

    def masked(self, name: str, shape: torch.Size) -> torch.Tensor:
        """Which entries (bool) must be 0 so that nothing old sees anything fresh: on the side of a fresh entry that is not the `random_side` of its map, and
        the matrices by which new layers write the stream. Further copies are none of it."""
        if self.origin[name] is None:
            first = self._axes[name][0]
            return torch.full(shape, isinstance(first, Write) and first.axis == "stream" and len(shape) == 2)
        return either(shape, [(dim, map.fresh) for dim, map, writes in mapped(self.maps_of(name)) if map.random_side == ("readers" if writes else "writers")])


def either(shape: torch.Size, lines: list[tuple[int, torch.Tensor]]) -> torch.Tensor:
    """The entries of a tensor that are in one of the lines, given as (dimension, bool along it)."""
    mask = torch.zeros(shape, dtype=torch.bool)
    for dim, line in lines:
        mask |= along(line, dim, mask)
    return mask


def layer_of(name: str) -> int | None:
    """The layer that a parameter of this name belongs to."""
    match = re.match(r"(?:transformer\.h|value_embeds)\.(\d+)\.", name)
    return int(match[1]) if match else None


def in_layer(name: str, layer: int) -> str:
    """The name of the same parameter in another layer."""
    return re.sub(r"^(transformer\.h|value_embeds)\.\d+\.", rf"\g<1>.{layer}.", name)


def continued_parameter(name: str, layers: list[int | None]) -> str | None:
    """The name in the model of what this parameter of the grown one continues, None in a new layer."""
    if (layer := layer_of(name)) is None:
        return name
    continued = layers[layer]
    return None if continued is None else in_layer(name, continued)

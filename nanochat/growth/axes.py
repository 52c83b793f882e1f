"""The axes of every parameter: along which spaces of the network its dimensions run, and whether it writes or reads there.

This is all that growth knows about layers, and the layers say it themselves: here it is only collected. A weight (out, in) writes the axis
of its rows and reads that of its columns.

| axis | entries |
|---|---|
| `stream` | channels of the residual stream |
| `depth` | layers |
| `3.query`, `3.key`, `3.value` | head by head, what c_q, c_k, c_v of layer 3 write |
| `3.attended` | head by head, what c_proj of the attention reads |
| `3.hidden.0` | hidden units of the MLP as c_fc writes them, before the activation |
| `3.hidden.0.active` | the same units as the next matrix reads them, after it |
| `3.gate` | the gate branch of SwiGLU |
| `3.attn.c_q.rank` | between the factors U and V of a low-rank matrix |
| `logits` | rows of the head |
| any other of a layer, `3.name` | entries between which the function acts one by one, as hidden units do |

A name in brackets is a part or a view of an axis: `stream[:12]` the channels that a gate reads, `3.query[head]` one entry per
head, `3.hidden.0[scale]` a factor per entry.
"""
from operator import attrgetter
from typing import Any, NamedTuple

from torch import nn

from nanochat.layered_gpt import LayeredGPTConfig, empty_gpt
from nanochat.lowrank import LowRankLinear


class Write(NamedTuple):
    axis: str


class Read(NamedTuple):
    axis: str


Axes = tuple[Write | Read | None, ...]  # of the leading dimensions; None for one that no growth touches


class ModelAxes:
    """Of a model of this configuration.

    parameters: the axes of each parameter, by its name.
    sizes: how many entries each axis has.
    factors: of each axis between two factors, which one their product writes and which one it reads.
    """

    def __init__(self, config: LayeredGPTConfig):
        model: Any = empty_gpt(config)
        self.parameters: dict[str, Axes] = {}
        self.factors: dict[str, tuple[str, str]] = {}
        for name, axes in model.axes().items():
            if (part := attrgetter(name)(model)) is not None:
                self._add(name, part, *axes)
        self.sizes = {axis.axis: size for name, axes in self.parameters.items() for axis, size in zip(axes, model.get_parameter(name).shape) if axis}

    def _add(self, name: str, part: nn.Parameter | nn.Module, *axes: str | None) -> None:
        if isinstance(part, nn.Parameter):
            self.parameters[name] = tuple(Write(axis) for axis in axes if axis)
        elif isinstance(part, nn.Embedding):
            self.parameters[f"{name}.weight"] = (None, Write(str(axes[0])))
        elif isinstance(part, LowRankLinear):
            written, read = (str(axis) for axis in axes)
            between = f"{name.removeprefix('transformer.h.')}.rank"
            self.factors[between] = (written, read)
            self._add(f"{name}.U", part.U, written, between)
            self._add(f"{name}.V", part.V, between, read)
        else:
            self.parameters[f"{name}.weight"] = (Write(axes[0]) if axes[0] else None, Read(str(axes[1])))

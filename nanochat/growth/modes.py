"""Ways to widen: which maps the axes get, and what fills the places where nothing is copied to.

| mode | preserves |
|---|---|
| `Lossless` | the function, at any ratio, exactly |
| `Clones` | the function; whole multiples only, all copies equal: HyperCloning (2409.12903) |
| `Sparkling` | the function; all copies equal, at any ratio: 2602.02472 |
| `Masked` | each old weight up to a factor; with its masks closed the function: MSG (2305.02869) |
| `Bus` | each old weight up to a factor; the function only at integer ratios |
| `Identity` | each old weight; the function only up to lengths: zeros in the new channels lower the RMS of the stream |
| `Random` | each old weight, nothing else |

On the sphere (nGPT) the last three and `Masked` keep the old weights up to the lengths of rows and columns, which are 1 again after each growth.
"""
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, Protocol

import torch

from nanochat.cli import UsageError
from nanochat.growth.maps import Map, Maps, along, angles, mapped, shared, tile


class Mode(Protocol):
    """What a mode answers. A new one is a class, and a line in `MODES`."""

    keeps_sphere: ClassVar[bool]  # do grown weights of a normalized model have the length 1 by themselves?

    def stream(self, old: int, new: int, total: float) -> Map:
        """From `old` to `new` channels of the stream. To keep its RMS (or, on the sphere, its length) write² must add up to `total` over the
        copies of each. Gates read the first channels: these continue themselves, index[j] = j for j < old. May raise UsageError, as all of these."""

    def hidden(self, old: int, new: int, total: float) -> Map:
        """The same for hidden units of an MLP that are normalized before the next matrix reads them."""

    def free(self, index: torch.Tensor, old: int, sphere: bool) -> Map:
        """Heads or hidden units, of which the function acts on each by itself: entry j continues entry index[j] of `old`. On the sphere no
        column may be zero."""

    def rank(self, old: int, new: int) -> Map:
        """Between the factors of a low-rank matrix."""

    def fill(self, weight: torch.Tensor, maps: Maps, generator: torch.Generator) -> torch.Tensor | None:
        """What is added to a weight of any shape that has gone through the maps, for example random numbers where it continues nothing (None: nothing)."""


@dataclass(frozen=True)
class Lossless:
    """W' = S W R + N with N S = 0: the grown model is the same function.

    theta (degrees, 0 to 45) sets how a copied channel of the stream divides the original's length: (cos, sin). `spread` (0 to 1)
    sets how unequally the copies of a head or hidden unit are read, and `noise` the size of N relative to the weights. Without
    noise, copies get gradients that are equal up to a factor, and a model of twins stays as good as small.
    theta = 45, spread = 0, noise = 0 are plain clones; theta = 0, spread = 1 fresh capacity: new channels written with zeros and read at
    random, new units and heads written at random and read with zeros.
    """

    theta: float = 45.0
    spread: float = 0.5
    noise: float = 1.0
    keeps_sphere: ClassVar[bool] = True

    def __post_init__(self):
        if not (0 <= self.theta <= 45 and 0 <= self.spread <= 1 and 0 <= self.noise):
            raise UsageError(f"no growth with theta={self.theta}, spread={self.spread}, noise={self.noise}: "
                             "use 0 to 45 degrees, a spread of 0 to 1 and noise of 0 or more")
        if self.theta == 0 and self.noise == 0:
            raise UsageError("theta=0 without noise makes channels that are neither written nor read, and so never learn; raise one of them")

    def stream(self, old: int, new: int, total: float) -> Map:
        return angles(old, new, self.theta, total, self.noise)

    def hidden(self, old: int, new: int, total: float) -> Map:
        """A normed axis behind ReLU², whose units do not wake when they are written with zeros: always equal copies."""
        return angles(old, new, 45, total, self.noise)

    def free(self, index: torch.Tensor, old: int, sphere: bool) -> Map:
        # on the sphere no column may be zero, and a hidden unit with a scale of 0 would not wake
        return shared(index, old, min(self.spread, 0.9) if sphere else self.spread, self.noise)

    def rank(self, old: int, new: int) -> Map:
        """New ranks are always fresh: one factor gets random vectors, the other zeros."""
        return embedded(tile(old, new), old)

    def fill(self, weight: torch.Tensor, maps: Maps, generator: torch.Generator) -> torch.Tensor | None:
        """Fresh rows or columns that are to be random get the length that the others have in the mean."""
        for dim, map, writes in mapped(maps):
            if map.random_side == ("writers" if writes else "readers") and map.fresh.any():
                vectors = normal(weight.shape, weight, generator)
                length = weight.norm() / (~map.fresh).sum() ** 0.5
                return vectors / vectors.norm(dim=1 - dim, keepdim=True) * length * along(map.fresh, dim, weight)
        return None


@dataclass(frozen=True)
class Clones(Lossless):
    """`Lossless` with equal copies only, for whole multiples."""

    theta: float = 45.0
    spread: float = 0.0
    noise: float = 0.0

    def stream(self, old: int, new: int, total: float) -> Map:
        return super().stream(old, whole_multiple(old, new), total)

    def hidden(self, old: int, new: int, total: float) -> Map:
        return super().hidden(old, whole_multiple(old, new), total)

    def free(self, index: torch.Tensor, old: int, sphere: bool) -> Map:
        whole_multiple(old, len(index))
        return super().free(index, old, sphere)

    def rank(self, old: int, new: int) -> Map:
        return shared(tile(old, whole_multiple(old, new)), old, 0.0)


def whole_multiple(old: int, new: int) -> int:
    if new % old:
        raise UsageError(f"hyperclone grows by whole multiples, not {old} to {new}; use the lossless mode")
    return new


@dataclass(frozen=True)
class Sparkling(Lossless):
    """Equal copies without noise, so that every activation keeps its RMS. What makes them differ is left to the optimizer: it is meant for
    `reset-new`, which forgets the moments of the further copies alone, and a re-warming of their learning rates (SPARKLING, 2602.02472).

    The paper doubles widths; its third ingredient, how it scales copies, is taken as what the algebra here asks for: the exact one at any ratio.
    """

    theta: float = 45.0
    spread: float = 0.0
    noise: float = 0.0


@dataclass(frozen=True)
class Bus:
    """Each matrix is tiled, cut to size and multiplied by (old width / new width) of the axis that it reads."""

    keeps_sphere: ClassVar[bool] = False

    def stream(self, old: int, new: int, total: float = 1) -> Map:
        return self.free(tile(old, new), old)

    hidden = stream

    def free(self, index: torch.Tensor, old: int, sphere: bool = False) -> Map:
        ones = torch.ones(len(index), dtype=torch.float64)
        return Map(old, index, ones, ones * old / len(index))

    def rank(self, old: int, new: int) -> Map:
        return self.stream(old, new)

    def fill(self, weight: torch.Tensor, maps: Maps, generator: torch.Generator) -> torch.Tensor | None:
        return None


@dataclass(frozen=True)
class Random:
    """Each matrix keeps its corner; all around it is drawn anew at its RMS."""

    keeps_sphere: ClassVar[bool] = False

    def stream(self, old: int, new: int, total: float = 1) -> Map:
        return embedded(tile(old, new), old)

    hidden = stream

    def free(self, index: torch.Tensor, old: int, sphere: bool = False) -> Map:
        return embedded(index, old)

    def rank(self, old: int, new: int) -> Map:
        return embedded(tile(old, new), old)

    def fill(self, weight: torch.Tensor, maps: Maps, generator: torch.Generator) -> torch.Tensor | None:
        return drawn(weight, fresh_entries(weight, maps), generator)


@dataclass(frozen=True)
class Masked(Random):
    """`Random`, for masks that open (added.py): the channels of the stream that continue old ones are written as large as keeps the RMS while all others are
    still 0. With closed masks this is `Lossless` at theta = 0, spread = 1; what that leaves at 0 is random here too, and comes with the masks."""

    def stream(self, old: int, new: int, total: float = 1) -> Map:
        return replace(angles(old, new, 0, total), random_side="readers")

    hidden = stream


@dataclass(frozen=True)
class Identity(Random):
    """Each matrix W becomes [[W, 0], [0, I]], with I repeated where that block is not square. The head reads the new channels
    at random, or they would never be used; embeddings write zeros to them."""

    def fill(self, weight: torch.Tensor, maps: Maps, generator: torch.Generator) -> torch.Tensor | None:
        fresh = [map.fresh for _, map, _ in mapped(maps) if map.fresh.any()]
        if len(fresh) < 2:
            return drawn(weight, fresh_entries(weight, maps, writers=False), generator)
        rows, columns = (entries.nonzero()[:, 0].to(weight.device) for entries in fresh)
        shorter = min(len(rows), len(columns))
        block = torch.zeros_like(weight)
        i, j = torch.arange(len(rows), device=weight.device), torch.arange(len(columns), device=weight.device)
        block[rows[:, None], columns] = (i[:, None] % shorter == j % shorter).to(weight)
        return block


def embedded(index: torch.Tensor, old: int) -> Map:
    """The first copy of each entry continues it, all others are fresh; a fresh axis is written at random and read with zeros."""
    first = replace(shared(index, old, 1.0), column_noise=None)
    return replace(first, write=(first.read > 0).double())


def drawn(weight: torch.Tensor, fresh: torch.Tensor, generator: torch.Generator) -> torch.Tensor | None:
    """Normal numbers where `fresh`, of the RMS that the other entries have."""
    if not fresh.any():
        return None
    rms = weight[~fresh].square().mean().sqrt()
    return torch.where(fresh, normal(weight.shape, weight, generator) * rms, 0.0)


def fresh_entries(weight: torch.Tensor, maps: Maps, writers: bool = True) -> torch.Tensor:
    """Where in a weight a fresh entry of one of its axes is read, or written."""
    fresh = torch.zeros(weight.shape, dtype=torch.bool, device=weight.device)
    for dim, map, writes in mapped(maps):
        if writers or not writes:
            fresh |= along(map.fresh, dim, weight)
    return fresh


def normal(shape: Sequence[int], like: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Drawn in float64 on the generator's device, so that every device gets the same numbers."""
    return torch.randn(*shape, generator=generator, dtype=torch.float64, device=generator.device).to(like)


MODES: dict[str, Callable[..., Mode]] = {"lossless": Lossless, "hyperclone": Clones, "sparkling": Sparkling, "masked": Masked, "bus": Bus, "identity": Identity,
                                         "random": Random}


def width_mode(name: str, **parameters) -> Mode:
    """The mode of that name; `theta`, `spread` and `noise` are parameters of the lossless one. Raises UsageError."""
    if name not in MODES:
        raise UsageError(f"unknown growth mode {name!r}: use one of {', '.join(MODES)}")
    if parameters and name != "lossless":
        raise UsageError(f"the mode {name} has no parameters {', '.join(parameters)}; they belong to the lossless mode")
    return MODES[name](**parameters)

"""How an axis grows: the map from its n entries to n' of them.

Entry j of the grown axis continues entry index[j]; writers are multiplied by write[j] and readers by read[j]. As matrices,
S[j, index[j]] = write[j] (n', n) and R[index[j], j] = read[j] (n, n'), and R S = I, that is

    sum over the copies j of i of write[j] read[j] = 1,

so that a weight W' = S W R reads the same from grown activations x' = S x as W read from x, and writes them grown. An entry
with write = read = 0 is fresh: it continues nothing, and either its writers or its readers start at random.

| axis | besides the sum | copies |
|---|---|---|
| normed: it is divided by its length (the stream; hidden layers of a deep MLP) | the length must keep: sum of write² over the copies = n'/n for RMS, 1 on the unit sphere; and read = write / (sum of write²), or gradients would not map exactly | `angles` |
| free: heads and hidden units, between which the function acts one by one | write = 1 | `shared` |
"""
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch

from nanochat.cli import UsageError


@dataclass(frozen=True)
class Map:
    old: int  # n
    index: torch.Tensor  # (n',)
    write: torch.Tensor  # (n',) float64
    read: torch.Tensor  # (n',) float64
    row_noise: float = 0.0  # length of the random part of a reader's row, relative to the row (normed axes)
    column_noise: torch.Tensor | None = None  # (n',) the same of a reader's column, with a sign (free axes)
    random_side: str = ""  # who starts at random at a fresh entry: "writers" or "readers"

    @property
    def new(self) -> int:
        return len(self.index)

    @property
    def fresh(self) -> torch.Tensor:
        return (self.write == 0) & (self.read == 0)

    @property
    def added(self) -> torch.Tensor:
        """Which entries are not the first copy of theirs (n',): fresh ones and further copies."""
        added = torch.ones_like(self.fresh)
        alive = (~self.fresh).nonzero()[:, 0]
        added[alive] = count_copies(self.index[alive], self.old)[0] > 0
        return added

    def originals(self) -> "Map":
        """The map of which all that is added is fresh."""
        return replace(self, write=self.write.where(~self.added, 0.0), read=self.read.where(~self.added, 0.0), column_noise=None)

    def has_room(self, rank: int) -> bool:
        """Is the space of what readers cannot see, the null space of S^T, as large as this?"""
        return rank <= self.new - self.old

    def group_sum(self, x: torch.Tensor) -> torch.Tensor:
        """x (..., n') added up over the copies: (..., n)."""
        return x.new_zeros(*x.shape[:-1], self.old).index_add_(-1, self.index.to(x.device), x)

    def repeat(self, block: int) -> "Map":
        """The same for an axis that has `block` entries for each one here, as a head has its dimensions."""
        index = self.index.repeat_interleave(block) * block + torch.arange(block).repeat(self.new)
        return replace(self, old=self.old * block, index=index, write=self.write.repeat_interleave(block), read=self.read.repeat_interleave(block),
                       column_noise=None if self.column_noise is None else self.column_noise.repeat_interleave(block))

    def times(self, factor: float | torch.Tensor) -> "Map":
        """Entries times `factor`, a number or (n',), wherever the axis is written."""
        return replace(self, write=self.write * factor, read=self.read / factor)

    def before_scale(self) -> "Map":
        """The axis just before a factor per entry makes the difference between copies: all are written alike."""
        return replace(self, write=(~self.fresh).double(), read=self.write * self.read, column_noise=None)

    def of_scale(self, factor: float | torch.Tensor = 1.0) -> "Map":
        """For a parameter that multiplies entries of the axis, of which it takes over `write` and `factor`. Fresh ones get their twin's value."""
        return replace(self, write=torch.where(self.fresh, 1.0, self.write * factor), read=self.read / factor, column_noise=None)

    def part(self, length: int) -> "Map":
        """For a gate that reads nothing but the first entries, which continue themselves: it undoes what they are written with."""
        write = self.write[:length]
        assert bool((self.index[:length] == torch.arange(length)).all() and write.all())
        return Map(length, self.index[:length], write, 1 / write)

    def on_sphere(self) -> "Map":
        """For readers whose columns must keep the length 1: what they would be multiplied with goes to whoever writes the axis.
        A column with noise of relative length t is shortened by 1 / sqrt(1 + t²)."""
        length = torch.ones_like(self.read) if self.column_noise is None else (1 + self.column_noise ** 2).sqrt()
        alive = (~self.fresh).double()
        return replace(self, write=self.write * self.read * length, read=alive / length)


Maps = Sequence[tuple[Map, bool] | None]  # per dimension of a tensor: the map of its axis and whether it writes the axis (or reads it)


def mapped(maps: Maps) -> Iterator[tuple[int, Map, bool]]:
    """(dimension, map, writes) of the dimensions that have a map."""
    return ((dim, *entry) for dim, entry in enumerate(maps) if entry is not None)


def along(line: torch.Tensor, dim: int, tensor: torch.Tensor) -> torch.Tensor:
    """A vector on the device of `tensor`, shaped to meet its dimension `dim`."""
    return line.to(tensor.device).view([-1 if d == dim else 1 for d in range(tensor.dim())])


def identity(n: int) -> Map:
    return Map(n, torch.arange(n), torch.ones(n, dtype=torch.float64), torch.ones(n, dtype=torch.float64))


def tile(old: int, new: int) -> torch.Tensor:
    """0, 1, ..., n-1, 0, 1, ...: the first n entries continue themselves."""
    return torch.arange(new) % old


def count_copies(index: torch.Tensor, old: int) -> tuple[torch.Tensor, torch.Tensor]:
    """For each entry: the how manieth copy of its source it is (from 0), and how many there are."""
    counts = torch.bincount(index, minlength=old)
    order = torch.argsort(index, stable=True)
    number = torch.empty_like(index)
    number[order] = torch.arange(len(index)) - (counts.cumsum(0) - counts)[index[order]]
    return number, counts[index]


def angles(old: int, new: int, theta: float, total: float, noise: float = 0.0) -> Map:
    """Normed axis: the original is written with cos(theta), each further copy with sin(theta), scaled to sum of squares = `total`.

    45 degrees make equal copies; at 0 new entries are written with zeros.
    """
    index = tile(old, new)
    number, _ = count_copies(index, old)
    weight = torch.where(number == 0, 1.0, math.tan(math.radians(theta)) * torch.ones(new, dtype=torch.float64))
    squares = torch.zeros(old, dtype=torch.float64).index_add_(0, index, weight ** 2)
    write = weight * (total / squares).sqrt()[index]
    return Map(old, index, write, write / total, row_noise=noise * math.sqrt((new - old) / new))


def shared(index: torch.Tensor, old: int, spread: float, noise: float = 0.0) -> Map:
    """Free axis: of m copies the original is read with (1 + spread (m - 1)) / m, the others with (1 - spread) / m each.

    With a spread of 0 they are equal; with 1 the new ones are fresh, read with zeros and written at random. The noises t of columns, one
    per copy, all differ, have sum read · t = 0 and a mean square (weighted by `read`) of noise² (m - 1) / m.
    """
    number, copies = count_copies(index, old)
    number, copies = number.double(), copies.double()
    read = torch.where(number == 0, 1 + spread * (copies - 1), 1 - spread) / copies
    plan = Map(old, index, (read > 0).double(), read, random_side="writers")
    t = 1 - 2 * number / (copies - 1).clamp(min=1)
    t = t - plan.group_sum(read * t)[index]
    square = plan.group_sum(read * t ** 2)[index]
    t = torch.where(square > 0, t * noise * ((copies - 1) / copies / square.clamp(min=1e-30)).sqrt(), 0.0)
    return replace(plan, column_noise=t)


def head_index(heads: tuple[int, int], grown: tuple[int, int]) -> tuple[torch.Tensor, torch.Tensor]:
    """(query heads, key heads) before and after -> the index of the query heads, and that of the key heads.

    Key heads are repeated in turn. The queries of each continue queries of the key head that it continues, in turn over all its
    copies. Raises UsageError if there are too few places for them.
    """
    (n_head, n_kv), (new_head, new_kv) = heads, grown
    kv = tile(n_kv, new_kv)
    group, new_group = n_head // n_kv, new_head // new_kv
    owner = kv.repeat_interleave(new_group)
    number, places = count_copies(owner, n_kv)
    if int(places.min()) < group:
        raise UsageError(f"{n_head} query heads over {n_kv} key heads cannot become {new_head} over {new_kv}: a key head would have "
                         f"places for {int(places.min())} of its {group} queries; use more query heads or other key heads")
    return owner * group + number % group, kv

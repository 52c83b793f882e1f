"""Parameters through the maps of their axes: W' = S W R + N with N S = 0, and the same for moments of gradients.

Grown activations are x' = S x, so nobody sees N. It is made in one of three ways:

* rows that read a normed axis get a random vector in the null space of Sᵀ, of a length relative to theirs;
* a column w that is read from a free axis becomes read_j (w + t_j |w| h) for its copies j, with one random direction h, orthogonal
  to w, and tilts of which sum write_j read_j t_j = 0;
* of a low-rank W = U V only V gets noise. On the sphere that must leave the lengths of all rows of U V equal: with V = L Q, Q orthonormal, noise
  L P does so for any orthonormal P in the null space, since (L P)(L P)ᵀ = V Vᵀ. And in a V that reads a free axis, h is orthogonal to
  w when U has lifted both to the stream: in the inner product of UᵀU.
"""
import torch

from nanochat.growth.maps import Map, Maps, along, mapped
from nanochat.growth.modes import Mode, normal


def apply(tensor: torch.Tensor, maps: Maps, of_gradient: bool = False, power: int = 1) -> torch.Tensor:
    """S W R, or for a gradient Rᵀ G Sᵀ; the coefficients to the given power (2 for second moments)."""
    for dim, map, writes in mapped(maps):
        coefficient = map.write if writes != of_gradient else map.read
        tensor = tensor.index_select(dim, map.index.to(tensor.device))
        tensor = tensor * along(coefficient ** power, dim, tensor)
    return tensor


def expand(weight: torch.Tensor, maps: Maps, mode: Mode, generator: torch.Generator, factor_of: torch.Tensor | None = None) -> torch.Tensor:
    """The grown weight, in the dtype of `weight`, to which `mode` adds what starts at random. For a factor V on the sphere, `factor_of` is its U."""
    grown = apply(weight, maps)
    if len(maps) == 2 and maps[0] is not None and maps[1] is not None and not maps[1][1]:  # a matrix between two axes
        written, read = maps[0][0], maps[1][0]
        if read.tilt is not None and read.tilt.any():
            grown = grown + tilted(grown, written, read, generator, factor_of)
        if read.noise:
            grown = grown + (row_noise if factor_of is None else isometric_noise)(grown, read, generator)
    fresh = mode.fill(grown, maps, generator)
    return grown if fresh is None else grown + fresh


def null_vectors(rows: int, read: Map, like: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Random (rows, n') with N S = 0, exact zeros where a channel has no copy."""
    write = read.write.to(like)
    squares = read.group_sum(write ** 2)
    noise = normal((rows, read.new), like, generator)
    noise = noise - (read.group_sum(noise * write) / squares)[:, read.index.to(like.device)] * write
    copied = torch.bincount(read.index, minlength=read.old)[read.index] > 1
    return noise * copied.to(like)


def row_noise(grown: torch.Tensor, read: Map, generator: torch.Generator) -> torch.Tensor:
    noise = null_vectors(len(grown), read, grown, generator)
    return noise * (read.noise * grown.norm(dim=1, keepdim=True) / noise.norm(dim=1, keepdim=True).clamp(min=1e-30))


def isometric_noise(grown: torch.Tensor, read: Map, generator: torch.Generator) -> torch.Tensor:
    """L P of a grown V = L Q, or zeros where the null space has no room for so many orthonormal rows."""
    alive = grown.abs().sum(dim=1) > 0
    if not read.has_room(int(alive.sum())):
        return torch.zeros_like(grown)
    L = torch.linalg.qr(grown[alive].T).R.T
    P = torch.linalg.qr(null_vectors(len(L), read, grown, generator).T).Q.T
    noise = torch.zeros_like(grown)
    noise[alive] = read.noise * (L @ P)
    return noise


def tilted(grown: torch.Tensor, written: Map, read: Map, generator: torch.Generator, factor_of: torch.Tensor | None) -> torch.Tensor:
    """N[:, j] = t_j |w_j| h, where w_j are the columns of `grown` and h is one direction for all copies of a column, orthogonal to them."""
    index, tilt = read.index.to(grown.device), read.tilt.to(grown)  # type: ignore[union-attr]
    h = normal((len(grown), read.old), grown, generator)
    if factor_of is None:
        inner = lambda a, b: (a * b).sum(dim=0)
    else:  # h is in the space between the factors, of which the first rows are those of old
        h = h * (~written.fresh).to(h)[:, None]
        rank = factor_of.size(1)
        gram = factor_of.T @ factor_of
        inner = lambda a, b: (a[:rank] * (gram @ b[:rank])).sum(dim=0)
    h = h[:, index]
    h = h - grown * (inner(grown, h) / inner(grown, grown).clamp(min=1e-30))
    return h * (tilt * (inner(grown, grown) / inner(h, h).clamp(min=1e-30)).sqrt())


def wide(tensor: torch.Tensor) -> torch.Tensor:
    """In float64, so that the expansion itself costs no accuracy; of a device that has none (MPS), on the CPU."""
    tensor = tensor.detach()
    return (tensor.cpu() if tensor.device.type == "mps" else tensor).double()

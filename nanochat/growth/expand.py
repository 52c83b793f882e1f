"""Parameters through the maps of their axes: W' = S W R + N with N S = 0, and the same for moments of gradients.

Grown activations are x' = S x, so nobody sees N. It is made in one of three ways:

* rows that read a normed axis get a random vector in the null space of Sᵀ, of a length relative to theirs;
* a column w that is read from a free axis becomes read_j (w + t_j |w| h) for its copies j, with one random direction h, orthogonal
  to w, and noises t_j of which the sum write_j read_j t_j = 0;
* of a low-rank W = U V only V gets noise. On the sphere that must leave the lengths of all rows of U V equal: with V = L Q, Q orthonormal, noise
  L P does so for any orthonormal P in the null space, since (L P)(L P)ᵀ = V Vᵀ. And in a V that reads a free axis, h is orthogonal to
  w when U has lifted both to the stream: in the inner product of UᵀU.

Shapes: O and I are the grown axes that a matrix W_OI writes and reads, J the read one before it grew. Of factors V_RI reads, U_OR writes.
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
        if read.column_noise is not None and read.column_noise.any():
            grown = grown + column_noise(grown, written, read, generator, factor_of)
        if read.row_noise:
            grown = grown + (row_noise if factor_of is None else isometric_noise)(grown, read, generator)
    fresh = mode.fill(grown, maps, generator)
    return grown if fresh is None else grown + fresh


def null_vectors(rows: int, read: Map, like: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Random N (rows, I) with N S = 0, exact zeros where a channel has no copy."""
    write_I = read.write.to(like)
    squares_J = read.group_sum(write_I ** 2)
    N_OI = normal((rows, read.new), like, generator)
    N_OI = N_OI - (read.group_sum(N_OI * write_I) / squares_J)[:, read.index.to(like.device)] * write_I
    copied_I = torch.bincount(read.index, minlength=read.old)[read.index] > 1
    return N_OI * copied_I.to(like)


def row_noise(W_OI: torch.Tensor, read: Map, generator: torch.Generator) -> torch.Tensor:
    N_OI = null_vectors(len(W_OI), read, W_OI, generator)
    return N_OI * (read.row_noise * W_OI.norm(dim=1, keepdim=True) / N_OI.norm(dim=1, keepdim=True).clamp(min=1e-30))


def isometric_noise(V_RI: torch.Tensor, read: Map, generator: torch.Generator) -> torch.Tensor:
    """L P of a grown V = L Q, or zeros where the null space has no room for so many orthonormal rows."""
    alive_R = V_RI.abs().sum(dim=1) > 0
    if not read.has_room(int(alive_R.sum())):
        return torch.zeros_like(V_RI)
    L_RR = torch.linalg.qr(V_RI[alive_R].T).R.T
    P_RI = torch.linalg.qr(null_vectors(len(L_RR), read, V_RI, generator).T).Q.T
    N_RI = torch.zeros_like(V_RI)
    N_RI[alive_R] = read.row_noise * (L_RR @ P_RI)
    return N_RI


def column_noise(W_OI: torch.Tensor, written: Map, read: Map, generator: torch.Generator, U_OR: torch.Tensor | None) -> torch.Tensor:
    """N[:, i] = t_i |w_i| h, where w_i are the columns of a grown W (or V, behind U) and h is one direction for all copies of a column, orthogonal to them."""
    index_I, t_I = read.index.to(W_OI.device), read.column_noise.to(W_OI)  # type: ignore[union-attr]
    h_OJ = normal((len(W_OI), read.old), W_OI, generator)
    if U_OR is None:
        inner = lambda a, b: (a * b).sum(dim=0)
    else:  # h is in the space between the factors, of which the first rows are those of old
        h_OJ = h_OJ * (~written.fresh).to(h_OJ)[:, None]
        rank = U_OR.size(1)
        G_RR = U_OR.T @ U_OR
        inner = lambda a, b: (a[:rank] * (G_RR @ b[:rank])).sum(dim=0)
    h_OI = h_OJ[:, index_I]
    h_OI = h_OI - W_OI * (inner(W_OI, h_OI) / inner(W_OI, W_OI).clamp(min=1e-30))
    return h_OI * (t_I * (inner(W_OI, W_OI) / inner(h_OI, h_OI).clamp(min=1e-30)).sqrt())


def in_float64(tensor: torch.Tensor) -> torch.Tensor:
    """So that the expansion itself costs no accuracy; of a device that has none (MPS), on the CPU."""
    tensor = tensor.detach()
    return (tensor.cpu() if tensor.device.type == "mps" else tensor).double()

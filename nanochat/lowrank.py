"""Low-rank layers: W = U V with U (out, r) and V (r, in), multiplied out only to decode small matrices.

* Spectral initialization (Khodak et al., 2105.01029): the factors come from the truncated SVD of the dense layer's own
  initialization, sqrt(s) to each side, so the product is the best rank-r copy of what a dense layer would start from.
* A layer that starts at zero keeps a random V and gets U = 0: the product is zero, and U has a gradient from the first step on.
* Rank schedules spread one budget of ranks over the depth.
* A decoding step reads every weight for a few rows, so its time is bytes plus calls, and two factors are two calls. Where the product
  is not much larger than the factors, inference keeps it too and decodes with it; prompts still go through the factors.
"""
import torch
import torch.nn as nn

from nanochat.cli import UsageError
from nanochat.common import COMPUTE_DTYPE
from nanochat.gpt import Fill, Linear, linear, uniform

RANK_SCHEDULES = ("constant", "linear", "step", "exponential", "quadratic")
DECODE_ROWS = 16  # up to so many rows a product costs what reading its weights costs


def call_cost(device_type: str, dtype: torch.dtype) -> int:
    """How many weights are read in the time of one more call of a matmul with a few rows.

    A rule rather than a stopwatch at load, so that a checkpoint gives the same outputs every time. The CPU's numbers are
    measured (`python -m dev.bench_decode --calls`; oneDNN's bf16 kernels are slow to call), the GPUs' are estimates: 3 us of
    launching at 2 TB/s (CUDA) and 0.35 TB/s (MPS).
    """
    if device_type == "cpu":
        return 192 * 1024 if dtype == torch.bfloat16 else 16 * 1024
    return (6 if device_type == "cuda" else 1) * 2**20 // dtype.itemsize


def break_even_rank(in_features: int, out_features: int) -> float:
    """The rank from which on factors hold and cost more than the dense matrix: in * out / (in + out)."""
    return in_features * out_features / (in_features + out_features)


def spectral_factors(weight: torch.Tensor, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
    """U (out, rank) and V (rank, in), whose product is the closest to weight (out, in) that has this rank (Eckart and Young, 1936)."""
    left, values, right = torch.linalg.svd(weight.float(), full_matrices=False)
    root = values[:rank].sqrt()
    return (left[:, :rank] * root).to(weight.dtype), (root[:, None] * right[:rank]).to(weight.dtype)


class LowRankLinear(nn.Module):
    """y = U (V x), two `Linear` layers: they are counted, cast and optimized like all others."""

    def __init__(self, in_features: int, out_features: int, rank: int):
        super().__init__()
        assert 0 < rank <= min(in_features, out_features), f"rank {rank} of a {out_features} x {in_features} matrix"
        self.in_features, self.out_features, self.rank = in_features, out_features, rank
        self.V = Linear(in_features, rank)
        self.U = Linear(rank, out_features)
        self.product: torch.Tensor | None
        self.register_buffer("product", None, persistent=False)  # U V, for decoding

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.product is not None and x.numel() <= DECODE_ROWS * self.in_features:
            return linear(x, self.product.to(x.dtype))
        return self.U(self.V(x))

    @torch.no_grad()
    def merge(self) -> None:
        """Keeps the product too, in the compute dtype, and decodes with it. It does not follow later changes of the factors."""
        self.product = (self.U.weight.float() @ self.V.weight.float()).to(COMPUTE_DTYPE)

    def merge_if_faster(self) -> None:
        """Merges where the weights that the factors save cost less to read than a second call."""
        saved = self.in_features * self.out_features - self.rank * (self.in_features + self.out_features)
        if saved <= call_cost(self.U.weight.device.type, COMPUTE_DTYPE):
            self.merge()

    def init(self, fill: Fill) -> None:
        """The best copy of a dense layer that is filled so."""
        self.init_from_dense(fill(torch.empty(self.out_features, self.in_features, device=self.U.weight.device)))

    def init_to_zero(self) -> None:
        self.init(uniform())
        nn.init.zeros_(self.U.weight)

    @torch.no_grad()
    def init_from_dense(self, weight: torch.Tensor) -> None:
        """Takes the best copy of weight (out, in) at this rank."""
        U, V = spectral_factors(weight, self.rank)
        self.U.weight.copy_(U)
        self.V.weight.copy_(V)

    @torch.no_grad()
    def to_dense(self) -> Linear:
        """The same function as one matrix."""
        with torch.device(self.U.weight.device):
            dense = Linear(self.in_features, self.out_features)
        dense.weight.copy_(self.U.weight @ self.V.weight)
        return dense

    @classmethod
    def from_dense(cls, linear: Linear, rank: int) -> "LowRankLinear":
        """The closest low-rank layer to a dense one, in the Frobenius norm."""
        with torch.device(linear.weight.device):
            layer = cls(linear.in_features, linear.out_features, rank)
        layer.init_from_dense(linear.weight)
        return layer


def linear_or_low_rank(in_features: int, out_features: int, rank: int) -> Linear | LowRankLinear:
    """Rank 0 is dense."""
    return LowRankLinear(in_features, out_features, rank) if rank else Linear(in_features, out_features)


def schedule_ranks(schedule: str, rank: int, n_layer: int, largest: int) -> list[int]:
    """One rank per layer, `rank * n_layer` in all, never above `largest`; deeper layers get more.

    The profiles over depth z from 0 to 1 are 1 (constant), 1/2 + z (linear), 1/2 then 3/2 (step), 4^(z - 1/2)
    (exponential) and 1/2 + 3/2 z² (quadratic), scaled to the budget; rounding goes to the largest remainders.
    Raises UsageError for a rank, a schedule or a budget that cannot be.
    """
    if schedule not in RANK_SCHEDULES:
        raise UsageError(f"unknown rank schedule {schedule!r}: use one of {', '.join(RANK_SCHEDULES)}")
    if not 0 < rank <= largest:
        raise UsageError(f"a rank of {rank} does not fit matrices of {largest}; use 1 to {largest}, or 0 for dense layers")
    depths = [i / max(n_layer - 1, 1) for i in range(n_layer)]
    profile = {"constant": lambda z: 1.0, "linear": lambda z: 0.5 + z, "step": lambda z: 0.5 if z < 0.5 else 1.5,
               "exponential": lambda z: 4 ** (z - 0.5), "quadratic": lambda z: 0.5 + 1.5 * z * z}[schedule]
    shares = [profile(z) for z in depths]
    wanted = [rank * n_layer * share / sum(shares) for share in shares]
    ranks = [max(1, int(w)) for w in wanted]
    for i in sorted(range(n_layer), key=lambda i: ranks[i] - wanted[i]):
        if sum(ranks) < rank * n_layer:
            ranks[i] += 1
    ranks.sort()  # all profiles rise; rounding must not break that
    if max(ranks) > largest or sum(ranks) != rank * n_layer:
        raise UsageError(f"the rank schedule {schedule} with a mean rank of {rank} asks for ranks of {min(ranks)} to {max(ranks)}, and matrices "
                         f"of {largest} have no more than that; use a rank of {max(1, int(rank * largest / max(wanted)))} or the constant schedule")
    return ranks

"""Bits per byte: the loss measured in units of text instead of tokens, so that tokenizers can be compared."""
import itertools
import math
from collections.abc import Callable, Iterable, Iterator

import torch

from nanochat.distributed import sum_over_ranks

MOST_KEPT = 2 ** 20  # tokens of validation, 16 MiB with their targets


@torch.no_grad()
def evaluate_bpb(model, batches: Iterable, steps: int, token_bytes: torch.Tensor) -> float:
    """Cross-entropy in bits per byte of text, over the first `steps` batches (inputs, targets) of every rank.

    token_bytes (V,): bytes of each token. Targets of 0 bytes (special tokens) and targets of -1 count neither in
    the loss nor in the length. `model(x, y, loss_reduction="none")` gives nats per token, flat. inf if no target counts.
    """
    device = model.get_device()
    # a large evaluation sums 1e8 nats, more than float32 can add up; MPS has nothing wider and adds its batches on the CPU
    sum_dtype = torch.float32 if device.type == "mps" else torch.float64
    sums = []
    for x, y in itertools.islice(batches, steps):
        y = y.reshape(-1)
        nats = model(x, y.view_as(x), loss_reduction="none")
        num_bytes = token_bytes[y.clamp(min=0)] * (y >= 0)
        sums.append(torch.stack((torch.where(num_bytes > 0, nats, 0).sum(dtype=sum_dtype), num_bytes.sum().to(sum_dtype))))
    totals = torch.stack(sums).cpu().double().sum(dim=0) if sums else torch.zeros(2, dtype=torch.float64)
    nats, num_bytes = sum_over_ranks(totals).tolist()
    return nats / (math.log(2) * num_bytes) if num_bytes else math.inf


class FirstBatches:
    """The first `count` batches of `begin()`, the same ones each time they are gone through.

    If they have at most MOST_KEPT tokens (`tokens` each), they are kept once they are drawn: to begin anew is to fill a buffer with a thousand documents.
    """

    def __init__(self, begin: Callable[[], Iterator], count: int, tokens: int):
        self._begin, self._count, self._keep = begin, count, count * tokens <= MOST_KEPT
        self._kept: list = []
        self._rest: Iterator | None = None  # of a loader that has begun

    def __iter__(self) -> Iterator:
        if not self._keep:
            yield from itertools.islice(self._begin(), self._count)
            return
        yield from self._kept
        while len(self._kept) < self._count:
            self._rest = self._rest or self._begin()
            self._kept.append(next(self._rest))
            if len(self._kept) == self._count:
                self._rest = None  # and its buffer
            yield self._kept[-1]

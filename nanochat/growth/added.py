"""How that which a growth has added gets going: by masks that open, and by learning rates of its own that re-warm.

Both act on single entries of the weights, around each step of the optimizer, and follow from the number of steps since the growth alone. So the model
stays a plain one that can be evaluated, saved and resumed at any time, and nothing of them is left when they are done.

**Masks** (Masked Structural Growth, 2305.02869). There, what is new is multiplied by a mask m that rises from 0 to 1, so that a growth keeps the function
whatever the new weights are. Here m is part of the weights: what is stored is v = m w, of which the forward pass is the same. A step then
reads, with u the optimizer's update,

    gradient of w = m * gradient of v;   v <- (v + m u) * m' / m,

where m' is the mask of the next step. The first step, at m = 0, leaves v = 0 and then puts m' w in its place. Masked are the writers of new channels of
the stream, the readers of new heads and hidden units, and the writers of new layers. Besides the channels the paper masks the statistics of its norms;
here the old channels are written sqrt(n'/n) times as large instead (modes.py), which is the same at m = 0 and needs no other norm later on.

**Re-warming** of the new part alone (SPARKLING, 2602.02472): v <- v + r u with a share r that rises to 1.
"""
from collections.abc import Callable, Mapping

import torch

from nanochat.optim import MuonAdamW


class Entering:
    """Entries of an optimizer's parameters that take a growing share of their updates, over `steps` steps.

    entries: bool masks of the parameters' shapes, by name. age: steps since the growth, 0 in the first.
    masks: multiply what is there as well, by a mask that opens; `close` must be called first, unless training goes on in the middle.
    """

    def __init__(self, optimizer: MuonAdamW, entries: Mapping[str, torch.Tensor], steps: int, age: Callable[[], int], masks: bool = False):
        self.steps, self.age, self.masks = steps, age, masks
        self.parts = [(p, entries[name].to(p.device)) for p, name in optimizer.names.items() if name in entries and entries[name].any()]
        self.before: list[torch.Tensor] = []
        self.start: list[torch.Tensor] = []
        optimizer.register_step_pre_hook(lambda *_: self._begin())
        optimizer.register_step_post_hook(lambda *_: self._end())

    @torch.no_grad()
    def close(self) -> None:
        """Takes away what is to come: the masks are 0."""
        self.start = [p[entries] for p, entries in self.parts]
        for p, entries in self.parts:
            p[entries] = 0

    def share(self, age: int) -> float:
        """The mask, or the share of an update. A mask has to be 0 in the first step, a share moves something from the first on."""
        return min(1.0, (age + (not self.masks)) / self.steps)

    @torch.no_grad()
    def _begin(self) -> None:
        share = self.share(self.age())
        if share == 1:
            self.parts = []
        self.before = [p[entries] for p, entries in self.parts]
        for p, entries in self.parts if self.masks else ():
            if p.grad is not None:
                p.grad[entries] *= share

    @torch.no_grad()
    def _end(self) -> None:
        age = self.age()
        share, later = self.share(age), self.share(age + 1)
        for i, ((p, entries), before) in enumerate(zip(self.parts, self.before)):
            if self.masks and not share:
                p[entries] = (later * wide(self.start[i])).to(p.dtype)
                continue
            moved = wide(before).lerp(wide(p[entries]), share)
            p[entries] = (moved * (later / share if self.masks else 1)).to(p.dtype)
        self.before, self.start = [], []


def wide(x: torch.Tensor) -> torch.Tensor:
    """In float32 or better: embeddings are stored in 16 bits."""
    return x.to(torch.promote_types(x.dtype, torch.float32))

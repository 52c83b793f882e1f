"""Keys and values of prompts and answers that were, for the prompts that begin like them: the next turn of a conversation, another answer to the same prompt.

An entry is a copy, so it survives the row that it came from. The least recently used ones go first.
"""
from dataclasses import dataclass

import numpy as np
import torch

MIN_TOKENS = 16  # reading fewer takes no longer than looking them up


@dataclass(eq=False)
class Prefix:
    tokens: np.ndarray  # (n,)
    caches: list[torch.Tensor]  # keys of every layer, then values: (n, heads, width) each


def common(a: np.ndarray, b: np.ndarray) -> int:
    """With how many equal tokens both begin."""
    n = min(len(a), len(b))
    different = np.flatnonzero(a[:n] != b[:n])
    return int(different[0]) if len(different) else n


class PrefixCache:
    """Holds at most `max_tokens` tokens."""

    def __init__(self, max_tokens: int):
        self.max_tokens = max_tokens
        self.entries: list[Prefix] = []  # the most recently used one last

    def find(self, tokens: list[int]) -> tuple[Prefix | None, int]:
        """The entry that begins most like `tokens`, and how many of them it holds."""
        wanted = np.asarray(tokens)
        best, shared = max(((entry, common(entry.tokens, wanted)) for entry in self.entries), key=lambda found: found[1], default=(None, 0))
        if best is None or shared < MIN_TOKENS:
            return None, 0
        self.entries.remove(best)
        self.entries.append(best)
        return best, shared

    def put(self, tokens: list[int], caches: list[torch.Tensor]) -> None:
        """Keeps copies of `caches`, each (n, heads, width) for the n tokens. What they share nearly all of is replaced: a
        conversation is not kept once per turn, nor an answer once per sample."""
        new = np.asarray(tokens)
        if not MIN_TOKENS <= len(new) <= self.max_tokens:
            return
        self.entries = [entry for entry in self.entries if common(entry.tokens, new) < 0.9 * len(entry.tokens)]
        while sum(len(entry.tokens) for entry in self.entries) + len(new) > self.max_tokens:
            self.entries.pop(0)
        self.entries.append(Prefix(new, [cache.clone() for cache in caches]))

"""Many token sequences through a model: in batches of like length, with logits only where something is scored, shared out over the ranks.

The result is that of one example at a time: attention is causal, so what pads a row on the right changes nothing, up to the rounding of sums.
"""
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F

from nanochat.distributed import rank_and_world, sum_over_ranks

TOKENS_PER_FORWARD = {"cpu": 1024, "cuda": 16384, "mps": 8192}  # padding included; small batches stay in a CPU's cache
EXAMPLES_SORTED = 256  # how many are tokenized, sorted by length and batched at a time


@dataclass
class Example:
    """One test item, ready for the model. Tokens `start` to `end - 1` of each sequence are scored."""
    sequences: list[list[int]]
    starts: list[int]
    ends: list[int]
    gold: int | None = None  # the right sequence; None: whatever asks for its score knows
    notes: list[str] = field(default_factory=list)  # what a reader of the score should know, to be counted

    @property
    def width(self) -> int:
        return max(self.ends)

    @cached_property
    def inputs(self) -> list[tuple[int, ...]]:
        """What the model has to read, once each: the last scored token is never read, so choices of one token each share all of it."""
        return list(dict.fromkeys(tuple(sequence[:end - 1]) for sequence, end in zip(self.sequences, self.ends)))


def max_positions(model: Any) -> int | None:
    """`max_seq_len`, for a model that has one, else the end of the rotary table; None for a model without a limit."""
    return getattr(model, "max_seq_len", getattr(model, "rotary_seq_len", None))


def find_common_length(token_sequences: Sequence[Sequence[int]], direction: str = "left") -> int:
    """Length of the common prefix (`left`) or suffix (`right`) of all sequences."""
    if direction == "right":
        token_sequences = [sequence[::-1] for sequence in token_sequences]
    length = 0
    for tokens in zip(*token_sequences, strict=False):
        if len(set(tokens)) > 1:
            break
        length += 1
    return length


def stack_sequences(tokens: Sequence[Sequence[int]], pad_token_id: int) -> torch.Tensor:
    """int64 (n, longest), padded on the right."""
    longest = max(map(len, tokens))
    return torch.tensor([list(row) + [pad_token_id] * (longest - len(row)) for row in tokens], dtype=torch.long)


# -----------------------------------------------------------------------------
# One forward pass


def logits_at(model, input_ids: torch.Tensor, rows: torch.Tensor, columns: torch.Tensor) -> torch.Tensor:
    """`model(input_ids)[rows, columns]`: float32 logits (N, V) at N positions of input_ids (B, T), given by rows (N,) and columns (N,).

    A model that ends in an `lm_head` computes no others: with a large vocabulary and few scored positions most of a small
    model's work is the head.
    """
    head = getattr(model, "lm_head", None)
    if head is None:
        return model(input_ids)[rows, columns]
    hook = head.register_forward_pre_hook(lambda _, args: (args[0][rows, columns],))
    try:
        return model(input_ids)
    finally:
        hook.remove()


@torch.no_grad()
def scored_logits(model, examples: Sequence[Example], device) -> tuple[torch.Tensor, torch.Tensor, list[int]]:
    """(logits (N, V), tokens that are scored (N,), how many of them each sequence has) of examples that run in one forward pass."""
    inputs = [row for example in examples for row in example.inputs]
    spans, rows, targets, first = [], [], [], 0
    for example in examples:
        for sequence, start, end in zip(example.sequences, example.starts, example.ends, strict=True):
            rows.append(first + example.inputs.index(tuple(sequence[:end - 1])))
            spans.append(torch.arange(start - 1, end - 1))
            targets += sequence[start:end]
        first += len(example.inputs)
    lengths = [len(span) for span in spans]
    ids = stack_sequences([*inputs, (0, 0)], pad_token_id=0)[:-1]  # the model wants two tokens at least; what pads the right of a causal one changes nothing
    logits = logits_at(model, ids.to(device), torch.tensor(rows).repeat_interleave(torch.tensor(lengths)).to(device),
                       torch.cat(spans).to(device))
    return logits, torch.tensor(targets, device=device), lengths


@torch.no_grad()
def token_nats(model, examples: Sequence[Example], device) -> list[list[torch.Tensor]]:
    """For each example, for each of its sequences, what its scored tokens cost, in nats: float32 (n,)."""
    logits, targets, lengths = scored_logits(model, examples, device)
    losses = iter(F.cross_entropy(logits, targets, reduction="none").cpu().split(lengths))
    return [[next(losses) for _ in example.sequences] for example in examples]


# -----------------------------------------------------------------------------
# All of them


def batches_by_length(examples: list[Example], max_tokens: int) -> Iterator[list[Example]]:
    """Examples of like length together, each batch within `max_tokens` padded tokens or a single example."""
    batch: list[Example] = []
    rows = 0
    for example in sorted(examples, key=lambda example: example.width, reverse=True):
        if batch and (rows + len(example.inputs)) * batch[0].width > max_tokens:
            yield batch
            batch, rows = [], 0
        batch.append(example)
        rows += len(example.inputs)
    if batch:
        yield batch


def score_all(count: int, prepare: Callable[[int], Example | None], score: Callable[[list[Example]], Sequence[float]], device,
              progress: Callable[[float], None] | None = None) -> tuple[torch.Tensor, dict[str, int]]:
    """(the score of each of `count` examples, float64 and NaN for those that cannot be prepared; how many examples have each note).

    All ranks call it and get the same. prepare: an example by its number, or None. score: those of a batch that is to run in one forward pass.
    progress: is called with the fraction that this rank has done.
    """
    rank, world_size = rank_and_world()
    mine = range(rank, count, world_size)
    scores, notes, done = torch.zeros(count, dtype=torch.float64), Counter[str](), 0
    for first in range(0, len(mine), EXAMPLES_SORTED):
        prepared = [(i, prepare(i)) for i in mine[first:first + EXAMPLES_SORTED]]
        number = {id(example): i for i, example in prepared if example is not None}
        scores[[i for i, example in prepared if example is None]] = torch.nan
        done += len(prepared) - len(number)
        for batch in batches_by_length([example for _, example in prepared if example is not None], TOKENS_PER_FORWARD[torch.device(device).type]):
            for example, value in zip(batch, score(batch), strict=True):
                scores[number[id(example)]] = float(value)
                notes.update(example.notes)
            done += len(batch)
            if progress is not None:
                progress(done / len(mine))
    if world_size > 1:
        everyones: list[Any] = [None] * world_size
        dist.all_gather_object(everyones, notes)
        notes = sum(everyones, Counter())
    return sum_over_ranks(scores), dict(notes)

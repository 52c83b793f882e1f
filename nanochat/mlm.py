"""Masked language modelling (BERT, 1810.04805): hidden tokens are told from what stands around them, on both sides.

Of the tokens 15 % are to be told; of these 80 % are replaced by the mask, 10 % by any token, and 10 % stay, so that the model cannot rely on seeing what is to
be told. `static` hides of a row the same tokens whenever it comes (BERT, which prepared its data once), `dynamic` others each time (RoBERTa, 1907.11692).
"""
import math
import zlib
from collections.abc import Iterator

import torch
import torch.nn.functional as F

from nanochat.tokenizer import special_ids

MASK = "<|output_end|>"  # nanochat's vocabulary has no mask; this stands in no text that is pretrained on
MASKINGS = ("dynamic", "static")


class Masking:
    """Makes batches to train on. rate: share of the tokens to be told."""

    def __init__(self, tokenizer, rate: float = 0.15, static: bool = False):
        self.mask, self.rate, self.static = tokenizer.encode_special(MASK), rate, static
        self.special = torch.tensor(sorted(special_ids(tokenizer)))
        self.vocab_size = tokenizer.get_vocab_size()

    def __call__(self, tokens: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """tokens (B, T) -> inputs and targets (B, T); the targets are the tokens where they are to be told, and -1. Special ones never are.

        Dynamic masks come from PyTorch's global generator, whose state a checkpoint holds.
        """
        shape, device = tokens.shape, tokens.device
        if self.static:
            rows = [self._draws(shape[1:], torch.Generator().manual_seed(zlib.crc32(row.tobytes()))) for row in tokens.cpu().numpy()]
            chance, fate, others = (torch.stack(drawn).to(device) for drawn in zip(*rows))
        else:
            chance, fate, others = (drawn.to(device) for drawn in self._draws(shape, None))
        told = (chance < self.rate) & ~torch.isin(tokens, self.special.to(device))
        inputs = torch.where(told & (fate < 0.8), self.mask, tokens)
        inputs = torch.where(told & (fate >= 0.9), others, inputs)
        return inputs, tokens.masked_fill(~told, -1)

    def _draws(self, shape, generator: torch.Generator | None) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        return (torch.rand(shape, generator=generator), torch.rand(shape, generator=generator),
                torch.randint(self.vocab_size, shape, generator=generator))


def told_before(inputs: torch.Tensor, targets: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The same (B, T), but each hidden token is told at the place before it, as a next token would be; nobody tells the first (GPT-BERT, 2410.24159)."""
    return inputs, torch.cat((targets[:, 1:], torch.full_like(targets[:, :1], -1)), dim=1)


@torch.no_grad()
def pseudo_log_likelihoods(model, tokens: list[int], mask: int, special: set[int], rows_at_once: int = 32) -> list[float]:
    """For each token that is not special the log-probability (nats) that it has given all others, when it alone is hidden (Salazar et al. 1910.14659).

    A causal model is asked with attention to both sides, as it was trained by --objective=mixed, and at the place before (`told_before`); the first token
    must be a special one. Costs a forward pass for each token, `rows_at_once` of them together. The sum over a text compares it with another one.
    """
    ids, causal = torch.tensor(tokens, device=model.get_device()), model.config.causal
    hidden = [i for i, token in enumerate(tokens) if token not in special]
    values: list[float] = []
    for places in torch.tensor(hidden, device=ids.device).split(rows_at_once):
        rows = torch.arange(len(places), device=ids.device)
        masked = ids.repeat(len(places), 1)
        masked[rows, places] = mask
        logits = model(masked, both_ways=True)[rows, places - 1] if causal else model(masked)[rows, places]
        values += F.log_softmax(logits.double(), dim=-1).gather(1, ids[places, None])[:, 0].tolist()
    return values


def pseudo_perplexity(model, batches: Iterator, steps: int, tokenizer) -> tuple[float, float]:
    """(exp of the mean pseudo-log-likelihood's negative, bits per byte) over the rows of `steps` batches (tokens, ...)."""
    special = special_ids(tokenizer)
    nats, count, num_bytes = 0.0, 0, 0
    for _, (x, *_) in zip(range(steps), batches):
        for row in x.tolist():
            values = pseudo_log_likelihoods(model, row, tokenizer.encode_special(MASK), special)
            nats, count = nats - sum(values), count + len(values)
            num_bytes += sum(len(tokenizer.decode_single_token_bytes(token)) for token in row if token not in special)
    return math.exp(nats / max(count, 1)), nats / (math.log(2) * max(num_bytes, 1))

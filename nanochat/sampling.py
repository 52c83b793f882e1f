"""From logits to the next token, and what a client may ask for beyond the likeliest one.

Notable, in the order in which it applies:
* `logit_bias` is added
* penalties make tokens less likely that were there before: `repetition_penalty` (Keskar et al., 1909.05858; above 1, prompt included)
  divides positive logits and multiplies negative ones; `presence_penalty + count * frequency_penalty` (OpenAI's; the answer alone) is subtracted
* temperature; 0 takes the likeliest token
* of what is left: the `top_k` likeliest; those with at least `min_p` times the probability of the likeliest (Nguyen et al., 2407.01082);
  the fewest that hold `top_p` of the probability (Holtzman et al., 1904.09751)

Log-probabilities are the model's own, before all of this.
"""
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
import torch.nn.functional as F

COLDEST = 1e-5  # float32 logits of size 15 are 1e-6 apart or equal: below it the likeliest token is all that can come, and nearer to 0 the quotient overflows


@dataclass(frozen=True)
class Sampling:
    temperature: float = 1.0
    top_k: int | None = None  # None or 0: all
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    logit_bias: dict[int, float] = field(default_factory=dict)  # by token id
    seed: int = 42


def sample_next_token(logits: torch.Tensor, rng: torch.Generator | None, temperature: float = 1.0, top_k: int | None = None,
                      top_p: float = 1.0, min_p: float = 0.0) -> torch.Tensor:
    """Token ids (B, 1) drawn from logits (B, V). Temperature 0 takes the likeliest; top_k None or 0, top_p 1 and min_p 0 keep all tokens."""
    assert temperature >= 0, "temperature must be 0 or more"
    if temperature < COLDEST:
        return logits.argmax(dim=-1, keepdim=True)
    ids = None
    if top_k is not None and top_k > 0:
        logits, ids = logits.topk(min(top_k, logits.size(-1)), dim=-1)
    elif top_p < 1:
        logits, ids = logits.sort(dim=-1, descending=True)
    probs = F.softmax(logits / temperature, dim=-1)
    if min_p > 0:
        probs = probs.masked_fill(probs < min_p * probs.amax(dim=-1, keepdim=True), 0)
    if top_p < 1:  # they come in descending order
        before = probs.cumsum(dim=-1) - probs
        probs = probs.masked_fill((before > 0) & (before >= top_p * probs.sum(dim=-1, keepdim=True)), 0)
    choice = torch.multinomial(probs, num_samples=1, generator=rng)
    return choice if ids is None else ids.gather(-1, choice)


class Sampler:
    """Draws the tokens of one answer: its random stream, and what the penalties have to remember."""

    def __init__(self, sampling: Sampling, prompt: list[int], vocab_size: int, device: torch.device):
        self.sampling = sampling
        self.rng = torch.Generator(device=device).manual_seed(sampling.seed)
        self.bias: torch.Tensor | None = None  # (V,) each
        self.seen: torch.Tensor | None = None
        self.counts: torch.Tensor | None = None
        if sampling.logit_bias:
            self.bias = torch.zeros(vocab_size, device=device)
            self.bias[list(sampling.logit_bias)] = torch.tensor(list(sampling.logit_bias.values()), dtype=torch.float32, device=device)
        if sampling.repetition_penalty != 1:
            self.seen = torch.zeros(vocab_size, dtype=torch.bool, device=device)
            self.seen[prompt] = True
        if sampling.frequency_penalty or sampling.presence_penalty:
            self.counts = torch.zeros(vocab_size, device=device)

    def draw(self, logits: torch.Tensor) -> torch.Tensor:
        """The next token's id (1, 1) from logits (1, V)."""
        sampling = self.sampling
        if self.bias is not None:
            logits = logits + self.bias
        if self.seen is not None:
            penalty = sampling.repetition_penalty
            logits = torch.where(self.seen, torch.where(logits > 0, logits / penalty, logits * penalty), logits)
        if self.counts is not None:
            logits = logits - sampling.frequency_penalty * self.counts - sampling.presence_penalty * (self.counts > 0)
        return sample_next_token(logits, self.rng, sampling.temperature, sampling.top_k, sampling.top_p, sampling.min_p)

    def add(self, token: int) -> None:
        """Remembers a token of the answer."""
        if self.seen is not None:
            self.seen[token] = True
        if self.counts is not None:
            self.counts[token] += 1


class Scores(NamedTuple):
    """Natural log-probabilities where one token stands: its own, and those of the likeliest ones there, (id, log-probability) in descending order."""
    logprob: float
    top: list[tuple[int, float]]


def score(logits: torch.Tensor, tokens: Sequence[int], top: int) -> list[Scores]:
    """Scores of N tokens, of logits (N, V)."""
    logprobs = F.log_softmax(logits.float(), dim=-1)
    own = logprobs.gather(-1, torch.tensor(tokens, device=logits.device)[:, None]).squeeze(-1).tolist()
    best, ids = (column.tolist() for column in logprobs.topk(min(top, logprobs.size(-1)), dim=-1))
    return [Scores(logprob, list(zip(row_ids, row))) for logprob, row, row_ids in zip(own, best, ids)]

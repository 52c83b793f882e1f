"""What a batch teaches: each loss is summed over a batch, and the train loop divides it by the number of the batch's targets.

A batch is a tuple of tensors with one row per sequence, so that it can be cut where memory is short: inputs (B, T) and targets (B, T), -1 where there is
nothing to learn, and whatever else a loss wants to know of a row. A new loss is a function here; a new objective of pretraining is a line in the
registry, which says what its batches are made of.

**Mixed** (GPT-BERT, 2410.24159): some batches are causal, the others masked, and one model learns both. In a masked one attention looks both ways, and a
hidden token is told at the place before it, where the causal ones tell theirs too ("masked next-token prediction"). A pass is of one kind, which follows
from its number in the run: so a resumed run sees the same, on any number of ranks, and the mean loss of each pass weighs as much as any other's, however few
tokens are hidden in it.
"""
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch

from nanochat.cli import UsageError, flag, fraction
from nanochat.mlm import MASKINGS, Masking, told_before

Loss = Callable[..., torch.Tensor]


def cross_entropy(model, inputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Of the targets, in nats: the next tokens, what the assistant says, or the hidden tokens."""
    return model(inputs, targets, loss_reduction="sum")


def policy_gradient(model, inputs: torch.Tensor, targets: torch.Tensor, advantages: torch.Tensor) -> torch.Tensor:
    """REINFORCE: minus the log-probability of each sampled token times the advantage of its sequence; advantages (B,)."""
    nats = model(inputs, targets, loss_reduction="none").view_as(inputs)
    return (nats * advantages[:, None]).sum()


def causal_or_masked(model, inputs: torch.Tensor, targets: torch.Tensor, both_ways: torch.Tensor) -> torch.Tensor:
    """Cross-entropy of a batch that is of one kind; both_ways (B,), bool, on the CPU: does attention see what comes after?"""
    return model(inputs, targets, loss_reduction="sum", both_ways=bool(both_ways[0]))


class Objective(NamedTuple):
    """One of pretraining."""

    prepare: Callable  # (tokenizer, settings) -> a function of (tokens, the tokens after each, number of the pass in the run) that makes a batch of them
    loss: Loss = cross_entropy
    causal: bool = True  # is attention confined to what came before?


def _masking(tokenizer, settings: "ObjectiveSettings") -> Masking:
    return Masking(tokenizer, settings.mask_rate, settings.masking == "static")


def _hidden_tokens(tokenizer, settings: "ObjectiveSettings") -> Callable:
    masking = _masking(tokenizer, settings)
    return lambda tokens, following, number: masking(tokens)


def _in_turn(tokenizer, settings: "ObjectiveSettings") -> Callable:
    """Passes of both kinds, as evenly as their shares allow: of 4 the first is masked at a causal share of 0.75."""
    masking, share = _masking(tokenizer, settings), settings.causal_share

    def prepare(tokens: torch.Tensor, following: torch.Tensor, number: int) -> tuple[torch.Tensor, ...]:
        masked = math.floor((number + 1) * share) == math.floor(number * share)
        return *(told_before(*masking(tokens)) if masked else (tokens, following)), torch.full((len(tokens),), masked)
    return prepare


OBJECTIVES = {
    "next-token": Objective(lambda tokenizer, settings: lambda tokens, following, number: (tokens, following)),
    "mlm": Objective(_hidden_tokens, causal=False),
    "mixed": Objective(_in_turn, causal_or_masked),
}


@dataclass
class ObjectiveSettings:
    """The flags of pretraining's objective."""

    objective: str = flag("next-token", "What is learned; next-token: the next token, mlm: hidden tokens from both sides, mixed: both in turn",
                          choices=tuple(OBJECTIVES))
    mask_rate: float = flag(0.15, "Share of the tokens that mlm and mixed hide", type=fraction)
    masking: str = flag("dynamic", "Which tokens of a text they hide; dynamic: others each time, static: always the same ones", choices=MASKINGS)
    causal_share: float = flag(0.75, "Share of the passes of mixed that learn the next token; the others learn hidden ones", type=fraction)

    def check_objective(self) -> None:
        """Raises UsageError for an objective with nothing to learn, or with one of two."""
        if self.objective != "next-token" and not self.mask_rate:
            raise UsageError("--mask-rate=0 hides nothing, so there is nothing to learn; use 0.15 or so")
        if self.objective == "mixed" and self.causal_share in (0, 1):
            raise UsageError(f"--causal-share={self.causal_share:g} mixes nothing; use --objective={'next-token' if self.causal_share else 'mlm'}, or a share between 0 and 1")

"""What a batch teaches: each loss is summed over a batch, and the train loop divides it by the number of the batch's targets.

A batch is a tuple of tensors with one row per sequence, so that it can be cut where memory is short: inputs (B, T) and targets (B, T), -1 where there is
nothing to learn, and whatever else a loss wants to know of a row. A new loss is a function here; a new objective of pretraining is a line in the
registry, which says what its batches are made of.
"""
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch

from nanochat.cli import flag, fraction
from nanochat.mlm import MASKINGS, Masking

Loss = Callable[..., torch.Tensor]


def cross_entropy(model, inputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Of the targets, in nats: the next tokens, what the assistant says, or the hidden tokens."""
    return model(inputs, targets, loss_reduction="sum")


def policy_gradient(model, inputs: torch.Tensor, targets: torch.Tensor, advantages: torch.Tensor) -> torch.Tensor:
    """REINFORCE: minus the log-probability of each sampled token times the advantage of its sequence; advantages (B,)."""
    nats = model(inputs, targets, loss_reduction="none").view_as(inputs)
    return (nats * advantages[:, None]).sum()


@dataclass
class ObjectiveSettings:
    """The flags of pretraining's objective."""

    objective: str = flag("next-token", "What is learned; next-token: the next token, mlm: hidden tokens from both sides", choices=("next-token", "mlm"))
    mask_rate: float = flag(0.15, "Share of the tokens that mlm hides", type=fraction)
    masking: str = flag("dynamic", "Which tokens of a text mlm hides; dynamic: others each time, static: always the same ones", choices=MASKINGS)


class Objective(NamedTuple):
    """One of pretraining."""

    prepare: Callable  # (tokenizer, settings) -> a function of (tokens, the tokens after each) that makes a batch of them
    loss: Loss = cross_entropy
    causal: bool = True  # is attention confined to what came before?


OBJECTIVES = {
    "next-token": Objective(lambda tokenizer, settings: lambda tokens, following: (tokens, following)),
    "mlm": Objective(lambda tokenizer, settings: Masking(tokenizer, settings.mask_rate, settings.masking == "static"), causal=False),
}

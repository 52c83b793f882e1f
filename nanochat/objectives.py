"""What a batch teaches: each objective gives the summed loss of a batch, which the train loop divides by the number of its targets.

A batch is a tuple of tensors with one row per sequence, so that it can be cut where memory is short: inputs (B, T) and targets (B, T), -1 where there is
nothing to learn, and whatever else an objective wants to know of a row. A new objective is a function here and a line in the registry; what its
batches are made of is said where they are made (dataloader.py, scripts/chat_rl.py).
"""
from collections.abc import Callable

import torch


def next_token(model, inputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Cross-entropy of the targets in nats. Of a conversation the targets are what the assistant says."""
    return model(inputs, targets, loss_reduction="sum")


def policy_gradient(model, inputs: torch.Tensor, targets: torch.Tensor, advantages: torch.Tensor) -> torch.Tensor:
    """REINFORCE: minus the log-probability of each sampled token times the advantage of its sequence; advantages (B,)."""
    nats = model(inputs, targets, loss_reduction="none").view_as(inputs)
    return (nats * advantages[:, None]).sum()


Objective = Callable[..., torch.Tensor]

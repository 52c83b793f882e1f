"""One optimizer step in passes that fit into memory: where it runs out, passes are halved and the step is repeated."""
import gc
import itertools
from collections.abc import Iterator

import torch
import torch.distributed as dist

from nanochat.cli import UsageError, is_out_of_memory
from nanochat.common import is_ddp_initialized
from nanochat.gpt import GPT
from nanochat.objectives import Loss, cross_entropy
from nanochat.optim import MuonAdamW


def release_memory(device: torch.device) -> None:
    """Gives back what nothing refers to any longer, after a growth or a failed attempt."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def fit_device_batch(model: GPT, rows: int, sequence_len: int) -> int:
    """The most rows per pass that fit, found by trying: the divisors of `rows` (this rank's rows per step), largest first.

    On a CPU memory is not the limit: about 8,192 tokens per pass keep both cores and caches busy.
    """
    device = model.get_device()
    if device.type == "cpu":
        best = max(1, 8192 // sequence_len)
        return next(n for n in range(min(best, rows), 0, -1) if rows % n == 0)
    # what the optimizer will need on top: two moments at most, and the gathered updates
    reserve_bytes = sum(3 * p.numel() * p.element_size() for p in model.parameters())
    for n in (n for n in range(rows, 0, -1) if rows % n == 0):
        try:
            reserve = torch.empty(reserve_bytes, dtype=torch.uint8, device=device)
            tokens = torch.zeros(n, sequence_len, dtype=torch.long, device=device)
            model(tokens, tokens).backward()
            fits = True
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            fits = False
        finally:
            reserve = tokens = torch.empty(0)  # noqa: F841 (frees the memory)
            model.zero_grad(set_to_none=True)
            release_memory(device)
        if fits:
            break
    else:
        raise UsageError("not even one row fits in this device's memory; lower --depth or --max-seq-len")
    if is_ddp_initialized():
        smallest = torch.tensor(n, device=device)
        dist.all_reduce(smallest, op=dist.ReduceOp.MIN)
        n = int(smallest)
    return n


class Accumulator:
    """Forward and backward over the batches of one step, in passes of as many rows as fit."""

    def __init__(self, model, raw_model: GPT, scaler, loss: Loss = cross_entropy):
        self.model, self.raw_model, self.scaler, self.loss = model, raw_model, scaler, loss
        self.rows: int | None = None  # rows per pass, None: whole batches

    def __call__(self, batches: Iterator, count: int) -> list[torch.Tensor]:
        """Adds up the gradient of the mean loss of `count` batches (objectives.py); returns the loss of each.

        Batches are drawn one by one, so that reading the next overlaps with the device's work. When memory runs out,
        the step starts again with the same batches and half the rows per pass.
        """
        drawn: list = []
        batches = iter(batches)

        def draw():
            while True:
                try:
                    batch = next(batches, None)
                except RuntimeError as error:
                    if not is_out_of_memory(error):
                        raise
                    raise UsageError("out of memory while the batches of a step were made (in chat_rl: answers sampled); lower --device-batch-size") from None
                if batch is None:
                    return
                drawn.append(batch)
                yield batch

        rest = draw()
        while True:
            try:
                return [self._one(batch, count) for batch in itertools.chain(tuple(drawn), rest)]
            except RuntimeError as error:
                if not is_out_of_memory(error):
                    raise
                rows = self.rows or drawn[-1][0].size(0)
                if rows == 1:
                    raise UsageError("out of memory with one row per pass; lower --depth or --max-seq-len") from None
                self.rows = -(-rows // 2)
            self.raw_model.zero_grad(set_to_none=True)
            release_memory(self.raw_model.get_device())
            print(f"Out of memory: {self.rows} rows per pass from here on, the same batches", flush=True)

    def _one(self, batch: tuple[torch.Tensor, ...], count: int) -> torch.Tensor:
        """Adds the gradient of the mean loss over one batch's targets, divided by `count`; returns that mean."""
        rows = self.rows or batch[0].size(0)
        trained = (batch[1] >= 0).sum().clamp(min=1)
        loss = torch.zeros((), device=batch[0].device)
        for piece in zip(*(tensor.split(rows) for tensor in batch), strict=True):
            mean = self.loss(self.model, *piece) / trained
            (self.scaler.scale(mean / count) if self.scaler else mean / count).backward()
            loss = loss + mean.detach()
        return loss


def optimizer_step(optimizer: MuonAdamW, scaler) -> None:
    """Raises UsageError when memory runs out: the activations are gone by now, so fewer rows per pass would not help."""
    try:
        _optimizer_step(optimizer, scaler)
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        raise UsageError("out of memory in the optimizer's step: this device is too small for the weights, their gradients and the optimizer's state; "
                         "lower --depth, or share the state among more ranks") from None


def _optimizer_step(optimizer: MuonAdamW, scaler) -> None:
    if scaler is None:
        optimizer.step()
        return
    scaler.unscale_(optimizer)
    if is_ddp_initialized():  # every rank skips the step, or none
        for found_inf in scaler._found_inf_per_device(optimizer).values():
            dist.all_reduce(found_inf, op=dist.ReduceOp.MAX)
    scaler.step(optimizer)
    scaler.update()

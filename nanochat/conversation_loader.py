"""Batches for fine-tuning: rows packed with whole conversations, of which only what the assistant says is a target."""
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist

from nanochat.cli import UsageError
from nanochat.common import get_dist_info, is_ddp_initialized


def pack_conversations(dataset, tokenizer, B: int, T: int, device: str | torch.device, num_iterations: int = -1, buffer_size: int = 100,
                       resume_state: dict[str, Any] | None = None) -> Iterator[tuple[torch.Tensor, torch.Tensor, dict[str, Any]]]:
    """Endless (inputs int32 (B, T), targets int64 (B, T), state) of this rank, which reads every W-th conversation.

    A row takes the longest buffered conversation that still fits, until none does; then it is padded. Targets are -1 where the
    assistant does not speak. Conversations longer than a row wait until they are more than 9/10 of the buffer, then the first is cut
    to a row, or left out if it has no answer within that. So every row has something to learn.

    state: `progress` through the run (1 at its end) and whether it is at its end, `epoch`, and the position in the data, from which
    `resume_state` continues exactly. The run ends after `num_iterations` batches, or when all conversations were used.
    """
    _, rank, _, world_size = get_dist_info()
    capacity = T + 1  # a row holds its inputs and the last target
    size, bos = len(dataset), tokenizer.get_bos_token_id()
    if size < world_size:
        raise UsageError(f"{size} conversations are too few for {world_size} processes; use fewer, or more data")

    def render(index: int) -> tuple[int, list[int], list[int]]:
        ids, mask = tokenizer.render_conversation(dataset[index], max_tokens=max(2048, capacity))
        return index, ids, mask

    cursor, epoch, consumed, iteration = rank, 1, rank, 0
    buffer: list[tuple[int, list[int], list[int]]] = []
    if resume_state is not None:
        cursor, epoch, consumed, iteration = (resume_state[key] for key in ("cursor", "epoch", "consumed", "iteration"))
        for index, length in resume_state["buffer"]:
            if index >= size or len((conversation := render(index))[1]) != length:
                raise UsageError("the conversations or the tokenizer changed since the checkpoint was written; bring the old ones back, or start a new run")
            buffer.append(conversation)

    def refill() -> None:
        nonlocal cursor, epoch
        while len(buffer) < buffer_size:
            buffer.append(render(cursor))
            cursor += world_size
            if cursor >= size:
                cursor, epoch = cursor % size, epoch + 1

    def take(room: int) -> tuple[list[int], list[int]] | None:
        """The longest conversation of at most `room` tokens, None if there is none; or one that is longer than a row, cut to it.

        Nothing is left of one without an answer.
        """
        fitting = [position for position, (_, ids, _) in enumerate(buffer) if len(ids) <= room]
        if room == capacity and len(fitting) < len(buffer) / 10:
            chosen = next(position for position, (_, ids, _) in enumerate(buffer) if len(ids) > capacity)
        elif fitting:
            chosen = max(fitting, key=lambda position: len(buffer[position][1]))
        else:
            return None
        _, ids, mask = buffer.pop(chosen)
        return (ids[:room], mask[:room]) if any(mask[:room]) else ([], [])

    cuda = torch.device(device).type == "cuda"
    while True:
        rows = torch.full((B, capacity), bos, dtype=torch.long, pin_memory=cuda)
        learned = torch.zeros((B, capacity), dtype=torch.bool, pin_memory=cuda)
        for row, row_learned in zip(rows.numpy(), learned.numpy(), strict=True):
            filled = tried = 0
            while filled < capacity:
                refill()
                if (taken := take(capacity - filled)) is None:
                    break
                end = filled + len(taken[0])
                row[filled:end], row_learned[filled:end] = taken
                filled = end
                consumed += world_size
                tried += 1
                if filled == 0 and tried > size:
                    raise UsageError(f"no conversation has an answer within a context of {T} tokens; raise --max-seq-len")
        iteration += 1
        progress = iteration / num_iterations if num_iterations > 0 else consumed / size
        state = {"progress": progress, "last": progress >= 1, "epoch": epoch, "cursor": cursor, "consumed": consumed, "iteration": iteration,
                 "buffer": [(index, len(ids)) for index, ids, _ in buffer]}
        rows, learned = rows.to(device, non_blocking=cuda), learned.to(device, non_blocking=cuda)
        yield rows[:, :-1].int(), rows[:, 1:].masked_fill(~learned[:, 1:], -1), state


def furthest(state: dict, device: torch.device) -> tuple[bool, float]:
    """(at the end, progress) of the rank that is furthest, so that all ranks stop at the same step and use the same learning rates."""
    values = torch.tensor([float(state["last"]), state["progress"]], device=device, dtype=torch.float32 if device.type == "mps" else torch.float64)
    if is_ddp_initialized():
        dist.all_reduce(values, op=dist.ReduceOp.MAX)
    last, progress = values.tolist()
    return bool(last), progress

"""What ranks do together: share tensors, follow rank 0's decisions, notice that they differ. With one process all of it does nothing."""
import contextlib
from collections.abc import Callable, Iterator
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from nanochat.cli import UsageError
from nanochat.common import is_ddp_initialized

# PyTorch 2.13 renamed the two collectives
reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor
all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor


def rank_and_world() -> tuple[int, int]:
    """(rank, number of ranks) of the process group; (0, 1) without one."""
    return (dist.get_rank(), dist.get_world_size()) if is_ddp_initialized() else (0, 1)


def share(tensor: torch.Tensor, rank: int = 0) -> torch.Tensor:
    """The tensor, in place, as that rank has it."""
    if is_ddp_initialized():
        dist.broadcast(tensor, rank)
    return tensor


def share_weights(model: torch.nn.Module) -> None:
    """Gives every rank the weights of rank 0: equal seeds give equal numbers only on equal devices, and not from every kernel."""
    for p in model.parameters():
        share(p.data)


def sum_over_ranks(values: torch.Tensor) -> torch.Tensor:
    """Of a tensor on the CPU, on the CPU."""
    if not is_ddp_initialized():
        return values
    values = values.to("cuda" if dist.get_backend() == "nccl" else "cpu")
    dist.all_reduce(values)
    return values.cpu()


def agreed(value: Any) -> Any:
    """What rank 0 has decided, on every rank. For what a rank by itself could see otherwise: files, the clock, sums in another order."""
    if not is_ddp_initialized():
        return value
    box = [value]
    dist.broadcast_object_list(box)
    return box[0]


@contextlib.contextmanager
def patience() -> Iterator[Any]:
    """A group of all ranks, to be made before they part, in which one waits days for another; NCCL takes a rank for lost after ten minutes. None with one process."""
    if not is_ddp_initialized():
        yield None
        return
    group = dist.new_group(backend="gloo", timeout=timedelta(days=2))
    yield group
    dist.destroy_process_group(group)


def of_all_ranks(value: Any, group: Any = None) -> list:
    """Of each rank its value, in their order, on every rank."""
    values = [value] * rank_and_world()[1]
    if is_ddp_initialized():
        dist.all_gather_object(values, value, group=group)
    return values


def attempt(action: Callable[[], Any]) -> UsageError | None:
    """Does it on rank 0, and if that can on the others, which find what rank 0 has fetched. The first UsageError, on every rank, or None."""
    with patience() as group:
        for my_turn in (rank_and_world()[0] == 0, rank_and_world()[0] != 0):
            reason = ""
            try:
                if my_turn:
                    action()
            except UsageError as error:
                reason = str(error)
            if failed := next(filter(None, of_all_ranks(reason, group)), None):
                return UsageError(failed)
    return None


def check_agreement(what: str, value: Any, advice: str) -> None:
    """Raises UsageError on every rank if they do not all have the same value, where one that differs would make all wait for ever."""
    values = of_all_ranks(value)
    different = next((rank for rank, other in enumerate(values) if other != values[0]), None)
    if different is None:
        return
    mine, theirs = values[0], values[different]
    if isinstance(mine, dict) and isinstance(theirs, dict):  # only what differs
        keys = [key for key in mine | theirs if mine.get(key) != theirs.get(key)]
        mine, theirs = ({key: value.get(key) for key in keys} for value in (mine, theirs))
    raise UsageError(f"the ranks do not agree on {what}: rank 0 has {mine}, rank {different} has {theirs}; {advice}")

"""How the optimizer's state is shared out among ranks, and how it becomes whole again.

* AdamW: each rank keeps its rows of the moments, or all of them where they are few or cannot be shared evenly
* Muon: each matrix is updated by one rank, which keeps its buffers, as one stack for each group
* a whole state is a mapping: parameter name -> its moments, unsharded and unstacked. It may come from the ranks that are here
  (`GatheredState`) or from the files of a run of any number of them (`SavedState`); each entry is put together when it is asked for

Two layouts say who updates a matrix. nanochat's gives ceil(K/W) of a group's K matrices to each of W ranks until none are left, so its files can be read
and written; it is that of stock models, of which all layers are alike. Where layers differ, groups are small (one matrix for each layer, if each has a
rank of its own): then rank 0 would have all the work, and the others empty places of the same size in memory and in the
collectives. There the matrices of all groups are dealt (`deal`), and the groups say so: the layout is in the file, not in this code.
"""
from collections.abc import Iterable, Iterator, Mapping, Sequence

import torch
import torch.distributed as dist

from nanochat.common import is_ddp_initialized
from nanochat.distributed import all_gather, rank_and_world, share

SHARDED_FROM = 1024  # elements of a parameter of AdamW's; smaller ones, and those whose rows cannot be shared evenly, are updated on every rank


def is_sharded(p: torch.Tensor, world: int) -> bool:
    """Whether each rank updates only its rows of this parameter of AdamW's."""
    return world > 1 and p.numel() >= SHARDED_FROM and p.size(0) % world == 0


def deal(groups: Iterable[dict], world: int) -> None:
    """Writes into each Muon group which rank updates which matrix, `owners`: the costliest first, each to the rank that has the least to do.

    Leaves nanochat's layout where its busiest rank has no more to do than here.
    """
    def cost(group: dict) -> int:  # multiplications of an iteration of Polar Express: A = X X^T, A A and B X
        short, long = sorted(group["params"][0].shape)
        return short * short * (2 * long + short)

    groups = [group for group in groups if group["kind"] == "muon" and group["params"]]
    nanochats, work = [0] * world, [0] * world
    dealt: list[list[int]] = []
    for group in sorted(groups, key=cost, reverse=True):
        dealt.append([])
        for rank in owners(group, world):
            nanochats[rank] += cost(group)
            dealt[-1].append(work.index(min(work)))
            work[dealt[-1][-1]] += cost(group)
    if max(work, default=0) < max(nanochats, default=0):
        for group, ranks in zip(sorted(groups, key=cost, reverse=True), dealt, strict=True):
            group["owners"] = ranks


def owners(group: dict, world: int) -> list[int]:
    """The rank that updates each matrix of a Muon group: as dealt, else as in nanochat, ceil(K/W) to each rank for as long as there are any."""
    count = len(group["params"])
    return group.get("owners") or [i // -(-count // world) for i in range(count)]


def owner_of(group: dict, i: int, world: int) -> tuple[int, int]:
    """(the rank that updates the matrix i of a Muon group, its place in that rank's stack)."""
    ranks = owners(group, world)
    return ranks[i], ranks[:i].count(ranks[i])


def moment_shapes(group: dict, p: torch.Tensor) -> dict[str, tuple[int, ...]]:
    """Of a whole parameter's state."""
    if group["kind"] == "adamw":
        return {"exp_avg": tuple(p.shape), "exp_avg_sq": tuple(p.shape)}
    rows, columns = p.shape
    return {"momentum_buffer": (rows, columns), "second_momentum_buffer": (rows, 1) if rows >= columns else (1, columns)}


def kept_shapes(group: dict, rank: int, world: int) -> Iterator[tuple[torch.Tensor, dict[str, tuple[int, ...]]]]:
    """What a rank keeps of a group: pairs of the parameter that it is kept with and the shapes."""
    params = group["params"]
    if group["kind"] == "adamw":
        for p in params:
            shapes = moment_shapes(group, p)
            yield p, {key: (shape[0] // world, *shape[1:]) for key, shape in shapes.items()} if is_sharded(p, world) else shapes
    elif params:
        # nanochat's shards have places for ceil(K/W) matrices on all ranks, dealt ones just for those that there are
        count = group["owners"].count(rank) if "owners" in group else -(-len(params) // world)
        yield params[0], {key: (count, *shape) for key, shape in moment_shapes(group, params[0]).items()}


def stacks(row: torch.Tensor, groups: list[dict], rank: int, world: int) -> list[torch.Tensor]:
    """The matrices of a rank in its row of a flat buffer, one stack (K, R, C) for each group, K = 0 where it has none."""
    views, start = [], 0
    for group in groups:
        count, shape = owners(group, world).count(rank), group["params"][0].shape
        end = start + count * shape.numel()
        views.append(row[start:end].view(count, *shape))
        start = end
    return views


def matrices(buffer_WN: torch.Tensor, groups: list[dict]) -> list[torch.Tensor]:
    """The place of each matrix (R, C) of these Muon groups in a buffer with a row for each rank, in the order of the parameters."""
    world = buffer_WN.size(0)
    rest = [[iter(stack) for stack in stacks(row, groups, rank, world)] for rank, row in enumerate(buffer_WN)]
    return [next(rest[rank][number]) for number, group in enumerate(groups) for rank in owners(group, world)]


# -----------------------------------------------------------------------------
# Whole states of a MuonAdamW

State = Mapping[str, dict]


class _ByName(Mapping):
    places: dict[str, tuple]  # parameter name -> where its moments are

    def __iter__(self) -> Iterator[str]:
        return iter(self.places)

    def __contains__(self, name: object) -> bool:
        return name in self.places

    def __len__(self) -> int:
        return len(self.places)


class GatheredState(_ByName):
    """Of an optimizer whose ranks are all here. They must ask alike: every entry is a collective."""

    def __init__(self, optimizer):
        self.optimizer, self.world = optimizer, rank_and_world()[1]
        self.places = {optimizer.names[p]: (group, i) for group in optimizer.param_groups for i, p in enumerate(group["params"])
                       if optimizer.state.get(p if group["kind"] == "adamw" else group["params"][0])}

    def __getitem__(self, name: str) -> dict:
        group, i = self.places[name]
        if group["kind"] == "adamw":
            p = group["params"][i]
            return {key: gathered(value) if torch.is_tensor(value) and value.shape != p.shape else value for key, value in self.optimizer.state[p].items()}
        owner, slot = owner_of(group, i, self.world)
        return {key: from_owner(stack, owner, slot) for key, stack in self.optimizer.state[group["params"][0]].items()}


def gathered(shard: torch.Tensor) -> torch.Tensor:
    """The shards of all ranks one after another, along the first dimension."""
    whole = shard.new_empty(dist.get_world_size() * shard.size(0), *shard.shape[1:])
    all_gather(whole, shard.contiguous())
    return whole


def from_owner(stack: torch.Tensor, owner: int, slot: int) -> torch.Tensor:
    """A matrix that a rank has in its stack (K, R, C), on all ranks."""
    if not is_ddp_initialized():
        return stack[slot]
    return share(stack[slot].clone() if dist.get_rank() == owner else stack.new_empty(stack.shape[1:]), owner)


def check_groups(groups: Sequence[dict], saved: Sequence[dict]) -> None:
    """Raises ValueError for saved groups of other parameters, or of another kind of optimizer, whose learning rates are of another size."""
    if [len(group["params"]) for group in groups] != [len(group["params"]) for group in saved]:
        raise ValueError("it has other parameters")
    if [group["kind"] for group in groups] != [group["kind"] for group in saved]:
        raise ValueError("its matrices were updated by another optimizer (--matrix-optimizer)")


class SavedState(_ByName):
    """Of the state dicts that all ranks of a run have saved, for an optimizer of the same model. Raises ValueError if it is of another one."""

    def __init__(self, optimizer, shards: Sequence[dict]):
        self.shards = shards
        for shard in shards:
            check_groups(optimizer.param_groups, shard["param_groups"])
        if any(shard["state"].keys() != shards[0]["state"].keys() for shard in shards):
            raise ValueError("it has other parameters")
        self.places = {}
        for group, saved in zip(optimizer.param_groups, shards[0]["param_groups"], strict=True):
            for i, p in enumerate(group["params"]):
                if self._state(0, saved, i):
                    self.places[optimizer.names[p]] = (saved, i, p.shape)

    def _state(self, rank: int, saved: dict, i: int) -> dict:
        return self.shards[rank]["state"].get(saved["params"][i if saved["kind"] == "adamw" else 0], {})

    def __getitem__(self, name: str) -> dict:
        saved, i, shape = self.places[name]
        if saved["kind"] == "adamw":
            states = [self._state(rank, saved, i) for rank in range(len(self.shards))]
            return {key: value if not torch.is_tensor(value) or value.shape == shape else torch.cat([state[key] for state in states])
                    for key, value in states[0].items()}
        owner, slot = owner_of(saved, i, len(self.shards))
        return {key: stack[slot] for key, stack in self._state(owner, saved, i).items()}

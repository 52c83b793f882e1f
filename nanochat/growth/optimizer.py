"""The optimizer's state, carried over a growth.

A gradient of the grown model is G' = Rᵀ G Sᵀ. So first moments are transformed by that, and Adam's second moments by the squared
coefficients (each entry of G' is one entry of G, times a number). NorMuon's second moments belong to orthogonalized, hence
scale-free updates: those of rows are copied, those of columns get the squared coefficients. Fresh entries have first moments of 0 and the
mean second moments: the step counter goes on, and with zeros their first steps would be several times too large.

Exact, in the sense that the moments are those of the large model trained along the small one's trajectory, where there is no noise,
no key head serves queries of different shares and no channel that a gate reads has a copy. Noise lets through parts of
the gradient that the small model has no notion of; what is transported is then the share that it knows.

Shards: with several ranks all of them go through the parameters of the grown model together. Each parameter's state is gathered, transformed,
cut to the shard that this rank keeps, and forgotten, so that no rank ever holds more than one unsharded.
"""
from collections.abc import Iterator, Mapping

import torch
import torch.distributed as dist

from nanochat.common import is_ddp_initialized, share
from nanochat.gpt import GPT
from nanochat.growth.expand import apply, in_float64
from nanochat.growth.maps import Map, Maps, along, mapped
from nanochat.optim import SMALL, MuonAdamW, all_gather

State = Mapping[str, dict]  # parameter name -> its moments, unsharded and unstacked


def leave_out_frozen(optimizer: MuonAdamW) -> MuonAdamW:
    """Takes parameters that want no gradient out of their groups: they are not updated and have no state."""
    for group in optimizer.param_groups:
        group["params"] = [p for p in group["params"] if p.requires_grad]
    return optimizer


class Moments(Mapping):
    """The moments of every parameter that has any, by name, unsharded: each is gathered when it is asked for, so all ranks must ask alike."""

    def __init__(self, model: GPT, optimizer: MuonAdamW):
        names = {p: name for name, p in model.named_parameters()}
        self.optimizer = optimizer
        self.places = {names[p]: (group, i) for group in optimizer.param_groups for i, p in enumerate(group["params"])
                       if optimizer.state.get(p if group["kind"] == "adamw" else group["params"][0])}

    def __iter__(self) -> Iterator[str]:
        return iter(self.places)

    def __len__(self) -> int:
        return len(self.places)

    def __getitem__(self, name: str) -> dict:
        group, i = self.places[name]
        if group["kind"] == "adamw":
            p = group["params"][i]
            return {key: gathered(value) if torch.is_tensor(value) and value.shape != p.shape else value for key, value in self.optimizer.state[p].items()}
        return {key: from_owner(stack, i) for key, stack in self.optimizer.state[group["params"][0]].items()}  # the group's state is kept with its first parameter


def gathered(shard: torch.Tensor) -> torch.Tensor:
    """The shards of all ranks one after another, along the first dimension."""
    whole = shard.new_empty(dist.get_world_size() * shard.size(0), *shard.shape[1:])
    all_gather(whole, shard.contiguous())
    return whole


def from_owner(stack: torch.Tensor, i: int) -> torch.Tensor:
    """The matrix i of a Muon group, of which every rank holds a stack of equally many."""
    owner, slot = divmod(i, stack.size(0))
    return share(stack[slot].clone() if is_ddp_initialized() else stack[slot], owner)


def full_state(model: GPT, optimizer: MuonAdamW) -> dict[str, dict]:
    """The moments of every parameter that has any, all at once. All ranks must call it."""
    return dict(Moments(model, optimizer))


def load_full_state(model: GPT, optimizer: MuonAdamW, whole: State, rank: int | None = None, world: int | None = None) -> None:
    """Gives `optimizer` one rank's shard, by default this one's. Parameters without an entry start fresh."""
    ours = rank is None or world is None
    if rank is None or world is None:
        rank, world = (dist.get_rank(), dist.get_world_size()) if is_ddp_initialized() else (0, 1)
    names = {p: name for name, p in model.named_parameters()}
    for group in optimizer.param_groups:
        params = group["params"]
        if group["kind"] == "adamw":
            for p in params:
                if "exp_avg" in (state := whole.get(names[p], {})):
                    if world > 1 and p.numel() >= SMALL and p.size(0) % world == 0:  # sharded, as in MuonAdamW
                        part = lambda value: value.chunk(world)[rank].clone()
                    else:  # every rank has it all, and all must have the same
                        part = lambda value: share(value.clone()) if ours else value.clone()
                    optimizer.state[p] = {key: part(value) if torch.is_tensor(value) else value for key, value in state.items()}
        elif any(names[p] in whole for p in params):
            chunk = -(-len(params) // world)
            rows, columns = params[0].shape
            shapes = {"momentum_buffer": (rows, columns), "second_momentum_buffer": (rows, 1) if rows >= columns else (1, columns)}
            stacks = {key: params[0].new_zeros(chunk, *shape) for key, shape in shapes.items()}
            for i, p in enumerate(params):
                state = whole.get(names[p], {})  # also where it is another rank's: they are gathered together
                if i // chunk == rank:
                    for key, value in state.items():
                        stacks[key][i % chunk] = value
            optimizer.state[params[0]] = stacks


def merge_shards(optimizer: MuonAdamW, shards: list[dict]) -> dict:
    """The state dicts that the ranks of a run have saved, as one of a single rank. `optimizer` is that of the same model."""
    merged: dict = {"state": {}, "param_groups": shards[0]["param_groups"]}
    for group, saved in zip(optimizer.param_groups, shards[0]["param_groups"]):
        for p, index in zip(group["params"], saved["params"]):
            if states := [shard["state"][index] for shard in shards if index in shard["state"]]:
                merged["state"][index] = {
                    key: value if not torch.is_tensor(value) or value.shape == p.shape else torch.cat([state[key] for state in states])
                    for key, value in states[0].items()}
    return merged


def transport(state: dict, maps: Maps, shape: torch.Size) -> dict:
    """The moments of one parameter after it has grown to `shape`."""
    moved = {}
    for key, value in state.items():
        if not torch.is_tensor(value):  # the step counter
            moved[key] = value
            continue
        if key == "second_momentum_buffer":
            dim = 0 if value.size(1) == 1 else 1
            if (shape[0] >= shape[1]) != (dim == 0):
                continue  # the matrix has turned from tall to wide, or back
            moment = scale_free(in_float64(value), maps[dim], dim)
        elif key == "exp_avg_sq":
            moment = mean_if_fresh(apply(in_float64(value), maps, of_gradient=True, power=2), maps)
        else:
            moment = apply(in_float64(value), maps, of_gradient=True)
        moved[key] = moment.to(value.dtype).to(value.device)
    return moved


def scale_free(moment: torch.Tensor, entry: tuple[Map, bool] | None, dim: int) -> torch.Tensor:
    """Of updates whose rows were scaled to equal lengths, and whose columns were not."""
    if entry is None:
        return moment
    lines: Maps = [(entry[0].before_scale(), True), None] if dim == 0 else [None, (entry[0], True)]
    return mean_if_fresh(apply(moment, lines, power=2), lines)


def mean_if_fresh(moment: torch.Tensor, maps: Maps) -> torch.Tensor:
    for dim, map, _ in mapped(maps):
        if map.fresh.any():
            mean = moment.index_select(dim, (~map.fresh).nonzero()[:, 0].to(moment.device)).mean(dim=dim, keepdim=True)
            moment = torch.where(along(map.fresh, dim, moment), mean, moment)
    return moment

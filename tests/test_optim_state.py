"""Every matrix has one rank, ranks have equally much to do, and what they keep is everything, once."""
import weakref
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st

from nanochat.optim import MuonAdamW
from nanochat.optim_state import deal, kept_shapes, matrices, owner_of, owners, stacks
from tests.examples import examples
from tests.ranks import on_ranks
from tests.tiny import identical

HYPER = dict(lr=0.02, momentum=0.95, ns_steps=5, beta2=0.9, weight_decay=0.1)
ADAMW = dict(kind="adamw", lr=0.1, betas=(0.9, 0.99), eps=1e-8, weight_decay=0.0)
SHAPES = [(6, 4), (6, 4), (6, 4), (4, 8), (16, 2), (5, 5), (5, 5)]  # four groups of 3, 1, 1 and 2: fewer matrices than three or four ranks


def muon(*shapes: tuple[int, int]) -> list[dict]:
    return [dict(kind="muon", params=[torch.nn.Parameter(torch.zeros(shape)) for other in shapes if other == shape], **HYPER) for shape in dict.fromkeys(shapes)]


def work(group: dict) -> int:
    short, long = sorted(group["params"][0].shape)
    return short ** 2 * (2 * long + short)


def busiest(groups: list[dict], world: int) -> int:
    return max(sum(work(group) * owners(group, world).count(rank) for group in groups) for rank in range(world))


@settings(max_examples=examples(50), deadline=None)
@given(shapes=st.lists(st.tuples(st.integers(1, 9), st.integers(1, 9)), min_size=1, max_size=20), world=st.integers(1, 8), dealt=st.booleans())
def test_every_matrix_has_one_place_on_one_rank(shapes, world, dealt):
    groups = muon(*shapes)
    before = busiest(groups, world)
    if dealt:
        deal(groups, world)
        dealt = "owners" in groups[0]
        assert busiest(groups, world) < before if dealt else busiest(groups, world) == before
        assert busiest(groups, world) <= sum(work(group) * len(group["params"]) for group in groups) / world + max(map(work, groups))
    for group in groups:
        kept = [dict(kept_shapes(group, rank, world))[group["params"][0]]["momentum_buffer"][0] for rank in range(world)]
        places = [owner_of(group, i, world) for i in range(len(group["params"]))]
        assert len(set(places)) == len(places) and all(slot < kept[rank] for rank, slot in places)
        assert sum(kept) == len(places) if dealt else set(kept) == {-(-len(places) // world)}
    width = max(sum(stack.numel() for stack in stacks(torch.zeros(10_000), groups, rank, world)) for rank in range(world))
    buffer = torch.zeros(world, width)
    for number, place in enumerate(matrices(buffer, groups), 1):
        assert not place.any()
        place.fill_(number)
    numbers = iter(range(1, 10 ** 6))
    for group in groups:  # and a rank finds its own, in the order of its stack
        for i in range(len(group["params"])):
            rank, slot = owner_of(group, i, world)
            stack = stacks(buffer[rank], groups, rank, world)[[other is group for other in groups].index(True)]
            assert stack[slot].eq(next(numbers)).all()


def test_ranks_of_each_layer_of_its_own_keep_all_ranks_busy():
    """Eight layers of different low ranks on eight ranks. nanochat's layout gives rank 0 one matrix of each group; the eighth part is what it should have."""
    groups = muon(*(shape for rank in range(8, 16) for shape in [(32, rank)] * 4 + [(rank, 32)] * 4))
    share = sum(work(group) * len(group["params"]) for group in groups) / 8
    assert busiest(groups, 8) == 2 * share
    deal(groups, 8)
    assert busiest(groups, 8) < 1.05 * share


class Watched(dict):
    """A whole state that is made when it is asked for; `most` is how many entries were ever alive at once."""

    def __init__(self, whole):
        super().__init__(whole)
        self.alive, self.most = weakref.WeakSet(), 0

    def __getitem__(self, name):
        state = {key: value.clone() if torch.is_tensor(value) else value for key, value in super().__getitem__(name).items()}
        self.alive.add(next(value for value in state.values() if torch.is_tensor(value)))
        self.most = max(self.most, len(self.alive))
        return state


@pytest.mark.parametrize("world", [1, 2, 5])
def test_no_more_than_one_whole_parameter_is_held(world):
    optimizer, _ = train(lambda *where: gradient(0, *where))
    whole = Watched(optimizer.full_state_dict())
    for rank in range(world):
        optimizer.load_full_state_dict(whole, rank, world)
    assert whole.most == 1


# -----------------------------------------------------------------------------
# On real processes


def train(gradients_of, steps: int = 3) -> tuple[MuonAdamW, list]:
    torch.manual_seed(0)
    sizes = [(64, 48), (48, 32), (5,), *SHAPES]
    params = [torch.nn.Parameter(torch.randn(size)) for size in sizes]
    rest = iter(params[3:])
    groups = [dict(ADAMW, params=params[:3]), *(dict(group, params=[next(rest) for _ in group["params"]]) for group in muon(*SHAPES))]
    optimizer = MuonAdamW(groups, [(f"p{i}", p) for i, p in enumerate(params)], deals=True)
    for step in range(steps):
        for i, p in enumerate(params):
            p.grad = gradients_of(step, i, p)
        optimizer.step()
    return optimizer, params


def gradient(rank: int, step: int, i: int, p: torch.Tensor) -> torch.Tensor:
    return torch.randn(p.shape, generator=torch.Generator().manual_seed(1000 * rank + 100 * step + i))


def worker(folder: Path) -> None:
    rank = dist.get_rank()
    optimizer, params = train(lambda *where: gradient(rank, *where))
    torch.save((params, dict(optimizer.full_state_dict()), optimizer.state_dict()), folder / f"{rank}.pt")
    optimizer.load_full_state_dict(optimizer.full_state_dict())
    assert identical(optimizer.state_dict(), torch.load(folder / f"{rank}.pt")[2])


@pytest.mark.parametrize("world", [2, pytest.param(3, marks=pytest.mark.slow), pytest.param(4, marks=pytest.mark.slow)])
def test_dealt_matrices_on_several_ranks_are_those_of_one(world, tmp_path):
    on_ranks(world, tmp_path, worker, tmp_path)
    optimizer, params = train(lambda *where: torch.stack([gradient(rank, *where) for rank in range(world)]).mean(dim=0))
    saved = [torch.load(tmp_path / f"{rank}.pt", weights_only=False) for rank in range(world)]
    for theirs, whole, _ in saved:
        for p, q in zip(params, theirs):
            torch.testing.assert_close(q, p, rtol=1e-4, atol=1e-5)
        assert identical(whole, saved[0][1]) and whole.keys() == optimizer.full_state_dict().keys()
        for name, state in optimizer.full_state_dict().items():
            torch.testing.assert_close(whole[name], state, rtol=1e-4, atol=1e-5)
    kept = sum(state["momentum_buffer"].numel() for _, _, shard in saved for state in shard["state"].values() if "momentum_buffer" in state)
    assert kept == sum(rows * columns for rows, columns in SHAPES), "each buffer is kept once"
    optimizer.load_shards([shard for _, _, shard in saved])
    assert identical(dict(optimizer.full_state_dict()), saved[0][1])

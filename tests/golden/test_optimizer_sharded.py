"""The sharded optimizer on real processes (gloo) against nanochat's parameters and the state each rank keeps."""
import numpy as np
import pytest
import torch
import torch.distributed as dist

from nanochat.optim import MuonAdamW
from tests.golden import inputs
from tests.golden.fixtures import arrays, load, tensor
from tests.ranks import on_ranks

GOLDEN = load("optimizer_sharded")
CASES = {case["world_size"]: case for case in GOLDEN["cases"]}
SHAPES = [shape for group in GOLDEN["groups"] for shape in group["shapes"]]
SCALES = [group["param_scale"] for group in GOLDEN["groups"] for _ in group["shapes"]]


def gradients(case: dict, step: int, rank: int) -> list:
    return inputs.normals(case["seed"] + 1000 * (step + 1) + 100000 * (rank + 1), SHAPES, [case["grad_scale"]] * len(SHAPES))


def optimize(case: dict, grads_of_step) -> tuple[list, MuonAdamW]:
    params = [torch.nn.Parameter(tensor(value)) for value in inputs.normals(case["seed"], SHAPES, SCALES)]
    rest = iter(params)
    optimizer = MuonAdamW([dict(kind=group["kind"], params=[next(rest) for _ in group["shapes"]], **group["hyper"]) for group in GOLDEN["groups"]])
    for step in range(case["steps"]):
        for p, grad in zip(params, grads_of_step(step), strict=True):
            p.grad = tensor(grad)
        optimizer.step()
    return params, optimizer


def check_params(params: list, world_size: int) -> None:
    expected = arrays("optimizer_sharded")
    for i, p in enumerate(params):
        np.testing.assert_allclose(p.detach(), expected[f"w{world_size}/p{i}"], rtol=0, atol=1e-5)


def worker() -> None:
    """One rank: its own gradients, then the fixture's parameters and its share of the state."""
    rank, case = dist.get_rank(), CASES[dist.get_world_size()]
    params, optimizer = optimize(case, lambda step: gradients(case, step, rank))
    check_params(params, case["world_size"])
    for index, expected in case["state_by_rank"][rank].items():
        state = optimizer.state[params[int(index)]]
        for key, want in expected.items():
            if isinstance(want, dict):
                value = state[key].double()
                assert list(value.shape) == want["shape"], (index, key)
                np.testing.assert_allclose([value.norm(), value.sum()], [want["norm"], want["sum"]], rtol=0, atol=1e-5)
            else:
                assert state[key] == want, (index, key)


@pytest.mark.parametrize("world_size", [2, *(pytest.param(size, marks=pytest.mark.slow) for size in CASES if size > 2)])
def test_ranks(world_size, tmp_path):
    on_ranks(world_size, tmp_path, worker)


@pytest.mark.parametrize("world_size", CASES)
def test_one_rank_fed_the_mean_gradient(world_size):
    case = CASES[world_size]
    params, _ = optimize(case, lambda step: [np.mean(grads, axis=0, dtype=np.float32)
                                             for grads in zip(*(gradients(case, step, rank) for rank in range(world_size)), strict=True)])
    check_params(params, world_size)

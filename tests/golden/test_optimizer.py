"""Single optimizer groups over five steps against nanochat's trajectories, in float32 and bfloat16."""
import os
import subprocess
import sys

import numpy as np
import pytest
import torch

from nanochat.optim import MuonAdamW
from tests.golden import inputs
from tests.golden.fixtures import arrays, load, tensor


def run_case(case: dict, dtype: torch.dtype):
    """Yields (number of steps done, parameters, optimizer) after the first and the fifth step."""
    params = [torch.nn.Parameter(tensor(a).to(dtype)) for a in inputs.optim_params(case["seed"], case["shapes"], case["param_scale"])]
    optimizer = MuonAdamW([dict(kind=case["kind"], params=params, **case["hyper"])])
    for step in range(5):
        grads = inputs.optim_grads(case["seed"], step, case["shapes"], case["grad_scale"], case["zero_rows"], case["all_zero"])
        for p, g in zip(params, grads):
            p.grad = tensor(g).to(dtype)
        if case["hyper_by_step"]:
            optimizer.param_groups[0].update(case["hyper_by_step"][step])
        optimizer.step()
        if step in (0, 4):
            yield step + 1, params, optimizer


@pytest.mark.parametrize("case", load("optimizer")["cases"], ids=lambda case: case["name"])
def test_trajectory(case):
    expected = arrays("optimizer")
    for done, params, optimizer in run_case(case, torch.float32):  # noqa: B007
        for i, p in enumerate(params):
            np.testing.assert_allclose(p.detach(), expected[f"{case['name']}/p{i}/after{done}"], rtol=0, atol=2e-5 * max(1.0, case["largest_change_after5"]))
    for i, state in case["state_after5"].items():
        for key, value in state.items():
            got = optimizer.state[params[int(i)]][key]
            if isinstance(value, list):
                want = expected[f"{case['name']}/state{i}/{key}/after5"]
                np.testing.assert_allclose(got, want, rtol=0, atol=2e-5 * max(float(np.abs(want).max()), 1e-12))
            else:
                assert got == value


def check_bfloat16() -> None:
    """Deviation from the fixture relative to the update's size; run with NANOCHAT_DTYPE=bfloat16."""
    expected = arrays("optimizer_bfloat16")
    for case in load("optimizer_bfloat16")["cases"]:
        before = inputs.optim_params(case["seed"], case["shapes"], case["param_scale"])
        for done, params, _ in run_case(case, torch.bfloat16 if case["kind"] == "adamw" else torch.float32):
            want = [expected[f"{case['name']}/p{i}/after{done}"].astype(np.float64) for i in range(len(params))]
            error = sum(((p.detach().double().numpy() - w) ** 2).sum() for p, w in zip(params, want))
            update = sum(((w - b) ** 2).sum() for w, b in zip(want, before))
            assert (error / update) ** 0.5 <= 0.1, (case["name"], done)


@pytest.mark.slow
def test_bfloat16():
    env = {**os.environ, "NANOCHAT_DTYPE": "bfloat16"}
    subprocess.run([sys.executable, "-c", "from tests.golden.test_optimizer import check_bfloat16; check_bfloat16()"], env=env, check=True)

"""FP8 against the reference. The layer itself is checked by this file run as a program, in bfloat16."""
import os
import subprocess
import sys

import numpy as np
import pytest
import torch

from tests.golden import fixtures, inputs

FP8 = fixtures.load("fp8")


@pytest.mark.parametrize("case", FP8["quantise"], ids=lambda case: f"{case['seed']}-{case['dtype']}")
def test_quantise(case):
    from nanochat.fp8 import _to_fp8
    x, = inputs.normals(case["seed"], [case["shape"]], [case["scale"]])
    values, inv_scale = _to_fp8(fixtures.tensor(x), getattr(torch, case["dtype"]))
    assert values.dtype == getattr(torch, case["dtype"])
    assert values.float().tolist() == case["values"]
    assert float(inv_scale) == pytest.approx(case["inverse_scale"], rel=1e-6)


def check_linear_in_bfloat16():
    from nanochat.fp8 import Float8Linear
    arrays = fixtures.arrays("fp8")
    for i, case in enumerate(FP8["linear"]):
        x, w, grad = map(fixtures.tensor, inputs.normals(
            case["seed"], [(case["rows"], case["inputs"]), (case["outputs"], case["inputs"]), (case["rows"], case["outputs"])], case["scales"]))
        plain = torch.nn.Linear(case["inputs"], case["outputs"], bias=False)
        plain.weight.data = w
        x.requires_grad_(True)
        y = Float8Linear.from_float(plain)(x)
        y.backward(grad.to(y.dtype))
        assert str(y.dtype) == "torch." + case["y_dtype"]
        for name, value in (("y", y), ("grad_x", x.grad), ("grad_w", plain.weight.grad)):
            want = arrays[f"{i}/{name}"]
            off = np.abs(value.detach().float().numpy() - want).max() / np.abs(want).max()
            assert off <= 0.02, f"{name} of case {i} is off by {off}"


@pytest.mark.slow
def test_linear():
    environment = os.environ | {"NANOCHAT_DTYPE": "bfloat16"}
    check = subprocess.run([sys.executable, "-m", "tests.golden.test_fp8"], env=environment, capture_output=True, text=True)
    assert check.returncode == 0, check.stderr


@pytest.mark.parametrize("case", FP8["conversion"], ids=lambda case: f"vocab{case['config']['vocab_size']}")
def test_conversion(case):
    from nanochat.fp8 import Float8Linear, convert_to_float8_training, worth_converting
    model = fixtures.build_model(case["config"], seed=1)
    before, keys = [model.num_matmul_params(), model.estimate_flops()], list(model.state_dict())
    assert sum(isinstance(module, torch.nn.Linear) for module in model.modules()) == case["total_linear"]
    convert_to_float8_training(model, module_filter_fn=worth_converting)
    assert [name for name, module in model.named_modules() if isinstance(module, Float8Linear)] == case["converted"]
    assert list(model.state_dict()) == keys
    # the reference's counts collapse to `after`; an FP8 matmul is as much work as any other
    assert [model.num_matmul_params(), model.estimate_flops()] == before == case["matmul_params_and_flops_before"]


if __name__ == "__main__":
    check_linear_in_bfloat16()

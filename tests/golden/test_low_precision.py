"""The stock model in bfloat16 and float16 against nanochat's numbers. The dtype is fixed at import, so each has its own process."""
import os
import subprocess
import sys

import numpy as np
import pytest
import torch

from tests.golden.fixtures import arrays, batch, build_model, load

TOLERANCE = {"bfloat16": 0.5, "float16": 0.08}  # of the logits; "other kernels" moved them by 0.12 and 0.016


def check(dtype: str) -> None:
    expected = arrays(f"gpt_{dtype}")
    for case in load(f"gpt_{dtype}")["cases"]:
        model = build_model(case["config"], case["seed"], case["pad_vocab_size_to"])
        assert {key: str(value.dtype).removeprefix("torch.") for key, value in model.state_dict().items()} == case["state_dict_dtypes"]
        idx, targets = batch(case["batch_seed"], case["B"], case["T"], case["config"]["vocab_size"])
        with torch.no_grad():
            logits = model(idx)[:, case["logits_positions"]]
            np.testing.assert_allclose(logits, expected[f"{case['name']}/logits"], rtol=0, atol=TOLERANCE[dtype])
            assert abs(float(model(idx, targets)) - case["loss_mean"]) < TOLERANCE[dtype] / 20
        assert model.kv_bytes_per_token() == case["kv_bytes_per_token"]


@pytest.mark.parametrize("dtype", ["bfloat16", pytest.param("float16", marks=pytest.mark.slow)])
def test_low_precision(dtype):
    env = {**os.environ, "NANOCHAT_DTYPE": dtype}
    subprocess.run([sys.executable, "-c", f"from tests.golden.test_low_precision import check; check({dtype!r})"], env=env, check=True)

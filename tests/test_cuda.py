"""dev/gpu_check.py in small: on a GPU where there is one, and always as a rehearsal on the CPU."""
import os
import subprocess
import sys

import pytest
import torch

from dev.gpu_check import SECTIONS
from tests.tiny import ROOT

GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="no NVIDIA GPU here")


@pytest.mark.slow
@pytest.mark.parametrize("section", SECTIONS)
@pytest.mark.parametrize("device_type", [pytest.param("cuda", marks=GPU), "cpu"])
def test_section(device_type, section):
    env = {key: value for key, value in os.environ.items() if key != ("NANOCHAT_DTYPE" if device_type == "cuda" else "")}
    if device_type == "cuda":
        env.pop("TORCHDYNAMO_DISABLE", None)  # a rehearsal need not compile, which others test
    done = subprocess.run([sys.executable, "-m", "dev.gpu_check", f"--device-type={device_type}", "--small", "--only", section], cwd=ROOT, env=env,
                          capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-2000:]
    assert f"{section} PASS" in done.stdout

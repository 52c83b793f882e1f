"""Peak speeds, distributed settings and checkpoint files against nanochat's."""
import dataclasses
import json

import pytest
import torch

from nanochat import checkpoint_manager as checkpoints
from nanochat.common import get_dist_info, get_peak_bandwidth, get_peak_flops, is_ddp_requested
from nanochat.gpt import GPT, GPTConfig
from tests import tiny
from tests.golden.exceptions import EXCEPTIONS
from tests.golden.fixtures import load

GOLDEN = load("small")


@pytest.mark.parametrize("name, flops, bandwidth", GOLDEN["peaks_flops_bandwidth"])
def test_peaks(name, flops, bandwidth):
    if ("small", name) in EXCEPTIONS:
        flops, bandwidth = {"NVIDIA L40": (181.05e12, 864e9), "NVIDIA A4000": ("inf", "inf")}[name]
    assert (get_peak_flops(name), get_peak_bandwidth(name)) == (float(flops), float(bandwidth))


@pytest.mark.parametrize("case", GOLDEN["distributed_info"], ids=lambda case: "-".join(case["env"]) or "none")
def test_distributed_info(monkeypatch, case):
    for name, value in case["env"].items():
        monkeypatch.setenv(name, value)
    assert is_ddp_requested() is case["requested"]
    assert list(get_dist_info()) == case["info"]


@pytest.mark.parametrize("case", GOLDEN["largest_model"], ids=lambda case: "-".join(case["folders"]) or "none")
def test_largest_model(tmp_path, case):
    for name in case["folders"]:
        (tmp_path / name).mkdir()
    if case["stray_file"]:
        (tmp_path / case["stray_file"]).touch()
    if case["chosen"] is None:
        with pytest.raises(FileNotFoundError):
            checkpoints.find_largest_model(tmp_path)
    else:
        assert checkpoints.find_largest_model(tmp_path) == case["chosen"]


@pytest.mark.parametrize("case", GOLDEN["last_step"], ids=lambda case: str(case["last"]))
def test_last_step(tmp_path, case):
    for name in case["files"]:
        (tmp_path / name).touch()
    if case["last"] is None:
        with pytest.raises(FileNotFoundError):
            checkpoints.find_last_step(tmp_path)
    else:
        assert checkpoints.find_last_step(tmp_path) == case["last"]


def test_checkpoint_files(tmp_path):
    meta = GOLDEN["checkpoint_meta"]
    for rank in (0, 3):
        checkpoints.save_checkpoint(tmp_path, meta["step"], {"w": torch.ones(2)}, {"a": 1}, meta, rank=rank)
    assert sorted(path.name for path in tmp_path.iterdir()) == GOLDEN["checkpoint_files"]
    assert json.loads((tmp_path / GOLDEN["checkpoint_files"][0]).read_text()) == meta
    model_data, optimizer_data, loaded = checkpoints.load_checkpoint(tmp_path, meta["step"], "cpu", load_optimizer=True, rank=3)
    assert model_data.keys() == {"w"} and sorted(optimizer_data) == GOLDEN["optimizer_loaded"] and loaded == meta


def test_keys_of_older_checkpoints_are_filled_in(base_dir):
    """Without window pattern and residual scalars, and with the prefix that torch.compile gives."""
    tiny.prepare(base_dir)
    old = {"resid_lambdas", "x0_lambdas"}
    model = GPT(GPTConfig(**{**GOLDEN["backfilled_config"], "n_layer": 3, "vocab_size": 320}))
    weights = {"_orig_mod." + key: value for key, value in model.state_dict().items() if key not in old}
    config = dataclasses.asdict(model.config)
    config.pop("window_pattern")
    checkpoints.save_checkpoint(base_dir / "x", 7, weights, None, {"model_config": config})
    loaded, _, meta = checkpoints.build_model(base_dir / "x", 7, "cpu", "train")
    assert meta["model_config"]["window_pattern"] == loaded.config.window_pattern == GOLDEN["backfilled_config"]["window_pattern"]
    for key, values in GOLDEN["backfilled_tensors"].items():
        assert getattr(loaded, key).tolist() == values
    assert all(torch.equal(value, weights["_orig_mod." + key]) for key, value in loaded.state_dict().items() if key not in old)

"""The layer benchmark at toy sizes: what it counts is what PyTorch allocates, and its flags are checked."""
import json

import pytest
import torch

from dev import bench_layers as bench
from nanochat.gpt import GPTConfig
from nanochat.layered_gpt import LayeredGPT, empty_gpt
from nanochat.recipe import LayerChanges

TINY = ["--widths", "64", "32", "--head-dim=16", "--rank-divisors", "4", "2", "--max-seq-len=16", "--tokens=32", "--rounds=1", "--device-type=cpu"]
STOCK = GPTConfig(sequence_len=32, vocab_size=50, n_layer=2, n_head=2, n_kv_head=2, n_embd=32)


@pytest.mark.slow
def test_tiny_run(tmp_path, capsys):
    out, plot = tmp_path / "layers.json", tmp_path / "layers.png"
    assert bench.main([*TINY, f"--out={out}", f"--plot={plot}"]) == 0
    printed = capsys.readouterr()
    assert "min left" in printed.err and printed.out.rstrip().splitlines()[-1].startswith("Low-rank takes less time than dense")
    assert plot.read_bytes().startswith(b"\x89PNG")
    results = json.loads(out.read_text())["widths"]
    assert [result["width"] for result in results] == [64, 32]
    for result, ranks in zip(results, (["rank 16", "rank 32"], ["rank 8", "rank 16"]), strict=True):
        assert list(result["kinds"]) == ["dense", *ranks, "nGPT"]
        dense = result["kinds"]["dense"]
        width, tokens = result["width"], 32
        assert dense["bytes"]["weights"] == 4 * 12 * width ** 2
        assert dense["flops"] == 6 * tokens * (12 * width ** 2 + 2 * width * 16)
        assert min(dense["forward"] + dense["backward"] + dense["optimizer"] + result["normalization"]) > 0
        smaller = result["kinds"][ranks[0]]
        for quantity in ("weights", "gradients", "optimizer"):
            assert smaller["bytes"][quantity] < dense["bytes"][quantity] < result["kinds"]["nGPT"]["bytes"][quantity]
        assert smaller["flops"] < dense["flops"] == result["kinds"]["nGPT"]["flops"]


def test_tiny_models(tmp_path, capsys):
    out = tmp_path / "models.json"
    assert bench.main(["--memory", "--depth=3", "--rank=12", "--measured-depth=1", "--tokens=32", "--max-seq-len=16", "--rounds=1", "--device-type=cpu",
                       f"--out={out}"]) == 0
    assert "measured: d1 of width 64, rank 3," in capsys.readouterr().out  # 12 of 256: the width of d3 is rounded up to whole heads of 128
    results = json.loads(out.read_text())
    for kind in ("counted", "measured"):
        dense, low_rank = results[kind]
        assert all(low_rank[name] < dense[name] for name in dense if "optimizer" in name or "checkpoint" in name)


@pytest.mark.parametrize("changes", [LayerChanges(), LayerChanges(attn_rank=8, mlp_rank=4, lm_head_rank=8), LayerChanges(block="ngpt"),
                                   LayerChanges(block="ngpt", attn_rank=8, mlp_rank=20)])
def test_expected_optimizer_state_is_what_a_step_allocates(changes):
    model = empty_gpt(changes.apply(STOCK))
    model.to_empty(device="cpu")
    model.init_weights()
    optimizer = bench.quiet_optimizer(model)
    expected = bench.expected_state_bytes(optimizer)
    idx = torch.randint(50, (2, 16))
    model(idx, idx).backward()
    optimizer.step()
    assert bench.state_bytes(optimizer) == expected
    assert isinstance(model, LayeredGPT) == (changes != LayerChanges())


def test_saved_bytes_count_each_storage_once_and_no_parameter():
    weight = torch.nn.Parameter(torch.randn(8, 8))
    x = torch.randn(4, 8, requires_grad=True)
    assert bench.saved_bytes(lambda: (x @ weight) * (x @ weight), [weight]) == x.nbytes + 2 * 4 * 8 * 4


@pytest.mark.parametrize("points, share", [
    ([(0.25, 0.5), (0.5, 1.5)], 0.375), ([(0.5, 0.75), (0.25, 0.5)], 0.5), ([(0.25, 1.0), (0.5, 1.5)], None), ([(0.1, 1.2), (0.5, 0.9)], None),
])
def test_break_even(points, share):
    assert bench.break_even(points) == (None if share is None else pytest.approx(share))


@pytest.mark.parametrize("flags, reason", [
    (["--widths=100"], "no whole number of heads"), (["--head-dim=1", "--widths=32"], "must be even"), (["--widths=64", "--rank-divisors", "128"], "from 2 to"),
    (["--rank-divisors=1"], "from 2 to"), (["--memory", "--plot=layers.png"], "leave out --plot"),
    (["--memory", "--rank=5000", "--depth=1"], "use 1 to"), (["--device-type=tpu"], "unknown device type"),
])
def test_bad_flags_are_refused_before_anything_runs(flags, reason, capsys):
    assert bench.main(flags if "--device-type=tpu" in flags else [*flags, "--device-type=cpu"]) == 2
    assert reason in capsys.readouterr().err

"""Layered models through base_train: training, resuming, loading, and changes that cannot be."""
import shutil

import pytest
import torch

from nanochat import checkpoint_manager as checkpoints
from nanochat.engine import Engine
from nanochat.gpt import GPT
from nanochat.layered_gpt import LayeredGPT
from nanochat.recipe import LayerChanges, gpt_config, plan_horizon, scaling_params
from tests import tiny

DIALS = ["--rank=12", "--mlp-rank=16", "--rank-schedule=linear", "--lm-head-rank=20", "--n-kv-head=1", "--qk-dim=24", "--mlp-ratio=2.5",
         "--mlp-depth=2", "--order=parallel", "--model-tag=layered"]


@pytest.fixture
def base(base_dir):
    tiny.prepare(base_dir)
    return base_dir


def test_train_resume_and_load(base, tmp_path_factory, monkeypatch):
    assert tiny.train(*DIALS) == 0
    other = tmp_path_factory.mktemp("resumed")
    shutil.copytree(base, other, dirs_exist_ok=True)
    for path in tiny.folder(other, "layered").glob("*_000008*"):
        path.unlink()
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(other))
    assert tiny.train(*DIALS, "--resume") == 0
    assert tiny.losses(base, "layered") == tiny.losses(other, "layered")

    model, tokenizer, meta = checkpoints.load_model("base", torch.device("cpu"), phase="eval", model_tag="layered")
    assert isinstance(model, LayeredGPT)
    assert [layer.attn_rank for layer in model.config.layers] == [6, 12, 18] and sum(layer.mlp_rank for layer in model.config.layers) == 48
    (row,), _ = Engine(model, tokenizer).generate_batch(tokenizer.encode("ka", prepend="<|bos|>"), max_tokens=4, temperature=0.0)
    assert len(row) > 2


def test_without_dials_it_is_the_stock_class(finished_run, monkeypatch):
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(finished_run))
    model, _, meta = checkpoints.load_model("base", torch.device("cpu"), phase="train")
    assert type(model) is GPT and "layers" not in meta["model_config"]


def test_a_layered_checkpoint_does_not_pass_for_a_stock_one(base, capsys):
    assert tiny.train("--rank=8", "--num-iterations=1", "--eval-every=-1") == 0
    assert tiny.train("--resume") == 2
    assert "another shape" in capsys.readouterr().err


@pytest.mark.parametrize("flags, reason", [
    (["--rank=97"], "use 1 to"), (["--rank=-1"], "0 or more"), (["--rank=90", "--rank-schedule=step"], "use a rank of"), (["--lm-head-rank=97"], "head rank"),
    (["--n-head=3", "--n-kv-head=2"], "evenly"), (["--qk-dim=7"], "pairs"), (["--mlp-ratio=0"], "above 0"), (["--order=sideways"], "order"),
])
def test_impossible_dials(base, capsys, flags, reason):
    try:
        status = tiny.train(*flags)
    except SystemExit as exit:
        status = exit.code
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert status == 2 and reason in error
    assert not (base / "base_checkpoints" / "d3" / "model_000008.pt").exists()


def test_a_rank_that_saves_nothing_is_pointed_out(base, capsys):
    assert tiny.train("--mlp-rank=80", "--num-iterations=1", "--eval-every=-1") == 0
    assert "A rank of 80 in the MLP saves nothing: from 77 on" in capsys.readouterr().out


def test_depth_20_rank_128_by_hand():
    """What `base_train --depth=20 --rank=128` would train, on the meta device."""
    shape = dict(aspect_ratio=64, head_dim=128, sequence_len=2048, vocab_size=32768, window_pattern="SSSL")
    changes = LayerChanges(attn_rank=128, mlp_rank=128)
    with torch.device("meta"):
        model = LayeredGPT(changes.apply(gpt_config(20, **shape)))
    width, gates = 1280, 10 * 10 * 12  # ten layers have a gate of 10 heads x 12 channels
    matrices = 20 * 128 * (4 * 2 * width + 2 * 5 * width) + gates
    assert model.num_scaling_params()["transformer_matrices"] == matrices
    assert scaling_params(model) == matrices + 32768 * width
    stock_attention = 2_886_212_784 - 6 * (393_217_200 + 41_943_040 + 24)  # the spec's FLOPs of a stock d20, less its matrices
    assert model.estimate_flops() == 6 * (matrices + 32768 * width + 24) + stock_attention
    horizon = plan_horizon(model, shape, -1, -1, 12, -1, changes)
    assert horizon.target_tokens == 12 * scaling_params(model)


@pytest.mark.parametrize("changes", [LayerChanges(n_kv_head=5), LayerChanges(attn_rank=700, mlp_rank=700, rank_schedule="linear"), LayerChanges(lm_head_rank=1000)])
def test_the_horizon_has_a_reference_also_where_the_dials_do_not_fit_it(changes):
    """They fit a model of depth 20; the reference has depth 12, 6 heads and a width of 768."""
    shape = dict(aspect_ratio=64, head_dim=128, sequence_len=2048, vocab_size=32768, window_pattern="SSSL")
    with torch.device("meta"):
        model = LayeredGPT(changes.apply(gpt_config(20, **shape)))
    assert plan_horizon(model, shape, -1, -1, 12, -1, changes).num_iterations > 0

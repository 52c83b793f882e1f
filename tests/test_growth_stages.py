"""The plan: shapes read from flags, what is refused, and numbers that are those of the real models."""
import pytest
import torch

from nanochat.cli import UsageError
from nanochat.growth import grow
from nanochat.growth.stages import Shape, describe, dial_path, latest_growths, parse_fractions, parse_path, plan_stages, show_plan
from nanochat.layered_gpt import build_gpt
from nanochat.recipe import gpt_config
from tests.growing import STOCK, difference, mixed, random_model


def test_paths_are_read():
    assert parse_path("10x640, 15x960x128,20x1280x0") == [Shape(10, 640), Shape(15, 960, 128), Shape(20, 1280, 0)]
    assert parse_fractions("0.2,0.5") == [0.2, 0.5]


@pytest.mark.parametrize("text", ["", "10", "10x", "x640", "10x640;15x960", "10x640x1x2", "-1x640", "10 640"])
def test_bad_paths(text):
    with pytest.raises(UsageError):
        parse_path(text)


@pytest.mark.parametrize("text", ["", "a", "0", "1", "0.5,0.2", "0.2,0.2", "0.2,1.5", "nan", "-0.1,0.5"])
def test_bad_fractions(text):
    with pytest.raises(UsageError):
        parse_fractions(text)


def test_the_depth_dial_is_nanochats():
    shapes = dial_path(10, 20, 2, aspect_ratio=64, head_dim=128)
    assert shapes == [Shape(10, 640), Shape(15, 1024), Shape(20, 1280)]
    assert all(shape.width == gpt_config(shape.depth, 64, 128, 2048, 100, "L").n_embd for shape in shapes)
    assert [shape.depth for shape in dial_path(4, 5, 1, 64, 64)] == [4, 5]
    for grow_from, stages in ((20, 1), (0, 1), (10, 0), (10, 11)):
        with pytest.raises(UsageError):
            dial_path(grow_from, 20, stages, 64, 128)


@pytest.mark.parametrize("depth_mode", ["identity", "stack"])
def test_the_plan_is_what_grows(depth_mode):
    path = [Shape(3, 32), Shape(4, 48), Shape(4, 64, 0), Shape(7, 64)]
    stages = plan_stages(STOCK, path, depth_mode)
    model = random_model(STOCK)
    for stage, shape in zip(stages[1:], path[1:]):
        grown, _ = grow(model, stage.config, layers=stage.layers)
        assert (grown.config.n_layer, grown.config.n_embd) == (shape.depth, shape.width)
        assert sum(p.numel() for p in grown.parameters()) == stage.params and grown.estimate_flops() == stage.flops_per_token
        if depth_mode == "identity":
            assert difference(model, grown) <= 1e-5
        model = grown


def test_ranks_grow_along_a_path():
    config = mixed()
    stages = plan_stages(config, [Shape(4, 32), Shape(4, 32, 0)])
    assert all(not layer.attn_rank and not layer.mlp_rank for layer in stages[1].config.layers)
    with pytest.raises(UsageError, match="dense to 5"):
        plan_stages(config, [Shape(4, 32), Shape(4, 32, 5)])


@pytest.mark.parametrize("path, reason", [
    ([Shape(3, 32), Shape(2, 32)], "only grows"), ([Shape(3, 32), Shape(3, 24)], "only grows"), ([Shape(3, 32), Shape(4, 36)], "heads of 8"),
    ([Shape(3, 32), Shape(3, 32)], "same model"), ([Shape(4, 32)], "starts with"), ([], "nothing"), ([Shape(3, 32), Shape(3, 64, 8)], "dense to 8")])
def test_bad_plans(path, reason):
    with pytest.raises(UsageError, match=reason):
        plan_stages(STOCK, path)


def test_no_stage_starves_the_final_model():
    for growths in (1, 2, 5):
        ends = latest_growths(growths)
        assert len(ends) == growths and ends == sorted(ends) and ends[-1] == pytest.approx(0.75)


def test_the_table_adds_up():
    stages = plan_stages(STOCK, [Shape(3, 32), Shape(4, 48), Shape(5, 64)])
    lines = show_plan(stages, 1e12, [0.2, 0.5], fixed=True).splitlines()
    assert len(lines) == 5 and "fixed" in lines[0]
    rows = [line.split() for line in lines[2:]]
    assert [row[1] for row in rows] == ["3x32", "4x48", "5x64"] and [row[5] for row in rows] == ["20.0%", "50.0%", "100.0%"]
    assert sum(float(row[6]) for row in rows) == pytest.approx(1e12)
    with torch.device("meta"):
        assert int(rows[2][4].replace(",", "")) == build_gpt(stages[2].config).estimate_flops()


def test_shapes_in_words():
    assert describe(STOCK) == "3x32" and describe(mixed()) == "4x32x0-9"

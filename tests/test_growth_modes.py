"""The modes keep what their docstrings promise, and targets that cannot be are refused with the reason."""
from dataclasses import replace

import pytest
import torch

from nanochat.cli import UsageError
from nanochat.growth import grow, grown_config
from nanochat.growth.maps import shared
from nanochat.growth.modes import MODES, Lossless
from nanochat.growth.target import DEPTH_MODES, DepthMode, continued_layers
from nanochat.layered_gpt import LayeredGPT
from tests.growing import STOCK, VOCAB, difference, float64, mixed, random_model, tokens, uniform

DOUBLE = replace(STOCK, n_head=8, n_kv_head=4, n_embd=64)


def matrices(model) -> dict[str, torch.Tensor]:
    return {name: p.detach() for name, p in model.named_parameters() if p.dim() == 2}


# -----------------------------------------------------------------------------
# HyperCloning (2409.12903), written down without maps: destination [[W, W], [W, W]] / 2, first layer [W; W], last layer [W, W] / 2


def hyperclone(name: str, weight: torch.Tensor, times: int) -> torch.Tensor:
    if name.startswith("lm_head"):
        return torch.cat([weight] * times, dim=1) / times
    if name.startswith(("transformer.wte", "value_embeds")):
        return torch.cat([weight] * times, dim=1)
    if name == "smear_gate.weight":
        return weight  # reads the first channels, which are what they were
    if name.endswith("ve_gate.weight"):
        return torch.cat([weight] * times)
    return torch.cat([torch.cat([weight] * times, dim=1)] * times) / times


@pytest.mark.parametrize("how", [dict(mode="hyperclone"), dict(spread=0.0, noise=0.0)], ids=["mode", "lossless"])
@pytest.mark.parametrize("times", [2, 3])
def test_clones_are_hypercloning_entry_by_entry(how, times):
    with float64():
        model = random_model(STOCK)
        grown, _ = grow(model, replace(STOCK, n_head=4 * times, n_kv_head=2 * times, n_embd=32 * times), **how)
        for (name, weight), (_, new) in zip(matrices(model).items(), matrices(grown).items(), strict=True):
            torch.testing.assert_close(new, hyperclone(name, weight, times), rtol=1e-15, atol=0, msg=name)
        assert difference(model, grown) <= 1e-10


@pytest.mark.parametrize("block", ["prenorm", "ngpt"])
def test_hyperclone_is_lossless_for_every_kind_of_layer(block):
    with float64():
        model = random_model(mixed(block))
        target = grown_config(model.config, n_embd=96, lm_head_rank=20)
        assert difference(model, grow(model, target, mode="hyperclone")[0]) <= 1e-10


@pytest.mark.parametrize("block", ["prenorm", "ngpt"])
@pytest.mark.parametrize("width", [48, 64, 80])
def test_sparkling_copies_losslessly_at_any_ratio(block, width):
    """Copies of a channel are read with equal weights: what sets them apart is left to the optimizer."""
    with float64():
        model = random_model(mixed(block))
        assert difference(model, grow(model, grown_config(model.config, n_embd=width), mode="sparkling")[0]) <= 1e-10
        model = random_model(uniform(block))
        columns = grow(model, grown_config(model.config, n_embd=width), mode="sparkling")[0].transformer.h[0].mlp.c_fc.weight.T
        torch.testing.assert_close(columns[:width - 32][:32], columns[32:64])


def test_hyperclone_refuses_other_ratios():
    with pytest.raises(UsageError, match="whole multiples"):
        grow(random_model(STOCK), replace(STOCK, n_head=6, n_kv_head=3, n_embd=48), mode="hyperclone")


# -----------------------------------------------------------------------------
# The modes that are not lossless


def test_bus_tiles_scales_and_truncates():
    with float64():
        model = random_model(STOCK)
        grown, _ = grow(model, replace(STOCK, n_head=6, n_kv_head=3, n_embd=48), mode="bus")
        old, new = matrices(model), matrices(grown)
        for name in ("transformer.h.0.mlp.c_fc.weight", "transformer.h.1.mlp.c_proj.weight", "transformer.h.2.attn.c_q.weight"):
            rows, columns = new[name].shape
            tiled = old[name].repeat(2, 2)[:rows, :columns] * old[name].size(1) / columns
            torch.testing.assert_close(new[name], tiled, rtol=1e-14, atol=0)
        assert torch.equal(new["transformer.wte.weight"], old["transformer.wte.weight"].repeat(1, 2)[:, :48])
        assert difference(model, grown) > 0.01  # the function is lost
        assert difference(model, grow(model, DOUBLE, mode="bus")[0]) <= 1e-10  # but not at whole multiples


@pytest.mark.parametrize("mode", ["identity", "random"])
@pytest.mark.parametrize("block", ["prenorm", "ngpt"])
def test_identity_and_random_keep_the_old_weights_in_a_corner(mode, block):
    with float64():
        model = random_model(uniform(block, value_embed=True))
        grown, _ = grow(model, grown_config(model.config, n_embd=48), mode=mode)
        assert torch.isfinite(grown(tokens())).all()
        for (name, weight), (_, new) in zip(matrices(model).items(), matrices(grown).items(), strict=True):
            corner = new[:weight.size(0), :weight.size(1)]
            if block == "ngpt":  # up to the lengths of rows or columns, which are 1 again
                dim = 0 if name.endswith("c_proj.weight") else 1
                corner, weight = (x / x.norm(dim=dim, keepdim=True).clamp(min=1e-9) for x in (corner, weight))
            torch.testing.assert_close(corner, weight, msg=name)
        fc = grown.transformer.h[0].mlp.c_fc.weight
        new_block = fc[64:, 32:]
        if mode == "identity":
            assert torch.equal(new_block, torch.eye(16).repeat(2, 1)) and not fc[:64, 32:].any() and not fc[64:, :32].any()
        else:
            assert (fc[:64, 32:] != 0).all() and (new_block != 0).all()


@torch.no_grad()
def test_identity_keeps_the_function_up_to_lengths():
    """On the sphere all but the head's rows, which also read the new channels; elsewhere the RMS of a stream with zeros is lower."""
    with float64():
        for block, lossless in (("ngpt", True), ("prenorm", False)):
            model = random_model(uniform(block, value_embed=True))
            grown, _ = grow(model, grown_config(model.config, n_embd=48), mode="identity")
            assert grown.lm_head.weight[:, 32:].any()
            grown.lm_head.weight.zero_()
            grown.lm_head.weight[:, :32] = model.lm_head.weight
            assert (difference(model, grown) <= 1e-10) == lossless


# -----------------------------------------------------------------------------
# Depth


def test_which_layer_continues_which():
    assert continued_layers(3, 6, "identity") == [0, None, 1, None, 2, None]
    assert continued_layers(3, 6, "append") == [0, 1, 2, None, None, None]
    assert continued_layers(3, 6, "stack") == [0, 1, 2, 0, 1, 2]
    assert continued_layers(3, 6, "interleave") == [0, 0, 1, 1, 2, 2]
    for old in range(1, 9):
        for new in range(old, 3 * old):
            for mode in ("identity", "append", "interleave", "stack"):
                layers = continued_layers(old, new, mode)
                assert len(layers) == new and set(range(old)) <= set(layers)
                if mode != "stack":
                    assert [x for x in layers if x is not None] == sorted(x for x in layers if x is not None)


def test_a_new_mode_is_a_line_in_its_registry(monkeypatch):
    """Here plain clones by another way (any ratio), and new layers at the bottom."""
    class Copies(Lossless):
        def free(self, index, old, sphere):
            return shared(index, old, 0.0)

    monkeypatch.setitem(MODES, "copies", lambda: Copies(noise=0.0))
    monkeypatch.setitem(DEPTH_MODES, "below", DepthMode(lambda old, new: [*[None] * (new - old), *range(old)]))
    with float64():
        model = random_model(STOCK)
        grown, _ = grow(model, grown_config(STOCK, 5, 48, depth_mode="below"), mode="copies", depth_mode="below")
        assert difference(model, grown) <= 1e-10 and not grown.transformer.h[1].mlp.c_proj.weight.any()


@pytest.mark.parametrize("mode", MODES)
def test_new_layers_pass_the_stream_on_in_every_mode(mode):
    model = random_model(STOCK)
    grown, _ = grow(model, grown_config(STOCK, 5, 64), mode=mode)
    assert grown.resid_lambdas[1] == 1 and grown.x0_lambdas[1] == 0 and not grown.transformer.h[1].mlp.c_proj.weight.any()


@pytest.mark.parametrize("block", ["prenorm", "ngpt"])
def test_how_new_layers_begin(block):
    """As in a new model of that depth, or all at random; the layers between stay."""
    config = uniform(block, value_embed=True)
    model = random_model(config)
    fresh, drawn = (grow(model, grown_config(config, 4, depth_mode=mode), depth_mode=mode)[0] for mode in ("fresh", "random"))
    block_1 = fresh.transformer.h[1]
    assert fresh.resid_lambdas[1].item() == pytest.approx(1.15 - 0.1 / 3) and fresh.x0_lambdas[1].item() == pytest.approx(0.2 - 0.15 / 3)
    assert drawn.resid_lambdas[1] == 1 and drawn.x0_lambdas[1] == 0
    if block == "ngpt":
        assert (block_1.alpha_mlp == 0.25).all()
    else:
        assert not block_1.mlp.c_proj.weight.any() and not block_1.attn.c_proj.weight.any()
    assert all(p.any() for p in drawn.transformer.h[1].parameters())
    assert drawn.transformer.h[1].mlp.c_proj.weight.std().item() == pytest.approx(64 ** -0.5 if block == "prenorm" else 32 ** -0.5, rel=0.1)
    for name, p in model.transformer.h[1].named_parameters():
        assert torch.equal(fresh.transformer.h[2].get_parameter(name), p) and torch.equal(drawn.transformer.h[2].get_parameter(name), p)


@pytest.mark.parametrize("mode, old", [(mode, old) for mode in DEPTH_MODES for old in (0, 1, 2) if old or not DEPTH_MODES[mode].copies])
def test_every_way_to_four_layers(mode, old):
    with float64():
        model = random_model(replace(STOCK, n_layer=old))
        grown, _ = grow(model, grown_config(model.config, 4, depth_mode=mode), depth_mode=mode)
        assert torch.isfinite(grown(tokens())).all()
        # fresh layers on nothing but the first embedding give it another length, which the norm takes away
        assert (difference(model, grown) <= 1e-10) == (mode in ("identity", "append") or mode == "fresh" and not old)


@pytest.mark.parametrize("mode", [mode for mode in MODES if mode != "hyperclone"])
def test_every_way_to_half_as_wide_again_and_on(mode):
    """4 heads to 6 to 8, as 64 -> 96 -> 128 channels are."""
    with float64():
        first = model = random_model(STOCK)
        for width in (48, 64):
            model, _ = grow(model, grown_config(model.config, n_embd=width), mode=mode)
        assert (difference(first, model) <= 1e-10) == (mode in ("lossless", "sparkling"))


@pytest.mark.parametrize("mode", ["stack", "interleave"])
def test_copied_layers_are_copies(mode):
    model = random_model(mixed())
    target = grown_config(model.config, 8, depth_mode=mode)
    grown, _ = grow(model, target, depth_mode=mode)
    for t, layer in enumerate(continued_layers(4, 8, mode)):
        for name, weight in model.transformer.h[layer].named_parameters():
            assert torch.equal(grown.transformer.h[t].get_parameter(name), weight)
        assert grown.resid_lambdas[t] == model.resid_lambdas[layer]
        if str(layer) in model.value_embeds:
            assert torch.equal(grown.value_embeds[str(t)].weight, model.value_embeds[str(layer)].weight)
    assert difference(model, grown) > 0.01


def test_layers_of_ones_own_choice():
    with float64():
        model = random_model(STOCK)
        layers = [0, 1, None, None, 2]
        grown, _ = grow(model, grown_config(STOCK, 5, layers=layers), layers=layers)
        assert difference(model, grown) <= 1e-10
        layers = [0, 1, 2, 2]  # layer-by-layer training: a copy on top
        grown, _ = grow(model, grown_config(STOCK, 4, layers=layers), layers=layers)
        assert torch.equal(grown.transformer.h[3].mlp.c_fc.weight, model.transformer.h[2].mlp.c_fc.weight)


# -----------------------------------------------------------------------------
# Refused


@pytest.mark.parametrize("change, reason", [
    (dict(n_layer=2), "only grows"),
    (dict(n_embd=24, n_head=3, n_kv_head=3), "only grows"),
    (dict(vocab_size=VOCAB + 1), "vocab_size"),
    (dict(sequence_len=128), "sequence_len"),
    (dict(window_pattern="L"), "window_pattern"),
    (dict(n_embd=40), "heads of 8"),
    (dict(n_embd=36, n_head=6), "heads of 8"),
    (dict(n_embd=64, n_head=8, n_kv_head=1), "n_kv_head"),
    (dict(n_embd=40, n_head=5, n_kv_head=3), "cannot share"),
])
def test_impossible_stock_targets(change, reason):
    with pytest.raises(UsageError, match=reason):
        grow(random_model(STOCK), replace(STOCK, **change))


def test_impossible_layered_targets():
    model = random_model(mixed())
    config = model.config

    def changed(**changes):
        return replace(config, layers=(replace(config.layers[0], **changes), *config.layers[1:]))

    low_rank = replace(config, layers=(*config.layers[:3], replace(config.layers[3], mlp_rank=8)))
    for target, reason in (
            (changed(mlp_hidden=40), "smaller mlp_hidden"), (changed(head_dim=10), "another head_dim"), (changed(window=9), "another window"),
            (changed(value_embed=False), "another value_embed"), (changed(attn_rank=4), "dense to 4"), (low_rank, "9 to 8"),
            (replace(config, lm_head_rank=9), "the head cannot go from 10 to 9"), (replace(config, backout_layer=2), "backout")):
        with pytest.raises(UsageError, match=reason):
            grow(model, target)
    with pytest.raises(UsageError, match="continued by no layer"):
        grow(model, config, layers=[0, 1, 2, 2])
    with pytest.raises(UsageError, match="head size|places"):  # 3 kv heads for 2 leave one with 3 places for 4 queries
        wide = uniform("prenorm", n_head=8, n_kv_head=2, head_dim=4, qk_dim=4)
        grow(random_model(wide), replace(wide, layers=tuple(replace(layer, n_head=9, n_kv_head=3) for layer in wide.layers)))
    assert isinstance(grow(model, config)[0], LayeredGPT)  # no growth at all is one


@pytest.mark.parametrize("wrong", [
    dict(mode="tile"), dict(depth_mode="deeper"), dict(optimizer_mode="keep"), dict(theta=60.0), dict(spread=2.0), dict(noise=-1.0),
    dict(theta=0.0, noise=0.0), dict(mode="bus", noise=1.0)])
def test_unknown_ways_to_grow(wrong):
    with pytest.raises(UsageError):
        grow(random_model(STOCK), DOUBLE, **wrong)

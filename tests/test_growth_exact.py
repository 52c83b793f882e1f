"""Lossless growth is the same function: at any ratio, of any layer, with any amount of noise."""
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nanochat.cli import UsageError
from nanochat.engine import Engine
from nanochat.gpt import GPT
from nanochat.growth import grow, grown_config
from nanochat.growth.axes import ModelAxes
from nanochat.growth.maps import angles, count_copies, head_index, shared
from nanochat.growth.target import continued_layers, layered_config
from nanochat.layered_gpt import LayeredGPT
from nanochat.ngpt import NormalizedWeights
from tests.examples import examples
from tests.golden.byte_tokenizer import ByteTokenizer
from tests.golden.fixtures import load
from tests.growing import STOCK, difference, float64, mixed, random_model, tokens, uniform

SPREADS = st.floats(0, 0.99) | st.just(1.0)  # all but 1 leaves copies that are hardly read, with huge noise
PARAMETERS = st.fixed_dictionaries({"theta": st.floats(0, 45), "spread": SPREADS, "noise": st.floats(0.01, 3)})
BLOCKS = ("prenorm", "ngpt")


def assert_on_sphere(model, tolerance: float):
    """The constraint that holds after each step holds after a growth too: restoring it changes nothing."""
    if not getattr(model.config, "normalized", False):
        return
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    NormalizedWeights(model)()
    for name, p in model.named_parameters():
        torch.testing.assert_close(p, before[name], rtol=0, atol=tolerance, msg=name)


def bounded(parameters: dict) -> dict:
    """For float32, where noise that cancels costs digits: of the size of the weights at most."""
    return {**parameters, "noise": min(parameters["noise"], 1.0)}


def test_every_parameter_names_its_axes():
    for config in (STOCK, mixed(), mixed("ngpt")):
        parameters = dict(random_model(config).named_parameters())
        axes = ModelAxes(layered_config(config)).parameters
        assert axes.keys() == parameters.keys()
        assert all(len(axes[name]) <= p.dim() for name, p in parameters.items())


# -----------------------------------------------------------------------------
# Maps


@settings(max_examples=examples(50), deadline=None)
@given(old=st.integers(1, 40), ratio=st.floats(1, 4), theta=st.floats(0, 45), total=st.floats(0.5, 4), spread=SPREADS, noise=st.floats(0, 3))
def test_maps_keep_what_they_must(old, ratio, theta, total, spread, noise):
    normed = angles(old, int(old * ratio), theta, total)
    torch.testing.assert_close(normed.group_sum(normed.write ** 2), torch.full((old,), total, dtype=torch.float64))
    free = shared(normed.index, old, spread, noise)
    for map in (normed, free, free.on_sphere(), free.times(0.7), free.on_sphere().before_scale(), free.on_sphere().of_scale(0.3), free.repeat(3)):
        torch.testing.assert_close(map.group_sum(map.write * map.read), torch.ones(map.old, dtype=torch.float64))
        assert torch.equal(map.index[:map.old], torch.arange(map.old))
    torch.testing.assert_close(free.group_sum(free.write * free.read * free.column_noise), torch.zeros(old, dtype=torch.float64), rtol=0, atol=1e-12)


@settings(max_examples=examples(50), deadline=None)
@given(kv=st.integers(1, 6), group=st.integers(1, 4), more_kv=st.integers(0, 12), new_group=st.integers(1, 8))
def test_every_query_head_finds_its_key_head(kv, group, more_kv, new_group):
    heads, grown = (kv * group, kv), ((kv + more_kv) * new_group, kv + more_kv)
    try:
        query, key = head_index(heads, grown)
    except UsageError as error:
        assert "places" in str(error) and (kv + more_kv) // kv * new_group < group
        return
    assert len(query) == grown[0] and set(query.tolist()) == set(range(heads[0])) and set(key.tolist()) == set(range(kv))
    assert torch.equal(key.repeat_interleave(new_group), query // group)


def test_copies_are_numbered_in_order():
    number, copies = count_copies(torch.tensor([0, 1, 2, 0, 1, 0]), 3)
    assert number.tolist() == [0, 0, 0, 1, 1, 2] and copies.tolist() == [3, 2, 1, 3, 2, 3]


# -----------------------------------------------------------------------------
# Models


@settings(max_examples=examples(20), deadline=None)
@given(seed=st.integers(0, 10), width=st.floats(1, 4), layers=st.integers(3, 7), group=st.integers(2, 3), extra_kv=st.integers(0, 3), parameters=PARAMETERS,
       depth_mode=st.sampled_from(["identity", "append"]))
def test_stock_models(seed, width, layers, group, extra_kv, parameters, depth_mode):
    """Any width of whole heads, uneven numbers of heads, grouped queries, odd depths, value embeddings, smear, backout, windows."""
    n_kv = 2 + extra_kv
    target = replace(STOCK, n_layer=layers, n_head=n_kv * group, n_kv_head=n_kv, n_embd=8 * n_kv * group)
    with float64():
        model = random_model(STOCK, seed)
        grown, _ = grow(model, target, depth_mode=depth_mode, **parameters)
        assert difference(model, grown) <= 1e-10
        assert type(grown) is (GPT if layers == 3 else LayeredGPT)
    model = random_model(STOCK, seed)
    assert difference(model, grow(model, target, depth_mode=depth_mode, **bounded(parameters))[0]) <= 1e-5


@pytest.mark.slow
@settings(max_examples=examples(20), deadline=None)
@given(seed=st.integers(0, 10), block=st.sampled_from(BLOCKS), width=st.integers(32, 128), layers=st.integers(4, 8), parameters=PARAMETERS, head_rank=st.integers(10, 20))
def test_mixed_layers(seed, block, width, layers, parameters, head_rank):
    """Any width whatever, with layers of every kind: low-rank, deep MLPs, SwiGLU, all orders, queries of another width than values."""
    config = mixed(block)
    target = grown_config(config, layers, width, lm_head_rank=head_rank)
    with float64():
        model = random_model(config, seed)
        grown, _ = grow(model, target, **parameters)
        assert difference(model, grown) <= 1e-10
        assert_on_sphere(grown, 1e-12)
    model = random_model(config, seed)
    grown, _ = grow(model, target, **bounded(parameters))
    assert difference(model, grown) <= 3e-5  # what float32 alone makes of these models, which have something of everything, is up to 1e-5
    assert_on_sphere(grown, 1e-6)


@settings(max_examples=examples(20), deadline=None)
@given(seed=st.integers(0, 10), width=st.integers(32, 128), rank=st.sampled_from([0, 6]), parameters=PARAMETERS)
def test_gelu(seed, width, rank, parameters):
    """Of which a multiple is no multiple: units are written as they were, or not at all."""
    config = uniform("prenorm", activation="gelu", mlp_rank=rank)
    with float64():
        model = random_model(config, seed)
        assert difference(model, grow(model, grown_config(config, 3, width), **parameters)[0]) <= 1e-10


@pytest.mark.parametrize("block", BLOCKS)
@pytest.mark.parametrize("change", [
    dict(mlp_hidden=77), dict(n_head=12, n_kv_head=6), dict(n_head=12, n_kv_head=3), dict(attn_rank=7), dict(mlp_rank=8), dict(attn_rank=0, mlp_rank=0),
    dict(mlp_hidden=180, n_head=15, n_kv_head=3)],
    ids=str)
def test_axes_grow_one_by_one(block, change):
    """Hidden units, heads or ranks alone, with the stream as it is; ranks to dense too."""
    config = mixed(block)
    dense = lambda layer, name: name.endswith("_rank") and not getattr(layer, name)
    target = replace(config, layers=tuple(replace(layer, **{name: 0 if dense(layer, name) else value for name, value in change.items()})
                                          if layer.mlp_rank < 9 or change.get("mlp_rank") != 8 else layer for layer in config.layers))
    with float64():
        model = random_model(config)
        grown, _ = grow(model, target)
        assert difference(model, grown) <= 1e-10
        assert_on_sphere(grown, 1e-12)
        if "mlp_hidden" in change or "n_head" in change:  # the copies are not just copies
            assert len(grown.transformer.h[0].mlp.c_proj.weight.T.unique(dim=0)) == grown.transformer.h[0].mlp.c_proj.weight.size(1)


@pytest.mark.parametrize("rank, target", [(10, 0), (10, 25), (0, 0)])
@pytest.mark.parametrize("block", BLOCKS)
def test_the_head_alone(block, rank, target):
    config = mixed(block, lm_head_rank=rank)
    with float64():
        model = random_model(config)
        for width in (32, 40, 96):
            grown, _ = grow(model, grown_config(config, n_embd=width, lm_head_rank=target))
            assert difference(model, grown) <= 1e-10
            assert_on_sphere(grown, 1e-12)


@pytest.mark.parametrize("block", BLOCKS)
@pytest.mark.parametrize("rank, width", [(1, 33), (1, 64), (6, 40), (9, 40), (20, 64)])
def test_low_rank_layers_with_and_without_room_for_noise(block, rank, width):
    config = uniform(block, attn_rank=rank, mlp_rank=rank, value_embed=True)
    with float64():
        model = random_model(config)
        grown, _ = grow(model, grown_config(config, n_embd=width, mlp_hidden=200))
        assert difference(model, grown) <= 1e-10
        assert_on_sphere(grown, 1e-12)


def test_no_unit_on_the_sphere_is_born_dead():
    """ReLU² of a unit whose scale is 0 has no gradient."""
    model = random_model(mixed("ngpt"))
    grown, _ = grow(model, grown_config(model.config, n_embd=80), spread=1.0)
    assert all(p.all() for name, p in grown.named_parameters() if ".s_" in name)


@pytest.mark.parametrize("block", BLOCKS)
def test_wide_first_then_wide_again(block):
    """Growths in a row add up, and each starts from a model with twins."""
    config = uniform(block, value_embed=True)
    with float64():
        first = model = random_model(config)
        for width, depth in ((40, 2), (56, 3), (64, 5), (160, 5)):
            model, _ = grow(model, grown_config(model.config, depth, width))
            assert difference(first, model) <= 1e-10


@pytest.mark.parametrize("block", BLOCKS)
def test_the_loss_and_decoding_through_a_cache_stay(block):
    model = random_model(mixed(block))
    grown, _ = grow(model, grown_config(model.config, 6, 72))
    text = tokens(1)
    with torch.no_grad():
        torch.testing.assert_close(grown(text[:, :-1], text[:, 1:]), model(text[:, :-1], text[:, 1:]), rtol=0, atol=1e-5)
        full = model(text[:1])
        cache = Engine(grown, ByteTokenizer(load("decode")["generate"]["special"]))._new_cache(1, 24)
        cache.last_logits_only = False
        pieces = [grown(text[:1, a:b], kv_cache=cache) for a, b in ((0, 7), (7, 12), *((i, i + 1) for i in range(12, 24)))]
    torch.testing.assert_close(torch.cat(pieces, dim=1), full, rtol=0, atol=3e-5)


def test_bfloat16_embeddings_are_exact_for_twins_of_equal_size():
    """Coefficients of 1 round to nothing; others to the 8 bits of the embedding."""
    model = random_model(STOCK)
    model.transformer.wte.to(torch.bfloat16)
    grown, _ = grow(model, replace(STOCK, n_embd=64, n_head=8, n_kv_head=4))
    grown.transformer.wte.to(torch.bfloat16)
    assert torch.equal(grown.transformer.wte.weight[:, 32:], model.transformer.wte.weight)
    assert difference(model, grown) <= 1e-5


# -----------------------------------------------------------------------------
# What is kept as it is


def test_inserted_layers_move_no_window_value_embedding_or_backout():
    config = mixed()
    model = random_model(config)
    for mode in ("identity", "append"):
        layers = continued_layers(4, 7, mode)
        grown, _ = grow(model, grown_config(config, 7, depth_mode=mode), depth_mode=mode)
        for t, layer in enumerate(layers):
            if layer is None:
                assert grown.resid_lambdas[t] == 1 and grown.x0_lambdas[t] == 0
            else:
                assert grown.window_sizes[t] == model.window_sizes[layer] and (str(t) in grown.value_embeds) == (str(layer) in model.value_embeds)
                assert grown.resid_lambdas[t] == model.resid_lambdas[layer] and grown.x0_lambdas[t] == model.x0_lambdas[layer]
        assert layers[grown.backout_layer] == model.backout_layer


def test_padded_rows_and_the_source_are_left_alone():
    model = random_model(STOCK)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    state = torch.get_rng_state()
    grown, _ = grow(model, replace(STOCK, n_layer=5, n_embd=40, n_head=5, n_kv_head=5))
    assert grown.transformer.wte.num_embeddings == model.transformer.wte.num_embeddings == 128
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    assert torch.equal(torch.get_rng_state(), state)


def test_the_seed_decides():
    model = random_model(mixed("ngpt"))
    target = grown_config(model.config, 6, 50)
    a, b, c = (grow(model, target, generator=torch.Generator().manual_seed(seed))[0] for seed in (1, 1, 2))
    assert all(torch.equal(p, q) for p, q in zip(a.parameters(), b.parameters()))
    assert not torch.equal(a.transformer.h[1].mlp.c_fc.weight, c.transformer.h[1].mlp.c_fc.weight)

"""Normalized layers: lengths of 1 wherever the paper asks for them, and training that starts from nothing."""
import shutil
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nanochat.gpt import GPT, GPTConfig
from nanochat.layered_gpt import LayeredGPTConfig, empty_gpt
from nanochat.lowrank import LowRankLinear
from nanochat.ngpt import NormalizedGPT, unit
from nanochat.optim import MATRIX_OPTIMIZERS
from tests import tiny
from tests.examples import examples
from tests.golden.fixtures import batch

VARIANTS = [dict(), dict(activation="swiglu", mlp_hidden=40), dict(attn_rank=6, mlp_rank=10), dict(mlp_depth=3), dict(order="parallel"),
            dict(order="mlp-attn", activation="swiglu", mlp_rank=9), dict(n_head=3, n_kv_head=1, qk_dim=10, head_dim=12)]


def normalized_config(n_embd: int = 48, n_layer: int = 3, lm_head_rank: int = 0, **changes) -> LayeredGPTConfig:
    with torch.device("meta"):
        stock = GPT(GPTConfig(sequence_len=64, vocab_size=300, n_layer=n_layer, n_head=n_embd // 12, n_kv_head=n_embd // 24, n_embd=n_embd, window_pattern="SL"))
    config = LayeredGPTConfig.from_gpt(stock)
    return replace(config, lm_head_rank=lm_head_rank, layers=tuple(replace(layer, **{"block": "ngpt", **changes}) for layer in config.layers))


def initialized(config, seed: int = 0) -> NormalizedGPT:
    model = empty_gpt(config)
    model.to_empty(device="cpu")
    torch.manual_seed(seed)
    model.init_weights()
    return model


def train(model, steps: int = 10, **kwargs) -> list[float]:
    optimizer = model.setup_optimizer(**kwargs)
    losses = []
    for step in range(steps):
        idx, _ = batch(step % 2, 2, 40, 300)
        loss = model(idx[:, :-1], idx[:, 1:])
        loss.backward()
        assert all(p.grad is not None for p in model.parameters())
        optimizer.step()
        model.zero_grad(set_to_none=True)
        losses.append(loss.item())
    return losses


def lengths(model) -> torch.Tensor:
    """Of all vectors along the width, in float64."""
    def matrix(layer):
        return layer.U.weight.double() @ layer.V.weight.double() if isinstance(layer, LowRankLinear) else layer.weight.double()
    found = [model.transformer.wte.weight.double().norm(dim=1), matrix(model.lm_head).norm(dim=1)]
    for block in model.transformer.h:
        readers = [block.attn.c_q, block.attn.c_k, block.attn.c_v, block.mlp.c_fc, *block.mlp.c_hidden]
        readers += [block.mlp.c_gate] if block.mlp.c_gate is not None else []
        found += [matrix(layer).norm(dim=1) for layer in readers]
        found += [matrix(layer).norm(dim=0) for layer in (block.attn.c_proj, block.mlp.c_proj)]
        for layer in (*readers, block.attn.c_proj, block.mlp.c_proj):
            if isinstance(layer, LowRankLinear):
                found.append((layer.U.weight.norm(dim=0) if layer in (block.attn.c_proj, block.mlp.c_proj) else layer.V.weight.norm(dim=1)).double())
    return torch.cat(found)


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
@settings(max_examples=examples(4), deadline=None)
@given(seed=st.integers(0, 1000), optimizer=st.sampled_from(MATRIX_OPTIMIZERS), steps=st.integers(0, 3), head_rank=st.sampled_from([0, 7]))
def test_weights_and_hidden_states_have_length_1(variant, seed, optimizer, steps, head_rank):
    model = initialized(normalized_config(lm_head_rank=head_rank, **variant), seed)
    train(model, steps, matrix_optimizer=optimizer)
    assert (lengths(model) - 1).abs().max() < 1e-6
    states = []
    for block in model.transformer.h:
        block.register_forward_hook(lambda _, __, output: states.append(output))
    idx, _ = batch(seed, 2, 20, 300)
    with torch.no_grad():
        model(idx)
    assert (torch.stack(states).double().norm(dim=-1) - 1).abs().max() < 1e-6


@pytest.mark.parametrize("variant, optimizer", [pytest.param(variant, optimizer, marks=[pytest.mark.slow] if i and optimizer == "adamw" else [])
                                                for i, variant in enumerate(VARIANTS) for optimizer in MATRIX_OPTIMIZERS], ids=str)
def test_it_learns(variant, optimizer):
    losses = train(initialized(normalized_config(**variant)), 20, matrix_optimizer=optimizer)
    assert losses[-1] < losses[0] - 4  # over 6 seeds it fell by 5.5 to 6.7
    assert max(later - earlier for earlier, later in zip(losses, losses[2:])) < 1  # the loss of the same batch rose by 0.3 at most


def test_scalars_that_a_norm_cancels_stay_as_they_are():
    """Their gradients are rounding noise. Adam would walk them through 0, where the stream turns around and the loss jumps back to its start."""
    model = initialized(normalized_config(n_head=1, n_kv_head=1))
    live = [model.resid_lambdas[1:], model.x0_lambdas[1:]]
    cancelled = [model.resid_lambdas[0], model.x0_lambdas[0], *(block.attn.s_head for block in model.transformer.h)]
    before = [[value.detach().clone() for value in values] for values in (live, cancelled)]
    train(model, 3)
    assert all((value != old).all() for value, old in zip(live, before[0], strict=True))
    assert all(torch.equal(value, old) for value, old in zip(cancelled, before[1], strict=True))


def test_an_alpha_of_0_makes_the_layer_an_identity_and_still_learns():
    model = initialized(normalized_config())
    block = model.transformer.h[1]
    with torch.no_grad():
        block.alpha_attn.zero_()
        block.alpha_mlp.zero_()
    h = unit(torch.randn(1, 5, 48))
    with torch.no_grad():
        torch.testing.assert_close(block(h, None, model.cos_sin(0, 5)[1], (-1, 0), None), h, rtol=0, atol=1e-6)
    train(model, 3)
    assert block.alpha_attn.abs().min() > 0 and block.alpha_mlp.abs().min() > 0


@pytest.mark.parametrize("optimizer", MATRIX_OPTIMIZERS)
@pytest.mark.parametrize("n_embd", [48, 192])
def test_learning_rates_are_angles_at_any_width(n_embd, optimizer):
    model = initialized(normalized_config(n_embd))
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    train(model, 1, matrix_lr=0.03, matrix_optimizer=optimizer)
    for name in ("transformer.h.1.attn.c_q.weight", "transformer.h.1.mlp.c_fc.weight"):
        chords = (before[name] - model.get_parameter(name).detach()).norm(dim=1)
        assert chords.mean() == pytest.approx(0.03, rel=0.25), name


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
def test_no_layer_sees_the_future_and_the_cache_gives_the_same_logits(variant):
    from nanochat.engine import KVCache
    model = initialized(normalized_config(**variant))
    train(model, 3)
    idx, _ = batch(7, 1, 30, 300)
    changed = idx.clone()
    changed[0, 20:] = (changed[0, 20:] + 1) % 300
    shapes = [(kv_heads, qk_dim, v_dim) for _, kv_heads, qk_dim, v_dim in model.attention_shapes()]
    with torch.no_grad():
        full = model(idx)
        torch.testing.assert_close(model(changed)[:, :20], full[:, :20], rtol=0, atol=1e-5)
        cache = KVCache(1, 0, 30, 0, 3, device="cpu", dtype=torch.float32, layer_shapes=shapes)
        pieces = [model(idx[:, a:b], kv_cache=cache) for a, b in ((0, 10), (10, 15), *((i, i + 1) for i in range(15, 30)))]
    torch.testing.assert_close(torch.cat(pieces, dim=1), full, rtol=0, atol=2e-5)


def test_the_loss_is_that_of_the_logits():
    model = initialized(normalized_config(lm_head_rank=9))
    train(model, 2)
    idx, targets = batch(1, 2, 20, 300)
    with torch.no_grad():
        expected = torch.nn.functional.cross_entropy(model(idx).flatten(0, 1), targets.flatten(), ignore_index=-1)
        torch.testing.assert_close(model(idx, targets), expected)


@pytest.mark.parametrize("change, reason", [(dict(block="postnorm"), "unknown block"), (dict(activation="elu"), "unknown activation"), (dict(activation="gelu"), "have no gelu"),
                                            (dict(activation="swiglu", mlp_depth=2), "one hidden layer")])
def test_impossible_layers(change, reason):
    with pytest.raises(ValueError, match=reason):
        normalized_config(**change)


def test_blocks_cannot_be_mixed():
    config = normalized_config()
    with pytest.raises(ValueError, match="cannot be mixed"):
        replace(config, layers=(replace(config.layers[0], block="prenorm"), *config.layers[1:]))


def test_weight_decay_forced_on_is_refused(base_dir, capsys):
    assert tiny.train("--block=ngpt", "--weight-decay=0.1") == 2
    assert "means nothing for --block=ngpt" in capsys.readouterr().err


@pytest.mark.parametrize("flags", [pytest.param(["--block=ngpt"], marks=pytest.mark.slow),
                                   ["--block=ngpt", "--rank=12", "--activation=swiglu", "--matrix-optimizer=adamw"]])
def test_training_resumes_exactly(base_dir, flags):
    tiny.prepare(base_dir)
    assert tiny.train(*flags, "--model-tag=whole") == 0
    shutil.copytree(tiny.folder(base_dir, "whole"), tiny.folder(base_dir))
    for path in tiny.folder(base_dir).glob("*_000008*"):
        path.unlink()
    assert tiny.train(*flags, "--model-tag=d3", "--resume") == 0
    assert tiny.losses(base_dir, "whole") == tiny.losses(base_dir)
    weights = [torch.load(tiny.folder(base_dir, tag) / "model_000008.pt", weights_only=True) for tag in ("whole", "d3")]
    assert tiny.identical(*weights)

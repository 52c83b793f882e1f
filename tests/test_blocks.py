"""A new kind of block is a class and an entry in the registry: it trains, decodes and grows without a change anywhere else."""
from dataclasses import asdict, replace

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F

from nanochat import gpt
from nanochat.blocks import BLOCKS
from nanochat.checkpoint_manager import list_steps, load_meta, model_from_config
from nanochat.cli import UsageError
from nanochat.engine import Engine
from nanochat.gpt import norm, uniform
from nanochat.growth import grow, grown_config
from nanochat.layered_gpt import LayeredBlock, LayeredGPT, LayeredGPTConfig, build_gpt
from nanochat.lowrank import linear_or_low_rank
from tests import growing, tiny
from tests.golden.byte_tokenizer import ByteTokenizer
from tests.golden.fixtures import load
from tests.growing import difference, float64, loss_and_gradients, mixed, random_model, tokens


class BottleneckBlock(LayeredBlock):
    """nanochat's block and a third module, with an axis of its own and a gain for each channel of what it writes."""

    def __init__(self, n_embd, spec, layer_idx):
        super().__init__(n_embd, spec, layer_idx)
        self.down = linear_or_low_rank(n_embd, spec.mlp_hidden // 4, spec.mlp_rank)
        self.up = linear_or_low_rank(spec.mlp_hidden // 4, n_embd, spec.mlp_rank)
        self.gain = nn.Parameter(torch.empty(n_embd))

    def init_weights(self):
        super().init_weights()
        self.down.init(uniform())
        self.up.init_to_zero()
        nn.init.constant_(self.gain, 0.5)

    def axes(self):
        return super().axes() | {"down": (".bottleneck", "stream"), "up": ("stream", ".bottleneck"), "gain": ("stream[scale]",)}

    def scales(self):
        return {"gain": (0.5, [self.gain])}

    def forward(self, x, *rest):
        x = super().forward(x, *rest)
        return x + self.gain.to(x.dtype) * self.up(F.relu(self.down(norm(x))).square())


@pytest.fixture(autouse=True)
def registered(monkeypatch):
    monkeypatch.setitem(BLOCKS, "bottleneck", BottleneckBlock)


def bottleneck(**changes) -> LayeredGPTConfig:
    """Every other layer is of the new kind."""
    config = growing.uniform("bottleneck", n_layer=3, value_embed=True, **changes)
    return replace(config, layers=(config.layers[0], replace(config.layers[1], block="prenorm"), config.layers[2]))


def test_it_trains():
    model = build_gpt(bottleneck())
    torch.manual_seed(0)
    model.init_weights()
    optimizer = model.setup_optimizer()
    losses = []
    for _ in range(15):
        losses.append(loss_and_gradients(model))
        optimizer.step()
        model.zero_grad(set_to_none=True)
    assert losses[-1] < losses[0] - 0.3
    assert all((block.gain != 0.5).any() and block.up.weight.any() for block in model.transformer.h if isinstance(block, BottleneckBlock))
    assert sum(model.transformer.h[0].gain in set(group["params"]) for group in optimizer.param_groups if group["kind"] == "adamw") == 1


def test_it_decodes_through_a_cache():
    model = random_model(bottleneck())
    model.cast_for_inference()
    text = tokens(1)[:1]
    with torch.no_grad():
        cache = Engine(model, ByteTokenizer(load("decode")["generate"]["special"]))._new_cache(1, 24)
        cache.last_logits_only = False
        pieces = [model(text[:, a:b], kv_cache=cache) for a, b in ((0, 7), (7, 12), *((i, i + 1) for i in range(12, 24)))]
        torch.testing.assert_close(torch.cat(pieces, dim=1), model(text), rtol=0, atol=2e-5)


@pytest.mark.parametrize("how", [{}, dict(theta=20.0, spread=1.0, noise=0.3), dict(theta=0.0)], ids=str)
@pytest.mark.parametrize("rank, more", [(0, 0), (1, 1), (4, 9), (4, 0)])
def test_it_grows_without_losing_anything(rank, more, how):
    """Wider and deeper at once, with an uneven ratio; low-rank, with more ranks or multiplied out, too."""
    config = bottleneck(mlp_rank=rank)
    with float64():
        model = random_model(config)
        optimizer = model.setup_optimizer()
        loss_and_gradients(model)
        optimizer.step()
        grown, grown_optimizer = grow(model, grown_config(config, 5, 56, mlp_rank=more), optimizer, **how)
        assert type(grown) is LayeredGPT and difference(model, grown) <= 1e-10
        block = next(block for block in grown.transformer.h if isinstance(block, BottleneckBlock))
        if not more:
            columns = block.up.weight.T
            assert columns.shape == (28, 56) and len(columns.unique(dim=0)) >= 28 - 12 * (how.get("spread") == 1.0), "the copies are not just copies"
        loss_and_gradients(grown)
        grown_optimizer.step()
        assert torch.isfinite(grown(tokens())).all()


def test_a_run_grows_with_it(base_dir):
    tiny.prepare(base_dir)
    assert tiny.train("--block=bottleneck", "--grow-path=2x64,3x96", "--grow-at=0.4") == 0
    losses = [entry[2] for entry in tiny.losses(base_dir) if entry[0] == "train"]
    assert losses[-1] < losses[0]
    assert {layer["block"] for layer in load_meta(tiny.folder(base_dir), list_steps(tiny.folder(base_dir))[-1])["model_config"]["layers"]} == {"bottleneck"}


def test_kinds_that_live_in_different_models_cannot_be_mixed():
    config = bottleneck()
    with pytest.raises(ValueError, match="cannot be mixed"):
        replace(config, layers=(*config.layers[:2], replace(config.layers[2], block="ngpt")))


# -----------------------------------------------------------------------------
# Attention that looks both ways


@pytest.mark.parametrize("block", ["prenorm", "ngpt"])
def test_a_model_that_looks_both_ways_says_so_to_the_kernel_and_takes_no_cache(block, monkeypatch):
    asked = []

    def kernel(q, k, v, causal, window_size):
        asked.append((causal, window_size))
        return v.repeat_interleave(q.size(2) // k.size(2), dim=2)
    monkeypatch.setattr(gpt.flash_attn, "flash_attn_func", kernel)
    model = random_model(mixed(block, causal=False))
    with torch.no_grad():
        model(tokens())
        assert asked == [(False, (layer.window, layer.window)) for layer in model.config.layers]
        with pytest.raises(UsageError, match="both ways"):
            Engine(model, ByteTokenizer(load("decode")["generate"]["special"])).generate_batch([1, 2, 3], max_tokens=4)
    grown, _ = grow(model, grown_config(model.config, 5, 40))
    assert not grown.config.causal and not any(ahead == 0 for _, ahead in grown.window_sizes)


@torch.no_grad()
def test_such_a_model_sees_what_comes_after():
    for causal in (True, False):
        model = random_model(mixed(causal=causal))
        text = tokens()[:1]
        changed = text.clone()
        changed[0, -1] = (changed[0, -1] + 1) % growing.VOCAB
        difference = (model(changed) - model(text)).abs()[0].amax(dim=-1)
        assert difference[-1] > 0 and difference[:-1].any() != causal


def test_checkpoints_from_before_that_was_a_choice_are_causal():
    old = asdict(mixed())
    del old["causal"]
    assert model_from_config(old).config == mixed()

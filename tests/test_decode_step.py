"""The decoding step computes what the model's forward pass computes, for every kind of model and of position."""
from dataclasses import replace

import pytest
import torch

from nanochat import kernel_choice
from nanochat.decode_step import DecodeStep
from nanochat.engine import Engine, KVCache
from nanochat.gpt import GPTConfig
from nanochat.layered_gpt import LayeredGPTConfig, empty_gpt
from nanochat.recipe import LayerChanges
from tests.golden.fixtures import batch

STOCK = GPTConfig(sequence_len=512, vocab_size=50, n_layer=4, n_head=4, n_kv_head=2, n_embd=48, window_pattern="SL")


def layered(**changes) -> LayeredGPTConfig:
    config = LayeredGPTConfig.from_gpt(empty_gpt(STOCK))
    return replace(config, layers=tuple(replace(layer, **changes) for layer in config.layers))


MODELS = {
    "stock": STOCK,
    "spelled out": layered(),
    "low rank": LayerChanges(attn_rank=4, mlp_rank=4).apply(STOCK),
    "low-rank attention": LayerChanges(attn_rank=4).apply(STOCK),
    "swiglu": layered(activation="swiglu"),
    "gelu": layered(activation="gelu"),
    "deep mlp": layered(mlp_depth=2),
    "narrow queries": layered(qk_dim=8),
}


def build(config: GPTConfig):
    """No parameter at zero, or half of the model would have nothing to say."""
    model = empty_gpt(config)
    model.to_empty(device="cpu")
    torch.manual_seed(1)
    model.init_weights()
    with torch.no_grad():
        for p in model.parameters():
            p += 0.2 * torch.randn_like(p)
    return model.eval()


def decoded(model, idx: torch.Tensor, prompt: int) -> tuple[torch.Tensor, KVCache]:
    """Logits (B, T - prompt, V) behind each token from `prompt` on, one at a time; and the cache."""
    cache = Engine(model, Special())._new_cache(len(idx), idx.size(1))
    with torch.inference_mode():
        if prompt:
            model(idx[:, :prompt], kv_cache=cache)
        return torch.cat([model(column, kv_cache=cache) for column in idx[:, prompt:].split(1, dim=1)], dim=1), cache


class Special:
    def get_bos_token_id(self):
        return -1

    def encode_special(self, name):
        return -1


@pytest.mark.parametrize("position", kernel_choice.KERNELS["position"])
@pytest.mark.parametrize("merged", [False, True])
@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("rows, prompt", [(1, 9), (3, 9), (2, 0), (1, 140)], ids=["one row", "rows", "from the first token on", "beyond a window"])
def test_is_the_forward_pass(monkeypatch, kind, rows, prompt, merged, position):
    if merged and "low" not in kind:
        pytest.skip("nothing to merge")
    kernel_choice.settle()
    monkeypatch.setitem(kernel_choice._settled, "position", position)
    monkeypatch.setattr("nanochat.lowrank.call_cost", lambda *args: 10**9 if merged else 0)
    model, (idx, _) = build(MODELS[kind]), batch(3, rows, prompt + 6, 50)
    want, slow = decoded(model, idx, prompt)
    model.cast_for_inference()
    assert isinstance(model.decode_step, DecodeStep)
    forward = []
    monkeypatch.setattr(DecodeStep, "__call__", lambda self, *args, call=DecodeStep.__call__: forward.append(1) or call(self, *args))
    got, fast = decoded(model, idx, prompt)
    assert len(forward) == 6
    torch.testing.assert_close(got, want, rtol=0, atol=2e-4)
    for ours, theirs in zip((*fast.k_cache, *fast.v_cache), (*slow.k_cache, *slow.v_cache)):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=2e-4)
    torch.testing.assert_close(fast.prev_embedding, slow.prev_embedding)
    assert fast.get_pos() == slow.get_pos() and fast.cache_seqlens.tolist() == slow.cache_seqlens.tolist()


@pytest.mark.parametrize("config", [layered(order="parallel"), layered(order="mlp-attn"), LayerChanges(block="ngpt").apply(STOCK)], ids=["parallel", "mlp-attn", "ngpt"])
def test_other_models_decode_by_their_forward_pass(config):
    model, (idx, _) = build(config), batch(3, 1, 12, 50)
    model.cast_for_inference()
    assert model.decode_step is None
    logits, _ = decoded(model, idx, 4)
    with torch.inference_mode():
        torch.testing.assert_close(logits, model(idx)[:, 4:], rtol=0, atol=2e-4)


def test_a_full_cache_is_an_error():
    model, (idx, _) = build(STOCK), batch(3, 2, 8, 50)
    model.cast_for_inference()
    _, cache = decoded(model, idx, 4)
    with pytest.raises(ValueError, match="KV cache holds 8 positions, 9 are needed"), torch.inference_mode():
        model(idx[:, :1], kv_cache=cache)


def test_no_weight_is_kept_twice():
    """The matrix of queries, keys and values holds the layer's own."""
    model, (idx, _) = build(STOCK), batch(3, 1, 8, 50)
    model.cast_for_inference()
    before, _ = decoded(model, idx, 4)
    for block in model.transformer.h:
        for part in (block.attn.c_q, block.attn.c_k, block.attn.c_v):
            with torch.no_grad():
                part.weight.mul_(0.5 if part is block.attn.c_v else 1.0).sub_(0.1)
    after, _ = decoded(model, idx, 4)
    with torch.inference_mode():
        want = model(idx)[:, 4:]
    torch.testing.assert_close(after, want, rtol=0, atol=2e-4)
    assert not torch.allclose(before, after)

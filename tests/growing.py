"""Small models with weights that hide nothing, and a way to compute with them in float64."""
import contextlib
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from nanochat import gpt
from nanochat.gpt import GPT, LOGIT_SOFTCAP, GPTConfig
from nanochat.layered_gpt import LayeredGPTConfig, LayerSpec, build_gpt
from nanochat.ngpt import NormalizedWeights

VOCAB = 100
STOCK = GPTConfig(sequence_len=64, vocab_size=VOCAB, n_layer=3, n_head=4, n_kv_head=2, n_embd=32, window_pattern="SL")
MIXED = (  # a layer of each kind
    LayerSpec(n_head=4, n_kv_head=2, head_dim=8, qk_dim=4, mlp_hidden=48, window=5, value_embed=True),
    LayerSpec(n_head=2, n_kv_head=1, head_dim=12, qk_dim=16, mlp_hidden=20, mlp_depth=3, order="mlp-attn"),
    LayerSpec(n_head=3, n_kv_head=3, head_dim=6, qk_dim=6, mlp_hidden=40, attn_rank=5, mlp_rank=6, mlp_depth=2, order="parallel", window=9),
    LayerSpec(n_head=4, n_kv_head=2, head_dim=8, qk_dim=8, mlp_hidden=60, mlp_rank=9, activation="swiglu", value_embed=True),
)


def mixed(block: str = "prenorm", **changes) -> LayeredGPTConfig:
    layers = tuple(replace(layer, block=block) for layer in MIXED)
    return LayeredGPTConfig(**{**dict(sequence_len=64, vocab_size=VOCAB, n_layer=4, n_head=4, n_kv_head=2, n_embd=32, window_pattern="SL",
                                      layers=layers, backout_layer=1, lm_head_rank=10), **changes})


def uniform(block: str, n_layer: int = 2, n_embd: int = 32, **changes) -> LayeredGPTConfig:
    """A model of equal layers, with heads of 8 and nothing special, but what `changes` say of the layers, or of how often they are run."""
    loops = changes.pop("loops", 1)
    spec = LayerSpec(**{**dict(n_head=n_embd // 8, n_kv_head=n_embd // 8, head_dim=8, qk_dim=8, mlp_hidden=2 * n_embd, block=block), **changes})
    return LayeredGPTConfig(sequence_len=64, vocab_size=VOCAB, n_layer=n_layer, n_head=spec.n_head, n_kv_head=spec.n_kv_head, n_embd=n_embd,
                            layers=(spec,) * n_layer, loops=loops)


@torch.no_grad()
def random_model(config: GPTConfig, seed: int = 0) -> GPT:
    """A model none of whose weights, scalars and gates has the value that it starts with: zeros and ones would hide errors."""
    model = build_gpt(config)
    generator = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model.init_weights()
    normalized = isinstance(config, LayeredGPTConfig) and config.normalized
    for name, p in model.named_parameters():
        noise = torch.randn(p.shape, generator=generator, dtype=torch.float64).to(p)
        if "gate." in name and "c_gate" not in name or name.startswith("alpha") or ".alpha" in name:
            p.copy_(0.3 * noise)  # gates and step sizes of both signs
        elif name.startswith("lm_head") and not normalized:
            p.copy_(noise * p.size(1) ** -0.5)
        elif p.dim() == 2:
            p.add_(0.5 * noise * p.size(1) ** -0.5)
        else:
            p.add_(0.3 * noise.abs())
    model.smear_lambda.fill_(0.5)
    if normalized:
        NormalizedWeights(model)()
    return model


def plain_cross_entropy(hidden, weight, targets, cap, reduction):
    return F.cross_entropy(cap * torch.tanh(hidden @ weight.T / cap), targets, reduction=reduction)


@contextlib.contextmanager
def float64():
    """Models, and their logits, in float64."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gpt, "COMPUTE_DTYPE", torch.float64)
        patch.setattr(GPT, "_cap", lambda self, z: LOGIT_SOFTCAP * torch.tanh(z[..., :self.config.vocab_size] / LOGIT_SOFTCAP))
        patch.setattr(gpt, "softcap_cross_entropy", plain_cross_entropy)  # ours is float32 inside
        torch.set_default_dtype(torch.float64)
        try:
            yield
        finally:
            torch.set_default_dtype(torch.float32)


def tokens(seed: int = 0, rows: int = 2, length: int = 24) -> torch.Tensor:
    return torch.randint(VOCAB, (rows, length), generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def difference(model: GPT, other: GPT) -> float:
    """The largest of a logit."""
    logits = model(tokens())
    assert logits.std() > 0.3  # or nothing would be compared
    return float((other(tokens()) - logits).abs().max())


def loss_and_gradients(model: GPT, seed: int = 0) -> float:
    text = tokens(seed)
    loss = model(text[:, :-1], text[:, 1:])
    loss.backward()
    return loss.item()

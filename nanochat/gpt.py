"""The stock GPT: one uniform stack of blocks, readable on its own.

Notable:
* rotary embeddings, normalized and sharpened queries and keys, grouped-query attention, sliding windows
* value embeddings: every other layer mixes a per-token embedding into its values through a gate
* smear: each token's embedding takes in some of the previous token's
* per-layer residual scalars: every block sees a mix of the stream and the first embedding x0
* backout: the middle layer's stream is subtracted before the head
* ReLU² MLP, weightless RMSNorm, untied and padded embeddings, logits soft-capped at 15, no biases
* master weights in float32; matmuls and activations in COMPUTE_DTYPE

Names, shapes and formulas are nanochat's (head 92d63d4), so its checkpoints load with `strict=True`.
"""
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn as nn
import torch.nn.functional as F

from nanochat.cli import UsageError
from nanochat.common import COMPUTE_DTYPE, print0
from nanochat.counting import Counting
from nanochat.cross_entropy import softcap_cross_entropy
from nanochat.flash_attention import flash_attn
from nanochat.kernel_choice import chosen
from nanochat.optim import MuonAdamW, adamw_group, inert, matrix_groups

VE_GATE_CHANNELS = 12  # the value-embedding gate reads the first channels of the stream
SMEAR_GATE_CHANNELS = 24
LOGIT_SOFTCAP = 15.0
Fill = Callable[[torch.Tensor], torch.Tensor]  # fills a weight at random and returns it


@dataclass
class GPTConfig:
    sequence_len: int = 2048
    vocab_size: int = 32768
    n_layer: int = 12  # 0: nothing but embedding, smear and head, where progressive training may begin (2511.04981)
    n_head: int = 6  # query heads
    n_kv_head: int = 6  # key and value heads, n_head is a multiple of it
    n_embd: int = 768
    window_pattern: str = "SSSL"  # per layer, repeated: L sees the whole context, S a quarter; the last layer is always L

    # What a stock model has no choice of: no fields, so that its checkpoints' meta stays nanochat's; LayeredGPTConfig has fields of these names
    causal = True
    loops = 1
    normalized = property(lambda self: False)  # are hidden states and weights on the unit sphere?

    @property
    def windows(self) -> dict[str, int]:
        """By letter of the pattern: a quarter of the context, in tiles of 128, and all of it."""
        return {"S": math.ceil(self.sequence_len / 4 / 128) * 128, "L": self.sequence_len}


def norm(x: torch.Tensor) -> torch.Tensor:
    """RMSNorm over the last dimension, without a weight."""
    return F.rms_norm(x, (x.size(-1),))


def linear(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """x (..., in) times weight (out, in) of the same dtype -> (..., out). A single position on a CPU is a matrix-vector product, if that is faster."""
    if x.numel() == weight.size(1) and x.device.type == "cpu" and chosen("position") == "vector":
        return torch.mv(weight, x.view(-1)).view(*x.shape[:-1], -1)
    return F.linear(x, weight)


class Linear(nn.Linear):
    """No bias; the float32 master weight is cast to the dtype of the input."""

    def __init__(self, in_features: int, out_features: int):
        super().__init__(in_features, out_features, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return linear(x, self.weight.to(x.dtype))

    def init(self, fill: Fill) -> None:
        fill(self.weight)

    def init_to_zero(self) -> None:
        nn.init.zeros_(self.weight)


def uniform(scale: float = 1.0) -> Fill:
    """Fills a weight (out, in) with uniform numbers of standard deviation scale / sqrt(in)."""
    def fill(W_OI: torch.Tensor) -> torch.Tensor:
        bound = scale * (math.sqrt(3) / math.sqrt(W_OI.size(1)))
        return nn.init.uniform_(W_OI, -bound, bound)
    return fill


def has_ve(layer_idx: int, n_layer: int) -> bool:
    """True for every other layer, counted so that the last one has a value embedding."""
    return layer_idx % 2 == (n_layer - 1) % 2


def first_mix(layer_idx: int, n_layer: int) -> tuple[float, float]:
    """The scalars that a layer of a new model has: of the stream that enters it, and of the first embedding."""
    depth = layer_idx / max(n_layer - 1, 1)
    return 1.15 - 0.10 * depth, 0.20 - 0.15 * depth


def apply_rotary_emb(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotates the two halves of each head by minus the position's angle. x (B, T, H, D), cos and sin (1 or B, T, 1, D/2)."""
    assert x.ndim == 4
    x1, x2 = x.chunk(2, dim=-1)
    return torch.cat((x1 * cos + x2 * sin, x2 * cos - x1 * sin), dim=-1)


def rotary_rows(table: torch.Tensor, start: int | torch.Tensor, length: int) -> torch.Tensor:
    """Of a table (1, positions, 1, D/2) the rows [start, start + length): (1, length, 1, D/2), or (B, length, 1, D/2) where start is (B,)."""
    if isinstance(start, int):
        return table[:, start:start + length]
    return table[0, start[:, None] + torch.arange(length, device=start.device)]


class CausalSelfAttention(nn.Module):
    def __init__(self, config: GPTConfig, layer_idx: int):
        super().__init__()
        self.layer_idx = layer_idx
        self.n_head, self.n_kv_head = config.n_head, config.n_kv_head
        assert config.n_embd % config.n_head == 0, "n_embd must be a multiple of n_head"
        assert config.n_kv_head <= config.n_head and config.n_head % config.n_kv_head == 0, "n_head must be a multiple of n_kv_head"
        self.head_dim = config.n_embd // config.n_head
        self.c_q = Linear(config.n_embd, self.n_head * self.head_dim)
        self.c_k = Linear(config.n_embd, self.n_kv_head * self.head_dim)
        self.c_v = Linear(config.n_embd, self.n_kv_head * self.head_dim)
        self.c_proj = Linear(config.n_embd, config.n_embd)
        self.ve_gate = Linear(VE_GATE_CHANNELS, self.n_kv_head) if has_ve(layer_idx, config.n_layer) else None

    def project(self, x, cos_sin):
        """x (B, T, C) -> queries (B, T, H, D), keys and values (B, T, Hkv, D); queries and keys rotated."""
        q, k, v = (c(x).unflatten(-1, (heads, -1)) for c, heads in ((self.c_q, self.n_head), (self.c_k, self.n_kv_head), (self.c_v, self.n_kv_head)))
        return apply_rotary_emb(q, *cos_sin), apply_rotary_emb(k, *cos_sin), v

    def forward(self, x_BTC, ve_BTE, cos_sin, window_size, kv_cache):
        """x normed (B, T, C), ve (B, T, K*D) or None -> (B, T, C)."""
        q_BTHD, k_BTKD, v_BTKD = self.project(x_BTC, cos_sin)
        if ve_BTE is not None:
            gate_BTK = 3 * torch.sigmoid(self.ve_gate(x_BTC[..., :VE_GATE_CHANNELS]))
            v_BTKD = v_BTKD + gate_BTK.unsqueeze(-1) * ve_BTE.view(v_BTKD.shape)
        q_BTHD, k_BTKD = self.sharpen(q_BTHD, k_BTKD)
        return self.c_proj(self.attend(q_BTHD, k_BTKD, v_BTKD, window_size, kv_cache).contiguous().flatten(2))

    def sharpen(self, q_BTHD, k_BTKD):
        """Queries and keys of unit RMS, then sharper than 1/sqrt(D) alone would make the scores."""
        return norm(q_BTHD) * 1.2, norm(k_BTKD) * 1.2

    def attend(self, q_BTHD, k_BTKD, v_BTKD, window_size, kv_cache):
        """The values that each query sees, mixed: (B, T, H, D). With a cache it sees what that holds too, and the new keys and values are written there.
        Raises UsageError for a cache where attention is not causal: what it holds would change with every token."""
        attention = dict(causal=window_size[1] == 0, window_size=window_size)
        if kv_cache is None:
            return flash_attn.flash_attn_func(q_BTHD, k_BTKD, v_BTKD, **attention)
        if not attention["causal"]:
            raise UsageError("a model that looks both ways cannot decode with a cache of keys and values: use one that was trained to predict the next token")
        k_cache, v_cache = kv_cache.get_layer_cache(self.layer_idx)
        return flash_attn.flash_attn_with_kvcache(q_BTHD, k_cache, v_cache, k=k_BTKD, v=v_BTKD, cache_seqlens=kv_cache.cache_seqlens, **attention)

    def init_weights(self) -> None:
        for projection in (self.c_q, self.c_k, self.c_v):
            projection.init(uniform())
        self.c_proj.init_to_zero()  # every block starts as the identity

    def init_gate(self) -> None:
        if self.ve_gate is not None:
            nn.init.uniform_(self.ve_gate.weight, 0.0, 0.02)

    def shape(self) -> tuple[int, int, int, int]:
        """Query heads, key heads, width of a query or key head, width of a value head."""
        return self.n_head, self.n_kv_head, self.c_q.out_features // self.n_head, self.c_v.out_features // self.n_kv_head

    def macs(self, pairs: int) -> int:
        """Multiply-adds between that many (query, key) pairs: scores and mixing of values."""
        n_head, _, qk_dim, v_dim = self.shape()
        return n_head * (qk_dim + v_dim) * pairs


class MLP(nn.Module):
    def __init__(self, config: GPTConfig):
        super().__init__()
        self.c_fc = Linear(config.n_embd, 4 * config.n_embd)
        self.c_proj = Linear(4 * config.n_embd, config.n_embd)

    def init_weights(self) -> None:
        self.c_fc.init(uniform(0.4))
        self.c_proj.init_to_zero()

    def forward(self, x):
        return self.c_proj(F.relu(self.c_fc(x)).square())


class Block(nn.Module):
    def __init__(self, config: GPTConfig, layer_idx: int):
        super().__init__()
        self.attn = CausalSelfAttention(config, layer_idx)
        self.mlp = MLP(config)

    def init_weights(self) -> None:
        self.attn.init_weights()
        self.mlp.init_weights()

    def matrices(self) -> list[nn.Parameter]:
        """What the matrices' optimizer trains."""
        return list(self.parameters())

    def forward(self, x, ve, cos_sin, window_size, kv_cache):
        x = x + self.attn(norm(x), ve, cos_sin, window_size, kv_cache)
        return x + self.mlp(norm(x))


def run_layer(block, x, x0, resid_lambda, x0_lambda, ve, cos_sin, window_size, kv_cache):
    """One block and the mix of stream and first embedding that enters it, each (B, T, C); ve (B, T, key heads * width of a value) or None. Apart so that it can be compiled."""
    return block(resid_lambda * x + x0_lambda * x0, ve, cos_sin, window_size, kv_cache)


class GPT(Counting):
    """Build under `torch.device("meta")`, then `to_empty(device=...)` and `init_weights()`. Another kind of model overrides the `make_` methods."""

    norm = staticmethod(norm)  # of the stream before the first layer and after the last
    cos: torch.Tensor
    sin: torch.Tensor
    decode_step: Any = None  # set by cast_for_inference

    def __init__(self, config: GPTConfig, pad_vocab_size_to: int = 64):
        super().__init__()
        self.config = config
        self.loops = config.loops  # times that each layer is run, one after the other
        self.window_sizes = self.make_window_sizes()
        self.backout_layer = config.n_layer // 2
        self.run_layer = run_layer  # compiler.py puts a compiled one in its place
        padded_vocab = -(-config.vocab_size // pad_vocab_size_to) * pad_vocab_size_to
        self.transformer = nn.ModuleDict({
            "wte": nn.Embedding(padded_vocab, config.n_embd),
            "h": nn.ModuleList([self.make_block(i) for i in range(config.n_layer)]),
        })
        self.lm_head = self.make_head(padded_vocab)
        self.resid_lambdas = nn.Parameter(torch.empty(config.n_layer))  # scale of the stream entering a layer
        self.x0_lambdas = nn.Parameter(torch.empty(config.n_layer))  # share of the first embedding added to it
        self.smear_gate = Linear(SMEAR_GATE_CHANNELS, 1)
        self.smear_lambda = nn.Parameter(torch.empty(1))
        self.backout_lambda = nn.Parameter(torch.empty(1))
        self.value_embeds = nn.ModuleDict({
            str(i): nn.Embedding(padded_vocab, block.attn.c_v.out_features)
            for i, block in enumerate(self.transformer.h) if block.attn.ve_gate is not None})
        self.rotary_seq_len = config.sequence_len * 10  # room for prompts beyond the training length
        for name, table in self.make_rotary().items():
            self.register_buffer(name, table, persistent=False)

    def make_block(self, layer_idx: int) -> nn.Module:
        return Block(self.config, layer_idx)

    def make_head(self, padded_vocab: int) -> nn.Module:
        return Linear(self.config.n_embd, padded_vocab)

    def make_rotary(self) -> dict[str, torch.Tensor]:
        """The rotary tables, by the names of their buffers."""
        return dict(zip(("cos", "sin"), self._precompute_rotary_embeddings(self.rotary_seq_len, self.config.n_embd // self.config.n_head)))

    def make_window_sizes(self) -> list[tuple[int, int]]:
        """How far each layer sees, (back, ahead); a negative number is no limit."""
        config, pattern = self.config, self.config.window_pattern.upper()
        assert pattern and set(pattern) <= {"S", "L"}, f"window_pattern {config.window_pattern!r} must be letters S and L"
        letters = [pattern[i % len(pattern)] for i in range(config.n_layer - 1)] + ["L"] * min(config.n_layer, 1)
        return [(config.windows[letter], 0) for letter in letters]

    @torch.no_grad()
    def init_weights(self) -> None:
        """Fills every parameter and buffer. The order of the draws is part of the format: it fixes the random stream."""
        nn.init.normal_(self.transformer.wte.weight, std=0.8)
        self.lm_head.init(lambda W_VC: nn.init.normal_(W_VC, std=0.001))
        for block in self.transformer.h:
            block.init_weights()
        self._init_scalars_and_embeddings()

    def _init_scalars_and_embeddings(self) -> None:
        for i in range(self.config.n_layer):
            self.resid_lambdas[i], self.x0_lambdas[i] = first_mix(i, self.config.n_layer)
        nn.init.zeros_(self.smear_lambda)
        nn.init.constant_(self.backout_lambda, 0.2)
        nn.init.uniform_(self.smear_gate.weight, 0.0, 0.02)
        bound = math.sqrt(3) / math.sqrt(self.config.n_embd)
        for embedding in self.value_embeds.values():
            nn.init.uniform_(embedding.weight, -bound, bound)
        for block in self.transformer.h:
            block.attn.init_gate()
        self.init_buffers()

    def init_buffers(self) -> None:
        """Fills the rotary tables and sets the embeddings' storage dtype: what a model needs besides its parameters' values."""
        for name, table in self.make_rotary().items():
            setattr(self, name, table)
        self._cast_embeddings()

    def _cast_embeddings(self) -> None:
        if COMPUTE_DTYPE != torch.float16:  # fp16 cannot hold the optimizer's small embedding updates
            self.transformer.wte.to(COMPUTE_DTYPE)
            self.value_embeds.to(COMPUTE_DTYPE)

    def cast_for_inference(self) -> None:
        """Stores the matrices in the compute dtype: the same outputs, half the bytes to read per decoded token. What then decodes has few calls."""
        from nanochat.decode_step import DecodeStep  # which needs this module
        for module in self.modules():
            if isinstance(module, Linear):
                module.to(COMPUTE_DTYPE)
        self.decode_step = DecodeStep(self) if DecodeStep.suits(self) else None

    def _precompute_rotary_embeddings(self, seq_len: int, head_dim: int, base: float = 100000, device=None):
        """cos and sin of position * base^(-2j/D), each (1, seq_len, 1, D/2) in the compute dtype."""
        device = device or self.transformer.wte.weight.device
        inv_freq = 1.0 / base ** (torch.arange(0, head_dim, 2, dtype=torch.float32, device=device) / head_dim)
        angles = torch.outer(torch.arange(seq_len, dtype=torch.float32, device=device), inv_freq)
        return tuple(table.to(COMPUTE_DTYPE)[None, :, None, :] for table in (angles.cos(), angles.sin()))

    def cos_sin(self, start: int | torch.Tensor, length: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """For each layer the rotary tables of positions [start, start + length), (1, length, 1, D/2) each; with start (B,), (B, length, 1, D/2)."""
        return [(rotary_rows(self.cos, start, length), rotary_rows(self.sin, start, length))] * self.config.n_layer

    def get_device(self) -> torch.device:
        return self.transformer.wte.weight.device

    def embed(self, idx: torch.Tensor) -> torch.Tensor:
        """The stream (B, T, C) of tokens (B, T) before the smear, which looks at the previous token's."""
        return self.norm(self.transformer.wte(idx).to(COMPUTE_DTYPE))

    def forward(self, idx, targets=None, kv_cache=None, loss_reduction: str = "mean", both_ways: bool = False):
        """idx int (B, T). Without targets: float32 logits (B, T, V). With targets (B, T), -1 to leave out: the loss,
        a scalar for `mean` and `sum`, (B*T,) for `none`. With a cache the T tokens are appended at its position
        (and with its `last_logits_only` the logits are (B, 1, V)). both_ways: attention of a causal model sees as far ahead as back."""
        B, T = idx.shape
        start = kv_cache.get_pos() if kv_cache is not None else 0
        assert not isinstance(start, int) or start + T <= self.cos.size(1), f"{start + T} positions exceed the rotary table of {self.cos.size(1)}"
        assert idx.device == self.cos.device, f"tokens on {idx.device}, model on {self.cos.device}"
        assert self.cos.dtype == COMPUTE_DTYPE

        if T == 1 and self.decode_step is not None and targets is None and kv_cache is not None:
            return self.decode_step(self, idx, kv_cache)
        windows = [(back, back) for back, _ in self.window_sizes] if both_ways else self.window_sizes
        x = self._smear(self.embed(idx), kv_cache)
        x0 = x.view_as(x)  # another object than x, or the first layer would be compiled separately
        x_mid = x
        for i, (block, mix, cos_sin) in enumerate(zip(self.transformer.h, self._mixes(), self.cos_sin(start, T))):
            ve = self.value_embeds[str(i)](idx).to(x.dtype) if str(i) in self.value_embeds else None
            for use in range(self.loops):
                if kv_cache is not None:
                    kv_cache.first_slot = use * len(self.transformer.h)
                x = self.run_layer(block, x, x0, *mix, ve, cos_sin, windows[i], kv_cache)
            if i == self.backout_layer:
                x_mid = x
        if kv_cache is not None:
            kv_cache.advance(T)
        x = x - self._backout().to(x.dtype) * x_mid
        if getattr(kv_cache, "last_logits_only", False):
            x = x[:, -1:]  # of a prompt only the last position is sampled from
        x = self.norm(x)

        if targets is None:
            return self._cap(self.lm_head(x))
        x, head = self.head_input(x)
        if type(head) is not Linear:  # an FP8 head computes its own logits
            logits = self._cap(head(x)).view(B * T, -1)
            return F.cross_entropy(logits, targets.reshape(-1), ignore_index=-1, reduction=loss_reduction)
        weight = self.head_scale(head.weight)[:self.config.vocab_size].to(x.dtype)
        return softcap_cross_entropy(x.reshape(B * T, -1), weight, targets.reshape(-1), LOGIT_SOFTCAP, loss_reduction)

    def _cap(self, logits: torch.Tensor) -> torch.Tensor:
        """Float32 logits of the real vocabulary, within +-15."""
        return LOGIT_SOFTCAP * torch.tanh(logits[..., :self.config.vocab_size].float() / LOGIT_SOFTCAP)

    def head_scale(self, weight: torch.Tensor) -> torch.Tensor:
        """The head's last matrix (V, C) as the loss multiplies with it."""
        return weight

    def head_input(self, x: torch.Tensor) -> tuple[torch.Tensor, nn.Module]:
        """What the head's last matrix is applied to, and that matrix."""
        return x, self.lm_head

    def _smear(self, x, kv_cache):
        """Adds the gated previous embedding to each position; the first of all has no previous one. It looks back, never ahead, even where attention does both."""
        previous = None
        if kv_cache is None:
            assert x.size(1) > 1, "a forward pass without a cache needs at least 2 tokens"
        else:
            previous = kv_cache.prev_embedding
            kv_cache.prev_embedding = x[:, -1:, :]
        gate = self.smear_lambda.to(x.dtype) * torch.sigmoid(self.smear_gate(x[..., :SMEAR_GATE_CHANNELS]))
        if previous is None:
            return torch.cat((x[:, :1], x[:, 1:] + gate[:, 1:] * x[:, :-1]), dim=1)
        return x + gate * torch.cat((previous, x[:, :-1]), dim=1)

    def _mixes(self) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """For each layer the scalars of the stream and of the first embedding, whose sum enters it."""
        return list(zip(self.resid_lambdas.unbind(), self.x0_lambdas.unbind()))

    def _backout(self) -> torch.Tensor:
        """Without layers, or with 1 or 2, what is backed out is the stream itself, so the final norm cancels the scalar."""
        return self.backout_lambda if self.backout_layer < self.config.n_layer - 1 else inert(self.backout_lambda)

    def setup_optimizer(self, unembedding_lr: float = 0.004, embedding_lr: float = 0.2, matrix_lr: float = 0.02,
                        weight_decay: float = 0.0, scalar_lr: float = 0.5, matrix_optimizer: str = "muon") -> MuonAdamW:
        """Muon (or AdamW) for the matrices of the blocks, AdamW for the rest. The order of the groups is part of the checkpoint format."""
        groups = self._param_groups(unembedding_lr=unembedding_lr, embedding_lr=embedding_lr, matrix_lr=matrix_lr, weight_decay=weight_decay,
                                    scalar_lr=scalar_lr, matrix_optimizer=matrix_optimizer)
        for group in groups:  # the scalars of no layer get no gradient
            group["params"] = [p for p in group["params"] if p.numel()]
        optimizer = MuonAdamW(groups, self.named_parameters(), deals=type(self) is not GPT)  # a stock model's checkpoints are nanochat's
        covered = sum(len(group["params"]) for group in optimizer.param_groups)
        assert covered == sum(p.numel() > 0 for p in self.parameters()), "a parameter is in no group"
        for group in optimizer.param_groups:
            group["initial_lr"] = group["lr"]
        return optimizer

    def _matrices(self) -> list[nn.Parameter]:
        return [p for block in self.transformer.h for p in block.matrices()]

    def _param_groups(self, unembedding_lr, embedding_lr, matrix_lr, weight_decay, scalar_lr, matrix_optimizer) -> list[dict]:
        """AdamW's learning rates of embeddings and head are tuned at width 768 and scale with 1/sqrt(width)."""
        width_scale = (self.config.n_embd / 768) ** -0.5
        print0(f"AdamW learning rates scaled by (width/768)^-0.5 = {width_scale:.6f}")
        return [
            adamw_group(self.lm_head.parameters(), unembedding_lr * width_scale, (0.8, 0.96), 0.01),
            adamw_group(self.transformer.wte.parameters(), embedding_lr * width_scale, (0.8, 0.995), 0.001),
            adamw_group(self.value_embeds.parameters(), embedding_lr * width_scale * 0.5, (0.8, 0.995), 0.01),
            adamw_group([self.resid_lambdas], scalar_lr * 0.01, (0.8, 0.95), 0.05),
            adamw_group([self.x0_lambdas], scalar_lr, (0.96, 0.95), 0.0),
            adamw_group([self.smear_gate.weight, self.smear_lambda, self.backout_lambda], 0.2, (0.8, 0.95), 0.0),
            *matrix_groups(self._matrices(), matrix_lr, weight_decay, matrix_optimizer),
        ]

    @torch.inference_mode()
    def generate(self, tokens: list[int], max_tokens: int, temperature: float = 1.0, top_k: int | None = None,
                 seed: int = 42) -> Iterator[int]:
        """Plain sampling without a cache, the reference for `engine.Engine`. Temperature 0 takes the most likely token."""
        assert isinstance(tokens, list)
        device = self.get_device()
        rng = torch.Generator(device=device).manual_seed(seed) if temperature > 0 else None
        ids = torch.tensor([tokens], dtype=torch.long, device=device)
        for _ in range(max_tokens):
            logits = self.forward(ids)[:, -1]
            if top_k is not None and top_k > 0:
                kth = torch.topk(logits, min(top_k, logits.size(-1))).values[:, -1:]
                logits = logits.masked_fill(logits < kth, -float("inf"))
            if temperature > 0:
                next_id = torch.multinomial(F.softmax(logits / temperature, dim=-1), num_samples=1, generator=rng)
            else:
                next_id = logits.argmax(dim=-1, keepdim=True)
            ids = torch.cat((ids, next_id), dim=1)
            yield int(next_id)

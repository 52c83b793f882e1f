"""The layered model once more, in plain PyTorch and in one file: what each layer computes is said by its entry in `layers`.

nanochat's own model is written to be trained, grown and decoded fast, and is spread over many files. This one is written to be read, to be copied beside
exported weights (it imports nothing but PyTorch), and to be an oracle that shares no line with what it checks (tests/test_export_reference.py).

Sizes in suffixes: B rows, T new positions, S all positions, C channels of the stream, H and K query and key heads, D width of a head.

A cache is any object with `update(keys, values, index) -> (keys, values)`, which appends along the positions and returns all of them, (B, K, S, D), as the
caches of `transformers` do. There is an index for each use of each layer. The embeddings are kept too, at the index behind the last: the smear looks back at them.
"""
import torch
import torch.nn as nn
import torch.nn.functional as F

ROTARY_BASE = 100000
SOFTCAP = 15.0  # logits stay within +-15
SHARPNESS = 1.2  # of queries and keys
GATE_CHANNELS, SMEAR_CHANNELS = 12, 24  # what the gates read of the stream
STEPS = {"attn-mlp": ("attn", "mlp"), "mlp-attn": ("mlp", "attn"), "parallel": ("attn+mlp",)}


def rms(x):
    """RMSNorm over the last dimension, without a weight."""
    return F.rms_norm(x, (x.size(-1),))


def unit(x):
    """Length 1 along the last dimension."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    return (wide / wide.square().sum(-1, keepdim=True).clamp_min(1e-24).sqrt()).to(x.dtype)


def rotate(x_BHTD, positions_BT):
    """The pairs (j, j + D/2) of a head, turned by minus position * base^(-2j/D)."""
    half = x_BHTD.size(-1) // 2
    frequencies = 1.0 / ROTARY_BASE ** (torch.arange(half, dtype=torch.float32, device=x_BHTD.device) / half)
    angles = positions_BT[:, None, :, None].float() * frequencies
    cos, sin = angles.cos().to(x_BHTD.dtype), angles.sin().to(x_BHTD.dtype)
    a, b = x_BHTD[..., :half], x_BHTD[..., half:]
    return torch.cat((a * cos + b * sin, b * cos - a * sin), dim=-1)


def visible(T: int, S: int, window: int, causal: bool, device) -> torch.Tensor:
    """(T, S): which of all positions each of the last T sees. A negative window has no limit, another one reaches so far back (and ahead, if not causal)."""
    back = torch.arange(S - T, S, device=device)[:, None] - torch.arange(S, device=device)
    seen = back >= 0 if causal else torch.ones_like(back, dtype=torch.bool)
    return seen if window < 0 else seen & (back.abs() <= window)


class LowRank(nn.Module):
    """y = U (V x)."""

    def __init__(self, inputs: int, outputs: int, rank: int):
        super().__init__()
        self.V = nn.Linear(inputs, rank, bias=False)
        self.U = nn.Linear(rank, outputs, bias=False)

    def forward(self, x):
        return self.U(self.V(x))


def matrix(inputs: int, outputs: int, rank: int = 0) -> nn.Module:
    return LowRank(inputs, outputs, rank) if rank else nn.Linear(inputs, outputs, bias=False)


class Attention(nn.Module):
    def __init__(self, n_embd: int, spec: dict):
        super().__init__()
        self.heads, self.kv_heads, self.qk_dim = spec["n_head"], spec["n_kv_head"], spec["qk_dim"]
        rank, self.normalized = spec["attn_rank"], spec["block"] == "ngpt"
        self.c_q = matrix(n_embd, self.heads * self.qk_dim, rank)
        self.c_k = matrix(n_embd, self.kv_heads * self.qk_dim, rank)
        self.c_v = matrix(n_embd, self.kv_heads * spec["head_dim"], rank)
        self.c_proj = matrix(self.heads * spec["head_dim"], n_embd, rank)
        self.ve_gate = nn.Linear(GATE_CHANNELS, self.kv_heads, bias=False) if spec["value_embed"] else None
        if self.normalized:
            self.s_qk = nn.Parameter(torch.ones(self.heads, self.qk_dim))
            self.s_head = nn.Parameter(torch.ones(self.heads))

    def forward(self, u_BTC, ve_BTE, positions_BT, seen, cache, index):
        """u: the normed stream; ve: the tokens' value embeddings, or None; seen: bool (B or 1, 1, T, S); index: of what the cache holds for it."""
        q, k, v = (c(u_BTC).unflatten(-1, (heads, -1)).transpose(1, 2)
                   for c, heads in ((self.c_q, self.heads), (self.c_k, self.kv_heads), (self.c_v, self.kv_heads)))
        if ve_BTE is not None:
            gate_BTK = 3 * torch.sigmoid(self.ve_gate(u_BTC[..., :GATE_CHANNELS]))
            v = v + gate_BTK.transpose(1, 2).unsqueeze(-1) * ve_BTE.unflatten(-1, (self.kv_heads, -1)).transpose(1, 2)
        q, k = rotate(q, positions_BT), rotate(k, positions_BT)
        if self.normalized:  # scores of sqrt(D) * cosine, sharpened per channel
            root = self.qk_dim ** 0.5
            q, k = unit(q) * (root * self.s_qk[:, None]), unit(k) * root
        else:
            q, k = rms(q) * SHARPNESS, rms(k) * SHARPNESS
        if cache is not None:
            k, v = cache.update(k, v, index)
        k, v = (x.repeat_interleave(self.heads // self.kv_heads, dim=1) for x in (k, v))
        y_BHTD = F.scaled_dot_product_attention(q, k, v, attn_mask=seen)  # scores are divided by sqrt(D)
        if self.normalized:
            y_BHTD = y_BHTD * self.s_head[:, None, None]
        return self.c_proj(y_BHTD.transpose(1, 2).flatten(2))


class MLP(nn.Module):
    """ReLU² after each of `mlp_depth` hidden layers, or one layer of GELU or SwiGLU."""

    def __init__(self, n_embd: int, spec: dict):
        super().__init__()
        hidden, rank, more = spec["mlp_hidden"], spec["mlp_rank"], spec["mlp_depth"] - 1
        gated, self.gelu, self.normalized = spec["activation"] == "swiglu", spec["activation"] == "gelu", spec["block"] == "ngpt"
        self.c_fc = matrix(n_embd, hidden, rank)
        self.c_gate = matrix(n_embd, hidden, rank) if gated else None
        self.c_hidden = nn.ModuleList(matrix(hidden, hidden, rank) for _ in range(more))
        self.c_proj = matrix(hidden, n_embd, rank)
        if self.normalized:
            self.s_u = nn.Parameter(torch.ones(hidden))
            self.s_v = nn.Parameter(torch.ones(hidden)) if gated else None
            self.s_hidden = nn.ParameterList(torch.ones(hidden) for _ in range(more))

    def forward(self, u):
        x = self.c_fc(u) * self.s_u if self.normalized else self.c_fc(u)
        if self.c_gate is None:
            x = F.gelu(x) if self.gelu else F.relu(x).square()
        else:
            x = F.silu(self.c_gate(u) * self.s_v if self.normalized else self.c_gate(u)) * x
        for i, layer in enumerate(self.c_hidden):
            x = F.relu(layer(unit(x)) * self.s_hidden[i] if self.normalized else layer(rms(x))).square()
        return self.c_proj(x)


class Block(nn.Module):
    """Pre-norm residual steps, or nGPT's: on the unit sphere, part of the way towards what a module says."""

    def __init__(self, n_embd: int, spec: dict):
        super().__init__()
        self.steps, self.normalized = STEPS[spec["order"]], spec["block"] == "ngpt"
        self.attn = Attention(n_embd, spec)
        self.mlp = MLP(n_embd, spec)
        if self.normalized:
            self.alpha_attn = nn.Parameter(torch.ones(n_embd))
            self.alpha_mlp = nn.Parameter(torch.ones(n_embd))

    def forward(self, x, *attention):
        if self.normalized:
            x = unit(x)
        for step in self.steps:
            u, out = x if self.normalized else rms(x), x
            for name in step.split("+"):
                y = self.attn(u, *attention) if name == "attn" else self.mlp(u)
                out = out + (getattr(self, f"alpha_{name}") * (unit(y) - x) if self.normalized else y)
            x = unit(out) if self.normalized else out
        return x


class Stack(nn.Module):
    """From tokens to the normed stream behind the last layer.

    config: an object with n_embd, layers (a dict for each, the fields of nanochat's LayerSpec), backout_layer, causal, loops (how often each layer is
    run before the next one), and padded_vocab_size, the rows of the embedding tables.
    """

    def __init__(self, config):
        super().__init__()
        self.specs, self.backout_layer, self.causal, self.loops = config.layers, config.backout_layer, config.causal, config.loops
        self.norm = unit if self.specs[0]["block"] == "ngpt" else rms
        self.transformer = nn.ModuleDict({
            "wte": nn.Embedding(config.padded_vocab_size, config.n_embd),
            "h": nn.ModuleList(Block(config.n_embd, spec) for spec in self.specs)})
        self.resid_lambdas = nn.Parameter(torch.ones(len(self.specs)))
        self.x0_lambdas = nn.Parameter(torch.zeros(len(self.specs)))
        self.smear_gate = nn.Linear(SMEAR_CHANNELS, 1, bias=False)
        self.smear_lambda = nn.Parameter(torch.zeros(1))
        self.backout_lambda = nn.Parameter(torch.zeros(1))
        self.value_embeds = nn.ModuleDict({
            str(i): nn.Embedding(config.padded_vocab_size, spec["n_kv_head"] * spec["head_dim"]) for i, spec in enumerate(self.specs) if spec["value_embed"]})

    def forward(self, ids_BT, mask_BS=None, cache=None, states: list | None = None, positions_BT=None):
        """mask: 1 for tokens and 0 for padding, of the cached positions too. states: gets the stream that enters each layer, and what is returned."""
        e_BTC = self.norm(self.transformer["wte"](ids_BT))
        e_BSC = e_BTC
        if cache is not None:
            if not self.causal:
                raise ValueError("a model that looks both ways has no use for a cache: what it holds would change with every token")
            e_BSC = cache.update(e_BTC[:, None], e_BTC[:, None, :, :0], self.loops * len(self.specs))[0][:, 0]
        T, S = ids_BT.size(1), e_BSC.size(1)
        if mask_BS is None:
            mask_BS = torch.ones_like(e_BSC[..., 0])
        mask_BS = mask_BS.bool()
        if positions_BT is None:
            positions_BT = (mask_BS.long().cumsum(-1) - 1).clamp_min(0)[:, -T:]

        # each position takes in some of the embedding before it; what begins a row has none
        previous_BTC = F.pad(e_BSC * mask_BS.unsqueeze(-1), (0, 0, 1, -1))[:, -T:]
        x = x0 = e_BTC + self.smear_lambda * torch.sigmoid(self.smear_gate(e_BTC[..., :SMEAR_CHANNELS])) * previous_BTC

        itself = visible(T, S, 0, True, ids_BT.device)  # padding sees itself, as a softmax over nothing is no number
        for i, (spec, block) in enumerate(zip(self.specs, self.transformer["h"])):
            if states is not None:
                states.append(x)
            seen = visible(T, S, spec["window"], self.causal, ids_BT.device) & mask_BS[:, None, None] | itself
            ve = self.value_embeds[str(i)](ids_BT) if spec["value_embed"] else None
            for use in range(self.loops):
                x = block(self.resid_lambdas[i] * x + self.x0_lambdas[i] * x0, ve, positions_BT, seen, cache, use * len(self.specs) + i)
            if i == self.backout_layer:
                middle = x
        x = self.norm(x - self.backout_lambda * middle)
        if states is not None:
            states.append(x)
        return x


class Head(nn.Module):
    """From the stream to float32 logits (..., vocab_size). config: also lm_head_rank and vocab_size."""

    def __init__(self, config):
        super().__init__()
        self.vocab_size = config.vocab_size
        self.lm_head = matrix(config.n_embd, config.padded_vocab_size, config.lm_head_rank)
        self.s_z = nn.Parameter(torch.ones(config.padded_vocab_size)) if config.layers[0]["block"] == "ngpt" else None

    def forward(self, x):
        logits = self.lm_head(x) if self.s_z is None else self.lm_head(x) * self.s_z
        logits = logits[..., :self.vocab_size].to(torch.promote_types(logits.dtype, torch.float32))
        return SOFTCAP * torch.tanh(logits / SOFTCAP)


class LanguageModel(nn.Module):
    """Tokens (B, T) -> float32 logits (B, T, V)."""

    def __init__(self, config):
        super().__init__()
        self.stack, self.head = Stack(config), Head(config)

    def forward(self, ids_BT, mask_BS=None, cache=None):
        return self.head(self.stack(ids_BT, mask_BS, cache))


class ListCache:
    """Keys and values as plain tensors, one pair for each layer and one for the embeddings."""

    def __init__(self, pairs=()):
        self.pairs = list(pairs)

    def update(self, keys, values, index: int):
        while len(self.pairs) <= index:
            self.pairs.append(None)
        if self.pairs[index] is not None:
            keys, values = (torch.cat(pair, dim=-2) for pair in zip(self.pairs[index], (keys, values)))
        self.pairs[index] = (keys, values)
        return keys, values


def place(name: str) -> str:
    """Where a parameter of nanochat's model, by its name there, is in a `LanguageModel`."""
    return ("head." if name.startswith(("lm_head.", "s_z")) else "stack.") + name

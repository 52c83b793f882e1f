"""How much memory a training step takes, on any device and without it.

    python -m scripts.base_train --depth=12 --memory                  # what these flags take on this machine
    NANOCHAT_DTYPE=bfloat16 python -m scripts.base_train --depth=12 --memory --device-type=cuda
    NANOCHAT_DTYPE=bfloat16 python -m nanochat.memory                 # what fits on which card, and how long it takes

* The step itself is run, on tensors without content (the meta device), and a ledger adds up what is alive after every operation. So any kind
  of layer is counted as it is, and nothing here has to be kept in step with the model.
* What does not show there is put in place: the attention kernel of the device, the size of the pieces of the loss, and under torch.compile the
  layers as its partitioner divides them into what is kept for the backward pass and what is computed anew.
* Allocators round up, and libraries (cuBLAS, the CUDA context: half a GiB) want memory of their own: that is not in the sum.
"""
import argparse
import contextlib
import io
import math
import sys
import weakref
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn.utils.stateless import _reparametrize_module
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves

from nanochat import cross_entropy, flash_attention
from nanochat.blocked_attention import band_attention
from nanochat.cli import UsageError, command, flag, fraction, parse_settings, positive_float, positive_int
from nanochat.common import COMPUTE_DTYPE, get_peak_flops
from nanochat.compiler import why_not_compile
from nanochat.gpt import GPTConfig
from nanochat.kernel_choice import chosen, chosen_backward
from nanochat.layered_gpt import build_gpt, empty_gpt
from nanochat.recipe import gpt_config, plan_horizon
from nanochat.resources import memory_limit

ROLES = ("weights", "gradients", "optimizer", "activations", "logits")


class Ledger(TorchDispatchMode):
    """Bytes alive by role, now and at the fullest moment so far. New tensors belong to the present `role`."""

    def __init__(self) -> None:
        super().__init__()
        self.role = "weights"
        self.alive: Counter[str] = Counter()
        self.fullest: Counter[str] = Counter()
        self._entries: dict[int, list] = {}  # role and bytes by storage

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if inside := INSIDE.get(func):  # the operations of which it is made, each by itself
            with self:
                return inside(self, *args)
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, torch.Tensor):
                self._add(leaf.untyped_storage())
        return out

    def _add(self, storage: torch.UntypedStorage) -> None:
        key = storage._cdata
        if key not in self._entries:
            self._entries[key] = [self.role, storage.nbytes()]
            self.alive[self.role] += storage.nbytes()
            weakref.finalize(storage, self._drop, key)
            if self.alive.total() > self.fullest.total():
                self.fullest = self.alive.copy()

    def _drop(self, key: int) -> None:
        role, size = self._entries.pop(key)
        self.alive[role] -= size

    def move(self, tensor: torch.Tensor, role: str) -> None:
        entry = self._entries[tensor.untyped_storage()._cdata]
        self.alive[entry[0]] -= entry[1]
        self.alive[role] += entry[1]
        entry[0] = role


def _loss(ledger: Ledger, *args):
    role, ledger.role = ledger.role, "logits"
    try:
        return cross_entropy._forward._init_fn(*args)
    finally:
        ledger.role = role


def _attention_backward(ledger: Ledger, grad, q, k, v, left, right):
    sums = [torch.empty_like(x, dtype=torch.float32) for x in (k, v)]
    return torch.empty_like(q), *(x.to(k.dtype) for x in sums)


INSIDE: dict[Any, Callable] = {torch.ops.nanochat.softcap_cross_entropy.default: _loss,
                               torch.ops.nanochat.attention_backward.default: _attention_backward}


# -----------------------------------------------------------------------------
# Kernels of devices

@torch.library.custom_op("nanochat::any_rms_norm", mutates_args=())
def _rms_norm(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """CUDA's kernel keeps one number a row; elsewhere, and on the meta device, PyTorch computes with a float32 copy and keeps that."""
    return torch.empty_like(x), torch.empty_like(x[..., :1], dtype=torch.float32)


_rms_norm.register_fake(_rms_norm._init_fn)
_rms_norm.register_autograd(lambda ctx, grad, _: torch.empty_like(grad), setup_context=lambda ctx, inputs, output: ctx.save_for_backward(*inputs, output[1]))


@torch.library.custom_op("nanochat::any_flash_attention", mutates_args=())
def _flash(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The shapes of every FlashAttention: q (B, T, H, D), k and v (B, T, Hkv, D) -> output, log of the softmax's sum (B, H, T)."""
    return q.new_empty(*q.shape[:3], v.size(3)), q.new_empty(q.size(0), q.size(2), q.size(1), dtype=torch.float32)


@torch.library.custom_op("nanochat::any_flash_attention_backward", mutates_args=())
def _flash_backward(grad: torch.Tensor, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, out: torch.Tensor,
                    log_sum: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)


_flash.register_fake(_flash._init_fn)
_flash_backward.register_fake(_flash_backward._init_fn)
_flash.register_autograd(lambda ctx, grad, _: _flash_backward(grad.contiguous(), *ctx.saved_tensors),
                         setup_context=lambda ctx, inputs, output: ctx.save_for_backward(*inputs, *output))


def _attention(device_type: str, compiled: bool) -> Callable:
    """`flash_attn_func` as it is on such a device (flash_attention.py has the table; compiled on CUDA means that there is Triton)."""
    def attend(q, k, v, causal=True, window_size=(-1, -1)):
        T = q.size(1)
        left, right = flash_attention.band(window_size, causal, T)
        limited = left >= 0 or right > 0
        if device_type == "cpu":
            forward, backward = chosen("window" if limited else "attention"), chosen_backward(T)
        else:
            forward = backward = "blocked" if limited and not (device_type == "cuda" and compiled) else "torch"
        if forward == backward == "torch" and q.size(-1) == v.size(-1) and not (limited and device_type == "cpu"):
            if device_type != "mps":
                return _flash(q, k, v)[0]
            q, k, v = (x.transpose(1, 2) for x in (q, k, v))
            return torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=right == 0, enable_gqa=q.size(1) != k.size(1)).transpose(1, 2)
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        return band_attention(q, k, v, left, right, forward, backward).transpose(1, 2)
    return attend


# -----------------------------------------------------------------------------
# Compiled layers


def _bytes(node: torch.fx.Node) -> int:
    value = node.meta.get("val")
    return value.numel() * value.element_size() if isinstance(value, torch.Tensor) else 0


def _root(node: torch.fx.Node) -> torch.fx.Node:
    """The node whose memory this one shows a part or another shape of."""
    while node.op == "call_function" and isinstance(node.target, torch._ops.OpOverload) and (node.target.is_view or node.target.name() == "aten::_unsafe_view"):
        node = node.args[0]  # type: ignore[assignment]
    return node


def _is_kernel(node: torch.fx.Node) -> bool:
    """Not made of elementwise operations that melt into their neighbours: matrix products, attention."""
    return node.op == "call_function" and (not isinstance(node.target, torch._ops.OpOverload) or node.target.namespace != "aten"
                                           or node.target.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.bmm))


def _extra(graph: torch.fx.Graph) -> int:
    """Bytes that a compiled graph needs at its fullest moment on top of its inputs, which it frees after their last use.

    In memory are the inputs, what kernels read and write, and the outputs. Everything else is computed where it is read.
    """
    nodes = list(graph.nodes)
    returned = {_root(node) for node in nodes[-1].all_input_nodes}
    stored = {_root(node) for node in nodes if node.op == "placeholder" or _is_kernel(node)} | returned
    stored |= {_root(read) for node in nodes if _is_kernel(node) for read in node.all_input_nodes}
    last: dict[torch.fx.Node, int] = {}

    def reads(node: torch.fx.Node, position: int) -> None:
        for read in {_root(read) for read in node.all_input_nodes}:
            if read in stored:
                last[read] = max(last.get(read, 0), position)
            else:
                reads(read, position)

    for position, node in enumerate(nodes):
        if node in stored:
            reads(node, position)
    last |= dict.fromkeys(returned, len(nodes))
    now = fullest = 0
    for position, node in enumerate(nodes):
        if node in stored and node.op != "placeholder":
            now += _bytes(node)
            fullest = max(fullest, now)
        now -= sum(_bytes(read) for read, end in last.items() if end == position)
    return fullest


def _divide(layer: Callable, arguments: list) -> tuple[int, int]:
    """(bytes that a compiled layer keeps for its backward pass besides its inputs, bytes that the backward pass needs on top)."""
    from functorch.compile import aot_function, make_boxed_func, min_cut_rematerialization_partition
    from torch._inductor.decomposition import select_decomp_table
    graphs: list[torch.fx.Graph] = []

    def compiler(module, example_inputs):
        graphs.append(module.graph)
        return make_boxed_func(module.forward)

    out = aot_function(layer, compiler, compiler, partition_fn=min_cut_rematerialization_partition, decompositions=select_decomp_table())(*arguments)
    out.backward(torch.empty_like(out))
    forward, backward = graphs
    kept = {_root(node) for node in list(forward.nodes)[-1].all_input_nodes[1:]}  # the first is the output itself
    return sum(_bytes(node) for node in kept if node.op != "placeholder"), _extra(backward)


class _CompiledLayer(torch.autograd.Function):
    """Holds what the layer would, and computes nothing."""

    @staticmethod
    def forward(ctx, kept: int, extra: int, x, *rest):
        ctx.extra = extra
        ctx.save_for_backward(x, *rest)
        ctx.kept = x.new_empty(kept, dtype=torch.uint8)
        return torch.empty_like(x)

    @staticmethod
    def backward(ctx, grad):
        x = ctx.saved_tensors[0]
        x.new_empty(ctx.extra, dtype=torch.uint8)
        ctx.kept = None
        return None, None, *(torch.empty_like(tensor) if wanted else None for tensor, wanted in zip(ctx.saved_tensors, ctx.needs_input_grad[2:]))


def _compiled(layer: Callable) -> Callable:
    """`run_layer`, compiled."""
    divided: dict[Any, tuple[int, int]] = {}

    def run(block, x, x0, resid_lambda, x0_lambda, ve, cos_sin, window_size, kv_cache):
        names, parameters = zip(*block.named_parameters())
        tensors = [x, x0, resid_lambda, x0_lambda, *cos_sin, *([] if ve is None else [ve]), *parameters]

        def call(x, x0, resid_lambda, x0_lambda, cos, sin, *rest):
            with _reparametrize_module(block, dict(zip(names, rest[-len(names):]))):
                return layer(block, x, x0, resid_lambda, x0_lambda, rest[0] if ve is not None else None, (cos, sin), window_size, kv_cache)

        key = (window_size, *((tuple(tensor.shape), tensor.requires_grad) for tensor in tensors))
        if key not in divided:
            with _disable_current_modes(), torch.enable_grad():
                divided[key] = _divide(call, [tensor.detach().requires_grad_(tensor.requires_grad) for tensor in tensors])
        return _CompiledLayer.apply(*divided[key], *tensors)
    return run


# -----------------------------------------------------------------------------


@contextlib.contextmanager
def _in_place_of(table: dict, **entries: Any) -> Iterator[None]:
    before = {name: table[name] for name in entries if name in table}
    table.update(entries)
    try:
        yield
    finally:
        for name in entries:
            del table[name]
        table.update(before)


def _fused(function: Callable) -> Callable:
    """The same, with no trace of what lies between its inputs and outputs."""
    def call(*args):
        with _disable_current_modes():
            out = function(*args)
        return torch.empty_like(out)
    return call


def training_memory(config: GPTConfig, rows: int, device_type: str, compiled: bool, passes: int = 2, **optimizer: Any) -> dict[str, int]:
    """Bytes by role at the fullest moment of a training step of so many passes of `rows` rows, on one rank of one.

    From the second pass on all gradients are there from the start; more passes take no more. `optimizer` goes to `setup_optimizer`.
    """
    ledger = Ledger()
    pointwise = {name: _fused(getattr(cross_entropy, name)) for name in ("_capped_exp_sum", "_capped_softmax_grad")} if compiled else {}
    norm = {"rms_norm": lambda x, shape: _rms_norm(x)[0]} if device_type == "cuda" and not compiled else {}
    with (contextlib.redirect_stdout(io.StringIO()), torch.device("meta"), _in_place_of(vars(cross_entropy), **pointwise),
          _in_place_of(vars(torch.nn.functional), **norm),
          _in_place_of(cross_entropy.CHUNK_ELEMENTS, meta=cross_entropy.CHUNK_ELEMENTS[device_type]),
          _in_place_of(vars(flash_attention.flash_attn), flash_attn_func=_attention(device_type, compiled)), ledger):
        model = build_gpt(config)
        model.init_buffers()
        if compiled:
            model.run_layer = _compiled(model.run_layer)
        steps = model.setup_optimizer(**optimizer)
        ledger.role = "gradients"
        for parameter in model.parameters():
            parameter.grad = torch.empty_like(parameter)
            parameter.register_post_accumulate_grad_hook(lambda parameter: ledger.move(parameter.grad, "gradients"))
        ledger.role = "optimizer"
        steps.step()  # makes its state
        model.zero_grad(set_to_none=True)
        ledger.role = "activations"
        tokens = torch.zeros(rows, config.sequence_len, dtype=torch.long)
        for _ in range(min(passes, 2)):
            (model(tokens, tokens, loss_reduction="sum") / rows).backward()
        ledger.role = "optimizer"
        steps.step()
    return {role: ledger.fullest[role] for role in ROLES}


GIB = 2 ** 30


def memory_table(models: Sequence[tuple[str, GPTConfig]], rows: int, device_type: str, **optimizer: Any) -> str:
    """What (name, configuration) each take, in GiB. The cache of keys and values is for serving one conversation that fills the context."""
    compiled = can_compile(device_type)
    lines = [f"Memory of one training step in GiB: {rows} rows of {models[0][1].sequence_len} tokens per pass, {COMPUTE_DTYPE}, {device_type}, "
             + ("compiled" if compiled else "eager"),
             f"{'model':>14}" + "".join(f"{role:>13}" for role in (*ROLES, "sum", "(KV cache)"))]
    for name, config in models:
        parts = training_memory(config, rows, device_type, compiled, **optimizer)
        cache = empty_gpt(config).kv_bytes_per_token() * config.sequence_len
        lines.append(f"{name:>14}" + "".join(f"{size / GIB:13.3f}" for size in (*parts.values(), sum(parts.values()), cache)))
    return "\n".join(lines)


def can_compile(device_type: str) -> bool:
    """Whether layers will be compiled on such a device: here if there is one here, else on one with Triton."""
    return not why_not_compile(device_type) if device_type != "cuda" or torch.cuda.is_available() else True


def device_bytes(device: torch.device) -> float:
    """Memory of a device that is here; inf where the system does not tell."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    if device.type == "mps":
        return torch.mps.recommended_max_memory()
    return memory_limit()


# -----------------------------------------------------------------------------
# What fits on which card

RESERVED = 1.0  # GiB that the CUDA context, the libraries, the allocator's gaps and a screen take


def card(text: str) -> tuple[str, float, float]:
    """`RTX 3060=12` or `M2 Max=32@13.6`: name, GiB, FLOP/s (given in units of 1e12, or by the name)."""
    name, _, size = text.partition("=")
    size, _, peak = size.partition("@")
    try:
        gib, flops = float(size), float(peak) * 1e12 if peak else get_peak_flops(name)
        if not (name and 0 < gib < math.inf and 0 < flops < math.inf):
            raise ValueError
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a card; write name=GiB, for example 'RTX 3060=12', or name=GiB@TFLOPS for one whose speed is not known by its name") from None
    return name, gib, flops


@dataclass
class Settings:
    cards: list[tuple[str, float, float]] = flag([card(text) for text in ("RTX 4060=8", "RTX 3060=12", "RTX 4080=16", "RTX 3090=24")],
                                                 "Cards as name=GiB, or as name=GiB@TFLOPS where the name is not known", type=card, nargs="+")
    depths: list[int] = flag([4, 8, 12, 16, 20, 24], "Depths of the models", type=positive_int, nargs="+")
    device_type: str = flag("cuda", "Kind of device to train on", choices=sorted(cross_entropy.CHUNK_ELEMENTS))
    eager: bool = flag(False, "Train without torch.compile, as where there is no Triton")
    mfu: float = flag(0.4, "Share of the peak that training reaches", type=fraction)
    max_seq_len: int = flag(2048, "Context length in tokens", type=positive_int)
    target_param_data_ratio: float = flag(12, "Tokens to train on per parameter of blocks and head", type=positive_float)


@command
def main(argv=None) -> None:
    settings = parse_settings(Settings, argv, "What fits on which card, and how long its training takes")
    compiled = not settings.eager and can_compile(settings.device_type)
    if settings.mfu <= 0:
        raise UsageError(f"--mfu={settings.mfu:g}: training takes some share of the peak, for example 0.4")
    print(f"Rows of {settings.max_seq_len} tokens per pass that fit, and the hours of a whole run at {settings.mfu:.0%} of the peak: {COMPUTE_DTYPE}, {settings.device_type}, "
          f"{'compiled' if compiled else 'eager'}, {settings.target_param_data_ratio:g} tokens per parameter\n")
    print("| depth | parameters | FLOPs | " + " | ".join(f"{name}, {gib:g} GB" for name, gib, _ in settings.cards) + " |\n|---:|---:|---:|" + "---:|" * len(settings.cards))
    for depth in settings.depths:
        shape: dict[str, Any] = dict(aspect_ratio=64, head_dim=128, sequence_len=settings.max_seq_len, vocab_size=32768, window_pattern="SSSL")
        config = gpt_config(depth, **shape)
        model = empty_gpt(config)
        horizon = plan_horizon(model, shape, -1, -1, settings.target_param_data_ratio, -1)
        flops = model.estimate_flops() * horizon.total_tokens
        fitting: dict[str, int] = {}
        needed: list[float] = []
        for rows in (1, 2, 4, 8, 16, 32):
            if rows <= 8:
                needed.append(sum(training_memory(config, rows, settings.device_type, compiled).values()) / GIB + RESERVED)
            else:  # a straight line by now, as the pieces of the loss have their full size
                needed.append(needed[-1] + 2 * (needed[-1] - needed[-2]))
            fits = {name: rows for name, gib, _ in settings.cards if needed[-1] <= gib}
            fitting |= fits
            if not fits:
                break
        cells = [f"{fitting[name]}: {flops / (settings.mfu * peak) / 3600:.1f} h" if name in fitting else "no" for name, _, peak in settings.cards]
        print(f"| {depth} | {model.num_scaling_params()['total'] / 1e6:.0f} M | {flops:.1e} | " + " | ".join(cells) + " |", flush=True)


if __name__ == "__main__":
    sys.exit(main())

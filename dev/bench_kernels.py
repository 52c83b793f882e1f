"""The hand-written CPU kernels against PyTorch's own, in turns in one call:

    python -m dev.bench_kernels

Attention forward and backward of one layer, one decoding step's attention, and the loss with its gradients.
"""
import statistics
import time

import torch
import torch.nn.functional as F

from nanochat import flash_attention
from nanochat.common import compute_init
from nanochat.cross_entropy import softcap_cross_entropy


def compare(name: str, ours, builtin, rounds: int = 9) -> None:
    """Prints the median milliseconds of both, run in turns, and the median of the ratios."""
    times: dict = {ours: [], builtin: []}
    for _ in range(rounds + 2):
        for run in (ours, builtin):
            started = time.perf_counter()
            run()
            times[run].append(time.perf_counter() - started)
    a, b = times[ours][2:], times[builtin][2:]
    ratio = statistics.median(y / x for x, y in zip(a, b))
    print(f"| {name} | {1000 * statistics.median(a):.2f} | {1000 * statistics.median(b):.2f} | {ratio:.1f}x |", flush=True)


def attention(rows: int, length: int, heads: int, dim: int, window: int) -> None:
    q, k, v, upstream = (torch.randn(rows, heads, length, dim).bfloat16() for _ in range(4))
    for x in (q, k, v):
        x.requires_grad_()

    def ours():
        return flash_attention._blocked_attention(q, k, v, window, False)

    if window < 0:
        def builtin():
            return F.scaled_dot_product_attention(q, k, v, is_causal=True)
    else:
        distance = torch.arange(length)[:, None] - torch.arange(length)[None, :]
        mask = (distance >= 0) & (distance <= window)

        def builtin():
            return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)

    name = f"attention of {rows} x {length}, {heads} heads of {dim}, {f'window {window}' if window >= 0 else 'causal'}"
    compare(f"{name}, forward", ours, builtin)
    y, z = ours(), builtin()
    compare(f"{name}, backward", lambda: torch.autograd.grad(y, (q, k, v), upstream, retain_graph=True),
            lambda: torch.autograd.grad(z, (q, k, v), upstream, retain_graph=True))


def decoding(rows: int) -> None:
    q, k, v = (torch.randn(rows, n, 12, 64).bfloat16().transpose(1, 2) for n in (1, 1024, 1024))
    compare(f"one query against 1024 keys, {rows} rows, 12 heads of 64", lambda: flash_attention._attend_to_all(q, k, v),
            lambda: F.scaled_dot_product_attention(q, k, v))


def loss(tokens: int, width: int, vocab: int) -> None:
    hidden = torch.randn(tokens, width).bfloat16().requires_grad_()
    weight = (0.1 * torch.randn(vocab, width)).requires_grad_()
    targets = torch.randint(0, vocab, (tokens,))

    def plain(h, w):
        return F.cross_entropy(15 * torch.tanh(F.linear(h, w.to(h.dtype)).float() / 15), targets)

    compiled = torch.compile(plain, dynamic=False)
    compare(f"loss of {tokens} tokens, width {width}, vocabulary {vocab}, forward and backward",
            lambda: softcap_cross_entropy(hidden, weight.to(hidden.dtype), targets, 15.0).backward(),
            lambda: compiled(hidden, weight).backward())


def main() -> None:
    compute_init("cpu")
    torch.manual_seed(0)
    print("| bf16 on a CPU | ours, ms | PyTorch's, ms | faster by |\n|---|---:|---:|---:|")
    attention(16, 512, 4, 64, window=-1)
    attention(4, 2048, 6, 64, window=512)
    with torch.no_grad():
        decoding(1)
        decoding(16)
    loss(8192, 256, 4096)


if __name__ == "__main__":
    main()

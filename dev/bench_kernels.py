"""Puts the choice of CPU kernels (nanochat/kernel_choice.py) to the test, in turns in one call:

    python -m dev.bench_kernels

One line for each kernel and size: milliseconds of each alternative, the one that this machine takes, and whether it was right. Attention forward and
backward, one decoding step's attention and products; and what is taken everywhere: the loss in chunks, weights in the
compute dtype. Exit status 1 if any of them takes over 10 % longer than an alternative.
"""
import argparse
import statistics
import sys
from collections.abc import Callable

import torch
import torch.nn.functional as F

from nanochat import kernel_choice
from nanochat.cli import command, positive_int
from nanochat.common import COMPUTE_DTYPE, compute_init
from nanochat.compiler import compiled
from nanochat.cross_entropy import softcap_cross_entropy
from nanochat.gpt import linear
from nanochat.kernel_choice import attention_trials, chosen, chosen_backward, decode_trials, in_turns, position_trials

TOLERANCE = 1.1


def masked_backward(rows: int, length: int, heads: int, dim: int, window: int) -> Callable:
    """The backward pass of PyTorch's attention with a mask of the whole context, the alternative for a window."""
    q, k, v, upstream = (torch.randn(rows, length, heads, dim).to(COMPUTE_DTYPE).transpose(1, 2).requires_grad_() for _ in range(4))
    distance = torch.arange(length)[:, None] - torch.arange(length)[None, :]
    y = F.scaled_dot_product_attention(q, k, v, attn_mask=(distance >= 0) & (distance <= window))
    return lambda: torch.autograd.grad(y, (q, k, v), upstream, retain_graph=True)


def loss_trials(tokens: int, width: int, vocab: int) -> dict[str, Callable]:
    hidden = torch.randn(tokens, width).to(COMPUTE_DTYPE).requires_grad_()
    weight = (0.1 * torch.randn(vocab, width)).requires_grad_()
    targets = torch.randint(0, vocab, (tokens,))

    def plain(h, w):
        return F.cross_entropy(15 * torch.tanh(F.linear(h, w.to(h.dtype)).float() / 15), targets)

    fast = compiled(plain, dynamic=False)
    return {"chunked": lambda: softcap_cross_entropy(hidden, weight.to(hidden.dtype), targets, 15.0).backward(),
            "whole": lambda: fast(hidden, weight).backward()}


def weight_trials(rows: int, width: int, matrices: int = 24) -> dict[str, Callable]:
    """A decoding step's matrices of one size, each another one as in a model; float32 ones are multiplied in float32."""
    x = torch.randn(rows, width).to(COMPUTE_DTYPE)
    wide = [torch.randn(4 * width, width) for _ in range(matrices)]
    narrow = [weight.to(COMPUTE_DTYPE) for weight in wide]

    def widened():
        for weight in wide:
            F.linear(x.float(), weight).to(x.dtype)

    def cast():
        for weight in narrow:
            linear(x, weight)

    return {str(COMPUTE_DTYPE).removeprefix("torch."): cast, "float32": widened}


def compare(name: str, works: dict[str, Callable], choice: str, rounds: int) -> bool:
    """Prints a line; whether the choice was right, by the median over the rounds of its time relative to the fastest other's."""
    times = in_turns(works, rounds, at_most=60)
    medians = {alternative: statistics.median(taken) for alternative, taken in times.items()}
    other = min((alternative for alternative in works if alternative != choice), key=medians.__getitem__)
    ratio = statistics.median(a / b for a, b in zip(times[choice], times[other]))
    right = ratio <= TOLERANCE
    shown = ", ".join(f"{alternative} {1000 * seconds:.2f}" for alternative, seconds in medians.items())
    print(f"| {name} | {shown} | {choice} | {1 / ratio:.2f} | {'right' if right else 'WRONG'} |", flush=True)
    return right


@command
def main(argv=None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=positive_int, default=11)
    parser.add_argument("--threads", type=positive_int, help="default: one for each core; 1: CPU time counts, for a machine on which others work")
    parser.add_argument("--small", action="store_true", help="sizes that take a second, to see that it runs")
    args = parser.parse_args(argv)
    if args.threads:
        torch.set_num_threads(args.threads)
    compute_init("cpu")
    torch.manual_seed(0)
    print(f"\n{kernel_choice.machine()}\n")
    print("| kernel and size | ms | taken | faster than the other by | |\n|---|---|---|---:|---|")
    results = []

    def check(name: str, works: dict[str, Callable], choice: str) -> None:
        results.append(compare(name, works, choice, args.rounds))

    for rows, length, heads, window in ((2, 64, 1, -1), (1, 64, 1, 16)) if args.small else ((16, 512, 4, -1), (4, 2048, 6, -1), (4, 2048, 6, 512)):
        size = f"{rows} x {length}, {heads} heads of 64, {f'window {window}' if window >= 0 else 'causal'}"
        forward, backward = attention_trials(rows, length, heads, 64, window)
        with torch.no_grad():
            check(f"attention forward, {size}", forward, chosen("window" if window >= 0 else "attention"))
        if window >= 0:
            backward["torch, masked"] = masked_backward(rows, length, heads, 64, window)
        check(f"attention backward, {size}", backward, chosen_backward(length) if window < 0 or chosen_backward(length) == "fused" else "blocked")
    with torch.inference_mode():
        for rows, length in ((1, 64),) if args.small else ((1, 1024), (16, 512)):
            check(f"one query against {length} keys, {rows} rows, 12 heads of 64", decode_trials(rows, length, 12, 64), chosen("decode"))
        check("one position through 24 matrices", position_trials(64 if args.small else 512, 24), chosen("position"))
        for rows, width in () if COMPUTE_DTYPE == torch.float32 else ((1, 64),) if args.small else ((1, 512), (16, 512)):
            works = weight_trials(rows, width)
            check(f"24 matrices of {4 * width} x {width}, {rows} rows", works, next(iter(works)))
    check("loss with gradients, 8192 tokens, width 256, vocabulary 4096", loss_trials(*((64, 64, 64) if args.small else (8192, 256, 4096))), "chunked")
    wrong = results.count(False)
    print(f"\n{len(results) - wrong} of {len(results)} right" + (f"; {wrong} took over {TOLERANCE - 1:.0%} longer than the alternative" if wrong else ""))
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())

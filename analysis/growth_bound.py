"""What growth can save at best, from a scaling law alone: no training.

    python -m analysis.growth_bound

With the loss L(N, D) = E + A / N^a + B / D^b of N parameters after D tokens (Hoffmann et al., 2203.15556, eq. 10) and 6 N D FLOPs, a loss is
reached most cheaply by always training the size at which the loss falls fastest per FLOP, never larger than the final one. That assumes a growth
that loses nothing: a grown model learns like one of its size that came to the same loss from scratch. It compares this with the final model
from scratch, and with the best single size, which never grows.
"""
import sys

import numpy as np

from nanochat.cli import ArgumentParser, command, positive_float
from nanochat.planning.scaling_law import A, B, a, b


def shares(params: float, tokens_per_param: float) -> tuple[float, float, float]:
    """(FLOPs of ideal growth, FLOPs of the best single size, that size), each as a share of the model from scratch."""
    flops = params ** 2 * tokens_per_param
    reducible = A / params ** a + B / (params * tokens_per_param) ** b
    loss = np.geomspace(100 * reducible, reducible, 20_001)  # above E
    # d(N D)/dL is least where A / N^a is this share of the loss; the rest is the part that more tokens take away
    of_size = np.maximum(loss / (1 + a * (1 / b + 1)), A / params ** a)
    tokens_per_loss = (1 / b) * B ** (1 / b) * (loss - of_size) ** (-1 / b - 1)
    slope = (A / of_size) ** (1 / a) * tokens_per_loss
    growing = ((slope[1:] + slope[:-1]) / 2 * -np.diff(loss)).sum()
    sizes = np.geomspace(1e-4, 1, 4001) * params
    of_tokens = reducible - A / sizes ** a
    single = np.where(of_tokens > 0, sizes * (B / np.where(of_tokens > 0, of_tokens, 1)) ** (1 / b), np.inf)
    return growing / flops, single.min() / flops, sizes[single.argmin()] / params


@command
def main(argv=None) -> None:
    parser = ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--params", type=positive_float, nargs="+", default=[1e6, 1e8, 1e9])
    parser.add_argument("--tokens-per-param", type=positive_float, nargs="+", default=[0.3, 1, 5, 20, 100])
    args = parser.parse_args(argv)
    print("| parameters | tokens per parameter | FLOPs of ideal growth, of scratch | of the best single size | that size, of the final one |\n|---:|---:|---:|---:|---:|")
    for params in args.params:
        for tokens in args.tokens_per_param:
            print(f"| {params:.0e} | {tokens:g} | " + " | ".join(f"{share:.2f}" for share in shares(params, tokens)) + " |")


if __name__ == "__main__":
    sys.exit(main())

"""Decoding speed of a model with random weights, side by side in one call:

* with the key/value cache and without it (the whole context again for every token)
* with the float32 master weights, which a bf16 or fp16 model casts at every step, and with weights cast once
* against the memory's limit: a step must read every matmul weight once, plus the keys and values of each row

    python -m dev.bench_decode --depth=8

The variants take turns and the medians are compared, so that a busy machine slows all of them alike.
"""
import statistics
import sys
import time

import torch

from nanochat.cli import ArgumentParser, command, positive_int
from nanochat.common import COMPUTE_DTYPE, autodetect_device_type, compute_init
from nanochat.engine import KVCache
from nanochat.gpt import GPT, GPTConfig, Linear

DEVICE_SYNC = {"cuda": torch.cuda.synchronize, "mps": torch.mps.synchronize, "cpu": lambda: None}


def seconds(work, device: torch.device) -> float:
    sync = DEVICE_SYNC[device.type]
    sync()
    start = time.perf_counter()
    work()
    sync()
    return time.perf_counter() - start


def read_bandwidth(device: torch.device) -> float:
    """Bytes/s of summing 256 MiB, the best of 5."""
    data = torch.ones(64 * 2**20, device=device)
    return data.nbytes / min(seconds(lambda: data.sum().item(), device) for _ in range(5))


def random_model(config: GPTConfig, device: torch.device) -> GPT:
    with torch.device("meta"):
        model = GPT(config)
    model.to_empty(device=device)
    model.init_weights()
    return model.eval()


def cast_weights(model: GPT) -> None:
    for module in model.modules():
        if isinstance(module, Linear):
            module.to(COMPUTE_DTYPE)


class Decoding:
    """One way of decoding; each `step` makes one token per row."""

    def __init__(self, model: GPT, batch_size: int, context: int, steps: int, cached: bool):
        config, device = model.config, model.get_device()
        self.model = model
        self.ids = torch.randint(config.vocab_size, (batch_size, context), device=device)
        self.cache = None
        if cached:
            self.cache = KVCache(batch_size, config.n_kv_head, context + steps, config.n_embd // config.n_head, config.n_layer, device, COMPUTE_DTYPE)
            model(self.ids, kv_cache=self.cache)
            self.ids = self.ids[:, -1:]
        self.times: list[float] = []

    def step(self) -> None:
        self.times.append(seconds(lambda: self.model(self.ids, kv_cache=self.cache)[:, -1].argmax(-1).tolist(), self.model.get_device()))

    def median(self) -> float:
        return statistics.median(self.times[1:])  # the first is the warm-up


@command
@torch.inference_mode()
def main(argv=None) -> None:
    parser = ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--depth", type=positive_int, default=6, help="layers; the width is 64 times as much")
    parser.add_argument("--head-dim", type=positive_int, default=64, help="channels per head")
    parser.add_argument("--vocab", type=positive_int, default=8192, help="vocabulary size")
    parser.add_argument("--context", type=positive_int, default=256, help="tokens before the first timed one")
    parser.add_argument("--steps", type=positive_int, default=16, help="timed steps with the cache; a quarter of them without")
    parser.add_argument("--batch-sizes", type=positive_int, nargs="+", default=[1, 4, 16])
    parser.add_argument("--device-type", default="", help="cuda, mps or cpu; empty: autodetect")
    args = parser.parse_args(argv)
    *_, device = compute_init(args.device_type or autodetect_device_type())
    heads = -(-args.depth * 64 // args.head_dim)
    config = GPTConfig(sequence_len=max(1024, args.context + args.steps + 1), vocab_size=args.vocab, n_layer=args.depth, n_head=heads,
                       n_kv_head=heads, n_embd=heads * args.head_dim)
    master, cast = random_model(config, device), random_model(config, device)
    cast_weights(cast)
    weight_bytes = master.num_matmul_params() * COMPUTE_DTYPE.itemsize
    bandwidth = read_bandwidth(device)
    print(f"{config}\n{master.num_matmul_params():,} matmul weights, {weight_bytes / 2**20:.1f} MiB in {COMPUTE_DTYPE}, "
          f"context {args.context}, {device}, {torch.get_num_threads()} threads, memory read at {bandwidth / 1e9:.1f} GB/s")
    print(f"{'batch':>5} | {'no cache':>10} {'cache':>10} {'cast once':>10} tokens/s | {'cache gain':>10} {'cast gain':>10} | "
          f"{'limit':>10} tokens/s | {'cache':>6} {'cast once':>9} of limit")
    for batch_size in args.batch_sizes:
        naive = Decoding(master, batch_size, args.context, args.steps, cached=False)
        cached = Decoding(master, batch_size, args.context, args.steps + 1, cached=True)
        cached_cast = Decoding(cast, batch_size, args.context, args.steps + 1, cached=True)
        for step in range(args.steps + 1):
            for decoding in (cached, cached_cast, naive) if step <= args.steps // 4 else (cached, cached_cast):
                decoding.step()
        speeds = [batch_size / decoding.median() for decoding in (naive, cached, cached_cast)]
        limit = batch_size * bandwidth / (weight_bytes + batch_size * master.kv_read_bytes(args.context))
        print(f"{batch_size:5} | {speeds[0]:10.1f} {speeds[1]:10.1f} {speeds[2]:10.1f}          | {speeds[1] / speeds[0]:9.1f}x {speeds[2] / speeds[1]:9.2f}x | "
              f"{limit:10.1f}          | {speeds[1] / limit:6.1%} {speeds[2] / limit:9.1%}")


if __name__ == "__main__":
    sys.exit(main())

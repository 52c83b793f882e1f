"""Decoding speed of a model with random weights, side by side in one call:

* with the key/value cache (nanochat.engine) and without it (the whole context again for every token)
* with the float32 master weights, which a bf16 or fp16 model casts at every step, and with weights cast once for inference
* against the memory's limit: a step must read every matmul weight once, plus the keys and values of each row

    python -m dev.bench_decode --depth=8

The variants take turns and their median steps are compared, so that a busy machine slows all of them alike.
"""
import statistics
import sys
import time
from collections.abc import Callable
from types import SimpleNamespace

import torch

from nanochat.cli import ArgumentParser, command, positive_int
from nanochat.common import COMPUTE_DTYPE, autodetect_device_type, compute_init
from nanochat.engine import Engine
from nanochat.gpt import GPT, GPTConfig
from scripts.infer_bench import positive_ints

NO_SPECIAL_TOKENS = SimpleNamespace(get_bos_token_id=lambda: -1, encode_special=lambda name: -1)  # so that no answer ends early


def seconds(work: Callable) -> float:
    """Wall-clock time of `work`, which must end with a transfer to the host."""
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def read_bandwidth(device: torch.device) -> float:
    """Bytes/s of summing 256 MiB, the best of 5."""
    data = torch.ones(64 * 2**20, device=device)
    return data.nbytes / min(seconds(lambda: data.sum().item()) for _ in range(5))


def random_model(config: GPTConfig, device: torch.device) -> GPT:
    with torch.device("meta"):
        model = GPT(config)
    model.to_empty(device=device)
    model.init_weights()
    return model.eval()


def with_cache(model: GPT, prompt: list[int], batch_size: int, steps: int) -> Callable:
    columns = Engine(model, NO_SPECIAL_TOKENS).generate(prompt, num_samples=batch_size, max_tokens=steps, temperature=0)
    next(columns)  # the prompt
    return lambda: next(columns)


def without_cache(model: GPT, prompt: list[int], batch_size: int) -> Callable:
    ids = torch.tensor([prompt] * batch_size, device=model.get_device())
    return lambda: model(ids)[:, -1].argmax(dim=-1).tolist()


@command
@torch.inference_mode()
def main(argv=None) -> None:
    parser = ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--depth", type=positive_int, default=6, help="layers; the width is 64 times as much")
    parser.add_argument("--head-dim", type=positive_int, default=64, help="channels per head")
    parser.add_argument("--vocab", type=positive_int, default=8192, help="vocabulary size")
    parser.add_argument("--context", type=positive_int, default=256, help="tokens before the first decoded one")
    parser.add_argument("--steps", type=positive_int, default=16, help="timed steps with the cache; a quarter of them without")
    parser.add_argument("--batch-sizes", type=positive_ints, default="1,4,16")
    parser.add_argument("--device-type", default="", help="cuda, mps or cpu (default: autodetect)")
    args = parser.parse_args(argv)
    *_, device = compute_init(args.device_type or autodetect_device_type())
    heads = -(-args.depth * 64 // args.head_dim)
    config = GPTConfig(sequence_len=max(1024, args.context), vocab_size=args.vocab, n_layer=args.depth, n_head=heads, n_kv_head=heads,
                       n_embd=heads * args.head_dim)
    master, cast = random_model(config, device), random_model(config, device)
    cast.cast_for_inference()
    weight_bytes = master.num_matmul_params() * COMPUTE_DTYPE.itemsize
    bandwidth = read_bandwidth(device)
    print(f"{config}\n{weight_bytes / 2**20:.1f} MiB of matmul weights in {COMPUTE_DTYPE}, context {args.context}, {device}, "
          f"{torch.get_num_threads()} threads, memory read at {bandwidth / 1e9:.1f} GB/s\n")
    print("tokens/s     no cache      cache  cast once      limit | cache/no cache  cast once/cache  cast once/limit")
    prompt = torch.randint(args.vocab, (args.context,)).tolist()
    for batch_size in args.batch_sizes:
        cached = [with_cache(model, prompt, batch_size, args.steps + 2) for model in (master, cast)]
        variants = [without_cache(master, prompt, batch_size), *cached]
        times: list[list[float]] = [[] for _ in variants]
        for step in range(args.steps + 1):
            for i, work in enumerate(variants):
                if i > 0 or step <= max(1, args.steps // 4):
                    times[i].append(seconds(work))
        naive, slow, fast = (batch_size / statistics.median(steps[1:]) for steps in times)  # the first of each is the warm-up
        limit = batch_size * bandwidth / (weight_bytes + batch_size * master.kv_read_bytes(args.context))
        print(f"batch {batch_size:4} {naive:10.1f} {slow:10.1f} {fast:10.1f} {limit:10.1f} | {slow / naive:14.1f} {fast / slow:16.2f} {fast / limit:16.1%}")


if __name__ == "__main__":
    sys.exit(main())

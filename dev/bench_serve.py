"""Throughput of several clients at once, on a model with random weights: their answers decoded in one batch (nanochat.batching), and one by one
(nanochat.engine), as a server without batching would.

    python -m dev.bench_serve --depth=8

Every client sends one request with a prompt and a length of its own, drawn once for both variants. The variants take turns, and the median
of the rounds counts. Both include the reading of the prompts.
"""
import random
import statistics
import sys
import time

import torch

from dev.bench_decode import NO_SPECIAL_TOKENS, random_model
from nanochat.batching import BatchedEngine, Request
from nanochat.cli import ArgumentParser, command, positive_int
from nanochat.common import COMPUTE_DTYPE, autodetect_device_type, compute_init
from nanochat.engine import Engine
from nanochat.gpt import GPTConfig
from nanochat.sampling import Sampling
from scripts.infer_bench import positive_ints


def one_by_one(engine: Engine, requests: list[tuple[list[int], int]]) -> list[float]:
    """Seconds until each client has its first token; at last the seconds of all answers."""
    start = time.perf_counter()
    first = []
    for prompt, length in requests:
        for i, _ in enumerate(engine.generate(prompt, max_tokens=length, temperature=0)):
            if i == 0:
                first.append(time.perf_counter() - start)
    return [*first, time.perf_counter() - start]


def batched(engine: BatchedEngine, requests: list[tuple[list[int], int]]) -> list[float]:
    start = time.perf_counter()
    first: dict[int, float] = {}
    for i, (prompt, length) in enumerate(requests):
        engine.submit(Request(prompt, length, lambda *_, i=i: first.setdefault(i, time.perf_counter() - start), Sampling(temperature=0)))  # type: ignore[misc]
    while engine.waiting or engine.running:
        engine.step()
    return [*first.values(), time.perf_counter() - start]


@command
def main(argv=None) -> None:
    parser = ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--depth", type=positive_int, default=6, help="layers; the width is 64 times as much")
    parser.add_argument("--vocab", type=positive_int, default=8192, help="vocabulary size")
    parser.add_argument("--prompt", type=positive_int, default=64, help="tokens of a prompt, on average")
    parser.add_argument("--answer", type=positive_int, default=64, help="tokens of an answer, on average")
    parser.add_argument("--clients", type=positive_ints, default="1,4,16")
    parser.add_argument("--rounds", type=positive_int, default=3)
    parser.add_argument("--device-type", default="", help="cuda, mps or cpu (default: autodetect)")
    args = parser.parse_args(argv)
    *_, device = compute_init(args.device_type or autodetect_device_type())
    config = GPTConfig(sequence_len=2 * (args.prompt + args.answer), vocab_size=args.vocab, n_layer=args.depth, n_head=args.depth, n_kv_head=args.depth,
                       n_embd=64 * args.depth)
    print(f"{COMPUTE_DTYPE}, {device}, {torch.get_num_threads()} threads, {config}")
    model = random_model(config, device)
    model.cast_for_inference()
    single, rng = Engine(model, NO_SPECIAL_TOKENS), random.Random(0)
    around = lambda mean: max(1, round(mean * rng.uniform(0.5, 1.5)))
    print("\n             tokens/s of all clients           median wait for the first token\n"
          "clients    one by one  batched  ratio          one by one     batched")
    for clients in args.clients:
        requests = [([rng.randrange(args.vocab) for _ in range(around(args.prompt))], around(args.answer)) for _ in range(clients)]
        together = BatchedEngine(model, NO_SPECIAL_TOKENS, slots=clients)
        results: list[list[tuple[float, float]]] = [[], []]
        for round_ in range(args.rounds + 1):
            for result, (*first, total) in zip(results, (one_by_one(single, requests), batched(together, requests))):
                if round_:  # the first one warms up
                    result.append((sum(length for _, length in requests) / total, statistics.median(first)))
        (slow, slow_wait), (fast, fast_wait) = ([statistics.median(column) for column in zip(*result)] for result in results)
        print(f"{clients:7} {slow:13.1f} {fast:8.1f} {fast / slow:6.2f} {slow_wait:17.3f} s {fast_wait:9.3f} s", flush=True)


if __name__ == "__main__":
    sys.exit(main())

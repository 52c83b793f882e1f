"""Throughput of several clients at once, on a model with random weights: their answers decoded in one batch (nanochat.batching), and one by one
(nanochat.engine), as a server without batching would.

    python -m dev.bench_serve --depth=8
    python -m dev.bench_serve --depth=8 --long=7200    # what a short request waits for meanwhile, and how long answers pause

Every client sends one request with a prompt and a length of its own, drawn once for both variants. The variants take turns, and the median
of the rounds counts. Both include the reading of the prompts. With `--long` prompts of that length are read while answers are under way, and short
requests come one after the other: their waits for a first token, and the pauses between two decoding steps with the later step included, in seconds and in
steps as long as they were just before.
"""
import random
import statistics
import sys
import threading
import time

import torch

from dev.bench_decode import NO_SPECIAL_TOKENS, random_model
from nanochat.batching import BatchedEngine, Request
from nanochat.cli import ArgumentParser, command, positive_int, positive_ints
from nanochat.common import COMPUTE_DTYPE, autodetect_device_type, compute_init
from nanochat.engine import Engine
from nanochat.gpt import GPTConfig
from nanochat.sampling import Sampling


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


class Timed(BatchedEngine):
    """Keeps the seconds of its decoding steps, and the pauses of those who were there for two in a row: seconds, and how many steps that is."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.steps: list[float] = []
        self.pauses: list[tuple[float, float]] = []
        self._last = 0.0

    def _decode_step(self) -> None:
        start, usual, others = time.perf_counter(), self.step_seconds, len(self.rows) > 1 or len(self.rows[0].state.current_tokens) > 1
        super()._decode_step()
        end = time.perf_counter()
        self.steps.append(end - start)
        if others:
            self.pauses.append((end - self._last, (end - self._last) / max(usual, end - start)))
        self._last = end


def waits(engine: Timed, answers: int, long: list[int], choices: int, short: int) -> tuple[list[float], float]:
    """While `answers` are under way, `choices` are asked of a long prompt: waits of short requests until the long one's last choice begins (at least 8 of
    them), and the seconds of that."""
    engine.prefixes.entries.clear()
    vocab, room = engine.model.config.vocab_size, engine.context
    counts, greedy = [0] * answers, Sampling(temperature=0)

    def count(i: int) -> None:
        counts[i] += 1
    running = [Request([random.randrange(vocab) for _ in range(short)], room - short, lambda *_, i=i: count(i), greedy) for i in range(answers)]  # type: ignore[misc]
    engine.submit(*running)
    while not all(count > 5 for count in counts):
        time.sleep(0.01)
    engine.steps.clear()
    engine.pauses.clear()
    start, begun, group = time.perf_counter(), set(), object()
    asked = [Request(long, min(64, room - len(long)), lambda *_, i=i: begun.add(i), greedy, group=group) for i in range(choices)]  # type: ignore[misc]
    engine.submit(*asked)
    first: list[float] = []
    while len(begun) < choices or len(first) < 8:
        came, sent = threading.Event(), time.perf_counter()
        engine.submit(Request([random.randrange(vocab) for _ in range(short)], 4, lambda *_, came=came: came.set(), greedy))  # type: ignore[misc]
        came.wait()
        first.append(time.perf_counter() - sent)
    seconds = time.perf_counter() - start
    for request in (*running, *asked):
        engine.cancel(request)
    while engine.running:
        time.sleep(0.01)
    return first, seconds


def bench_waits(model, slots: int, long: int, short: int) -> None:
    engine = Timed(model, NO_SPECIAL_TOKENS, slots=slots)
    engine.start()
    prompt = [random.randrange(model.config.vocab_size) for _ in range(long)]
    waits(engine, 1, prompt[:long // 8], 1, short)  # warms up
    print(f"\n                                short requests of {short} tokens: first token  pauses of answers\n"
          "answers  long prompt   seconds    median   longest                    median step   longest  in steps: 99 %  longest")
    for answers, choices in ((0, 0), (0, 1), (8, 0), (8, 1), (0, 8)):
        first, seconds = waits(engine, answers, prompt, choices, short)
        ratios = sorted(ratio for _, ratio in engine.pauses)
        print(f"{answers:7} {f'{choices} x {long}' if choices else '-':>12} {seconds:9.2f} {statistics.median(first):9.3f} {max(first):9.3f} ({len(first):3})"
              f"{statistics.median(engine.steps):26.3f} {max(engine.pauses)[0]:9.3f} {ratios[int(0.99 * len(ratios))]:15.1f} {ratios[-1]:8.1f}", flush=True)
    engine.close()


@command
def main(argv=None) -> None:
    parser = ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--depth", type=positive_int, default=6, help="layers; the width is 64 times as much")
    parser.add_argument("--vocab", type=positive_int, default=8192, help="vocabulary size")
    parser.add_argument("--prompt", type=positive_int, default=64, help="tokens of a prompt, on average")
    parser.add_argument("--answer", type=positive_int, default=64, help="tokens of an answer, on average")
    parser.add_argument("--clients", type=positive_ints, default="1,4,16")
    parser.add_argument("--rounds", type=positive_int, default=3)
    parser.add_argument("--long", type=positive_int, help="tokens of the prompts that others wait for; the first prompts and answers are left out")
    parser.add_argument("--slots", type=positive_int, default=32, help="with --long")
    parser.add_argument("--device-type", default="", help="cuda, mps or cpu (default: autodetect)")
    args = parser.parse_args(argv)
    *_, device = compute_init(args.device_type or autodetect_device_type())
    config = GPTConfig(sequence_len=args.long + 512 if args.long else 2 * (args.prompt + args.answer), vocab_size=args.vocab, n_layer=args.depth, n_head=args.depth, n_kv_head=args.depth,
                       n_embd=64 * args.depth)
    print(f"{COMPUTE_DTYPE}, {device}, {torch.get_num_threads()} threads, {config}")
    model = random_model(config, device)
    model.cast_for_inference()
    if args.long:
        bench_waits(model, args.slots, args.long, args.prompt)
        return
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

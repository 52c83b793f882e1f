"""Decoding speed of a model with random weights, side by side in one call:

* with the key/value cache (nanochat.engine) and without it (the whole context again for every token)
* with the float32 master weights, which a bf16 or fp16 model casts at every step, and with weights cast once for inference
* against Hugging Face `transformers`, where it is installed (pip install transformers): a Llama of equal depth, width and number of weights in the
  same dtype, with its cache, in a plain loop
* against the memory's limit: a step must read every matmul weight once, plus the keys and values of each row

    python -m dev.bench_decode --depth=8
    python -m dev.bench_decode --depth=8 --ranks=32,128,256    # low-rank weights as factors, as products, as chosen; and dense
    python -m dev.bench_decode --calls                         # what a second matmul call costs: the rule of nanochat.lowrank

The variants take turns and their median steps are compared, so that a busy machine slows all of them alike (--threads 1 where that is not enough).
"""
import copy
import inspect
import math
import statistics
import sys
import time
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F

from nanochat.cli import ArgumentParser, command, positive_int, positive_ints
from nanochat.common import COMPUTE_DTYPE, autodetect_device_type, compute_init
from nanochat.engine import Engine
from nanochat.gpt import GPT, GPTConfig
from nanochat.layered_gpt import empty_gpt
from nanochat.lowrank import LowRankLinear, call_cost
from nanochat.recipe import LayerChanges

NO_SPECIAL_TOKENS = SimpleNamespace(get_bos_token_id=lambda: -1, encode_special=lambda name: -1)  # so that no answer ends early


def seconds(work: Callable) -> float:
    """Time of `work`, which must end with a transfer to the host."""
    clock = time.thread_time if torch.get_num_threads() == 1 else time.perf_counter
    start = clock()
    work()
    return clock() - start


def read_bandwidth(device: torch.device) -> float:
    """Bytes/s of summing 256 MiB, the best of 5."""
    data = torch.ones(64 * 2**20, device=device)
    return data.nbytes / min(seconds(lambda: data.sum().item()) for _ in range(5))


def random_model(config: GPTConfig, device: torch.device) -> GPT:
    model = empty_gpt(config)
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


def transformers_llama(config: GPTConfig, device: torch.device) -> Any:
    """A Llama with as many heads, layers and matmul weights as the GPT (its MLP has three matrices), or None without the library."""
    try:
        from transformers import LlamaConfig, LlamaForCausalLM
    except ImportError:
        return None
    hidden = round(8 * config.n_embd / 3 / 64) * 64
    return LlamaForCausalLM(LlamaConfig(
        vocab_size=config.vocab_size, hidden_size=config.n_embd, intermediate_size=hidden, num_hidden_layers=config.n_layer, bos_token_id=None, eos_token_id=None,
        num_attention_heads=config.n_head, max_position_embeddings=config.sequence_len)).to(device, COMPUTE_DTYPE).eval()


def with_transformers(model: Any, prompt: list[int], batch_size: int) -> Callable:
    from transformers import DynamicCache
    name = "cache" if "cache" in inspect.signature(model.forward).parameters else "past_key_values"  # until 5.23
    cached = {name: DynamicCache(config=model.config), "use_cache": True}
    logits = model(torch.tensor([prompt] * batch_size, device=model.device), **cached).logits

    def step():
        nonlocal logits
        ids = logits[:, -1:].argmax(dim=-1)
        logits = model(ids, **cached).logits
        return ids.tolist()
    return step


def in_turns(variants: list[Callable], steps: list[int]) -> list[float]:
    """Median seconds of each variant's steps, after one to warm up."""
    times: list[list[float]] = [[] for _ in variants]
    for step in range(max(steps) + 1):
        for taken, work, wanted in zip(times, variants, steps):
            if step <= wanted:
                taken.append(seconds(work))
    return [statistics.median(taken[1:]) for taken in times]


def compare_caching(config: GPTConfig, prompt: list[int], args, device: torch.device) -> None:
    master, cast = random_model(config, device), random_model(config, device)
    cast.cast_for_inference()
    weight_bytes = master.num_matmul_params() * COMPUTE_DTYPE.itemsize
    bandwidth = read_bandwidth(device)
    print(f"{weight_bytes / 2**20:.1f} MiB of matmul weights, memory read at {bandwidth / 1e9:.1f} GB/s\n")
    peer = transformers_llama(config, device)
    print("tokens/s     no cache      cache  cast once transformers      limit | cache/no cache  cast once/cache  cast once/transformers  cast once/limit")
    for batch_size in args.batch_sizes:
        variants = [without_cache(master, prompt, batch_size), *(with_cache(model, prompt, batch_size, args.steps + 2) for model in (master, cast))]
        variants += [with_transformers(peer, prompt, batch_size)] if peer else []
        rates = [batch_size / s for s in in_turns(variants, [max(1, args.steps // 4), *[args.steps] * (len(variants) - 1)])]
        naive, slow, fast, theirs = (*rates, math.nan)[:4]
        limit = batch_size * bandwidth / (weight_bytes + batch_size * master.kv_read_bytes(args.context))
        print(f"batch {batch_size:4} {naive:10.1f} {slow:10.1f} {fast:10.1f} {theirs:12.1f} {limit:10.1f} | {slow / naive:14.1f} {fast / slow:16.2f} "
              f"{fast / theirs:23.2f} {fast / limit:16.1%}", flush=True)


def compare_merging(config: GPTConfig, prompt: list[int], args, device: torch.device) -> None:
    """Low-rank models decoding with factors, with products, and with what `cast_for_inference` chooses, beside a dense one."""
    dense = random_model(config, device)
    dense.cast_for_inference()
    print("\ntokens/s          factors  products    chosen     dense | chosen/better of the two  chosen/dense  products chosen")
    for rank in args.ranks:
        low_rank = LayerChanges(attn_rank=rank, mlp_rank=rank).apply(config)
        factors = random_model(low_rank, device)
        products, chosen = copy.deepcopy(factors), copy.deepcopy(factors)
        layers = [[module for module in model.modules() if isinstance(module, LowRankLinear)] for model in (products, chosen)]
        for layer in layers[0]:
            layer.merge()
        for model in (factors, products):
            GPT.cast_for_inference(model)
        chosen.cast_for_inference()
        merged = sum(layer.product is not None for layer in layers[1])
        for batch_size in args.batch_sizes:
            variants = [with_cache(model, prompt, batch_size, args.steps + 2) for model in (factors, products, chosen, dense)]
            rates = [batch_size / s for s in in_turns(variants, [args.steps] * 4)]
            print(f"rank {rank:4} batch {batch_size:3}" + "".join(f"{rate:10.1f}" for rate in rates)
                  + f" | {rates[2] / max(rates[:2]):24.2f} {rates[2] / rates[3]:13.2f} {merged:9} of {len(layers[1])}")


def compare_calls(device: torch.device) -> None:
    """One row through factors and through their product, over 64 MiB of different matrices, as in a model; and the best threshold."""
    rule = call_cost(device.type, COMPUTE_DTYPE)
    results = []
    print("\n  in x out   rank  saved weights | factors us  product us  factors/product")
    for n_in, n_out in ((256, 256), (256, 1024), (512, 512), (768, 768), (512, 2048), (1024, 1024), (2048, 2048)):
        for rank in (n_in // 16, n_in // 8, n_in // 4, n_in // 2):
            saved = n_in * n_out - rank * (n_in + n_out)
            copies = max(1, 2**26 // (n_in * n_out * COMPUTE_DTYPE.itemsize))
            x, W, U, V = (torch.randn(*shape, device=device).to(COMPUTE_DTYPE)
                          for shape in ((1, 1, n_in), (copies, n_out, n_in), (copies, n_out, rank), (copies, rank, n_in)))

            def through_factors():
                y = [F.linear(F.linear(x, v), u) for u, v in zip(U, V)]
                return y[-1].sum().item()

            def through_product():
                y = [F.linear(x, w) for w in W]
                return y[-1].sum().item()

            factors, product = (1e6 * s / copies for s in in_turns([through_factors, through_product], [7, 7]))
            results.append((saved, factors, product))
            print(f"{n_in:4} x {n_out:4} {rank:6} {saved:14,} | {factors:10.1f} {product:11.1f} {factors / product:16.2f}", flush=True)

    def loss(threshold: int) -> float:
        """Time lost by the rule, relative to always taking the faster one."""
        return sum((product if saved <= threshold else factors) / min(product, factors) for saved, factors, product in results) / len(results) - 1

    best = min([0, *sorted(saved for saved, *_ in results)], key=loss)
    print(f"\nmerging where factors save at most N weights: best N here {best:,} ({loss(best):.1%} slower than the faster one each time), "
          f"the rule of nanochat.lowrank {rule:,} ({loss(rule):.1%})")


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
    parser.add_argument("--ranks", type=positive_ints, help="compare low-rank models of these ranks with a dense one")
    parser.add_argument("--calls", action="store_true", help="compare single layers as factors and as products")
    parser.add_argument("--device-type", default="", help="cuda, mps or cpu (default: autodetect)")
    parser.add_argument("--threads", type=positive_int, help="default: one for each core; 1: CPU time counts, for a machine on which others work")
    args = parser.parse_args(argv)
    if args.threads:
        torch.set_num_threads(args.threads)
    *_, device = compute_init(args.device_type or autodetect_device_type())
    print(f"{COMPUTE_DTYPE}, {device}, {torch.get_num_threads()} threads")
    if args.calls:
        compare_calls(device)
        return
    heads = -(-args.depth * 64 // args.head_dim)
    config = GPTConfig(sequence_len=max(1024, args.context), vocab_size=args.vocab, n_layer=args.depth, n_head=heads, n_kv_head=heads,
                       n_embd=heads * args.head_dim)
    print(f"{config}, context {args.context}")
    prompt = torch.randint(args.vocab, (args.context,)).tolist()
    (compare_merging if args.ranks else compare_caching)(config, prompt, args, device)


if __name__ == "__main__":
    sys.exit(main())

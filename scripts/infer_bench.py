"""How fast a checkpoint answers: time to the first token, time per token, and how near that is to the hardware's limits.

    python -m scripts.infer_bench --batch-sizes=1,8,32

* TTFT: seconds until the first token, the prompt included. TPOT: median seconds of a later step (one token per row).
* MBU: share of the memory's peak bandwidth that reading the weights and the keys and values once per step needs.
* MFU: share of the peak FLOP/s that the matrix products need.

Runs on any device; what only a known GPU can tell (peaks, memory) is null elsewhere. The last line on stdout is one JSON
object with all results.
"""
import itertools
import json
import math
import statistics
import sys
import time
from collections import Counter
from dataclasses import dataclass

import torch
import torch.nn as nn

from nanochat.checkpoint_manager import SOURCES, CheckpointSettings, build_model
from nanochat.cli import (
    UsageError,
    command,
    flag,
    is_out_of_memory,
    non_negative_float,
    parse_settings,
    positive_int,
    positive_ints,
)
from nanochat.common import autodetect_device_type, compute_cleanup, compute_init, get_peak_bandwidth, get_peak_flops
from nanochat.engine import Engine
from nanochat.lowrank import DECODE_ROWS, LowRankLinear

PASSAGE = (
    "The harbour town wakes before the sun does. Boats come in with the night's catch, gulls argue over the rest, and by six "
    "the first bread is on the shelves. A baker who has worked here for forty years says that the sea decides what kind of day it "
    "will be: calm water brings talkative customers, a storm brings quiet ones who stay longer. At noon the market closes, the "
    "streets empty, and only the clock on the town hall, which has been seven minutes late since 1962, still makes a sound.\n\n"
)
WARM_UP_TOKENS = 8


def weight_bytes(model: nn.Module, rows: int = 1) -> int:
    """Bytes of the weights that a decode step of so many rows reads: all but the embedding tables, of which it reads a row per token.

    Of a merged low-rank layer these are the product's, or for many rows the factors'.
    """
    unread = {module.weight for module in model.modules() if isinstance(module, nn.Embedding)}
    total = 0
    for module in model.modules():
        if isinstance(module, LowRankLinear) and module.product is not None and rows <= DECODE_ROWS:
            unread.update(module.parameters())
            total += module.product.nbytes
    return total + sum(p.nbytes for p in model.parameters() if p not in unread)


def build_prompt(tokenizer, num_tokens: int) -> list[int]:
    """bos and natural text, `num_tokens` ids in all."""
    ids = tokenizer.encode(PASSAGE)
    return [tokenizer.get_bos_token_id(), *(ids[i % len(ids)] for i in range(num_tokens - 1))]


def bench_generate(engine: Engine, prompt_tokens: list[int], batch_size: int, decode_tokens: int, temperature: float) -> dict:
    """Times one generation: `ttft` (s), `step_times` (s per later step), `peak_vram` (bytes, None without CUDA).

    There are fewer than `decode_tokens` - 1 steps if the model ends all answers early.
    """
    on_cuda = engine.model.get_device().type == "cuda"
    if on_cuda:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
    columns = engine.generate(prompt_tokens, num_samples=batch_size, max_tokens=decode_tokens, temperature=temperature)
    marks = [time.perf_counter()]
    for _ in range(decode_tokens):
        if next(columns, None) is None:
            break
        marks.append(time.perf_counter())  # a column is made of numbers on the host, so its step has ended
    times = [end - start for start, end in itertools.pairwise(marks)]
    return {"ttft": times[0], "step_times": times[1:], "peak_vram": torch.cuda.max_memory_allocated() if on_cuda else None}


def percent_of(used: float, peak: float | None, digits: int) -> float | None:
    return round(100 * used / peak, digits) if peak else None


@dataclass
class Settings(CheckpointSettings):
    source: str = flag("base", "Stage of training that the model comes from", choices=SOURCES, short="-i")
    prompt_tokens: int = flag(2048, "Tokens of the prompt, cut so that prompt and answer fit into the context", type=positive_int)
    decode_tokens: int = flag(256, "Tokens of each answer", type=positive_int)
    batch_sizes: list[int] = flag("1,8,32,128", "Numbers of answers generated at the same time, joined by commas", type=positive_ints)
    temperature: float = flag(0.0, "How freely answers are sampled; 0 always takes the likeliest token", type=non_negative_float, short="-t")
    device_type: str = flag("", "Device to run on: cuda, mps or cpu (default: the best one here)")


@command
def main(argv=None) -> None:
    settings = parse_settings(Settings, argv, __doc__.splitlines()[0])
    ddp, *_, device = compute_init(settings.device_type or autodetect_device_type())
    if ddp:
        compute_cleanup()
        raise UsageError("infer_bench measures one device: start it without torchrun")
    _, folder, step = settings.find()
    model, tokenizer, meta = build_model(folder, step, device, phase="eval")
    engine = Engine(model, tokenizer)
    context = model.config.sequence_len
    if settings.decode_tokens >= context:
        raise UsageError(f"--decode-tokens={settings.decode_tokens} leaves no room for a prompt in the context of {context}; use fewer")
    prompt_tokens = min(settings.prompt_tokens, context - settings.decode_tokens)
    prompt = build_prompt(tokenizer, prompt_tokens)

    on_cuda = device.type == "cuda"
    gpu = torch.cuda.get_device_name(device) if on_cuda else None
    peaks = (get_peak_flops(gpu), get_peak_bandwidth(gpu)) if gpu else (math.inf, math.inf)
    peak_flops, peak_bandwidth = (peak if math.isfinite(peak) else None for peak in peaks)
    total_vram = torch.cuda.get_device_properties(device).total_memory if on_cuda else None
    all_bytes = sum(tensor.nbytes for tensor in (*model.parameters(), *model.buffers()))
    context_mid = prompt_tokens + settings.decode_tokens // 2
    step_weight_bytes, kv_bytes = weight_bytes(model), model.kv_read_bytes(context_mid)
    decode_flops = model.estimate_decode_flops(context_mid)
    dtypes: Counter[str] = Counter()
    for p in model.parameters():
        dtypes[str(p.dtype).removeprefix("torch.")] += p.numel()
    result = {
        "source": settings.source,
        "step": step,
        "model_config": meta["model_config"],
        "gpu": gpu,
        "peak_bandwidth_bytes_per_sec": peak_bandwidth,
        "total_vram_bytes": total_vram,
        "num_params": sum(dtypes.values()),
        "param_dtypes": dict(dtypes),
        "weight_bytes": step_weight_bytes,
        "kv_bytes_per_token": model.kv_bytes_per_token(),
        "kv_read_bytes_per_step": kv_bytes,
        "context_mid": context_mid,
        "peak_flops_per_sec": peak_flops,
        "decode_flops_per_token": decode_flops,
        "ceiling_bs1_tok_per_sec": round(peak_bandwidth / (step_weight_bytes + kv_bytes), 1) if peak_bandwidth else None,
        "max_full_context_rows": (total_vram - all_bytes) // (model.kv_bytes_per_token() * context) if total_vram else None,
        "prompt_tokens": prompt_tokens,
        "decode_tokens": settings.decode_tokens,
        "temperature": settings.temperature,
    }
    width = max(map(len, result))
    for key, value in result.items():
        print(f"{key:{width}}  {'unknown' if value is None else f'{value:,}' if isinstance(value, int) else value}")

    result["sweep"] = sweep = []
    bench_generate(engine, prompt, 1, 2, settings.temperature)  # warm-up
    seconds = bench_generate(engine, prompt, 1, 2, settings.temperature)["ttft"]
    result["prefill"] = {
        "tok_per_sec": round(prompt_tokens / seconds, 1),
        "mfu_percent": percent_of(model.estimate_prefill_flops(prompt_tokens) / seconds, peak_flops, 2),
        "time_sec": round(seconds, 6),
    }
    print(f"\nprefill: {prompt_tokens:,} tokens in {1e3 * seconds:.1f} ms, {prompt_tokens / seconds:,.1f} tokens/s")

    print(f"\n{'batch':>5} {'TTFT ms':>10} {'TPOT ms':>10} {'tokens/s':>10} {'MBU %':>8} {'MFU %':>8} {'memory GiB':>10} {'steps':>6}")
    for batch_size in settings.batch_sizes:
        try:
            bench_generate(engine, prompt, batch_size, min(WARM_UP_TOKENS, settings.decode_tokens), settings.temperature)
            run = bench_generate(engine, prompt, batch_size, settings.decode_tokens, settings.temperature)
        except (MemoryError, RuntimeError) as error:
            if not is_out_of_memory(error):
                raise
            print(f"{batch_size:5} out of memory: left out")
            continue
        tpot = statistics.median(run["step_times"]) if run["step_times"] else None  # None: the first token ended the answer
        row = {
            "batch_size": batch_size,
            "ttft_sec": round(run["ttft"], 6),
            "tpot_sec": round(tpot, 6) if tpot else None,
            "tok_per_sec": round(batch_size / tpot, 1) if tpot else None,
            "mbu_percent": percent_of((weight_bytes(model, batch_size) + batch_size * kv_bytes) / tpot, peak_bandwidth, 2) if tpot else None,
            "mfu_percent": percent_of(batch_size * decode_flops / tpot, peak_flops, 4) if tpot else None,
            "peak_vram_bytes": run["peak_vram"],
            "decode_steps": len(run["step_times"]),
        }
        sweep.append(row)
        cells = [1e3 * run["ttft"], tpot and 1e3 * tpot, row["tok_per_sec"], row["mbu_percent"], row["mfu_percent"],
                 run["peak_vram"] and run["peak_vram"] / 2**30]
        shown = ["-" if cell is None else f"{cell:,.2f}" for cell in cells]
        print("{:5} {:>10} {:>10} {:>10} {:>8} {:>8} {:>10} {:6}".format(batch_size, *shown, row["decode_steps"]))
    print(json.dumps(result))


if __name__ == "__main__":
    sys.exit(main())

"""Training speed, side by side in one call: ours against the stock recipe, and against the machine's matmul limit.

    python -m dev.bench_train                            # CPU: d4 and d6, 8,192 tokens a step, vocabulary 4,096
    python -m dev.bench_train --depths 12 --head-dim 128 --max-seq-len 2048 --rows 32 --vocab-size 32768   # on a GPU

Contestants take turns, a few steps at a time, so that a machine whose speed drifts is unfair to nobody:

| name | what it is |
|---|---|
| stock-fp32 | nanochat's default on a CPU: whole model compiled in float32, built-in attention, all logits at once |
| stock-bf16 | the same after merely switching the dtype |
| plain-bf16 | the same model and dtype in a plain PyTorch loop: nothing compiled |
| ours | this project's defaults |
| ours-eager | without torch.compile |
| ours-layers | the layers compiled one by one, instead of the whole model (GPU) |
| ours-fp8 | with --fp8 (GPU) |

Each runs in a process of its own, since the dtype is fixed at import. `--worker` is how the bench calls itself.
"""
import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable

from nanochat.cli import command, positive_int

CPU_CONTESTANTS = ("stock-fp32", "stock-bf16", "plain-bf16", "ours")
GPU_CONTESTANTS = ("stock-bf16", "ours-eager", "ours-layers", "ours", "ours-fp8")
AT_ONCE = 3  # contestants that compile, and fill a GPU's memory, at the same time; on a CPU they would only slow each other down


def parse_args(argv):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--depths", type=positive_int, nargs="+", default=[4, 6])
    parser.add_argument("--head-dim", type=positive_int, default=64)
    parser.add_argument("--max-seq-len", type=positive_int, default=512)
    parser.add_argument("--rows", type=positive_int, default=16, help="rows per step")
    parser.add_argument("--window-pattern", default="L")
    parser.add_argument("--vocab-size", type=positive_int, default=4096)
    parser.add_argument("--rounds", type=positive_int, default=5)
    parser.add_argument("--steps", type=positive_int, default=2, help="steps per turn")
    parser.add_argument("--contestants", nargs="+", choices=sorted({*CPU_CONTESTANTS, *GPU_CONTESTANTS}))
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    parser.add_argument("--depth", type=positive_int, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    args.flags = sys.argv[1:] if argv is None else list(argv)
    return args


# -----------------------------------------------------------------------------
# One contestant: builds its model, then runs as many steps as each line on stdin asks for


def make_stock(compiled: bool) -> None:
    """Puts the plain formulation in the place of ours: one attention call, one cross-entropy over all logits."""
    import torch
    import torch.nn.functional as F

    from nanochat import compiler, flash_attention, gpt, optim

    def builtin_attention(q, k, v, causal=False, window_size=(-1, -1)):
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=q.size(1) != k.size(1)).transpose(1, 2)

    def full_cross_entropy(hidden, weight, targets, cap, reduction="mean"):
        logits = cap * torch.tanh(F.linear(hidden, weight).float() / cap)
        return F.cross_entropy(logits, targets, ignore_index=-1, reduction=reduction)

    flash_attention.flash_attn.flash_attn_func = builtin_attention
    gpt.softcap_cross_entropy = full_cross_entropy
    optim.muon_step_fused = compiler.compiled(optim.muon_step_fused.__wrapped__, dynamic=False) if compiled else optim.muon_step_fused.__wrapped__


def worker(args) -> None:
    import torch

    from nanochat.common import COMPUTE_DTYPE, compute_init
    from nanochat.compiler import CompiledLayers, compile_model, compiled
    from nanochat.gpt import GPT
    from nanochat.recipe import gpt_config
    if not args.worker.startswith("ours"):
        make_stock(compiled=args.worker.startswith("stock"))
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if args.worker.startswith("ours"):
        compute_init(device.type)
    with torch.device("meta"):
        model = GPT(gpt_config(args.depth, 64, args.head_dim, args.max_seq_len, args.vocab_size, args.window_pattern))
    model.to_empty(device=device)
    torch.manual_seed(0)
    model.init_weights()
    flops = model.estimate_flops() * args.rows * args.max_seq_len
    if args.worker.endswith("fp8"):
        from nanochat.fp8 import convert_to_float8_training, worth_converting
        convert_to_float8_training(model, module_filter_fn=worth_converting)
    if args.worker in ("plain-bf16", "ours-eager"):
        run = model
    elif args.worker == "ours-layers":
        run = CompiledLayers(model)
    else:
        run = compile_model(model, device.type) if args.worker.startswith("ours") else compiled(model, dynamic=False)
    optimizer = model.setup_optimizer()
    idx = torch.randint(0, args.vocab_size, (args.rows, args.max_seq_len), device=device)
    targets = torch.randint(0, args.vocab_size, (args.rows, args.max_seq_len), device=device)
    sync = torch.cuda.synchronize if device.type == "cuda" else lambda: None

    memory: dict = {}

    def peak() -> int:
        bytes_ = torch.cuda.max_memory_allocated() if device.type == "cuda" else 0
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        return bytes_

    class Mark:
        """A moment in the device's work; asking for it does not stop the work."""

        def __init__(self):
            self.event = torch.cuda.Event(enable_timing=True) if device.type == "cuda" else None
            if self.event is None:
                self.time = time.perf_counter()
            else:
                self.event.record()

        def until(self, later) -> float:
            return self.event.elapsed_time(later.event) / 1000 if self.event else later.time - self.time

    def step(times):
        peak()
        sync()
        marks = [Mark()]
        loss = run(idx, targets)
        marks.append(Mark())
        loss.backward()
        marks.append(Mark())
        memory["passes"] = peak()
        memory["gradients"] = sum(p.grad.nbytes for p in model.parameters())
        optimizer.step()
        model.zero_grad(set_to_none=True)
        marks.append(Mark())
        sync()
        memory["optimizer_step"] = peak()
        times.append([a.until(b) for a, b in zip(marks, marks[1:])])

    def profile() -> dict:
        """Where one step goes, in percent of its operators' own time."""
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profiler:
            step([])
        events = {event.key: event for event in profiler.key_averages()}

        def total(*prefixes):
            return sum(event.cpu_time_total for key, event in events.items() if key.startswith(prefixes))
        own = sum(event.self_cpu_time_total for event in events.values())
        parts = dict(optimizer=total("Optimizer.step"), loss=total("nanochat::softcap_cross_entropy", "GeneratedBackwardFor_nanochat_softcap"),
                     attention=total("nanochat::attention") or total("aten::_scaled_dot_product_flash"),
                     compiled_elementwise=sum(e.self_cpu_time_total for key, e in events.items() if "CompiledFxGraph" in key))
        parts["loss"] /= 2 if "nanochat::softcap_cross_entropy" in events else 1  # the wrapper and the operator inside it
        parts["linear layers and the rest"] = own - sum(parts.values())
        return {key: 100 * value / own for key, value in parts.items()}

    for line in sys.stdin:
        if line.strip() == "matmul":
            n = 8192 if device.type == "cuda" else 2048
            a, b = (torch.randn(n, n, device=device).to(COMPUTE_DTYPE) for _ in range(2))  # a CPU that has no bf16 would take minutes for one
            seconds = []
            for _ in range(12):
                sync()
                started = time.perf_counter()
                a @ b
                sync()
                seconds.append(time.perf_counter() - started)
            print(json.dumps({"flops_per_second": 2 * n ** 3 / statistics.median(seconds[2:]), "dtype": str(COMPUTE_DTYPE).removeprefix("torch.")}), flush=True)
        elif line.strip() == "profile":
            print(json.dumps(profile()), flush=True)
        else:
            times: list = []
            for _ in range(int(line)):
                step(times)
            memory["weights"] = sum(tensor.nbytes for tensor in (*model.parameters(), *model.buffers()))
            memory["optimizer"] = sum(value.nbytes for state in optimizer.state.values() for value in state.values() if torch.is_tensor(value))
            memory["activations"] = memory["passes"] - memory["weights"] - memory["gradients"] - memory["optimizer"]
            if device.type == "cuda":
                torch.cuda.empty_cache()  # the others' turn
            print(json.dumps({"times": times, "flops": flops, "memory": memory}), flush=True)


# -----------------------------------------------------------------------------


class Contestant:
    def __init__(self, name: str, depth: int, flags: list[str]):
        dtype = {"stock-fp32": "float32", "stock-bf16": "bfloat16", "plain-bf16": "bfloat16"}.get(name)
        env = {key: value for key, value in os.environ.items() if key != "NANOCHAT_DTYPE"} | ({"NANOCHAT_DTYPE": dtype} if dtype else {})
        self.name, self.times = name, []
        self.process = subprocess.Popen([sys.executable, "-m", "dev.bench_train", *flags, "--worker", name, "--depth", str(depth)],
                                        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=env)

    def ask(self, question) -> dict:
        self.write(question)
        return self.read()

    def write(self, question) -> None:
        self.process.stdin.write(f"{question}\n")
        self.process.stdin.flush()

    def read(self) -> dict:
        while line := self.process.stdout.readline():
            if line.startswith("{"):
                return json.loads(line)
        sys.exit(f"{self.name} ended early")

    def close(self) -> None:
        self.process.stdin.close()
        self.process.wait()


def bench(args, depth: int, all_ready: Callable[[], None] = lambda: None) -> dict:
    """Prints the table; returns, for each contestant, tokens/s, MFU (None on a CPU), seconds until it was ready, and bytes of memory.

    all_ready: is called between the compilation, which is not timed, and the turns, which are.
    """
    import torch
    names = args.contestants or (GPU_CONTESTANTS if torch.cuda.is_available() else CPU_CONTESTANTS)
    contestants, ready = [], {}
    at_once = AT_ONCE if torch.cuda.is_available() else 1
    for first in range(0, len(names), at_once):
        started = time.perf_counter()
        wave = [Contestant(name, depth, args.flags) for name in names[first:first + at_once]]
        for contestant in wave:
            contestant.write(1)  # compiles
        for contestant in wave:
            contestant.read()
            ready[contestant.name] = time.perf_counter() - started
            print(f"d{depth} {contestant.name}: ready after {ready[contestant.name]:.0f}s", file=sys.stderr)
        contestants += wave
    all_ready()
    answers, limits = {}, []
    for _ in range(args.rounds):
        for contestant in contestants:
            answer = contestant.ask(args.steps)
            contestant.times += answer["times"]
            answers[contestant.name] = answer
        product = contestants[-1].ask("matmul")
        limits.append(product["flops_per_second"])
    limit = statistics.median(limits)
    tokens = args.rows * args.max_seq_len
    peak_flops = None
    if torch.cuda.is_available():
        from nanochat.common import get_peak_flops
        peak_flops = get_peak_flops(torch.cuda.get_device_name())
    print(f"\nd{depth}, {tokens:,} tokens a step of {args.max_seq_len}, vocabulary {args.vocab_size:,}; plain {product['dtype']} matmul {limit / 1e9:,.0f} GFLOP/s\n")
    print("| contestant | tokens/s | x first | forward ms | backward ms | optimizer ms | GFLOP/s | of matmul | ready after s | GiB |")
    print("|---|---:|---:|---:|---:|---:|---:|---:|---:|---:|")
    results = {}
    for contestant in contestants:
        medians = [statistics.median(column) for column in zip(*contestant.times)]
        seconds = statistics.median(sum(row) for row in contestant.times)
        # paired: each turn against the first contestant's turn of the same round
        per_turn = [statistics.mean(sum(row) for row in contestant.times[i:i + args.steps]) for i in range(0, len(contestant.times), args.steps)]
        first = [statistics.mean(sum(row) for row in contestants[0].times[i:i + args.steps]) for i in range(0, len(per_turn) * args.steps, args.steps)]
        ratio = statistics.median(b / a for a, b in zip(per_turn, first))
        rate = answers[contestant.name]["flops"] / seconds
        memory = answers[contestant.name]["memory"]
        gib = max(memory["passes"], memory["optimizer_step"]) / 2 ** 30
        results[contestant.name] = dict(tokens_per_second=tokens / seconds, mfu=peak_flops and rate / peak_flops, ready=ready[contestant.name], memory=memory,
                                        ratio=ratio)
        print(f"| {contestant.name} | {tokens / seconds:,.0f} | {ratio:.2f} | " + " | ".join(f"{1000 * t:.0f}" for t in medians)
              + f" | {rate / 1e9:,.0f} | {rate / limit:.2f} | {ready[contestant.name]:.0f} | {f'{gib:.1f}' if gib else '-'} |", flush=True)
    if peak_flops:
        print("\nMFU: " + ", ".join(f"{name} {100 * result['mfu']:.1f}%" for name, result in results.items()))
    else:
        parts = contestants[-1].ask("profile")
        print(f"\n{contestants[-1].name}, share of a step: " + ", ".join(f"{key.replace('_', ' ')} {value:.0f}%" for key, value in parts.items()))
    for contestant in contestants:
        contestant.close()
    return results


@command
def main(argv=None) -> None:
    args = parse_args(argv)
    if args.worker:
        worker(args)
        return
    for depth in args.depths:
        bench(args, depth)


if __name__ == "__main__":
    sys.exit(main())

"""One layer in training: where low-rank factors start to pay, and what normalization costs.

    python -m dev.bench_layers --out=layers.json --plot=layers.png      # dense, low-rank and nGPT at widths 256 to 4096
    python -m dev.bench_layers --memory --depth=20 --rank=128           # a whole model: parameters, FLOPs, bytes

Forward and backward pass, optimizer step (MuonAdamW), memory and FLOPs of a single `LayerSpec` of each kind, compiled as
in training. The kinds take turns, so every ratio to the dense layer is the median of ratios within a round, and a plain
matmul takes its turn too: it is the limit that a layer's FLOP/s are stated against.

FLOPs count the weights and the full square of attention. Memory is weights, gradients, optimizer state and what a pass
adds to them: on CUDA the allocator's peak, elsewhere the bytes that the forward pass saves for the backward pass.
"""
import contextlib
import io
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from nanochat.cli import ArgumentParser, UsageError, command, picture_path, positive_float, positive_int
from nanochat.common import COMPUTE_DTYPE, autodetect_device_type, compute_init
from nanochat.compiler import compile_model, compiled, why_not_compile
from nanochat.drawing import new_figure
from nanochat.files import atomic_path, write_text_atomic
from nanochat.gpt import GPT, Linear, run_layer
from nanochat.layered_gpt import LayeredGPTConfig, LayerSpec, empty_gpt
from nanochat.ngpt import NormalizedWeights
from nanochat.optim import MuonAdamW
from nanochat.recipe import LayerChanges, gpt_config


def parse_args(argv):
    parser = ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--widths", type=positive_int, nargs="+", default=[256, 512, 1024, 2048, 4096])
    add("--rank-divisors", type=positive_int, nargs="+", default=[16, 8, 4, 2], help="the ranks are the width divided by these")
    add("--head-dim", type=positive_int, default=64)
    add("--max-seq-len", type=positive_int, default=512, help="tokens of a row")
    add("--tokens", type=positive_int, help="tokens of a pass (default: 16384 on a GPU, elsewhere 8192 at width 256, fewer at larger ones)")
    add("--rounds", type=positive_int, default=7, help="turns of each kind, after one to warm up")
    add("--seconds", type=positive_float, default=20.0, help="no new round of passes, or of optimizer steps, after so long at one width")
    add("--memory", action="store_true", help="compare a low-rank model with a dense one instead: parameters, FLOPs, bytes, tokens/s")
    add("--depth", type=positive_int, default=20, help="of the models that --memory counts")
    add("--rank", type=positive_int, default=128, help="of the low-rank model that --memory counts")
    add("--measured-depth", type=positive_int, default=4, help="of the smaller models, of the same rank / width, that --memory trains for a few steps")
    add("--device-type", default="", help="cuda, mps or cpu (default: autodetect)")
    add("--out", type=Path, help="write the raw numbers to this JSON file")
    add("--plot", type=picture_path, help="draw the ratios into this picture")
    args = parser.parse_args(argv)
    if args.plot and args.memory:
        raise UsageError("--memory is a table without a picture; leave out --plot")
    for width in () if args.memory else args.widths:
        if args.head_dim % 2 or width % args.head_dim:
            raise UsageError(f"a width of {width} has no whole number of heads of --head-dim={args.head_dim}, which must be even; change one of them")
        if max(args.rank_divisors) > width or min(args.rank_divisors) == 1:
            raise UsageError(f"--rank-divisors must be from 2 to the smallest width, {min(args.widths)}")
    return args


# -----------------------------------------------------------------------------
# Measuring


def synchronizer(device: torch.device) -> Callable[[], None]:
    return {"cuda": torch.cuda.synchronize, "mps": torch.mps.synchronize}.get(device.type, lambda: None)


def in_turns(contestants: dict[str, Callable], rounds: int, seconds: float) -> dict[str, list]:
    """What each contestant returns, round by round. The first round only warms up, unless time is over after it."""
    results: dict[str, list] = {name: [] for name in contestants}
    started = time.perf_counter()
    for _ in range(rounds + 1):
        for name, run in contestants.items():
            results[name].append(run())
        if time.perf_counter() - started > seconds:
            break
    return {name: answers[1:] or answers for name, answers in results.items()}


def matmul_seconds(device: torch.device, n: int) -> Callable[[], float]:
    a, b = (torch.randn(n, n, device=device).to(COMPUTE_DTYPE) for _ in range(2))
    sync = synchronizer(device)

    def run() -> float:
        sync()
        started = time.perf_counter()
        a @ b
        sync()
        return time.perf_counter() - started

    return run


def saved_bytes(run: Callable, parameters) -> int:
    """Bytes that autograd keeps after `run` for the backward pass, each storage once, the parameters not counted."""
    known = {p.untyped_storage().data_ptr() for p in parameters}
    sizes: dict[int, int] = {}
    kept = []  # so that no address is used twice

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            sizes[storage.data_ptr()] = storage.nbytes()
            kept.append(tensor.detach())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        run()
    return sum(sizes.values())


def state_bytes(optimizer: torch.optim.Optimizer) -> int:
    """Bytes of an optimizer's tensors as they are."""
    return sum(t.nbytes for state in optimizer.state.values() for t in state.values() if torch.is_tensor(t))


def expected_state_bytes(optimizer: MuonAdamW) -> int:
    """What MuonAdamW will have allocated after a step of one rank: AdamW keeps two moments of each entry; Muon one, and a
    second moment of each row or column, whichever are more."""
    return sum(2 * p.nbytes if group["kind"] == "adamw" else p.nbytes + max(p.shape) * p.itemsize
               for group in optimizer.param_groups for p in group["params"])


def muon_flops(parameters, steps: int = 5) -> int:
    """Of the orthogonalizations of a Muon step: with sides m <= n each iteration takes two products of 2 m²n and one of 2 m³."""
    sides = [sorted(p.shape) for p in parameters if p.ndim == 2]
    return steps * sum(4 * m * m * n + 2 * m ** 3 for m, n in sides)


def quiet_optimizer(model: GPT) -> MuonAdamW:
    with contextlib.redirect_stdout(io.StringIO()):  # it tells how learning rates are scaled
        return model.setup_optimizer()


class Layer:
    """A model of one layer, of which only that layer runs: forward, backward, optimizer step."""

    def __init__(self, spec: LayerSpec, width: int, rows: int, length: int, device: torch.device):
        config = LayeredGPTConfig(sequence_len=length, vocab_size=64, n_layer=1, n_head=spec.n_head, n_kv_head=spec.n_kv_head, n_embd=width,
                                  layers=(spec,))
        self.model = empty_gpt(config)
        self.model.to_empty(device=device)
        for p in self.model.parameters():  # the spectral initialization would take minutes at the largest widths
            torch.nn.init.normal_(p, std=p.size(-1) ** -0.5)
        self.model.init_buffers()
        self.block = self.model.transformer.h[0]
        self.parameters = list(self.block.parameters())
        self.optimizer = quiet_optimizer(self.model)
        own = set(self.parameters)
        for group in self.optimizer.param_groups:
            group["params"] = [p for p in group["params"] if p in own]
        if spec.block == "ngpt":
            self.sphere = NormalizedWeights(self.model)
        matrices = sum(module.weight.numel() for module in self.block.modules() if isinstance(module, Linear))
        self.flops = 6 * rows * length * (matrices + spec.n_head * (spec.qk_dim + spec.head_dim) * length)
        self.muon_flops = muon_flops(self.parameters)
        self.x, self.x0, self.upstream = (torch.randn(rows, length, width, device=device).to(COMPUTE_DTYPE) for _ in range(3))
        self.x.requires_grad_()
        self.run_layer = run_layer if why_not_compile(device.type) else compiled(run_layer, dynamic=False)
        self.sync = synchronizer(device)

    def forward(self) -> torch.Tensor:
        model = self.model
        return self.run_layer(self.block, self.x, self.x0, model.resid_lambdas[0], model.x0_lambdas[0], None, model.cos_sin(0, self.x.size(1))[0],
                              model.window_sizes[0], None)

    def clear(self) -> None:
        self.model.zero_grad(set_to_none=True)
        self.x.grad = None

    def _timed(self, *parts: Callable) -> list[float]:
        self.sync()
        marks, value = [time.perf_counter()], ()
        for part in parts:
            value = part(*value)
            self.sync()
            marks.append(time.perf_counter())
        self.clear()
        return [b - a for a, b in zip(marks, marks[1:])]

    def train(self) -> list[float]:
        """Seconds of the forward and of the backward pass."""
        return self._timed(lambda: (self.forward(),), lambda y: y.backward(self.upstream))

    def step(self) -> float:
        """Seconds of an optimizer step, the normalization after it included."""
        for p in self.parameters:
            p.grad = torch.rand_like(p) - 0.5
        return self._timed(self.optimizer.step)[0]

    def normalize(self) -> float:
        return self._timed(self.sphere)[0]

    def bytes(self) -> dict[str, int]:
        """After a step: what training the layer holds, and what a pass adds to that."""
        weights = sum(p.nbytes for p in self.parameters)
        if self.x.device.type == "cuda":
            self.clear()
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            self.train()
            added = torch.cuda.max_memory_allocated() - before - weights
        else:
            added = saved_bytes(self.forward, self.model.parameters())
        return {"weights": weights, "gradients": weights, "optimizer": state_bytes(self.optimizer), "activations": added}


def layer_kinds(width: int, head_dim: int, divisors: list[int]) -> dict[str, LayerSpec]:
    heads = width // head_dim
    dense = LayerSpec(n_head=heads, n_kv_head=heads, head_dim=head_dim, qk_dim=head_dim, mlp_hidden=4 * width)
    ranks = {f"rank {width // n}": replace(dense, attn_rank=width // n, mlp_rank=width // n) for n in sorted(divisors, reverse=True)}
    return {"dense": dense, **ranks, "nGPT": replace(dense, block="ngpt")}


def tokens_at(width: int, args, device: torch.device) -> int:
    """Whole rows, about 2 million activations of the stream unless told otherwise."""
    tokens = args.tokens or (16384 if device.type == "cuda" else min(8192, max(512, 2 ** 21 // width)))
    return max(1, tokens // args.max_seq_len) * args.max_seq_len


def measure(width: int, args, device: torch.device) -> dict[str, Any]:
    """Raw numbers of all kinds at one width."""
    tokens = tokens_at(width, args, device)
    layers: dict[str, Layer] = {}
    compile_seconds = {}
    torch.compiler.reset()
    specs = layer_kinds(width, args.head_dim, args.rank_divisors)
    for name, spec in specs.items():
        layers[name] = Layer(spec, width, tokens // args.max_seq_len, args.max_seq_len, device)
        started = time.perf_counter()
        layers[name].train()
        if device.type == "cuda":  # where the optimizer is compiled too
            layers[name].step()
        compile_seconds[name] = time.perf_counter() - started
        print(f"width {width}, {name}: ready after {compile_seconds[name]:.1f} s", file=sys.stderr)
    n = 8192 if device.type == "cuda" else 2048
    passes: dict[str, Callable] = {name: layer.train for name, layer in layers.items()}
    timed = in_turns({**passes, "matmul": matmul_seconds(device, n)}, args.rounds, args.seconds)
    updates: dict[str, Callable] = {name: layer.step for name, layer in layers.items()}
    steps = in_turns({**updates, "normalization": layers["nGPT"].normalize}, args.rounds, args.seconds)
    kinds = {name: {"spec": asdict(specs[name]), "flops": layer.flops,
                    "muon_flops": layer.muon_flops, "compile_seconds": compile_seconds[name], "forward": [f for f, _ in timed[name]],
                    "backward": [b for _, b in timed[name]], "optimizer": steps[name], "bytes": layer.bytes()}
             for name, layer in layers.items()}
    return {"width": width, "tokens": tokens, "matmul_flops_per_second": [2 * n ** 3 / s for s in timed["matmul"]],
            "normalization": steps["normalization"], "kinds": kinds}


# -----------------------------------------------------------------------------
# Reporting


def ratio(values: list[float], reference: list[float]) -> float:
    """Median over the rounds of a time against the reference's of the same round."""
    return statistics.median(a / b for a, b in zip(values, reference))


def summarize(result: dict[str, Any]) -> list[dict[str, Any]]:
    """One row per kind: medians, and ratios to the dense layer."""
    dense, limit = result["kinds"]["dense"], statistics.median(result["matmul_flops_per_second"])
    rows = []
    for name, kind in result["kinds"].items():
        passes, dense_passes = ([f + b for f, b in zip(k["forward"], k["backward"])] for k in (kind, dense))
        rank = kind["spec"]["attn_rank"]
        rows.append({
            "width": result["width"], "name": name, "tokens": result["tokens"], "rank_share": rank / result["width"] if rank else None,
            "gflops": kind["flops"] / 1e9, "forward": statistics.median(kind["forward"]), "backward": statistics.median(kind["backward"]),
            "optimizer": statistics.median(kind["optimizer"]), "bytes": sum(kind["bytes"].values()),
            "of_matmul": kind["flops"] / statistics.median(passes) / limit,
            "pass_ratio": ratio(passes, dense_passes), "optimizer_ratio": ratio(kind["optimizer"], dense["optimizer"]),
            "flops_ratio": kind["flops"] / dense["flops"], "muon_flops_ratio": kind["muon_flops"] / dense["muon_flops"],
            "bytes_ratio": sum(kind["bytes"].values()) / sum(dense["bytes"].values()),
        })
    return rows


def break_even(points: list[tuple[float, float]]) -> float | None:
    """The rank / width below which the time ratio stays under 1, interpolated between the points (rank / width, ratio).

    The largest rank / width if all of them pay, None if not even the smallest does.
    """
    points = sorted(points)
    if points[0][1] >= 1:
        return None
    for (x0, y0), (x1, y1) in zip(points, points[1:]):
        if y1 >= 1:
            return x0 + (x1 - x0) * (1 - y0) / (y1 - y0)
    return points[-1][0]


def where_it_pays(summaries: list[list[dict[str, Any]]]) -> str:
    """One sentence about forward and backward."""
    parts = []
    for rows in summaries:
        low_rank = [row for row in rows if row["rank_share"]]
        share = break_even([(row["rank_share"], row["pass_ratio"]) for row in low_rank])
        best = min(low_rank, key=lambda row: row["pass_ratio"])
        parts.append(f"at no rank at width {rows[0]['width']}" if share is None else
                     f"{'at every rank measured, up to' if share == max(row['rank_share'] for row in low_rank) else 'below'} {share:.2f} of the width "
                     f"{rows[0]['width']} ({best['name']}: {best['pass_ratio']:.2f} of dense)")
    return f"Low-rank takes less time than dense (forward and backward) {'; '.join(parts)}."


def normalization_share(result: dict[str, Any]) -> float:
    """The part of an nGPT layer's step (forward, backward, optimizer) that the normalization of its weights takes."""
    kind = result["kinds"]["nGPT"]
    passes = statistics.median(f + b for f, b in zip(kind["forward"], kind["backward"]))
    return statistics.median(n / (passes + o) for n, o in zip(result["normalization"], kind["optimizer"]))


HEADER = """
| width | layer | tokens | GFLOP | forward ms | backward ms | of dense | FLOPs of dense | of matmul | optimizer ms | of dense | MiB | of dense |
|---:|---|---:|---:|---:|---:|---:|---:|---:|---:|---:|---:|---:|"""


def line(row: dict[str, Any]) -> str:
    return (f"| {row['width']} | {row['name']} | {row['tokens']:,} | {row['gflops']:,.1f} | {1000 * row['forward']:,.1f} | {1000 * row['backward']:,.1f} "
            f"| {row['pass_ratio']:.2f} | {row['flops_ratio']:.2f} | {row['of_matmul']:.2f} | {1000 * row['optimizer']:,.1f} "
            f"| {row['optimizer_ratio']:.2f} | {row['bytes'] / 2**20:,.1f} | {row['bytes_ratio']:.2f} |")


def draw(summaries: list[list[dict[str, Any]]], path: Path, machine: str) -> None:
    """Time ratios to the dense layer over rank / width, one line per width; what FLOPs alone would make of it is dashed."""
    figure = new_figure(12, 5)
    import matplotlib
    panels = figure.subplots(1, 2)
    colors = matplotlib.colormaps["viridis"]([0.9 * i / max(1, len(summaries) - 1) for i in range(len(summaries))])
    shares = sorted({row["rank_share"] for row in summaries[0] if row["rank_share"]})
    for panel, title, time_key, flops_key in ((panels[0], "forward and backward pass", "pass_ratio", "flops_ratio"),
                                              (panels[1], "optimizer step (MuonAdamW)", "optimizer_ratio", "muon_flops_ratio")):
        for rows, color in zip(summaries, colors):
            low_rank = sorted((row for row in rows if row["rank_share"]), key=lambda row: row["rank_share"])
            xs = [row["rank_share"] for row in low_rank]
            panel.plot(xs, [row[time_key] for row in low_rank], color=color, marker="o", markersize=4, label=f"width {rows[0]['width']}")
            panel.plot(xs, [row[flops_key] for row in low_rank], color=color, linestyle="--", linewidth=1)
            panel.plot([1.0], [next(row[time_key] for row in rows if row["name"] == "nGPT")], color=color, marker="D", markersize=6, linestyle="none")
        panel.axhline(1, color="black", linewidth=1)
        panel.annotate("dense", (shares[0], 1), xytext=(0, 4), textcoords="offset points", fontsize=9)
        panel.set_xscale("log", base=2)
        panel.set_xticks([*shares, 1.0], labels=[*(f"1/{1 / share:.3g}" for share in shares), "nGPT\n(dense)"])
        panel.minorticks_off()
        panel.set_ylim(bottom=0)
        panel.set_xlabel("rank / width")
        panel.set_ylabel("time / time of the dense layer")
        panel.set_title(title)
        panel.grid(alpha=0.3)
    panels[0].plot([], [], color="gray", linestyle="--", linewidth=1, label="if FLOPs were all")
    panels[0].plot([], [], color="gray", marker="D", linestyle="none", label="nGPT")
    panels[0].legend(fontsize=9)
    figure.suptitle(f"One layer against a dense one, {machine}", fontsize=11)
    with atomic_path(path) as temporary:
        figure.savefig(temporary, format=path.suffix[1:].lower(), dpi=150)


def describe(device: torch.device) -> str:
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"{device.type}, threads: {torch.get_num_threads()}"
    return f"{name}, {str(COMPUTE_DTYPE).removeprefix('torch.')}, torch {torch.__version__}"


def save(path: Path | None, args, machine: str, **content) -> None:
    if path:
        flags = {key: str(value) if isinstance(value, Path) else value for key, value in vars(args).items()}
        write_text_atomic(path, json.dumps({"machine": machine, "args": flags, **content}, indent=1))


class Countdown:
    """Time left, by the FLOPs of what is left; each width tells how far the guess was off."""

    COMPILING = 8.0  # seconds a kind
    EFFICIENCY = 0.3  # of the matmul limit

    def __init__(self, args, device: torch.device):
        run = matmul_seconds(device, 1024)
        speed = self.EFFICIENCY * 2 * 1024 ** 3 / min(run() for _ in range(5))
        self.guesses = []
        for width in args.widths:
            shares = [1, 1, *(1.5 / n for n in args.rank_divisors)]  # of the dense layer's weights
            passes = sum(shares) * 72 * width ** 2 * tokens_at(width, args, device) / speed
            updates = 5 * 92 * width ** 3 / speed * sum(min(1, share) ** 2 for share in shares)
            self.guesses.append(self.COMPILING * len(shares) + sum(max(one, min(args.seconds, one * (args.rounds + 1))) for one in (passes, updates)))
        self.started = time.perf_counter()

    def left(self, done: int) -> float:
        """Seconds, when `done` of the widths are through."""
        rest = sum(self.guesses[done:])
        return rest * (time.perf_counter() - self.started) / sum(self.guesses[:done]) if done else rest


def compare_layers(args, device: torch.device) -> None:
    machine = describe(device)
    results: list[dict[str, Any]] = []
    summaries: list[list[dict[str, Any]]] = []
    countdown = Countdown(args, device)
    print(f"{machine}, rows of {args.max_seq_len} tokens")
    print(HEADER)
    for width in args.widths:
        print(f"width {width}: {len(results)} of {len(args.widths)} done, about {countdown.left(len(results)) / 60:.1f} min left", file=sys.stderr)
        results.append(measure(width, args, device))
        summaries.append(summarize(results[-1]))
        print("\n".join(map(line, summaries[-1])), flush=True)
        save(args.out, args, machine, widths=results)  # after each width: what is measured is not lost
        if args.plot:
            draw(summaries, args.plot, machine)
    limits = [statistics.median(result["matmul_flops_per_second"]) for result in results]
    print(f"\nPlain matmul in the same calls: {min(limits) / 1e9:,.0f} to {max(limits) / 1e9:,.0f} GFLOP/s.")
    print("Normalizing the weights of nGPT takes " + ", ".join(
        f"{normalization_share(result):.1%} of a step of {result['tokens']:,} tokens at width {result['width']}" for result in results) + ".")
    print(where_it_pays(summaries))


# -----------------------------------------------------------------------------
# A whole low-rank model against a dense one


def counted(config) -> dict[str, float]:
    """What a configuration needs, without building it."""
    model = empty_gpt(config)
    model._cast_embeddings()
    return {"parameters": sum(p.numel() for p in model.parameters()), "in the blocks": model.num_scaling_params()["transformer_matrices"],
            "FLOPs per token": model.estimate_flops(), "optimizer state, bytes": expected_state_bytes(quiet_optimizer(model)),
            "checkpoint's weights, bytes": sum(t.nbytes for t in model.state_dict().values())}


class Training:
    """Steps on random tokens."""

    def __init__(self, config, rows: int, device: torch.device):
        self.model = empty_gpt(config)
        self.model.to_empty(device=device)
        self.model.init_weights()
        self.optimizer = quiet_optimizer(self.model)
        self.run = compile_model(self.model, device.type)
        self.idx, self.targets = torch.randint(config.vocab_size, (2, rows, config.sequence_len), device=device)
        self.sync = synchronizer(device)
        self.step()  # compiles

    def step(self) -> float:
        """Seconds of a whole training step."""
        self.sync()
        started = time.perf_counter()
        self.run(self.idx, self.targets).backward()
        self.optimizer.step()
        self.model.zero_grad(set_to_none=True)
        self.sync()
        return time.perf_counter() - started

    def bytes(self) -> dict[str, int]:
        with tempfile.TemporaryDirectory() as folder:
            paths = {name: Path(folder) / name for name in ("weights", "optimizer")}
            torch.save(self.model.state_dict(), paths["weights"])
            torch.save(self.optimizer.state_dict(), paths["optimizer"])
            return {"optimizer state, bytes": state_bytes(self.optimizer), "checkpoint's weights, bytes": paths["weights"].stat().st_size,
                    "checkpoint's optimizer, bytes": paths["optimizer"].stat().st_size,
                    "kept for the backward pass, bytes": saved_bytes(lambda: self.run(self.idx, self.targets), self.model.parameters())}


def print_comparison(title: str, dense: dict[str, float], low_rank: dict[str, float]) -> None:
    print(f"\n| {title} | dense | low-rank | of dense |\n|---|---:|---:|---:|")
    for name, value in dense.items():
        print(f"| {name} | {value:,.0f} | {low_rank[name]:,.0f} | {low_rank[name] / value:.2f} |")


def compare_models(args, device: torch.device) -> None:
    machine = describe(device)
    print(machine)
    stock = gpt_config(args.depth, 64, 128, 2048, 32768, "SSSL")
    large = [counted(stock), counted(LayerChanges(attn_rank=args.rank, mlp_rank=args.rank).apply(stock))]
    print_comparison(f"counted: d{args.depth} of width {stock.n_embd}, rank {args.rank}", *large)
    small = gpt_config(args.measured_depth, 64, args.head_dim, args.max_seq_len, 4096, "L")
    rank = max(1, round(args.rank * small.n_embd / stock.n_embd))
    rows = max(1, (args.tokens or 8192) // args.max_seq_len)
    runs = [Training(config, rows, device) for config in (small, LayerChanges(attn_rank=rank, mlp_rank=rank).apply(small))]
    times = in_turns({"dense": runs[0].step, "low-rank": runs[1].step}, args.rounds, args.seconds)
    measured: list[dict[str, float]] = [{"tokens/s": rows * args.max_seq_len / statistics.median(seconds), **run.bytes()}
                                        for run, seconds in zip(runs, times.values())]
    print_comparison(f"measured: d{args.measured_depth} of width {small.n_embd}, rank {rank}, {rows * args.max_seq_len:,} tokens a step", *measured)
    print(f"\nA step of the low-rank model takes {ratio(times['low-rank'], times['dense']):.2f} of the dense one's time, median of turns.")
    save(args.out, args, machine, counted=large, measured=measured, seconds=times)


@command
def main(argv=None) -> None:
    args = parse_args(argv)
    *_, device = compute_init(args.device_type or autodetect_device_type())
    (compare_models if args.memory else compare_layers)(args, device)


if __name__ == "__main__":
    sys.exit(main())

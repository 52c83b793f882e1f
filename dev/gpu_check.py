"""Does everything work on this GPU, and how fast? One command, a few minutes, one verdict for each section.

    python -m dev.gpu_check                    # 3 minutes on an H100
    python -m dev.gpu_check --small            # the same paths in small, which tests/test_cuda.py runs
    python -m dev.gpu_check --device-type=cpu --small    # a rehearsal without a GPU

| section | what it shows |
|---|---|
| attention | FlashAttention-3, FlexAttention and the built-in kernel against a reference in float64: forward, backward, cache, grouped queries, windows |
| fp8 | both FP8 recipes against bf16 products of the same matrices; a growing run with --fp8 |
| growth | base_train through three stages, deeper and then wider: losses before and after, no recompilation once a stage is warm |
| layers | the same of nGPT's and of low-rank layers, and a branch that goes on from the end of one |
| ranks | torchrun with as many ranks as there are GPUs over NCCL, and again from the checkpoint in the middle: the same losses |
| tuning | fine-tuning, resumed in the middle: the same losses; reinforcement learning; probes and problems of their models |
| train | tokens/s, MFU and memory of the compiled model, beside eager and beside the stock formulation |
| serve | decoding with the cache equals decoding without, tokens/s at 1 and 16 rows, a request to the server |

Each section is a process of its own with a time limit, so that none can spoil another. All start together, as most of the time goes into
compilation; the last two, which measure, wait for their turn once they are warm. The exit status is 0 if all passed.
"""
import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
import urllib.request
from pathlib import Path
from unittest import mock

from nanochat.cli import ArgumentParser, command, positive_int

ROOT = Path(__file__).parents[1]
MEASURING = ("train", "serve")
FAILURES: list[str] = []


def check(what: str, value: float, limit: float) -> None:
    """Prints a number that must not exceed its limit."""
    good = value <= limit  # False for NaN
    print(f"  {'ok ' if good else 'BAD'} {what}: {value:.3g} (at most {limit:.3g})", flush=True)
    if not good:
        FAILURES.append(f"{what} is {value:.3g}")


def tell(text: str) -> None:
    """Prints a finding that is neither good nor bad."""
    print(f"  - {text}", flush=True)


def wait_for_turn() -> None:
    """Until the file is there that the parent makes when nobody else uses the machine."""
    turn, parent = os.environ.get("GPU_CHECK_TURN"), os.getppid()
    while turn and not os.path.exists(turn):
        if os.getppid() != parent:
            sys.exit("gpu_check has ended")
        time.sleep(0.1)


def error(got, want) -> float:
    """Relative, in the Frobenius norm."""
    got, want = got.detach().double(), want.detach().double()
    return ((got - want).norm() / want.norm().clamp(min=1e-30)).item()


# -----------------------------------------------------------------------------
# Attention


def attention_reference(q, k, v, window: int):
    """In float64. q (B, Tq, H, D), k and v (B, Tk, Hkv, D), aligned at the end."""
    import torch
    q, k, v = (x.double().transpose(1, 2) for x in (q, k, v))
    k, v = (x.repeat_interleave(q.size(1) // k.size(1), dim=1) for x in (k, v))
    distance = torch.arange(k.size(2) - q.size(2), k.size(2), device=q.device)[:, None] - torch.arange(k.size(2), device=q.device)
    hidden = (distance < 0) | (distance > window) if window >= 0 else distance < 0
    scores = (q @ k.mT) * q.size(-1) ** -0.5
    return (scores.masked_fill(hidden, -float("inf")).softmax(-1) @ v).transpose(1, 2)


def attention(args, device) -> None:
    import torch

    from nanochat import flash_attention as fa
    from nanochat.compiler import compiled
    tell(f"{fa.describe()}")
    T = 320 if args.small else 2048
    dtypes = (torch.float32,) if device.type == "cpu" else (torch.bfloat16, torch.float16, torch.float32)
    # batch, length, query heads, key heads, width of a query, width of a value, window
    shapes = [(2, T, 6, 6, 128, 128, -1), (2, T, 6, 6, 128, 128, T // 4), (1, T, 6, 2, 128, 128, T // 4), (1, T, 6, 2, 64, 64, -1),
              (1, T - 24, 4, 2, 64, 64, 200), (1, T // 2, 4, 4, 32, 64, 100), (1, 2, 2, 1, 64, 64, -1)]

    def flash(q, k, v, window):
        return fa.flash_attn_func(q, k, v, causal=True, window_size=(window, 0))

    inside = compiled(flash, dynamic=False, fullgraph=not fa.USE_FA3)
    for dtype in dtypes:
        limit = {torch.bfloat16: 0.015, torch.float16: 0.003, torch.float32: 0.003}[dtype]  # float32 is TF32 in a kernel of Triton
        worst: dict[str, float] = {}
        started = time.perf_counter()
        for B, length, heads, kv_heads, qk_dim, v_dim, window in shapes if dtype == dtypes[0] else shapes[1:5:3]:
            torch.manual_seed(length + heads)
            q, k, v = (torch.randn(B, length, h, d, device=device).to(dtype).requires_grad_() for h, d in ((heads, qk_dim), (kv_heads, qk_dim), (kv_heads, v_dim)))
            upstream = torch.randn(B, length, heads, v_dim, device=device).to(dtype)
            want = attention_reference(q, k, v, window)
            want_grads = torch.autograd.grad(want, (q, k, v), upstream.double())
            for name, function in (("eager", flash), ("compiled", inside)):
                if name == "compiled" and (device.type == "cpu" or dtype != torch.bfloat16 and window != 200):
                    continue  # compiling takes the time here
                y = function(q, k, v, window)
                for part, got, expected in zip(("forward", "grad q", "grad k", "grad v"), (y, *torch.autograd.grad(y, (q, k, v), upstream)), (want, *want_grads)):
                    worst[f"{name} {part}"] = max(worst.get(f"{name} {part}", 0.0), error(got, expected))
        tell(f"{str(dtype)[6:]}: {time.perf_counter() - started:.0f} s")
        for what, value in worst.items():
            check(f"{str(dtype)[6:]} {what}", value, limit)
    # the cache: a prompt, single tokens, a chunk, against one pass
    dtype = dtypes[0]
    worst_cache = 0.0
    for heads, kv_heads, window in ((6, 6, -1), (6, 2, -1), (6, 2, 50)):
        length = 200
        q, k, v = (torch.randn(2, length, h, 64, device=device).to(dtype) for h in (heads, kv_heads, kv_heads))
        want, start, outputs = attention_reference(q, k, v, window), 0, []
        caches = [torch.zeros(2, length, kv_heads, 64, device=device, dtype=dtype) for _ in range(2)]
        for size in (100, 1, 1, 96, 1, 1):
            part = slice(start, start + size)
            filled = torch.full((2,), start, dtype=torch.int32, device=device if fa.USE_FA3 else "cpu")
            outputs.append(fa.flash_attn_with_kvcache(q[:, part], *caches, k=k[:, part], v=v[:, part], cache_seqlens=filled, causal=True, window_size=(window, 0)))
            start += size
        worst_cache = max(worst_cache, error(torch.cat(outputs, dim=1), want))
    check("cache", worst_cache, 0.015)
    if device.type == "cuda":  # time and memory of what the recipe uses
        q, k, v = (torch.randn(8, T, 6, 128, device=device, dtype=torch.bfloat16, requires_grad=True) for _ in range(3))
        upstream = torch.randn_like(q)
        for window in (-1, T // 4):
            for name, function in (("eager", flash), ("compiled", inside)):
                run = lambda: torch.autograd.grad(function(q, k, v, window), (q, k, v), upstream)
                run(), run()
                torch.cuda.synchronize()
                torch.cuda.reset_peak_memory_stats()
                before, started = torch.cuda.memory_allocated(), time.perf_counter()
                for _ in range(10):
                    run()
                torch.cuda.synchronize()
                tell(f"8 x {T}, 6 heads of 128, window {window}, {name}: forward and backward {100 * (time.perf_counter() - started):.2f} ms, "
                      f"{(torch.cuda.max_memory_allocated() - before) / 2**20:.0f} MiB")


# -----------------------------------------------------------------------------
# FP8


def fp8(args, device) -> None:
    import torch

    from nanochat.compiler import compiled
    from nanochat.fp8 import Float8Linear
    from nanochat.gpt import Linear
    tokens, columns, rows = (64, 128, 256) if args.small else (32768, 768, 3072)
    dtype = torch.bfloat16
    torch.manual_seed(0)
    linear = Linear(columns, rows).to(device)
    x = torch.randn(tokens, columns, device=device, dtype=dtype).requires_grad_()
    upstream = torch.randn(tokens, rows, device=device, dtype=dtype)

    def gradients(layer):
        y = layer(x)
        return y, *torch.autograd.grad(y, (x, layer.weight), upstream)

    want = gradients(linear)
    for recipe in ("tensorwise", "rowwise"):
        layer = Float8Linear.from_float(linear, recipe)
        for what, got, expected in zip(("forward", "grad x", "grad weight"), gradients(layer), want):
            check(f"{recipe} {what}", error(got, expected), 0.08)
        if device.type == "cuda":
            run = compiled(gradients, dynamic=False)
            times = {}
            for name, candidate in (("bf16", linear), (recipe, layer)):
                run(candidate), run(candidate)
                torch.cuda.synchronize()
                started = time.perf_counter()
                for _ in range(10):
                    run(candidate)
                torch.cuda.synchronize()
                times[name] = 100 * (time.perf_counter() - started)
            tell(f"{tokens} x {columns} x {rows}, forward and backward, compiled: bf16 {times['bf16']:.2f} ms, {recipe} {times[recipe]:.2f} ms")
    if device.type == "cuda":  # a CPU's FP8 products can take seconds each
        prepare_data()
        train_growing(args, "fp8", "1x128,2x128" if args.small else "2x256,2x512", "--grow-at=0.5", "--fp8")


# -----------------------------------------------------------------------------
# Growth and ranks: base_train itself, on text of the standard library


def prepare_data() -> None:
    """Text and a tokenizer in NANOCHAT_BASE_DIR."""
    from nanochat import dataset
    from scripts import tok_train
    folder = Path(os.environ["NANOCHAT_BASE_DIR"], "text")
    folder.mkdir()
    for number, path in enumerate(sorted(Path(os.__file__).parent.glob("*.py"))[:80]):
        (folder / f"{number}.txt").write_text(path.read_text(encoding="utf-8", errors="ignore"), encoding="utf-8")
    assert dataset.main([f"--source={folder}"]) == 0
    assert tok_train.main(["--vocab-size=1024"]) == 0


def training_flags(args, steps: int, ranks: int = 1) -> list[str]:
    """Of base_train; each rank makes two passes a step."""
    sizes = ["--max-seq-len=64", "--device-batch-size=2"] if args.small else ["--max-seq-len=1024", "--device-batch-size=8"]
    batch, tokens = (256 * ranks, 512 * ranks) if args.small else (16384 * ranks, 65536 * ranks)
    return [*sizes, f"--total-batch-size={batch}", "--head-dim=32" if args.small else "--head-dim=64", f"--num-iterations={steps}", f"--eval-tokens={tokens}", f"--eval-every={steps // 2}",
            "--core-metric-every=-1", "--sample-every=-1", "--warmup-steps=4", f"--device-type={args.device_type}"]


def folder_of(tag: str, kind: str = "base") -> Path:
    return Path(os.environ["NANOCHAT_BASE_DIR"], f"{kind}_checkpoints", tag)


def records(tag: str, kind: str = "base") -> list[dict]:
    from nanochat.run_log import read_run_log
    return read_run_log(folder_of(tag, kind) / "log.jsonl")


def validations(tag: str) -> list[tuple[int, float]]:
    """(step, bits per byte), in order."""
    return [(record["step"], record["val_bpb"]) for record in records(tag) if record["kind"] == "eval"]


def resumed_as_before(tag: str, steps: int, resume, kind: str = "base") -> None:
    """A run that has ended goes on from its middle, by calling `resume`, as it did before."""
    def losses() -> dict[int, float]:
        return {record["step"]: record["raw_loss"] for record in records(tag, kind) if record["kind"] == "train"}

    whole = losses()
    for path in folder_of(tag, kind).glob(f"*_{steps:06d}*"):
        path.unlink()
    resume()
    resumed = losses()
    check(f"{tag}: steps missing", steps - len(resumed), 0)
    check(f"{tag}: largest difference of a loss after the resume", max(abs(whole[step] - resumed[step]) for step in whole if step >= steps // 2), 0.02)
    check(f"{tag}: last loss - first loss", resumed[steps - 1] - whole[0], 0.0)


def train_growing(args, tag: str, path: str, *flags: str) -> None:
    """base_train along a path of shapes: losses, and no recompilation once a stage is warm."""
    import torch._dynamo

    from scripts import base_train
    torch._dynamo.reset()  # of a run before it
    torch._dynamo.utils.counters.clear()
    train_step = base_train.Pretraining.train_step

    def watched(self) -> None:
        torch._dynamo.config.error_on_recompile = self.step - self.first_step >= 2
        train_step(self)
        torch._dynamo.config.error_on_recompile = False  # a growth may compile

    with mock.patch.object(base_train.Pretraining, "train_step", watched):
        assert base_train.main([*training_flags(args, 12 if args.small else 60), f"--grow-path={path}", f"--model-tag={tag}", "--window-pattern=L", *flags]) == 0
    log = records(tag)
    growths = [record for record in log if record["kind"] == "grow"]
    check(f"{tag}: growths missing", path.count(",") - len(growths), 0)
    for record in growths:
        check(f"{tag}: bits per byte added by {record['label']}", abs(record["loss_after"] - record["loss_before"]), 0.02)
    steps = [record for record in log if record["kind"] == "train"]
    check(f"{tag}: last loss - first loss", steps[-1]["raw_loss"] - steps[0]["raw_loss"], 0.0)
    for start in (0, *(record["step"] for record in growths)):
        tell(f"{tag}: the steps from {start} on take " + ", ".join(f"{record['dt']:.2f}" for record in steps if record["step"] >= start and record["step"] < start + 4) + " s")
    counters = torch._dynamo.utils.counters
    tell(f"{tag}: {counters['stats'].get('unique_graphs', 0)} graphs")
    check(f"{tag}: graph breaks", sum(counters["graph_break"].values()), 0)


def growth(args, device) -> None:
    prepare_data()
    train_growing(args, "grown", "2x64,3x64,3x96" if args.small else "4x256,6x256,6x512", "--grow-at=0.2,0.5")


def layers(args, device) -> None:
    from scripts import base_train
    prepare_data()
    path = "2x64,2x96" if args.small else "4x256,4x512"
    train_growing(args, "ngpt", path, "--grow-at=0.5", "--block=ngpt")
    train_growing(args, "low-rank", path, "--grow-at=0.5", "--warmdown-ratio=0", "--rank=16")
    end, trunk = validations("low-rank")[-1]
    assert base_train.main([f"--branch-from=low-rank@{end}", "--warmdown-steps=4", "--model-tag=branch", f"--device-type={args.device_type}"]) == 0
    check("branch: bits per byte above the end of its trunk", validations("branch")[-1][1] - trunk, 0.05)


def ranks(args, device) -> None:
    import torch
    count = torch.cuda.device_count() if device.type == "cuda" else 1
    prepare_data()
    steps = 8 if args.small else 40
    flags = [*training_flags(args, steps, count), "--depth=2", "--aspect-ratio=32" if args.small else "--aspect-ratio=256", "--window-pattern=L", f"--save-every={steps // 2}",
             "--model-tag=ranks"]

    def run(*more: str) -> None:
        started = time.perf_counter()
        done = subprocess.run([sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={count}", "-m", "scripts.base_train", *flags, *more],
                              cwd=ROOT, capture_output=True, text=True)
        tell(f"torchrun, ranks: {count} {' '.join(more)}: {time.perf_counter() - started:.0f} s")
        if done.returncode:
            print(done.stdout[-2000:], done.stderr[-4000:])
            raise RuntimeError(f"torchrun ended with {done.returncode}")

    run()
    resumed_as_before("ranks", steps, lambda: run("--resume"))


def tuning(args, device) -> None:
    from scripts import base_eval, base_train, chat_eval, chat_rl, chat_sft
    prepare_data()
    where, steps = f"--device-type={args.device_type}", 8 if args.small else 40
    assert base_train.main([*training_flags(args, steps), "--depth=2", "--aspect-ratio=32" if args.small else "--aspect-ratio=256", "--model-tag=tuned"]) == 0
    flags = [where, "--mixture=spelling", f"--num-iterations={2 * steps}", "--max-seq-len=128", "--device-batch-size=4", "--total-batch-size=1024",
             f"--eval-every={steps // 2}", "--eval-tokens=1024", f"--save-every={steps // 2}", "--chatcore-every=-1"]  # two passes a step
    assert chat_sft.main(flags) == 0
    resumed_as_before("tuned", steps, lambda: chat_sft.main([*flags, "--resume"]), "chatsft")
    steps = 14  # beyond the 11th, at which averages of speeds begin
    assert chat_rl.main([where, "--task-name=SpellingBee", f"--num-iterations={steps}", "--device-batch-size=4", "--num-samples=4", "--examples-per-step=2",
                         "--max-new-tokens=16", "--eval-every=7", "--eval-examples=2", "--save-every=-1"]) == 0
    log = records("tuned", "chatrl")
    check("reinforcement learning: steps missing", steps - sum(record["kind"] == "train" for record in log), 0)
    for name, rows in (("snli_train", 64), ("snli_test", 16)):
        lines = [json.dumps(dict(premise=f"A cat sits on {n}.", hypothesis=f"{('A cat', 'A dog', 'It')[n % 3]} sits.", label=("entailment", "contradiction", "neutral")[n % 3])) for n in range(rows)]
        Path(os.environ["NANOCHAT_BASE_DIR"], f"{name}.jsonl").write_text("\n".join(lines), encoding="utf-8")
    assert base_eval.main([where, "--eval=nli-probe,nli-finetune,decode", f"--nli={os.environ['NANOCHAT_BASE_DIR']}", "--finetune-epochs=1"]) == 0
    for source in ("sft", "rl"):
        assert chat_eval.main([where, f"--source={source}", "--task-name=SpellingBee", "--max-problems=4", "--max-new-tokens=16"]) == 0


# -----------------------------------------------------------------------------
# Speed


def train(args, device) -> None:
    from dev import bench_train
    flags = ["--depths=2", "--head-dim=64", "--max-seq-len=64", "--rows=2", "--vocab-size=256", "--rounds=1", "--contestants", "stock-bf16", "ours"] if args.small else \
        ["--depths", str(args.depth), "--head-dim=128", "--max-seq-len=2048", f"--rows={args.rows}", "--vocab-size=32768", "--window-pattern=SSSL", "--rounds=5"]
    bench_args = bench_train.parse_args(flags)
    results = bench_train.bench(bench_args, bench_args.depths[0], wait_for_turn)
    for name, result in results.items():
        memory = ", ".join(f"{key} {value / 2**20:.0f}" for key, value in result["memory"].items())
        tell(f"{name}: ready after {result['ready']:.0f} s; MiB: {memory}")
    print(f"MEMORY {json.dumps(dict(depth=bench_args.depths[0], rows=bench_args.rows, sequence_len=bench_args.max_seq_len, vocab=bench_args.vocab_size, contestants={name: result['memory'] for name, result in results.items()}))}")
    if device.type == "cuda" and not args.small:
        speed = {name: result["tokens_per_second"] for name, result in results.items()}
        for other, most in (("stock-bf16", 1.02), ("ours-layers", 1.02), ("ours-eager", 0.9)):
            check(f"tokens/s of {other} / ours", speed[other] / speed["ours"], most)


def serve(args, device) -> None:
    import torch

    from dev.bench_decode import NO_SPECIAL_TOKENS, random_model
    from nanochat.common import COMPUTE_DTYPE
    from nanochat.engine import Engine
    from nanochat.recipe import gpt_config
    config = gpt_config(2, 64, 64, 128, 256, "SL") if args.small else gpt_config(args.depth, 64, 128, 2048, 32768, "SSSL")
    torch.manual_seed(0)
    model = random_model(config, device)
    with torch.no_grad():
        model.lm_head.weight.normal_(std=0.02)  # its start of almost zero would leave all tokens alike
        for block in model.transformer.h:
            block.attn.c_proj.weight.normal_(std=0.02)
            block.mlp.c_proj.weight.normal_(std=0.02)
    model.cast_for_inference()
    prompt = torch.randint(0, config.vocab_size, (64,), generator=torch.Generator().manual_seed(0)).tolist()
    engine = Engine(model, NO_SPECIAL_TOKENS)
    steps = 16 if args.small else 128
    with torch.inference_mode():
        answer = engine.generate_batch(prompt, 1, steps, temperature=0)[0][0]
        ids = torch.tensor([answer], device=device)
        whole = model(ids)  # without the cache
        cache = engine._new_cache(1, len(answer))
        cache.last_logits_only = False
        stepwise = torch.cat([model(ids[:, :64], kv_cache=cache), *(model(ids[:, i:i + 1], kv_cache=cache) for i in range(64, len(answer)))], dim=1)
    check("logits with the cache against without", error(stepwise, whole), 0.02 if COMPUTE_DTYPE == torch.bfloat16 else 1e-3)

    prepare_data()
    from scripts import base_train
    assert base_train.main([*training_flags(args, 4), "--depth=2", "--aspect-ratio=64", "--model-tag=d2", "--eval-every=-1"]) == 0
    server = subprocess.Popen([sys.executable, "-m", "scripts.chat_web", "--source=base", "--port=0", f"--device-type={args.device_type}"], cwd=ROOT,
                              stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        address = next((line.split(" at ")[1].split()[0] for line in server.stdout if "http://" in line), None)
        if address is None:
            raise RuntimeError(f"the server did not start: {server.stderr.read()[-2000:]}")
        body = json.dumps(dict(model="base-d2", prompt="import os", max_tokens=16, temperature=0)).encode()
        wait_for_turn()
        for turn in ("first", "second"):
            started = time.perf_counter()
            request = urllib.request.Request(f"{address}/v1/completions", data=body, headers={"Content-Type": "application/json"})
            with urllib.request.urlopen(request, timeout=60) as response:
                reply = json.load(response)
            tell(f"{turn} answer of the server after {time.perf_counter() - started:.3f} s: {reply['choices'][0]['text'][:40]!r}")
        check("answers without a token", 1 - min(1, reply["usage"]["completion_tokens"]), 0)
    finally:
        server.send_signal(signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            server.wait(20)
        server.kill()
    for rows in (1, 16):
        columns = engine.generate(prompt, num_samples=rows, max_tokens=steps, temperature=0)
        for _ in range(8):
            next(columns)
        started, count = time.perf_counter(), sum(1 for _ in columns)
        tell(f"d{config.n_layer}, {rows} rows: {rows * count / (time.perf_counter() - started):,.0f} tokens/s")
    if device.type == "cuda":
        tell(f"{torch.cuda.max_memory_allocated() / 2**30:.2f} GiB")


SECTIONS = dict(attention=attention, fp8=fp8, growth=growth, layers=layers, ranks=ranks, tuning=tuning, train=train, serve=serve)


# -----------------------------------------------------------------------------


def run_section(args) -> int:
    """In a process of its own; its exit status says how it went."""
    import torch

    from nanochat.common import compute_cleanup, compute_init
    with tempfile.TemporaryDirectory() as base_dir:
        os.environ["NANOCHAT_BASE_DIR"] = base_dir
        device = torch.device(args.device_type, 0) if args.device_type == "cuda" else torch.device("cpu")
        if args.section in ("attention", "fp8", "serve"):
            compute_init(args.device_type)
        SECTIONS[args.section](args, device)
        compute_cleanup()
    for failure in FAILURES:
        print(f"FAILED: {failure}")
    return 1 if FAILURES else 0


class Section:
    """A section that is running."""

    def __init__(self, name: str, flags: list[str], limit: int, turns: str):
        self.name, self.output, self.started, self.limit = name, tempfile.TemporaryFile("w+"), time.perf_counter(), limit
        self.turn = Path(turns, name)  # a file that is there when it may measure
        env = {**os.environ, "GPU_CHECK_TURN": str(self.turn)}
        self.process = subprocess.Popen([sys.executable, "-u", "-m", "dev.gpu_check", *flags, "--section", name], cwd=ROOT, stdout=self.output,
                                        stderr=subprocess.STDOUT, start_new_session=True, env=env)
        self.seconds = 0.0

    def finished(self) -> bool:
        """Whether it has ended, which at its limit it has to."""
        self.seconds = time.perf_counter() - self.started
        if self.seconds > self.limit:
            self.kill()
        return self.process.poll() is not None

    def kill(self) -> None:
        if self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGKILL)  # it may have started processes itself
            self.process.wait()

    def report(self) -> bool:
        """Prints what it said, all of it if it failed, and the verdict."""
        passed = self.process.returncode == 0
        self.output.seek(0)
        lines = self.output.read().splitlines()
        print(f"=== {self.name}")
        for line in lines[-150:]:
            if not passed or line.startswith(("  ok ", "  BAD ", "  - ", "|", "MFU", "MEMORY")):
                print(line)
        ended = ", stopped at its limit" if self.seconds > self.limit else ""
        print(f"{'PASS' if passed else 'FAIL'} {self.name} ({self.seconds:.0f} s{ended})\n", flush=True)
        return passed


@command
def main(argv=None) -> int:
    parser = ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device-type", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--small", action="store_true", help="tiny models")
    parser.add_argument("--depth", type=positive_int, default=12, help="of the model whose speed is measured")
    parser.add_argument("--rows", type=positive_int, default=16, help="of 2048 tokens, a step of that model")
    parser.add_argument("--limit", type=positive_int, default=480, help="seconds for a section")
    parser.add_argument("--only", choices=SECTIONS, nargs="+", help="these sections")
    parser.add_argument("--section", choices=SECTIONS, help="run as this section's process")
    args = parser.parse_args(argv)
    if args.section:
        return run_section(args)
    import torch
    if args.device_type == "cuda":
        from nanochat.cli import UsageError
        if not torch.cuda.is_available():
            raise UsageError(f"PyTorch {torch.__version__} sees no GPU here; --device-type=cpu --small rehearses without one")
        print(f"{torch.cuda.get_device_name()}, compute capability {'.'.join(map(str, torch.cuda.get_device_capability()))}, PyTorch {torch.__version__}, "
              f"{torch.cuda.get_device_properties(0).total_memory / 2**30:.0f} GiB\n", flush=True)
    flags = [f"--device-type={args.device_type}", f"--depth={args.depth}", f"--rows={args.rows}", *(["--small"] if args.small else [])]
    wanted = [name for name in SECTIONS if name in (args.only or SECTIONS)]
    passed: dict[str, bool] = {}
    started = time.perf_counter()
    running: list[Section] = []
    with tempfile.TemporaryDirectory(prefix="gpu-check-") as turns:
        try:
            for name in wanted:
                running.append(Section(name, flags, args.limit, turns))
            while running:
                time.sleep(0.2)
                for section in [section for section in running if section.finished()]:
                    running.remove(section)
                    passed[section.name] = section.report()
                if running and all(section.name in MEASURING for section in running):
                    running[0].turn.touch()
        finally:  # interrupted: a section that waits for its turn would keep its memory for ever
            for section in running:
                section.kill()
    print(", ".join(f"{name} {'PASS' if good else 'FAIL'}" for name, good in passed.items()), f"({time.perf_counter() - started:.0f} s)")
    return 0 if all(passed.values()) else 1


if __name__ == "__main__":
    sys.exit(main())

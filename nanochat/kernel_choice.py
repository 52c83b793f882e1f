"""Which CPU kernel runs, where several compute the same thing and the fastest one differs from machine to machine.

| kernel | alternatives |
|---|---|
| `attention`: whole context, forward | `torch`: PyTorch's own; `blocked`: blocks of queries by batched matmuls (blocked_attention.py); `fused`: fused_attention.cpp |
| `window`: sliding window, forward | `torch`: PyTorch's own, a band of queries at a time; `blocked`; `fused` |
| `backward`, `long-backward`: of attention, below and from 1,024 positions on | `blocked`, also of windows in the place of `torch`; `torch`; `fused` |
| `decode`: one query against the cache | `torch`: a cache in the compute dtype; `float32`: a float32 one, twice as large |
| `position`: a single one times a matrix | `vector`: PyTorch's matrix-vector product; `matrix`: its matrix product (oneDNN) |

Notable:
* `compute_init` settles them once per process: from NANOCHAT_KERNELS (`attention=torch,decode=float32`), else from what was measured on this
  machine before, else by a stopwatch, in one to two seconds. With several ranks, rank 0 decides for all.
* Kernels round differently, so a run must keep its own: a measurement is kept below NANOCHAT_BASE_DIR under the machine's name (CPU,
  instruction set, torch, threads, dtype), and a checkpoint holds the choices it was trained with, which count when it is resumed on such a machine.
* What is no choice, as it won wherever it was measured: the loss goes in chunks (the logits of all tokens would be the
  largest tensor of a step), and weights are read in the compute dtype. `python -m dev.bench_kernels` puts choices and rules to the test.
"""
import functools
import hashlib
import json
import logging
import os
import platform
import re
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F

from nanochat.cli import UsageError, env_rank
from nanochat.common import COMPUTE_DTYPE, get_base_dir, is_ddp_initialized
from nanochat.distributed import agreed
from nanochat.files import write_text_atomic

# The first alternative is taken unless another one is clearly faster
KERNELS = {"attention": ("torch", "blocked", "fused"), "window": ("torch", "blocked", "fused"), "backward": ("blocked", "torch", "fused"),
           "long-backward": ("torch", "blocked", "fused"), "decode": ("torch", "float32"), "position": ("vector", "matrix")}
CLEARLY = 1.05
LONG = 1024

_settled: dict[str, str] = {}

logger = logging.getLogger(__name__)


def chosen(kernel: str) -> str:
    """The alternative of a kernel that runs in this process, which a compiled graph takes for granted (compiler.py)."""
    if not _settled:
        settle()
    return _settled[kernel]


def chosen_backward(length: int) -> str:
    return chosen("long-backward" if length >= LONG else "backward")


def settle() -> None:
    """Decides for this process, once; on every rank, if there are several. Raises UsageError for a bad NANOCHAT_KERNELS."""
    if _settled:
        return
    forced, source = _forced(), "set by NANOCHAT_KERNELS"
    measured: dict[str, str] = {}
    if forced.keys() != KERNELS.keys():
        if env_rank() == 0 or not is_ddp_initialized():
            measured, source = _remembered(), "measured on this machine before"
            if not measured:
                started = time.perf_counter()
                measured = measure()
                source = f"measured in {time.perf_counter() - started:.1f} s"
                _remember(measured)
        measured = agreed(measured)
    _settled.update(measured | forced)
    _say(source)


def _say(source: str) -> None:
    if env_rank() == 0:
        logger.info(f"Kernels: {describe(_settled)} ({source})")  # not on stdout, which may be a pipe


def describe(choices: dict[str, str]) -> str:
    return ",".join(f"{kernel}={choices[kernel]}" for kernel in KERNELS)


def _forced() -> dict[str, str]:
    """What NANOCHAT_KERNELS says."""
    forced = {}
    for item in filter(None, os.environ.get("NANOCHAT_KERNELS", "").split(",")):
        kernel, _, alternative = item.strip().partition("=")
        if alternative not in KERNELS.get(kernel, ()):
            known = ", ".join(f"{name}={'|'.join(alternatives)}" for name, alternatives in KERNELS.items())
            raise UsageError(f"NANOCHAT_KERNELS: there is no {item.strip()!r}; use any of {known}, separated by commas")
        forced[kernel] = alternative
    return forced


# -----------------------------------------------------------------------------
# What lasts longer than a process


@functools.cache
def machine() -> str:
    """What a measurement holds for, as a file name. OneDNN's and ATen's limits of the instruction set are part of it."""
    try:
        info = Path("/proc/cpuinfo").read_text()
    except OSError:
        info = ""
    # Arm's cores have numbers and lists of features instead of a name
    fields = re.findall(r"^(model name|CPU implementer|CPU part|CPU variant|Features)\s*:\s*(.+)$", info.partition("\n\n")[0], re.MULTILINE)
    cpu = " ".join(hashlib.sha256(value.encode()).hexdigest()[:8] if name == "Features" else value for name, value in fields) or platform.processor() or platform.machine()
    isa = [torch.backends.cpu.get_cpu_capability(), os.environ.get("ONEDNN_MAX_CPU_ISA", "")]
    isa += [name for name in ("amx_tile", "avx512_bf16") if getattr(torch.cpu, f"_is_{name}_supported", lambda: False)()]
    parts = (cpu, *isa, f"torch {torch.__version__}", f"{torch.get_num_threads()} threads", str(COMPUTE_DTYPE).removeprefix("torch."))
    return re.sub(r"[^a-z0-9.]+", "-", " ".join(parts).lower()).strip("-")


def _path() -> Path:
    return Path(get_base_dir(), "kernels", f"{machine()}.json")


def _valid(choices) -> dict[str, str]:
    """`choices` if each kernel has one that exists, else nothing."""
    whole = isinstance(choices, dict) and all(choices.get(kernel) in alternatives for kernel, alternatives in KERNELS.items())
    return {kernel: choices[kernel] for kernel in KERNELS} if whole else {}


def _remembered() -> dict[str, str]:
    """What was measured on this machine before; nothing if the file is absent, damaged or of another version."""
    try:
        kept = json.loads(_path().read_text(encoding="utf-8"))
    except (OSError, ValueError, UsageError):
        return {}
    # what was not among the alternatives then was not measured
    return _valid(kept) if isinstance(kept, dict) and kept.pop("of", None) == _alternatives() else {}


def _alternatives() -> str:
    return " ".join("|".join(alternatives) for alternatives in KERNELS.values())


def _remember(choices: dict[str, str]) -> None:
    try:
        write_text_atomic(_path(), json.dumps(choices | {"of": _alternatives()}, indent=2) + "\n")
    except (OSError, UsageError):  # a folder that cannot be written to: measured again next time
        pass


def state() -> dict | None:
    """For a checkpoint: the choices of this process and what they were made for. None where nothing was settled (on a GPU)."""
    return dict(machine=machine(), choices=_settled.copy()) if _settled else None


def restore(state: dict | None) -> None:
    """Takes up the choices of a checkpoint, if they were made on such a machine; NANOCHAT_KERNELS still has the last word."""
    if not _settled or not isinstance(state, dict) or state.get("machine") != machine():
        return
    choices = _valid(state.get("choices")) and _valid(state["choices"]) | _forced()
    if choices and choices != _settled:
        _settled.update(choices)
        _say("as in the checkpoint")


# -----------------------------------------------------------------------------
# The stopwatch


def in_turns(works: dict[str, Callable], rounds: int = 30, at_most: float = 0.3) -> dict[str, list[float]]:
    """Seconds of each work, once a round, after one to warm up; fewer rounds (3 or more) if they take longer than `at_most` seconds in all.

    They take turns, so that a machine whose speed drifts is unfair to nobody. On one thread its CPU time counts: what else runs on the machine
    does not matter then. With several, each operation waits for the slowest.
    """
    clock = time.thread_time if torch.get_num_threads() == 1 else time.perf_counter
    times: dict[str, list[float]] = {name: [] for name in works}
    for round in range(1 + rounds):
        for name, work in works.items():
            started = clock()
            work()
            times[name].append(clock() - started)
        if round >= 3 and sum(map(sum, times.values())) > at_most:
            break
    return {name: taken[1:] for name, taken in times.items()}


def attention_trials(rows: int, length: int, heads: int, dim: int, window: int) -> tuple[dict[str, Callable], dict[str, Callable]]:
    """By alternative: the forward pass without gradients, and the backward pass alone."""
    from nanochat.blocked_attention import band_attention
    from nanochat.fused_attention import has_fused
    q, k, v, upstream = (torch.randn(rows, length, heads, dim).to(COMPUTE_DTYPE).transpose(1, 2) for _ in range(4))  # as the model lays them out
    fused = ("fused",) if COMPUTE_DTYPE == torch.bfloat16 and has_fused() else ()
    forward: dict[str, Callable] = {name: functools.partial(band_attention, q, k, v, window, 0, name) for name in ("torch", "blocked", *fused)}
    inputs = q, k, v = tuple(x.detach().requires_grad_() for x in (q, k, v))
    outputs = {name: band_attention(q, k, v, window, 0, "torch", name) for name in (("torch", "blocked") if window < 0 else ("blocked",)) + fused}
    backward: dict[str, Callable] = {name: functools.partial(torch.autograd.grad, y, inputs, upstream, retain_graph=True) for name, y in outputs.items()}
    return forward, backward


def decode_trials(rows: int, length: int, heads: int, dim: int) -> dict[str, Callable]:
    """By alternative: one query per row and head against `length` keys."""
    from nanochat.flash_attention import attend_to_all
    q, k, v = (torch.randn(rows, n, heads, dim).to(COMPUTE_DTYPE).transpose(1, 2) for n in (1, length, length))
    wide = k.float(), v.float()
    return {"torch": lambda: attend_to_all(q, k, v), "float32": lambda: attend_to_all(q, *wide)}


def position_trials(width: int, matrices: int = 8) -> dict[str, Callable]:
    """By alternative: one position through different matrices, as in a model, which finds none of them in the cache."""
    x = torch.randn(width).to(COMPUTE_DTYPE)
    weights = torch.randn(matrices, 4 * width, width).to(COMPUTE_DTYPE)
    return {"vector": lambda: [torch.mv(weight, x) for weight in weights], "matrix": lambda: [F.linear(x[None], weight) for weight in weights]}


def measure() -> dict[str, str]:
    """The faster alternative of each kernel on this machine, at sizes of a small model, on one thread."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with torch.random.fork_rng(devices=[]), torch.inference_mode(False), torch.enable_grad():  # wherever it is first asked for
            attention, backward = attention_trials(rows=4, length=512, heads=4, dim=64, window=-1)
            window, _ = attention_trials(rows=2, length=1024, heads=4, dim=64, window=256)
            _, long_backward = attention_trials(rows=1, length=LONG, heads=4, dim=64, window=-1)
            trials = {"attention": attention, "window": window, "backward": backward, "long-backward": long_backward,
                      "decode": decode_trials(4, 512, 8, 64), "position": position_trials(512)}
            return {kernel: _faster(kernel, in_turns(trials[kernel])) for kernel in KERNELS}
    finally:
        torch.set_num_threads(threads)


def _faster(kernel: str, times: dict[str, list[float]]) -> str:
    """By the fastest round of each, since what disturbs a round only slows it."""
    seconds = {name: min(taken) for name, taken in times.items()}
    default = KERNELS[kernel][0]
    best = min(seconds, key=seconds.__getitem__)
    return best if seconds[best] * CLEARLY < seconds[default] else default

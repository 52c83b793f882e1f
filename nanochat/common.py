"""What every module needs: compute dtype, base directory, logging, devices and the process group, peak speeds."""
import contextlib
import functools
import http.client
import logging
import os
import random
import re
import shutil
import socket
import sys
import time
import urllib.request
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
import torch.distributed as dist

from nanochat.cli import UsageError, env_rank
from nanochat.files import atomic_path, locked
from nanochat.resources import keep_freed_memory, limit_threads, usable_cpus

# -----------------------------------------------------------------------------
# Compute dtype: matmuls and activations run in it, master weights stay float32.


def _cpu_has_native_bf16() -> bool:
    """True where bf16 dot products are instructions (AVX512-BF16 or AMX); emulated bf16 is slower than fp32."""
    checks = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
    return any(getattr(torch.cpu, name, lambda: False)() for name in checks)


def _resolve_compute_dtype() -> tuple[torch.dtype, str]:
    named = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
    if wanted := os.environ.get("NANOCHAT_DTYPE"):
        if wanted not in named:
            raise UsageError(f"NANOCHAT_DTYPE={wanted} is unknown; use one of {', '.join(named)}")
        return named[wanted], "set by NANOCHAT_DTYPE"
    if torch.cuda.is_available():
        major, minor = torch.cuda.get_device_capability()
        if major >= 8:
            return torch.bfloat16, f"CUDA compute capability {major}.{minor} has bf16 tensor cores"
        return torch.float32, f"CUDA compute capability {major}.{minor} is below 8.0: no bf16 tensor cores"
    if torch.backends.mps.is_available():
        return torch.float32, "MPS"
    if _cpu_has_native_bf16():
        return torch.bfloat16, "this CPU has native bf16 instructions (AVX512-BF16 or AMX)"
    return torch.float32, "this CPU has no native bf16 instructions"


try:
    COMPUTE_DTYPE, COMPUTE_DTYPE_REASON = _resolve_compute_dtype()
except UsageError as error:  # at import, where no script can turn it into a line
    print(f"error: {error}", file=sys.stderr)
    raise SystemExit(2) from None

# -----------------------------------------------------------------------------
# Logging


class ColoredFormatter(logging.Formatter):
    """Colours the level name; in INFO lines also makes sizes bold and shard numbers stand out."""

    COLORS = {"DEBUG": 36, "INFO": 32, "WARNING": 33, "ERROR": 31, "CRITICAL": 35}

    def format(self, record: logging.LogRecord) -> str:
        level = record.levelname
        painted = logging.makeLogRecord(record.__dict__)
        if level in self.COLORS:
            painted.levelname = f"\033[{self.COLORS[level]}m\033[1m{level}\033[0m"
        line = super().format(painted)
        if level == "INFO":
            line = re.sub(r"(\d+\.?\d*\s*(?:GB|MB|%|docs))", "\033[1m\\1\033[0m", line)
            line = re.sub(r"(Shard \d+)", "\033[32m\033[1m\\1\033[0m", line)
        return line


def setup_default_logging() -> None:
    handler = logging.StreamHandler()
    formatter = ColoredFormatter if handler.stream and handler.stream.isatty() else logging.Formatter  # no control codes in a file
    handler.setFormatter(formatter("%(asctime)s - %(name)s - %(levelname)s - %(message)s"))
    logging.basicConfig(level=logging.INFO, handlers=[handler])


setup_default_logging()
logger = logging.getLogger(__name__)


def print0(s: Any = "", **kwargs: Any) -> None:
    """`print` on rank 0 only."""
    if env_rank() == 0:
        _end_live_line()
        print(s, **kwargs)


LASTING_SECONDS = 30
_live: dict[str, Any] = {"shown": False, "lasted": 0.0}


def live_line(line: str) -> None:
    """Shows a line that the next one takes the place of, on rank 0; one every `LASTING_SECONDS` stays. In a pipe or file all of them do."""
    if env_rank() != 0:
        return
    if not sys.stdout.isatty():
        print(line, flush=True)
        return
    _end_live_line()
    now = time.monotonic()
    if now - _live["lasted"] >= LASTING_SECONDS:
        _live["lasted"] = now
        print(line, flush=True)
    else:
        print(line[:shutil.get_terminal_size().columns - 1], end="\r", flush=True)
        _live["shown"] = True


def _end_live_line() -> None:
    if _live["shown"]:
        _live["shown"] = False
        print("\033[K", end="")


PROGRESS_SECONDS = 30


def telling(label: str) -> Callable[[float], None]:
    """A function that is told the fraction that is done, and says from time to time how long the rest will take."""
    started = shown = time.perf_counter()

    def tell(fraction: float) -> None:
        nonlocal shown
        now = time.perf_counter()
        if fraction and now - shown > PROGRESS_SECONDS:
            shown = now
            print0(f"{label}: {fraction:.0%}, eta {(now - started) * (1 - fraction) / fraction / 60:.1f}m", flush=True)
    return tell


def with_progress(batches: Iterable, steps: int, label: str) -> Iterator:
    """The same batches; says from time to time how many of `steps` are done."""
    tell = telling(label)
    for done, batch in enumerate(batches):
        tell(done / steps)
        yield batch


def print_banner() -> None:
    print0(r"""
                          _           _
  _ __   __ _ _ __   ___ | |__   __ _| |_
 | '_ \ / _` | '_ \ / _ \| '_ \ / _` | __|   \|/
 | | | | (_| | | | | (_) | | | | (_| | |_    \|/
 |_| |_|\__,_|_| |_|\___/|_| |_|\__,_|\__|    |   with growth hooks
""")


# -----------------------------------------------------------------------------
# Files


def get_base_dir() -> str:
    """Root of all artifacts: `NANOCHAT_BASE_DIR`, else `~/.cache/nanochat`. Created if missing.

    Raises UsageError where it cannot be created.
    """
    base_dir = os.path.expanduser(os.environ.get("NANOCHAT_BASE_DIR") or "~/.cache/nanochat")
    if base_dir.startswith("~"):
        raise UsageError(f"there is no home directory for {base_dir}; set NANOCHAT_BASE_DIR to a directory you can write to")
    try:
        base_dir.encode()
        os.makedirs(base_dir, exist_ok=True)
    except UnicodeEncodeError:
        raise UsageError(f"the base directory {os.fsencode(base_dir)!r} is no UTF-8, which pyarrow needs; set NANOCHAT_BASE_DIR to another") from None
    except OSError as error:
        raise UsageError(f"cannot create the base directory {base_dir} ({error.strerror}); "
                         "set NANOCHAT_BASE_DIR to a directory you can write to") from error
    return base_dir


def download_file_with_lock(url: str, filename: str, postprocess_fn: Callable[[str], Any] | None = None) -> str:
    """Fetches `url` once into `base_dir/filename`, however many ranks ask for it; returns the path."""
    path = os.path.join(get_base_dir(), filename)
    if os.path.exists(path):
        return path
    with locked(path):
        if not os.path.exists(path):
            try:
                with urllib.request.urlopen(url, timeout=60) as response:
                    content = response.read()
            except (OSError, http.client.HTTPException) as error:  # the latter where it ends too soon
                raise UsageError(f"cannot download {url} ({error}); check the network, or put the file at {path}") from error
            with atomic_path(path) as temporary:
                temporary.write_bytes(content)
            if postprocess_fn is not None:
                postprocess_fn(path)
    return path


@functools.cache
def hub_unreachable() -> bool:
    """Whether nothing answers at huggingface.co, found in seconds where the hub's clients try for half a minute.

    False where that says nothing: behind a proxy, with a mirror, or in the hub's own offline mode.
    """
    if urllib.request.getproxies() or os.environ.get("HF_ENDPOINT") or os.environ.get("HF_HUB_OFFLINE"):
        return False
    try:
        addresses = {family: address for family, *_, address in socket.getaddrinfo("huggingface.co", 443, type=socket.SOCK_STREAM)}
    except OSError:
        return True
    for address in addresses.values():  # one of IPv4 and one of IPv6
        with contextlib.suppress(OSError):
            socket.create_connection(address[:2], timeout=5).close()  # type: ignore[arg-type]
            return False
    return True


# -----------------------------------------------------------------------------
# Devices and ranks


def is_ddp_requested() -> bool:
    """True under torchrun, which sets all three variables."""
    return all(name in os.environ for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE"))


def is_ddp_initialized() -> bool:
    return dist.is_available() and dist.is_initialized()


def get_dist_info() -> tuple[bool, int, int, int]:
    """(under torchrun, rank, local rank, world size)."""
    if is_ddp_requested():
        values = [os.environ[name] for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE")]
        if not all(value.isdecimal() for value in values):
            raise UsageError(f"RANK, LOCAL_RANK and WORLD_SIZE are {', '.join(map(repr, values))} and no numbers; unset them, or start this by torchrun")
        rank, local_rank, world_size = map(int, values)
        return True, rank, local_rank, world_size
    return False, 0, 0, 1


def why_no_cuda() -> str:
    """Why PyTorch cannot use an NVIDIA GPU that is there, empty if there is none or no build for one."""
    if not torch.version.cuda or torch.cuda.is_available():
        return ""
    try:
        torch.cuda.init()
    except (RuntimeError, AssertionError) as error:
        if "too old" in (reason := str(error).splitlines()[0]):
            return reason.split(". ")[0]
    return ""


def autodetect_device_type() -> str:
    """Raises UsageError where a GPU would be left unused because its driver is too old."""
    if reason := why_no_cuda():
        raise UsageError(f"{reason}; update it, install a PyTorch for it (this one is for CUDA {torch.version.cuda}), or give --device-type=cpu")
    print0(f"Autodetected device type: {default_device()}")
    return default_device()


def default_device() -> str:
    return "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"


DEVICE_TYPES: dict[str, Callable[[], bool]] = {"cuda": torch.cuda.is_available, "mps": torch.backends.mps.is_available, "cpu": lambda: True}  # is one here?


def check_device_type(device_type: str) -> None:
    """Raises UsageError for none of those, whether one is here or not."""
    if device_type not in DEVICE_TYPES:
        raise UsageError(f"unknown device type {device_type!r}: use cuda, mps or cpu, or leave it out to autodetect")


def compute_init(device_type: str = "cuda") -> tuple[bool, int, int, int, torch.device]:
    """Seeds, sets precision and joins the process group: NCCL on CUDA, gloo elsewhere.

    Returns (ddp, rank, local_rank, world_size, device). Raises UsageError for an unknown or absent device type.
    """
    check_device_type(device_type)
    if not DEVICE_TYPES[device_type]():
        reason = why_no_cuda() if device_type == "cuda" else ""
        raise UsageError(f"PyTorch {torch.__version__} sees no {device_type} device here{f' ({reason})' if reason else ''}: "
                         "leave out --device-type to autodetect")
    ddp, rank, local_rank, world_size = get_dist_info()
    random.seed(42)
    torch.manual_seed(42)
    if device_type == "cuda":
        torch.cuda.manual_seed(42)
        torch.set_float32_matmul_precision("high")  # TF32 for what is left in float32
        if local_rank >= torch.cuda.device_count():
            raise UsageError(f"local rank {local_rank} has no GPU: this machine has {torch.cuda.device_count()}; "
                             f"use torchrun --nproc_per_node={torch.cuda.device_count()}")
        device = torch.device("cuda", local_rank)
        torch.cuda.set_device(device)
    else:
        device = torch.device(device_type)
    if device_type == "cpu":
        keep_freed_memory()
        limit_threads()
    if ddp and not is_ddp_initialized():
        if device_type == "cuda":
            dist.init_process_group("nccl", device_id=device)
        else:
            dist.init_process_group("gloo")
        dist.barrier()
    if rank == 0:
        logger.info(f"Distributed world size: {world_size}")
        if device_type == "cpu":
            said_by = " (OMP_NUM_THREADS)" if "OMP_NUM_THREADS" in os.environ else ""
            logger.info(f"CPU threads: {torch.get_num_threads()}{said_by}, {usable_cpus()} CPUs to use")
    if device_type == "cpu":
        from nanochat import kernel_choice  # which needs this module
        kernel_choice.settle()
    return ddp, rank, local_rank, world_size, device


def compute_cleanup() -> None:
    """Leaves the process group. Not while an exception passes: the other ranks would crash before this one has said why."""
    if is_ddp_initialized() and sys.exc_info()[0] is None:
        dist.destroy_process_group()


class DummyWandb:
    """Takes the place of a wandb run when there is none."""

    def log(self, *args: Any, **kwargs: Any) -> None:
        pass

    def finish(self) -> None:
        pass


# -----------------------------------------------------------------------------
# Peak speeds by device name. Dense bf16 FLOP/s and memory bytes/s from the vendors' data sheets; the first row
# all of whose words occur in the lower-cased name counts.

_PEAK_FLOPS: list[tuple[tuple[str, ...], float]] = [
    (("gb200",), 2.5e15), (("grace blackwell",), 2.5e15), (("b200",), 2.25e15), (("b100",), 1.8e15),
    (("h200", "nvl"), 836e12), (("h200", "pcie"), 836e12), (("h200",), 989e12),
    (("h100", "nvl"), 835e12), (("h100", "pcie"), 756e12), (("h100",), 989e12),
    (("h800", "nvl"), 989e12), (("h800",), 756e12), (("a100",), 312e12), (("a800",), 312e12),
    (("a40",), 149.7e12), (("a30",), 165e12),
    (("l40s",), 362e12), (("l40-s",), 362e12), (("l40 s",), 362e12), (("l40",), 181.05e12), (("l4",), 121e12),
    (("mi355",), 2.5e15), (("mi325",), 1.3074e15), (("mi300x",), 1.3074e15), (("mi300a",), 980.6e12),
    (("mi250x",), 383e12), (("mi250",), 362.1e12),
    (("5090",), 209.5e12), (("4090",), 165.2e12), (("3090",), 71e12),
    (("4080",), 97.5e12), (("4060 ti",), 44.1e12), (("4060",), 30.2e12), (("3060 ti",), 32.4e12), (("3060",), 25.5e12),
]
_PEAK_BANDWIDTH: list[tuple[tuple[str, ...], float]] = [
    (("gb200",), 8e12), (("grace blackwell",), 8e12), (("b200",), 8e12), (("b100",), 8e12), (("h200",), 4.8e12),
    (("h100", "nvl"), 3.9e12), (("h100", "pcie"), 2e12), (("h100",), 3.35e12),
    (("h800", "pcie"), 2e12), (("h800",), 3.35e12), (("a100",), 2e12), (("a800",), 2e12),
    (("a40",), 696e9), (("a30",), 933e9),
    (("l40s",), 864e9), (("l40-s",), 864e9), (("l40 s",), 864e9), (("l40",), 864e9), (("l4",), 300e9),
    (("mi355",), 8e12), (("mi325",), 6e12), (("mi300x",), 5.3e12), (("mi300a",), 5.3e12),
    (("mi250x",), 3.28e12), (("mi250",), 3.28e12),
    (("5090",), 1.79e12), (("4090",), 1.01e12), (("3090",), 936e9),
    (("4080",), 717e9), (("4060 ti",), 288e9), (("4060",), 272e9), (("3060 ti",), 448e9), (("3060",), 360e9),
]


def _lookup(table: list[tuple[tuple[str, ...], float]], device_name: str, what: str) -> float:
    name = device_name.lower()
    for words, value in table:
        # "a40" must not match "A4000", a different card: a word that ends in a digit ends there
        if all(re.search(re.escape(word) + (r"(?!\d)" if word[-1].isdigit() else ""), name) for word in words):
            return value
    if "data center gpu max 1550" in name and what == "FLOP/s":
        return 512 * torch.xpu.get_device_properties(0).max_compute_units * 1300e6
    logger.warning(f"Peak {what} of {device_name!r} unknown: utilisation will show as 0")
    return float("inf")


def get_peak_flops(device_name: str) -> float:
    """Dense bf16 FLOP/s of a GPU by its name; inf (with a warning) where unknown."""
    return _lookup(_PEAK_FLOPS, device_name, "FLOP/s")


def get_peak_bandwidth(device_name: str) -> float:
    """Memory bandwidth in bytes/s of a GPU by its name; inf (with a warning) where unknown."""
    return _lookup(_PEAK_BANDWIDTH, device_name, "bandwidth")

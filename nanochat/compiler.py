"""Where torch.compile can run, and where it pays.

* CUDA: the whole model is one graph. Layers compiled one by one are 11 % slower on an H100, where a small model waits for its CPU
  (d12, 16 rows; dev/LOG.md), so each growth compiles anew: half a minute for d12.
* CPU: each block is compiled (all layers share one or two graphs, so the wait does not grow with depth); the kernels that
  PyTorch has no fast CPU version of (attention, loss) are written by hand, partly in C++, and stay outside.
* No compiler, or one that cannot compile a function of one line, no Triton, MPS, or TORCHDYNAMO_DISABLE=1: eager, with one line that says so.
* A base training on a CPU that would be over by the time it is compiled: eager too, by one rule (`decide`). TORCHDYNAMO_DISABLE=0 compiles it all the same.
* What is compiled for a CPU is kept below NANOCHAT_BASE_DIR, for the next run on such a machine (TORCHINDUCTOR_CACHE_DIR, if set, is where).
* Nothing turns eager behind one's back: a function that needs more than `MOST_GRAPHS` graphs is an error.
"""
import ctypes
import functools
import logging
import os
import re
import shutil
import struct
import sys
import sysconfig
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout
from torch import nn

from nanochat.cli import UsageError
from nanochat.common import COMPUTE_DTYPE, get_base_dir, print0
from nanochat.distributed import agreed
from nanochat.files import write_text_atomic
from nanochat.kernel_choice import chosen, machine


def _without_a_bad_cache() -> str:
    """PyTorch's compiler cannot even be imported with a cache folder that cannot be made: takes it out of the environment. Returns what was wrong."""
    if not (folder := os.environ.get("TORCHINDUCTOR_CACHE_DIR")):
        return ""
    try:
        os.makedirs(folder, exist_ok=True)
        return ""
    except OSError as error:
        del os.environ["TORCHINDUCTOR_CACHE_DIR"]
        return f"no folder can be made at TORCHINDUCTOR_CACHE_DIR={folder} ({error.strerror})"


_BAD_CACHE = _without_a_bad_cache()

logger = logging.getLogger(__name__)

# Of one function. A model has two graphs in each stage of growth, of training and of evaluation, and so has a block for each shape of a layer: 200 for
# five stages of 20 layers whose ranks all differ. PyTorch's own limit is 8, beyond which it runs the function eagerly, with a warning at most.
MOST_GRAPHS = 1024
_before: list[Callable[[], Any]] = [lambda: torch.compiler.assume_constant_result(chosen)]


def before_compiling(action: Callable[[], Any]) -> Callable[[], Any]:
    """Has `action` done before the first compilation of this process: PyTorch's compiler, which it may import, takes longer to import than all else together."""
    if _compiler.cache_info().currsize:
        action()
    else:
        _before.append(action)
    return action


@functools.cache
def _compiler() -> Any:
    import torch._dynamo
    for action in _before:
        action()
    return torch._dynamo.config


def compiled(fn: Any, **options: Any) -> Any:
    """`torch.compile` with our settings, which PyTorch (2.13) keeps for the thread that sets them; another thread that compiles `fn` has PyTorch's own."""
    config = _compiler()
    config.recompile_limit = config.accumulated_recompile_limit = MOST_GRAPHS
    config.fail_on_recompile_limit_hit = True
    return torch.compile(fn, **options)


# The rule for short trainings on a CPU. Seconds of compiling with an empty cache on two cores, the share of an eager step that it saves, and a training's
# share of the speed of a plain matrix product (small models, dev/LOG.md)
COMPILING = 30.0
SAVED = 0.4
SHARE_OF_MATMUL = 0.2

_decided = ""  # why this process does not compile although it could
_settled = ""  # the kind of device that `decide` was asked about


def why_not_compile(device_type: str) -> str:
    """Why torch.compile is not used on this kind of device; empty if it is. The first call may take seconds: it compiles something."""
    return _decided or _why_not(device_type)


@functools.cache
def _why_not(device_type: str) -> str:
    if os.environ.get("TORCHDYNAMO_DISABLE", "0") not in ("", "0"):
        return "TORCHDYNAMO_DISABLE is set"
    if device_type not in ("cpu", "cuda"):
        return f"torch.compile is not reliable on {device_type}"
    if device_type == "cpu" and not _BAD_CACHE:
        _keep_what_is_compiled()
    return _BAD_CACHE or _missing(device_type) or _failure(device_type)


def decide(device_type: str, flops: float, before: bool | None = None) -> None:
    """Settles for this process, and on all ranks alike, whether a training of so many FLOPs on this device is compiled.

    before: what the run that is continued did, since compiled code rounds differently. TORCHDYNAMO_DISABLE, if set, has the last word.
    """
    global _decided, _settled
    _decided, _settled = "", device_type
    if device_type != "cpu" or os.environ.get("TORCHDYNAMO_DISABLE"):
        return
    if before is None:
        seconds = agreed(expected_seconds(flops))
        _decided = "" if seconds * SAVED > COMPILING else f"in a run of about {seconds:.0f} s compiling takes longer than it saves (TORCHDYNAMO_DISABLE=0 compiles all the same)"
    elif not before:
        _decided = "this run began so (TORCHDYNAMO_DISABLE=0 compiles all the same)"


def expected_seconds(flops: float) -> float:
    """Of an eager training on this CPU, by the best of a few matrix products of 2 GFLOP or less."""
    n = 1024 if COMPUTE_DTYPE == torch.bfloat16 else 512
    a = torch.ones(n, n, dtype=COMPUTE_DTYPE)
    seconds = []
    for _ in range(4):  # the first one warms up
        start = time.perf_counter()
        a @ a
        seconds.append(time.perf_counter() - start)
    return flops / (2 * n ** 3 / min(seconds)) / SHARE_OF_MATMUL


def state() -> bool | None:
    """For a checkpoint: whether this training is compiled, None if that was not decided."""
    return not why_not_compile(_settled) if _settled else None


# -----------------------------------------------------------------------------
# What is kept between runs


def _keep_what_is_compiled() -> None:
    """PyTorch's own place is a folder of temporary files. Machines have one each: ATen's instruction set is part of its name but not of PyTorch's
    keys, and code for other registers crashes or errs."""
    from torch._inductor.runtime.cache_dir_utils import default_cache_dir
    if os.environ.get("TORCHINDUCTOR_CACHE_DIR", "") in ("", default_cache_dir()):  # PyTorch puts its own place there
        try:
            folder = Path(get_base_dir(), "compiled", machine())
            folder.mkdir(parents=True, exist_ok=True)
        except (OSError, UsageError):  # where nothing can be written there is still PyTorch's place
            return
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(folder)
    remove_truncated(Path(os.environ["TORCHINDUCTOR_CACHE_DIR"]))


def remove_truncated(folder: Path) -> None:
    """A compilation that was killed leaves the beginning of a library, which PyTorch would load for ever after ("file too short")."""
    for library in folder.glob("*/*.so"):
        if _is_whole(library):
            continue
        try:  # PyTorch's own lock: another process may be writing it now
            with FileLock(folder / "locks" / f"{library.name.partition('.')[0]}.lock", timeout=0):
                library.unlink(missing_ok=True)
            print0(f"Compiled anew: {library} is only the beginning of a file")
        except (NotImplementedError, OSError, Timeout):  # no locks there
            pass


def _is_whole(library: Path) -> bool:
    """Whether a 64-bit ELF file reaches to its end, where the table of its sections is; other formats are not looked into."""
    try:
        with open(library, "rb") as file:
            header = file.read(64)
        if header[:5] != b"\x7fELF\2":
            return len(header) == 64
        order = "<" if header[5] == 1 else ">"
        table, = struct.unpack_from(order + "Q", header, 40)
        entry, count = struct.unpack_from(order + "HH", header, 58)
        return 0 < table + entry * count <= library.stat().st_size
    except (OSError, struct.error, IndexError):
        return False


# -----------------------------------------------------------------------------
# Can it?


def _missing(device_type: str) -> str:
    """What torch.compile needs and does not find; Triton too builds a small C extension when it starts."""
    if device_type == "cuda":
        from torch.utils._triton import has_triton
        if not has_triton():
            return "no working Triton" + (" (for Windows: pip install triton-windows)" if sys.platform == "win32" else "")
        if sys.platform != "win32" and not (os.environ.get("CC") or any(map(shutil.which, ("cc", "gcc", "clang")))):
            return "no C compiler, which Triton needs (on Debian and Ubuntu: apt install gcc)"
    else:
        try:
            from torch._inductor.cpp_builder import get_cpp_compiler
            get_cpp_compiler()
        except Exception as error:
            return f"no C++ compiler ({str(error).splitlines()[0][:80]})"
    if sys.platform != "win32" and not os.path.exists(os.path.join(sysconfig.get_path("include"), "Python.h")):
        return "no Python headers (on Debian and Ubuntu: apt install python3-dev)"
    return ""


def _failure(device_type: str) -> str:
    """What goes wrong when a function of one line is compiled: a compiler that is there may still be unusable."""
    try:
        from torch._inductor.runtime.cache_dir_utils import cache_dir
        with tempfile.TemporaryFile(dir=cache_dir()):  # what was compiled in an earlier run would be found even if nothing can be written now
            pass
        if device_type == "cuda":
            _compile_a_line(torch.device("cuda", torch.cuda.current_device()))
        else:
            _try_on_cpu(Path(cache_dir(), "works"))
    except Exception as error:
        lines = [line.strip() for line in f"{type(error).__name__}: {error}".splitlines() if line.strip()]
        told = next((line for line in lines if re.search(r"\berror: ", line)), lines[0])
        return f"the compiler is there, but a test failed ({told[:160]})"
    return ""


def _compile_a_line(device: torch.device) -> None:
    compiled(lambda x: (2 * x).sin(), dynamic=False)(torch.ones(8, device=device))


def _try_on_cpu(proof: Path) -> None:
    """Raises what the compiler raises.

    PyTorch compiles ten files to learn whether the compiler knows the processor's instruction sets, and loads each in a process of its own, in every run.
    Here that is granted, and asked only if our line does not compile then. The file `proof` says what was compiled by this very compiler: the next run
    needs no trial.
    """
    import torch._inductor.config as config
    from torch._inductor.cpp_builder import get_cpp_compiler
    path = shutil.which(get_cpp_compiler()) or get_cpp_compiler()
    compiler = f"{path} {os.stat(path).st_size} {os.stat(path).st_mtime_ns}"
    tried = proof.read_text() if proof.is_file() else ""
    ours = config.cpp.vec_isa_ok is None  # else TORCHINDUCTOR_VEC_ISA_OK is set
    if ours and tried != f"{compiler} asked":
        config.cpp.vec_isa_ok = True
    if tried in (f"{compiler} granted", f"{compiler} asked"):
        return
    try:
        _compile_a_line(torch.device("cpu"))
    except Exception:
        if not ours:
            raise
        config.cpp.vec_isa_ok = None
        torch._dynamo.reset()
        _compile_a_line(torch.device("cpu"))
    write_text_atomic(proof, f"{compiler} {'granted' if config.cpp.vec_isa_ok else 'asked'}")


def jit(*device_types: str, dynamic: bool = False):
    """Decorator of a function of tensors: compiled on its first call on one of these devices, elsewhere run as it is.

    dynamic: one graph for all sizes, instead of one for each.
    """
    def decorate(fn):
        @functools.cache
        def fast():
            return compiled(fn, dynamic=dynamic)

        @functools.wraps(fn)
        def call(tensor, *args, **kwargs):
            device_type = tensor.device.type
            if device_type not in device_types or torch.compiler.is_compiling() or why_not_compile(device_type):
                return fn(tensor, *args, **kwargs)
            return fast()(tensor, *args, **kwargs)
        return call
    return decorate


@functools.cache
def native(path: Path) -> ctypes.CDLL | None:
    """The functions of a C++ file, compiled for this CPU on the first call on a machine (3 to 10 s) and kept in PyTorch's cache; None without a compiler.

    TORCHDYNAMO_DISABLE does not count here: nothing is traced.
    """
    if _BAD_CACHE or _missing("cpu"):
        return None
    try:
        from torch._inductor.codecache import CppCodeCache
        source = "".join(part.read_text(encoding="utf-8") for part in (path.with_name("vector.h"), path))  # one text, so that the cache knows all of it
        # PyTorch writes vectors itself and has both off
        return CppCodeCache.load(source, device_type="cpu", extra_flags=("-ftree-loop-vectorize", "-ffp-contract=fast"))
    except Exception as error:
        logger.warning(f"{path.name} cannot be compiled, slower kernels serve: {str(error).strip().splitlines()[0][:160]}")
        return None


class CompiledLayers:
    """Calls a model with its layers compiled one at a time; the model itself stays eager for sampling and odd shapes."""

    def __init__(self, model: Any, **options):
        self.model = model
        self.eager_layer: Any = model.run_layer
        self.compiled_layer: Any = compiled(self.eager_layer, dynamic=False, **options)

    def __call__(self, *args, **kwargs):
        self.model.run_layer = self.compiled_layer
        try:
            return self.model(*args, **kwargs)
        finally:
            self.model.run_layer = self.eager_layer

    def get_device(self) -> torch.device:
        return self.model.get_device()


def compile_model(model: nn.Module, device_type: str) -> Any:
    """What to call in training and evaluation instead of `model`, which keeps the parameters and stays eager itself."""
    if reason := why_not_compile(device_type):
        print0(f"Running eagerly, without torch.compile: {reason}")
        return model
    return compiled(model, dynamic=False) if device_type == "cuda" else CompiledLayers(model)

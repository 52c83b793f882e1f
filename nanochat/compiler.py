"""Where torch.compile can run, and where it pays.

* CUDA: the whole model is one graph. Layers compiled one by one are 11 % slower on an H100, where a small model waits for its CPU
  (d12, 16 rows; dev/LOG.md), so each growth compiles anew: half a minute for d12.
* CPU: each block is compiled (all layers share one or two graphs, so the wait does not grow with depth); the kernels that
  PyTorch has no fast CPU version of (attention, loss) are written by hand, partly in C++, and stay outside.
* No compiler, or one that cannot compile a function of one line, no Triton, MPS, or TORCHDYNAMO_DISABLE=1: eager, with one line that says so.
* Nothing turns eager behind one's back: a function that needs more than `MOST_GRAPHS` graphs is an error.
"""
import ctypes
import functools
import logging
import os
import re
import shutil
import sys
import sysconfig
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import nn

from nanochat.common import print0


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
import torch._dynamo  # noqa: E402

logger = logging.getLogger(__name__)

# Of one function. A model has two graphs in each stage of growth, of training and of evaluation, and so has a block for each shape of a layer: 200 for
# five stages of 20 layers whose ranks all differ. PyTorch's own limit is 8, beyond which it runs the function eagerly, with a warning at most.
MOST_GRAPHS = 1024
torch._dynamo.config.recompile_limit = MOST_GRAPHS  # type: ignore[assignment]
torch._dynamo.config.accumulated_recompile_limit = MOST_GRAPHS  # type: ignore[assignment]
torch._dynamo.config.fail_on_recompile_limit_hit = True  # type: ignore[assignment]


@functools.cache
def why_not_compile(device_type: str) -> str:
    """Why torch.compile cannot be used on this kind of device; empty if it can. The first call takes seconds: it compiles something."""
    if os.environ.get("TORCHDYNAMO_DISABLE", "0") not in ("", "0"):
        return "TORCHDYNAMO_DISABLE is set"
    if device_type not in ("cpu", "cuda"):
        return f"torch.compile is not reliable on {device_type}"
    return _BAD_CACHE or _missing(device_type) or _failure(device_type)


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
        device = torch.device(device_type) if device_type == "cpu" else torch.device("cuda", torch.cuda.current_device())
        torch.compile(lambda x: (2 * x).sin(), dynamic=False)(torch.ones(8, device=device))
    except Exception as error:
        lines = [line.strip() for line in f"{type(error).__name__}: {error}".splitlines() if line.strip()]
        told = next((line for line in lines if re.search(r"\berror: ", line)), lines[0])
        return f"the compiler is there, but a test failed ({told[:160]})"
    return ""


def jit(*device_types: str, dynamic: bool = False):
    """Decorator of a function of tensors: compiled on its first call on one of these devices, elsewhere run as it is.

    dynamic: one graph for all sizes, instead of one for each.
    """
    def decorate(fn):
        compiled = torch.compile(fn, dynamic=dynamic)

        @functools.wraps(fn)
        def call(tensor, *args, **kwargs):
            device_type = tensor.device.type
            if device_type not in device_types or torch.compiler.is_compiling() or why_not_compile(device_type):
                return fn(tensor, *args, **kwargs)
            return compiled(tensor, *args, **kwargs)
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
        self.compiled_layer: Any = torch.compile(self.eager_layer, dynamic=False, **options)

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
    return torch.compile(model, dynamic=False) if device_type == "cuda" else CompiledLayers(model)

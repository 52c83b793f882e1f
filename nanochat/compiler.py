"""Where torch.compile can run, and where it pays.

* CUDA: the whole model is one graph.
* CPU: each block is compiled (all layers share one or two graphs, so the wait does not grow with depth); the kernels that
  PyTorch has no fast CPU version of (attention, loss) are written by hand and stay outside.
* No C++ compiler or no Triton, MPS, or TORCHDYNAMO_DISABLE=1: eager, with one line that says so.
"""
import functools
import os
import sysconfig
from typing import Any

import torch
from torch import nn

from nanochat.common import print0


@functools.cache
def why_not_compile(device_type: str) -> str:
    """Why torch.compile cannot be used on this kind of device; empty if it can."""
    if os.environ.get("TORCHDYNAMO_DISABLE", "0") not in ("", "0"):
        return "TORCHDYNAMO_DISABLE is set"
    if device_type == "cuda":
        from torch.utils._triton import has_triton
        return "" if has_triton() else "no working Triton"
    if device_type == "cpu":
        try:
            from torch._inductor.cpp_builder import get_cpp_compiler
            get_cpp_compiler()
        except Exception as error:
            return f"no C++ compiler ({str(error).splitlines()[0][:80]})"
        if not os.path.exists(os.path.join(sysconfig.get_path("include"), "Python.h")):
            return "no Python headers (on Debian and Ubuntu: apt install python3-dev)"
        return ""
    return f"torch.compile is not reliable on {device_type}"


def jit(*device_types: str):
    """Decorator of a function of tensors: compiled on its first call on one of these devices, elsewhere run as it is."""
    def decorate(fn):
        compiled = torch.compile(fn, dynamic=False)

        @functools.wraps(fn)
        def call(tensor, *args, **kwargs):
            device_type = tensor.device.type
            if device_type not in device_types or torch.compiler.is_compiling() or why_not_compile(device_type):
                return fn(tensor, *args, **kwargs)
            return compiled(tensor, *args, **kwargs)
        return call
    return decorate


class _CompiledLayers:
    """Calls a model with its layers compiled one at a time; the model itself stays eager for sampling and odd shapes."""

    def __init__(self, model: Any):
        self.model = model
        self.eager_layer: Any = model.run_layer
        self.compiled_layer: Any = torch.compile(self.eager_layer, dynamic=False)

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
    if device_type == "cuda":
        return torch.compile(model, dynamic=False)
    # layers that differ, in their rank say, take a graph each; beyond the default of 8 the rest would silently run eagerly
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, 4 * len(model.transformer.h))  # type: ignore
    return _CompiledLayers(model)

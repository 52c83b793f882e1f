"""FP8 training: the three matmuls of a linear layer in 8-bit floats, with scales taken from the data at every call.

| | forward x·Wᵀ | grad_x = g·W | grad_W = gᵀ·x |
|---|---|---|---|
| `tensorwise`: one scale per tensor | e4m3 · e4m3 | e5m2 · e4m3 | e5m2 · e4m3 |
| `rowwise`: one scale per row (column) that is summed over | e4m3 · e4m3 | e4m3 · e4m3 | e4m3 · e4m3 |

Tensorwise is the faster one: it quantises each tensor once. Rowwise confines an outlier to its own row and so needs no
e5m2 for gradients, but it quantises each tensor once per matmul, since the backward sums run over other dimensions.
Master weights stay float32. Formats: Micikevicius et al. 2022 (2209.05433).

On a CPU the quantised values are multiplied in float32, which is slow and for tests.
"""
import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
import torch.nn as nn

from nanochat.cli import UsageError
from nanochat.common import COMPUTE_DTYPE, print0
from nanochat.compiler import before_compiling
from nanochat.gpt import Linear

EPS = 1e-12  # a tensor of zeros gets a finite scale
RECIPES = ("tensorwise", "rowwise")
E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2


def _to_fp8(x: torch.Tensor, fp8_dtype: torch.dtype, dim: int | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """(x / inv_scale in fp8, inv_scale): inv_scale is a float32 scalar, or with `dim` one per slice, that dimension kept as 1."""
    fp8_max = torch.finfo(fp8_dtype).max
    x = x.float()
    peak = x.abs().amax() if dim is None else x.abs().amax(dim, keepdim=True)
    scale = (fp8_max / peak.double().clamp(min=EPS)).float()
    return (x * scale).clamp(-fp8_max, fp8_max).to(fp8_dtype), scale.reciprocal()  # the cast alone would overflow to NaN


def _to_col_major(x: torch.Tensor) -> torch.Tensor:
    """The same matrix with its columns contiguous, as the kernels want the right operand."""
    return x.t().contiguous().t()


def _scaled_mm(a: torch.Tensor, b: torch.Tensor, a_inv: torch.Tensor, b_inv: torch.Tensor, out_dtype: torch.dtype, fast: bool) -> torch.Tensor:
    """a (M, K) times b (K, N), both in FP8, times their inverse scales: scalars, or (M, 1) and (1, N).

    `fast` accumulates partial sums in fewer bits: fine for activations, too rough for gradients.
    """
    if a.device.type == "cpu":  # not every CPU has PyTorch's kernel (oneDNN: none without AVX-512)
        return (a.float() @ b.float() * a_inv * b_inv).to(out_dtype)
    return torch._scaled_mm(a, b, scale_a=a_inv, scale_b=b_inv, out_dtype=out_dtype, use_fast_accum=fast)


def _rowwise_mm(a: torch.Tensor, b: torch.Tensor, out_dtype: torch.dtype, fast: bool) -> torch.Tensor:
    """a (M, K) times b (K, N), each row of a and each column of b with its own scale."""
    a8, a_inv = _to_fp8(a, E4M3, dim=1)
    b8, b_inv = _to_fp8(b, E4M3, dim=0)
    return _scaled_mm(a8.contiguous(), _to_col_major(b8), a_inv.contiguous(), b_inv.contiguous(), out_dtype, fast)


class _Float8Matmul(torch.autograd.Function):
    """x (N, K), weight (O, K) -> x @ weight.T (N, O) in the dtype of x; tensorwise scales."""

    @staticmethod
    def forward(ctx, x, weight):
        x8, x_inv = _to_fp8(x, E4M3)
        w8, w_inv = _to_fp8(weight, E4M3)
        ctx.save_for_backward(x8, x_inv, w8, w_inv)
        return _scaled_mm(x8, w8.t(), x_inv, w_inv, x.dtype, fast=True)

    @staticmethod
    def backward(ctx, grad):
        x8, x_inv, w8, w_inv = ctx.saved_tensors
        g8, g_inv = _to_fp8(grad.contiguous(), E5M2)
        grad_x = _scaled_mm(g8, _to_col_major(w8), g_inv, w_inv, grad.dtype, fast=False)
        grad_w = _scaled_mm(g8.t().contiguous(), _to_col_major(x8), g_inv, x_inv, grad.dtype, fast=False)
        return grad_x, grad_w


class _Float8RowwiseMatmul(torch.autograd.Function):
    """x (N, K), weight (O, K) -> x @ weight.T (N, O) in the dtype of x; rowwise scales."""

    @staticmethod
    def forward(ctx, x, weight):
        ctx.save_for_backward(x, weight)
        return _rowwise_mm(x, weight.t(), x.dtype, fast=True)

    @staticmethod
    def backward(ctx, grad):
        x, weight = ctx.saved_tensors
        return _rowwise_mm(grad, weight, grad.dtype, fast=False), _rowwise_mm(grad.t(), x, grad.dtype, fast=False)


@before_compiling
def _whole_in_graphs() -> None:
    torch.compiler.allow_in_graph(_Float8Matmul)
    torch.compiler.allow_in_graph(_Float8RowwiseMatmul)


class Float8Linear(Linear):
    """A `Linear` whose forward and backward matmuls run in FP8. Both its sizes must be multiples of 16, and in training the number
    of tokens too (a limit of the GPU kernels)."""

    recipe: str = "tensorwise"
    plain_class: type[nn.Linear] = Linear

    @classmethod
    def from_float(cls, mod: nn.Linear, recipe: str = "tensorwise") -> "Float8Linear":
        """The FP8 twin of `mod`, sharing its weight and bias. `disable_fp8` turns it back into the class of `mod`."""
        with torch.device("meta"):
            twin = cls(mod.in_features, mod.out_features)
        twin.weight, twin.bias = mod.weight, mod.bias
        twin.recipe, twin.plain_class = recipe, type(mod)
        return twin.train(mod.training)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x.to(COMPUTE_DTYPE)
        matmul = _Float8RowwiseMatmul if self.recipe == "rowwise" else _Float8Matmul
        y = matmul.apply(x.reshape(-1, self.in_features), self.weight).unflatten(0, x.shape[:-1])
        return y if self.bias is None else y + self.bias.to(y.dtype)


@dataclass(frozen=True)
class Float8LinearConfig:
    """How nanochat's interface hands a recipe to `convert_to_float8_training`."""

    recipe: str = "tensorwise"

    @classmethod
    def from_recipe_name(cls, recipe_name: str) -> "Float8LinearConfig":
        """Raises ValueError for a name that is not in `RECIPES`."""
        if recipe_name not in RECIPES:
            raise ValueError(f"unknown FP8 recipe {recipe_name!r}: use one of {', '.join(RECIPES)}")
        return cls(recipe_name)


def worth_converting(module: nn.Linear, fqn: str = "") -> bool:
    """Module filter: layers that FP8 can do (sizes in multiples of 16) and that gain from it (no side under 128)."""
    sizes = (module.in_features, module.out_features)
    return all(size % 16 == 0 and size >= 128 for size in sizes)


def check_fp8_device(device: torch.device, recipe: str = "tensorwise") -> None:
    """Raises UsageError where FP8 matmuls cannot run. The CPU can, slowly."""
    if device.type == "cpu":
        return
    if device.type != "cuda":
        raise UsageError(f"FP8 needs an NVIDIA GPU, not {device.type}: leave out --fp8")
    if torch.version.cuda and torch.cuda.get_device_capability(device) < (8, 9):
        raise UsageError(f"FP8 needs CUDA compute capability 8.9 (Ada) or newer, and {torch.cuda.get_device_name(device)} is older: leave out --fp8")
    if recipe == "rowwise" and COMPUTE_DTYPE != torch.bfloat16:
        raise UsageError("the FP8 recipe rowwise computes in bfloat16 only: set NANOCHAT_DTYPE=bfloat16 or use --fp8-recipe=tensorwise")


def convert_to_float8_training(module: nn.Module, *, config: Float8LinearConfig | None = None,
                               module_filter_fn: Callable[[nn.Linear, str], bool] | None = None) -> nn.Module:
    """Replaces, in place, every nn.Linear below `module` for which `module_filter_fn(layer, its dotted name)` is true, or all.

    Parameters, their names and their values stay. Returns `module`, or its twin if it is a linear layer itself.
    Raises UsageError where the device of the weights has no FP8.
    """
    config = config or Float8LinearConfig()

    def convert(module: nn.Module, fqn: str) -> nn.Module:
        for name, child in module.named_children():
            twin = convert(child, f"{fqn}.{name}" if fqn else name)
            if twin is not child:
                setattr(module, name, twin)
        if not isinstance(module, nn.Linear) or isinstance(module, Float8Linear):
            return module
        if module_filter_fn is not None and not module_filter_fn(module, fqn):
            return module
        check_fp8_device(module.weight.device, config.recipe)
        return Float8Linear.from_float(module, config.recipe)

    converted = convert(module, "")
    if any(isinstance(layer, Float8Linear) and layer.weight.device.type == "cpu" for layer in converted.modules()):
        print0("FP8 on a CPU is a simulation, not compiled: the same rounding, but slower than without")
    return converted


@contextlib.contextmanager
def disable_fp8(model: nn.Module) -> Iterator[None]:
    """Within it the FP8 layers are what they were before the conversion: evaluation sees the weights at full precision.

    Only the class of each layer changes and changes back, not the module: weights are shared by nature, and a compiled
    model keeps one graph for each of the two states instead of compiling anew at every evaluation.
    """
    layers = [module for module in model.modules() if isinstance(module, Float8Linear)]
    try:
        for layer in layers:
            layer.__class__ = layer.plain_class  # type: ignore[assignment]
        yield
    finally:
        for layer in layers:
            layer.__class__ = Float8Linear

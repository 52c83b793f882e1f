"""The stages of a growing run, and the share of the FLOPs after which each ends at the latest."""
import argparse
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from nanochat.cli import UsageError
from nanochat.gpt import GPTConfig
from nanochat.growth.target import continued_layers, grown_config, layered_config, layered_target, stock_config
from nanochat.layered_gpt import LayeredGPTConfig, empty_gpt
from nanochat.recipe import gpt_config, scaling_params

FINAL_SHARE = 0.25  # of the budget, kept for the final model: in short runs later growth ended better, up to this (dev/LOG.md)


@dataclass(frozen=True)
class Shape:
    depth: int
    width: int
    rank: int | None = None  # of attention and MLP; None: as before

    def __str__(self) -> str:
        return f"{self.depth}x{self.width}" + ("" if self.rank is None else f"x{self.rank}")


def parse_path(text: str) -> list[Shape]:
    """`10x640,15x1024x128`: depth x width [x rank] of each stage, the first one included, which may have no layers (0x640). Raises UsageError."""
    shapes = []
    for part in text.split(","):
        match = re.fullmatch(r"\s*(\d+)x(\d+)(?:x(\d+))?\s*", part)
        if match is None:
            raise UsageError(f"{part.strip()!r} is not a shape; write depth x width or depth x width x rank, for example 10x640,15x1024x128")
        depth, width, rank = (number and int(number) for number in match.groups())
        if not width:
            raise UsageError(f"{part.strip()!r} is not a model; its width must be 1 or more")
        shapes.append(Shape(depth, width, rank))  # type: ignore[arg-type]
    return shapes


def one_shape(text: str) -> Shape:
    """Of a flag."""
    try:
        shape, *more = parse_path(text)
    except UsageError as error:
        raise argparse.ArgumentTypeError(str(error)) from error
    if more:
        raise argparse.ArgumentTypeError(f"{text!r} are several shapes; give one")
    return shape


def parse_fractions(text: str) -> list[float]:
    """`0.2,0.5`: rising shares of the FLOPs budget, between 0 and 1. Raises UsageError."""
    try:
        fractions = [float(part) for part in text.split(",")]
    except ValueError:
        raise UsageError(f"{text!r} are not numbers; write the shares of the FLOPs at which to grow, for example 0.2,0.5") from None
    if not all(0 < a < b < 1 for a, b in zip([0.5 * fractions[0], *fractions], fractions)):
        raise UsageError(f"growths at {text}: the shares of the FLOPs must rise, and lie between 0 and 1")
    return fractions


def shares_of_flops(at: Sequence[float], flops_per_token: Sequence[int]) -> list[float]:
    """The shares of a run's FLOPs that are spent at these shares of its tokens, `flops_per_token` of each stage; one more stage than shares."""
    if len(at) + 1 != len(flops_per_token):
        raise UsageError(f"{len(at)} moments for {len(flops_per_token) - 1} growths; give one for each")
    ends = [*at, 1.0]
    spent = [(end - start) * flops for start, end, flops in zip([0.0, *ends], ends, flops_per_token)]
    return [sum(spent[:i + 1]) / sum(spent) for i in range(len(at))]


def dial_path(grow_from: int, depth: int, stages: int, aspect_ratio: int, head_dim: int) -> list[Shape]:
    """The shapes of `stages` growths from one depth to another, evenly spaced, with nanochat's width for each depth. Raises UsageError."""
    if not 1 <= grow_from < depth:
        raise UsageError(f"--grow-from={grow_from} must be 1 or more, and less than --depth={depth}")
    if not 1 <= stages <= depth - grow_from:
        raise UsageError(f"{stages} growths do not fit between depths {grow_from} and {depth}; use 1 to {depth - grow_from}")
    depths = [grow_from + round(stage * (depth - grow_from) / stages) for stage in range(stages + 1)]
    return [Shape(d, gpt_config(d, aspect_ratio, head_dim, 2048, 1, "L").n_embd) for d in depths]


@dataclass(frozen=True)
class Stage:
    shape: Shape
    config: GPTConfig
    layers: list[int | None]  # which layer of the stage before each layer continues
    params: int
    scaling_params: int  # of blocks and head
    flops_per_token: int


def plan_stages(first: GPTConfig, path: Sequence[Shape], depth_mode: str = "identity") -> list[Stage]:
    """All stages of a run that starts with `first` and grows along `path` (whose first shape is that of `first`).

    Raises UsageError for a path that a model cannot grow along.
    """
    if not path or (path[0].depth, path[0].width) != (first.n_layer, first.n_embd):
        raise UsageError(f"the first model is {first.n_layer}x{first.n_embd}, but the path starts with {path[0] if path else 'nothing'}")
    configs: list[GPTConfig] = [first]
    layers: list[list[int | None]] = [list(range(first.n_layer))]
    for before, shape in zip(path, path[1:]):
        source = layered_config(configs[-1])
        head_dim = source.head_dim
        if shape.width < before.width or shape.depth < before.depth:
            raise UsageError(f"{before} cannot become {shape}: a model only grows")
        if shape.width % head_dim:
            raise UsageError(f"a width of {shape.width} is not made of heads of {head_dim}; use a multiple")
        ranks: dict[str, Any] = {} if shape.rank is None else dict(attn_rank=shape.rank, mlp_rank=shape.rank)
        continued = continued_layers(source.n_layer, shape.depth, depth_mode)
        target = grown_config(source, shape.depth, shape.width, layers=continued, **ranks)
        layered_target(source, target, continued)  # checks it
        if target == source:
            raise UsageError(f"{before} and {shape} are the same model; leave one out")
        configs.append(target if isinstance(configs[-1], LayeredGPTConfig) else stock_config(target))  # what `grow` makes of it
        layers.append(continued)
    return [_stage(shape, config, continued) for shape, config, continued in zip(path, configs, layers)]


def _stage(shape: Shape, config: GPTConfig, layers: list[int | None]) -> Stage:
    model = empty_gpt(config)
    return Stage(shape, config, layers, model.num_scaling_params()["total"], scaling_params(model), model.estimate_flops())


def latest_growths(growths: int) -> list[float]:
    """The shares of the budget by which each growth happens in any case, evenly spaced, so that FINAL_SHARE is left for the last model."""
    return [(1 - FINAL_SHARE) * (i + 1) / growths for i in range(growths)]


def show_plan(stages: Sequence[Stage], budget: float, growths_at: Sequence[float], fixed: bool = False) -> str:
    """A table of the stages. `budget` in FLOPs, `growths_at` the shares of it after which each stage but the last ends, at the latest or
    (`fixed`) exactly."""
    ends = [*growths_at, 1.0]
    lines = [f"Budget {budget:.3e} FLOPs; " + ("growths at fixed shares of it" if fixed else "each stage ends by kappa, at the latest at this share of it"),
             f"{'stage':>5}  {'shape':>14}  {'heads':>5}  {'parameters':>14}  {'FLOPs/token':>12}  {'until':>7}  {'FLOPs':>10}  {'tokens':>14}  {'per parameter':>13}"]
    for number, (stage, start, end) in enumerate(zip(stages, [0.0, *ends], ends)):
        flops = (end - start) * budget
        tokens = flops / stage.flops_per_token
        lines.append(f"{number:5d}  {stage.shape!s:>14}  {stage.config.n_head:5d}  {stage.params:14,}  {stage.flops_per_token:12,}  {100 * end:6.1f}%  {flops:10.3e}  "
                     f"{tokens:14,.0f}  {tokens / stage.scaling_params:13.2f}")
    return "\n".join(lines)


def describe(config: GPTConfig) -> str:
    """Depth x width of a model, and its rank and loops if there are any: `10x640`, `15x960x128`, `15x960x64-128`, `10x640 (3 loops)`."""
    ranks = sorted({rank for layer in config.layers for rank in (layer.attn_rank, layer.mlp_rank)}) if isinstance(config, LayeredGPTConfig) else [0]
    rank = "" if ranks == [0] else f"x{ranks[0]}" if len(ranks) == 1 else f"x{ranks[0]}-{ranks[-1]}"
    return f"{config.n_layer}x{config.n_embd}{rank}" + (f" ({config.loops} loops)" if config.loops > 1 else "")


def growth_record(step: int, source: GPTConfig, target: GPTConfig, mode: str, depth_mode: str, seed: int, **measured: float | None) -> dict:
    """One entry of the list `growth` in a checkpoint's meta; `measured`: tokens, flops, loss_before, loss_after."""
    return {"step": step, "from": describe(source), "to": describe(target), "mode": mode, "depth_mode": depth_mode, "seed": seed, **measured}

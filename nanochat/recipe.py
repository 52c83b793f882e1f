"""What base_train derives from its few dials: model shape, batch size, horizon, scaled hyper-parameters.

Depth is the one dial: width follows from it, and batch size, learning rates and weight decay follow from the
parameters and the tokens, relative to a reference of depth 12 that the defaults were tuned at.
"""
import math
from dataclasses import dataclass, replace

import torch

from nanochat.blocks import BLOCKS
from nanochat.cli import UsageError, finite_float, flag, float_or_default, int_or_off, non_negative_int, positive_int
from nanochat.gpt import GPT, SMEAR_GATE_CHANNELS, GPTConfig
from nanochat.layered_gpt import ACTIVATIONS, ORDERS, LayeredGPTConfig, empty_gpt
from nanochat.lowrank import RANK_SCHEDULES, break_even_rank, schedule_ranks
from nanochat.objectives import OBJECTIVES, ObjectiveSettings

REFERENCE_DEPTH = 12
REFERENCE_BATCH = 2 ** 19  # tokens


def gpt_config(depth: int, aspect_ratio: int, head_dim: int, sequence_len: int, vocab_size: int, window_pattern: str) -> GPTConfig:
    """Width = depth * aspect_ratio, rounded up to whole heads. Raises UsageError for a shape that cannot be."""
    if depth < 1:
        raise UsageError(f"--depth={depth} is not a model; use 1 or more")
    if head_dim < 2 or head_dim % 2:
        raise UsageError(f"--head-dim={head_dim} cannot be rotated in pairs; use an even number")
    if not window_pattern or set(window_pattern.upper()) - {"S", "L"}:
        raise UsageError(f"--window-pattern={window_pattern!r} must be letters S (short) and L (long), for example SSSL")
    n_head = -(-depth * aspect_ratio // head_dim)
    check_width(n_head * head_dim)
    return GPTConfig(sequence_len=sequence_len, vocab_size=vocab_size, n_layer=depth, n_head=n_head, n_kv_head=n_head,
                     n_embd=n_head * head_dim, window_pattern=window_pattern)


def check_width(width: int) -> None:
    """Raises UsageError for one that is not a model's."""
    if width < SMEAR_GATE_CHANNELS:
        raise UsageError(f"a width of {width} is too small: the gates read {SMEAR_GATE_CHANNELS} channels; use a larger one, for example by --aspect-ratio")


@dataclass(frozen=True)
class LayerChanges:
    """What makes the layers differ from the stock ones; -1 and 0 stand for the stock choice."""

    attn_rank: int = 0
    mlp_rank: int = 0
    lm_head_rank: int = 0
    rank_schedule: str = "constant"
    n_head: int = -1
    n_kv_head: int = -1
    qk_dim: int = -1
    mlp_ratio: float = -1
    mlp_depth: int = 1
    block: str = "prenorm"
    activation: str = "relu2"
    order: str = "attn-mlp"
    causal: bool = True
    loops: int = 1

    def apply(self, stock: GPTConfig, reference: bool = False) -> GPTConfig:
        """The stock configuration itself if there is nothing to change, else a layered one. Raises UsageError for layers that cannot be.

        For the `reference` model, whose depth the user did not choose, what does not fit is cut to what does: key heads to a
        divisor of its heads, ranks to its matrices. The schedule does not matter there, only the sum of the ranks counts.
        """
        if self == LayerChanges():
            return stock
        with torch.device("meta"):
            plain = LayeredGPTConfig.from_gpt(GPT(stock))
        if not plain.layers and self != LayerChanges(lm_head_rank=self.lm_head_rank, causal=self.causal, loops=self.loops):
            raise UsageError("a run that begins without layers grows stock ones, since nothing holds what else they are to be; begin with 1 layer, or leave out "
                             "the flags of layers (--rank, --n-kv-head, --block and others)")
        n_head = self.n_head if self.n_head > 0 else stock.n_head
        n_kv_head = self.n_kv_head if self.n_kv_head > 0 else n_head
        if reference:
            n_kv_head = max(n for n in range(1, min(n_head, n_kv_head) + 1) if n_head % n == 0)
        head_dim = plain.head_dim
        qk_dim = self.qk_dim if self.qk_dim > 0 else head_dim
        # three matrices of SwiGLU at 8/3 of the width are as large as the two of the others at 4
        ratio = self.mlp_ratio if self.mlp_ratio > 0 else 8 / 3 if self.activation == "swiglu" else 4
        hidden = round(ratio * stock.n_embd)
        smallest = {"attn": min(stock.n_embd, n_head * head_dim, n_kv_head * min(head_dim, qk_dim)), "mlp": min(stock.n_embd, hidden)}

        def ranks(wanted: int, largest: int) -> list[int]:
            if wanted == 0:
                return [0] * stock.n_layer
            return [min(wanted, largest)] * stock.n_layer if reference else schedule_ranks(self.rank_schedule, wanted, stock.n_layer, largest)

        try:
            layers = tuple(
                replace(layer, n_head=n_head, n_kv_head=n_kv_head, qk_dim=qk_dim, mlp_hidden=hidden, mlp_depth=self.mlp_depth, block=self.block,
                        activation=self.activation, order=self.order,
                        attn_rank=attn_rank, mlp_rank=mlp_rank)
                for layer, attn_rank, mlp_rank in zip(plain.layers, ranks(self.attn_rank, smallest["attn"]), ranks(self.mlp_rank, smallest["mlp"])))
            head_rank = min(self.lm_head_rank, stock.n_embd, stock.vocab_size) if reference else self.lm_head_rank
            return replace(plain, layers=layers, lm_head_rank=head_rank, causal=self.causal, loops=self.loops)
        except ValueError as error:
            raise UsageError(f"there is no such model: {error}") from error

    def remarks(self, config: GPTConfig) -> list[str]:
        """Ranks that save nothing, one line each."""
        if not isinstance(config, LayeredGPTConfig) or not config.layers:
            return []
        layer = config.layers[-1]  # the one with the largest ranks
        matrices = [("attention", layer.attn_rank, config.n_embd, layer.n_head * layer.head_dim), ("MLP", layer.mlp_rank, config.n_embd, layer.mlp_hidden),
                    ("head", config.lm_head_rank, config.n_embd, config.vocab_size)]
        return [f"A rank of {rank} in the {name} saves nothing: from {break_even_rank(a, b):.0f} on the factors are larger than the dense matrix"
                for name, rank, a, b in matrices if rank >= break_even_rank(a, b)]


def scaling_params(model: GPT) -> int:
    """The parameter count that scaling laws are stated in: the blocks and the head."""
    counts = model.num_scaling_params()
    return counts["transformer_matrices"] + counts["lm_head"]


@dataclass
class Horizon:
    total_batch_size: int  # tokens per optimizer step
    num_iterations: int
    target_tokens: int  # what the tokens:parameters ratio asks for; negative when the ratio is off
    lr_scale: float  # of AdamW and Muon learning rates, sqrt(batch / reference batch)
    weight_decay_scale: float

    @property
    def total_tokens(self) -> int:
        return self.num_iterations * self.total_batch_size


def batch_scale(total_batch_size: int) -> float:
    """Of the learning rates."""
    return (total_batch_size / REFERENCE_BATCH) ** 0.5


def plan_horizon(model: GPT, config: dict, num_iterations: int, target_flops: float, target_param_data_ratio: float,
                 total_batch_size: int, changes: LayerChanges | None = None) -> Horizon:
    """Batch size and number of steps. `config` holds the arguments of `gpt_config` besides depth, `changes` what the layers differ in.

    The batch grows with tokens^0.383 (Power Lines, 2505.13738), the learning rates with its square root, and weight decay
    with sqrt(batch)/tokens. The number of steps is `num_iterations`, else what `target_flops` pays for, else what the
    tokens:parameters ratio asks for. Raises UsageError if none of the three is positive.
    """
    if num_iterations <= 0 and target_flops <= 0 and target_param_data_ratio <= 0:
        raise UsageError("no horizon: give --num-iterations, --target-flops or --target-param-data-ratio a positive value")
    ratio = target_param_data_ratio or 1.0  # its sign and size cancel where the horizon is explicit
    reference = empty_gpt((changes or LayerChanges()).apply(gpt_config(depth=REFERENCE_DEPTH, **config), reference=True))
    target_tokens = int(ratio * scaling_params(model))
    reference_tokens = ratio * scaling_params(reference)
    if total_batch_size <= 0:
        total_batch_size = 2 ** round(math.log2(REFERENCE_BATCH * (target_tokens / reference_tokens) ** 0.383))
    if num_iterations <= 0:
        if target_flops > 0:
            num_iterations = round(target_flops / (model.estimate_flops() * total_batch_size))
        else:
            num_iterations = target_tokens // total_batch_size
    if num_iterations < 1:
        raise UsageError(f"the budget pays for less than one step of {total_batch_size:,} tokens; raise it or lower --total-batch-size")
    return Horizon(total_batch_size, num_iterations, target_tokens, batch_scale(total_batch_size), batch_scale(total_batch_size) * reference_tokens / target_tokens)


# -----------------------------------------------------------------------------
# Flags


@dataclass
class ModelSettings(ObjectiveSettings):
    """The flags that say what the model is."""

    depth: int = flag(20, "Layers of the model; width and all else follow from it", type=positive_int)
    aspect_ratio: int = flag(64, "Width per layer: the model's width is this times the depth, rounded up to whole heads", type=positive_int)
    head_dim: int = flag(128, "Width of a head", type=positive_int)
    max_seq_len: int = flag(2048, "Context length in tokens", type=positive_int)
    window_pattern: str = flag("SSSL", "Attention span of each layer, repeated; L: full context, S: a quarter")
    # layers that differ from the stock ones (layered_gpt.py)
    rank: int = flag(0, "Rank of attention and MLP, whose matrices are W = U V; 0: dense", type=non_negative_int)
    attn_rank: int | None = flag(None, "Rank of the attention alone; 0: dense (default: --rank)", type=non_negative_int)
    mlp_rank: int | None = flag(None, "Rank of the MLP alone; 0: dense (default: --rank)", type=non_negative_int)
    lm_head_rank: int = flag(0, "Rank of the head; 0: dense", type=non_negative_int)
    rank_schedule: str = flag("constant", "How the ranks are spread over depth, at the same budget", choices=RANK_SCHEDULES)
    n_head: int = flag(-1, "Query heads of a layer; -1: width / head-dim", type=int_or_off)
    n_kv_head: int = flag(-1, "Key and value heads of a layer; -1: as many as query heads", type=int_or_off)
    qk_dim: int = flag(-1, "Width of a query and a key; -1: head-dim", type=int_or_off)
    mlp_ratio: float = flag(-1, "Hidden width of the MLP / width; -1: 4, or 8/3 for swiglu (as many parameters)", type=float_or_default)
    mlp_depth: int = flag(1, "Hidden layers of the MLP", type=positive_int)
    activation: str = flag("relu2", "Activation of the MLP's hidden units", choices=ACTIVATIONS)
    order: str = flag("attn-mlp", "Order of attention and MLP in a layer", choices=ORDERS)
    loops: int = flag(1, "Times that each layer is run before the next one, with the same weights: as many times its FLOPs, no more parameters", type=positive_int)
    block: str = flag("prenorm", "Kind of block; prenorm: nanochat's, ngpt: hidden states and weights on the unit sphere (ngpt.py)", choices=BLOCKS)

    def changes(self) -> LayerChanges:
        return LayerChanges(
            attn_rank=self.rank if self.attn_rank is None else self.attn_rank, mlp_rank=self.rank if self.mlp_rank is None else self.mlp_rank,
            lm_head_rank=self.lm_head_rank, rank_schedule=self.rank_schedule, n_head=self.n_head, n_kv_head=self.n_kv_head, qk_dim=self.qk_dim,
            mlp_ratio=self.mlp_ratio, mlp_depth=self.mlp_depth, block=self.block, activation=self.activation, order=self.order,
            causal=OBJECTIVES[self.objective].causal, loops=self.loops)

    def config(self, vocab_size: int, depth: int | None = None, width: int | None = None, rank: int | None = None) -> GPTConfig:
        """The configuration that the flags ask for, of another depth, width and rank than theirs where those are given. Raises UsageError."""
        if self.max_seq_len < 2:
            raise UsageError("--max-seq-len=1 has nothing to predict from; use 2 or more")
        config = gpt_config(depth or self.depth, self.aspect_ratio, self.head_dim, self.max_seq_len, vocab_size, self.window_pattern)
        if depth is not None:
            config = replace(config, n_layer=depth)
        changes = self.changes()
        if width is not None:
            if width % self.head_dim:
                raise UsageError(f"a width of {width} is not made of heads of {self.head_dim}; use a multiple, or another --head-dim")
            check_width(width)
            config = replace(config, n_embd=width, n_head=width // self.head_dim, n_kv_head=width // self.head_dim)
        if rank is not None:
            changes = replace(changes, attn_rank=rank, mlp_rank=rank)
        return changes.apply(config)


@dataclass
class HorizonSettings:
    """The flags that say how long to train, of which the first positive one counts, and in which portions."""

    num_iterations: int = flag(-1, "Optimizer steps; -1: as many as --target-flops asks for", type=int_or_off)
    target_flops: float = flag(-1.0, "Training FLOPs; -1: as many as --target-param-data-ratio asks for", type=finite_float)
    target_param_data_ratio: float = flag(12, "Tokens to train on per parameter of blocks and head", type=finite_float)
    device_batch_size: int = flag(32, "Rows per rank and pass; -1: as many as fit", type=int_or_off)
    total_batch_size: int = flag(-1, "Tokens per step; -1: from model and horizon", type=int_or_off)

    def passes(self, total: int, rows: int, sequence_len: int, world_size: int, streams: int) -> int:
        """Of `rows` rows of `sequence_len` tokens, how many a rank makes in a step of `total` tokens. Raises UsageError where they do not make one."""
        count, rest = divmod(total, rows * sequence_len * world_size)
        if rest or count % (streams // world_size):
            unit = sequence_len * streams
            fitting = next((n for n in range(min(rows, total // unit), 0, -1) if total % (n * unit) == 0), None)
            raise UsageError(
                f"a total batch of {total} tokens cannot be made of passes of {rows} rows * {sequence_len} tokens * {streams} "
                f"{'ranks' if streams == world_size else 'streams'}; "
                + (f"use --device-batch-size={fitting}, or -1 to have it found" if fitting else f"use a --total-batch-size that is a multiple of {unit}"))
        return count

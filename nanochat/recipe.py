"""What base_train derives from its few dials: model shape, batch size, horizon, scaled hyper-parameters, schedules.

Depth is the one dial: width follows from it, and batch size, learning rates and weight decay follow from the
parameters and the tokens, relative to a reference of depth 12 that the defaults were tuned at.
"""
import math
from dataclasses import dataclass, replace

import torch

from nanochat.cli import UsageError
from nanochat.gpt import GPT, SMEAR_GATE_CHANNELS, GPTConfig
from nanochat.layered_gpt import LayeredGPTConfig, build_gpt
from nanochat.lowrank import break_even_rank, schedule_ranks

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
    if n_head * head_dim < SMEAR_GATE_CHANNELS:
        raise UsageError(f"a width of {n_head * head_dim} is too small: the gates read {SMEAR_GATE_CHANNELS} channels; raise --aspect-ratio")
    return GPTConfig(sequence_len=sequence_len, vocab_size=vocab_size, n_layer=depth, n_head=n_head, n_kv_head=n_head,
                     n_embd=n_head * head_dim, window_pattern=window_pattern)


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

    def apply(self, stock: GPTConfig, reference: bool = False) -> GPTConfig:
        """The stock configuration itself if there is nothing to change, else a layered one. Raises UsageError for layers that cannot be.

        For the `reference` model, whose depth the user did not choose, what does not fit is cut to what does: key heads to a
        divisor of its heads, ranks to its matrices. The schedule does not matter there, only the sum of the ranks counts.
        """
        if self == LayerChanges():
            return stock
        with torch.device("meta"):
            plain = LayeredGPTConfig.from_gpt(GPT(stock))
        n_head = self.n_head if self.n_head > 0 else stock.n_head
        n_kv_head = self.n_kv_head if self.n_kv_head > 0 else n_head
        if reference:
            n_kv_head = max(n for n in range(1, min(n_head, n_kv_head) + 1) if n_head % n == 0)
        head_dim = plain.layers[0].head_dim
        qk_dim = self.qk_dim if self.qk_dim > 0 else head_dim
        # three matrices of SwiGLU at 8/3 of the width are as large as the two of ReLU² at 4
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
            head_rank = min(self.lm_head_rank, stock.n_embd) if reference else self.lm_head_rank
            return replace(plain, layers=layers, lm_head_rank=head_rank)
        except ValueError as error:
            raise UsageError(f"there is no such model: {error}") from error

    def remarks(self, config: GPTConfig) -> list[str]:
        """Ranks that save nothing, one line each."""
        if not isinstance(config, LayeredGPTConfig):
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
    with torch.device("meta"):
        reference = build_gpt((changes or LayerChanges()).apply(gpt_config(depth=REFERENCE_DEPTH, **config), reference=True))
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
    batch_scale = (total_batch_size / REFERENCE_BATCH) ** 0.5
    return Horizon(total_batch_size, num_iterations, target_tokens, batch_scale, batch_scale * reference_tokens / target_tokens)


def lr_multiplier(step: float, num_iterations: int, warmup_steps: int, warmdown_ratio: float, final_lr_frac: float) -> float:
    """Linear warm-up over steps, constant, linear warm-down over the last share of the run to `final_lr_frac`."""
    warmdown = round(warmdown_ratio * num_iterations)
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    if step <= num_iterations - warmdown:
        return 1.0
    left = (num_iterations - step) / warmdown
    return left + (1 - left) * final_lr_frac


def muon_momentum(step: float, num_iterations: int, warmdown_ratio: float) -> float:
    """0.85 to 0.97 over 400 steps, back to 0.90 over the warm-down; the warm-up has priority."""
    warmdown = round(warmdown_ratio * num_iterations)
    if step < 400:
        return 0.85 + (0.97 - 0.85) * step / 400
    if step >= num_iterations - warmdown:
        return 0.97 + (0.90 - 0.97) * (step - (num_iterations - warmdown)) / warmdown
    return 0.97


def muon_weight_decay(step: float, num_iterations: int, weight_decay: float) -> float:
    """Half a cosine from `weight_decay` to 0."""
    return weight_decay * 0.5 * (1 + math.cos(math.pi * step / num_iterations))

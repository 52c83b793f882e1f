"""A base directory with one checkpoint and its tokenizer: for nanochat itself, or for this project on another machine.

    NANOCHAT_BASE_DIR=OUT python -m scripts.chat_cli

nanochat loads stock models only. A layered one that is equal to a stock one becomes that, and with `dense` low-rank matrices are multiplied out first. The
optimizer's state stays behind: nanochat begins fine-tuning with a new one.
"""
from dataclasses import asdict, fields, replace
from pathlib import Path

import torch

from nanochat.checkpoint_manager import SOURCES, save_checkpoint
from nanochat.cli import UsageError
from nanochat.export.exported import Exported
from nanochat.growth.target import layered_config, stock_config
from nanochat.layered_gpt import LayeredGPTConfig, LayerSpec


def to_stock(subject: Exported, dense: bool) -> Exported:
    """The same as a stock model. Raises UsageError that says what nanochat's models do not have."""
    state = multiplied_out(subject.state) if dense else subject.state
    config = layered_config(subject.config)
    if dense:
        config = replace(config, lm_head_rank=0, layers=tuple(replace(layer, attn_rank=0, mlp_rank=0) for layer in config.layers))
    stock = stock_config(config)
    if isinstance(stock, LayeredGPTConfig):
        raise UsageError(f"nanochat has no such model: {difference(config)}; export it with --to=hf or --to=base-dir")
    return replace(subject, config=stock, state=state, meta={**subject.meta, "model_config": asdict(stock)})


def multiplied_out(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The factors U and V of each low-rank matrix replaced by their product, in its place."""
    dense = {}
    for name, value in state.items():
        if name.endswith(".V.weight"):
            place = name.removesuffix("V.weight")
            dense[place + "weight"] = (state[place + "U.weight"].double() @ value.double()).to(value.dtype)
        elif not name.endswith(".U.weight"):
            dense[name] = value
    return dense


def difference(config: LayeredGPTConfig) -> str:
    """The first thing in which a configuration is not nanochat's."""
    if not config.causal:
        return "attention looks both ways"
    if config.loops > 1:
        return f"its layers are run {config.loops} times"
    if config.lm_head_rank or any(layer.attn_rank or layer.mlp_rank for layer in config.layers):
        return "it has low-rank matrices (--dense multiplies them out)"
    first = config.layers[0]
    if config.n_embd % first.n_head:
        return f"a width of {config.n_embd} is no multiple of {first.n_head} heads"
    stock = layered_config(config.stock(n_head=first.n_head, n_kv_head=first.n_kv_head))
    for i, (mine, theirs) in enumerate(zip(config.layers, stock.layers)):
        for field in fields(LayerSpec):
            if getattr(mine, field.name) != getattr(theirs, field.name):
                return f"layer {i} has {field.name} {getattr(mine, field.name)}, where nanochat's has {getattr(theirs, field.name)}"
    return f"the stream after layer {config.backout_layer} is backed out, where nanochat takes layer {stock.backout_layer}"


def export_base_dir(subject: Exported, folder: Path) -> str:
    """Fills the folder; returns what is in it."""
    tokenizer = subject.tokenizer
    tokenizer.save(folder / "tokenizer")
    torch.save(tokenizer.token_bytes(), folder / "tokenizer" / "token_bytes.pt")
    meta = {**subject.meta, "tokenizer": tokenizer.checksum()}
    save_checkpoint(folder / SOURCES[subject.source] / subject.name, subject.step, subject.state, None, meta)
    return f"the model {subject.name}, step {subject.step}, and its tokenizer"

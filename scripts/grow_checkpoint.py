"""Grows a finished checkpoint, and says how much that moved the loss.

    python -m scripts.grow_checkpoint --model-tag=d10 --to=15x1024
    python -m scripts.grow_checkpoint --to=20x1280x128 --mode=lossless --noise=0.3 --to-tag=wide

Works on any checkpoint of this pipeline and of nanochat itself, with the optimizer's state where there is one. The result is a new folder beside
the old one, written as a whole or not at all; nothing is ever overwritten.
"""
import shutil
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from nanochat import checkpoint_manager as checkpoints
from nanochat.cli import (
    REQUIRED,
    UsageError,
    command,
    flag,
    folder_name,
    non_negative_float,
    parse_settings,
    positive_int,
    seed,
)
from nanochat.common import autodetect_device_type, compute_cleanup, compute_init, print0, with_progress
from nanochat.dataloader import tokenizing_distributed_data_loader_with_state_bos_bestfit as data_loader
from nanochat.files import check_free, check_writable, locked, new_folder
from nanochat.gpt import GPT
from nanochat.growth import grow
from nanochat.growth.modes import MODES, width_mode
from nanochat.growth.optimizer import OPTIMIZER_MODES, leave_out_frozen
from nanochat.growth.stages import Shape, describe, growth_record, parse_path, plan_stages
from nanochat.growth.target import DEPTH_MODES
from nanochat.loss_eval import FirstBatches, evaluate_bpb
from nanochat.optim import MuonAdamW
from nanochat.tokenizer import get_token_bytes, get_tokenizer


@dataclass(kw_only=True)
class Settings(checkpoints.CheckpointSettings):
    to: str = flag(REQUIRED, "Shape to grow to, depth x width or depth x width x rank: 15x1024, 15x1024x128; a rank of 0 is dense")
    source: str = flag("base", "Stage of training that the model comes from", choices=checkpoints.SOURCES, short="-i")
    to_tag: str | None = flag(None, "Folder of the grown checkpoint (default: the old one and the new shape)", type=folder_name)
    mode: str = flag("lossless", "How the width grows", choices=MODES)
    depth_mode: str = flag("identity", "How the depth grows", choices=DEPTH_MODES)
    optimizer: str = flag("transport", "What becomes of the optimizer's moments: carried over, started anew (reset-new: those of what is added), or left out", choices=(*OPTIMIZER_MODES, "none"))
    theta: float | None = flag(None, "Angle in degrees between the copies of a channel in mode lossless; 45: equal copies, 0: fresh channels",
                               type=non_negative_float)
    spread: float | None = flag(None, "How unequally copies are read in mode lossless, from 0 to 1", type=non_negative_float)
    noise: float | None = flag(None, "Size of the noise that breaks symmetry in mode lossless, relative to the weights", type=non_negative_float)
    seed: int = flag(0, "Seed of the noise and of fresh weights", type=seed)
    eval_tokens: int = flag(2 ** 17, "Tokens of validation text to compare the losses on", type=positive_int)
    device_type: str = flag("", "Device to run on: cuda, mps or cpu (default: the best one here)")


def load(folder: Path, step: int, device: torch.device) -> tuple[GPT, dict]:
    model_data, _, meta = checkpoints.load_checkpoint(folder, step, device)
    model = checkpoints.model_from_config(meta["model_config"])
    checkpoints.load_weights(model, model_data, device)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name not in meta.get("frozen", ()))
    return model, meta


def load_optimizer(model: GPT, folder: Path, step: int, kind: str) -> tuple[MuonAdamW | None, int]:
    """The optimizer with the state that all ranks of the run have saved, and how many they were; (None, 0) if there is no state."""
    ranks = checkpoints.saved_ranks(folder, step)
    if not ranks:
        return None, 0
    optimizer = leave_out_frozen(model.setup_optimizer(matrix_optimizer=kind))
    checkpoints.load_optimizer(folder, step, optimizer)
    return optimizer, ranks


def optimizer_shards(optimizer: MuonAdamW, ranks: int) -> list[dict]:
    """The state dicts of as many ranks."""
    whole = dict(optimizer.full_state_dict())
    shards = []
    for rank in range(ranks):
        optimizer.load_full_state_dict(whole, rank, ranks)
        shards.append(optimizer.state_dict())
    return shards


class Comparison:
    """Bits per byte of validation text, where there is a tokenizer and data for the model, and logits of random tokens anywhere."""

    def __init__(self, model: GPT, meta: dict, eval_tokens: int):
        config, self.device = model.config, model.get_device()
        self.tokens = torch.randint(config.vocab_size, (2, min(config.sequence_len, 256)), generator=torch.Generator().manual_seed(0)).to(self.device)
        self.rows = max(1, 8192 // config.sequence_len)
        self.steps = max(1, eval_tokens // (self.rows * config.sequence_len))
        self.sequence_len = config.sequence_len
        self.batches = FirstBatches(self.draw, self.steps, self.rows * self.sequence_len)
        try:
            self.tokenizer: Any = get_tokenizer()
            self.token_bytes = get_token_bytes(device=self.device)
            next(iter(self.batches))
        except (UsageError, OSError) as error:
            print0(f"No validation text to compare on ({error}): logits of random tokens it is")
            self.tokenizer = None
            return
        checkpoints.check_tokenizer(self.tokenizer, config, meta)

    def draw(self):
        loader = data_loader(self.tokenizer, self.rows, self.sequence_len, split="val", device=self.device)
        return ((x, y) for x, y, _ in loader)

    @torch.no_grad()
    def measure(self, model: GPT) -> tuple[float | None, torch.Tensor]:
        """(bits per byte or None, logits)."""
        if self.tokenizer is None:
            return None, model(self.tokens)
        return evaluate_bpb(model, with_progress(self.batches, self.steps, "Validation"), self.steps, self.token_bytes), model(self.tokens)


@command
def main(argv=None) -> None:
    settings = parse_settings(Settings, argv, "Grow a checkpoint")
    _, _, _, world_size, device = compute_init(settings.device_type or autodetect_device_type())
    try:
        if world_size > 1:
            raise UsageError("grow_checkpoint runs as one process, without torchrun; it serves checkpoints of any number of ranks")
        grow_checkpoint(settings, device)
    finally:
        compute_cleanup()


def grow_checkpoint(settings: Settings, device: torch.device) -> None:
    shapes = parse_path(settings.to)
    if len(shapes) != 1:
        raise UsageError(f"--to={settings.to}: give one shape, such as 15x1024")
    parameters = {name: value for name in ("theta", "spread", "noise") if (value := getattr(settings, name)) is not None}
    width_mode(settings.mode, **parameters)  # checks them before anything takes time
    _, folder, step = settings.find()
    parent = folder.parent
    model, meta = load(folder, step, device)
    before, after = plan_stages(model.config, [Shape(model.config.n_layer, model.config.n_embd), shapes[0]], settings.depth_mode)
    tag = settings.to_tag or f"{folder.name}-{describe(after.config)}"
    check_free(parent / tag, "--to-tag")
    kind = checkpoints.matrix_optimizer(meta)
    optimizer, ranks = (None, 0) if settings.optimizer == "none" else load_optimizer(model, folder, step, kind)

    comparison = Comparison(model.eval(), meta, settings.eval_tokens)
    check_writable(parent)

    grown, grown_optimizer = grow(model, after.config, optimizer, mode=settings.mode, depth_mode=settings.depth_mode, layers=after.layers,
                                  optimizer_mode="reset" if settings.optimizer == "none" else settings.optimizer, setup=dict(matrix_optimizer=kind),
                                  generator=torch.Generator().manual_seed(settings.seed), **parameters)
    print0(f"{describe(model.config)} -> {describe(grown.config)}: {before.params:,} -> {after.params:,} parameters, "
           f"{before.flops_per_token:,} -> {after.flops_per_token:,} FLOPs per token, mode {settings.mode}, depth {settings.depth_mode}")
    history = meta.get("growth", [])
    tokens = step * meta["total_batch_size"] if "total_batch_size" in meta else None
    flops = tokens * before.flops_per_token if tokens is not None and not history else None
    record = growth_record(step, model.config, grown.config, settings.mode, settings.depth_mode, settings.seed, **parameters, tokens=tokens, flops=flops,
                           loss_before=None, loss_after=None)
    frozen = [name for name, parameter in grown.named_parameters() if not parameter.requires_grad]
    meta = {**meta, "model_config": asdict(grown.config), "growth": [*history, record], **({"frozen": frozen} if "frozen" in meta else {})}
    shards = optimizer_shards(grown_optimizer, ranks) if grown_optimizer is not None else [None]
    with locked(parent / tag), new_folder(parent / tag, "--to-tag") as temporary:
        for rank in reversed(range(len(shards))):  # rank 0 writes the model, last
            checkpoints.save_checkpoint(temporary, step, grown.state_dict(), shards[rank], meta, rank=rank)
        for path in folder.glob(f"state_{step:06d}_rank*.pt"):  # the data positions of the run
            shutil.copy(path, temporary / path.name)
    print0(f"Saved to {parent / tag}")

    loss_before, logits_before = comparison.measure(model)
    loss_after, logits_after = comparison.measure(grown)
    if loss_before is not None and loss_after is not None:
        print0(f"Validation bpb: {loss_before:.6f} -> {loss_after:.6f} ({loss_after - loss_before:+.2e})")
    print0(f"Largest difference of a logit on random tokens: {(logits_after - logits_before).abs().max():.2e}")
    record.update(loss_before=loss_before, loss_after=loss_after)
    checkpoints.save_meta(parent / tag, step, meta)


if __name__ == "__main__":
    sys.exit(main())

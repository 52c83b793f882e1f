"""Checkpoints on disk, in nanochat's layout.

| file of step s | content | needed to |
|---|---|---|
| `model_{s:06d}.pt` | state_dict | use the model |
| `meta_{s:06d}.json` | step, model_config, user_config, ... | use the model |
| `optim_{s:06d}_rank{r}.pt` | one rank's optimizer state | train on |
| `state_{s:06d}_rank{r}.pt` | one rank's data position and random states | train on bit-identically (nanochat has no such file) |

The files of the ranks fit any number of ranks: `load_optimizer` and `load_train_state` share them out anew.

Each file is written to a temporary name, synced and renamed, the model last and only when every rank has written
its part: where there is a `model_*.pt`, the checkpoint is complete, and a kill never costs an earlier one.
"""
import json
import logging
import os
import re
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from nanochat.cli import UsageError, env_rank, flag, folder_name, is_out_of_memory, non_negative_int
from nanochat.common import get_base_dir, is_ddp_initialized
from nanochat.files import atomic_path, parse_json, write_text_atomic
from nanochat.gpt import GPT, GPTConfig
from nanochat.layered_gpt import config_from, empty_gpt
from nanochat.optim import MuonAdamW
from nanochat.tokenizer import RustBPETokenizer, get_tokenizer

logger = logging.getLogger(__name__)

SOURCES = {"base": "base_checkpoints", "mid": "mid_checkpoints", "sft": "chatsft_checkpoints", "rl": "chatrl_checkpoints"}


class CheckpointNotFound(UsageError, FileNotFoundError):
    """There is no such checkpoint; the message says where it was looked for and how to get one."""


def log0(message: str) -> None:
    if env_rank() == 0:
        logger.info(message)


def _save(data: Any, path: Path) -> None:
    try:
        with atomic_path(path) as temporary:
            torch.save(data, temporary)
    except (OSError, RuntimeError) as error:
        reason = getattr(error, "strerror", None) or str(error).splitlines()[0]
        raise UsageError(f"cannot write {path}: {reason}; make room or fix permissions there, earlier checkpoints are intact") from error


def _load(path: Path, device, mapped: bool = False) -> Any:
    """torch.load that reads only tensors and plain values, after a check of every byte against the file's checksums.

    `mapped`: tensors stay in the file until they are read.
    """
    if not path.exists():
        raise CheckpointNotFound(f"no file {path}")
    try:
        with zipfile.ZipFile(path) as archive:
            broken = archive.testzip()
        if broken is None:
            return torch.load(path, map_location=device, weights_only=True, mmap=mapped)
    except Exception as error:  # damaged bytes come out as errors of a dozen kinds
        if is_out_of_memory(error):
            raise
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise UsageError(f"{path} is truncated, corrupt or not a checkpoint ({reason}); use another step") from error
    raise UsageError(f"{path} is corrupt (checksum of {broken} does not match); use another step")


def save_checkpoint(checkpoint_dir: str | os.PathLike, step: int, model_data: dict, optimizer_data: dict | None, meta_data: dict,
                    rank: int = 0, train_state: dict | None = None) -> None:
    """Writes one step. Rank 0 writes model and meta, every rank its own optimizer shard and train state.

    With `optimizer_data` all ranks must call it: rank 0 waits for the others before the model file appears.
    Raises UsageError if a file cannot be written.
    """
    folder = Path(checkpoint_dir)
    if rank == 0:  # of an earlier run: with files of both, the step would look complete
        (folder / f"model_{step:06d}.pt").unlink(missing_ok=True)
    if optimizer_data is not None and is_ddp_initialized():
        dist.barrier()
    if train_state is not None:
        _save(train_state, folder / f"state_{step:06d}_rank{rank}.pt")
    if optimizer_data is not None:
        _save(optimizer_data, folder / f"optim_{step:06d}_rank{rank}.pt")
        if is_ddp_initialized():
            dist.barrier()
    if rank == 0:
        save_meta(folder, step, meta_data)
        _save(model_data, folder / f"model_{step:06d}.pt")
        log0(f"Saved checkpoint of step {step} to {folder}")


def save_meta(checkpoint_dir: str | os.PathLike, step: int, meta_data: dict) -> None:
    """Writes the meta file of a step; also later, when what was measured on the saved model is known."""
    try:
        write_text_atomic(Path(checkpoint_dir, f"meta_{step:06d}.json"), json.dumps(meta_data, indent=2))
    except OSError as error:
        raise UsageError(f"cannot write to {checkpoint_dir}: {error.strerror}; make room or fix permissions there") from error


def load_meta(checkpoint_dir: str | os.PathLike, step: int) -> dict:
    """Raises CheckpointNotFound, which says what steps there are, and UsageError for a corrupt file."""
    path = Path(checkpoint_dir) / f"meta_{step:06d}.json"
    try:
        meta = parse_json(path.read_text(encoding="utf-8"))
        meta["model_config"].setdefault("window_pattern", "L")  # absent before windows existed
        for name, kind in (("step", int), ("user_config", dict), ("loop_state", dict), ("growth", list), ("frozen", list)):
            if name in meta and not isinstance(meta[name], kind):
                raise TypeError(f"{name} is no {kind.__name__}")
        if not isinstance(meta.get("world_size"), (int, type(None))) or not isinstance(meta.get("val_bpb"), (int, float, type(None))):
            raise TypeError("world_size or val_bpb is no such number")
        if not all(isinstance(record, dict) and {"from", "to"} <= record.keys() for record in meta.get("growth", ())):
            raise TypeError("an entry of growth does not say from and to what")
    except FileNotFoundError:
        steps = list_steps(checkpoint_dir)
        raise CheckpointNotFound(f"no checkpoint of step {step} in {checkpoint_dir}; there is "
                                 + (f"step {', '.join(map(str, steps))}" if steps else "none")) from None
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UsageError(f"{path} is corrupt ({type(error).__name__}: {error}); use another step") from error
    return meta


def load_checkpoint(checkpoint_dir: str | os.PathLike, step: int, device, load_optimizer: bool = False, rank: int = 0):
    """(model state_dict, this rank's optimizer state_dict or None, meta). Raises UsageError for a missing or corrupt file."""
    folder = Path(checkpoint_dir)
    meta = load_meta(folder, step)
    model_data = _load(folder / f"model_{step:06d}.pt", device)
    optimizer_data = _load(folder / f"optim_{step:06d}_rank{rank}.pt", device) if load_optimizer else None
    return model_data, optimizer_data, meta


def saved_ranks(checkpoint_dir: str | os.PathLike, step: int, kind: str = "optim") -> int:
    """How many ranks have written optimizer states (or with `kind="state"` train states) of a step; 0 if there are none.

    The meta data know it where a run with more ranks has left files of the same step. Raises CheckpointNotFound if files of ranks are missing.
    """
    folder = Path(checkpoint_dir)
    names = (re.fullmatch(rf"{kind}_{step:06d}_rank(\d+)\.pt", path.name) for path in folder.glob(f"{kind}_{step:06d}_rank*.pt"))
    found = {int(name[1]) for name in names if name}
    if not found:
        return 0
    ranks = load_meta(folder, step).get("world_size") or max(found) + 1  # nanochat's own do not say
    if missing := sorted(set(range(ranks)) - found):
        raise CheckpointNotFound(f"no file {folder / f'{kind}_{step:06d}_rank{missing[0]}.pt'}, though {ranks} ranks have written step {step}; "
                                 "bring it back, or use another step")
    return ranks


def load_optimizer(checkpoint_dir: str | os.PathLike, step: int, optimizer: MuonAdamW, rank: int = 0, world: int = 1) -> None:
    """Gives the optimizer of this rank its state and hyper-parameters of a step, whatever number of ranks has written them; initial learning rates
    stay those of the flags. All ranks must call it.

    From other numbers of ranks each rank maps all shards into memory and takes one parameter after another. Raises CheckpointNotFound if a shard is
    missing, UsageError if one is corrupt or of another model.
    """
    folder = Path(checkpoint_dir)
    ranks = saved_ranks(folder, step)
    learning_rates = [group["initial_lr"] for group in optimizer.param_groups]
    device = next(iter(optimizer.names)).device
    path = lambda r: folder / f"optim_{step:06d}_rank{r}.pt"
    try:
        if ranks in (0, world):  # 0: the error names the missing file
            optimizer.load_state_dict(_load(path(rank), device))
        else:
            log0(f"The optimizer's state of {ranks} ranks is shared out among {world}")
            optimizer.load_shards([_load(path(r), "cpu", mapped=True) for r in range(ranks)])
    except (ValueError, KeyError, TypeError, AttributeError) as error:  # the latter two of what is no optimizer's state at all
        reason = f"no {error}" if isinstance(error, KeyError) else error
        raise UsageError(f"the optimizer's state of step {step} in {folder} does not fit this model: {reason}; use another step (chat_sft: --load-optimizer=0), or the flags of then") from error
    for group, learning_rate in zip(optimizer.param_groups, learning_rates, strict=True):
        group["initial_lr"] = learning_rate


def matrix_optimizer(meta: dict) -> str:
    """By what the matrices of the checkpoint's model were updated, for `setup_optimizer`; fine-tunings go on with that of their base model."""
    return meta.get("matrix_optimizer") or meta.get("user_config", {}).get("matrix_optimizer", "muon")


def load_train_state(checkpoint_dir: str | os.PathLike, step: int, rank: int, world: int | None = None) -> dict | None:
    """This rank's data positions and random states, or None for a checkpoint without them (nanochat's own).

    Where another number of ranks has written it, `loader_states` (the positions of the streams rank, rank + world, ...) are dealt anew, and what
    belongs to no stream is the rank's own if there was one, else rank 0's. Raises UsageError if the streams cannot be dealt to so many ranks.
    `world`: None for as many as then.
    """
    folder = Path(checkpoint_dir)
    ranks = saved_ranks(folder, step, "state")
    if not ranks:
        return None
    load = lambda r: _load(folder / f"state_{step:06d}_rank{r}.pt", "cpu")
    if world in (None, ranks):
        return load(rank) if rank < ranks else None
    states = [load(r) for r in range(ranks)]
    mine = states[rank if rank < ranks else 0]
    if "loader_states" not in mine:
        raise UsageError(f"the data positions of step {step} in {folder} are of {ranks} ranks and cannot be shared out among {world}; use {ranks} ranks")
    try:
        by_stream = [position for turn in zip(*(state["loader_states"] for state in states), strict=True) for position in turn]
    except ValueError:
        raise UsageError(f"the ranks' data positions of step {step} in {folder} are of different numbers of streams; use another step") from None
    if len(by_stream) % world:
        raise UsageError(f"the checkpoint of step {step} in {folder} has {len(by_stream)} data streams, which {world} ranks cannot share evenly; "
                         f"use a number of ranks that divides {len(by_stream)}")
    return {**mine, "loader_states": by_stream[rank::world]}


def model_from_config(model_config: dict) -> GPT:
    """An empty model on the meta device. Raises UsageError if the configuration is none of ours."""
    try:
        return empty_gpt(config_from(model_config))
    except Exception as error:  # it can be anything: a size of 0, a missing key, text for a number
        raise UsageError(f"the checkpoint's model_config does not fit this version: {error}") from error


def load_weights(model: GPT, model_data: dict, device) -> None:
    """Moves an empty model to `device` and fills it, strictly; tensors are cast to the model's own storage dtypes.

    Back-fills the residual scalars of older checkpoints. Raises UsageError if keys or shapes differ.
    """
    if not isinstance(model_data, dict):
        raise UsageError(f"the checkpoint's model file holds a {type(model_data).__name__} and no state_dict; use another step")
    model_data = {key.removeprefix("_orig_mod."): value for key, value in model_data.items()}
    n_layer = model.config.n_layer
    model_data.setdefault("resid_lambdas", torch.ones(n_layer))
    model_data.setdefault("x0_lambdas", torch.zeros(n_layer))
    model.to_empty(device=device)
    model.init_buffers()
    try:
        model.load_state_dict(model_data, strict=True)
    except RuntimeError as error:
        lines = [line.strip() for line in str(error).splitlines()[1:]]
        raise UsageError(f"the checkpoint is of another shape than the model: {lines[0]}"
                         + (f" (and {len(lines) - 1} more)" if len(lines) > 1 else "")) from error


def check_tokenizer(tokenizer: RustBPETokenizer, config: GPTConfig, meta: dict) -> None:
    """Raises UsageError if this is not the tokenizer that the model was trained with; nanochat's own checkpoints tell only its size."""
    if tokenizer.get_vocab_size() != config.vocab_size:
        raise UsageError(f"the tokenizer has {tokenizer.get_vocab_size()} tokens, the model {config.vocab_size}: "
                         "use the base directory that the model was trained in")
    if meta.get("tokenizer") not in (None, tokenizer.checksum()):
        raise UsageError(f"the tokenizer in {get_base_dir()} was trained anew since, and its ids mean other texts than the model knows: use the base directory that "
                         "the model was trained in, or bring its tokenizer back (without \"tokenizer\" in the checkpoint's meta file any one is taken)")


def build_model(checkpoint_dir: str | os.PathLike, step: int, device, phase: str):
    """(model, tokenizer, meta) of one step; phase `train` keeps float32 master weights, `eval` stores what inference reads."""
    assert phase in ("train", "eval"), f"unknown phase {phase!r}"
    model_data, _, meta = load_checkpoint(checkpoint_dir, step, device)
    model = model_from_config(meta["model_config"])
    load_weights(model, model_data, device)
    if phase == "eval":
        model.eval()
        model.cast_for_inference()
    else:
        model.train()
    tokenizer = get_tokenizer()
    check_tokenizer(tokenizer, model.config, meta)
    return model, tokenizer, meta


def _folders(checkpoints_dir: str | os.PathLike) -> list[str]:
    folder = Path(checkpoints_dir)
    return sorted(path.name for path in folder.iterdir() if path.is_dir() and not path.name.startswith(".")) if folder.is_dir() else []  # hidden: still being written


def list_models(checkpoints_dir: str | os.PathLike) -> list[str]:
    """Tags of the folders that hold a complete checkpoint; a run that was stopped before its first one leaves no model."""
    return [tag for tag in _folders(checkpoints_dir) if list_steps(Path(checkpoints_dir, tag))]


def list_steps(checkpoint_dir: str | os.PathLike) -> list[int]:
    """Steps of complete checkpoints, ascending."""
    folder = Path(checkpoint_dir)
    names = (re.fullmatch(r"model_(\d+)\.pt", path.name) for path in (folder.iterdir() if folder.is_dir() else ()))
    return sorted(int(name[1]) for name in names if name)


def find_largest_model(checkpoints_dir: str | os.PathLike) -> str:
    """The tag `d<number>...` with the largest number, else the most recently changed. Raises CheckpointNotFound."""
    tags = list_models(checkpoints_dir) or _folders(checkpoints_dir)
    if not tags:
        how = " with python -m scripts.base_train" if Path(checkpoints_dir).name == SOURCES["base"] else ""
        raise CheckpointNotFound(f"no model in {checkpoints_dir}; train one first{how}")
    depths = [(int(match[1]), tag) for tag in tags if (match := re.match(r"d(\d+)", tag))]
    if depths:
        deepest = max(depth for depth, _ in depths)
        return next(tag for depth, tag in depths if depth == deepest)
    return max(tags, key=lambda tag: (Path(checkpoints_dir) / tag).stat().st_mtime)


def find_last_step(checkpoint_dir: str | os.PathLike) -> int:
    """Raises CheckpointNotFound if there is no complete checkpoint."""
    steps = list_steps(checkpoint_dir)
    if not steps:
        raise CheckpointNotFound(f"no checkpoint in {checkpoint_dir}")
    return steps[-1]


def find_checkpoint(checkpoints_dir: str | os.PathLike, model_tag: str | None = None, step: int | None = None) -> tuple[Path, int]:
    """(folder, step) by tag and step; by default the largest model's last step. Says what was chosen, and among what."""
    tags = list_models(checkpoints_dir)
    if model_tag is not None and model_tag not in tags:
        what = "complete checkpoint of the model" if model_tag in _folders(checkpoints_dir) else "model"
        raise CheckpointNotFound(f"no {what} {model_tag!r} in {checkpoints_dir}; there is {', '.join(tags) or 'none'}")
    tag = model_tag if model_tag is not None else find_largest_model(checkpoints_dir)
    folder = Path(checkpoints_dir) / tag
    chosen = find_last_step(folder) if step is None else step
    choices = f" (of {', '.join(tags)}; choose with --model-tag)" if model_tag is None and len(tags) > 1 else ""
    log0(f"Model {tag}{choices}, step {chosen}, from {folder}")
    return folder, chosen


def load_model_from_dir(checkpoints_dir: str | os.PathLike, device, phase: str, model_tag: str | None = None, step: int | None = None):
    """(model, tokenizer, meta); the defaults of `find_checkpoint`."""
    folder, step = find_checkpoint(checkpoints_dir, model_tag, step)
    return build_model(folder, step, device, phase)


def checkpoints_dir_of(source: str) -> str:
    return os.path.join(get_base_dir(), SOURCES[source])


def load_model(source: str, *args, **kwargs):
    """`load_model_from_dir` for a stage of the pipeline: `base`, `mid`, `sft` or `rl`. Raises KeyError for another."""
    return load_model_from_dir(checkpoints_dir_of(source), *args, **kwargs)


def load_optimizer_state(source: str, device, rank: int, model_tag: str | None = None, step: int | None = None) -> dict | None:
    """This rank's optimizer shard, or None (logged) if there is none."""
    folder, step = find_checkpoint(checkpoints_dir_of(source), model_tag, step)
    path = folder / f"optim_{step:06d}_rank{rank}.pt"
    if not path.exists():
        log0(f"No optimizer state at {path}")
        return None
    return _load(path, device)


@dataclass(kw_only=True)
class CheckpointSettings:
    """The flags of commands that use a trained model."""

    source: str | None = flag(None, "Stage of training that the model comes from (default: sft where there is one, else base)", choices=SOURCES, short="-i")
    model_tag: str | None = flag(None, "Model (default: the largest)", type=folder_name, short="-g")
    step: int | None = flag(None, "Its checkpoint (default: the last)", type=non_negative_int, short="-s")

    def find(self) -> tuple[str, Path, int]:
        """(stage, folder, step). Raises CheckpointNotFound."""
        source = self.source or ("sft" if list_models(checkpoints_dir_of("sft")) else "base")
        return source, *find_checkpoint(checkpoints_dir_of(source), self.model_tag, self.step)

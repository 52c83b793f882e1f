"""What a pretraining begins with besides new weights: a checkpoint of its own, the trunk that it branches off, or the weights of another run.

| flag | weights | optimizer | step, data, random states | schedule |
|---|---|---|---|---|
| `--resume`, `--resume-from-step=S` | of the run itself | its own | its own | goes on |
| `--branch-from=TAG@S --warmdown-steps=N` | of the trunk, grown if `--grow-to` says so | the trunk's | the trunk's | the trunk's for `--steady-steps`, then a warm-down of N steps |
| `--init-from=TAG[@S]` | of any run, grown or of nanochat's making too | new, or the run's (`--init-optimizer=keep`) | from the beginning | from the beginning |
"""
import argparse
import functools
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, NamedTuple

from nanochat import checkpoint_manager as checkpoints
from nanochat.cli import UsageError, flag, non_negative_int, positive_float
from nanochat.gpt import GPTConfig
from nanochat.growth.stages import Shape, one_shape


class Checkpoint(NamedTuple):
    """One of a base model, as `TAG@STEP` on the command line; without a step the last one."""

    tag: str
    step: int | None

    def __str__(self) -> str:
        return self.tag if self.step is None else f"{self.tag}@{self.step}"

    @property
    def folder(self) -> Path:
        return Path(checkpoints.checkpoints_dir_of("base"), self.tag)

    def meta(self) -> dict:
        """Raises UsageError where there is no such checkpoint."""
        return _meta(self.folder, self.step)


@functools.lru_cache(maxsize=4)  # it is asked for several times, and says what was found
def _meta(folder: Path, step: int | None) -> dict:
    found, step = checkpoints.find_checkpoint(folder.parent, folder.name, step)
    return checkpoints.load_meta(found, step)


def checkpoint_name(text: str) -> Checkpoint:
    tag, at, step = text.partition("@")
    if not tag or "/" in tag or (at and not step.isdecimal()):
        raise argparse.ArgumentTypeError(f"{text!r} is not a checkpoint; write TAG@STEP, for example d12@3000")
    return Checkpoint(tag, int(step) if at else None)


@dataclass
class OriginSettings:
    """The flags that let a run begin where another one stands."""

    branch_from: Checkpoint | None = flag(None, "Checkpoint TAG@STEP to go on from, with its flags and a schedule of its own", type=checkpoint_name)
    warmdown_steps: int | None = flag(None, "Steps of a branch over which its learning rates fall", type=non_negative_int)
    steady_steps: int = flag(0, "Steps of a branch before that, at the trunk's learning rates", type=non_negative_int)
    steady_rate: float | None = flag(None, "Learning rates and weight decay of a branch until they fall, as a share of the full ones (default: the trunk's where it stands)", type=positive_float)
    grow_to: Shape | None = flag(None, "Shape that a branch grows to before its first step, depth x width [x rank]", type=one_shape)
    init_from: Checkpoint | None = flag(None, "Checkpoint TAG or TAG@STEP whose weights and shape to begin with", type=checkpoint_name)
    init_optimizer: str = flag("new", "Optimizer of --init-from; new: it begins anew, keep: with the checkpoint's moments", choices=("new", "keep"))

    def check_origin(self) -> None:
        """Raises UsageError for flags that contradict each other."""
        if self.branch_from and self.init_from:
            raise UsageError("--branch-from and --init-from both say where to begin; give one of them")
        if self.branch_from and not self.branch_steps:
            raise UsageError("a branch has a length; give --warmdown-steps, --steady-steps or both")
        if not self.branch_from and (self.branch_steps or self.grow_to or self.steady_rate):
            raise UsageError("--warmdown-steps, --steady-steps, --steady-rate and --grow-to are for branches; add --branch-from=TAG@STEP")
        if self.branch_from and self.branch_from.step is None:
            raise UsageError(f"--branch-from={self.branch_from.tag} lacks the step; write {self.branch_from.tag}@STEP")

    def origin_config(self) -> GPTConfig | None:
        """Of the model that the run begins with, where that is a checkpoint's. Raises UsageError where there is none."""
        source = self.branch_from or self.init_from
        return checkpoints.model_from_config(source.meta()["model_config"]).config if source else None

    @property
    def branch_steps(self) -> int:
        return self.steady_steps + (self.warmdown_steps or 0)

    def check_folder(self, folder: Path) -> None:
        """Raises UsageError for a run that would write over the one that it begins with."""
        for source in (self.branch_from, self.init_from):
            if source and source.folder == folder:
                raise UsageError(f"the run would write over {source.tag}, with which it begins; give it a --model-tag of its own")


# flags that a branch does not inherit from its trunk
OWN = {field.name for field in fields(OriginSettings)} | {"run", "device_type", "resume", "resume_from_step", "grow_family", "model_tag", "grow_plan", "memory"}


def inherited(settings: type, meta: dict) -> dict[str, Any]:
    """The flags that a checkpoint was trained with, as defaults of the run that branches off; context and batch as they came to be."""
    known = {field.name for field in fields(settings)} - OWN
    flags = {name: value for name, value in meta.get("user_config", {}).items() if name in known}
    return flags | {"max_seq_len": meta["model_config"]["sequence_len"]} | ({"total_batch_size": meta["total_batch_size"]} if "total_batch_size" in meta else {})


def as_json(value: Any) -> Any:
    """A flag's value, as a checkpoint keeps it."""
    return str(value) if isinstance(value, Checkpoint | Shape) else value


def check_shape(config: GPTConfig, meta: dict) -> None:
    """Raises UsageError where a checkpoint is not of this configuration."""
    then, mine = asdict(checkpoints.model_from_config(meta["model_config"]).config), asdict(config)  # an older one lacks fields that have defaults
    if then != mine:
        differing = ", ".join(f"{key} {_short(then.get(key))} -> {_short(mine.get(key))}" for key in {**mine, **then} if then.get(key) != mine.get(key))
        raise UsageError(f"the checkpoint is of another shape than these flags ask for: {differing}; give the flags of then or another --model-tag, "
                         "or begin a new run with its weights (--init-from)")


def _short(value: Any) -> str:
    return f"{len(value)} layers" if isinstance(value, tuple) else str(value)

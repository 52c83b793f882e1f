"""Exact resume: the checkpoint to go on from, and all that is neither in the model nor in the optimizer."""
import random
from pathlib import Path

import torch

from nanochat import compiler, kernel_choice
from nanochat.checkpoint_manager import list_steps, load_meta
from nanochat.cli import UsageError
from nanochat.common import print0
from nanochat.distributed import check_agreement
from nanochat.run_log import FILENAME, last_of_each_kind, read_run_log
from nanochat.training import RunSettings


def find_resume_step(settings: RunSettings, folder: Path) -> int | None:
    """The step to continue from, or None for a new run. Raises UsageError if the ranks do not see the same checkpoints."""
    if settings.resume_from_step >= 0:
        return settings.resume_from_step
    steps = steps_of_last_run(folder) if settings.resume else list_steps(folder)
    check_agreement(f"the checkpoints in {folder}", steps if settings.resume else None, "all nodes need the same NANOCHAT_BASE_DIR, on a file system that they share")
    if settings.resume and steps:
        return steps[-1]
    if settings.resume and (others := list_steps(folder)):
        raise UsageError(f"the run that {folder / FILENAME} tells of has saved nothing yet, and the checkpoints there are of another one (last step {others[-1]}): "
                         f"go on with that by --resume-from-step={others[-1]}, or begin anew without --resume")
    if settings.resume:
        print0(f"Nothing to resume in {folder}: a new run begins")
    elif steps:
        print0(f"{folder} holds checkpoints of another run (last step {steps[-1]}): this one replaces those of the same steps only; "
               "delete them, or keep both apart with --model-tag")
    return None


def is_left_by(folder: Path, step: int, run_id: str) -> bool:
    """Whether a checkpoint is of that run; also where it is damaged, so that whoever takes it up says so."""
    try:
        return load_meta(folder, step).get("run_id") == run_id
    except UsageError:
        return True


def steps_of_last_run(folder: Path) -> list[int]:
    """Of its checkpoints: later ones may be left of a run that this one has replaced, or of what came after an earlier step that it went back to.

    The log tells which run is the last, and where it began; without one (nanochat's own) all checkpoints are its.
    """
    steps = list_steps(folder)
    try:
        begun = last_of_each_kind(read_run_log(folder / FILENAME))["start"]
        run_id = begun["run_id"]
    except (UsageError, KeyError):
        return steps
    own = [step for step in steps if is_left_by(folder, step, run_id)]
    return own or [step for step in steps if step == begun.get("resumed")]


def check_same(then: dict, now: dict) -> None:
    """Raises UsageError for a checkpoint of other settings than those of now, which the continued run would mix."""
    if differing := [f"{key} {then[key]} -> {value}" for key, value in now.items() if then[key] != value]:
        raise UsageError(f"the checkpoint was written with other settings: {', '.join(differing)}; give those of then, or start a new run")


def get_exact_state(device: torch.device, scaler) -> dict:
    """Random states, the loss scaler's state, and what rounds differently: the kernels, and whether the model is compiled."""
    rng = {"python": list(random.getstate()[1]), "cpu": torch.get_rng_state()}
    if device.type == "cuda":
        rng["cuda"] = torch.cuda.get_rng_state(device)
    return dict(rng=rng, scaler=scaler.state_dict() if scaler else None, kernels=kernel_choice.state(), compiled=compiler.state())


def set_exact_state(state: dict, device: torch.device, scaler) -> None:
    rng = state["rng"]
    random.setstate((3, tuple(rng["python"]), None))
    torch.set_rng_state(rng["cpu"].cpu())
    if device.type == "cuda" and "cuda" in rng:
        torch.cuda.set_rng_state(rng["cuda"].cpu(), device)
    if scaler and state.get("scaler"):
        scaler.load_state_dict(state["scaler"])
    kernel_choice.restore(state.get("kernels"))

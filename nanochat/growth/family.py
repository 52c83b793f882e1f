"""One run for a family of sizes (--grow-family): a trunk at a constant rate grows from size to size, and of each size a branch off it is finished.

    trunk     4x64 ───────●─── 4x96 ──────●─── 4x128 ──────●
                           ╲ warm-down     ╲                ╲
    finished               4x64            4x96             4x128

The trunk pays for every size up to its growth once; a run of its own for each would pay for all of them again. --warmdown-ratio is the share of a member's FLOPs,
the trunk's included, over which its rates fall, as it is in any other run.
"""
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from nanochat import checkpoint_manager as checkpoints
from nanochat.common import print0
from nanochat.growth.stages import describe
from nanochat.origin import Checkpoint


def trunk(settings: Any) -> Any:
    """base_train's settings of the trunk of a family that `settings` ask for."""
    return replace(settings, warmdown_ratio=0.0, grow_budget=settings.grow_budget * (1 - settings.warmdown_ratio), grow_family=False)


def branches(settings: Any, folder: Path, last: int) -> Iterator[Any]:
    """Those of a branch for each size of the trunk in `folder`, which ended at step `last`. One that an interrupted run has finished is left out with `resume`."""
    decay = settings.warmdown_ratio
    for step in [*(growth["step"] for growth in checkpoints.load_meta(folder, last)["growth"]), last]:
        meta = checkpoints.load_meta(folder, step)
        model = checkpoints.model_from_config(meta["model_config"])
        steps = max(1, round(meta["loop_state"]["flops"] * decay / (1 - decay) / (model.estimate_flops() * meta["total_batch_size"])))
        tag = f"{folder.name}-{describe(model.config)}"
        if settings.resume and step + steps in checkpoints.list_steps(folder.parent / tag):
            print0(f"{tag} is finished")
        else:
            yield replace(settings, branch_from=Checkpoint(folder.name, step), init_from=None, warmdown_steps=steps, total_batch_size=meta["total_batch_size"],
                          model_tag=tag, grow_family=False, resume_from_step=-1)

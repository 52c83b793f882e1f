"""Ranks of a test, each a process of its own. They are copies of one that has imported PyTorch once; torchrun, which imports it for itself and for each, is tried by the tests of whole runs."""
import multiprocessing
import multiprocessing.connection
import os
import traceback
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist

PROCESSES = multiprocessing.get_context("forkserver")
PROCESSES.set_forkserver_preload(["analysis.runner", "scripts.base_train", "torch._dynamo"])


def on_ranks(world: int, folder: Path, work: Callable, *args) -> None:
    """Calls `work(*args)`, a function of a module, on all ranks of a gloo group. folder: an empty one. Fails where a rank does, with its traceback."""
    ranks = [PROCESSES.Process(target=_rank, args=(rank, world, str(folder), work, args)) for rank in range(world)]
    for process in ranks:
        process.start()
    waiting = list(ranks)
    while waiting:
        multiprocessing.connection.wait([process.sentinel for process in waiting])
        waiting = [process for process in waiting if process.is_alive()]
        if any(process.exitcode for process in ranks):  # the others would wait for it
            for process in waiting:
                process.kill()
    for process in ranks:
        process.join()
    said = [path.read_text() for path in sorted(folder.glob("rank*.txt"))]
    assert not any(process.exitcode for process in ranks), "\n".join([f"exit codes {[process.exitcode for process in ranks]}", *said])


def _rank(rank: int, world: int, folder: str, work: Callable, args: tuple) -> None:
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world)}
    torch.set_num_threads(1)
    try:
        dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=world)
        work(*args)
        dist.destroy_process_group()
    except BaseException:
        Path(folder, f"rank{rank}.txt").write_text(traceback.format_exc())
        raise

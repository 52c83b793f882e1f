"""What this process may use of the machine: CPUs, threads, memory; less than there is in a container or where a job's control group says so."""
import contextlib
import ctypes
import os
from collections.abc import Iterator
from pathlib import Path

import psutil
import torch


def keep_freed_memory() -> None:
    """Tells glibc to keep freed memory. Otherwise every large tensor is mapped anew, and its page faults take 10 % of a CPU's step."""
    try:
        mallopt = ctypes.CDLL("libc.so.6").mallopt
    except (OSError, AttributeError):  # another C library
        return
    M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # malloc.h
    mallopt(M_MMAP_MAX, 0)
    mallopt(M_TRIM_THRESHOLD, -1)


def usable_cpus() -> int:
    """CPUs that this process may use at once: those it is bound to, and no more than its container's quota of CPU time."""
    cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    for files in [*control_groups("", "cpu.max"), *control_groups("cpu", "cpu.cfs_quota_us", "cpu.cfs_period_us")]:
        with contextlib.suppress(ValueError):  # "max"
            quota, period = map(int, " ".join(files).split())
            if quota > 0:
                cpus = min(cpus, max(1, quota // period))
    return cpus


def control_groups(controller: str, *names: str) -> Iterator[list[str]]:
    """What the files of these names hold in the control group of this process and in those above it, which limit it too.

    controller: of cgroup 1 (`cpu`, `memory`), empty for cgroup 2.
    """
    root = Path("/sys/fs/cgroup", controller)
    try:
        lines = [line.split(":", 2) for line in Path("/proc/self/cgroup").read_text().splitlines()]
    except OSError:  # no Linux
        return
    for _, controllers, path in (line for line in lines if len(line) == 3):
        if controller in controllers.split(","):
            folder = root / path.strip("/")
            for group in (folder, *folder.parents):
                with contextlib.suppress(OSError, UnicodeDecodeError):  # the container's own group may be mounted as the root
                    yield [(group / name).read_text() for name in names]
                if group == root:
                    break


def memory_limit() -> int:
    """Bytes that this process and those in its container may take in all: the machine's memory, or less where a control group limits it."""
    return min([psutil.virtual_memory().total, *(limit for limit, _ in _group_memory())])


def free_memory() -> int:
    """Bytes that can still be taken."""
    return max(0, min([psutil.virtual_memory().available, *(limit - taken for limit, taken in _group_memory())]))


def _group_memory() -> Iterator[tuple[int, int]]:
    """Of each control group that has a limit that limit in bytes, and what is taken of it; files that are only cached do not count."""
    for controller, *names, cached in (("", "memory.max", "memory.current", "memory.stat", "inactive_file"),
                                       ("memory", "memory.limit_in_bytes", "memory.usage_in_bytes", "memory.stat", "total_inactive_file")):
        for limit, taken, stat in control_groups(controller, *names):
            with contextlib.suppress(ValueError):  # "max"
                known = dict(line.split() for line in stat.splitlines())
                yield int(limit), int(taken) - int(known.get(cached, 0))


def openmp_threads() -> int:
    """Threads that OMP_NUM_THREADS asks for, of nested levels the outermost; 0 where it says nothing that OpenMP would follow."""
    first = os.environ.get("OMP_NUM_THREADS", "").partition(",")[0].strip()
    return int(first) if first.isdecimal() else 0


def limit_threads() -> None:
    """No more threads than CPUs: PyTorch starts one for each core it sees, also where a container may use only a few of them, and then each
    operation waits for threads that do not run. OMP_NUM_THREADS has the last word."""
    if "OMP_NUM_THREADS" not in os.environ and torch.get_num_threads() > usable_cpus():
        torch.set_num_threads(usable_cpus())

"""CPUs, threads and memory that a process may use, also where a container or a job has less than the machine."""
from types import SimpleNamespace

import pytest
import torch

from nanochat import batching, resources
from nanochat.gpt import GPT, GPTConfig

GIB = 2 ** 30


@pytest.fixture
def files(monkeypatch):
    """Of a machine with 64 CPUs and 512 GiB: what stands in the files of /proc and /sys."""
    found: dict[str, str] = {}

    def read_text(path):
        if str(path) not in found:
            raise FileNotFoundError(path)
        return found[str(path)]

    monkeypatch.setattr(resources.Path, "read_text", read_text)
    monkeypatch.setattr(resources.os, "sched_getaffinity", lambda pid: set(range(64)), raising=False)
    monkeypatch.setattr(resources.psutil, "virtual_memory", lambda: SimpleNamespace(total=512 * GIB, available=400 * GIB))
    return found


def test_threads_of_a_container(monkeypatch, tmp_path):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    counts = []
    monkeypatch.setattr(torch, "set_num_threads", counts.append)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 64)
    monkeypatch.setattr(resources, "usable_cpus", lambda: 2)
    resources.limit_threads()
    assert counts == [2]
    monkeypatch.setenv("OMP_NUM_THREADS", "64")
    resources.limit_threads()
    assert counts == [2], "who sets the variable knows better"
    monkeypatch.delenv("OMP_NUM_THREADS")
    monkeypatch.setattr(resources, "usable_cpus", lambda: 128)  # hyper-threads: PyTorch counts cores
    resources.limit_threads()
    assert counts == [2]


@pytest.mark.parametrize("number, threads", [("", 0), ("3", 3), ("4,2", 4), ("abc", 0), ("-3", 0), ("0", 0)])
def test_what_openmp_is_asked_for(monkeypatch, number, threads):
    monkeypatch.setenv("OMP_NUM_THREADS", number)
    assert resources.openmp_threads() == threads


TWO, ONE = "/sys/fs/cgroup", "/sys/fs/cgroup/cpu"


@pytest.mark.parametrize("group, limits, cpus", [
    ("", {}, 64), ("0::/", {f"{TWO}/cpu.max": "max 100000"}, 64), ("0::/", {f"{TWO}/cpu.max": "250000 100000"}, 2), ("0::/", {f"{TWO}/cpu.max": "50000 100000"}, 1),
    ("0::/job/step", {f"{TWO}/job/step/cpu.max": "max 100000", f"{TWO}/job/cpu.max": "300000 100000", f"{TWO}/cpu.max": "900000 100000"}, 3),
    ("0::/of/the/host", {f"{TWO}/cpu.max": "200000 100000"}, 2), ("0::/../..", {f"{TWO}/cpu.max": "200000 100000"}, 2),
    ("4:cpu,cpuacct:/\n0::/", {f"{ONE}/cpu.cfs_quota_us": "-1", f"{ONE}/cpu.cfs_period_us": "100000"}, 64),
    ("4:cpu,cpuacct:/job\n0::/", {f"{ONE}/job/cpu.cfs_quota_us": "400000", f"{ONE}/job/cpu.cfs_period_us": "100000"}, 4)])
def test_cpus_of_control_groups(files, group, limits, cpus):
    files |= {"/proc/self/cgroup": group} | limits
    assert resources.usable_cpus() == cpus


@pytest.mark.parametrize("group, limits, limit, free", [
    ("", {}, 512, 400), ("0::/", {f"{TWO}/memory.max": "max", f"{TWO}/memory.current": "5", f"{TWO}/memory.stat": ""}, 512, 400),
    ("0::/job", {f"{TWO}/job/memory.max": str(4 * GIB), f"{TWO}/job/memory.current": str(3 * GIB), f"{TWO}/job/memory.stat": f"anon {GIB}\ninactive_file {2 * GIB}\n"}, 4, 3),
    ("0::/job/step", {f"{TWO}/job/step/memory.max": str(8 * GIB), f"{TWO}/job/step/memory.current": str(GIB), f"{TWO}/job/step/memory.stat": "",
                      f"{TWO}/job/memory.max": str(10 * GIB), f"{TWO}/job/memory.current": str(10 * GIB), f"{TWO}/job/memory.stat": ""}, 8, 0),
    ("9:memory:/box", {"/sys/fs/cgroup/memory/memory.limit_in_bytes": str(8 * GIB), "/sys/fs/cgroup/memory/memory.usage_in_bytes": str(2 * GIB),
                       "/sys/fs/cgroup/memory/memory.stat": "cache 5"}, 8, 6)])
def test_memory_of_control_groups(files, group, limits, limit, free):
    files |= {"/proc/self/cgroup": group} | limits
    assert (resources.memory_limit() / GIB, resources.free_memory() / GIB) == (limit, free)


def test_a_server_in_a_container_takes_a_quarter_of_what_is_free_there(files):
    model = GPT(GPTConfig(sequence_len=64, vocab_size=64, n_layer=2, n_head=2, n_kv_head=2, n_embd=64, window_pattern="L"))
    row = model.kv_bytes_per_token() * 64
    assert batching.slots_for(model) == 64
    files |= {"/proc/self/cgroup": "0::/", f"{TWO}/memory.max": str(48 * row), f"{TWO}/memory.current": str(8 * row), f"{TWO}/memory.stat": ""}
    assert batching.slots_for(model) == 10

"""Every test runs in float32, eagerly, with the same kernels everywhere, on one thread per process (unless OMP_NUM_THREADS says more) and in a
base directory of its own.

Tests of other dtypes, of torch.compile and of torchrun start real processes with their own environment.
"""
import atexit
import gc
import os
import shutil
import tempfile


def own_folder(name: str) -> str:
    """Gone with this process."""
    folder = tempfile.mkdtemp(prefix=f"nanochat-tests-{name}")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["NANOCHAT_DTYPE"] = "float32"
os.environ["TORCHDYNAMO_DISABLE"] = "1"
os.environ["NANOCHAT_KERNELS"] = "attention=torch,window=blocked,backward=torch,long-backward=torch,decode=torch,position=matrix"  # not what a stopwatch says; tests of the others ask for them
os.environ["WANDB_MODE"] = "disabled"
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_MODULES_CACHE"] = own_folder("modules-")  # code that an exported model brings along
os.environ["NANOCHAT_BASE_DIR"] = own_folder("")
# kept from one call to the next, for each instruction set by itself: code for other registers fails or errs
os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", os.path.join(tempfile.gettempdir(), f"nanochat-tests-compiled-{os.getuid() if hasattr(os, 'getuid') else 0}-{os.environ.get('ATEN_CPU_CAPABILITY', 'best')}"))
for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE"):
    os.environ.pop(name, None)

from types import SimpleNamespace  # noqa: E402

import hypothesis  # noqa: E402
import pytest  # noqa: E402
import torch  # noqa: E402

# the same examples in every run; `--hypothesis-seed=random` looks for new ones
hypothesis.settings.register_profile("repeatable", derandomize=True, deadline=None, database=None)
hypothesis.settings.load_profile("repeatable")


def pytest_configure(config):
    os.environ["NANOCHAT_TESTS_FAST"] = "1" if config.option.markexpr == "not slow" else ""  # for tests/examples.py


def pytest_collection_modifyitems(items):
    items.sort(key=lambda item: item.path.name != "test_ui.py")  # xdist shares out what is left of the end, and each worker would start a server and a browser of its own


@pytest.fixture(autouse=True, scope="session")
def quick():
    """Runs in this process leave the garbage collector alone. To them the process is theirs, but here it holds all of pytest and every test's modules: each of
    their collections takes half a second, and a run that ends early leaves the collector off. Runs in processes of their own do it all."""
    gc.collect()
    gc.freeze()  # what is here now stays: Python's own collections need not look at it
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("nanochat.train_loop.collect_garbage_rarely", lambda step, first_step: None)
        patch.setattr("nanochat.train_loop.gc", SimpleNamespace(unfreeze=lambda: None, enable=lambda: None))
        patch.setattr("nanochat.growth.controller.gc", SimpleNamespace(collect=lambda: 0, unfreeze=lambda: None))
        patch.setattr("nanochat.accumulation.gc", SimpleNamespace(collect=lambda: 0))
        patch.setattr("nanochat.drawing.DPI", 40)  # nobody looks at them
        yield


@pytest.fixture(autouse=True)
def same_numbers():
    """What a test draws does not depend on those before it."""
    torch.manual_seed(0)


@pytest.fixture
def base_dir(tmp_path, monkeypatch):
    """A fresh, empty NANOCHAT_BASE_DIR."""
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path))
    return tmp_path


@pytest.fixture(scope="session")
def finished_run(tmp_path_factory):
    """The base directory of a tiny run that nobody interrupted, with checkpoints of steps 4 and 8; not to be written to."""
    from tests import tiny
    directory = tmp_path_factory.mktemp("finished")
    tiny.train_apart(directory)
    return directory

"""What is exported: a checkpoint of this project, or a folder of an earlier export. And folders that are whole or not there at all."""
import contextlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from nanochat import checkpoint_manager as checkpoints
from nanochat.cli import UsageError
from nanochat.files import current_umask
from nanochat.gpt import GPT, GPTConfig
from nanochat.tokenizer import RustBPETokenizer, get_tokenizer


@dataclass
class Subject:
    """state: the parameters with the dtypes of the file. meta: as in a checkpoint, with step and model_config. source: base, sft, ..."""

    name: str
    source: str
    config: GPTConfig
    state: dict[str, torch.Tensor]
    tokenizer: RustBPETokenizer
    meta: dict

    @property
    def step(self) -> int:
        return self.meta.get("step", 0)

    def model(self) -> GPT:
        """Ready to compute with, in the compute dtype of this process."""
        model = checkpoints.model_from_config(self.meta["model_config"])
        checkpoints.load_weights(model, dict(self.state), "cpu")
        return model.eval()


def from_checkpoint(source: str, model_tag: str | None, step: int | None) -> Subject:
    """Raises UsageError where there is no such checkpoint, or its tokenizer is another one."""
    folder, step = checkpoints.find_checkpoint(checkpoints.checkpoints_dir_of(source), model_tag, step)
    state, _, meta = checkpoints.load_checkpoint(folder, step, "cpu")
    model = checkpoints.model_from_config(meta["model_config"])
    checkpoints.load_weights(model, dict(state), "cpu")  # is checked, and completes what older checkpoints lack
    tokenizer = get_tokenizer()
    checkpoints.check_tokenizer(tokenizer, model.config, meta)
    state = {key.removeprefix("_orig_mod."): value for key, value in state.items()}
    state = {key: state.get(key, value) for key, value in model.state_dict().items()}
    return Subject(folder.name, source, model.config, state, tokenizer, {**meta, "step": step})  # nanochat's RL checkpoints do not say their step


@contextlib.contextmanager
def optional_packages() -> Iterator[None]:
    """Around imports of what only exports need. Raises UsageError that names a missing one."""
    try:
        yield
    except ImportError as error:
        raise UsageError(f"this format needs a package that is not installed ({error.name}): pip install -e '.[export]'") from error


def check_free(folder: Path) -> None:
    if folder.exists() or folder.is_symlink():
        raise UsageError(f"{folder} exists already and is not overwritten; choose another --out, or remove it")


@contextlib.contextmanager
def new_folder(folder: Path) -> Iterator[Path]:
    """Yields an empty folder that becomes `folder` once all is written, and disappears where something fails. Raises UsageError for one that exists."""
    check_free(folder)
    try:
        folder.absolute().parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(dir=folder.absolute().parent, prefix=f".{folder.name}."))
    except OSError as error:
        raise UsageError(f"cannot write to {folder.absolute().parent} ({error.strerror}); choose another --out") from error
    try:
        yield temporary
        umask = current_umask()
        for path in (temporary, *temporary.rglob("*")):  # mkdtemp and safetensors make theirs private to the user
            path.chmod((0o777 if path.is_dir() else 0o666) & ~umask)
        check_free(folder)  # nobody was faster
        os.rename(temporary, folder)
    except OSError as error:
        raise UsageError(f"cannot write {folder} ({error.strerror or error}); make room or choose another --out") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)

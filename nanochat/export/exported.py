"""What is exported: a checkpoint of this project, or a folder of an earlier export."""
import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from nanochat import checkpoint_manager as checkpoints
from nanochat.cli import UsageError
from nanochat.gpt import GPT, GPTConfig
from nanochat.tokenizer import RustBPETokenizer, get_tokenizer


@dataclass
class Exported:
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


def from_checkpoint(source: str, folder: Path, step: int) -> Exported:
    """Raises UsageError where there is no such checkpoint, its model has no layers yet, or its tokenizer is another one."""
    state, _, meta = checkpoints.load_checkpoint(folder, step, "cpu")
    model = checkpoints.model_from_config(meta["model_config"])
    checkpoints.load_weights(model, dict(state), "cpu")  # is checked, and completes what older checkpoints lack
    if not model.config.n_layer:
        raise UsageError(f"{folder.name} has no layers at step {step}, and a model without layers is not exported; take a checkpoint of a later stage")
    tokenizer = get_tokenizer()
    checkpoints.check_tokenizer(tokenizer, model.config, meta)
    state = {key.removeprefix("_orig_mod."): value for key, value in state.items()}
    state = {key: state.get(key, value) for key, value in model.state_dict().items()}
    return Exported(folder.name, source, model.config, state, tokenizer, {**meta, "step": step})  # nanochat's RL checkpoints do not say their step


@contextlib.contextmanager
def optional_packages() -> Iterator[None]:
    """Around imports of what only exports need. Raises UsageError that names a missing one."""
    try:
        yield
    except ImportError as error:
        raise UsageError(f"this format needs a package that is not installed ({error.name}): pip install -e '.[export]'") from error

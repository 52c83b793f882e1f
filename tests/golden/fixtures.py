"""How the golden files are read: numbers measured on nanochat (head 92d63d4), inputs rebuilt from seeds by inputs.py."""
import json
from pathlib import Path

import numpy as np
import torch

from tests.golden import inputs

HERE = Path(__file__).parent


def load(name: str) -> dict:
    return json.loads((HERE / f"{name}.json").read_text(encoding="utf-8"))


def arrays(name: str):
    return np.load(HERE / f"{name}.npz")


def tensor(array) -> torch.Tensor:
    return torch.from_numpy(np.ascontiguousarray(array))


def build_model(config: dict, seed: int, pad_vocab_size_to: int = 64):
    """The stock GPT on the CPU with the fixture's numpy weights."""
    from nanochat.gpt import GPT, GPTConfig
    with torch.device("meta"):
        model = GPT(GPTConfig(**config), pad_vocab_size_to=pad_vocab_size_to)
    model.to_empty(device="cpu")
    model.init_weights()
    state = model.state_dict()
    values = inputs.weights({key: tuple(value.shape) for key, value in state.items()}, seed, config["n_embd"])
    with torch.no_grad():
        for key, value in state.items():
            value.copy_(torch.from_numpy(values[key]))
    return model


def batch(*args, **kwargs) -> tuple[torch.Tensor, torch.Tensor]:
    idx, targets = inputs.batch(*args, **kwargs)
    return tensor(idx), tensor(targets)


def tokenizer_from(ranks_hex: list[str]):
    """A RustBPETokenizer from the fixture's tokens in rank order."""
    import tiktoken

    from nanochat.tokenizer import SPECIAL_TOKENS, SPLIT_PATTERN, RustBPETokenizer
    ranks = {bytes.fromhex(token): rank for rank, token in enumerate(ranks_hex)}
    special = {name: len(ranks) + i for i, name in enumerate(SPECIAL_TOKENS)}
    encoding = tiktoken.Encoding(name="golden", pat_str=SPLIT_PATTERN, mergeable_ranks=ranks, special_tokens=special)
    return RustBPETokenizer(encoding, "<|bos|>")


def tokenizer_512():
    return tokenizer_from(load("tokenizer")["ranks_hex"])


class TableModel:
    """Returns row `table[token]` as logits. `max_seq_len`, where given, makes CORE crop from the left."""

    def __init__(self, table: np.ndarray, max_seq_len: int | None = None):
        self.table = tensor(table)
        if max_seq_len:
            self.max_seq_len = max_seq_len

    def get_device(self):
        return torch.device("cpu")

    def __call__(self, idx, targets=None, loss_reduction="mean"):
        logits = self.table[idx.long()]
        if targets is None:
            return logits
        return torch.nn.functional.cross_entropy(logits.view(-1, logits.shape[-1]), targets.view(-1), ignore_index=-1, reduction=loss_reduction)

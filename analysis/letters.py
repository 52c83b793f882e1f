"""Two tasks on strings of 20 letters, and one training of a small model on one of them, which may grow on the way.

* `counting`: at each position, how often its letter came before in the string: never, once, or twice and more (3 classes). Score: the share of
  positions that are right.
* `language`: at each position, the next letter. Score: the loss in bits per character.

Letters are text8's 27 symbols: a to z and the space; digits are spelled out, all else is a space, and spaces do not repeat. The model is a causal `LayeredGPT` of one
layer, whose head has 27 outputs; the classes of `counting` are the first three.
"""
import contextlib
import functools
import hashlib
import math
import re
from collections.abc import Iterable
from dataclasses import dataclass, replace

import numpy as np
import torch

from nanochat.cli import UsageError
from nanochat.dataset import parquets_iter_batched
from nanochat.gpt import GPT
from nanochat.growth import grow, grown_config
from nanochat.layered_gpt import LayeredGPTConfig, LayerSpec, build_gpt
from nanochat.optim import MuonAdamW

LENGTH = 20  # of a string
SYMBOLS = " abcdefghijklmnopqrstuvwxyz"
DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
BATCH = 16  # strings
LETTERS = 1_000_000  # of each split that are read at most
TEST = 500  # strings to tune on, and as many others to judge by
TASKS = ("counting", "language")
BETTER = {"counting": 1, "language": -1}  # the sign of a better score


# -----------------------------------------------------------------------------
# Text


def in_letters(text: str) -> str:
    """The text in text8's alphabet, with one space at most in a row."""
    spelled = re.sub("[0-9]", lambda digit: f" {DIGITS[int(digit[0])]} ", text.lower())
    return re.sub("[^a-z]+", " ", spelled)


def letters_of(texts: Iterable[str], most: int = LETTERS) -> np.ndarray:
    """The first letters of the texts as numbers of `SYMBOLS`, int64 (N,) with N <= most."""
    parts, length = [], 0
    for text in texts:
        parts.append(in_letters(text + " "))
        length += len(parts[-1])
        if length >= most:
            break
    codes = np.frombuffer(re.sub(" +", " ", "".join(parts)).encode(), dtype=np.uint8)[:most]
    return np.where(codes == ord(" "), 0, codes - ord("a") + 1).astype(np.int64)


@dataclass
class Text:
    """train: letters, (N,). validation and test: strings of LENGTH + 1 letters, (TEST, LENGTH + 1) each."""

    train: np.ndarray
    validation: np.ndarray
    test: np.ndarray

    @classmethod
    def of_base_dir(cls) -> "Text":
        """Of the data directory. Raises UsageError where there is none, or too little."""
        train, held_out = (letters_of(text for texts in parquets_iter_batched(split) for text in texts) for split in ("train", "val"))
        strings = held_out[:len(held_out) // (LENGTH + 1) * (LENGTH + 1)].reshape(-1, LENGTH + 1)
        if len(strings) < 2 * TEST or len(train) < 100 * LENGTH:
            raise UsageError(f"the text has {len(train):,} letters for training and {len(held_out):,} for validation, too few; "
                             "get more: python -m nanochat.dataset --source=text8 --force, or --source=stdlib, which needs no network")
        strings = np.random.default_rng(0).permutation(strings)[:2 * TEST]
        return cls(train, strings[:TEST], strings[TEST:])

    @functools.cached_property
    def name(self) -> str:
        """Other letters, another name."""
        return hashlib.sha256(b"".join(part.tobytes() for part in (self.train, self.validation, self.test))).hexdigest()[:12]

    def draw(self, count: int, generator: np.random.Generator) -> np.ndarray:
        """So many strings of the training text, from anywhere in it: (count, LENGTH + 1)."""
        starts = generator.integers(len(self.train) - LENGTH, size=count)
        return self.train[starts[:, None] + np.arange(LENGTH + 1)]


def seen_before(strings: np.ndarray) -> np.ndarray:
    """(B, T) letters -> (B, T) classes: 0, 1 or 2 for letters that came never, once, or twice and more before in their string."""
    same = strings[:, :, None] == strings[:, None, :]
    return np.minimum(np.tril(same, -1).sum(-1), 2)


def examples(task: str, strings: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
    """(B, LENGTH + 1) letters -> inputs and targets of the model, (B, LENGTH) each."""
    inputs = strings[:, :-1]
    return torch.from_numpy(inputs.copy()), torch.from_numpy(seen_before(inputs) if task == "counting" else strings[:, 1:].copy())


# -----------------------------------------------------------------------------
# Training


@dataclass(frozen=True)
class Arm:
    """A way to a model of width n: plain from the beginning, with so many heads, or grown from n/2 by a width mode, whereby its one head becomes two."""

    heads: int = 2
    identity: bool = False  # do its matrices begin as identities?
    mode: str = ""


ARMS = {
    "plain": Arm(heads=1),
    "plain-2-heads": Arm(),
    "plain-identity": Arm(identity=True),
    "lossless": Arm(mode="lossless"),
    "bus": Arm(mode="bus"),  # at a doubling it is the same as hyperclone
    "identity": Arm(mode="identity"),
}


@dataclass(frozen=True)
class Run:
    """One training: all that decides its outcome on one machine."""

    task: str
    text: str  # the name of the one that is in use
    arm: str
    width: int
    rate: float  # of AdamW: a matrix with C columns learns at rate / sqrt(C), embedding and head at rate / sqrt(width / 768)
    seed: int
    strings: int  # an epoch
    epochs: int
    before: int  # of them before the growth; all of them: it does not grow


@dataclass
class Outcome:
    """Scores are shares that are right or bits per character, by the task; FLOPs are those of training."""

    run: Run
    validation: float
    test: float
    flops: float
    begin: float | None = None  # score on the test strings right before the growth
    grown: float | None = None  # and right after it


def new_model(width: int, heads: int, seed: int, identity: bool = False) -> GPT:
    spec = LayerSpec(n_head=heads, n_kv_head=heads, head_dim=width // heads, qk_dim=width // heads, mlp_hidden=2 * width)
    config = LayeredGPTConfig(sequence_len=LENGTH, vocab_size=len(SYMBOLS), n_layer=1, n_head=heads, n_kv_head=heads, n_embd=width, layers=(spec,))
    with torch.device("meta"):
        model = build_gpt(config, 32)
    model.to_empty(device="cpu")
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        model.init_weights()
    for weight in model.transformer.h.parameters() if identity else ():  # repeated where it is not square, as the growth by `identity` does
        rows, columns = (torch.arange(size) % min(weight.shape) for size in weight.shape)
        weight.data.copy_(rows[:, None] == columns)
    return model


@torch.inference_mode()
def score(model: GPT, task: str, strings: np.ndarray) -> float:
    inputs, targets = examples(task, strings)
    if task == "counting":
        return (model(inputs)[..., :3].argmax(-1) == targets).float().mean().item()
    return model(inputs, targets).item() / math.log(2)


class Training:
    """A model, its optimizer, and what they have cost. Every run of a seed sees the same strings in the same order."""

    def __init__(self, run: Run, model: GPT, optimizer: MuonAdamW, flops: float = 0.0):
        self.run, self.model, self.optimizer, self.flops = run, model, optimizer, flops

    @classmethod
    def new(cls, run: Run, width: int, heads: int, identity: bool = False) -> "Training":
        model = new_model(width, heads, run.seed, identity)
        with contextlib.redirect_stdout(None):  # it says how it scales the rates
            return cls(run, model, model.setup_optimizer(**rates(run.rate)))

    def through(self, text: Text, epochs: Iterable[int]) -> "Training":
        for epoch in epochs:
            strings = text.draw(self.run.strings, np.random.default_rng([self.run.seed, epoch]))
            for start in range(0, len(strings), BATCH):
                self.model(*examples(self.run.task, strings[start:start + BATCH])).backward()
                self.optimizer.step()
                self.model.zero_grad(set_to_none=True)
            self.flops += self.model.estimate_flops() * strings[:, 1:].size
        return self

    def grown(self, width: int, mode: str) -> "Training":
        with contextlib.redirect_stdout(None):
            model, optimizer = grow(self.model, grown_config(self.model.config, n_embd=width), self.optimizer, mode=mode,
                                    setup=rates(self.run.rate), generator=torch.Generator().manual_seed(self.run.seed))
        assert optimizer is not None
        return Training(self.run, model, optimizer, self.flops)


def rates(rate: float) -> dict:
    return dict(unembedding_lr=rate, embedding_lr=rate, scalar_lr=rate, matrix_lr=rate, matrix_optimizer="adamw")


@functools.lru_cache(maxsize=1)
def small(run: Run) -> Training:
    """A small model before its growth, which several arms share."""
    return Training.new(run, run.width, 1).through(_text, range(run.epochs))


_text: Text  # of this process


def use(text: Text) -> None:
    """The text of all runs of this process from now on."""
    global _text
    _text = text
    small.cache_clear()


def finish(run: Run) -> Outcome:
    """Trains."""
    assert run.text == _text.name
    arm = ARMS[run.arm]
    begin = grown = None
    if arm.mode:
        shared = small(replace(run, arm="", width=run.width // 2, epochs=run.before))
        begin = score(shared.model, run.task, _text.test)
        training = shared.grown(run.width if run.before < run.epochs else run.width // 2, arm.mode)  # to its own width: a copy
        grown = score(training.model, run.task, _text.test)
        training.through(_text, range(run.before, run.epochs))
    else:
        training = Training.new(run, run.width, arm.heads, arm.identity).through(_text, range(run.epochs))
    return Outcome(run, score(training.model, run.task, _text.validation), score(training.model, run.task, _text.test), training.flops, begin, grown)

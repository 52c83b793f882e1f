"""Two tasks on strings of 20 letters, and one training of a small model on one of them, which may grow on the way.

* `counting`: at each position, how often its letter came before in the string: never, once, or twice and more (3 classes). Score: the share of
  positions that are right.
* `language`: at each position, the next letter. Score: the loss in bits per character.

Letters are text8's 27 symbols: a to z and the space; digits are spelled out, all else is a space, and spaces do not repeat. The model is a causal
`LayeredGPT` of one layer, whose head has 27 outputs; the classes of `counting` are the first three.
"""
import contextlib
import copy
import dataclasses
import functools
import hashlib
import math
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F

from nanochat.cli import UsageError
from nanochat.dataset import parquets_iter_batched
from nanochat.gpt import GPT
from nanochat.growth import grow, grown_config
from nanochat.layered_gpt import LayeredGPTConfig, LayerSpec, empty_gpt
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
    "plain-identity-1-head": Arm(heads=1, identity=True),
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
    model = empty_gpt(config, 32)
    model.to_empty(device="cpu")
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        model.init_weights()
    for weight in model.transformer.h.parameters() if identity else ():  # repeated where it is not square, as the growth by `identity` does
        rows, columns = (torch.arange(size) % min(weight.shape) for size in weight.shape)
        weight.data.copy_(rows[:, None] == columns)
    return model


def rates(rate: float) -> dict:
    return dict(unembedding_lr=rate, embedding_lr=rate, scalar_lr=rate, matrix_lr=rate, matrix_optimizer="adamw")


def optimizer_of(model: GPT, rate: float) -> MuonAdamW:
    with contextlib.redirect_stdout(None):  # it says how it scales the rates
        return model.setup_optimizer(**rates(rate))


def attend(q_BTHD: torch.Tensor, k_BTHD: torch.Tensor, v_BTHD: torch.Tensor, window_size, kv_cache) -> torch.Tensor:
    """Causal attention in operators that can be batched once more."""
    hidden = torch.ones(q_BTHD.size(1), k_BTHD.size(1), dtype=torch.bool).triu(1)
    scores_BHTT = (q_BTHD.transpose(1, 2) @ k_BTHD.permute(0, 2, 3, 1)) * q_BTHD.size(-1) ** -0.5
    return (scores_BHTT.masked_fill(hidden, -torch.inf).softmax(-1) @ v_BTHD.transpose(1, 2)).transpose(1, 2)


class Models:
    """S models of one shape, trained side by side, each as it would be by itself: their parameters are stacked, (S, ...), and each has its own strings.

    Such small models wait for Python: five take twice the time of one. The project's own attention and loss cannot be batched so; plain ones take their place.
    """

    def __init__(self, models: Sequence[GPT], optimizers: Sequence[MuonAdamW]):
        first = models[0]
        for block in first.transformer.h:
            block.attn.attend = attend
        named, self.module, self.flops = [dict(model.named_parameters()) for model in models], first, first.estimate_flops()
        self.parameters = {name: torch.stack([parameters[name].detach() for parameters in named]).requires_grad_() for name in named[0]}
        groups = [{**group, "params": [self.parameters[optimizers[0].names[p]] for p in group["params"]]} for group in optimizers[0].param_groups]
        self.optimizer = MuonAdamW(groups, self.parameters.items())
        states = [optimizer.full_state_dict() for optimizer in optimizers]
        self.optimizer.load_full_state_dict({name: {key: torch.stack([state[name][key] for state in states]) if torch.is_tensor(value) else value
                                                    for key, value in states[0][name].items()} for name in states[0]})

    def each(self, rate: float) -> Iterator[tuple[GPT, MuonAdamW]]:
        """Every model and its optimizer, by themselves again."""
        moments = self.optimizer.full_state_dict()
        for s in range(len(self)):
            model = copy.deepcopy(self.module)
            with torch.no_grad():
                for name, parameter in model.named_parameters():
                    parameter.copy_(self.parameters[name][s])
            optimizer = optimizer_of(model, rate)
            optimizer.load_full_state_dict({name: {key: value[s] if torch.is_tensor(value) else value for key, value in moments[name].items()}
                                            for name in moments})
            yield model, optimizer

    def __len__(self) -> int:
        return len(self.parameters["lm_head.weight"])

    def logits(self, inputs: torch.Tensor) -> torch.Tensor:
        """(S, B, T) or, the same for all, (B, T) -> (S, B, T, 27)."""
        one = lambda parameters, inputs: torch.func.functional_call(self.module, parameters, (inputs,))
        return torch.vmap(one, in_dims=(0, 0 if inputs.ndim == 3 else None))(self.parameters, inputs)

    def losses(self, inputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """Targets like the inputs, in nats: (S,)."""
        logits = self.logits(inputs)
        targets = targets.expand(logits.shape[:-1])
        return F.cross_entropy(logits.flatten(0, 2), targets.flatten(), reduction="none").view(len(self), -1).mean(-1)

    @torch.no_grad()
    def scores(self, task: str, strings: np.ndarray) -> list[float]:
        inputs, targets = examples(task, strings)
        if task == "counting":
            return (self.logits(inputs)[..., :3].argmax(-1) == targets).float().mean((1, 2)).tolist()
        return (self.losses(inputs, targets) / math.log(2)).tolist()


class Training:
    """Models of runs that differ in their seeds alone, and the FLOPs of each. All runs of a seed see the same strings in the same order."""

    def __init__(self, runs: Sequence[Run], models: Models, flops: float = 0.0):
        self.runs, self.models, self.flops = runs, models, flops

    @classmethod
    def new(cls, runs: Sequence[Run], width: int, heads: int, identity: bool = False) -> "Training":
        models = [new_model(width, heads, run.seed, identity) for run in runs]
        return cls(runs, Models(models, [optimizer_of(model, runs[0].rate) for model in models]))

    def through(self, text: Text, epochs: Iterable[int]) -> "Training":
        run = self.runs[0]
        for epoch in epochs:
            strings = np.stack([text.draw(run.strings, np.random.default_rng([run.seed, epoch])) for run in self.runs])  # (S, strings, LENGTH + 1)
            for start in range(0, run.strings, BATCH):
                batch = examples(run.task, strings[:, start:start + BATCH].reshape(-1, LENGTH + 1))
                self.models.losses(*(part.view(len(strings), -1, LENGTH) for part in batch)).sum().backward()
                self.models.optimizer.step()
                self.models.optimizer.zero_grad()
            self.flops += self.models.flops * run.strings * LENGTH
        return self

    def grown(self, width: int, mode: str) -> "Training":
        models, optimizers = [], []
        for run, (model, optimizer) in zip(self.runs, self.models.each(self.runs[0].rate)):
            with contextlib.redirect_stdout(None):
                model, grown = grow(model, grown_config(model.config, n_embd=width), optimizer, mode=mode, setup=rates(run.rate),
                                    generator=torch.Generator().manual_seed(run.seed))
            assert grown is not None
            models.append(model)
            optimizers.append(grown)
        return Training(self.runs, Models(models, optimizers), self.flops)

    def scores(self, strings: np.ndarray) -> list[float]:
        return self.models.scores(self.runs[0].task, strings)


@functools.lru_cache(maxsize=1)
def small(runs: tuple[Run, ...]) -> Training:
    """Small models before their growth, which several arms share."""
    return Training.new(runs, runs[0].width, 1).through(_text, range(runs[0].epochs))


_text: Text  # of this process


def use(text: Text) -> None:
    """The text of all runs of this process from now on."""
    global _text
    _text = text
    small.cache_clear()


def finish(runs: Sequence[Run]) -> list[Outcome]:
    """Trains; the runs differ in their seeds alone."""
    run, text = runs[0], _text
    assert {dataclasses.replace(run, seed=other.seed) for other in runs} == set(runs) and run.text == text.name
    arm = ARMS[run.arm]
    begin: list = [None] * len(runs)
    grown = begin
    if arm.mode:
        shared = small(tuple(dataclasses.replace(run, arm="", width=run.width // 2, epochs=run.before) for run in runs))
        begin = shared.scores(text.test)
        training = shared.grown(run.width if run.before < run.epochs else run.width // 2, arm.mode)  # to its own width: a copy
        grown = training.scores(text.test)
        training.through(text, range(run.before, run.epochs))
    else:
        training = Training.new(runs, run.width, arm.heads, arm.identity).through(text, range(run.epochs))
    return [Outcome(run, validation, test, training.flops, *more)
            for run, validation, test, *more in zip(runs, training.scores(text.validation), training.scores(text.test), begin, grown)]

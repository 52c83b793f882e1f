"""Texts told apart by their class: a linear probe of a model's states, and fine-tuning of the model with a head on top.

What stands for a text is the state that the head of the language model would read at its last token (BERT's way for a model of hidden tokens: at its first). The
probe leaves the model as it is: logistic regression, whose penalty is chosen on a fifth of the training rows. Fine-tuning trains a copy with all its weights.

An item has one text, to which the head gives a score for each class, or several, one for each answer, of which the head gives each one score.
"""
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from nanochat.cli import flag, int_or_off, positive_float, positive_int
from nanochat.common import telling
from nanochat.distributed import of_all_ranks, patience, rank_and_world
from nanochat.evals.results import Results
from nanochat.evals.scoring import Example, batches_by_length, stack_sequences
from nanochat.layered_gpt import empty_gpt

PENALTIES = (1e-3, 1e-2, 1e-1, 1.0)  # of the probe: L2, on standardized states and mean losses
TOKENS_PER_PASS = {"cpu": 4096, "cuda": 65536, "mps": 8192}  # of states without gradients, padding included
BATCHES_SORTED = 16  # of like length are made of so many batches' worth of shuffled items


@dataclass
class FineTuneSettings:
    """How a model is trained on a classification."""

    finetune_epochs: int = flag(3, "Passes over the training rows in fine-tuning", type=positive_int)
    finetune_lr: float = flag(3e-4, "Its largest learning rate (AdamW)", type=positive_float)
    finetune_batch: int = flag(32, "Its items per step", type=positive_int)
    finetune_rows: int = flag(-1, "Its training rows, the first ones of each set; -1: all", type=int_or_off)

    def rows_of(self, rows: list[dict]) -> list[dict]:
        """Those of a set's training rows that are trained on."""
        return rows if self.finetune_rows < 0 else rows[:self.finetune_rows]


class Item(NamedTuple):
    texts: tuple[list[int], ...]  # tokens; one text, or one for each answer
    label: int


def encode(tokenizer, text: str, context: int) -> list[int]:
    """BOS and the text; of one that the context has no room for the end, where the question stands."""
    return [tokenizer.get_bos_token_id(), *tokenizer(text)[-(context - 1):]]


def states(model, texts: Sequence[list[int]], device) -> torch.Tensor:
    """float32 (n, C) of n texts, in one forward pass, with gradients if they are enabled."""
    ids = stack_sequences(texts, pad_token_id=0).to(device)
    rows = torch.arange(len(texts), device=device)
    causal = model.config.causal
    columns = torch.tensor([len(text) - 1 if causal else 0 for text in texts], device=device)
    kept = []

    def keep(_, args):
        kept.append(args[0][rows, columns])
        return (args[0][:1, :1],)  # the head itself is not asked for more
    hook = model.lm_head.register_forward_pre_hook(keep)
    try:
        model(ids)
    finally:
        hook.remove()
    return kept[0].float()


def in_passes(model, texts: Sequence[list[int]], device) -> Iterator[list[int]]:
    """The numbers of texts that go through the model together. One that looks both ways would read the padding: it gets texts of one length."""
    order = {id(text): i for i, text in enumerate(texts)}
    examples = [Example([text], [1], [len(text)]) for text in texts]
    if model.config.causal:
        groups = [examples]
    else:
        groups = [[example for example in examples if example.width == width] for width in sorted({example.width for example in examples})]
    for group in groups:
        for batch in batches_by_length(group, TOKENS_PER_PASS[torch.device(device).type]):
            yield [order[id(example.sequences[0])] for example in batch]


@torch.no_grad()
def features(model, texts: Sequence[list[int]], device, progress: Callable[[float], None] | None = None) -> torch.Tensor:
    """float32 (n, C) on the CPU."""
    texts = [list(text) for text in texts]  # objects of their own, also where one text comes twice
    found, done = torch.empty(len(texts), model.config.n_embd), 0
    for numbers in in_passes(model, texts, device):
        found[numbers] = states(model, [texts[i] for i in numbers], device).cpu()
        done += len(numbers)
        if progress is not None:
            progress(done / len(texts))
    return found


def zero_head(width: int, outputs: int, device) -> nn.Linear:
    """Nothing is drawn for it: a run is the same every time, and the random stream of a training is left alone."""
    head = nn.utils.skip_init(nn.Linear, width, outputs, device=device)
    nn.init.zeros_(head.weight)
    nn.init.zeros_(head.bias)
    return head


# -----------------------------------------------------------------------------
# Probe


def _fit(x: torch.Tensor, y: torch.Tensor, classes: int, penalty: float) -> nn.Linear:
    """x (n, C), y (n,): minimizes mean cross-entropy + penalty/2 · |W|²; convex, so it begins at 0 and has one end."""
    head = zero_head(x.size(1), classes, x.device)
    optimizer = torch.optim.LBFGS(head.parameters(), max_iter=200, line_search_fn="strong_wolfe")

    def closure():
        optimizer.zero_grad()
        loss = F.cross_entropy(head(x), y) + 0.5 * penalty * head.weight.square().sum()
        loss.backward()
        return loss
    optimizer.step(closure)
    return head


def probe(x: torch.Tensor, y: torch.Tensor, test: torch.Tensor, classes: int) -> torch.Tensor:
    """Predicted classes (m,) of test states (m, C), from training states x (n, C) and classes y (n,), where these are."""
    mean, deviation = x.mean(0), x.std(0).clamp(min=1e-6)
    x, test = (x - mean) / deviation, (test - mean) / deviation
    held_out = torch.zeros(len(x), dtype=torch.bool)
    held_out[torch.randperm(len(x), generator=torch.Generator().manual_seed(1337))[:len(x) // 5]] = True
    held_out = held_out.to(x.device)
    with torch.enable_grad():
        right = {penalty: (_fit(x[~held_out], y[~held_out], classes, penalty)(x[held_out]).argmax(-1) == y[held_out]).float().mean().item() for penalty in PENALTIES}
        best = max(right, key=lambda penalty: right[penalty])
        return _fit(x, y, classes, best)(test).argmax(-1)


# -----------------------------------------------------------------------------
# Fine-tuning


def trainable_copy(model) -> Any:
    """The same function with float32 weights of its own: steps of fine-tuning are too small for bfloat16."""
    copy = empty_gpt(model.config)
    copy.to_empty(device=model.get_device())
    copy.init_buffers()
    for parameter in copy.parameters():
        parameter.data = parameter.data.float()
    copy.load_state_dict(model.state_dict())
    return copy.train()


class Classifier(nn.Module):
    """A model with a head of `outputs` scores."""

    def __init__(self, model, outputs: int):
        super().__init__()
        self.model = trainable_copy(model)
        self.head = zero_head(model.config.n_embd, outputs, model.get_device())

    def forward(self, items: Sequence[Item]) -> torch.Tensor:
        """Scores (B, classes), or (B, answers) of items with as many texts each. Texts of a model that looks both ways run alone, or padding would be read."""
        texts = [text for item in items for text in item.texts]
        device = self.head.weight.device
        if self.model.config.causal:
            scores = self.head(states(self.model, texts, device))
        else:
            scores = self.head(torch.cat([states(self.model, [text], device) for text in texts]))
        return scores if len(items[0].texts) == 1 else scores.view(len(items), -1)


def _batches(items: Sequence[Item], size: int, rng: random.Random) -> list[list[Item]]:
    """All items in a random order, in batches of like length."""
    shuffled = list(items)
    rng.shuffle(shuffled)
    batches = []
    for first in range(0, len(shuffled), size * BATCHES_SORTED):
        group = sorted(shuffled[first:first + size * BATCHES_SORTED], key=lambda item: max(map(len, item.texts)))
        batches += [group[i:i + size] for i in range(0, len(group), size)]
    rng.shuffle(batches)
    return batches


def finetune(model, items: Sequence[Item], classes: int, settings: FineTuneSettings, label: str) -> Classifier:
    """A classifier trained on the items: AdamW, the rate rises over a tenth of the steps and falls to 0."""
    classifier = Classifier(model, classes if len(items[0].texts) == 1 else 1)
    optimizer = torch.optim.AdamW(classifier.parameters(), lr=settings.finetune_lr, betas=(0.9, 0.98), weight_decay=0.01)
    rng, progress = random.Random(1337), telling(f"{label}: fine-tuning")
    steps = settings.finetune_epochs * len(_batches(items, settings.finetune_batch, random.Random(0)))
    step = 0
    with torch.enable_grad():
        for _ in range(settings.finetune_epochs):
            for batch in _batches(items, settings.finetune_batch, rng):
                rate = min(1.0, (step + 1) / max(1, steps // 10), (steps - step) / max(1, steps - steps // 10))
                for group in optimizer.param_groups:
                    group["lr"] = rate * settings.finetune_lr
                scores = classifier(batch)
                loss = F.cross_entropy(scores, torch.tensor([item.label for item in batch], device=scores.device))
                optimizer.zero_grad(set_to_none=True)
                loss.backward()
                nn.utils.clip_grad_norm_(classifier.parameters(), 1.0)
                optimizer.step()
                step += 1
                progress(step / steps)
    return classifier.eval()


@torch.no_grad()
def predict(classifier: Classifier, items: Sequence[Item], batch: int = 32) -> torch.Tensor:
    """The class of each item (n,), on the CPU."""
    order = sorted(range(len(items)), key=lambda i: max(map(len, items[i].texts)))
    found = torch.empty(len(items), dtype=torch.long)
    for first in range(0, len(order), batch):
        numbers = order[first:first + batch]
        found[numbers] = classifier([items[i] for i in numbers]).argmax(-1).cpu()
    return found


# -----------------------------------------------------------------------------
# Ranks


def share_jobs(jobs: Sequence[Callable[[], Results]]) -> Results:
    """What all of them find. Each rank does some of them; all ranks call this and get the same."""
    rank, world_size = rank_and_world()
    with patience() as group:  # a rank without a job waits for as long as another one's takes
        everyones = of_all_ranks([jobs[i]() for i in range(rank, len(jobs), world_size)], group)
    by_job = {job: results for first, found in enumerate(everyones) for job, results in zip(range(first, len(jobs), world_size), found, strict=True)}
    return {key: row for job in range(len(jobs)) for key, row in by_job[job].items()}

"""Inside a model: what its heads look at, what its neurons fire on, when it knows the next token, and what became of twins after a growth.

    python -m analysis.inside d12 --out=inside                    # a page for each checkpoint: inside/d12@3000.html
    python -m analysis.inside d6@2000 d12@3000 --out=inside       # before and after a growth, side by side in the table that is printed

Any base model that predicts the next token: stock, low-rank, normalized, grown. Nothing of a model is changed; what is shown is recorded while it computes.

* **Heads**: attention maps of a text, and two scores on random tokens that come twice (Olsson et al., 2209.11895): *previous*, the attention paid to the token before, and
  *induction*, that paid to the token after the last occurrence of the present one. Also the attention paid to the first token.
* **Neurons**: hidden units of the MLPs, with the tokens of the validation text on which they are largest.
* **Logit lens** (nostalgebraist, 2020): the stream after each layer, read by the model's own head.
* **Twins**: the share of neurons of a layer whose values on the text correlate with another's by more than 0.95, of those that fire on more than 1 % of its tokens: two that fire
  on the same few tokens correlate by chance. Plain clones are twins and stay so; a growth that breaks the symmetry should leave few. Beside it the share of those that hardly fire.
"""
import contextlib
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch

from analysis.inside_page import page
from nanochat import checkpoint_manager as checkpoints
from nanochat.blocked_attention import additive_mask
from nanochat.cli import ArgumentParser, UsageError, command, positive_int
from nanochat.common import print0
from nanochat.dataset import parquets_iter_batched
from nanochat.engine import check_causal
from nanochat.files import write_text_atomic
from nanochat.gpt import GPT
from nanochat.origin import Checkpoint, checkpoint_name

TEXT = "Mr and Mrs Dursley lived at number four. One day Mrs Dursley said to Mr"
TWINS = 0.95  # correlation
FIRES = 0.01  # of the tokens, more than that
LOUD = 1e-4  # of a unit's peak: below it does not fire (with ReLU it is at 0, with GELU near it)


@dataclass
class Recording:
    """Of one forward pass, by layer (of a layer that runs several times, its last)."""

    attention: dict[int, torch.Tensor] = field(default_factory=dict)  # (B, H, T, T) probabilities
    units: dict[int, torch.Tensor] = field(default_factory=dict)  # (B, T, hidden) what the MLP's last matrix reads
    stream: dict[int, torch.Tensor] = field(default_factory=dict)  # (B, T, C) after the layer


@contextlib.contextmanager
def recorded(model: GPT) -> Iterator[Recording]:
    """While it is open, every forward pass without a cache is written into the recording."""
    recording, hooks = Recording(), []

    def watch(layer: int, block) -> None:
        attend = block.attn.attend

        def watched(q, k, v, window_size, kv_cache):
            recording.attention[layer] = probabilities(q, k, window_size)
            return attend(q, k, v, window_size, kv_cache)

        block.attn.attend = watched  # of this object alone, in front of its class's
        hooks.append(block.mlp.c_proj.register_forward_pre_hook(lambda _, inputs: recording.units.update({layer: inputs[0].detach().float()})))
        hooks.append(block.register_forward_hook(lambda _, inputs, output: recording.stream.update({layer: output.detach()})))

    for layer, block in enumerate(model.transformer.h):
        watch(layer, block)
    try:
        yield recording
    finally:
        for block in model.transformer.h:
            block.attn.__dict__.pop("attend", None)
        for hook in hooks:
            hook.remove()


def probabilities(q, k, window_size: tuple[int, int]) -> torch.Tensor:
    """Queries (B, T, H, D) and keys (B, T, Hkv, D), sharpened -> (B, H, T, T), what the kernels never write down."""
    q, k = q.detach().float().transpose(1, 2), k.detach().float().transpose(1, 2)
    k = k.repeat_interleave(q.size(1) // k.size(1), dim=1)
    return (q @ k.mT / q.size(-1) ** 0.5 + additive_mask(q.size(2), k.size(2), 0, *window_size, q.dtype, q.device)).softmax(-1)


@torch.inference_mode()
def head_scores(model: GPT, length: int = 64, rows: int = 8, seed: int = 0) -> dict[str, list[list[float]]]:
    """By name, for each layer and head: mean attention over rows of `length` random tokens that come twice."""
    draws = torch.randint(model.config.vocab_size, (rows, length), generator=torch.Generator().manual_seed(seed))
    with recorded(model) as seen:
        model(torch.cat((draws, draws), 1).to(model.get_device()))
    maps = [seen.attention[layer] for layer in sorted(seen.attention)]
    mean = lambda values: [each.mean((0, 2)).tolist() for each in values]
    return {
        "previous": mean([each.diagonal(-1, -2, -1) for each in maps]),
        "induction": mean([each[:, :, length:].diagonal(1, -2, -1) for each in maps]),  # query length + t, key t + 1
        "first token": mean([each[:, :, 1:, 0] for each in maps]),
    }


@torch.inference_mode()
def lens(model: GPT, ids: torch.Tensor) -> tuple[list[torch.Tensor], Recording]:
    """Log-probabilities (T, V) of the next token after each layer, the last of them the model's own; and what was recorded. ids (T,)."""
    with recorded(model) as seen:
        logits = model(ids[None])
    read = lambda x: model._cap(model.lm_head(model.norm(x)))
    layers = [read(seen.stream[layer]) for layer in sorted(seen.stream)][:-1]
    return [each[0].log_softmax(-1) for each in (*layers, logits)], seen


@torch.inference_mode()
def neurons(model: GPT, rows: torch.Tensor) -> list[torch.Tensor]:
    """Of each layer the values (tokens, hidden) of its units on the rows (B, T), eight at a time."""
    values: dict[int, list[torch.Tensor]] = {}
    for some in rows.split(8):
        with recorded(model) as seen:
            model(some)
        for layer, units in seen.units.items():
            values.setdefault(layer, []).append(units.flatten(0, 1))
    return [torch.cat(values[layer]) for layer in sorted(values)]


def quiet(values: torch.Tensor) -> float:
    """The share of units, the columns of (tokens, hidden), that hardly fire: on no more than FIRES of the tokens."""
    return (~_fire(values)).double().mean().item()


def twins(values: torch.Tensor) -> float:
    """The share of the others that have a twin; 0 where there are none."""
    live = values[:, _fire(values)].double()
    live = live - live.mean(0)
    live = live[:, live.norm(dim=0) > 0]  # those of one value have no correlation
    if not live.size(1):
        return 0.0
    live = live / live.norm(dim=0)
    correlation = live.mT @ live
    correlation.fill_diagonal_(-1)
    return (correlation.amax(0) > TWINS).double().mean().item()


def _fire(values: torch.Tensor) -> torch.Tensor:
    values = values.abs()
    return (values > LOUD * values.amax(0)).double().mean(0) > FIRES


def rows_of(tokenizer, count: int, length: int) -> torch.Tensor:
    """The first `count` rows of `length` tokens of the validation text, each behind BOS, without padding. Raises UsageError where there is less."""
    bos, found = tokenizer.get_bos_token_id(), []
    for texts in parquets_iter_batched("val"):
        for ids in tokenizer.encode(texts):
            if len(ids) >= length - 1:
                found.append([bos, *ids[:length - 1]])
            if len(found) == count:
                return torch.tensor(found)
    raise UsageError(f"the validation text has {len(found)} documents of {length} tokens, and {count} are wanted; give a smaller --rows or --length")


def look(checkpoint: Checkpoint, args) -> dict[str, list]:
    """Writes the page of a checkpoint, and returns its row of the table."""
    model, tokenizer, meta = checkpoints.load_model_from_dir(checkpoints.checkpoints_dir_of("base"), torch.device("cpu"), "eval", checkpoint.tag, checkpoint.step)
    check_causal(model)
    if not len(model.transformer.h):
        raise UsageError(f"{checkpoint.tag} has no layers to look into; take a checkpoint of a later stage")
    name = f"{checkpoint.tag}@{meta['step']}"
    ids = torch.tensor(tokenizer.encode(args.text, prepend=tokenizer.get_bos_token_id())[:model.config.sequence_len])
    if len(ids) < 3:
        raise UsageError("--text is too short to look at; give some words")
    rows = rows_of(tokenizer, args.rows, min(args.length, model.config.sequence_len))
    read, seen = lens(model, ids)
    values = neurons(model, rows)
    scores, shares, silent = head_scores(model, min(64, model.config.sequence_len // 2)), [twins(each) for each in values], [quiet(each) for each in values]
    attention = [seen.attention[layer][0] for layer in sorted(seen.attention)]
    path = args.out / f"{name}.html"
    write_text_atomic(path, page(name, model, tokenizer, ids, attention, read, scores, rows, values, shares, silent, args.neurons))
    print0(f"{path}")
    return {"checkpoint": [name], "most induction": [max(max(layer) for layer in scores["induction"])], "most previous": [max(max(layer) for layer in scores["previous"])],
            "neurons with a twin, by layer": shares, "neurons that hardly fire": silent}


@command
def main(argv=None) -> None:
    parser = ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("checkpoints", type=checkpoint_name, nargs="+", metavar="TAG[@STEP]", help="base models; without a step the last one")
    parser.add_argument("--out", type=Path, default=Path("inside"), help="folder of the pages")
    parser.add_argument("--text", default=TEXT, help="what attention maps and lens are shown of")
    parser.add_argument("--rows", type=positive_int, default=64, help="documents of the validation text for the neurons")
    parser.add_argument("--length", type=positive_int, default=128, help="tokens of each")
    parser.add_argument("--neurons", type=positive_int, default=6, help="neurons shown of each layer")
    args = parser.parse_args(argv)
    for checkpoint in args.checkpoints:
        checkpoint.meta()  # a wrong name is told before the first page
    args.out.mkdir(parents=True, exist_ok=True)
    found = [look(checkpoint, args) for checkpoint in args.checkpoints]
    print("| " + " | ".join(found[0]) + " |\n" + "|---" * len(found[0]) + "|")
    for row in found:
        print("| " + " | ".join(", ".join(value if isinstance(value, str) else f"{value:.2f}" for value in values) for values in row.values()) + " |")


if __name__ == "__main__":
    sys.exit(main())

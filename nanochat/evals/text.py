"""How well a model tells a text file: bits per byte, and perplexity per token and per word.

A window of the model's context slides over the text. Each step of it scores `stride` tokens, which see the rest of the window before them; with the default of
half a context every token but the first ones is told from at least that much text. Bits per byte compare models of any tokenizer; perplexity per token does not,
and perplexity per word (words are what blanks part, as is usual for WikiText) does so only for the same text.
"""
import math
from pathlib import Path

import torch

from nanochat.cli import UsageError
from nanochat.common import telling
from nanochat.evals.jsonl import read_text
from nanochat.evals.results import Results, Row
from nanochat.evals.scoring import Example, score_all, token_nats


def windows(tokens: list[int], bos: int, context: int, stride: int) -> list[Example]:
    """Of at most `context` tokens, BOS included, which stands before each; every one of `tokens` is scored once. stride < context."""
    examples: list[Example] = []
    scored = 0  # tokens before this one are
    while scored < len(tokens):
        end = min(len(tokens), context - 1 if not examples else scored + stride)
        begin = max(0, end - (context - 1))
        examples.append(Example([[bos, *tokens[begin:end]]], [1 + scored - begin], [1 + end - begin]))
        scored = end
    return examples


def evaluate_text(model, tokenizer, path: Path, device, stride: int | None = None, max_tokens: int | None = None) -> Results:
    """Rows bpb, perplexity and word-perplexity of a file. stride: tokens per window, None for half of the model's context.

    The standard errors are those of a mean over the windows. Raises UsageError for a file without text and for a stride that leaves nothing to see.
    """
    text = read_text(path)
    context = model.config.sequence_len
    stride = context // 2 if stride is None else stride
    if not 0 < stride < context:
        raise UsageError(f"--text-stride={stride} leaves nothing of a context of {context} tokens: use less than that")
    tokens = tokenizer(text)
    if max_tokens is not None and len(tokens) > max_tokens:
        tokens = tokens[:max_tokens]
        text = tokenizer.decode(tokens)
    if not tokens:
        raise UsageError(f"{path} is empty: there is nothing to tell")
    num_bytes, num_words = len(text.encode("utf-8", "replace")), max(1, len(text.split()))
    examples = windows(tokens, tokenizer.get_bos_token_id(), context, stride)
    nats, _ = score_all(len(examples), lambda i: examples[i], lambda batch: [one[0].double().sum().item() for one in token_nats(model, batch, device)], device,
                        telling(path.name))
    total = nats.sum().item()
    lengths = torch.tensor([example.ends[0] - example.starts[0] for example in examples], dtype=torch.float64)
    k = len(examples)
    # of a ratio of sums, nats over tokens: how far the windows' nats are from what their lengths make expect
    deviation = (nats - lengths * (total / len(tokens))).square().sum().item()
    relative = math.sqrt(deviation * k / (k - 1)) / total if k > 1 and total else None  # standard error of the sum, as a share of it

    def row(unit: str, count: int, value: float, slope: float, label: str) -> Row:
        """slope: how fast the value grows with the sum of nats, times that sum."""
        return Row(value, count, None if relative is None else slope * relative, metric=unit, label=label)
    per_token, per_word = total / len(tokens), total / num_words
    bits = total / math.log(2) / num_bytes
    power = lambda x: math.exp(x) if x < 700 else math.inf
    return {
        "bpb": row("bits per byte", num_bytes, bits, bits, f"{path.name} bpb"),
        "perplexity": row("perplexity per token", len(tokens), power(per_token), power(per_token) * per_token, f"{path.name} perplexity"),
        "word-perplexity": row("perplexity per word", num_words, power(per_word), power(per_word) * per_word, ""),
    }

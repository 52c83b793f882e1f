"""Decoding with a key/value cache, for one or many samples of a prompt, with a calculator the model can call.

Notable:
* the prompt runs once, at batch 1, and its cache is copied to as many rows as samples are wanted
* one transfer from the device per step, whatever the batch size
* a row that calls the calculator gets the answer as forced tokens, while the others go on sampling
* the calculator interprets a small grammar itself: it needs no timeout and works on any thread

`python -m nanochat.engine` checks the engine against plain decoding on the base model, and times both.
"""
import ast
import codecs
import itertools
import operator
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch

from nanochat import flash_attention
from nanochat.cli import ArgumentParser, UsageError, command
from nanochat.common import COMPUTE_DTYPE
from nanochat.kernel_choice import chosen
from nanochat.sampling import sample_next_token

# -----------------------------------------------------------------------------
# Calculator

MAX_FORMULA = 1000  # characters; also bounds time and memory, as a product has no more digits than its factors together
ARITHMETIC: dict[type, Callable] = {
    ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.Div: operator.truediv, ast.FloorDiv: operator.floordiv}
SIGNS: dict[type, Callable] = {ast.UAdd: operator.pos, ast.USub: operator.neg}
STRING_METHODS = {"count", "lower", "upper"}  # none of them makes a longer string


def _evaluate(node: ast.expr, *types: type):
    """Value of a syntax tree, which must be of one of `types`; TypeError for whatever is not in the grammar."""
    match node:
        case ast.Constant(value=value):
            pass
        case ast.UnaryOp(op=op, operand=operand) if type(op) in SIGNS:
            value = SIGNS[type(op)](_evaluate(operand, int, float))
        case ast.BinOp(left=left, op=op, right=right) if type(op) in ARITHMETIC:
            value = ARITHMETIC[type(op)](_evaluate(left, int, float), _evaluate(right, int, float))
        case ast.Call(func=ast.Attribute(value=text, attr=method), args=args, keywords=[]) if method in STRING_METHODS:
            value = getattr(_evaluate(text, str), method)(*(_evaluate(arg, str) for arg in args))
        case _:
            raise TypeError(f"{type(node).__name__} is not in the calculator's grammar")
    if type(value) not in types:
        raise TypeError(f"{value!r} has the wrong type here")
    return value


def eval_with_timeout(formula: str, max_time: float = 3) -> int | float | str | None:
    """Value of a Python expression of numbers, `+ - * / //`, parentheses and `'text'.count('t')`; None if it is anything else or fails.

    Safe with any text, on any thread. No formula can run long, so `max_time` (seconds) has nothing to limit.
    """
    if len(formula) > MAX_FORMULA:
        return None
    try:
        return _evaluate(ast.parse(formula.lstrip(" \t"), mode="eval").body, int, float, str)
    except (SyntaxError, TypeError, ValueError, ArithmeticError, RecursionError, MemoryError):
        return None


def use_calculator(expr: str) -> int | float | str | None:
    """Answer to what a model wrote between python_start and python_end: arithmetic, or counting in a string. None refuses.

    Commas are dropped everywhere, so that 1,000 is a number.
    """
    expr = expr.replace(",", "")
    if set(expr) <= set("0123456789*+-/.() "):
        return None if "**" in expr else eval_with_timeout(expr)
    # what is refused here is part of the tool as models learned it, not of its safety; words such as "file", which nanochat refuses, can be counted in
    if not all(char.isascii() and char.isalnum() or char in "'\"()._ " for char in expr):
        return None
    if ".count(" not in expr:
        return None
    return eval_with_timeout(expr)


# -----------------------------------------------------------------------------
# Decoding


class KVCache:
    """Keys and values of all layers, (n_layers, B, seq_len, heads, head_dim) each; every row is filled to the same position.

    Layers that differ come as `layer_shapes`, (heads, width of a key, width of a value) each; then the caches are lists.

    The attention writes new positions through the views of `get_layer_cache`; the model then calls `advance`. A model that loops over its layers has slots
    for each use of them, and puts the first one of the present use into `first_slot`.
    """

    def __init__(self, batch_size: int, num_heads: int, seq_len: int, head_dim: int, num_layers: int, device, dtype: torch.dtype,
                 layer_shapes: list[tuple[int, int, int]] | None = None):
        self.batch_size, self.max_seq_len = batch_size, seq_len
        self.n_layers, self.n_heads, self.head_dim = num_layers, num_heads, head_dim
        self.k_cache: Any
        self.v_cache: Any
        if layer_shapes is None:
            shape = (num_layers, batch_size, seq_len, num_heads, head_dim)
            self.k_cache, self.v_cache = (torch.zeros(shape, device=device, dtype=dtype) for _ in range(2))
        else:
            self.k_cache, self.v_cache = (
                [torch.zeros(batch_size, seq_len, shape[0], shape[width], device=device, dtype=dtype) for shape in layer_shapes] for width in (1, 2))
        # FlashAttention-3 reads it on the device; the fallback reads it here, and would wait for the device in every layer
        self.cache_seqlens = torch.zeros(batch_size, dtype=torch.int32, device=device if flash_attention.USE_FA3 else "cpu")
        self._pos = 0  # the same number, known without asking the device
        self.first_slot = 0
        self.prev_embedding: torch.Tensor | None = None  # (B, 1, C) of the last token, for the model's smear
        self.last_logits_only = False  # asks the model for the logits of the last position alone

    def reset(self) -> None:
        self.cache_seqlens.zero_()
        self._pos = 0
        self.prev_embedding = None

    def get_pos(self) -> int:
        return self._pos

    def get_layer_cache(self, layer_idx: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Views of one layer's keys and values, (B, seq_len, heads, head_dim) each."""
        return self.k_cache[self.first_slot + layer_idx], self.v_cache[self.first_slot + layer_idx]

    def advance(self, num_tokens: int) -> None:
        if self._pos + num_tokens > self.max_seq_len:
            raise ValueError(f"KV cache holds {self.max_seq_len} positions, {self._pos + num_tokens} are needed")
        self.cache_seqlens += num_tokens
        self._pos += num_tokens

    def prefill(self, other: "KVCache") -> None:
        """Copies what `other` (batch 1, or as many rows as here) holds into this empty cache."""
        assert self._pos == 0, "only an empty cache can be prefilled"
        assert (self.n_layers, self.n_heads, self.head_dim) == (other.n_layers, other.n_heads, other.head_dim), "caches of different models"
        assert self.max_seq_len >= other.max_seq_len, f"{other.max_seq_len} positions do not fit into {self.max_seq_len}"
        filled = other.get_pos()
        for mine, others in zip((*self.k_cache, *self.v_cache), (*other.k_cache, *other.v_cache), strict=True):
            mine[:, :filled] = others[:, :filled]
        self.cache_seqlens.fill_(filled)
        self._pos = filled
        if other.prev_embedding is not None:
            self.prev_embedding = other.prev_embedding.expand(self.batch_size, -1, -1).clone()


@dataclass
class RowState:
    """One sample while it is generated."""
    current_tokens: list[int] = field(default_factory=list)  # prompt included
    forced_tokens: deque[int] = field(default_factory=deque)  # the calculator's answer, still to be put out
    in_python_block: bool = False
    python_expr_tokens: list[int] = field(default_factory=list)
    completed: bool = False


def check_causal(model: Any) -> None:
    """Raises UsageError for a model that looks both ways, where the next token is asked for."""
    if not getattr(getattr(model, "config", None), "causal", True):
        raise UsageError("this model was trained on hidden tokens (--objective=mlm) and looks both ways: it tells no next token, so it cannot sample, chat, be "
                         "fine-tuned on conversations or evaluated by them; use base_eval --eval=pll, or a model that was trained to predict the next token")


def cache_dtype(device: torch.device) -> torch.dtype:
    """Of keys and values: the compute dtype, or float32 where this CPU decodes faster with it."""
    return torch.float32 if device.type == "cpu" and chosen("decode") == "float32" else COMPUTE_DTYPE


class Engine:
    """Decodes with any model that has `get_device()`, `forward(ids, kv_cache=...)` and a GPT `config`."""

    def __init__(self, model, tokenizer):
        check_causal(model)
        self.model = model
        self.tokenizer = tokenizer
        self.bos = tokenizer.get_bos_token_id()
        self.assistant_end = tokenizer.encode_special("<|assistant_end|>")
        self.python_start = tokenizer.encode_special("<|python_start|>")
        self.python_end = tokenizer.encode_special("<|python_end|>")
        self.output_start = tokenizer.encode_special("<|output_start|>")
        self.output_end = tokenizer.encode_special("<|output_end|>")

    def is_terminal(self, token: int) -> bool:
        """Whether the token ends an answer."""
        return token == self.assistant_end or token == self.bos

    def _new_cache(self, batch_size: int, seq_len: int) -> KVCache:
        config = self.model.config
        layered = hasattr(config, "layers")
        shapes = [(kv_heads, qk_dim, v_dim) for _, kv_heads, qk_dim, v_dim in self.model.attention_shapes()] * config.loops if layered else None
        device = self.model.get_device()
        cache = KVCache(batch_size, config.n_kv_head, seq_len, config.n_embd // config.n_head, len(shapes) if shapes else config.n_layer,
                        device=device, dtype=cache_dtype(device), layer_shapes=shapes)
        cache.last_logits_only = True
        return cache

    def generate(self, tokens: list[int], num_samples: int = 1, max_tokens: int | None = None, temperature: float = 1.0,
                 top_k: int | None = None, seed: int = 42) -> Iterator[tuple[list[int], list[int]]]:
        """Yields per step one token for each sample and its mask: 1 sampled, 0 forced by the calculator.

        A sample is over after its assistant_end or bos, but gets tokens until all are over or `max_tokens` (None: until
        the context of `sequence_len` is full). Raises IndexError for an empty prompt and, with max_tokens None, ValueError
        for one longer than the context.
        """
        assert isinstance(tokens, list) and all(isinstance(token, int) for token in tokens), "a prompt is a list of ints"
        assert temperature >= 0, "temperature must be 0 or more"
        if not tokens:
            raise IndexError("the prompt is empty: start with at least bos")
        if max_tokens is None:
            max_tokens = self.model.config.sequence_len - len(tokens)
            if max_tokens < 0:
                raise ValueError(f"the prompt has {len(tokens)} tokens, the model's context {self.model.config.sequence_len}: "
                                 "shorten it, or set max_tokens to decode beyond the context")
        return self._decode(tokens, num_samples, max_tokens, temperature, top_k, seed)

    @torch.inference_mode()
    def _forward(self, rows: list[list[int]], cache: KVCache) -> torch.Tensor:
        """Logits (B, V) behind the last of the tokens (B, T), which are appended to the cache."""
        ids = torch.tensor(rows, dtype=torch.long, device=self.model.get_device())
        return self.model.forward(ids, kv_cache=cache)[:, -1]

    def _decode(self, tokens, num_samples, max_tokens, temperature, top_k, seed):
        rng = torch.Generator(device=self.model.get_device()).manual_seed(seed)
        prompt_cache = self._new_cache(1, len(tokens))
        logits = self._forward([tokens], prompt_cache).expand(num_samples, -1)
        cache = self._new_cache(num_samples, len(tokens) + max_tokens)
        cache.prefill(prompt_cache)
        del prompt_cache

        rows = [RowState(tokens.copy()) for _ in range(num_samples)]
        for _ in range(max_tokens):
            if all(row.completed for row in rows):
                return
            sampled = sample_next_token(logits, rng, temperature, top_k).squeeze(1).tolist()
            masks = [0 if row.forced_tokens else 1 for row in rows]
            column = [row.forced_tokens.popleft() if row.forced_tokens else token for row, token in zip(rows, sampled, strict=True)]
            for row, token in zip(rows, column, strict=True):
                self._update(row, token)
            yield column, masks
            # only now: a caller who has seen enough does not pay for one more step
            logits = self._forward([[token] for token in column], cache)

    def _update(self, row: RowState, token: int) -> None:
        """Appends a token to a row; at the end of a python block queues the calculator's answer."""
        row.current_tokens.append(token)
        if self.is_terminal(token):
            row.completed = True
        if token == self.python_start:
            row.in_python_block = True
            row.python_expr_tokens = []
        elif token == self.python_end and row.in_python_block:
            row.in_python_block = False
            answer = use_calculator(self.tokenizer.decode(row.python_expr_tokens)) if row.python_expr_tokens else None
            if answer is not None:
                row.forced_tokens.extend([self.output_start, *self.tokenizer.encode(str(answer)), self.output_end])
        elif row.in_python_block:
            row.python_expr_tokens.append(token)

    def generate_batch(self, tokens: list[int], num_samples: int = 1, max_tokens: int | None = None,
                       **kwargs) -> tuple[list[list[int]], list[list[int]]]:
        """(sequences, masks) of all samples, prompt included with mask 0, without the token that ends an answer.

        Arguments and errors as for `generate`.
        """
        columns = self.generate(tokens, num_samples, max_tokens, **kwargs)
        results = [list(tokens) for _ in range(num_samples)]
        masks = [[0] * len(tokens) for _ in range(num_samples)]
        running = list(range(num_samples))
        for column, column_masks in itertools.islice(columns, max_tokens):
            running = [row for row in running if not self.is_terminal(column[row])]
            if not running:
                break
            for row in running:
                results[row].append(column[row])
                masks[row].append(column_masks[row])
        return results, masks


class TextStream:
    """Turns token ids into text as they come, without ever cutting a UTF-8 character in two.

    `push` returns what is complete so far; what the last tokens left incomplete is U+FFFD in `flush`.
    """

    def __init__(self, tokenizer):
        self.tokenizer = tokenizer
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def push(self, token: int) -> str:
        return self._decoder.decode(self.tokenizer.decode_single_token_bytes(token))

    def flush(self) -> str:
        return self._decoder.decode(b"", final=True)


# -----------------------------------------------------------------------------


@command
def main(argv=None) -> int:
    from nanochat.checkpoint_manager import load_model
    from nanochat.common import autodetect_device_type, compute_init
    ArgumentParser(description="Checks the engine against plain decoding on the base model, and times both.").parse_args(argv)
    *_, device = compute_init(autodetect_device_type())
    model, tokenizer, _ = load_model("base", device, phase="eval")
    engine = Engine(model, tokenizer)
    prompt = tokenizer.encode("The chemical formula of water is", prepend=tokenizer.get_bos_token_id())
    decoders = {
        "naive": lambda: list(model.generate(prompt, 64, temperature=0)),
        "engine": lambda: [column[0] for column, _ in engine.generate(prompt, max_tokens=64, temperature=0)],
    }
    answers = {}
    for name, decode in decoders.items():
        decode()  # warm-up
        start = time.perf_counter()
        answers[name] = decode()
        seconds = time.perf_counter() - start
        print(f"{name:6} {len(answers[name]) / seconds:9.1f} tokens/s, prompt included")
    naive, ours = answers["naive"], answers["engine"]  # the engine stops at bos, plain decoding does not
    print(tokenizer.decode(prompt + ours))
    differing = [i for i, token in enumerate(ours) if token != naive[i]]
    if differing:
        print(f"MISMATCH from token {differing[0]} on; in bf16 two nearly equal logits may swap: check with NANOCHAT_DTYPE=float32")
        return 1
    print(f"the engine agrees with plain decoding on {len(ours)} tokens")
    return 0


if __name__ == "__main__":
    sys.exit(main())

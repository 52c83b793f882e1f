"""Continuous batching: requests that come and go share each decoding step.

Notable:
* the rows of a batch stand at positions of their own, and each has its own temperature, random stream and calculator: an answer
  is the one that `Engine.generate` gives with the same seed. Only rounding may depend on who else is served, as matmuls of other
  sizes add up in another order: in bf16 it moves logits by up to 1 % of the largest, so answers can part where two tokens are that close
* first come, first served; a long prompt runs in pieces between the steps of the others, so that no newcomer makes them wait
* the rows in use are always neighbours (the last one moves into a gap), so the model sees plain slices of one cache
* memory is bounded: `slots` rows of `context` tokens, allocated once, and at most `max_waiting` requests in the queue

One thread runs the model (`start`); `submit` and `cancel` may be called from any thread.
"""
import logging
import threading
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

import torch

from nanochat.common import COMPUTE_DTYPE
from nanochat.engine import Engine, KVCache, RowState, sample_next_token

PIECE = 256  # tokens of prompts between two steps

logger = logging.getLogger(__name__)


class Overloaded(Exception):
    """The queue is full, or closed."""


@dataclass(eq=False)
class Request:
    """A prompt to answer. `emit(token, "")` is called for each token, without the one that ends the answer, and at last `emit(None, reason)`
    with `stop` (the model ended it), `length` (max_tokens) or `error`; always on the model's thread, and never after a cancellation is noticed."""
    prompt: list[int]
    max_tokens: int
    emit: Callable[[int | None, str], None]
    temperature: float = 1.0
    top_k: int | None = None
    seed: int = 42
    cancelled: bool = False


@dataclass
class _Row:
    request: Request
    rng: torch.Generator
    state: RowState = field(default_factory=RowState)
    read: int = 0  # tokens of the prompt in the cache
    written: int = 0  # tokens of the answer


class _Rows:
    """Rows [first, last) of a cache as the model sees them in one pass: a `KVCache` whose rows may stand at different positions."""

    last_logits_only = True

    def __init__(self, batch: "BatchedEngine", first: int, last: int):
        self.batch, self.rows = batch, slice(first, last)
        self.n_layers = batch.cache.n_layers
        self.cache_seqlens = batch.cache.cache_seqlens[self.rows]

    def get_pos(self) -> int | torch.Tensor:
        positions = self.batch.positions[self.rows]
        return positions[0] if len(set(positions)) == 1 else torch.tensor(positions, device=self.batch.model.get_device())

    def get_layer_cache(self, layer_idx: int) -> tuple[torch.Tensor, torch.Tensor]:
        keys, values = self.batch.cache.get_layer_cache(layer_idx)
        return keys[self.rows], values[self.rows]

    def advance(self, num_tokens: int) -> None:
        self.cache_seqlens += num_tokens  # a view
        self.batch.positions[self.rows] = [position + num_tokens for position in self.batch.positions[self.rows]]

    @property
    def prev_embedding(self) -> torch.Tensor | None:
        return self.batch.embeddings[self.rows].clone() if self.batch.positions[self.rows.start] else None  # a copy: the model sets the next one before it uses this one

    @prev_embedding.setter
    def prev_embedding(self, embedding: torch.Tensor) -> None:
        self.batch.embeddings[self.rows] = embedding


class BatchedEngine(Engine):
    """An engine that decodes up to `slots` requests at a time, of at most `context` tokens each (default: the model's context)."""

    def __init__(self, model, tokenizer, slots: int = 16, max_waiting: int = 256, context: int | None = None):
        super().__init__(model, tokenizer)
        self.slots, self.max_waiting, self.context = slots, max_waiting, context or model.config.sequence_len
        self.cache: KVCache = self._new_cache(slots, self.context)
        self.positions = [0] * slots
        self.embeddings = torch.zeros(slots, 1, model.config.n_embd, dtype=COMPUTE_DTYPE, device=model.get_device())
        self.waiting: deque[Request] = deque()
        self.rows: list[_Row] = []  # row i of the cache belongs to rows[i]
        self.entering: _Row | None = None  # its prompt is being read, into the row after them
        self.closed = False
        self._changed = threading.Condition()
        self._thread: threading.Thread | None = None

    # -------------------------------------------------------------------------
    # From any thread

    @property
    def running(self) -> int:
        return len(self.rows) + (self.entering is not None)

    def submit(self, request: Request) -> None:
        """Queues a request. Raises Overloaded if too many wait, ValueError if prompt and answer do not fit into the context."""
        if not request.prompt or request.max_tokens < 1 or len(request.prompt) + request.max_tokens > self.context:
            raise ValueError(f"a prompt of {len(request.prompt)} and an answer of {request.max_tokens} tokens do not fit into a context of {self.context}")
        with self._changed:
            if self.closed or len(self.waiting) >= self.max_waiting:
                raise Overloaded
            self.waiting.append(request)
            self._changed.notify()

    def cancel(self, request: Request) -> None:
        """Ends a request wherever it stands; its slot is free at the next step."""
        request.cancelled = True
        with self._changed:
            if request in self.waiting:
                self.waiting.remove(request)

    def start(self) -> None:
        """Runs the model in a thread of its own until `close`."""
        self._thread = threading.Thread(target=self._run, name="model", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Takes no more requests, finishes the ones it has and ends the thread."""
        with self._changed:
            self.closed = True
            self._changed.notify()
        if self._thread is not None:
            self._thread.join()

    def _run(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self.waiting or self.running or self.closed)
                if not self.waiting and not self.running:
                    return
            try:
                self.step()
            except Exception:  # out of memory, most likely: those who are served learn it, the next ones get a fresh start
                logger.exception("a decoding step failed")
                failed = [row.request for row in (*self.rows, *([self.entering] if self.entering else []))]
                self.rows, self.entering = [], None
                for request in failed:
                    request.emit(None, "error")

    # -------------------------------------------------------------------------
    # On the model's thread

    @torch.inference_mode()
    def step(self) -> None:
        """Lets in whom there is room for, then decodes one token for every row."""
        for i in reversed(range(len(self.rows))):
            if self.rows[i].request.cancelled:
                self._remove(i)
        self._read_prompts()
        if self.rows:
            logits = self._forward([[row.state.current_tokens[-1]] for row in self.rows], _Rows(self, 0, len(self.rows)))  # type: ignore[arg-type]
            sampled = self._sample(self.rows, logits)
            for i in reversed(range(len(self.rows))):
                if not self._accept(self.rows[i], sampled[i]):
                    self._remove(i)

    def _read_prompts(self) -> None:
        """Pieces of prompts, until they make PIECE tokens or nobody is left to let in. A prompt is cut at the same places whoever else is there."""
        read = 0
        while read < PIECE:
            if self.entering is None:
                with self._changed:
                    if not self.waiting or len(self.rows) == self.slots:
                        return
                    request = self.waiting.popleft()
                self.entering = _Row(request, torch.Generator(device=self.model.get_device()).manual_seed(request.seed))
                self.positions[len(self.rows)] = 0
                self.cache.cache_seqlens[len(self.rows)] = 0
            row, place = self.entering, len(self.rows)
            if row.request.cancelled:
                self.entering = None
                continue
            piece = row.request.prompt[row.read:row.read + PIECE]
            logits = self._forward([piece], _Rows(self, place, place + 1))  # type: ignore[arg-type]
            row.read += len(piece)
            read += len(piece)
            if row.read == len(row.request.prompt):
                self.entering = None
                if self._accept(row, self._sample([row], logits)[0]):
                    self.rows.append(row)

    def _sample(self, rows: list[_Row], logits: torch.Tensor) -> list[int]:
        drawn = [sample_next_token(logits[i:i + 1], row.rng, row.request.temperature, row.request.top_k) for i, row in enumerate(rows)]
        return torch.cat(drawn).squeeze(1).tolist()

    def _accept(self, row: _Row, sampled: int) -> bool:
        """Appends the calculator's or the sampled token to a row; whether the row goes on."""
        request, state = row.request, row.state
        token = state.forced_tokens.popleft() if state.forced_tokens else sampled
        self._update(state, token)
        if state.completed:
            request.emit(None, "stop")
            return False
        row.written += 1
        request.emit(token, "")
        if row.written == request.max_tokens:
            request.emit(None, "length")
            return False
        return True

    def _remove(self, i: int) -> None:
        """Closes the gap of row i with the last row, and the gap that it leaves with the entering one."""
        last = len(self.rows) - 1
        self._move(last, i)
        self.rows[i] = self.rows[last]
        self.rows.pop()
        if self.entering is not None:
            self._move(last + 1, last)

    def _move(self, source: int, target: int) -> None:
        if source == target:
            return
        filled = self.positions[target] = self.positions[source]
        for cache in (*self.cache.k_cache, *self.cache.v_cache):
            cache[target, :filled] = cache[source, :filled]
        self.cache.cache_seqlens[target] = filled
        self.embeddings[target] = self.embeddings[source]

"""Continuous batching: requests that come and go share each decoding step.

Notable:
* the rows of a batch stand at positions of their own, and each has its own sampler and calculator: an answer is the one that
  `Engine.generate` gives with the same seed. Only rounding may depend on who else is served, as matmuls of other
  sizes add up in another order: in bf16 it moves logits by up to 1 % of the largest, so answers can part where two tokens are that close
* prompts are read in pieces between the steps of the others, sized by the clock so that no answer pauses for longer than three of its steps;
  the shortest and the oldest prompt take turns, so that a short one need not wait for a long one to end, nor a long one for ever
* places go to the group of requests that has the fewest, and no group gets more than half of them
* a prompt is read once for all requests that share it, and what an earlier one left in the prefix cache is not read again
* one request's fault stays its own: whatever is raised for it, it gets an `error`, and the others go on
* memory is bounded: `slots` rows of `context` tokens, allocated once, a prefix cache of a quarter of that, and at most `max_waiting` requests in the queue

One thread runs the model (`start`); `submit` and `cancel` may be called from any thread.
"""
import logging
import sys
import threading
import time
from collections import Counter, deque
from collections.abc import Callable
from dataclasses import dataclass, field

import torch

from nanochat.common import COMPUTE_DTYPE
from nanochat.engine import Engine, KVCache, RowState, cache_dtype
from nanochat.prefix_cache import Prefix, PrefixCache
from nanochat.resources import free_memory
from nanochat.sampling import Sampler, Sampling, Scores, score

SMALLEST, LARGEST = 16, 512  # tokens of a piece of a prompt
SCORED = 128  # at most, where there are logits for every one of them
COPIED = 1024  # tokens taken from the prefix cache at a time
PAUSE = 1.5  # steps: for how long prompts may be read between two of them, so that with the next step and what was misjudged it is three
IDLE_PAUSE = 0.1  # seconds: the same while nobody waits for a next token, but a newcomer may come

logger = logging.getLogger(__name__)


class Overloaded(Exception):
    """The queue is full, or closed."""


@dataclass(eq=False)
class Request:
    """A prompt to answer. `emit(token, "", scores)` is called for each token, without the one that ends the answer, and at last
    `emit(None, reason, None)` with `stop` (the model ended it), `length` (max_tokens) or `error`; always on the model's thread, and never after a
    cancellation is noticed. `scores` is None unless `logprobs` says how many likely alternatives it is to hold. With `prompt_logprobs` the first
    call is `emit(None, "prompt", scores)` with a list, one for each of the prompt's tokens but the first."""
    prompt: list[int]
    max_tokens: int
    emit: Callable[[int | None, str, Scores | list[Scores] | None], None]
    sampling: Sampling = Sampling()
    logprobs: int | None = None
    prompt_logprobs: bool = False
    group: object = field(default_factory=object)  # what shares one claim to places
    cancelled: bool = False


@dataclass
class _Row:
    request: Request
    sampler: Sampler
    number: int  # in the order in which they were let in
    state: RowState = field(default_factory=RowState)  # of the answer alone
    read: int = 0  # tokens of the prompt in the cache
    source: Prefix | None = None  # holds the first `reused` of them
    reused: int = 0
    scores: list[Scores] = field(default_factory=list)  # of the prompt


def slots_for(model, at_most: int = 64) -> int:
    """How many rows of the model's context fit into a quarter of the memory that is free."""
    device = model.get_device()
    free = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else free_memory()
    per_token = model.kv_bytes_per_token() * cache_dtype(device).itemsize // COMPUTE_DTYPE.itemsize
    return max(1, min(at_most, free // 4 // (per_token * model.config.sequence_len)))


class _Rows:
    """Rows [first, last) of a cache as the model sees them in one pass: a `KVCache` whose rows may stand at different positions."""

    def __init__(self, batch: "BatchedEngine", first: int, last: int, last_logits_only: bool = True):
        self.batch, self.rows, self.last_logits_only = batch, slice(first, last), last_logits_only
        self.first_slot = 0
        self.cache_seqlens = batch.cache.cache_seqlens[self.rows]

    def get_pos(self) -> int | torch.Tensor:
        positions = self.batch.positions[self.rows]
        return positions[0] if len(set(positions)) == 1 else torch.tensor(positions, device=self.batch.model.get_device())

    def get_layer_cache(self, layer_idx: int) -> tuple[torch.Tensor, torch.Tensor]:
        keys, values = self.batch.cache.get_layer_cache(self.first_slot + layer_idx)
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
    """An engine that decodes up to `slots` requests at a time, of at most `context` tokens each (default: the model's context).

    `patient` is for a batch job, where nobody waits for a next token: prompts are read whole and alone, so nothing depends on the clock.
    """

    def __init__(self, model, tokenizer, slots: int = 16, max_waiting: int = 256, context: int | None = None, patient: bool = False):
        super().__init__(model, tokenizer)
        self.slots, self.max_waiting, self.context = slots, max_waiting, context or model.config.sequence_len
        self.cache: KVCache = self._new_cache(slots, self.context)
        self.positions = [0] * slots
        self.embeddings = torch.zeros(slots, 1, model.config.n_embd, dtype=COMPUTE_DTYPE, device=model.get_device())
        self.patient = patient
        self.fault: BaseException | None = None  # of the latest request that failed
        self.prefixes = PrefixCache(0 if patient else slots * self.context // 4)
        self.waiting: deque[Request] = deque()
        self.rows: list[_Row] = []  # row i of the cache belongs to rows[i]
        self.entering: list[_Row] = []  # their prompts are being read, into the rows after those
        self.step_seconds = 0.05  # of a decoding step, lately
        self.pass_seconds, self.token_seconds = 0.01, 0.0005  # lately: of a piece of a prompt that is short, and of each token more
        self.admitted = self.pieces = 0
        self.closed = False
        self._changed = threading.Condition()
        self._thread: threading.Thread | None = None

    # -------------------------------------------------------------------------
    # From any thread

    @property
    def running(self) -> int:
        return len(self.rows) + len(self.entering)

    def submit(self, *requests: Request) -> None:
        """Queues requests, all or none. Raises Overloaded if too many wait, ValueError if a prompt and its answer do not fit into the context."""
        for request in requests:
            if not request.prompt or request.max_tokens < 0 or len(request.prompt) + request.max_tokens > self.context:
                raise ValueError(f"a prompt of {len(request.prompt)} and an answer of {request.max_tokens} tokens do not fit into a context of {self.context}")
        with self._changed:
            if self.closed or len(self.waiting) + len(requests) > self.max_waiting:
                raise Overloaded
            self.waiting.extend(requests)
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
        """Takes no more requests, and returns when those that were accepted are answered."""
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
            except BaseException:  # nobody's own fault (a panic of the tokenizer is no Exception): those who are served learn it, the next ones get a fresh start
                logger.exception("a step of the server failed")
                failed, self.rows, self.entering = [*self.rows, *self.entering], [], []
                for row in failed:
                    self._emit(row.request, None, "error")

    # -------------------------------------------------------------------------
    # On the model's thread

    @torch.inference_mode()
    def step(self) -> None:
        """Lets in whom there is room for, reads pieces of prompts, then decodes one token for every row."""
        for place in reversed(range(self.running)):
            if self._at(place).request.cancelled:
                self._remove(place)
        self._admit()
        self._read_prompts()
        if self.rows:
            start = time.perf_counter()
            self._decode_step()
            self.step_seconds = (self.step_seconds + time.perf_counter() - start) / 2

    def _at(self, place: int) -> _Row:
        return self.rows[place] if place < len(self.rows) else self.entering[place - len(self.rows)]

    def _admit(self) -> None:
        while self.running < self.slots:
            with self._changed:
                taken = Counter(row.request.group for row in (*self.rows, *self.entering))
                being_read = {id(row.request.prompt) for row in self.entering}  # who shares one of them waits until it can be copied
                ready = [request for request in self.waiting
                         if id(request.prompt) not in being_read and taken[request.group] < max(1, self.slots // 2)]
                if not ready:
                    return
                request = min(ready, key=lambda request: taken[request.group])  # the first of equals
                self.waiting.remove(request)
            try:
                self.admitted += 1
                row = _Row(request, Sampler(request.sampling, request.prompt, self.model.config.vocab_size, self.model.get_device()), self.admitted)
            except Exception:
                self._fail(request)
                continue
            if not request.prompt_logprobs:
                row.source, row.reused = self.prefixes.find(request.prompt[:-1])  # the last one runs anyway, for its logits
            self.positions[self.running] = 0
            self.cache.cache_seqlens[self.running] = 0
            self.entering.append(row)

    def _read_prompts(self) -> None:
        """Pieces of prompts, for as long as the answers under way can wait."""
        used = 0.0
        while self.entering:
            left = (PAUSE * self.step_seconds if self.rows else IDLE_PAUSE) - used
            fitting = int((left - self.pass_seconds) / self.token_seconds)
            if used and fitting < SMALLEST and not self.patient:
                return
            size = self.context if self.patient else max(SMALLEST, min(LARGEST, fitting // SMALLEST * SMALLEST))
            self.pieces += 1
            unread = lambda row: len(row.request.prompt) - row.read
            row = min(self.entering, key=unread if self.pieces % 2 and not self.patient else lambda row: row.number)
            start = time.perf_counter()
            self._read_piece(len(self.rows) + self.entering.index(row), size)
            used += time.perf_counter() - start

    def _read_piece(self, place: int, size: int) -> None:
        row = self._at(place)
        try:
            if row.source is not None:
                self._copy_piece(place)
                return
            request, start = row.request, time.perf_counter()
            piece = request.prompt[row.read:row.read + (min(size, SCORED) if request.prompt_logprobs else size)]
            logits = self.model.forward(torch.tensor([piece], device=self.model.get_device()),
                                        kv_cache=_Rows(self, place, place + 1, last_logits_only=not request.prompt_logprobs))[0]
            if logits.is_cuda:
                torch.cuda.synchronize(logits.device)
            took = time.perf_counter() - start
            if len(piece) <= 2 * SMALLEST:
                self.pass_seconds = (self.pass_seconds + took) / 2
            else:
                self.token_seconds = (self.token_seconds + max(took - self.pass_seconds, took / 10) / len(piece)) / 2
            row.read += len(piece)
            if request.prompt_logprobs:
                known = request.prompt[row.read - len(piece) + 1:row.read + 1]  # the prompt's end is followed by none
                row.scores += score(logits[:len(known)], known, request.logprobs or 0)
            if row.read < len(request.prompt):
                return
            with self._changed:
                shared = any(other.prompt is request.prompt for other in self.waiting)
            if shared:
                self._keep(place)
        except Exception:
            self._remove(place, fault=True)
        else:
            self._promote(place)
            self._advance([len(self.rows) - 1], logits[-1:])

    def _copy_piece(self, place: int) -> None:
        row = self._at(place)
        end = min(row.read + COPIED, row.reused)
        assert row.source is not None
        for cache, kept in zip((*self.cache.k_cache, *self.cache.v_cache), row.source.caches, strict=True):
            cache[place, row.read:end] = kept[row.read:end]
        row.read = self.positions[place] = end
        self.cache.cache_seqlens[place] = end
        if end == row.reused:
            row.source = None
            self.embeddings[place] = self.model.embed(torch.tensor([[row.request.prompt[end - 1]]], device=self.model.get_device()))[0]

    def _decode_step(self) -> None:
        count = len(self.rows)
        before = self.positions[:count], self.embeddings[:count].clone()

        def forward(first: int, last: int) -> torch.Tensor:
            return self._forward([[row.state.current_tokens[-1]] for row in self.rows[first:last]], _Rows(self, first, last))  # type: ignore[arg-type]
        try:
            logits = forward(0, count)
        except Exception:  # out of memory, most likely: one at a time needs less, and shows whose fault it is
            logger.exception("a decoding step failed; its rows are tried one by one")
            self.positions[:count], self.embeddings[:count] = before
            self.cache.cache_seqlens[:count] = torch.tensor(before[0])
            for place in reversed(range(count)):
                try:
                    logits = forward(place, place + 1)
                except Exception:
                    self._remove(place, fault=True)
                else:
                    self._advance([place], logits)
            return
        self._advance(list(range(count)), logits)

    def _advance(self, places: list[int], logits: torch.Tensor) -> None:
        """Appends to each of the rows the token that follows from its logits (V,); the rows that end leave."""
        rows = [self.rows[place] for place in places]
        for place, row, token, of_row in reversed(list(zip(places, rows, self._sample(rows, logits), logits.split(1), strict=True))):
            try:
                if isinstance(token, Exception):
                    raise token
                going = self._accept(row, token, of_row)
            except Exception:
                self._remove(place, fault=True)
            else:
                if not going:
                    self._remove(place)

    def _sample(self, rows: list[_Row], logits: torch.Tensor) -> list[int | Exception]:
        """The next token of every row, of logits (B, V); or why it has none."""
        drawn: list[torch.Tensor] = []
        results: list[int | Exception] = []
        for row, of_row in zip(rows, logits.split(1), strict=True):
            try:
                drawn.append(row.sampler.draw(of_row))
                results.append(len(drawn) - 1)
            except Exception as error:
                results.append(error)
        tokens = torch.cat(drawn).flatten().tolist() if drawn else []  # one transfer
        return [result if isinstance(result, Exception) else tokens[result] for result in results]

    def _accept(self, row: _Row, sampled: int, logits: torch.Tensor) -> bool:
        """Appends the calculator's or the sampled token to a row; whether the row goes on."""
        request, state = row.request, row.state
        if request.prompt_logprobs and not state.current_tokens:
            self._emit(request, None, "prompt", row.scores)
        if len(state.current_tokens) == request.max_tokens:  # 0
            self._emit(request, None, "length")
            return False
        token = state.forced_tokens.popleft() if state.forced_tokens else sampled
        self._update(state, token)
        if state.completed:
            self._emit(request, None, "stop")
            return False
        row.sampler.add(token)
        self._emit(request, token, "", None if request.logprobs is None else score(logits, [token], request.logprobs)[0])
        if len(state.current_tokens) == request.max_tokens:
            self._emit(request, None, "length")
            return False
        return True

    def _emit(self, request: Request, token: int | None, reason: str, scores: Scores | list[Scores] | None = None) -> None:
        try:
            request.emit(token, reason, scores)
        except Exception:  # whoever listened is gone
            logger.exception("an answer could not be delivered")
            request.cancelled = True

    def _fail(self, request: Request) -> None:
        logger.exception("a request failed")
        fault = sys.exc_info()[1]
        self.fault = fault and fault.with_traceback(None)  # which would hold on to the step's tensors
        self._emit(request, None, "error")

    # -------------------------------------------------------------------------
    # Places

    def _remove(self, place: int, fault: bool = False) -> None:
        """Ends a row; the last answering and the last entering row close the gaps."""
        row = self._at(place)
        if fault:
            self._fail(row.request)
        elif place < len(self.rows):
            self._keep(place)
        if place < len(self.rows):
            self._move(len(self.rows) - 1, place)
            self.rows[place] = self.rows[-1]
            self.rows.pop()
            place = len(self.rows)
            if self.entering:
                self._move(place + len(self.entering), place)
                self.entering.insert(0, self.entering.pop())
        else:
            self._move(self.running - 1, place)
            self.entering[place - len(self.rows)] = self.entering[-1]
            self.entering.pop()

    def _promote(self, place: int) -> None:
        """The entering row of this place has read its prompt: it becomes the last of those that answer."""
        first, pair = len(self.rows), [place, len(self.rows)]
        if place != first:
            filled = max(self.positions[i] for i in pair)
            for cache in (*self.cache.k_cache, *self.cache.v_cache):
                cache[pair, :filled] = cache[pair[::-1], :filled]
            self.positions[place], self.positions[first] = self.positions[first], self.positions[place]
            self.cache.cache_seqlens[pair] = self.cache.cache_seqlens[pair[::-1]]
            self.embeddings[pair] = self.embeddings[pair[::-1]]
            self.entering[place - first], self.entering[0] = self.entering[0], self.entering[place - first]
        self.rows.append(self.entering.pop(0))

    def _keep(self, place: int) -> None:
        """Copies what a row holds into the prefix cache."""
        row, filled = self._at(place), self.positions[place]
        tokens = [*row.request.prompt, *row.state.current_tokens][:filled]
        if self.prefixes.find(tokens)[1] > 0.9 * filled:
            return  # reading the rest again takes less than this copy
        try:
            self.prefixes.put(tokens, [cache[place, :filled] for cache in (*self.cache.k_cache, *self.cache.v_cache)])
        except RuntimeError:  # out of memory: others need it more
            logger.exception("the prefix cache is emptied")
            self.prefixes.entries.clear()

    def _move(self, source: int, target: int) -> None:
        if source == target:
            return
        filled = self.positions[target] = self.positions[source]
        for cache in (*self.cache.k_cache, *self.cache.v_cache):
            cache[target, :filled] = cache[source, :filled]
        self.cache.cache_seqlens[target] = filled
        self.embeddings[target] = self.embeddings[source]

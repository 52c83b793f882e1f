"""From tokens to what a client reads: answers while they are generated, and their two forms of OpenAI's.

Notable:
* text is whole characters only, and nothing of a stop string; log-probabilities come with the text that they belong to
* a client that goes away frees its places in the batch
"""
import asyncio
import bisect
import json
import logging
import re
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass, field, replace
from typing import Any

from fastapi import Request as HttpRequest
from starlette.exceptions import HTTPException

from nanochat.batching import BatchedEngine, Overloaded, Request
from nanochat.engine import TextStream
from nanochat.sampling import Scores
from nanochat.serving.api import ApiError, Query, context_error

logger = logging.getLogger(__name__)


@dataclass
class Worker:
    """One copy of the model."""
    gpu_id: int
    device: Any
    engine: BatchedEngine
    tokenizer: Any

    @property
    def available(self) -> bool:
        return self.engine.running < self.engine.slots and not self.engine.waiting


@dataclass
class ScoredToken:
    token: int
    scores: Scores | None  # None for the first of a prompt
    offset: int  # characters before it


@dataclass
class Piece:
    """What is new in an answer."""
    index: int
    text: str
    reason: str = ""  # why the answer ends here
    tokens: list[ScoredToken] = field(default_factory=list)


class Text:
    """Text of an answer while its tokens come: whole characters only, and nothing of a stop string."""

    def __init__(self, tokenizer, stops: list[str]):
        self.stream, self.stops, self.held, self.stopped = TextStream(tokenizer), sorted(stops), "", False
        self.longest = max(map(len, stops), default=0)
        self.pattern = re.compile("|".join(map(re.escape, self.stops))) if stops else None
        self.length = self.sent = 0  # characters so far, and those of them that were given out
        self.pending: list[ScoredToken] = []

    def push(self, token: int, scores: Scores | None = None) -> str:
        self.pending.append(ScoredToken(token, scores, self.length))
        return self._release(self.stream.push(token))

    def flush(self) -> str:
        if self.stopped:
            return ""
        text = self._release(self.stream.flush())
        if not self.stopped:
            text += self.held
            self.sent, self.held = self.length, ""
        return text

    def take_tokens(self) -> list[ScoredToken]:
        """The tokens of the text that was given out since the last call."""
        count = sum(token.offset < self.sent or self.sent == self.length and not self.stopped for token in self.pending)
        taken, self.pending = self.pending[:count], self.pending[count:]
        return taken

    def _release(self, text: str) -> str:
        self.length += len(text)
        self.held += text
        cut, found = len(self.held), self.pattern.search(self.held) if self.pattern else None
        if found:
            cut, self.stopped = found.start(), True
        else:
            for start in range(max(0, cut - self.longest + 1), cut):  # a stop may have begun
                tail = self.held[start:]
                after = bisect.bisect_left(self.stops, tail)
                if after < len(self.stops) and self.stops[after].startswith(tail):
                    cut = start
                    break
        text, self.held = self.held[:cut], self.held[cut:]
        self.sent += len(text)
        return text


class Answers:
    """Answers to the prompts of a query while they are generated: iterate over their pieces.

    Nothing is generated any longer once the client has gone or `close` was called. Raises ApiError for prompts that do not fit.
    """

    def __init__(self, worker: Worker, http: HttpRequest, query: Query, what: str = "messages"):
        context, longest = worker.engine.context, max(map(len, query.prompts))
        if longest + (query.max_tokens != 0) > context:
            raise context_error(longest, context, what)
        self.worker, self.query = worker, query
        self.prompts = [prompt for prompt in query.prompts for _ in range(query.n)]
        self.hidden = [count for count in query.hidden for _ in range(query.n)]
        self.texts = [Text(worker.tokenizer, query.stops) for _ in self.prompts]
        self.prompt_tokens, self.tokens, self.reasons = sum(map(len, query.prompts)), 0, [""] * len(self.prompts)
        self._queue: asyncio.Queue[tuple] = asyncio.Queue()
        loop, group = asyncio.get_running_loop(), object()

        def emit_as(index: int):
            return lambda *event: loop.call_soon_threadsafe(self._queue.put_nowait, (index, *event))

        self.requests = []
        for i, prompt in enumerate(self.prompts):
            room = context - len(prompt)
            self.requests.append(Request(
                prompt, room if query.max_tokens is None else min(query.max_tokens, room), emit_as(i),
                replace(query.sampling, seed=query.sampling.seed + i % query.n), query.logprobs, query.echo and query.logprobs is not None, group))
        self._started = time.perf_counter()
        self._watcher = asyncio.create_task(self._leave_with(http))
        try:
            worker.engine.submit(*self.requests)
        except Overloaded:
            self.close()
            raise ApiError(503, "too many requests are waiting; try again soon", headers={"Retry-After": "5"}) from None

    async def _leave_with(self, http: HttpRequest) -> None:
        while (await http.receive())["type"] != "http.disconnect":
            pass
        self.close()

    def close(self) -> None:
        for request in self.requests:
            self.worker.engine.cancel(request)
        self._watcher.cancel()
        self._queue.put_nowait((-1, None, "gone", None))

    async def __aiter__(self) -> AsyncIterator[Piece]:
        try:
            if self.query.echo and self.query.logprobs is None:
                for index in range(len(self.prompts)):
                    yield self._echo(index, [])
            while not all(self.reasons):
                await asyncio.sleep(0)  # a queue that has something in it would let nobody else in
                index, token, reason, scores = await self._queue.get()
                if reason == "gone":
                    logger.info("a client went away")
                    return
                if reason == "error":
                    raise ApiError(500, "the model failed; the server's log says why")
                if reason == "prompt":
                    yield self._echo(index, scores)
                    continue
                if self.reasons[index]:
                    continue  # a stop string has ended it already
                self.tokens += token is not None
                text = self.texts[index]
                piece = Piece(index, text.flush() if token is None else text.push(token, scores))
                if text.stopped:
                    reason = "stop"
                    self.worker.engine.cancel(self.requests[index])
                self.reasons[index] = piece.reason = reason
                piece.tokens = text.take_tokens()
                if piece.text or reason or piece.tokens:
                    yield piece
            seconds = time.perf_counter() - self._started
            logger.info(f"{self.prompt_tokens} tokens answered with {self.tokens} in {seconds:.1f} s ({self.tokens / seconds:.0f} per second), {', '.join(self.reasons[:16])}")
        finally:
            self.close()

    def _echo(self, index: int, scores: list[Scores]) -> Piece:
        """The prompt, as its client wrote it. No stop string ends it."""
        text, hidden, tokens = self.texts[index], self.hidden[index], self.prompts[index]
        known = [None, *scores] if scores else [None] * len(tokens)
        pattern, longest = text.pattern, text.longest
        text.pattern, text.longest = None, 0
        said = "".join([text.push(token, of_token) for token, of_token in zip(tokens[hidden:], known[hidden:], strict=True)])
        text.pattern, text.longest = pattern, longest
        return Piece(index, said, "", text.take_tokens())

    def usage(self) -> dict:
        return {"prompt_tokens": self.prompt_tokens, "completion_tokens": self.tokens, "total_tokens": self.prompt_tokens + self.tokens}


# -----------------------------------------------------------------------------
# OpenAI's forms


class ChatForm:
    """Choices of `/v1/chat/completions`."""
    prefix, kind, chunk = "chatcmpl", "chat.completion", "chat.completion.chunk"

    def __init__(self, tokenizer):
        self.tokenizer = tokenizer

    def whole(self, piece: Piece, scored: bool) -> dict:
        return {"index": piece.index, "message": {"role": "assistant", "content": piece.text}, "logprobs": self._logprobs(piece) if scored else None,
                "finish_reason": piece.reason}

    def first(self, index: int) -> dict | None:
        """The chunk that opens a choice."""
        return self._chunk(index, {"role": "assistant", "content": ""})

    def chunks(self, piece: Piece, scored: bool) -> list[dict]:
        """OpenAI's last chunk has a reason and nothing else."""
        logprobs = self._logprobs(piece) if scored and piece.tokens else None
        return [*([self._chunk(piece.index, {"content": piece.text}, logprobs)] if piece.text or logprobs else []),
                *([self._chunk(piece.index, {}, None, piece.reason)] if piece.reason else [])]

    def _chunk(self, index: int, delta: dict, logprobs: dict | None = None, reason: str | None = None) -> dict:
        return {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": reason}

    def _logprobs(self, piece: Piece) -> dict:
        return {"content": [{**self._token(scored.token, scored.scores.logprob), "top_logprobs": [self._token(*pair) for pair in scored.scores.top]}
                            for scored in piece.tokens if scored.scores is not None], "refusal": None}

    def _token(self, token: int, logprob: float) -> dict:
        data = self.tokenizer.decode_single_token_bytes(token)
        return {"token": data.decode("utf-8", "replace"), "logprob": finite(logprob), "bytes": list(data)}


class CompletionForm:
    """Choices of `/v1/completions`."""
    prefix, kind, chunk = "cmpl", "text_completion", "text_completion"

    def __init__(self, tokenizer):
        self.tokenizer = tokenizer

    def whole(self, piece: Piece, scored: bool) -> dict:
        return {"index": piece.index, "text": piece.text, "logprobs": self._logprobs(piece) if scored else None, "finish_reason": piece.reason or None}

    def first(self, index: int) -> dict | None:
        return None

    def chunks(self, piece: Piece, scored: bool) -> list[dict]:
        return [self.whole(piece, scored)]

    def _logprobs(self, piece: Piece) -> dict:
        """An alternative that is no character by itself goes by its bytes, so that no two have one name."""
        return {"tokens": [self._name(scored.token) for scored in piece.tokens],
                "token_logprobs": [None if scored.scores is None else finite(scored.scores.logprob) for scored in piece.tokens],
                "top_logprobs": [None if scored.scores is None else {self._name(token): finite(logprob) for token, logprob in scored.scores.top}
                                 for scored in piece.tokens],
                "text_offset": [scored.offset for scored in piece.tokens]}

    def _name(self, token: int) -> str:
        data = self.tokenizer.decode_single_token_bytes(token)
        try:
            return data.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in data)


def finite(logprob: float) -> float:
    """JSON knows no infinity; OpenAI's word for it is -9999."""
    return max(logprob, -9999.0)


def openai_error(error: HTTPException) -> dict:
    kind = "server_error" if error.status_code >= 500 else "invalid_request_error"
    return {"error": {"message": str(error.detail), "type": kind, "param": getattr(error, "param", None), "code": getattr(error, "code", None)}}


def event(data: dict) -> str:
    return f"data: {json.dumps(data, ensure_ascii=False)}\n\n"


async def own_events(answers: Answers) -> AsyncIterator[str]:
    """The stream of nanochat's own `/chat/completions`."""
    try:
        async for piece in answers:
            if piece.text:
                yield event({"token": piece.text, "gpu": answers.worker.gpu_id})
        yield event({"done": True, "finish_reason": answers.reasons[0], **answers.usage()})
    except ApiError as error:
        yield event({"error": error.detail})


async def openai_answer(answers: Answers, form: ChatForm | CompletionForm, head: dict) -> dict:
    wholes = [Piece(i, "") for i in range(len(answers.prompts))]
    async for piece in answers:
        whole = wholes[piece.index]
        whole.text, whole.reason = whole.text + piece.text, piece.reason
        whole.tokens.extend(piece.tokens)
    scored = answers.query.logprobs is not None
    return {**head, "object": form.kind, "choices": await asyncio.to_thread(lambda: [form.whole(whole, scored) for whole in wholes]), "usage": answers.usage()}


async def openai_events(answers: Answers, form: ChatForm | CompletionForm, head: dict) -> AsyncIterator[str]:
    scored, with_usage, begun = answers.query.logprobs is not None, answers.query.with_usage, set()
    head = {**head, "object": form.chunk}
    try:
        async for piece in answers:
            choices = form.chunks(piece, scored)
            if piece.index not in begun and (first := form.first(piece.index)):
                choices.insert(0, first)
            begun.add(piece.index)
            for choice in choices:
                yield event({**head, "choices": [choice], **({"usage": None} if with_usage else {})})
        if with_usage:
            yield event({**head, "choices": [], "usage": answers.usage()})
        yield "data: [DONE]\n\n"
    except ApiError as error:
        yield event(openai_error(error))

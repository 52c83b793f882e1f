"""The HTTP side of chatting: nanochat's own endpoints and page, and the part of OpenAI's API that its clients use.

| endpoint | |
|---|---|
| GET `/`, `/logo.svg`, `/ui/...`, POST `/render` | the page (page.py) |
| POST `/chat/completions` | nanochat's own: events `{"token", "gpu"}`, at last `{"done": true}` or `{"error"}` |
| GET `/health`, `/stats`, `/info` | readiness, load, and what the page says about the model |
| GET `/v1/models`, POST `/v1/chat/completions`, `/v1/completions` | OpenAI's, streaming and not |

Notable:
* a base model knows no conversation: the messages are one text, which it continues
* tool calls stand in the text as the names of their special tokens; in an assistant's message these become the tokens again, so that
  a client may send back what it got. In nobody else's message do they mean anything.
* whatever a client sends that makes no sense is a 4xx that says why; a client that goes away frees its place in the batch
"""
import asyncio
import json
import logging
import random
import re
import time
import uuid
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

from fastapi import FastAPI, HTTPException
from fastapi import Request as HttpRequest
from fastapi.exceptions import RequestValidationError
from fastapi.middleware.cors import CORSMiddleware
from fastapi.responses import JSONResponse, Response, StreamingResponse
from pydantic import BaseModel, ConfigDict
from starlette.exceptions import HTTPException as StarletteHTTPException

from nanochat.batching import BatchedEngine, Overloaded, Request
from nanochat.engine import TextStream
from nanochat.page import page_router

MAX_MESSAGES_PER_REQUEST = 500
MAX_MESSAGE_LENGTH = 8000  # characters
MAX_TOTAL_CONVERSATION_LENGTH = 32000
MIN_TEMPERATURE, MAX_TEMPERATURE = 0.0, 2.0
MIN_TOP_K, MAX_TOP_K = 0, 200
MIN_MAX_TOKENS, MAX_MAX_TOKENS = 1, 4096
MAX_BODY = 2**20  # bytes; the longest conversation fits, however its characters are escaped
MAX_CHOICES = 16
MAX_STOPS, MAX_STOP_LENGTH = 4, 200

logger = logging.getLogger(__name__)


class ApiError(HTTPException):
    """What the client has to know. `code` is OpenAI's name of the problem, where it has one."""

    def __init__(self, status: int, message: str, code: str | None = None, param: str | None = None, headers: dict | None = None):
        super().__init__(status, message, headers)
        self.code, self.param = code, param


# -----------------------------------------------------------------------------
# Requests


class ChatMessage(BaseModel):
    role: str
    content: str


class ChatRequest(BaseModel):
    messages: list[ChatMessage]
    temperature: float | None = None
    max_tokens: int | None = None
    top_k: int | None = None


class TextPart(BaseModel):
    type: str
    text: str = ""


class OpenAIMessage(BaseModel):
    role: str
    content: str | list[TextPart] | None = None


class StreamOptions(BaseModel):
    include_usage: bool = False


class OpenAIRequest(BaseModel):
    """What both endpoints take."""
    model_config = ConfigDict(extra="allow")
    model: str
    temperature: float | None = None
    top_k: int | None = None
    max_tokens: int | None = None
    n: int | None = None
    seed: int | None = None
    stop: str | list[str] | None = None
    stream: bool = False
    stream_options: StreamOptions | None = None


class OpenAIChatRequest(OpenAIRequest):
    messages: list[OpenAIMessage]
    max_completion_tokens: int | None = None


class OpenAICompletionRequest(OpenAIRequest):
    prompt: str | list[str] | list[int] | list[list[int]]


# What the model cannot do must not be ignored silently, but clients like to spell out the settings that change nothing.
NOT_SUPPORTED = {"top_p": 1, "min_p": 0, "frequency_penalty": 0, "presence_penalty": 0, "repetition_penalty": 1, "logit_bias": {}, "logprobs": False,
                 "top_logprobs": 0, "tools": [], "tool_choice": "none", "functions": [], "response_format": {"type": "text"}, "echo": False, "best_of": 1,
                 "suffix": "", "audio": None}


def check_sampling(temperature: float | None, top_k: int | None, max_tokens: int | None) -> None:
    if temperature is not None and not MIN_TEMPERATURE <= temperature <= MAX_TEMPERATURE:  # so that NaN is refused
        raise ApiError(400, f"temperature must be a number from {MIN_TEMPERATURE} to {MAX_TEMPERATURE}", param="temperature")
    if top_k is not None and not MIN_TOP_K <= top_k <= MAX_TOP_K:
        raise ApiError(400, f"top_k must be a whole number from {MIN_TOP_K} to {MAX_TOP_K}; 0 keeps all tokens", param="top_k")
    if max_tokens is not None and not MIN_MAX_TOKENS <= max_tokens <= MAX_MAX_TOKENS:
        raise ApiError(400, f"max_tokens must be a whole number from {MIN_MAX_TOKENS} to {MAX_MAX_TOKENS}", param="max_tokens")


def check_messages(messages: list[tuple[str, str]], roles: tuple[str, ...]) -> None:
    """messages: (role, text) each."""
    if not messages:
        raise ApiError(400, "there are no messages; send at least one", param="messages")
    if len(messages) > MAX_MESSAGES_PER_REQUEST:
        raise ApiError(400, f"{len(messages)} messages are too many; at most {MAX_MESSAGES_PER_REQUEST} are read", param="messages")
    for i, (_, text) in enumerate(messages):
        if not text:
            raise ApiError(400, f"message {i} has no content", param="messages")
        if len(text) > MAX_MESSAGE_LENGTH:
            raise ApiError(400, f"message {i} has {len(text)} characters; a message has at most {MAX_MESSAGE_LENGTH}", param="messages")
    if (total := sum(len(text) for _, text in messages)) > MAX_TOTAL_CONVERSATION_LENGTH:
        raise ApiError(400, f"the conversation has {total} characters; at most {MAX_TOTAL_CONVERSATION_LENGTH} are read", "context_length_exceeded", "messages")
    for i, (role, _) in enumerate(messages):
        if role not in roles:
            raise ApiError(400, f"message {i} has the role {role[:50]!r}; use {' or '.join(roles)}", param="messages")


def validate_chat_request(request: ChatRequest) -> None:
    """Raises an HTTPException with status 400 for values that are none."""
    check_messages([(message.role, message.content) for message in request.messages], ("user", "assistant"))
    check_sampling(request.temperature, request.top_k, request.max_tokens)


def check_openai(request: OpenAIRequest, model_name: str) -> None:
    if request.model != model_name:
        raise ApiError(404, f"there is no model {request.model[:100]!r} here, only {model_name!r}", "model_not_found", "model")
    for name, value in (request.model_extra or {}).items():
        if name in NOT_SUPPORTED and value is not None and value != NOT_SUPPORTED[name]:
            raise ApiError(400, f"{name} is not supported here" + ("; use temperature and top_k" if name == "top_p" else ""), "unsupported_parameter", name)
    stops = [request.stop] if isinstance(request.stop, str) else request.stop or []
    if len(stops) > MAX_STOPS or not all(0 < len(stop) <= MAX_STOP_LENGTH for stop in stops):
        raise ApiError(400, f"stop takes up to {MAX_STOPS} texts of 1 to {MAX_STOP_LENGTH} characters", param="stop")


def plain_text(index: int, message: OpenAIMessage) -> str:
    if message.content is None or isinstance(message.content, str):
        return message.content or ""
    if any(part.type != "text" for part in message.content):
        raise ApiError(400, f"message {index} holds more than text, which is all the model can read", param="messages")
    return "".join(part.text for part in message.content)


# -----------------------------------------------------------------------------
# Prompts

TOOL_TOKEN = re.compile(r"(<\|(?:python|output)_(?:start|end)\|>)")


def chat_prompt(tokenizer, messages: list[tuple[str, str]], base: bool) -> list[int]:
    """Ids that make the model answer (role, text) messages; roles need not alternate, system messages open the user's next one."""
    prompt = [tokenizer.get_bos_token_id()]
    if base:
        return prompt + tokenizer.encode("".join(text for _, text in messages))
    instructions: list[str] = []
    for role, text in messages:
        if role == "assistant":
            body = [token for part in TOOL_TOKEN.split(text)
                    for token in ([tokenizer.encode_special(part)] if TOOL_TOKEN.fullmatch(part) else tokenizer.encode(part))]
        elif role == "user":
            body, instructions = tokenizer.encode("\n\n".join([*instructions, text])), []
        else:
            instructions.append(text)
            continue
        prompt += [tokenizer.encode_special(f"<|{role}_start|>"), *body, tokenizer.encode_special(f"<|{role}_end|>")]
    if instructions:
        raise ApiError(400, "a system message must be followed by the user's", param="messages")
    return [*prompt, tokenizer.encode_special("<|assistant_start|>")]


def completion_prompts(tokenizer, prompt: Any) -> list[list[int]]:
    """One prompt or several, as text or as token ids."""
    items = [prompt] if isinstance(prompt, str) or prompt and isinstance(prompt[0], int) else prompt
    if sum(map(len, items)) > MAX_TOTAL_CONVERSATION_LENGTH:
        raise ApiError(400, f"the prompt is too long: at most {MAX_TOTAL_CONVERSATION_LENGTH} characters or tokens are read", param="prompt")
    bos = tokenizer.get_bos_token_id()
    prompts = [tokenizer.encode(item, prepend=bos) if isinstance(item, str) else item for item in items]
    if not prompts or not all(prompts) or not all(0 <= token < tokenizer.get_vocab_size() for ids in prompts for token in ids):
        raise ApiError(400, f"prompt must be text, or token ids below {tokenizer.get_vocab_size()}; and not an empty list", param="prompt")
    return prompts


# -----------------------------------------------------------------------------
# Answers


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
class Sampling:
    temperature: float
    top_k: int
    max_tokens: int
    seed: int = field(default_factory=lambda: random.randrange(2**31))
    stops: list[str] = field(default_factory=list)


class Text:
    """Text of an answer while its tokens come: whole characters only, and nothing of a stop string."""

    def __init__(self, tokenizer, stops: list[str]):
        self.stream, self.stops, self.held, self.stopped = TextStream(tokenizer), stops, "", False

    def push(self, token: int) -> str:
        return self._release(self.stream.push(token))

    def flush(self) -> str:
        return "" if self.stopped else self._release(self.stream.flush()) + self.held

    def _release(self, text: str) -> str:
        self.held += text
        found = [at for stop in self.stops if (at := self.held.find(stop)) >= 0]
        if found:
            text, self.held, self.stopped = self.held[:min(found)], "", True
            return text
        keep = max((n for stop in self.stops for n in range(1, len(stop)) if self.held.endswith(stop[:n])), default=0)
        text, self.held = self.held[:len(self.held) - keep], self.held[len(self.held) - keep:]
        return text


class Answers:
    """Answers to one or more prompts while they are generated: iterate over (index, new text, why it ended or "").

    Nothing is generated any longer once the client has gone or `close` was called. Raises ApiError for prompts that do not fit.
    """

    def __init__(self, worker: Worker, http: HttpRequest, prompts: list[list[int]], sampling: Sampling):
        context = worker.engine.model.config.sequence_len
        if (longest := max(map(len, prompts))) >= context:
            raise ApiError(400, f"that are {longest} tokens, and the model's context holds {context}, answer included: please shorten it",
                           "context_length_exceeded")
        self.worker, self.sampling = worker, sampling
        self.prompt_tokens, self.tokens, self.reasons = sum(map(len, prompts)), 0, [""] * len(prompts)
        self._queue: asyncio.Queue[tuple[int, int | None, str]] = asyncio.Queue()
        loop = asyncio.get_running_loop()

        def emit_as(index: int):
            return lambda token, reason: loop.call_soon_threadsafe(self._queue.put_nowait, (index, token, reason))

        self.requests = [Request(prompt, min(sampling.max_tokens, context - len(prompt)), emit_as(i), sampling.temperature, sampling.top_k, sampling.seed + i)
                         for i, prompt in enumerate(prompts)]
        self._started = time.perf_counter()
        self._watcher = asyncio.create_task(self._leave_with(http))
        try:
            for request in self.requests:
                worker.engine.submit(request)
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
        self._queue.put_nowait((-1, None, "gone"))

    async def __aiter__(self) -> AsyncIterator[tuple[int, str, str]]:
        texts = [Text(self.worker.tokenizer, self.sampling.stops) for _ in self.requests]
        try:
            while not all(self.reasons):
                index, token, reason = await self._queue.get()
                if reason == "gone":
                    logger.info("a client went away")
                    return
                if reason == "error":
                    raise ApiError(500, "the model failed; the server's log says why")
                if self.reasons[index]:
                    continue  # a stop string has ended it already
                self.tokens += token is not None
                text = texts[index].flush() if token is None else texts[index].push(token)
                if texts[index].stopped:
                    reason = "stop"
                    self.worker.engine.cancel(self.requests[index])
                self.reasons[index] = reason
                if text or reason:
                    yield index, text, reason
            seconds = time.perf_counter() - self._started
            logger.info(f"{self.prompt_tokens} tokens answered with {self.tokens} in {seconds:.1f} s ({self.tokens / seconds:.0f} per second), {', '.join(self.reasons)}")
        finally:
            self.close()

    def usage(self) -> dict:
        return {"prompt_tokens": self.prompt_tokens, "completion_tokens": self.tokens, "total_tokens": self.prompt_tokens + self.tokens}


def event(data: dict) -> str:
    return f"data: {json.dumps(data, ensure_ascii=False)}\n\n"


def event_stream(events: AsyncIterator[str]) -> StreamingResponse:
    return StreamingResponse(events, media_type="text/event-stream", headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"})


def openai_error(error: HTTPException | StarletteHTTPException) -> dict:
    kind = "server_error" if error.status_code >= 500 else "invalid_request_error"
    return {"error": {"message": str(error.detail), "type": kind, "param": getattr(error, "param", None), "code": getattr(error, "code", None)}}


# -----------------------------------------------------------------------------
# The application


class LimitBody:
    """ASGI middleware: 413 for bodies above MAX_BODY, before they are read into memory."""

    def __init__(self, app):
        self.app = app

    async def __call__(self, scope, receive, send) -> None:
        announced = dict(scope.get("headers", ())).get(b"content-length", b"0")
        size = int(announced) if announced.isdigit() else 0

        async def receive_some():
            nonlocal size
            if size > MAX_BODY:
                raise ApiError(413, f"the request is larger than {MAX_BODY} bytes")
            message = await receive()
            if not announced.strip(b"0"):  # sent in pieces, without its length
                size += len(message.get("body", b""))
            return message
        await self.app(scope, receive_some, send)


def create_app(workers: list[Worker], info: dict, temperature: float = 0.8, top_k: int = 50, max_tokens: int = 512) -> FastAPI:
    """The application of a model that is loaded already. `info["model"]` is its name for clients, `info["source"]` its stage of training."""
    tokenizer, base, name, created = workers[0].tokenizer, info["source"] == "base", info["model"], int(time.time())

    @asynccontextmanager
    async def lifespan(app: FastAPI):
        for worker in workers:
            worker.engine.start()
        yield
        for worker in workers:
            await asyncio.to_thread(worker.engine.close)

    app = FastAPI(title="nanochat", lifespan=lifespan, docs_url=None, redoc_url=None)
    app.add_middleware(LimitBody)
    app.add_middleware(CORSMiddleware, allow_origins=["*"], allow_methods=["*"], allow_headers=["*"])

    @app.exception_handler(StarletteHTTPException)
    async def refuse(http: HttpRequest, error: StarletteHTTPException) -> Response:
        own = {"detail": error.detail, **({"code": error.code} if getattr(error, "code", None) else {})}  # type: ignore[attr-defined]
        return JSONResponse(openai_error(error) if http.url.path.startswith("/v1/") else own, error.status_code, error.headers)

    @app.exception_handler(RequestValidationError)
    async def refuse_schema(http: HttpRequest, error: RequestValidationError) -> Response:
        problems = [f"{'.'.join(map(str, problem['loc'][1:])) or 'body'}: {problem['msg']}" for problem in error.errors()]
        status = 400 if http.url.path.startswith("/v1/") else 422
        return await refuse(http, ApiError(status, "; ".join(problems[:5]).encode("utf-8", "replace").decode()))

    def answers(http: HttpRequest, prompts: list[list[int]], sampling: Sampling) -> Answers:
        worker = min(workers, key=lambda worker: worker.engine.running + len(worker.engine.waiting))
        return Answers(worker, http, prompts, sampling)

    # -- nanochat's own

    app.include_router(page_router())

    @app.get("/health")
    async def health() -> dict:
        return {"status": "ok", "ready": True, "num_gpus": len(workers), "available_workers": sum(worker.available for worker in workers)}

    @app.get("/stats")
    async def stats() -> dict:
        available = sum(worker.available for worker in workers)
        return {"total_workers": len(workers), "available_workers": available, "busy_workers": len(workers) - available,
                "workers": [{"gpu_id": worker.gpu_id, "device": str(worker.device), "slots": worker.engine.slots, "running": worker.engine.running,
                             "waiting": len(worker.engine.waiting)} for worker in workers]}

    @app.get("/info")
    async def about() -> dict:
        return {**info, "defaults": {"temperature": temperature, "top_k": top_k, "max_tokens": max_tokens}}

    @app.post("/chat/completions")
    async def chat(request: ChatRequest, http: HttpRequest) -> Response:
        validate_chat_request(request)
        prompt = chat_prompt(tokenizer, [(message.role, message.content) for message in request.messages], base)
        sampling = Sampling(temperature if request.temperature is None else request.temperature, top_k if request.top_k is None else request.top_k,
                            request.max_tokens or max_tokens)
        found = answers(http, [prompt], sampling)

        async def events() -> AsyncIterator[str]:
            try:
                async for _, text, _ in found:
                    if text:
                        yield event({"token": text, "gpu": found.worker.gpu_id})
                yield event({"done": True, "finish_reason": found.reasons[0], **found.usage()})
            except ApiError as error:
                yield event({"error": error.detail})
        return event_stream(events())

    # -- OpenAI's

    @app.get("/v1/models")
    async def models() -> dict:
        return {"object": "list", "data": [{"id": name, "object": "model", "created": created, "owned_by": "nanochat"}]}

    @app.get("/v1/models/{model}")
    async def model_of(model: str) -> dict:
        if model != name:
            raise ApiError(404, f"there is no model {model[:100]!r} here, only {name!r}", "model_not_found", "model")
        return (await models())["data"][0]

    async def respond(http: HttpRequest, request: OpenAIRequest, prompts: list[list[int]], limit: int | None, kind: str, choice, last_choice) -> Response:
        """`choice(text, reason)` and `last_choice(text, reason)` make what is peculiar to an endpoint, of a piece and of a whole answer."""
        n = 1 if request.n is None else request.n
        if not 1 <= n * len(prompts) <= MAX_CHOICES:
            raise ApiError(400, f"n must be such that there are 1 to {MAX_CHOICES} answers", param="n")
        if request.seed is not None and not -2**63 <= request.seed < 2**63 - MAX_CHOICES:
            raise ApiError(400, "seed must be a whole number of 64 bits", param="seed")
        check_sampling(request.temperature, request.top_k, None if limit is None else min(limit, MAX_MAX_TOKENS))  # the context limits it anyway
        sampling = Sampling(temperature if request.temperature is None else request.temperature, top_k if request.top_k is None else request.top_k,
                            limit or max_tokens, stops=[request.stop] if isinstance(request.stop, str) else request.stop or [])
        if request.seed is not None:
            sampling.seed = request.seed
        found = answers(http, [prompt for prompt in prompts for _ in range(n)], sampling)
        head = {"id": f"{'chatcmpl' if kind.startswith('chat') else 'cmpl'}-{uuid.uuid4().hex}", "object": kind, "created": int(time.time()), "model": name}

        if not request.stream:
            texts = [""] * len(found.requests)
            async for index, text, _ in found:
                texts[index] += text
            choices = [{"index": i, "logprobs": None, **last_choice(text, reason)} for i, (text, reason) in enumerate(zip(texts, found.reasons))]
            return JSONResponse({**head, "choices": choices, "usage": found.usage()})

        if kind.startswith("chat"):
            head["object"] += ".chunk"
        with_usage = request.stream_options is not None and request.stream_options.include_usage

        async def events() -> AsyncIterator[str]:
            try:
                async for index, text, reason in found:
                    for piece, why in ([(text, "")] if text else []) + ([("", reason)] if reason else []):
                        yield event({**head, "choices": [{"index": index, "logprobs": None, **choice(piece, why)}], **({"usage": None} if with_usage else {})})
                if with_usage:
                    yield event({**head, "choices": [], "usage": found.usage()})
                yield "data: [DONE]\n\n"
            except ApiError as error:
                yield event(openai_error(error))
        return event_stream(events())

    @app.post("/v1/chat/completions")
    async def openai_chat(request: OpenAIChatRequest, http: HttpRequest) -> Response:
        check_openai(request, name)
        messages = [("system" if message.role == "developer" else message.role, plain_text(i, message)) for i, message in enumerate(request.messages)]
        check_messages(messages, ("system", "user", "assistant"))
        limit = request.max_tokens if request.max_completion_tokens is None else request.max_completion_tokens
        return await respond(
            http, request, [chat_prompt(tokenizer, messages, base)], limit, "chat.completion",
            lambda text, reason: {"delta": {} if reason else {"role": "assistant", "content": text}, "finish_reason": reason or None},
            lambda text, reason: {"message": {"role": "assistant", "content": text}, "finish_reason": reason})

    @app.post("/v1/completions")
    async def openai_completion(request: OpenAICompletionRequest, http: HttpRequest) -> Response:
        check_openai(request, name)
        both = lambda text, reason: {"text": text, "finish_reason": reason or None}
        return await respond(http, request, completion_prompts(tokenizer, request.prompt), request.max_tokens, "text_completion", both, both)

    return app

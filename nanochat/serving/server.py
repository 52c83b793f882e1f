"""The HTTP side of chatting: nanochat's own endpoints and page, and the part of OpenAI's API that its clients use.

| endpoint | |
|---|---|
| GET `/`, `/logo.svg`, `/ui/...`, POST `/render` | the page (page.py) |
| POST `/chat/completions` | nanochat's own: events `{"token", "gpu"}`, at last `{"done": true}` or `{"error"}` |
| GET `/health`, `/stats`, `/info` | readiness, load, and what the page says about the model |
| GET `/v1/models`, POST `/v1/chat/completions`, `/v1/completions` | OpenAI's, streaming and not |
| GET `/tokenizer_info`, POST `/tokenize`, `/detokenize` | vLLM's, for lm_eval |

Notable:
* requests are checked by `nanochat.serving.api`, off the event loop, and answered by `nanochat.serving.answers`
* bytes are counted whatever a client announces, and a client has a time to send a request and to read its answer
* a web page elsewhere cannot use the server through its visitor's browser: no other origin may read, JSON must be declared (which makes a browser ask
  first), and without a key the Host header must name this machine, or a name that is made to point here would count as the same origin
* with a key it is asked for as a bearer token, or as a password of any user, for which browsers have a form
"""
import asyncio
import base64
import hmac
import ipaddress
import socket
import time
import uuid
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from typing import Any

import h11
from fastapi import FastAPI
from fastapi import Request as HttpRequest
from fastapi.middleware.cors import CORSMiddleware
from fastapi.responses import JSONResponse, Response, StreamingResponse
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from uvicorn.protocols.http.h11_impl import H11Protocol

from nanochat.serving.answers import Answers, ChatForm, CompletionForm, Worker, openai_answer, openai_error, openai_events, own_events
from nanochat.serving.api import (
    MAX_BODY,
    ApiError,
    Defaults,
    Fields,
    Query,
    encode_text,
    read_chat,
    read_completion,
    read_json,
    read_own_chat,
    wrong_type,
)
from nanochat.serving.page import page_router

SEND_SECONDS = 20  # for a client to send a whole request
READ_SECONDS = 60  # for a client to take what is written to it, before more is
MAX_EXCESS = 8 * MAX_BODY  # bytes of a request that was refused: so many are read, and dropped, for the sake of the client that has to see the refusal


# -----------------------------------------------------------------------------
# At the door


class Connection(H11Protocol):
    """uvicorn's connection, which by itself waits for ever: for a request that never ends, and for a reader that does not read."""

    _sending: asyncio.TimerHandle | None = None
    _reading: asyncio.TimerHandle | None = None
    _received = 0

    def connection_made(self, transport) -> None:
        super().connection_made(transport)
        transport.set_write_buffer_limits(high=0)  # or an answer of some KB that nobody takes would never be called unread
        self._watch()

    def connection_lost(self, exc) -> None:
        super().connection_lost(exc)
        for timer in (self._sending, self._reading):
            if timer is not None:
                timer.cancel()

    def data_received(self, data: bytes) -> None:
        self._received += len(data)
        if self._received > MAX_EXCESS:
            self.transport.abort()
            return
        super().data_received(data)
        self._watch()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        self._watch()

    def pause_writing(self) -> None:
        super().pause_writing()
        self._reading = self.loop.call_later(READ_SECONDS, self.transport.abort)

    def resume_writing(self) -> None:
        super().resume_writing()
        if self._reading is not None:
            self._reading.cancel()

    def _watch(self) -> None:
        """Starts the clock where a request begins, and stops it where it is complete."""
        waiting = self.conn.their_state in (h11.IDLE, h11.SEND_BODY)
        if self.conn.their_state is not h11.SEND_BODY:
            self._received = 0
        if waiting and self._sending is None:
            self._sending = self.loop.call_later(SEND_SECONDS, self.transport.abort)
        elif not waiting and self._sending is not None:
            self._sending.cancel()
            self._sending = None


class LimitBody:
    """ASGI middleware: 413 for bodies above MAX_BODY, before they are read into memory."""

    def __init__(self, app):
        self.app = app

    async def __call__(self, scope, receive, send) -> None:
        announced = dict(scope.get("headers", ())).get(b"content-length", b"0")
        size = 0

        def check() -> None:
            if size > MAX_BODY or announced.isdigit() and len(announced) < 20 and int(announced) > MAX_BODY:
                raise ApiError(413, f"the request is larger than {MAX_BODY} bytes")

        async def receive_some():
            nonlocal size
            check()
            message = await receive()
            size += len(message.get("body", b""))
            check()
            return message
        await self.app(scope, receive_some, send)


class Guard:
    """ASGI middleware: 401 without the key where there is one; else 403 where the Host header names another machine."""

    def __init__(self, app, key: str | None, names: Sequence[str]):
        self.app, self.key = app, key
        self.names = {"localhost", *(name.lower().rstrip(".") for name in (socket.gethostname(), *names))}

    async def __call__(self, scope, receive, send) -> None:
        if scope["type"] == "http":
            headers = dict(scope["headers"])
            problem = self._problem(scope["path"], headers.get(b"host", b"localhost").decode("latin-1"), headers.get(b"authorization", b"").decode("latin-1"))
            if problem is not None:
                await refusal(scope["path"], problem)(scope, receive, send)
                return
        await self.app(scope, receive, send)

    def _problem(self, path: str, host: str, credentials: str) -> ApiError | None:
        if self.key is None:
            if self._is_ours(host):
                return None
            return ApiError(403, f"this server is not {host[:100]!r}: ask for it by its address, or start it with an --api-key to serve it under any name")
        if path == "/health" or hmac.compare_digest(password(credentials).encode(), self.key.encode()):
            return None
        browser = not path.startswith("/v1/")
        return ApiError(401, "the API key is missing or wrong; send it as: Authorization: Bearer KEY", "invalid_api_key",
                        headers={"WWW-Authenticate": 'Basic realm="nanochat"' if browser else "Bearer"})

    def _is_ours(self, host: str) -> bool:
        name = host.rpartition(":")[0] if host.rpartition(":")[2].isdigit() else host
        try:
            ipaddress.ip_address(name.removeprefix("[").removesuffix("]"))
            return True  # an address cannot be made to point elsewhere
        except ValueError:
            name = name.lower().rstrip(".")
            return name in self.names or name.endswith(".localhost")


def password(credentials: str) -> str:
    """What an Authorization header proves to know."""
    scheme, _, value = credentials.partition(" ")
    if scheme.lower() != "basic":
        return value.strip() if scheme.lower() == "bearer" else ""
    try:
        return base64.b64decode(value).decode().partition(":")[2]
    except ValueError:  # no base64, or no UTF-8 in it
        return ""


def refusal(path: str, error: HTTPException) -> Response:
    """An error in the form of the endpoint."""
    openai = path.startswith("/v1/")
    own = {"detail": error.detail, **({"code": error.code} if getattr(error, "code", None) else {})}  # type: ignore[attr-defined]
    return JSONResponse(openai_error(error) if openai else own, 400 if openai and error.status_code == 422 else error.status_code, error.headers)


async def checked(http: HttpRequest, read: Callable[..., Any], *args) -> Any:
    """`read(body, *args)` on another thread."""
    kind = http.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json" and not kind.endswith("+json"):
        raise ApiError(415, f"the body comes as {kind[:50] or 'nothing that has a type'}; send JSON with the header Content-Type: application/json")
    try:
        body = await http.body()
    except ClientDisconnect:
        raise ApiError(400, "the client went away before it had sent its request") from None
    return await asyncio.to_thread(read, body, *args)


def event_stream(events: AsyncIterator[str]) -> StreamingResponse:
    return StreamingResponse(events, media_type="text/event-stream", headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"})


# -----------------------------------------------------------------------------
# The application


def create_app(workers: list[Worker], info: dict, temperature: float = 0.8, top_k: int = 50, max_tokens: int = 512, key: str | None = None,
               origins: Sequence[str] = (), names: Sequence[str] = ()) -> FastAPI:
    """The application of a model that is loaded already. `info["model"]` is its name for clients, `info["source"]` its stage of training.

    `key` is asked of every client; pages of `origins` may use the server; `names` are this machine's, besides its own.
    """
    tokenizer, base, name, created = workers[0].tokenizer, info["source"] == "base", info["model"], int(time.time())
    context, defaults = workers[0].engine.context, Defaults(temperature, top_k, max_tokens)

    @asynccontextmanager
    async def lifespan(app: FastAPI):
        for worker in workers:
            worker.engine.start()
        yield
        for worker in workers:
            await asyncio.to_thread(worker.engine.close)

    app = FastAPI(title="nanochat", lifespan=lifespan, docs_url=None, redoc_url=None, openapi_url=None)
    app.add_middleware(LimitBody)
    app.add_middleware(Guard, key=key, names=names)
    if origins:
        app.add_middleware(CORSMiddleware, allow_origins=list(origins), allow_methods=["*"], allow_headers=["*"])

    @app.exception_handler(HTTPException)
    async def refuse(http: HttpRequest, error: HTTPException) -> Response:
        return refusal(http.url.path, error)

    def get(path: str):
        return app.api_route(path, methods=["GET", "HEAD"])

    def answers(http: HttpRequest, query: Query, what: str = "messages") -> Answers:
        worker = min(workers, key=lambda worker: worker.engine.running + len(worker.engine.waiting))
        return Answers(worker, http, query, what)

    # -- nanochat's own

    app.include_router(page_router())

    @get("/health")
    async def health() -> dict:
        return {"status": "ok", "ready": True, "num_gpus": len(workers), "available_workers": sum(worker.available for worker in workers)}

    @get("/stats")
    async def stats() -> dict:
        available = sum(worker.available for worker in workers)
        return {"total_workers": len(workers), "available_workers": available, "busy_workers": len(workers) - available,
                "workers": [{"gpu_id": worker.gpu_id, "device": str(worker.device), "slots": worker.engine.slots, "running": worker.engine.running,
                             "waiting": len(worker.engine.waiting)} for worker in workers]}

    @get("/info")
    async def about() -> dict:
        return {**info, "continue_final_message": True, "defaults": {"temperature": temperature, "top_k": top_k, "max_tokens": max_tokens}}

    @app.post("/chat/completions")
    async def chat(http: HttpRequest) -> Response:
        return event_stream(own_events(answers(http, await checked(http, read_own_chat, tokenizer, base, defaults))))

    # -- OpenAI's

    @get("/v1/models")
    async def models() -> dict:
        return {"object": "list", "data": [{"id": name, "object": "model", "created": created, "owned_by": "nanochat"}]}

    @get("/v1/models/{model}")
    async def model_of(model: str) -> dict:
        if model != name:
            raise ApiError(404, f"there is no model {model[:100]!r} here, only {name!r}", "model_not_found", "model")
        return (await models())["data"][0]

    async def respond(found: Answers, form: ChatForm | CompletionForm) -> Response:
        head = {"id": f"{form.prefix}-{uuid.uuid4().hex}", "object": form.kind, "created": int(time.time()), "model": name}
        if found.query.stream:
            return event_stream(openai_events(found, form, head))
        return await asyncio.to_thread(JSONResponse, await openai_answer(found, form, head))  # which encodes it

    @app.post("/v1/chat/completions")
    async def openai_chat(http: HttpRequest) -> Response:
        query = await checked(http, read_chat, tokenizer, base, defaults, name)
        return await respond(answers(http, query), ChatForm(tokenizer))

    @app.post("/v1/completions")
    async def openai_completion(http: HttpRequest) -> Response:
        query = await checked(http, read_completion, tokenizer, defaults, name, context)
        return await respond(answers(http, query, "prompt"), CompletionForm(tokenizer))

    # -- vLLM's

    @get("/tokenizer_info")
    async def tokenizer_info() -> dict:
        bos = tokenizer.id_to_token(tokenizer.get_bos_token_id())
        return {"tokenizer_class": type(tokenizer).__name__, "bos_token": bos, "eos_token": bos, "vocab_size": tokenizer.get_vocab_size()}

    @app.post("/tokenize")
    async def tokenize(http: HttpRequest) -> dict:
        def read(body: bytes) -> list[int]:
            text = Fields(read_json(body)).take("prompt")
            if not isinstance(text, str):
                raise wrong_type("prompt", "a text")
            return encode_text(tokenizer, text)
        tokens = await checked(http, read)
        return {"tokens": tokens, "count": len(tokens), "max_model_len": context}

    @app.post("/detokenize")
    async def detokenize(http: HttpRequest) -> dict:
        def read(body: bytes) -> str:
            tokens = Fields(read_json(body)).take("tokens")
            if not isinstance(tokens, list) or not all(type(token) is int and 0 <= token < tokenizer.get_vocab_size() for token in tokens):
                raise wrong_type("tokens", "a list of token ids")
            return tokenizer.decode(tokens)
        return {"prompt": await checked(http, read)}

    return app

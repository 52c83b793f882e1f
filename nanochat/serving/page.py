"""The web page's part of the server: its files, and POST `/render`, which turns Markdown into what the page shows.

The page's policy allows no script, style, font, picture or connection but this server's own, and no HTML made from text.
"""
import asyncio
import json
import time
from pathlib import Path

from fastapi import APIRouter, HTTPException, Request
from fastapi.responses import Response
from starlette.requests import ClientDisconnect

from nanochat.serving.markdown import markdown_tree

HERE = Path(__file__).parents[1]
SCRIPTS = ("about.js", "chat.js", "dom.js", "follow.js", "list.js", "server.js", "settings.js", "store.js", "theme.js")
FILES = {"/": "ui.html", "/logo.svg": "logo.svg", **{f"/ui/{name}": f"ui/{name}" for name in ("style.css", *SCRIPTS)}}
TYPES = {".html": "text/html", ".svg": "image/svg+xml", ".css": "text/css", ".js": "text/javascript"}
HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; base-uri 'none'; "
                               "form-action 'none'; frame-ancestors 'none'; require-trusted-types-for 'script'; trusted-types 'none'",
    "X-Content-Type-Options": "nosniff", "Referrer-Policy": "no-referrer", "Cache-Control": "no-cache",
}
MAX_TEXTS, MAX_CHARACTERS = 50, 100_000  # of a request
MAX_SECONDS = 3.0  # of a request, after which no other text is begun
MAX_WAITING = 16  # requests


def _render(body: bytes) -> bytes:
    """Trees of the first texts, as many as there is time for, one at least. Raises ValueError for a body that is not {"texts": [up to MAX_TEXTS texts of MAX_CHARACTERS together]}."""
    try:
        texts = json.loads(body)["texts"]
    except (ValueError, TypeError, KeyError, RecursionError):
        texts = None
    if not isinstance(texts, list) or len(texts) > MAX_TEXTS or not all(isinstance(text, str) for text in texts):
        raise ValueError(f'send {{"texts": ["..."]}}, at most {MAX_TEXTS} of them')
    if sum(map(len, texts)) > MAX_CHARACTERS:
        raise ValueError(f"send at most {MAX_CHARACTERS} characters at a time")
    until = time.monotonic() + MAX_SECONDS
    trees = [markdown_tree(text) for i, text in enumerate(texts) if i == 0 or time.monotonic() < until]
    return json.dumps({"trees": trees}).encode()


def page_router() -> APIRouter:
    router = APIRouter()
    one_at_a_time, waiting = asyncio.Semaphore(1), 0  # so that no flood of texts takes the model's share of the processor

    def serve(path: str, file: Path) -> None:
        @router.api_route(path, methods=["GET", "HEAD"])
        async def read() -> Response:
            return Response(file.read_bytes(), media_type=TYPES[file.suffix], headers=HEADERS)

    for path, name in FILES.items():
        serve(path, HERE / name)

    @router.post("/render")
    async def render(http: Request) -> Response:
        """{"texts": [...]} becomes {"trees": [...]}, each as of `markdown_tree`; fewer where they take long, so that the page asks again. A page elsewhere cannot declare JSON without the browser asking first."""
        if http.headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
            raise HTTPException(415, "send JSON with the header Content-Type: application/json")
        try:
            body = await http.body()
        except ClientDisconnect:
            raise HTTPException(400, "the client went away before it had sent its request") from None
        nonlocal waiting
        if waiting >= MAX_WAITING:
            raise HTTPException(503, "too many texts wait to be rendered; try again soon", {"Retry-After": "5"})
        waiting += 1
        try:
            async with one_at_a_time:
                if await http.is_disconnected():
                    raise HTTPException(400, "the client went away before its texts were rendered")
                return Response(await asyncio.to_thread(_render, body), media_type="application/json")
        except ValueError as error:
            raise HTTPException(400, str(error)) from None
        finally:
            waiting -= 1

    return router

"""Serves a model: a page to chat with, nanochat's own endpoints, and an API that OpenAI's clients speak.

    python -m scripts.chat_web                     # the fine-tuned model, or the base model while there is none
    python -m scripts.chat_web --source=base       # continues your text
    curl http://127.0.0.1:8000/v1/completions -H 'Content-Type: application/json' -d '{"model": "base-d12", "prompt": "The sky"}'

Clients of OpenAI take http://127.0.0.1:8000/v1 as their base URL and any API key. Only this machine can connect, unless `--host` says
otherwise; then give an `--api-key`, which the page asks for as a password. Ctrl-C or SIGTERM lets the answers under way finish.
"""
import ipaddress
import logging
import math
import os
import re
import signal
import socket
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
import uvicorn

from nanochat.batching import BatchedEngine, slots_for
from nanochat.checkpoint_manager import CheckpointSettings, build_model
from nanochat.cli import UsageError, command, flag, non_negative_float, non_negative_int, parse_settings, positive_int
from nanochat.common import autodetect_device_type, compute_init
from nanochat.serving.answers import Worker
from nanochat.serving.api import ApiError, check_sampling
from nanochat.serving.server import Connection, create_app

DRAIN_SECONDS = 20


def describe_model(source: str, folder: Path, model, meta: dict) -> dict:
    """What the page tells about a model."""
    config = model.config
    layers = getattr(config, "layers", ())
    ranks = sorted({rank for layer in layers for rank in (layer.attn_rank, layer.mlp_rank)}) or [0]
    val_bpb = meta.get("val_bpb")
    return {
        "model": f"{source}-{folder.name}", "source": source, "step": meta.get("step"), "depth": config.n_layer, "width": config.n_embd,
        "heads": sorted({layer.n_head for layer in layers}) or [config.n_head], "ranks": ranks, "block": layers[0].block if layers else "prenorm",
        "parameters": sum(p.numel() for p in model.parameters()), "context": config.sequence_len, "vocabulary": config.vocab_size,
        "val_bpb": val_bpb if isinstance(val_bpb, float) and math.isfinite(val_bpb) else None,
        "growth": [{key: growth.get(key) for key in ("step", "from", "to", "mode")} for growth in meta.get("growth") or []],
    }


def bind(host: str, port: int) -> socket.socket:
    """A socket that listens at that address, before a model is loaded for nothing. Raises UsageError."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        sock = socket.socket(family, kind, protocol)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind(address)
        sock.listen(1024)  # now: until one of them listens, two servers may bind the same port
        return sock
    except (OSError, UnicodeError) as error:  # the latter of a name with an empty part
        raise UsageError(f"cannot serve at {host} port {port}: {getattr(error, 'strerror', None) or 'that is no name of a machine'}; choose another --port or --host") from error


def check_key(key: str | None) -> str | None:
    """The key from the flag or the environment. One that is empty was meant to protect: UsageError."""
    key = os.environ.get("NANOCHAT_API_KEY") if key is None else key
    if key is not None and not (key.isascii() and key.isprintable() and key.strip() == key != ""):
        raise UsageError("the API key is empty, or has characters that a header cannot hold; use letters and digits, or leave it out to ask for none")
    return key


def is_private(host: str) -> bool:
    """Whether only this machine can reach a server there."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


@dataclass
class Settings(CheckpointSettings):
    num_gpus: int = flag(1, "Copies of the model, each on a GPU of its own", type=positive_int, short="-n")
    temperature: float = flag(0.8, "How freely answers are sampled where a request does not say; 0 always takes the likeliest token",
                              type=non_negative_float, short="-t")
    top_k: int = flag(50, "Number of likeliest tokens to sample among where a request does not say; 0: all tokens", type=non_negative_int, short="-k")
    max_tokens: int = flag(512, "Length of the longest answer in tokens where a request does not say", type=positive_int, short="-m")
    port: int = flag(8000, "Port to serve at; 0: a free one", type=non_negative_int, short="-p")
    host: str = flag("127.0.0.1", "Address to serve at; 0.0.0.0: for everyone who can reach this machine")
    api_key: str | None = flag(None, "Key that every client must send; other users of this machine can read it on the command line, but not in the "
                                     "environment's NANOCHAT_API_KEY")
    cors_origin: list[str] = flag([], "Origin of web pages that may use the server besides its own, such as https://example.org; may be given several times",
                                  action="append", metavar="ORIGIN")
    batch_size: int | None = flag(None, "Answers generated at the same time, for which more of them wait (default: as many as a quarter of the free memory "
                                        "holds, at most 64)", type=positive_int)
    device_type: str = flag("", "Device to run on: cuda, mps or cpu (default: the best one here)")


@command
def main(argv=None) -> None:
    settings = parse_settings(Settings, argv, __doc__.splitlines()[0])
    try:
        check_sampling(settings.temperature, settings.top_k, settings.max_tokens)
    except ApiError as error:
        raise UsageError(error.detail) from error
    if settings.port > 65535:
        raise UsageError(f"there is no port {settings.port}; use one up to 65535")

    key = check_key(settings.api_key)
    for origin in settings.cors_origin:
        if origin != "*" and not re.fullmatch(r"https?://[^/\s]+", origin):
            raise UsageError(f"--cors-origin={origin} is no origin; it looks like https://example.org, without a path")

    for cache in ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY"):  # of code for matmuls of a shape: 1,024 of up to 2 MB each, and prompts have all lengths
        os.environ.setdefault(cache, "32")
    sock = bind(settings.host, settings.port)
    *_, device = compute_init(settings.device_type or autodetect_device_type())
    if settings.num_gpus > (torch.cuda.device_count() if device.type == "cuda" else 1):
        raise UsageError(f"--num-gpus={settings.num_gpus}: there are not so many GPUs here; leave it out")
    source, folder, step = settings.find()
    workers = []
    for gpu in range(settings.num_gpus):
        place = torch.device("cuda", gpu) if settings.num_gpus > 1 else device
        model, tokenizer, meta = build_model(folder, step, place, phase="eval")
        workers.append(Worker(gpu, place, BatchedEngine(model, tokenizer, slots=settings.batch_size or slots_for(model)), tokenizer))
    info = describe_model(source, folder, model, meta)
    app = create_app(workers, info, settings.temperature, settings.top_k, settings.max_tokens, key, settings.cors_origin, [settings.host])

    logging.getLogger("uvicorn.error").setLevel(logging.WARNING)
    server = uvicorn.Server(uvicorn.Config(app, http=Connection, log_config=None, access_log=False, timeout_graceful_shutdown=DRAIN_SECONDS))
    # while uvicorn starts; and when all is done it raises the signal again, which is no reason to die of it
    signal.signal(signal.SIGTERM, lambda *_: setattr(server, "should_exit", True))
    host = f"[{settings.host}]" if ":" in settings.host else settings.host
    print(f"{info['model']} of step {step} at http://{host}:{sock.getsockname()[1]} (Ctrl-C ends)", flush=True)
    if key is None and not is_private(settings.host):
        print("warning: everyone who can reach this machine can use the model; --api-key=KEY asks them for a key", file=sys.stderr, flush=True)
    server.run(sockets=[sock])


if __name__ == "__main__":
    sys.exit(main())

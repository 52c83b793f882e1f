"""How fast a model decodes: one text, token by token, on the machine where this runs, as the engine does it."""
import time

import torch

from nanochat.engine import Engine
from nanochat.evals.results import Results, mean_row
from nanochat.kernel_choice import machine

REPEATS = 5


def tokens_per_second(engine: Engine, count: int) -> float:
    """Over `count` tokens, each the likeliest behind those before it; the model is asked for all of them, whatever they are."""
    cache, token = engine._new_cache(1, count), engine.bos
    start = time.perf_counter()
    for _ in range(count):
        token = int(engine._forward([[token]], cache).argmax())  # waits for the device
    return count / (time.perf_counter() - start)


def evaluate_decoding(model, tokenizer, count: int) -> Results:
    """The mean of `REPEATS` measurements. The key names the machine: speeds of different ones never stand beside each other."""
    engine = Engine(model, tokenizer)
    tokens_per_second(engine, min(count, 8))  # warms up
    rates = torch.tensor([tokens_per_second(engine, count) for _ in range(REPEATS)])
    device = model.get_device()
    name = torch.cuda.get_device_name(device).replace("/", "-") if device.type == "cuda" else machine()
    return {name: mean_row(rates, metric="tokens/s", label="decoded tokens/s")}

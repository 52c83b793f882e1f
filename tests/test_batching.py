"""Continuous batching: every answer is the one that the engine gives to that request alone, whoever else is served."""
import os
import random
import subprocess
import sys
import threading
from types import SimpleNamespace

import pytest
import torch

from dev import bench_serve
from nanochat.batching import PIECE, BatchedEngine, Overloaded, Request
from nanochat.engine import Engine
from tests.golden.byte_tokenizer import ByteTokenizer
from tests.golden.fixtures import build_model
from tests.growing import mixed, random_model, uniform
from tests.tiny import ROOT

SPECIAL = {name: 90 + i for i, name in enumerate(
    ["<|bos|>", "<|assistant_end|>", "<|python_start|>", "<|python_end|>", "<|output_start|>", "<|output_end|>"])}
TOKENIZER = ByteTokenizer(SPECIAL)
MODELS = {
    "stock": lambda: build_model(dict(sequence_len=64, vocab_size=100, n_layer=3, n_head=4, n_kv_head=2, n_embd=32, window_pattern="SL"), seed=7),
    "layered": lambda: random_model(mixed()),  # low ranks, short windows, layers that differ
    "normalized": lambda: random_model(uniform("ngpt")),
}


class Client:
    """A request and what has come of it."""

    def __init__(self, prompt: list[int], max_tokens: int, **settings):
        self.prompt, self.max_tokens, self.settings = prompt, max_tokens, settings
        self.tokens: list[int] = []
        self.reason = ""
        self.request = Request(prompt, max_tokens, self.take, **settings)

    def take(self, token, reason):
        assert not self.reason, "nothing comes after the end"
        self.tokens += [] if token is None else [token]
        self.reason = reason

    def alone(self, engine: Engine) -> list[int]:
        return engine.generate_batch(self.prompt, 1, self.max_tokens, **self.settings)[0][0][len(self.prompt):]


def clients(count: int, seed: int = 0, context: int = 64) -> list[Client]:
    rng = random.Random(seed)
    prompts = [[SPECIAL["<|bos|>"], *(rng.randrange(90) for _ in range(rng.randint(0, 40)))] for _ in range(count)]
    return [Client(prompt, rng.randint(1, context - len(prompt)), temperature=rng.choice([0, 0.7, 1.5]), top_k=rng.choice([None, 0, 5]), seed=i)
            for i, prompt in enumerate(prompts)]


def finish(engine: BatchedEngine) -> None:
    while engine.waiting or engine.running:
        engine.step()


@pytest.mark.parametrize("name", MODELS)
def test_answers_are_those_of_one_request_at_a_time(name):
    """More requests than slots, of all lengths and settings: rows join, end at different steps and move into gaps."""
    engine = BatchedEngine(MODELS[name](), TOKENIZER, slots=4)
    served = clients(14)
    for client in served[:9]:
        engine.submit(client.request)
    for _ in range(7):
        engine.step()
    for client in served[9:]:
        engine.submit(client.request)
    finish(engine)
    assert len({tuple(client.tokens) for client in served}) > 10
    for client in served:
        assert client.tokens == client.alone(engine)
        assert client.reason == ("length" if len(client.tokens) == client.max_tokens else "stop")


class Recording(BatchedEngine):
    """Keeps the logits (V,) of every step of every request."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.logits: dict[Request, list[torch.Tensor]] = {}

    def _sample(self, rows, logits):
        for row, of_row in zip(rows, logits, strict=True):
            self.logits.setdefault(row.request, []).append(of_row.flatten().clone())
        return super()._sample(rows, logits)


def check_bfloat16() -> None:
    model = MODELS["stock"]()
    model.cast_for_inference()
    assert model.lm_head.weight.dtype == torch.bfloat16
    together = Recording(model, TOKENIZER, slots=3)
    served = [Client([90, *range(10, 10 + 3 * i)], 6, temperature=0) for i in range(4)]
    for client in served:
        together.submit(client.request)
    finish(together)
    for client in served:
        alone, single = Recording(model, TOKENIZER, slots=1), Client(client.prompt, client.max_tokens, temperature=0)
        alone.submit(single.request)
        finish(alone)
        assert single.tokens == client.alone(Engine(model, TOKENIZER)), "alone nothing differs from the plain engine"
        steps = zip(together.logits[client.request], alone.logits[single.request], strict=False)
        for i, (got, expected) in enumerate(steps):
            close = 0.01 * expected.abs().max()
            assert (got - expected).abs().max() <= close
            if client.tokens[:i + 1] != single.tokens[:i + 1]:  # from here on they answer different texts
                best, second = expected.topk(2).values
                assert best - second <= 2 * close
                break


def test_bfloat16():
    """The dtype is fixed at import: a process of its own."""
    script = "from tests.test_batching import check_bfloat16; check_bfloat16()"
    subprocess.run([sys.executable, "-c", script], env={**os.environ, "NANOCHAT_DTYPE": "bfloat16"}, cwd=ROOT, check=True)


def test_the_last_row_may_move_while_a_prompt_enters(monkeypatch):
    monkeypatch.setattr("nanochat.batching.PIECE", 5)
    engine = BatchedEngine(MODELS["layered"](), TOKENIZER, slots=5)
    served = clients(20, seed=3)
    for client in served:
        engine.submit(client.request)
    moved = 0
    while engine.waiting or engine.running:
        before, entering = len(engine.rows), engine.entering
        engine.step()
        moved += entering is not None and entering is engine.entering and len(engine.rows) < before
    assert moved
    assert all(client.tokens == client.alone(engine) for client in served)


def test_a_long_prompt_does_not_hold_up_the_others():
    model = build_model(dict(sequence_len=4 * PIECE, vocab_size=100, n_layer=1, n_head=1, n_kv_head=1, n_embd=32, window_pattern="L"), seed=1)
    engine = BatchedEngine(model, TOKENIZER, slots=2)
    short, long = Client([90], 20, temperature=0), Client([90] * (3 * PIECE), 2, temperature=0)
    engine.submit(short.request)
    engine.step()
    engine.submit(long.request)
    before = len(short.tokens)
    for _ in range(3):
        assert not long.tokens
        engine.step()
    assert len(short.tokens) == before + 3 and long.tokens
    finish(engine)
    assert long.tokens == long.alone(engine)


class ChainModel:
    """The likeliest token follows from the last one alone; counts the rows of its passes."""

    def __init__(self, successors: dict[int, int], sequence_len: int = 64):
        self.config = SimpleNamespace(n_kv_head=1, n_head=1, n_embd=8, n_layer=1, sequence_len=sequence_len)
        self.successors, self.rows = successors, []

    def get_device(self):
        return torch.device("cpu")

    def forward(self, ids, kv_cache=None):
        kv_cache.advance(ids.size(1))
        self.rows.append(ids.size(0))
        logits = torch.zeros(*ids.shape, 100)
        for position, token in enumerate(ids.flatten().tolist()):
            logits.view(-1, 100)[position, self.successors.get(token, token)] = 1
        return logits


def test_each_row_has_a_calculator():
    text = TOKENIZER.encode("6*7")
    call = [1, SPECIAL["<|python_start|>"], *text, SPECIAL["<|python_end|>"]]
    chain = dict(zip(call, call[1:])) | {SPECIAL["<|output_end|>"]: SPECIAL["<|assistant_end|>"]}
    engine = BatchedEngine(ChainModel(chain), TOKENIZER, slots=3)
    calling, other = Client([90, 1], 30, temperature=0), Client([90, 5], 9, temperature=0)
    for client in (calling, other):
        engine.submit(client.request)
    finish(engine)
    answer = [SPECIAL["<|output_start|>"], *TOKENIZER.encode("42"), SPECIAL["<|output_end|>"]]
    assert calling.tokens == call[1:] + answer and calling.reason == "stop"
    assert other.tokens == [5] * 9


def test_first_come_first_served():
    engine = BatchedEngine(ChainModel({}), TOKENIZER, slots=2)
    served = [Client([90, i], 3 + i % 3, temperature=0) for i in range(9)]
    order = []
    for i, client in enumerate(served):
        client.request.emit = lambda token, reason, i=i: order.append(i) if i not in order else None
        engine.submit(client.request)
    finish(engine)
    assert order == list(range(9))
    assert max(engine.model.rows) == 2


@pytest.mark.parametrize("when", ["waiting", "entering", "running"])
def test_a_cancelled_request_frees_its_place(when, monkeypatch):
    monkeypatch.setattr("nanochat.batching.PIECE", 4)
    engine = BatchedEngine(ChainModel({}), TOKENIZER, slots=1)
    first, gone, last = (Client([90, *[i] * 20], 5, temperature=0) for i in (1, 2, 3))
    served = [first, gone, last] if when == "waiting" else [gone, last]
    for client in served:
        engine.submit(client.request)
    for _ in range({"waiting": 1, "entering": 1, "running": 7}[when]):
        engine.step()
    seen = len(gone.tokens)
    assert (0 < seen < 5) if when == "running" else seen == 0
    engine.cancel(gone.request)
    finish(engine)
    assert len(gone.tokens) == seen and not gone.reason
    assert last.tokens == [3] * 5


def test_what_does_not_fit_is_refused():
    engine = BatchedEngine(ChainModel({}), TOKENIZER, max_waiting=2)
    for prompt, max_tokens in (([], 5), ([90] * 60, 5), ([90], 0)):
        with pytest.raises(ValueError, match="do not fit into a context of 64"):
            engine.submit(Client(prompt, max_tokens).request)
    for _ in range(2):
        engine.submit(Client([90], 1).request)
    with pytest.raises(Overloaded):
        engine.submit(Client([90], 1).request)


def test_threads_submit_and_closing_finishes_what_was_accepted():
    engine = BatchedEngine(ChainModel({}), TOKENIZER, slots=3)
    engine.start()
    served = [Client([90, i], 10, temperature=0) for i in range(12)]
    threads = [threading.Thread(target=engine.submit, args=(client.request,)) for client in served]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    engine.close()
    assert all(client.tokens == [i] * 10 and client.reason == "length" for i, client in enumerate(served))
    with pytest.raises(Overloaded):
        engine.submit(Client([90], 1).request)


def test_a_failing_step_is_told_and_survived(caplog):
    model = ChainModel({})
    forward = model.forward
    broken = threading.Event()

    def fail_once(ids, kv_cache):
        if ids.tolist() == [[66], [66]] and not broken.is_set():
            broken.set()
            raise RuntimeError("out of memory")
        return forward(ids, kv_cache)
    model.forward = fail_once
    engine = BatchedEngine(model, TOKENIZER, slots=2)
    served = [Client([90, 66], 10, temperature=0) for _ in range(4)]
    for client in served:
        engine.submit(client.request)
    engine.start()
    engine.close()
    assert [client.reason for client in served] == ["error", "error", "length", "length"]
    assert "out of memory" in caplog.text


def test_benchmark_runs(capsys):
    assert bench_serve.main(["--depth=1", "--vocab=64", "--prompt=4", "--answer=4", "--clients=1,3", "--rounds=1", "--device-type=cpu"]) == 0
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()[-2:]] == ["1", "3"]

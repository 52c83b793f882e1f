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
from nanochat.batching import BatchedEngine, Overloaded, Request
from nanochat.engine import Engine
from nanochat.prefix_cache import PrefixCache
from nanochat.sampling import Sampling
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
    "looped": lambda: random_model(uniform("prenorm", loops=3)),
}


class Client:
    """A request and what has come of it."""

    def __init__(self, prompt: list[int], max_tokens: int, **settings):
        self.prompt, self.max_tokens, self.settings = prompt, max_tokens, settings
        self.tokens: list[int] = []
        self.reason = ""
        self.request = Request(prompt, max_tokens, self.take, Sampling(**settings))

    def take(self, token, reason, scores):
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


@pytest.mark.slow
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


@pytest.mark.slow
def test_bfloat16():
    """The dtype is fixed at import: a process of its own."""
    script = "from tests.test_batching import check_bfloat16; check_bfloat16()"
    subprocess.run([sys.executable, "-c", script], env={**os.environ, "NANOCHAT_DTYPE": "bfloat16"}, cwd=ROOT, check=True)


@pytest.fixture
def one_piece_per_step(monkeypatch):
    """Of five tokens, whatever the clock says."""
    monkeypatch.setattr("nanochat.batching.SMALLEST", 5)
    monkeypatch.setattr("nanochat.batching.LARGEST", 5)
    monkeypatch.setattr("nanochat.batching.PAUSE", 0)
    monkeypatch.setattr("nanochat.batching.IDLE_PAUSE", 0)


@pytest.mark.slow
def test_rows_move_while_prompts_enter(one_piece_per_step):
    """Prompts that end in another order than they came in, and answers that end meanwhile."""
    engine = BatchedEngine(MODELS["layered"](), TOKENIZER, slots=5)
    served = clients(20, seed=3)
    for client in served:
        engine.submit(client.request)
    most = moved = 0
    while engine.waiting or engine.running:
        before, entering = len(engine.rows), len(engine.entering)
        engine.step()
        most = max(most, entering)
        moved += entering > 1 and len(engine.rows) < before
    assert moved and most > 1
    assert all(client.tokens == client.alone(engine) for client in served)


def small_model(context: int):
    return build_model(dict(sequence_len=context, vocab_size=100, n_layer=2, n_head=2, n_kv_head=1, n_embd=32, window_pattern="SL"), seed=1)


def test_a_long_prompt_does_not_hold_up_the_others(one_piece_per_step):
    engine = BatchedEngine(small_model(256), TOKENIZER, slots=4)
    running, long, short = Client([90], 100, temperature=0), Client([90] * 200, 2, temperature=0), Client([90, 1, 2, 3], 2, temperature=0)
    engine.submit(running.request)
    engine.step()
    engine.submit(long.request)
    for _ in range(3):
        before = len(running.tokens)
        engine.step()
        assert len(running.tokens) == before + 1 and not long.tokens
    engine.submit(short.request)
    for _ in range(2):  # the long prompt is the oldest, the short one the shortest: they take turns
        engine.step()
    assert short.tokens and not long.tokens
    finish(engine)
    assert all(client.tokens == client.alone(engine) for client in (running, long, short))


def test_short_prompts_do_not_hold_up_a_long_one_for_ever(one_piece_per_step):
    engine = BatchedEngine(small_model(256), TOKENIZER, slots=4)
    long = Client([90] * 100, 2, temperature=0)
    engine.submit(long.request)
    for i in range(60):
        engine.submit(Client([90, i], 1, temperature=0).request)
        engine.step()
    assert len(long.tokens) == 2


class ChainModel:
    """The likeliest token follows from the last one alone; counts the rows of its passes."""

    def __init__(self, successors: dict[int, int], sequence_len: int = 64):
        self.config = SimpleNamespace(n_kv_head=1, n_head=1, n_embd=8, n_layer=1, sequence_len=sequence_len, vocab_size=100)
        self.successors, self.rows = successors, []

    def get_device(self):
        return torch.device("cpu")

    def embed(self, ids):
        return torch.zeros(*ids.shape, 8)

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


def test_a_batch_job_does_not_depend_on_the_clock():
    """Whole prompts in order, each in one pass."""
    engine = BatchedEngine(small_model(1024), TOKENIZER, slots=3, patient=True)
    passes, forward = [], engine.model.forward
    engine.model.forward = lambda ids, kv_cache: passes.append(ids.numel()) or forward(ids, kv_cache=kv_cache)
    served = [Client([90, *[i] * length], 1, temperature=0) for i, length in enumerate((900, 30, 600, 2))]
    engine.submit(*(client.request for client in served))
    finish(engine)
    assert passes == [901, 31, 601, 3]


def test_first_come_first_served():
    engine = BatchedEngine(ChainModel({}), TOKENIZER, slots=2)
    served = [Client([90, i], 3 + i % 3, temperature=0) for i in range(9)]
    order = []
    for i, client in enumerate(served):
        client.request.emit = lambda *_, i=i: order.append(i) if i not in order else None
        engine.submit(client.request)
    finish(engine)
    assert order == list(range(9))
    assert max(engine.model.rows) == 2


@pytest.mark.parametrize("when", ["waiting", "entering", "running"])
def test_a_cancelled_request_frees_its_place(when, one_piece_per_step):
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
    for prompt, max_tokens in (([], 5), ([90] * 60, 5), ([90], -1)):
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
            kv_cache.advance(1)  # it had come far
            raise RuntimeError("out of memory")
        if 67 in ids:
            raise RuntimeError("out of memory")
        return forward(ids, kv_cache)
    model.forward = fail_once
    engine = BatchedEngine(model, TOKENIZER, slots=2)
    served = [Client([90, 66], 10, temperature=0) for _ in range(4)]
    unlucky = Client([90, 67], 10, temperature=0)
    for client in (*served[:2], unlucky, *served[2:]):
        engine.submit(client.request)
    engine.start()
    engine.close()
    assert [client.reason for client in served] == ["length"] * 4, "one by one they fit"
    assert all(client.tokens == [66] * 10 for client in served)
    assert unlucky.reason == "error" and not unlucky.tokens
    assert "out of memory" in caplog.text


class Broken:
    def draw(self, logits):
        raise ValueError("cannot sample")

    add = draw


@pytest.mark.parametrize("when", ["first", "running"])
def test_a_request_that_cannot_be_sampled_fails_alone(when, caplog):
    engine = BatchedEngine(ChainModel({}), TOKENIZER, slots=4)
    served = [Client([90, i], 10, temperature=0.5, top_k=1) for i in range(4)]
    for client in served:
        engine.submit(client.request)
    if when == "first":
        engine._admit()
    else:
        engine.step()
    next(row for row in (*engine.rows, *engine.entering) if row.request is served[1].request).sampler = Broken()
    finish(engine)
    assert [client.reason for client in served] == ["length", "error", "length", "length"]
    assert all(client.tokens == [i] * 10 for i, client in enumerate(served) if i != 1)
    assert "cannot sample" in caplog.text


def test_a_listener_that_fails_is_left_alone(caplog):
    engine = BatchedEngine(ChainModel({}), TOKENIZER, slots=2)
    gone, other = Client([90, 1], 10, temperature=0), Client([90, 2], 10, temperature=0)

    def closed(*_):
        raise RuntimeError("the event loop is closed")
    gone.request.emit = closed
    for client in (gone, other):
        engine.submit(client.request)
    finish(engine)
    assert other.tokens == [2] * 10


class Panic(BaseException):
    """As tiktoken's, which is no Exception."""


@pytest.mark.parametrize("fault", [ZeroDivisionError(), Panic()], ids=["an error", "a panic"])
def test_a_fault_of_the_server_frees_every_row(monkeypatch, caplog, fault):
    def fail():
        raise fault

    engine = BatchedEngine(ChainModel({}), TOKENIZER, slots=4)
    served = [Client([90, i], 10, temperature=0) for i in range(2)]
    monkeypatch.setattr(engine, "_decode_step", fail)
    for client in served:
        engine.submit(client.request)
    engine.start()
    engine.close()
    assert [client.reason for client in served] == ["error", "error"] and engine.running == 0


# -----------------------------------------------------------------------------
# Sharing


class Reading(BatchedEngine):
    """Counts the tokens of prompts that ran through the model."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.read = 0
        forward = self.model.forward

        def counting(ids, kv_cache):
            self.read += ids.numel() * (not self.decoding)
            return forward(ids, kv_cache=kv_cache)
        self.decoding = False
        self.model.forward = counting

    def _decode_step(self):
        self.decoding = True
        super()._decode_step()
        self.decoding = False


def test_a_prompt_is_read_once_for_all_its_answers():
    engine = Reading(small_model(256), TOKENIZER, slots=8)
    prompt = [90, *(i % 50 for i in range(100))]
    served = [Client(prompt, 10, temperature=1.0, seed=seed) for seed in range(6)]
    engine.submit(*(client.request for client in served))
    finish(engine)
    assert engine.read == len(prompt) + 5
    plain = Engine(small_model(256), TOKENIZER)
    assert all(client.tokens == client.alone(plain) for client in served) and len({tuple(client.tokens) for client in served}) == 6


@pytest.mark.parametrize("name", MODELS)
def test_the_next_turn_reads_only_what_is_new(name):
    engine = Reading(MODELS[name](), TOKENIZER, slots=2)
    first = Client([90, *range(20)], 12, temperature=0)
    engine.submit(first.request)
    finish(engine)
    engine.read = 0
    second = Client([*first.prompt, *first.tokens, 7, 8, 9], 10, temperature=0)
    other = Client([90, *range(18), 50, 51], 10, temperature=0)  # parts from them earlier
    for client in (second, other):
        engine.submit(client.request)
    finish(engine)
    assert engine.read == 4 + 2  # the last token of an answer has not run
    plain = Engine(MODELS[name](), TOKENIZER)
    assert all(client.tokens == client.alone(plain) for client in (second, other))


def test_the_prefix_cache_is_bounded():
    cache = PrefixCache(max_tokens=100)
    caches = lambda n: [torch.full((n, 1, 1), float(n))]
    for start in (0, 100, 200):
        cache.put(list(range(start, start + 40)), caches(40))
    assert [entry.tokens[0] for entry in cache.entries] == [100, 200]
    assert cache.find(list(range(100, 130)))[1] == 30 and cache.find([1, 2, 3] * 20) == (None, 0)
    cache.put(list(range(300, 330)), caches(30))  # the one that was just used stays
    assert [entry.tokens[0] for entry in cache.entries] == [100, 300]
    cache.put(list(range(100, 150)), caches(50))  # the same conversation, a turn later
    assert [len(entry.tokens) for entry in cache.entries] == [30, 50]
    cache.put(list(range(101)), caches(101))
    assert len(cache.entries) == 2


def test_no_group_takes_more_than_half_of_the_places():
    engine = BatchedEngine(ChainModel({}), TOKENIZER, slots=4)
    many = [Client([90, i], 20, temperature=0) for i in range(6)]
    for client in many:
        client.request.group = "one client"
    engine.submit(*(client.request for client in many))
    engine.step()
    other = Client([90, 50], 3, temperature=0)
    engine.submit(other.request)
    engine.step()
    assert len(engine.rows) == 3 and other.tokens
    finish(engine)
    assert all(client.tokens == [i] * 20 for i, client in enumerate(many))


# -----------------------------------------------------------------------------
# Log-probabilities


def test_scores_are_those_of_the_model(one_piece_per_step):
    """Of the answer and of the prompt, which is read in pieces."""
    model = MODELS["stock"]()
    engine = BatchedEngine(model, TOKENIZER, slots=2)
    got = []
    prompt = [90, *range(17)]
    engine.submit(Request(prompt, 6, lambda *event: got.append(event), Sampling(temperature=1.0, seed=3, logit_bias={5: 2.0}), logprobs=3, prompt_logprobs=True))
    finish(engine)
    (_, reason, of_prompt), *steps, (_, end, _) = got
    answer = [token for token, *_ in steps]
    assert (reason, end, len(answer)) == ("prompt", "length", 6)
    with torch.inference_mode():
        expected = torch.log_softmax(model(torch.tensor([prompt + answer]))[0].float(), dim=-1)
    scored = [*of_prompt, *(scores for *_, scores in steps)]
    assert len(scored) == len(prompt) - 1 + 6
    for scores, token, logprobs in zip(scored, (prompt + answer)[1:], expected):
        best = logprobs.topk(3)
        assert scores.logprob == pytest.approx(logprobs[token].item(), abs=1e-4)
        assert [id for id, _ in scores.top] == best.indices.tolist()
        assert [logprob for _, logprob in scores.top] == pytest.approx(best.values.tolist(), abs=1e-4)


def test_a_prompt_can_be_scored_without_an_answer():
    got = []
    engine = BatchedEngine(MODELS["stock"](), TOKENIZER, slots=2)
    engine.submit(Request([90, 1, 2], 0, lambda *event: got.append(event), logprobs=0, prompt_logprobs=True))
    finish(engine)
    assert [reason for _, reason, _ in got] == ["prompt", "length"] and len(got[0][2]) == 2


def test_benchmark_runs(capsys):
    assert bench_serve.main(["--depth=1", "--vocab=64", "--prompt=4", "--answer=4", "--clients=1,3", "--rounds=1", "--device-type=cpu"]) == 0
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()[-2:]] == ["1", "3"]
    assert bench_serve.main(["--depth=1", "--vocab=64", "--prompt=4", "--long=40", "--slots=16", "--device-type=cpu"]) == 0
    assert len(capsys.readouterr().out.splitlines()) == 9

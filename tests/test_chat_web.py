"""The chat server as its clients meet it: a real process, raw HTTP and the openai client."""
import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path

import httpx
import openai
import pytest

from nanochat import server
from nanochat.checkpoint_manager import save_checkpoint
from nanochat.engine import Engine
from nanochat.server import Text, chat_prompt, completion_prompts
from scripts import chat_web
from tests.golden.fixtures import build_model, tokenizer_512
from tests.tiny import ENV, ROOT

CONFIG: dict = dict(sequence_len=2048, vocab_size=512, n_layer=2, n_head=2, n_kv_head=1, n_embd=32, window_pattern="SL")
GROWTH = [{"step": 3, "from": "1x16", "to": "2x32", "mode": "lossless", "depth_mode": "identity", "seed": 0}]
TOKENIZER = tokenizer_512()
MODEL = "sft-d2"


def make_checkpoints(base_dir: Path) -> None:
    """The same random model as base and as fine-tuned one: its answers are long, and differ with every prompt."""
    TOKENIZER.save(base_dir / "tokenizer")
    model = build_model(CONFIG, seed=5)
    for kind in ("base", "chatsft"):
        save_checkpoint(base_dir / f"{kind}_checkpoints" / "d2", 20, model.state_dict(), None,
                        {"step": 20, "val_bpb": 1.5, "model_config": asdict(model.config), "growth": GROWTH})


@contextlib.contextmanager
def serving(base_dir: Path, *flags: str):
    """A server in a process of its own, and its address."""
    process = subprocess.Popen([sys.executable, "-m", "scripts.chat_web", "--port=0", "--device-type=cpu", *flags], cwd=ROOT, text=True,
                               env={**os.environ, **ENV, "NANOCHAT_BASE_DIR": str(base_dir)}, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    log: list[str] = []
    reader = threading.Thread(target=lambda: log.extend(process.stderr))  # so that it never blocks
    reader.start()
    try:
        line = process.stdout.readline()
        process.url = next((word for word in line.split() if word.startswith("http")), None)
        assert process.url, f"the server did not start: {line}{''.join(log)}"
        yield process
    finally:
        process.kill()
        process.wait()
        reader.join()
        process.stdout.close()
        process.stderr.close()


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    directory = tmp_path_factory.mktemp("served")
    make_checkpoints(directory)
    return directory


@pytest.fixture(scope="module")
def chat_server(checkpoints):
    with serving(checkpoints, "--batch-size=4") as process:
        yield process


@pytest.fixture
def http(chat_server):
    with httpx.Client(base_url=chat_server.url, timeout=60) as client:
        yield client


@pytest.fixture
def client(chat_server):
    return openai.OpenAI(base_url=f"{chat_server.url}/v1", api_key="none", max_retries=0)


def said(*texts: str) -> list[dict]:
    """Messages of user and assistant in turn."""
    return [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(texts)]


def expected(messages: list[dict], max_tokens: int, temperature: float = 0, **settings) -> str:
    """The answer of the engine itself."""
    engine = Engine(build_model(CONFIG, seed=5), TOKENIZER)
    prompt = chat_prompt(TOKENIZER, [(message["role"], message["content"]) for message in messages], base=False)
    row = engine.generate_batch(prompt, 1, max_tokens, temperature=temperature, **settings)[0][0]
    return TOKENIZER.decode(row[len(prompt):])


def events(response: httpx.Response) -> list[dict]:
    return [json.loads(line.removeprefix("data: ")) for line in response.iter_lines() if line]


# -----------------------------------------------------------------------------
# nanochat's own endpoints


def test_page_and_state(http):
    page = http.get("/")
    assert page.status_code == 200 and page.headers["content-type"].startswith("text/html") and "default-src 'none'" in page.headers["content-security-policy"]
    assert "<svg" in http.get("/logo.svg").text and http.get("/logo.svg").headers["content-type"] == "image/svg+xml"
    assert http.get("/health").json() == {"status": "ok", "ready": True, "num_gpus": 1, "available_workers": 1}
    stats = http.get("/stats").json()
    assert stats["total_workers"] == stats["available_workers"] == 1 and stats["busy_workers"] == 0
    assert stats["workers"] == [{"gpu_id": 0, "device": "cpu", "slots": 4, "running": 0, "waiting": 0}]
    info = http.get("/info").json()
    assert (info["model"], info["depth"], info["width"], info["ranks"], info["context"]) == (MODEL, 2, 32, [0], 2048)
    assert info["growth"] == [{"step": 3, "from": "1x16", "to": "2x32", "mode": "lossless"}]


def test_stream_of_tokens(http):
    messages = said("hello", "yes?", "go on")
    with http.stream("POST", "/chat/completions", json={"messages": messages, "temperature": 0, "max_tokens": 30}) as response:
        assert response.headers["content-type"].startswith("text/event-stream")
        *tokens, last = events(response)
    assert last.pop("done") is True and last["finish_reason"] == "length" and last["completion_tokens"] == 30
    assert len(tokens) > 1 and {event["gpu"] for event in tokens} == {0}
    assert "".join(event["token"] for event in tokens) == expected(messages, 30)


@pytest.mark.parametrize("body, status, reason", [
    ({"messages": []}, 400, "no messages"),
    ({"messages": said(*["a"] * 501)}, 400, "501 messages are too many"),
    ({"messages": said("")}, 400, "message 0 has no content"),
    ({"messages": said("a" * 8001)}, 400, "8001 characters"),
    ({"messages": said(*["a" * 8000] * 5)}, 400, "40000 characters"),
    ({"messages": [{"role": "system", "content": "be kind"}]}, 400, "'system'"),
    ({"messages": said("a"), "temperature": 2.1}, 400, "temperature"),
    ({"messages": said("a"), "temperature": -1}, 400, "temperature"),
    ({"messages": said("a"), "top_k": 201}, 400, "top_k"),
    ({"messages": said("a"), "max_tokens": 0}, 400, "max_tokens"),
    ({"messages": said("a"), "max_tokens": 4097}, 400, "max_tokens"),
    ({"messages": said(*["ö?ß" * 1000] * 3)}, 400, "context holds 2048"),
    ({"messages": "hello"}, 422, "messages"),
    ({"messages": [{"role": "user"}]}, 422, "messages.0.content"),
    ({"messages": said("a"), "top_k": 1.5}, 422, "top_k"),
    ({}, 422, "messages"),
    ([], 422, "body"),
    (b'{"messages": [{"role": "user", "content": "a"}], "temperature": NaN}', 400, "temperature"),
    (b'{"messages": [{"role": "user", "content": "a"}], "temperature": Infinity}', 400, "temperature"),
    (b'{"messages": NaN}', 422, "messages"),
    (b'{"messages": [', 422, "JSON"),
    (b"\xff\xfe", 4, ""),  # FastAPI decides between 400 and 422
    (b"[" * 100_000, 4, ""),
    (b'{"messages": [], "x": "' + b"a" * 2**20 + b'"}', 413, "larger than"),
])
def test_bad_requests_are_told_why(http, body, status, reason):
    content = body if isinstance(body, bytes) else json.dumps(body)
    response = http.post("/chat/completions", content=content, headers={"Content-Type": "application/json"})
    assert status in (response.status_code, response.status_code // 100) and reason in response.json()["detail"]
    assert http.get("/health").json()["available_workers"] == 1


def test_half_a_character_is_read_as_a_replacement(http):
    body = b'{"messages": [{"role": "user", "content": "\\ud800"}], "max_tokens": 1}'
    assert http.post("/chat/completions", content=body, headers={"Content-Type": "application/json"}).status_code in (200, 422)


def test_a_body_without_a_length_is_limited_too(http):
    response = http.post("/chat/completions", content=(b"a" * 2**16 for _ in range(40)), headers={"Content-Type": "application/json"})
    assert response.status_code == 413


def test_the_codes_that_the_page_acts_on(http):
    for texts in (["ö?ß" * 1000] * 3, ["a" * 8000] * 5):
        assert http.post("/chat/completions", json={"messages": said(*texts)}).json()["code"] == "context_length_exceeded"


def test_a_full_context_ends_the_answer(http):
    with http.stream("POST", "/chat/completions", json={"messages": said("a" * 2030), "temperature": 0, "max_tokens": 4000}) as response:
        last = events(response)[-1]
    assert last["finish_reason"] == "length" and last["prompt_tokens"] + last["completion_tokens"] == 2048


# -----------------------------------------------------------------------------
# OpenAI's


def test_openai_lists_models(client):
    assert [model.id for model in client.models.list()] == [MODEL]
    assert client.models.retrieve(MODEL).id == MODEL


def test_openai_chat(client):
    messages = said("hello", "yes?", "go on")
    answer = client.chat.completions.create(model=MODEL, messages=messages, temperature=0, max_tokens=25)
    assert answer.choices[0].message.content == expected(messages, 25) and answer.choices[0].message.role == "assistant"
    assert answer.choices[0].finish_reason == "length"
    assert answer.usage.completion_tokens == 25 and answer.usage.total_tokens == answer.usage.prompt_tokens + 25

    chunks = list(client.chat.completions.create(model=MODEL, messages=messages, temperature=0, max_completion_tokens=25, stream=True,
                                                 stream_options={"include_usage": True}))
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks[:-1]) == expected(messages, 25)
    assert chunks[0].choices[0].delta.role == "assistant" and chunks[-2].choices[0].finish_reason == "length"
    assert chunks[-1].usage == answer.usage and not chunks[-1].choices


def test_openai_system_message_and_parts(client):
    parts = [{"role": "system", "content": "be kind"}, {"role": "user", "content": [{"type": "text", "text": "hel"}, {"type": "text", "text": "lo"}]}]
    answer = client.chat.completions.create(model=MODEL, messages=parts, temperature=0, max_tokens=8)
    assert answer.choices[0].message.content == expected(said("be kind\n\nhello"), 8)


def test_openai_seed_and_number_of_answers(client):
    messages = said("tell me")
    ask = lambda **settings: client.chat.completions.create(model=MODEL, messages=messages, max_tokens=12, temperature=1, extra_body={"top_k": 0}, **settings)
    texts = [choice.message.content for choice in ask(seed=7, n=3).choices]
    assert texts == [expected(messages, 12, temperature=1, seed=seed) for seed in (7, 8, 9)] and len(set(texts)) == 3
    assert ask().choices[0].message.content != ask().choices[0].message.content
    streamed = [""] * 3
    for chunk in ask(seed=7, n=3, stream=True):
        streamed[chunk.choices[0].index] += chunk.choices[0].delta.content or ""
    assert streamed == texts


def test_openai_stop(client):
    whole = expected(said("hello"), 40)
    stop = whole[12:15]
    answer = client.chat.completions.create(model=MODEL, messages=said("hello"), temperature=0, max_tokens=40, stop=stop)
    assert answer.choices[0].message.content == whole[:whole.index(stop)] and answer.choices[0].finish_reason == "stop"


def test_openai_completion(client):
    engine = Engine(build_model(CONFIG, seed=5), TOKENIZER)

    def alone(prompt):
        return TOKENIZER.decode(engine.generate_batch(prompt, 1, 10, temperature=0)[0][0][len(prompt):])
    ids = [TOKENIZER.encode(text, prepend="<|bos|>") for text in ("One", "Two words")]
    for prompt in (["One", "Two words"], ids):
        answer = client.completions.create(model=MODEL, prompt=prompt, temperature=0, max_tokens=10)
        assert [choice.text for choice in answer.choices] == [alone(tokens) for tokens in ids]
    chunks = list(client.completions.create(model=MODEL, prompt="One", temperature=0, max_tokens=10, stream=True))
    assert "".join(chunk.choices[0].text for chunk in chunks) == alone(ids[0])


@pytest.mark.parametrize("settings, error, reason", [
    ({"model": "gpt-4"}, openai.NotFoundError, "only 'sft-d2'"),
    ({"model": "../../etc"}, openai.NotFoundError, "only 'sft-d2'"),
    ({"messages": [{"role": "tool", "content": "1", "tool_call_id": "x"}]}, openai.BadRequestError, "'tool'"),
    ({"messages": [{"role": "system", "content": "x"}]}, openai.BadRequestError, "followed by the user's"),
    ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "data:"}}]}]}, openai.BadRequestError, "more than text"),
    ({"messages": said("ö?ß" * 1000, "ö?ß" * 1000)}, openai.BadRequestError, "context holds 2048"),
    ({"temperature": 3}, openai.BadRequestError, "temperature"),
    ({"top_p": 0.5}, openai.BadRequestError, "top_p is not supported"),
    ({"tools": [{"type": "function", "function": {"name": "f"}}]}, openai.BadRequestError, "tools is not supported"),
    ({"n": 17}, openai.BadRequestError, "16 answers"),
    ({"max_tokens": 0}, openai.BadRequestError, "max_tokens"),
    ({"seed": 2**70}, openai.BadRequestError, "seed"),
    ({"stop": [""]}, openai.BadRequestError, "stop"),
    ({"stream": "perhaps"}, openai.BadRequestError, "stream"),
])
def test_openai_errors(client, settings, error, reason):
    with pytest.raises(error, match=reason):
        client.chat.completions.create(**{"model": MODEL, "messages": said("a"), **settings})


@pytest.mark.parametrize("prompt", [[], "", [""], [[]], [999], [-1], ["a" * 32001]])
def test_openai_prompts_that_are_none(client, prompt):
    if prompt in ("", [""]):  # bos alone: the model begins a text
        assert client.completions.create(model=MODEL, prompt=prompt, max_tokens=3).usage.prompt_tokens == 1
    else:
        with pytest.raises(openai.BadRequestError, match="prompt"):
            client.completions.create(model=MODEL, prompt=prompt, max_tokens=3)


def test_errors_have_openais_shape(http):
    for response in (http.get("/v1/nothing"), http.post("/v1/completions", content=b"{"), http.get("/v1/models/other")):
        assert 400 <= response.status_code < 500 and response.json()["error"]["type"] == "invalid_request_error"


def test_other_origins_may_ask(http):
    assert http.get("/v1/models", headers={"Origin": "http://elsewhere"}).headers["access-control-allow-origin"] == "*"


# -----------------------------------------------------------------------------
# Many clients


def test_32_clients_get_their_own_answers(chat_server, http):
    def ask(i: int) -> tuple[str, str]:
        messages, seed = said(f"client {i}: " + "word " * (i % 7)), 100 + i
        own = openai.OpenAI(base_url=f"{chat_server.url}/v1", api_key="none", max_retries=0)
        with own, own.chat.completions.create(model=MODEL, messages=messages, seed=seed, temperature=1, max_tokens=5 + i, stream=True,
                                              extra_body={"top_k": 10}) as stream:
            return "".join(chunk.choices[0].delta.content or "" for chunk in stream), expected(messages, 5 + i, 1, seed=seed, top_k=10)
    with ThreadPoolExecutor(32) as pool:
        answers = list(pool.map(ask, range(32)))
    assert len({text for text, _ in answers}) == 32
    assert all(text == alone for text, alone in answers)
    assert http.get("/stats").json()["workers"][0]["running"] == 0


def wait_for(http, running: int, waiting: int) -> None:
    """Until the server serves so many; each look gives it time."""
    for _ in range(2000):
        worker = http.get("/stats").json()["workers"][0]
        if (worker["running"], worker["waiting"]) == (running, waiting):
            return
    raise AssertionError(f"{worker} where {running} should be running and {waiting} waiting")


@pytest.mark.parametrize("path, stream", [("/chat/completions", True), ("/v1/chat/completions", True), ("/v1/chat/completions", False)])
def test_a_client_that_goes_away_frees_its_slot(chat_server, http, path, stream):
    body = json.dumps({"model": MODEL, "messages": said("a long one"), "max_tokens": 2000, "temperature": 0, "stream": stream})
    request = f"POST {path} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n{body}".encode()
    host, port = chat_server.url.removeprefix("http://").split(":")
    sockets = []
    for _ in range(6):  # of 4 slots
        sockets.append(socket.create_connection((host, int(port))))
        sockets[-1].sendall(request)
    wait_for(http, 4, 2)
    assert http.get("/health").json()["available_workers"] == 0
    for sock in sockets:
        sock.close()
    wait_for(http, 0, 0)


# -----------------------------------------------------------------------------
# Starting and ending


def test_sigterm_finishes_the_answers_and_takes_no_more(checkpoints):
    with serving(checkpoints, "--batch-size=1") as process, ThreadPoolExecutor(2) as pool:
        with httpx.Client(base_url=process.url, timeout=60) as http:
            body = {"messages": said("a"), "temperature": 0, "max_tokens": 150}
            with http.stream("POST", "/chat/completions", json=body) as response:
                lines = response.iter_lines()
                next(lines)
                queued = pool.submit(lambda: httpx.post(f"{process.url}/v1/completions", json={"model": MODEL, "prompt": "b", "max_tokens": 5}, timeout=60))
                wait_for(http, 1, 1)
                process.send_signal(signal.SIGTERM)
                last = [line for line in lines if line][-1]
            assert json.loads(last.removeprefix("data: "))["completion_tokens"] == 150
            assert queued.result().json()["usage"]["completion_tokens"] == 5
        assert process.wait(timeout=60) == 0
        with pytest.raises(httpx.ConnectError):
            httpx.get(process.url)


def test_a_base_model_continues_the_text(checkpoints):
    with serving(checkpoints, "--source=base", "--temperature=0", "--max-tokens=9") as process:
        client = openai.OpenAI(base_url=f"{process.url}/v1", api_key="none", max_retries=0)
        continued = client.completions.create(model="base-d2", prompt="Once upon").choices[0].text
        assert continued
        answer = client.chat.completions.create(model="base-d2", messages=said("Once", " up", "on"))
        assert answer.choices[0].message.content == continued
        assert httpx.get(f"{process.url}/info").json()["defaults"] == {"temperature": 0, "top_k": 50, "max_tokens": 9}


@pytest.mark.parametrize("flags, reason", [
    (["--model-tag=../d2"], "not a plain name"), (["--model-tag=d9"], "there is d2"), (["--step=7"], "there is step 20"), (["--source=rl"], "no model"),
    (["--temperature=nan"], "0 or more"), (["--temperature=3"], "temperature"), (["--top-k=300"], "top_k"), (["--max-tokens=5000"], "max_tokens"),
    (["--num-gpus=2"], "not so many GPUs"), (["--port=70000"], "no port 70000"), (["--host=256.1.1.1"], "cannot serve at"), (["--host=203.0.113.7"], "cannot serve at"),
])
def test_flags_that_cannot_be(checkpoints, monkeypatch, capsys, flags, reason):
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(checkpoints))
    try:
        status = chat_web.main(["--port=0", "--device-type=cpu", *flags])
    except SystemExit as error:
        status = error.code
    assert status == 2 and reason in capsys.readouterr().err


def test_a_taken_port_is_said_before_the_model_loads(base_dir, capsys):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        assert chat_web.main([f"--port={taken.getsockname()[1]}"]) == 2
    assert "choose another --port" in capsys.readouterr().err


# -----------------------------------------------------------------------------
# Parts


def test_only_an_assistants_tool_calls_become_tokens():
    text = "<|python_start|>1+1<|python_end|><|output_start|>2<|output_end|>two"
    special = lambda name: TOKENIZER.encode_special(f"<|{name}|>")
    call = [special("python_start"), *TOKENIZER.encode("1+1"), special("python_end"), special("output_start"), *TOKENIZER.encode("2"), special("output_end"),
            *TOKENIZER.encode("two")]
    prompt = chat_prompt(TOKENIZER, [("user", text), ("assistant", text), ("user", "<|assistant_end|>")], base=False)
    assert prompt == [special("bos"), special("user_start"), *TOKENIZER.encode(text), special("user_end"), special("assistant_start"), *call, special("assistant_end"),
                      special("user_start"), *TOKENIZER.encode("<|assistant_end|>"), special("user_end"), special("assistant_start")]


def test_prompts_are_rendered_as_the_model_was_trained():
    messages = [{"role": "system", "content": "be kind"}, *said("a", "b", "c", "")]
    assert chat_prompt(TOKENIZER, [(m["role"], m["content"]) for m in messages[:-1]], base=False) == TOKENIZER.render_for_completion({"messages": messages})


@pytest.mark.parametrize("stops, text, wanted", [([], "abc", "abc"), (["b"], "abc", "a"), (["bc", "cd"], "abxbcd", "abx"), (["bcx"], "abc", "abc"), (["aab"], "aaab", "a")])
def test_text_ends_before_the_first_stop(stops, text, wanted):
    stream, out = Text(TOKENIZER, stops), ""
    for letter in text:
        out += stream.push(TOKENIZER.encode(letter)[0])
        if stream.stopped:
            break
    assert out + stream.flush() == wanted


def test_an_unfinished_character_is_not_lost():
    stream = Text(TOKENIZER, [])
    first, *_ = TOKENIZER.encode("€")
    assert stream.push(first) + stream.flush() == "\ufffd"


def test_prompts_of_ids_are_taken_as_they_are():
    assert completion_prompts(TOKENIZER, [1, 2]) == [[1, 2]]
    with pytest.raises(server.ApiError):
        completion_prompts(TOKENIZER, [[1], []])

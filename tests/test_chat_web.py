"""The chat server as its clients meet it: a real process, raw HTTP, and OpenAI's client."""
import asyncio
import contextlib
import functools
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
import torch
import uvicorn

from nanochat.checkpoint_manager import save_checkpoint
from nanochat.engine import Engine
from nanochat.serving.answers import Text
from nanochat.serving.api import ApiError, Defaults, chat_prompt, completion_prompts, read_chat, read_completion
from nanochat.serving.server import Connection
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
def serving(base_dir: Path, *flags: str, **env: str):
    """A server in a process of its own, and its address."""
    process = subprocess.Popen([sys.executable, "-m", "scripts.chat_web", "--port=0", "--device-type=cpu", *flags], cwd=ROOT, text=True,
                               env={**os.environ, **ENV, "NANOCHAT_BASE_DIR": str(base_dir), **env}, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    log: list[str] = []
    process.log = log
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


@functools.cache
def reference():
    return build_model(CONFIG, seed=5)


def expected(messages: list[dict], max_tokens: int, temperature: float = 0, **settings) -> str:
    """The answer of the engine itself."""
    engine = Engine(reference(), TOKENIZER)
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
    wait_for(http, 0, 0)  # the answer that another test has read may just be ending
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
    ({"messages": said("a" * 8000) * 5}, 400, "40000 characters"),
    ({"messages": [{"role": "system", "content": "be kind"}]}, 400, "'system'"),
    ({"messages": said("a"), "temperature": 2.1}, 400, "temperature"),
    ({"messages": said("a"), "temperature": -1}, 400, "temperature"),
    ({"messages": said("a"), "top_k": 201}, 400, "top_k"),
    ({"messages": said("a"), "max_tokens": 0}, 400, "max_tokens"),
    ({"messages": said("a"), "max_tokens": 4097}, 400, "max_tokens"),
    ({"messages": said(*["ö?ß" * 1000] * 3)}, 400, "maximum context length is 2048 tokens"),
    ({"messages": said("a"), "top_q": 0.5}, 400, "top_q is not supported"),
    ({"messages": "hello"}, 422, "messages"),
    ({"messages": [{"role": "user"}]}, 422, "messages.0.content"),
    ({"messages": said("a"), "top_k": 1.5}, 422, "top_k"),
    ({}, 422, "messages"),
    ([], 422, "body"),
    (b'{"messages": [{"role": "user", "content": "a"}], "temperature": NaN}', 400, "temperature"),
    (b'{"messages": [{"role": "user", "content": "a"}], "temperature": Infinity}', 400, "temperature"),
    (b'{"messages": NaN}', 422, "messages"),
    (b'{"messages": [', 422, "JSON"),
    (b"\xff\xfe", 422, "JSON"),
    (b"[" * 100_000, 422, "JSON"),
    (b'{"messages": [' + b"{}," * 300_000 + b"{}]}", 400, "300001 messages"),
    (b'{"messages": [], "x": "' + b"a" * 2**20 + b'"}', 413, "larger than"),
])
def test_bad_requests_are_told_why(http, body, status, reason):
    content = body if isinstance(body, bytes) else json.dumps(body)
    response = http.post("/chat/completions", content=content, headers={"Content-Type": "application/json"})
    assert status == response.status_code and reason in response.json()["detail"] and len(response.content) < 1000
    assert http.get("/health").json()["available_workers"] == 1


def test_half_a_character_is_read_as_a_replacement(http):
    body = b'{"messages": [{"role": "user", "content": "\\ud800"}], "max_tokens": 1}'
    assert http.post("/chat/completions", content=body, headers={"Content-Type": "application/json"}).status_code == 200


def test_a_body_without_a_length_is_limited_too(http):
    response = http.post("/chat/completions", content=(b"a" * 2**16 for _ in range(40)), headers={"Content-Type": "application/json"})
    assert response.status_code == 413


@pytest.mark.parametrize("announced", [b"5", b"0", b"-1", b"1" * 5000])
def test_bytes_are_counted_whatever_is_announced(chat_server, http, announced):
    host, port = chat_server.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=60) as sock:
        sock.sendall(b"POST /chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
                     b"Content-Length: " + announced + b"\r\nTransfer-Encoding: chunked\r\n\r\n")
        piece, sent = b"10000\r\n" + b"a" * 2**16 + b"\r\n", 0
        with contextlib.suppress(OSError):
            while sent < 50 * 2**20:
                sock.sendall(piece)
                sent += len(piece)
        assert sent < 20 * 2**20, "the connection is cut"
    assert http.get("/health").status_code == 200


def test_a_body_that_is_not_declared_as_json_is_told_so(http):
    """A browser sends such a one for any page without asking."""
    for kind in ("application/x-www-form-urlencoded", "text/plain", ""):
        response = http.post("/chat/completions", content=b'{"messages": []}', headers={"Content-Type": kind})
        assert response.status_code == 415 and "Content-Type: application/json" in response.json()["detail"]


def test_the_codes_that_the_page_acts_on(http):
    for messages in (said(*["ö?ß" * 1000] * 3), said("a" * 8000) * 5):
        assert http.post("/chat/completions", json={"messages": messages}).json()["code"] == "context_length_exceeded"


def test_an_answer_can_be_sent_back_whatever_its_length(http):
    """Of ten thousand characters, but few tokens."""
    longest = max((TOKENIZER.decode([id]) for id in range(500)), key=len)
    for answer in (longest * (9000 // len(longest)), ""):
        with http.stream("POST", "/chat/completions", json={"messages": said("a", answer, "b"), "max_tokens": 1}) as response:
            assert response.status_code == 200 and events(response)[-1]["done"]


def test_head(http):
    for path in ("/", "/health", "/v1/models", "/logo.svg"):
        response = http.head(path)
        assert response.status_code == 200 and not response.content


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
    ({"messages": said("ö?ß" * 1000, "ö?ß" * 1000)}, openai.BadRequestError, "maximum context length is 2048 tokens"),
    ({"temperature": 3}, openai.BadRequestError, "temperature"),
    ({"top_p": 1.5}, openai.BadRequestError, "top_p"),
    ({"extra_body": {"typical_p": 0.5}}, openai.BadRequestError, "typical_p is not supported"),
    ({"extra_body": {"repetition_penalty": 0}}, openai.BadRequestError, "repetition_penalty"),
    ({"response_format": {"type": "json_object"}}, openai.BadRequestError, "response_format is not supported"),
    ({"logit_bias": {"512": 1}}, openai.BadRequestError, "token ids below 512"),
    ({"logit_bias": {"1": 101}}, openai.BadRequestError, "-100 to 100"),
    ({"top_logprobs": 3}, openai.BadRequestError, "needs logprobs"),
    ({"logprobs": True, "top_logprobs": 21}, openai.BadRequestError, "top_logprobs"),
    ({"tools": [{"type": "function", "function": {"name": "f"}}]}, openai.BadRequestError, "tools is not supported"),
    ({"n": 17}, openai.BadRequestError, "n must be"),
    ({"max_tokens": 0}, openai.BadRequestError, "max_tokens"),
    ({"max_tokens": -2}, openai.BadRequestError, "max_tokens"),
    ({"stop": ["a"] * 1001}, openai.BadRequestError, "stop"),
    ({"stop": ["a" * 200] * 21}, openai.BadRequestError, "4000 characters in all"),
    ({"extra_body": {"stream_options": {"surprise": 1}}}, openai.BadRequestError, "surprise is not supported"),
    ({"extra_body": {"logit_bias": []}}, openai.BadRequestError, "logit_bias"),
    ({"seed": 2**70}, openai.BadRequestError, "seed"),
    ({"stop": [""]}, openai.BadRequestError, "stop"),
    ({"stream": "perhaps"}, openai.BadRequestError, "stream"),
])
def test_openai_errors(client, settings, error, reason):
    with pytest.raises(error, match=reason):
        client.chat.completions.create(**{"model": MODEL, "messages": said("a"), **settings})


@pytest.mark.parametrize("prompt", [[], "", [""], [[]], [999], [-1], [1, "a"], [True], ["a" * 32001], [1] * 2048, ["a"] * 129, {"a": 1}, [{}] * 1000])
def test_openai_prompts_that_are_none(client, prompt):
    if prompt in ("", [""]):  # bos alone: the model begins a text
        assert client.completions.create(model=MODEL, prompt=prompt, max_tokens=3).usage.prompt_tokens == 1
    else:
        with pytest.raises(openai.BadRequestError, match="prompt"):
            client.completions.create(model=MODEL, prompt=prompt, max_tokens=3)


def test_errors_have_openais_shape(http):
    for response in (http.get("/v1/nothing"), http.post("/v1/completions", content=b"{"), http.get("/v1/models/other")):
        assert 400 <= response.status_code < 500 and response.json()["error"]["type"] == "invalid_request_error"


def test_settings_that_change_nothing_are_taken(client):
    ask = lambda **settings: client.chat.completions.create(model=MODEL, messages=said("a"), max_tokens=3, temperature=0, **settings).choices[0].message.content
    assert ask() == ask(user="me", top_p=1, n=1, stop=None, stream=None, tools=[], logit_bias={},
                        response_format={"type": "text"}, tool_choice="none", store=False, metadata={"a": "b"}, extra_body={"min_p": 0, "foo": None})


def test_openai_takes_back_what_it_gave(client):
    """An answer as the client's own object, and the forms in which clients send an empty one."""
    for text in ("yes?", ""):
        ask = lambda reply: client.chat.completions.create(model=MODEL, messages=[*said("hello"), reply, *said("go on")], temperature=0, max_tokens=6)
        answers = [ask({"role": "assistant", "content": text, "refusal": None, "annotations": [], "audio": None, "function_call": None, "tool_calls": None})]
        if not text:
            answers += [ask({"role": "assistant", "content": None}), ask({"role": "assistant"}), ask({"role": "assistant", "content": []})]
        assert {answer.choices[0].message.content for answer in answers} == {expected(said("hello", text, "go on"), 6)}
        client.chat.completions.create(model=MODEL, messages=[*said("hello"), answers[0].choices[0].message, *said("go on")], max_tokens=1)


def test_the_role_comes_once_and_first(client, http):
    for settings in ({"max_tokens": 8, "n": 2}, {"max_tokens": 8, "logit_bias": {str(TOKENIZER.encode_special("<|assistant_end|>")): 100}}):
        deltas: dict[int, list] = {}
        for chunk in client.chat.completions.create(model=MODEL, messages=said("a"), temperature=0, stream=True, **settings):
            deltas.setdefault(chunk.choices[0].index, []).append(chunk.choices[0])
        assert len(deltas) == settings.get("n", 1)
        for choices in deltas.values():
            assert [choice.delta.role for choice in choices] == ["assistant"] + [None] * (len(choices) - 1)
            assert [bool(choice.finish_reason) for choice in choices] == [False] * (len(choices) - 1) + [True]
    assert len(choices) == 2, "the last answer is empty"


def test_as_many_tokens_as_fit(client):
    answer = client.completions.create(model=MODEL, prompt=[1] * 2000, max_tokens=-1, temperature=0)
    assert answer.usage.total_tokens == 2048 and answer.choices[0].finish_reason == "length"


def test_the_context_error_is_the_one_that_clients_know(client):
    with pytest.raises(openai.BadRequestError) as error:
        client.completions.create(model=MODEL, prompt=[1] * 2048, max_tokens=1)
    assert error.value.code == "context_length_exceeded" and "maximum context length is 2048 tokens" in error.value.message


def test_many_prompts_are_answered_in_order(client):
    prompts = [f"Number {i}" for i in range(20)]
    together = client.completions.create(model=MODEL, prompt=prompts, max_tokens=4, temperature=1, seed=5, n=2, extra_body={"top_k": 0})
    assert [choice.index for choice in together.choices] == list(range(40))
    alone = client.completions.create(model=MODEL, prompt=prompts[7], max_tokens=4, temperature=1, seed=6, extra_body={"top_k": 0})
    assert together.choices[15].text == alone.choices[0].text, "the seed of a choice counts within its prompt"


# -----------------------------------------------------------------------------
# Sampling and log-probabilities


@pytest.mark.parametrize("settings", [{"temperature": 1e-40}, {"temperature": 5e-324}, {"temperature": 1e-8, "top_k": 0}, {"temperature": 2, "top_p": 0},
                                      {"temperature": 2, "min_p": 1}, {"temperature": 2, "top_p": 1e-40, "top_k": 0}])
def test_what_leaves_one_token_is_greedy(http, settings):
    body = {"model": MODEL, "messages": said("hello"), "max_tokens": 8, **settings}
    assert http.post("/v1/chat/completions", json=body).json()["choices"][0]["message"]["content"] == expected(said("hello"), 8)


def test_bias_and_penalties(client):
    ask = lambda **settings: client.completions.create(model=MODEL, prompt="a", max_tokens=12, temperature=0, logprobs=0, **settings).choices[0].logprobs.tokens
    [letter] = TOKENIZER.encode("x")
    assert ask(logit_bias={letter: 100}) == ["x"] * 12
    assert len(set(ask(logit_bias={letter: 2}, frequency_penalty=2))) > 1
    for penalty in ({"presence_penalty": 2}, {"frequency_penalty": 2}, {"extra_body": {"repetition_penalty": 10}}):
        assert ask(**penalty) != ask()


def test_logprobs(client):
    """Of a chat, streamed or not, and of a prompt that is echoed: they are the model's own."""
    ask = lambda **settings: client.chat.completions.create(model=MODEL, messages=said("hello"), max_tokens=6, temperature=0, logprobs=True, top_logprobs=3, **settings)
    whole = ask().choices[0]
    tokens = whole.logprobs.content
    assert b"".join(bytes(token.bytes) for token in tokens).decode("utf-8", "replace") == whole.message.content and len(tokens) == 6
    assert all(token.top_logprobs[0].logprob == token.logprob and len(token.top_logprobs) == 3 for token in tokens), "the likeliest was taken"
    streamed = [token for chunk in ask(stream=True) if chunk.choices[0].logprobs for token in chunk.choices[0].logprobs.content]
    assert [token.bytes for token in streamed] == [token.bytes for token in tokens]

    prompt = TOKENIZER.encode("One two three", prepend="<|bos|>")
    for sent, known in ((prompt, prompt), ("One two three", prompt[1:]), ("<|bos|>One two three", prompt)):
        echoed = client.completions.create(model=MODEL, prompt=sent, max_tokens=1, temperature=0, logprobs=1, echo=True).choices[0]
        logprobs = echoed.logprobs
        assert logprobs.tokens[:-1] == [TOKENIZER.decode([id]) for id in known] and echoed.text == "".join(logprobs.tokens)
        assert logprobs.text_offset == [len("".join(logprobs.tokens[:i])) for i in range(len(logprobs.tokens))]
        with torch.inference_mode():
            model = torch.log_softmax(build_model(CONFIG, seed=5)(torch.tensor([prompt]))[0].float(), -1)
        wanted = [model[i, id].item() for i, id in enumerate(prompt[1:])]
        assert logprobs.token_logprobs[-1 - len(wanted):-1] == pytest.approx(wanted, abs=1e-3)
        assert (logprobs.token_logprobs[0] is None) == (known is prompt)
        assert list(logprobs.top_logprobs[-2].values()) == pytest.approx([model[-2].max().item()], abs=1e-3)


def test_echo_without_an_answer(client):
    scored = client.completions.create(model=MODEL, prompt="One two", max_tokens=0, logprobs=1, echo=True)
    assert scored.choices[0].text == "One two" and scored.usage.completion_tokens == 0
    assert client.completions.create(model=MODEL, prompt=["One", "two"], max_tokens=1, echo=True, stop=["One"]).choices[0].text.startswith("One")


def test_tokenizer_for_lm_eval(http):
    assert http.get("/tokenizer_info").json()["bos_token"] == "<|bos|>"
    ids = http.post("/tokenize", json={"prompt": "One <|bos|>", "add_special_tokens": False}).json()["tokens"]
    assert ids == TOKENIZER.encode("One <|bos|>")
    assert http.post("/tokenize", json={"prompt": "<|bos|>"}).json()["tokens"] == [TOKENIZER.get_bos_token_id()]
    assert http.post("/detokenize", json={"tokens": ids}).json() == {"prompt": "One <|bos|>"}
    assert http.post("/detokenize", json={"tokens": [512]}).status_code == 422


# -----------------------------------------------------------------------------
# Who may ask


def test_other_origins_may_not_ask(http):
    for response in (http.get("/v1/models", headers={"Origin": "http://elsewhere"}),
                     http.options("/v1/completions", headers={"Origin": "http://elsewhere", "Access-Control-Request-Method": "POST"})):
        assert not [name for name in response.headers if name.startswith("access-control")]


@pytest.mark.parametrize("host, status", [("localhost", 200), ("LOCALHOST:8000", 200), ("127.0.0.1", 200), ("[::1]:8000", 200), ("192.168.1.7:80", 200),
                                          (socket.gethostname(), 200), ("chat.localhost", 200), ("evil.example", 403), ("evil.example:8000", 403),
                                          ("127.0.0.1.evil.example", 403), ("localhost.evil.example", 403), ("", 403)])
def test_a_name_made_to_point_here_is_refused(http, host, status):
    assert http.get("/info", headers={"Host": host}).status_code == status


@pytest.mark.slow
def test_a_key_is_asked_of_everyone(checkpoints):
    with serving(checkpoints, "--cors-origin=https://example.org", NANOCHAT_API_KEY="se:cret") as process:
        with httpx.Client(base_url=process.url, timeout=60) as http:
            assert http.get("/health", headers={"Host": "any.example"}).status_code == 200
            for path in ("/", "/info", "/stats", "/v1/models", "/nothing", "/tokenizer_info"):
                for headers in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": "Bearer"}, {"Authorization": "Basic !"}, {"Authorization": "Basic é"}, {"Authorization": "Bearer se:crét"}):
                    assert http.get(path, headers={k: v.encode("latin-1") for k, v in headers.items()}).status_code == 401
                assert http.get(path, headers={"Authorization": "Bearer se:cret", "Host": "any.example"}).status_code in (200, 404)
                assert http.get(path, auth=("anyone", "se:cret")).status_code in (200, 404)
            assert http.get("/").headers["www-authenticate"].startswith("Basic"), "a browser asks for it"
            assert http.post("/v1/completions", json={}).json()["error"]["code"] == "invalid_api_key"
            asked = http.options("/v1/completions", headers={"Origin": "https://example.org", "Access-Control-Request-Method": "POST",
                                                             "Access-Control-Request-Headers": "authorization"})
            assert asked.headers["access-control-allow-origin"] == "https://example.org"
            assert "access-control-allow-origin" not in http.get("/info", headers={"Origin": "https://example.com"}).headers
        with pytest.raises(openai.AuthenticationError):
            openai.OpenAI(base_url=f"{process.url}/v1", api_key="wrong", max_retries=0).models.list()
        assert openai.OpenAI(base_url=f"{process.url}/v1", api_key="se:cret", max_retries=0).models.list().data


# -----------------------------------------------------------------------------
# Many clients


@pytest.mark.slow
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
    wait_for(http, 0, 0)


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
    request = f"POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n{body}".encode()
    host, port = chat_server.url.removeprefix("http://").split(":")
    sockets = []
    for _ in range(6):  # of 4 places
        sockets.append(socket.create_connection((host, int(port))))
        sockets[-1].sendall(request)
    wait_for(http, 4, 2)
    assert http.get("/health").json()["available_workers"] == 0
    for sock in sockets:
        sock.close()
    wait_for(http, 0, 0)


# -----------------------------------------------------------------------------
# Starting and ending


@pytest.mark.slow
def test_sigterm_finishes_the_answers_and_takes_no_more(checkpoints):
    with serving(checkpoints, "--batch-size=1") as process, ThreadPoolExecutor(2) as pool:
        with httpx.Client(base_url=process.url, timeout=60) as http, httpx.Client(base_url=process.url, timeout=60) as other:
            body = {"messages": said("a"), "temperature": 0, "max_tokens": 400}
            with http.stream("POST", "/chat/completions", json=body) as response:
                lines = response.iter_lines()
                next(lines)
                queued = pool.submit(lambda: other.post("/v1/completions", json={"model": MODEL, "prompt": "b", "max_tokens": 5}))
                wait_for(http, 1, 1)
                process.send_signal(signal.SIGTERM)
                last = [line for line in lines if line][-1]
            assert json.loads(last.removeprefix("data: "))["completion_tokens"] == 400
            assert queued.result().json()["usage"]["completion_tokens"] == 5
        assert process.wait(timeout=60) == 0
        with pytest.raises(httpx.ConnectError):
            httpx.get(process.url)


@pytest.mark.slow
def test_a_base_model_continues_the_text(checkpoints):
    with serving(checkpoints, "--source=base", "--temperature=0", "--max-tokens=9") as process:
        client = openai.OpenAI(base_url=f"{process.url}/v1", api_key="none", max_retries=0)
        continued = client.completions.create(model="base-d2", prompt="Once upon").choices[0].text
        assert continued
        answer = client.chat.completions.create(model="base-d2", messages=said("Once", " up", "on"))
        assert answer.choices[0].message.content == continued
        assert httpx.get(f"{process.url}/info", timeout=60).json()["defaults"] == {"temperature": 0, "top_k": 50, "max_tokens": 9}


@pytest.mark.parametrize("flags, reason", [
    (["--model-tag=../d2"], "not a plain name"), (["--model-tag=d9"], "there is d2"), (["--step=7"], "there is step 20"), (["--source=rl"], "no model"),
    (["--temperature=nan"], "0 or more"), (["--temperature=3"], "temperature"), (["--top-k=300"], "top_k"), (["--max-tokens=5000"], "max_tokens"),
    (["--api-key="], "API key is empty"), (["--api-key=a\nb"], "API key"), (["--cors-origin=example.org"], "no origin"), (["--cors-origin=https://a.org/"], "no origin"),
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
    with chat_web.bind("127.0.0.1", 0) as first:  # a server that is still loading
        assert chat_web.main([f"--port={first.getsockname()[1]}"]) == 2
    assert "choose another --port" in capsys.readouterr().err


@pytest.mark.parametrize("flags, warned", [(["--host=0.0.0.0"], True), (["--host=0.0.0.0", "--api-key=a"], False), (["--host=127.0.0.2"], False)])
def test_a_server_for_everyone_says_so(checkpoints, monkeypatch, capsys, flags, warned):
    """Before it serves, which it does not come to here."""
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(checkpoints))
    monkeypatch.setattr(signal, "signal", lambda number, handler: None)
    served = []
    monkeypatch.setattr(uvicorn.Server, "run", lambda self, sockets: served.append(capsys.readouterr().err) or sockets[0].close())
    assert not chat_web.main(["--port=0", "--device-type=cpu", *flags])
    assert ["warning: everyone who can reach this machine" in told for told in served] == [warned]


class Transport(asyncio.Transport):
    """A client that only the clock can end."""

    def __init__(self):
        super().__init__()
        self.ended, self.written = False, b""

    def get_extra_info(self, name, default=None):
        return default

    def is_closing(self):
        return self.ended

    def write(self, data):
        self.written += data

    def set_write_buffer_limits(self, high=None, low=None):
        self.high = high

    def abort(self):
        self.ended = True

    close = abort

    def pause_reading(self):
        pass

    resume_reading = pause_reading


class Clock:
    """An event loop whose timers fire when they are told to."""

    def __init__(self, loop):
        self.loop, self.timers = loop, []

    def call_later(self, seconds, callback, *args):
        timer = self.loop.call_later(10**6, callback, *args)
        self.timers.append((timer, callback))
        return timer

    def __getattr__(self, name):
        return getattr(self.loop, name)

    def ring(self):
        for timer, callback in self.timers:
            if not timer.cancelled():
                timer.cancel()
                callback()


@pytest.mark.parametrize("sent, ends", [
    ([], True), ([b"GET / HT"], True), ([b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 9\r\n\r\n", b"a", b"b"], True),
    ([b"GET / HTTP/1.1\r\nHost: x\r\n\r\n"], False), ([b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 1\r\n\r\n", b"a"], False), (["pause"], True),
    ([b"GET / HTTP/1.1\r\nHost: x\r\n\r\n", "pause"], True), ([b"GET / HTTP/1.1\r\nHost: x\r\n\r\n", "pause", "resume"], False)])
def test_connections_that_stand_still_are_ended(sent, ends):
    """An unfinished request and an unread answer; but not one that the server has to answer."""
    async def app(scope, receive, send):
        await asyncio.Event().wait()

    async def serve():
        config = uvicorn.Config(app, log_config=None)
        config.load()
        connection, transport = Connection(config, uvicorn.server.ServerState(), {}), Transport()
        connection.loop = Clock(asyncio.get_running_loop())
        connection.connection_made(transport)
        assert transport.high == 0, "or the last bytes of an answer could wait for ever"
        for data in sent:
            {"pause": connection.pause_writing, "resume": connection.resume_writing}.get(data, lambda data=data: connection.data_received(data))()
        connection.loop.ring()
        for task in connection.tasks:
            task.cancel()
        await asyncio.sleep(0)
        return transport.ended
    assert asyncio.run(serve()) == ends


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


def test_an_answer_is_gone_on_with(http):
    """What is sent as the last message is the beginning of the answer, which ends as if it had never been cut."""
    whole = expected([{"role": "user", "content": "hello"}], 12)
    start = expected([{"role": "user", "content": "hello"}], 5)
    messages = [{"role": "user", "content": "hello"}, {"role": "assistant", "content": start}]
    prompt = chat_prompt(TOKENIZER, [(message["role"], message["content"]) for message in messages], base=False, go_on=True)
    assert prompt[-1] != TOKENIZER.encode_special("<|assistant_end|>") and prompt[:-1] != chat_prompt(TOKENIZER, [("user", "hello")], base=False)
    answer = http.post("/chat/completions", json={"messages": messages, "continue_final_message": True, "temperature": 0, "max_tokens": 7}).text
    rest = "".join(json.loads(line[6:]).get("token", "") for line in answer.splitlines() if line.startswith("data: "))
    assert start + rest == whole


@pytest.mark.parametrize("stops, text, wanted", [([], "abc", "abc"), (["b"], "abc", "a"), (["bc", "cd"], "abxbcd", "abx"), (["bcx"], "abc", "abc"), (["aab"], "aaab", "a"),
                                                 (["zz", "bc", "b"], "abc", "a"), (["cd", "bcde"], "abcdx", "ab"), (["a"] * 900, "xa", "x"), ([".*"], "ab.*c", "ab")])
def test_text_ends_before_the_first_stop(stops, text, wanted):
    stream, out = Text(TOKENIZER, stops), ""
    for letter in text:
        out += stream.push(TOKENIZER.encode(letter)[0])
        if stream.stopped:
            break
    assert out + stream.flush() == wanted


def test_an_unfinished_character_is_not_lost():
    first, *_ = TOKENIZER.encode("€")
    for stops, wanted in (([], "\ufffd"), (["\ufffd"], "")):
        stream = Text(TOKENIZER, stops)
        assert stream.push(first) + stream.flush() == wanted


def test_prompts_with_all_alternatives_are_limited():
    """Half a megabyte of ids would become a gigabyte of log-probabilities."""
    body = dict(model=MODEL, prompt=[[1] * 2047] * 128, echo=True, max_tokens=0, logprobs=20)
    read = lambda **changes: read_completion(json.dumps({**body, **changes}).encode(), TOKENIZER, Defaults(), MODEL, 2048)
    with pytest.raises(ApiError, match="fewer prompts at a time"):
        read()
    assert len(read(logprobs=1).prompts) == 128 and len(read(prompt=[[1] * 2047] * 13).prompts) == 13


def test_prompts_of_ids_are_taken_as_they_are():
    assert completion_prompts(TOKENIZER, [1, 2], 10) == ([[1, 2]], [0])
    with pytest.raises(ApiError):
        completion_prompts(TOKENIZER, [[1], []], 10)


def test_checks_look_at_counts_before_contents():
    """A list of things that are none is refused after the first; so is one that is too long, whatever it holds."""
    class Counting(list):
        looks = 0

        def __getitem__(self, i):
            self.looks += 1
            return super().__getitem__(i)

        def __iter__(self):
            for item in super().__iter__():
                self.looks += 1
                yield item
    for prompt in (Counting([{}] * 1000), Counting([1] * 1000), Counting([[1]] * 1000)):
        with pytest.raises(ApiError):
            completion_prompts(TOKENIZER, prompt, 100)
        assert prompt.looks <= 3


@pytest.mark.parametrize("field", ["messages", "prompt", "stop", "logit_bias", "stream_options", "temperature", "n", "logprobs", "model", "max_tokens"])
@pytest.mark.parametrize("value", [{}, [], "", 0, 1.5, True, None, [[]], [{}], {"a": {}}, "x" * 1000, -1, 2**100, float("nan"), [None]])
def test_no_value_of_any_type_is_the_servers_fault(field, value):
    """Whatever is refused is refused with a reason."""
    for read, extra in ((read_chat, {"messages": said("a")}), (read_completion, {"prompt": "a"})):
        args = (TOKENIZER, False, Defaults(), MODEL) if read is read_chat else (TOKENIZER, Defaults(), MODEL, 2048)
        try:
            read(json.dumps({"model": MODEL, **extra, field: value}).encode(), *args)
        except ApiError as error:
            assert error.status_code in (400, 404, 422) and 0 < len(error.detail) < 400

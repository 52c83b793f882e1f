"""The libraries that people use with OpenAI's API, against a real server: each in its own way asks, streams, and meets an error."""
import json
import shutil
import subprocess

import pytest

from tests.test_chat_web import MODEL, checkpoints, expected, said, serving  # noqa: F401  checkpoints is a fixture

pytestmark = pytest.mark.slow
TOO_LONG = "ö?ß" * 1000
ANSWER = dict(temperature=0, max_tokens=12)


@pytest.fixture(scope="module")
def url(checkpoints):  # noqa: F811
    with serving(checkpoints, "--api-key=secret") as process:
        yield process.url


def test_openai(url):
    import openai
    client = openai.OpenAI(base_url=f"{url}/v1", api_key="secret", max_retries=0)
    assert client.chat.completions.create(model=MODEL, messages=said("hello"), **ANSWER).choices[0].message.content == expected(said("hello"), 12)
    whole = expected(said("hello"), 40)
    with client.chat.completions.stream(model=MODEL, messages=said("hello"), temperature=0, max_tokens=40, stop=whole[12:15]) as stream:
        stream.until_done()
        reply = stream.get_final_completion().choices[0].message
    assert reply.content == whole[:whole.index(whole[12:15])]
    history = [*said("hello"), reply, *said("go on")]
    assert client.chat.completions.create(model=MODEL, messages=history, **ANSWER).choices[0].message.content == expected(said("hello", reply.content, "go on"), 12)
    with pytest.raises(openai.BadRequestError):
        client.chat.completions.create(model=MODEL, messages=said(TOO_LONG))


@pytest.fixture
def litellm(monkeypatch):
    monkeypatch.setenv("LITELLM_LOCAL_MODEL_COST_MAP", "True")  # else it asks the network as it is imported
    return pytest.importorskip("litellm")


def test_litellm(url, litellm):
    settings = dict(model=f"openai/{MODEL}", api_base=f"{url}/v1", api_key="secret", num_retries=0)
    answer = litellm.completion(messages=said("hello"), **settings, **ANSWER)
    assert answer.choices[0].message.content == expected(said("hello"), 12) and answer.usage.completion_tokens == 12
    history = [*said("hello"), answer.choices[0].message.model_dump(), *said("go on")]
    assert litellm.completion(messages=history, **settings, **ANSWER).choices[0].message.content == expected(said("hello", answer.choices[0].message.content, "go on"), 12)
    chunks = list(litellm.completion(messages=said("hello"), stream=True, **settings, **ANSWER))
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == expected(said("hello"), 12)
    with pytest.raises(litellm.ContextWindowExceededError):
        litellm.completion(messages=said(TOO_LONG), **settings)
    with pytest.raises(litellm.AuthenticationError):
        litellm.completion(messages=said("hello"), **{**settings, "api_key": "wrong"})
    text = litellm.text_completion(prompt=["One", "Two"], **{**settings, "model": f"text-completion-openai/{MODEL}"}, **ANSWER)
    assert [choice.index for choice in text.choices] == [0, 1] and all(choice.text for choice in text.choices)


def test_langchain(url):
    langchain = pytest.importorskip("langchain_openai")
    from langchain_core.messages import AIMessage, HumanMessage, SystemMessage
    settings = dict(model=MODEL, base_url=f"{url}/v1", api_key="secret", max_retries=0)
    chat = langchain.ChatOpenAI(**settings, **ANSWER)
    assert chat.invoke("hello").content == expected(said("hello"), 12)
    assert "".join(chunk.content for chunk in chat.stream("hello")) == expected(said("hello"), 12)
    history = [SystemMessage("be kind"), HumanMessage("hello"), AIMessage("yes?"), HumanMessage("go on")]
    assert chat.invoke(history).content == expected(said("be kind\n\nhello", "yes?", "go on"), 12)
    assert [answer.content for answer in chat.batch(["hello", "go on"])] == [expected(said(text), 12) for text in ("hello", "go on")]
    scored = langchain.ChatOpenAI(**settings, **ANSWER, logprobs=True, top_logprobs=2).invoke("hello")
    assert len(scored.response_metadata["logprobs"]["content"]) == 12
    completion = langchain.OpenAI(**settings, **ANSWER)
    assert completion.generate(["One", "Two"]).generations[1][0].text == completion.invoke("Two")
    with pytest.raises(Exception, match="maximum context length"):
        chat.invoke(TOO_LONG)


def test_llm(url, tmp_path, monkeypatch):
    monkeypatch.setenv("LLM_USER_PATH", str(tmp_path))
    (tmp_path / "extra-openai-models.yaml").write_text(f"""
- model_id: nanochat
  model_name: {MODEL}
  api_base: {url}/v1
  api_key_name: nanochat
- model_id: nanochat-text
  model_name: {MODEL}
  api_base: {url}/v1
  api_key_name: nanochat
  completion: true
""")
    (tmp_path / "keys.json").write_text('{"nanochat": "secret"}')
    llm = pytest.importorskip("llm")
    model = llm.get_model("nanochat")
    conversation = model.conversation()
    first = conversation.prompt("hello", temperature=0, max_tokens=12).text()
    assert first == expected(said("hello"), 12)
    assert conversation.prompt("go on", temperature=0, max_tokens=12, stream=False).text() == expected(said("hello", first, "go on"), 12)
    text = llm.get_model("nanochat-text").prompt("One", temperature=0, max_tokens=12, logprobs=2)
    assert len(text.text()) > 1


@pytest.mark.skipif(shutil.which("curl") is None, reason="no curl")
def test_curl(url):
    body = {"model": MODEL, "messages": said("hello"), **ANSWER}

    def curl(*args: str) -> str:
        return subprocess.run(["curl", "-sS", "-H", "Authorization: Bearer secret", *args], capture_output=True, text=True, check=True, timeout=60).stdout
    asked = ("-d", json.dumps(body), f"{url}/v1/chat/completions")
    assert json.loads(curl("-H", "Content-Type: application/json", *asked))["choices"][0]["message"]["content"] == expected(said("hello"), 12)
    assert "send JSON with the header Content-Type: application/json" in curl(*asked)
    lines = curl("-N", "--json", json.dumps({**body, "stream": True}), f"{url}/v1/chat/completions").split("\n\n")
    assert lines[-2:] == ["data: [DONE]", ""]
    assert curl("-I", f"{url}/v1/models").startswith("HTTP/1.1 200")
    assert "secret" not in curl("-u", "me:secret", f"{url}/info")

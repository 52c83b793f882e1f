"""The chat page in a real browser, against a real server."""
import functools
import json
import shutil

import httpx
import pytest

from tests.test_chat_web import checkpoints, expected, said, serving  # noqa: F401  checkpoints is a fixture

playwright = pytest.importorskip("playwright.sync_api", reason="the page is tested with playwright, which is not installed")
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium found; on Debian: apt install chromium")
ARGS = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking", "--disable-component-update", "--disable-sync"]


@pytest.fixture(scope="module")
def browser():
    with playwright.sync_playwright() as tools:
        browser = tools.chromium.launch(executable_path=CHROMIUM, args=ARGS)
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def chat_server(checkpoints):  # noqa: F811
    with serving(checkpoints) as process:
        yield process


@pytest.fixture
def page(browser, chat_server):
    """A fresh page; whatever it asks another server for, or reports as an error, fails the test."""
    with browser.new_context() as context:
        page = context.new_page()
        page.set_default_timeout(30_000)
        problems: list[str] = []
        page.on("request", lambda request: request.url.startswith(chat_server.url) or problems.append(request.url))
        page.on("pageerror", lambda error: problems.append(str(error)))
        page.on("console", lambda message: problems.append(message.text) if "Content Security Policy" in message.text else None)
        page.goto(chat_server.url)
        page.wait_for_selector("#welcome")
        yield page
        assert not problems


def until(page, condition: str) -> None:
    """Playwright's own wait evaluates a string inside the page, which the page's policy forbids."""
    for _ in range(1500):
        if page.evaluate(condition):
            return
        page.wait_for_timeout(20)
    raise AssertionError(f"never true: {condition}")


def run(page, *commands: str) -> None:
    for command in commands:
        page.fill("#input", command)
        page.press("#input", "Enter")


def messages(page) -> list[dict]:
    kept = json.loads(page.evaluate("sessionStorage['nanochat.messages'] ?? '[]'"))
    return [{key: message[key] for key in ("role", "content")} for message in kept if message["role"] != "console"]


def answered(page, count: int = 1) -> None:
    """Until so many answers stand there and nothing is being written."""
    until(page, f"document.querySelectorAll('.assistant:not(.busy) .note').length === {count} && !document.querySelector('.busy')")


def say(page, text: str) -> None:
    page.fill("#input", text)
    page.press("#input", "Enter")


def test_a_conversation(page):
    run(page, "/temperature 0", "/maxtokens 20")
    say(page, "hello")
    answered(page)
    first = expected(said("hello"), 20)
    assert messages(page) == said("hello", first)
    assert page.locator(".assistant .note").inner_text().startswith("20 tokens")
    page.fill("#input", "go on")
    page.click("#go")
    answered(page, 2)
    assert messages(page)[-1]["content"] == expected(said("hello", first, "go on"), 20)

    page.reload()
    page.wait_for_selector(".assistant >> nth=1")
    assert len(messages(page)) == 4 and page.locator(".user .body").all_inner_texts() == ["hello", "go on"]

    page.keyboard.press("Alt+n")
    page.wait_for_selector("#welcome")
    assert messages(page) == []


def test_answers_stream_and_stop(page, chat_server):
    run(page, "/temperature 0", "/maxtokens 2000")
    say(page, "a long one")
    body = page.locator(".busy .body")
    until(page, "document.querySelector('.busy .body')?.textContent.length > 5")
    seen = body.text_content()
    until(page, f"document.querySelector('.busy .body')?.textContent.length > {len(seen)}")
    page.keyboard.press("Escape")
    answered(page)
    assert page.locator(".note").inner_text() == "stopped"
    assert len(messages(page)[1]["content"]) >= len(seen)
    until(page, "fetch('/stats').then(r => r.json()).then(s => s.workers[0].running === 0)")
    page.click("[data-action=again]")
    page.wait_for_selector(".busy")
    page.click("#go[title=Stop]")
    until(page, "!document.querySelector('.busy')")
    assert messages(page)[0]["content"] == "a long one"


def test_edit_and_answer_again(page):
    run(page, "/temperature 0", "/maxtokens 12")
    say(page, "one")
    answered(page)
    say(page, "two")
    answered(page, 2)
    page.press("#input", "ArrowUp")  # edits the last message
    page.fill(".editor", "three")
    page.press(".editor", "Enter")
    answered(page, 2)
    first = expected(said("one"), 12)
    assert messages(page) == said("one", first, "three", expected(said("one", first, "three"), 12))
    page.locator(".user").first.hover()
    page.locator("[data-action=edit]").first.click()
    page.press(".editor", "Escape")
    assert len(messages(page)) == 4  # nothing is lost
    page.locator(".assistant").first.hover()
    page.locator("[data-action=again]").first.click()
    answered(page, 1)
    assert messages(page) == said("one", first)


def test_settings_are_sent_and_kept(page):
    page.click("#tune")
    page.locator("#temperature").fill("0")
    page.locator("#max_tokens").fill("7")
    page.locator("#top_k").fill("999")  # impossible, so it stays what it was
    page.locator("#max_tokens").focus()
    page.keyboard.press("Escape")
    page.reload()
    page.wait_for_selector("#welcome")
    say(page, "hello")
    answered(page)
    assert messages(page)[1]["content"] == expected(said("hello"), 7)
    run(page, "/topk")
    assert page.locator(".console").last.inner_text() == "top_k is 50"
    run(page, "/temperature 5", "/nonsense", "/help")
    assert "goes from 0 to 2" in page.locator(".console").nth(1).inner_text() and "no command" in page.locator(".console").nth(2).inner_text()


def test_about_the_model(page):
    page.click("#about")
    text = page.locator("#info").inner_text()
    for part in ("sft-d2", "2 layers", "32 channels", "dense", "2,048 tokens", "1.500 bits per byte", "1 × 16", "2 × 32", "at step 3"):
        assert part in text
    page.keyboard.press("Escape")
    assert not page.locator("#info").is_visible()


def test_a_model_writes_text_not_html(page):
    evil = "<img src=x onerror=alert(1)> **b** `c` <|python_start|>6*7<|python_end|><|output_start|>42<|output_end|>"
    page.route("**/chat/completions", lambda route: route.fulfill(content_type="text/event-stream", body=(
        f"data: {json.dumps({'token': evil})}\n\ndata: {json.dumps({'done': True, 'completion_tokens': 1, 'finish_reason': 'stop'})}\n\n")))
    say(page, "<b>hi</b>")
    answered(page)
    assert page.locator("#thread img, #thread .user b").count() == 0
    assert "<img src=x onerror=alert(1)>" in page.locator(".assistant .body").inner_text()
    assert page.locator(".call").inner_text().split() == ["6*7", "=", "42"] and page.locator(".assistant strong").inner_text() == "b"


def test_a_conversation_that_outgrows_the_context_goes_on(page):
    run(page, "/temperature 0", "/maxtokens 5")
    texts = ["a" * 1000, "b" * 1200]
    say(page, texts[0])
    answered(page)
    say(page, texts[1])
    answered(page, 2)
    assert page.locator(".cut").inner_text() == "the model no longer sees what is above"
    assert messages(page)[-1]["content"] == expected(said(texts[1]), 5)


def test_the_server_dies_and_comes_back(browser, checkpoints):  # noqa: F811
    with browser.new_context() as context:
        page = context.new_page()
        with serving(checkpoints) as process:
            page.goto(process.url)
            run(page, "/temperature 0", "/maxtokens 2000")
            say(page, "a long one")
            until(page, "document.querySelector('.busy .body')?.textContent.length > 5")
            process.kill()
            problem = page.wait_for_selector("[role=alert]")
            assert "broke off" in problem.inner_text() and page.locator(".note").inner_text() == "broken off"
            partial = messages(page)[1]["content"]
            assert partial and page.locator("body.offline").count()
            page.click("text=Try again")
            until(page, "document.querySelector('[role=alert]')?.textContent.includes('does not answer')")
        with serving(checkpoints, f"--port={process.url.rsplit(':')[-1]}"):
            page.wait_for_selector("text=The server is back.")
            run(page, "/temperature 0", "/maxtokens 9")
            page.click("text=Try again")
            answered(page)
            assert messages(page) == said("a long one", expected(said("a long one"), 9))
            assert httpx.get(f"{process.url}/health").status_code == 200


def test_a_phone(browser, chat_server):
    with browser.new_context(viewport={"width": 360, "height": 640}, has_touch=True, is_mobile=True) as context:
        page = context.new_page()
        page.goto(chat_server.url)
        page.wait_for_selector("#welcome")
        run(page, "/maxtokens 30")
        say(page, "a" * 300)
        answered(page)
        assert page.evaluate("[innerWidth, document.documentElement.scrollWidth]") == [360, 360]  # nothing made it wider
        for name in ("#go", "#tune", "#new", "[data-action=again]"):
            assert page.locator(name).is_visible()
        size = functools.partial(page.locator("#input").bounding_box)
        assert size()["y"] + size()["height"] <= 640


def test_light_and_dark(browser, chat_server):
    with browser.new_context(color_scheme="dark") as context:
        page = context.new_page()
        page.goto(chat_server.url)
        brightness = lambda: page.evaluate("getComputedStyle(document.body).backgroundColor.match(/[\\d.]+/g).slice(0, 3).reduce((a, b) => a + Number(b), 0)")
        dark = brightness()
        page.click("#theme")
        light = brightness()
        assert dark < 150 and light > 600
        page.reload()
        assert brightness() == light

"""The chat page in a real browser, against a real server; where the order of events matters, against scripted answers."""
import functools
import json
import os
import re
import shutil
from pathlib import Path

import httpx
import pytest

from tasks.customjson import CustomJSON
from tests.test_chat_web import checkpoints, expected, said, serving  # noqa: F401  checkpoints is a fixture
from tests.test_markdown import PAYLOADS

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
REQUIRED = bool(os.environ.get("NANOCHAT_REQUIRE_BROWSER"))  # by continuous integration, which must not pass without these tests
if REQUIRED:
    import playwright.sync_api as playwright
else:
    playwright = pytest.importorskip("playwright.sync_api", reason="the page is tested with playwright, which is not installed")
pytestmark = pytest.mark.skipif(CHROMIUM is None and not REQUIRED, reason="no Chromium found; on Debian: apt install chromium")
ARGS = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking", "--disable-component-update", "--disable-sync"]
PHONE = {"viewport": {"width": 375, "height": 667}, "has_touch": True, "is_mobile": True}

# The page's next answers are what `feed` and `finish` write, not the server's; `asked` is the last request for one.
SCRIPTED = """{
  const real = window.fetch;
  window.fetch = (path, options) => {
    if (path !== "/chat/completions") return real(path, options);
    window.asked = JSON.parse(options.body);
    window.asks = (window.asks ?? 0) + 1;
    const body = new ReadableStream({start(controller) { window.answer = controller; options.signal.addEventListener("abort", () => controller.error(new DOMException("", "AbortError"))); }});
    return Promise.resolve(new Response(body, {headers: {"Content-Type": "text/event-stream"}}));
  };
  const write = event => window.answer.enqueue(new TextEncoder().encode(`data: ${JSON.stringify(event)}\n\n`));
  window.feed = text => write({token: text, gpu: 0});
  window.finish = (reason = "stop") => { write({done: true, finish_reason: reason, completion_tokens: 3}); window.answer.close(); };
  window.breakOff = () => window.answer.error(new TypeError("network error"));
}"""


@pytest.fixture(scope="module")
def browser():
    assert CHROMIUM, "no Chromium found; on Debian: apt install chromium"
    with playwright.sync_playwright() as tools:
        browser = tools.chromium.launch(executable_path=CHROMIUM, args=ARGS)
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def chat_server(checkpoints):  # noqa: F811
    with serving(checkpoints) as process:
        yield process


def open_page(context, url: str):
    page = context.new_page()
    page.set_default_timeout(30_000)
    page.goto(url)
    page.wait_for_selector("#welcome, .message")
    until(page, "!!document.querySelector('#about .name').textContent")
    return page


@pytest.fixture
def context(browser, chat_server):
    """A browser's memory; whatever its pages ask another server for, or report as an error, fails the test."""
    with browser.new_context() as context:
        problems: list[str] = []
        context.on("request", lambda request: request.url.startswith((chat_server.url, "blob:")) or problems.append(request.url))
        context.on("weberror", lambda error: problems.append(str(error.error)))
        context.on("console", lambda message: problems.append(message.text) if re.search("Content.Security.Policy|TrustedHTML", message.text) else None)
        yield context
        assert not problems


@pytest.fixture
def page(context, chat_server):
    return open_page(context, chat_server.url)


@pytest.fixture
def scripted(context, chat_server):
    context.add_init_script(SCRIPTED)
    return open_page(context, chat_server.url)


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


def kept(page) -> dict:
    """The conversation on the screen, as the browser keeps it."""
    return json.loads(page.evaluate("localStorage['nanochat.chat.' + JSON.parse(sessionStorage['nanochat.current'])] ?? '{}'")) or {"messages": []}


def messages(page) -> list[dict]:
    return [{key: message[key] for key in ("role", "content")} for message in kept(page).get("messages", []) if message["role"] != "console"]


def answered(page, count: int = 1) -> None:
    """Until so many answers stand there and nothing is being written."""
    until(page, f"document.querySelectorAll('.assistant:not(.busy) .note').length === {count} && !document.querySelector('.busy')")


def say(page, text: str) -> None:
    page.fill("#input", text)
    page.press("#input", "Enter")


def feed(page, text: str) -> None:
    """Some more of the scripted answer, until it is on the screen."""
    until(page, "!!window.answer")
    page.evaluate("text => feed(text)", text)


def exchange(page, question: str, answer: str) -> None:
    """A scripted question and answer."""
    before = page.evaluate("window.asks ?? 0")
    count = page.locator(".assistant").count()
    say(page, question)
    until(page, f"(window.asks ?? 0) > {before}")
    feed(page, answer)
    page.evaluate("finish()")
    answered(page, count + 1)


def shown(page, selector: str = ".assistant .body") -> str:
    return page.locator(selector).last.inner_text()


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
    assert messages(page) == [] and page.evaluate("document.activeElement.id") == "input"


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
    first, second = expected(said("one"), 12), expected(said("one", expected(said("one"), 12), "two"), 12)
    assert messages(page) == said("one", first, "three", expected(said("one", first, "three"), 12))
    page.click("[data-action=before]")  # what was there before is still there
    assert messages(page) == said("one", first, "two", second)
    page.reload()
    page.wait_for_selector(".version")
    page.click("[data-action=after]")
    assert messages(page)[2]["content"] == "three"
    page.locator(".user").first.hover()
    page.locator("[data-action=edit]").first.click()
    page.press(".editor", "Escape")
    assert len(messages(page)) == 4  # nothing is lost
    page.locator(".assistant").first.hover()
    page.locator("[data-action=again]").first.click()
    answered(page, 1)
    assert messages(page) == said("one", first)
    page.locator(".assistant [data-action=before]").click()
    assert messages(page)[2]["content"] == "three" and page.locator(".version").all_inner_texts() == ["1/2", "2/2"]


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
    run(page, "/temperature 5")
    assert "goes from 0 to 2" in page.locator(".console").last.inner_text() and page.input_value("#input") == "/temperature 5"
    run(page, "/help")
    assert "a new conversation" in page.locator(".console").last.inner_text() and page.input_value("#input") == ""


def test_about_the_model(page):
    page.click("#about")
    text = page.locator("#info").inner_text()
    for part in ("sft-d2", "2 layers", "32 channels", "dense", "2,048 tokens", "1.500 bits per byte", "1 × 16", "2 × 32", "at step 3"):
        assert part in text
    page.keyboard.press("Escape")
    assert not page.locator("#info").is_visible()


def test_a_model_writes_text_not_html(scripted):
    page = scripted
    page.on("dialog", lambda dialog: pytest.fail("a script ran"))
    for question, texts in ("<b>hi</b>", PAYLOADS[:len(PAYLOADS) // 2]), (PAYLOADS[0], PAYLOADS[len(PAYLOADS) // 2:]):
        exchange(page, question, "\n\n".join(texts))
        assert shown(page, ".user .body") == question
    assert page.locator(":is(#thread, dialog) :is(img, script, style, iframe, object, embed, link, form, math, textarea), #thread .user :is(b, script)").count() == 0
    assert page.evaluate("[...document.querySelectorAll('#thread .body *')].flatMap(e => [...e.attributes].map(a => a.name))"
                         ".filter(name => !['class', 'href', 'target', 'rel', 'title', 'start', 'type', 'aria-label', 'data-action', 'viewBox', 'aria-hidden', 'd'].includes(name))") == []
    assert page.evaluate("[...document.querySelectorAll('#thread a')].every(a => /^(https?|mailto):/.test(a.href) && a.rel.includes('noopener'))")
    assert "<svg onload=alert(1)>" in page.locator(".assistant").first.inner_text()
    page.reload()  # and when it is read again
    until(page, "document.querySelectorAll('.assistant .body p').length > 20")
    page.click("#history")
    assert page.locator("#list .open span").inner_text() == "<b>hi</b>"


def test_what_the_page_is_told_to_build_is_checked_again(scripted):
    """Also the server's own trees are only built of what a text may hold."""
    tree = [["script", {}, "alert(1)"], ["a", {"href": "javascript:alert(1)", "onclick": "alert(1)"}, "x"], ["img", {"src": "x", "onerror": "alert(1)"}], ["p", {"class": "tool", "style": "x", "id": "y"}, "z"]]
    scripted.route("**/render", lambda route: route.fulfill(json={"trees": [tree]}))
    exchange(scripted, "a", "b")
    assert scripted.evaluate("document.querySelector('.assistant .body').innerHTML") == (
        '<span>alert(1)</span><a target="_blank" rel="noopener noreferrer nofollow">x</a><span></span><p>z</p>').replace(' target="_blank" rel="noopener noreferrer nofollow"', "")


def test_a_conversation_that_outgrows_the_context_goes_on(page):
    run(page, "/temperature 0", "/maxtokens 5")
    texts = ["a" * 1000, "b" * 1200]
    say(page, texts[0])
    answered(page)
    say(page, texts[1])
    answered(page, 2)
    assert page.locator(".cut").inner_text() == "the model no longer sees what is above"
    assert messages(page)[-1]["content"] == expected(said(texts[1]), 5)


@pytest.mark.slow
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

def test_markdown_is_shown(scripted):
    page = scripted
    exchange(page, "a", "# Head\n\n1. **b**\n2. `c`\n\n> q\n\n|x|y|\n|-|-:|\n|1|2|\n\n[l](https://a.b) $m*1*$ <|python_start|>6*7<|python_end|><|output_start|>42<|output_end|>\n\n```python\ndef f(): pass\n```")
    body = page.locator(".assistant .body")
    for selector, text in {"h1": "Head", "ol li strong": "b", "li code": "c", "blockquote p": "q", "td.right": "2", "a[href='https://a.b/'], a[href='https://a.b']": "l", ".math": "$m*1*$",
                           "figcaption": "python", "pre .keyword": "def"}.items():
        assert body.locator(selector).first.inner_text().strip() == text
    assert body.locator(".call").inner_text().split() == ["6*7", "=", "42"]
    exchange(page, "# mine <b>", "x" * 30_000)  # too long to be rendered
    assert shown(page) == "x" * 30_000 and shown(page, ".user .body") == "# mine <b>"
    page.reload()
    page.wait_for_selector("pre .keyword")


@pytest.mark.parametrize("secure", [True, False])
def test_copying(context, chat_server, secure):
    context.grant_permissions(["clipboard-read", "clipboard-write"])
    context.add_init_script(SCRIPTED)
    if not secure:  # as on plain http at another address than this machine's own
        context.add_init_script("Object.defineProperty(navigator, 'clipboard', {value: undefined})")
    page = open_page(context, chat_server.url)

    def pasted() -> str:
        page.fill("#input", "")
        page.focus("#input")
        page.keyboard.press("Control+v")
        return page.input_value("#input")

    exchange(page, "a  question\nwith **lines**", "so <|python_start|>1+1<|python_end|><|output_start|>2<|output_end|>\n\n```python\nx = 1\n\ny = '<b>'\n```")
    page.evaluate("getSelection().selectAllChildren(document.querySelector('.user .body'))")
    page.click("figcaption [data-action=copy]")
    page.wait_for_selector("figcaption [title=Copied]")
    assert page.evaluate("getSelection().toString()").startswith("a ")  # is what it was
    assert pasted() == "x = 1\n\ny = '<b>'"
    page.locator(".user").hover()
    page.click(".user [data-action=copy]")
    page.wait_for_selector(".user [title=Copied]")
    assert pasted() == "a  question\nwith **lines**"
    page.click(".assistant .under [data-action=copy]")
    page.wait_for_selector(".assistant .under [title=Copied]")
    assert pasted() == "so 1+1 = 2\n\n```python\nx = 1\n\ny = '<b>'\n```"


def test_what_is_no_command_is_a_message(scripted):
    exchange(scripted, "first", "yes")
    for text in ("/nonsense", "/usr/bin/env python3", "/clear the table", "/help me", "/temperature in Paris today", "/", "//", "/topk\nof what", "/clear\n\n/help"):
        before = messages(scripted)
        exchange(scripted, text, "what?")
        assert messages(scripted) == before + said(text, "what?") and scripted.evaluate("asked.messages.at(-1).content") == text


def test_an_edited_message_is_a_message(scripted):
    exchange(scripted, "first", "yes")
    scripted.press("#input", "ArrowUp")
    scripted.fill(".editor", "/clear")
    scripted.press(".editor", "Enter")
    feed(scripted, "no")
    scripted.evaluate("finish()")
    answered(scripted)
    assert messages(scripted) == said("/clear", "no")
    scripted.click(".user [data-action=before]")
    assert messages(scripted) == said("first", "yes")


def test_nothing_is_disturbed_while_an_answer_grows(scripted):
    page = scripted
    exchange(page, "first", "One.")
    exchange(page, "second", "Two.")
    say(page, "third")
    feed(page, "A first paragraph with *emphasis* in it.\n\nAnd")
    until(page, "!!document.querySelector('.busy em')")
    page.locator(".user").first.hover()
    page.locator(".user [data-action=edit]").first.click()
    page.keyboard.type(" changed")
    page.evaluate("document.querySelector('.editor').setSelectionRange(2, 5); window.watched = document.querySelector('.busy p')")
    for i in range(4):
        feed(page, f" more{i} of it.")
        until(page, f"document.querySelector('.busy').textContent.includes('more{i}')")
    page.evaluate("finish()")
    answered(page, 3)
    assert page.evaluate("document.activeElement.className + document.activeElement.value + document.activeElement.selectionStart + document.activeElement.selectionEnd") == "editorfirst changed25"
    assert page.evaluate("document.contains(watched)")

    page.fill("#input", "a draft")
    page.context.set_offline(True)
    page.evaluate("document.querySelector('.assistant:last-of-type [data-action=again]').click()")
    page.evaluate("breakOff()")
    page.wait_for_selector("[role=alert]")
    page.wait_for_selector(".offline", state="attached")
    page.context.set_offline(False)
    page.wait_for_selector("text=The server is back.")
    assert page.input_value(".editor") == "first changed" and page.input_value("#input") == "a draft"
    assert messages(page)[0]["content"] == "first" and len(messages(page)) == 6  # nothing is gone as long as nothing is sent
    page.reload()
    page.wait_for_selector(".editor")
    assert page.input_value(".editor") == "first changed" and page.input_value("#input") == "a draft"
    page.click("text=Cancel")
    assert page.locator(".editor").count() == 0 and page.locator(".user .body").first.inner_text() == "first"


def test_a_selection_survives(scripted):
    page = scripted
    say(page, "q")
    feed(page, "Some words here")
    until(page, "document.querySelector('.busy p')?.textContent === 'Some words here'")
    page.evaluate("{ const text = document.querySelector('.busy p').firstChild; getSelection().setBaseAndExtent(text, 5, text, 10) }")
    for more in (", and more of them.", "\n\n- a\n- b", "\n\n```\ncode"):
        feed(page, more)
        until(page, f"document.querySelector('.busy').textContent.includes({json.dumps(more.split()[-1])})")
        assert page.evaluate("getSelection().toString()") == "words"
    page.evaluate("finish()")
    answered(page)
    assert page.evaluate("getSelection().toString()") == "words"


def test_rendering_is_only_of_the_answer_that_grows(scripted):
    page = scripted
    exchange(page, "first", "One.")
    asked: list[list[str]] = []
    page.on("request", lambda request: asked.append(request.post_data_json["texts"]) if request.url.endswith("/render") else None)
    say(page, "second")
    for i in range(60):
        feed(page, f"word{i} ")
    page.evaluate("finish()")
    answered(page, 2)
    assert shown(page).endswith("word59")
    assert all(len(texts) == 1 and texts[0].startswith("word0") for texts in asked) and len(asked) < 60


def test_the_page_shows_what_cannot_be_rendered(scripted):
    scripted.route("**/render", lambda route: route.fulfill(status=500, body="no"))
    exchange(scripted, "q", "*as it is*\nyes")
    assert shown(scripted) == "*as it is*\nyes"


def test_conversations_are_listed_found_and_exported(scripted, context, chat_server, tmp_path):
    page = scripted
    for name in ("apples", "pears", "plums", "figs", "nuts"):
        exchange(page, f"About {name}", f"They are {name}.")
        page.click("#new")
    page.click("#history")
    titles = lambda: page.locator("#list .open span").all_inner_texts()
    assert titles() == [f"About {name}" for name in ("nuts", "figs", "plums", "pears", "apples")]
    page.fill("#find", "ARE P")
    assert titles() == ["About plums", "About pears"]
    page.click("#list .open >> nth=1")
    assert shown(page) == "They are pears." and not page.locator("#chats").is_visible()
    exchange(page, "more", "No <|python_start|>1+1<|python_end|><|output_start|>2<|output_end|>.")

    page.click("#history")
    assert titles()[0] == "About pears" and page.locator("[aria-current=true] span").inner_text() == "About pears"
    with page.expect_download() as download:
        page.click("#export-one")
    assert "**You:**\n\nAbout pears\n\n**nanochat:**\n\nThey are pears.\n" in Path(download.value.path()).read_text(encoding="utf-8")
    with page.expect_download() as download:
        page.click("#export-all")
    assert download.value.suggested_filename.endswith(".jsonl")
    task = CustomJSON(download.value.path())  # what was said can be trained on
    assert len(task) == 5 and task[0]["messages"] == said("About pears", "They are pears.", "more", "No <|python_start|>1+1<|python_end|><|output_start|>2<|output_end|>.")

    page.locator("#list li").nth(1).locator("[data-action=remove]").click()
    assert page.evaluate("Object.keys(localStorage).filter(key => key.includes('.chat.')).length") == 4
    page.click("text=Undo")
    assert page.evaluate("Object.keys(localStorage).filter(key => key.includes('.chat.')).length") == 5 and titles()[1] == "About nuts"
    page.click("#remove-all")
    assert page.evaluate("Object.keys(localStorage).filter(key => key.includes('.chat.')).length") == 0
    page.click("#remove-all")  # undoes it
    assert len(titles()) == 5
    page.locator("#list [data-action=remove]").first.click()
    page.keyboard.press("Escape")
    page.wait_for_selector("#welcome")

    other = open_page(context, chat_server.url)  # another tab begins anew, and has the same list
    assert other.locator("#welcome").is_visible()
    other.click("#history")
    assert other.locator("#list .open").count() == 4


@pytest.mark.slow
def test_two_tabs_keep_both_conversations(scripted, context, chat_server):
    other = open_page(context, chat_server.url)
    exchange(scripted, "here", "yes")
    exchange(other, "there", "no")
    exchange(scripted, "here again", "yes")
    scripted.click("#history")
    assert scripted.locator("#list .open span").all_inner_texts() == ["here", "there"]
    scripted.locator("#list .open").nth(1).click()
    exchange(scripted, "a word more", "fine")
    until(other, "document.body.textContent.includes('a word more')")  # the same conversation in both
    assert len(messages(other)) == 4


def test_an_answer_goes_on_in_the_background(scripted):
    page = scripted
    say(page, "slow")
    feed(page, "Half ")
    until(page, "document.querySelector('.busy p')?.textContent === 'Half'")
    page.keyboard.press("Alt+n")
    page.wait_for_selector("#welcome")
    page.evaluate("feed('and half.'); finish()")
    page.click("#history")
    until(page, "document.querySelector('#list small')?.textContent !== 'answering'")
    page.click("#list .open")
    until(page, "document.querySelector('.assistant p')?.textContent === 'Half and half.'")
    answered(page)


@pytest.mark.slow
def test_there_is_a_bound_to_what_is_kept(scripted):
    page = scripted
    page.evaluate("""for (let i = 0; i < 230; i++) localStorage["nanochat.chat.old" + i] =
        JSON.stringify({id: "old" + i, created: i, updated: i, messages: [{role: "user", content: "old " + i}], forgotten: 0})""")
    exchange(page, "new", "yes")
    left = page.evaluate("Object.keys(localStorage).filter(key => key.includes('.chat.')).map(key => JSON.parse(localStorage[key]).messages[0].content)")
    assert len(left) == 200 and {"new", "old 229", "old 31"} <= set(left) and "old 30" not in left
    page.evaluate("""for (let i = 0; i < 8; i++) try { localStorage["nanochat.chat.big" + i] =
        JSON.stringify({id: "big" + i, created: 1000 + i, updated: 1000 + i, messages: [{role: "user", content: "x".repeat(600_000)}], forgotten: 0}) } catch {}""")
    exchange(page, "y" * 700_000, "a long one")  # the old ones make room
    assert len(messages(page)[2]["content"]) == 700_000
    page.evaluate("localStorage['nanochat.chat.broken'] = '{\"id\": 5, \"messages\": [null]}'; localStorage['nanochat.chat.worse'] = '{'")
    page.click("#history")
    assert page.locator("#list .open").count() > 1


def test_a_browser_that_keeps_nothing(context, chat_server):
    context.add_init_script(SCRIPTED)
    context.add_init_script("for (const name of ['localStorage', 'sessionStorage']) Object.defineProperty(window, name, {get() { throw new DOMException('no', 'SecurityError'); }})")
    page = open_page(context, chat_server.url)
    exchange(page, "hello", "yes")
    page.click("#theme")
    page.click("#history")
    assert page.locator("#list .open span").inner_text() == "hello" and page.locator("#not-kept").is_visible()
    page.click("#new-here")
    assert page.locator("#welcome").is_visible()


def interrupted(page) -> None:
    exchange(page, "first", "One.")
    say(page, "second")
    feed(page, "Half of")
    until(page, "document.querySelector('.busy p')?.textContent === 'Half of'")
    page.reload()
    page.wait_for_selector("text=The answer broke off when the page was left.")
    assert messages(page) == said("first", "One.", "second", "Half of")


def test_a_reload_in_mid_answer_offers_another(scripted, chat_server):
    """Where the server cannot go on."""
    about = httpx.get(f"{chat_server.url}/info").json() | {"continue_final_message": False}
    scripted.route("**/info", lambda route: route.fulfill(json=about))
    interrupted(scripted)
    scripted.click("text=Answer again >> visible=true")
    feed(scripted, "Whole.")
    scripted.evaluate("finish()")
    answered(scripted, 2)
    assert messages(scripted)[-1]["content"] == "Whole." and scripted.evaluate("asked.messages") == said("first", "One.", "second")
    scripted.click("[data-action=before]")
    assert messages(scripted)[-1]["content"] == "Half of"  # is not lost
    exchange(scripted, "third", "Three.")
    assert scripted.locator(".assistant .note").all_inner_texts()[1] == "broken off" and scripted.locator(".problem").count() == 0


def test_a_reload_in_mid_answer_offers_to_go_on(context, chat_server):
    """Where the server can: always with a base model, which continues any text."""
    about = httpx.get(f"{chat_server.url}/info").json()
    for change in ({"continue_final_message": True}, {"source": "base"}):
        context.unroute_all()
        context.route("**/info", lambda route: route.fulfill(json={**about, **change}))
        context.add_init_script(SCRIPTED)
        page = context.new_page()
        page.goto(chat_server.url)
        page.wait_for_selector("#welcome")
        say(page, "second")
        feed(page, "Half of")
        until(page, "document.querySelector('.busy .body')?.textContent === 'Half of'")
        page.reload()
        page.wait_for_selector("text=The answer broke off when the page was left.")
        page.click(".problem >> text=Go on")
        feed(page, " it.")
        page.evaluate("finish('length')")
        answered(page)
        assert messages(page) == said("second", "Half of it.") and page.evaluate("asked.messages") == said("second", "Half of")
        assert page.evaluate("asked.continue_final_message") == change.get("continue_final_message")
        page.click(".assistant [data-action=on]")  # and after the longest answer allowed
        until(page, "asked.messages.at(-1).content === 'Half of it.'")
        page.keyboard.press("Escape")
        until(page, "!document.querySelector('.busy')")
        assert messages(page) == said("second", "Half of it.")


@pytest.mark.slow
def test_a_message_that_is_refused_can_be_edited_and_does_no_harm(page):
    run(page, "/temperature 0", "/maxtokens 5")
    for text, reason in (("x" * 1_100_000, "not answered"), ("y" * 9000, "9000 characters")):
        say(page, text)
        until(page, f"document.querySelector('.refused:last-of-type .note')?.textContent.includes('{reason}')")
        assert messages(page)[-1] == {"role": "user", "content": text}
    say(page, "hello")
    answered(page)
    assert messages(page)[-1]["content"] == expected(said("hello"), 5)
    page.locator(".user").nth(1).locator("[data-action=edit]").click()
    page.fill(".editor", "short")
    page.press(".editor", "Enter")
    answered(page)
    assert messages(page)[1:] == said("short", expected(said("short"), 5))


def test_the_end_is_followed_until_one_scrolls_up(scripted):
    page = scripted
    exchange(page, "first", "line\n\n" * 60)
    at_end = "(s => s.scrollHeight - s.scrollTop - s.clientHeight < 30)(document.getElementById('scroll'))"
    until(page, at_end)
    say(page, "second")
    for i in range(3):
        feed(page, f"word{i}\n\n" * 20)
        until(page, f"document.querySelector('.busy').textContent.includes('word{i}') && {at_end}")
    assert not page.locator("#jump").is_visible()
    page.mouse.move(300, 300)
    page.mouse.wheel(0, -600)
    page.wait_for_selector("#jump")
    top = page.evaluate("document.getElementById('scroll').scrollTop")
    feed(page, "last\n\n" * 20)
    until(page, "document.querySelector('.busy').textContent.includes('last')")
    assert page.evaluate("document.getElementById('scroll').scrollTop") <= top
    page.click("#jump")
    until(page, at_end)
    page.wait_for_selector("#jump", state="hidden")
    page.evaluate("finish()")


def test_who_speaks_is_said(scripted):
    page = scripted
    exchange(page, "hello", "good **day**")
    assert page.locator("#thread article").evaluate_all("all => all.map(a => a.querySelector('h2').textContent)") == ["You", "nanochat"]
    assert page.get_by_role("heading", name="nanochat").count() == 1
    assert page.locator("#status").inner_text() == "nanochat: good day"
    assert page.evaluate("[...document.querySelectorAll('button')].filter(b => !(b.textContent.trim() || b.ariaLabel)).length") == 0
    assert page.locator(".tool[aria-label=Conversations]").count() == 1


@pytest.mark.slow
def test_a_phone(browser, chat_server):
    for turned in False, True:
        size = PHONE["viewport"]
        with browser.new_context(**{**PHONE, "viewport": {"width": size["height"], "height": size["width"]} if turned else size}) as context:
            context.add_init_script(SCRIPTED)
            page = open_page(context, chat_server.url)
            width, height = page.evaluate("[innerWidth, innerHeight]")
            small = ("[...document.querySelectorAll('button, input, [href]')].filter(e => e.offsetParent && !e.closest('.body p')).map(e => [e.id || e.className || e.textContent, e.getBoundingClientRect()])"
                     ".filter(([, box]) => box.width < 43.9 || box.height < 43.9).map(([name]) => name)")
            assert page.evaluate(small) == []
            page.fill("#input", "one")
            page.press("#input", "Enter")
            page.keyboard.type("two")
            assert page.input_value("#input") == "one\ntwo" and page.get_attribute("#input", "enterkeyhint") == "enter"
            page.click("#go")
            feed(page, "a" * 300 + "\n\n|" + "x" * 90 + "|y|\n|-|-|\n\n```\n" + "z" * 300)
            page.evaluate("finish()")
            answered(page)
            page.click(".assistant .under [data-action=again]")
            until(page, "asks === 2")
            feed(page, "b")
            page.evaluate("finish()")
            answered(page)
            page.click("[data-action=before]")
            page.click("[data-action=edit]")
            page.press(".editor", "End")
            page.press(".editor", "Enter")
            assert "\n" in page.input_value(".editor") and page.locator(".editor").count() == 1
            assert page.evaluate(small) == []
            assert page.evaluate("[innerWidth, document.documentElement.scrollWidth]") == [width, width]  # nothing made it wider
            for opener, dialog in ("#history", "#chats"), ("#tune", "#settings"), ("#about", "#info"):
                page.click(opener)
                page.wait_for_selector(dialog)
                assert page.evaluate(small) == []
                page.locator(f"{dialog} [data-close]").click()
            box = functools.partial(page.locator("#input").bounding_box)
            assert box()["y"] + box()["height"] <= height


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

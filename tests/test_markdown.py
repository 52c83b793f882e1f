"""Markdown of answers: what it becomes, and that nothing a model writes becomes more than text, layout and links; the page's files."""
import asyncio
import json
import re
import sys
import threading
from pathlib import Path

import httpx
import pytest
from fastapi import FastAPI, Request
from fastapi.testclient import TestClient
from pygments.lexers import get_lexer_by_name

from nanochat.serving import markdown, page
from nanochat.serving.markdown import LANGUAGES, MAX_DEPTH, MAX_TEXT, markdown_tree

ROOT = Path(__file__).resolve().parent.parent
TAGS = set("a b blockquote br code copy div em figcaption figure h1 h2 h3 h4 h5 h6 hr li ol p pre s span strong table tbody td th thead tr ul".split())


def text_of(node) -> str:
    return node if isinstance(node, str) else "".join(map(text_of, node[2:]))


def nodes_of(nodes):
    for node in nodes:
        if not isinstance(node, str):
            yield node
            yield from nodes_of(node[2:])


def found(tree, tag: str) -> list:
    return [node for node in nodes_of(tree) if node[0] == tag]


def check(tree) -> None:
    """Only known elements, only attributes that do nothing, only links to other places."""
    for tag, attributes, *_ in nodes_of(tree):
        assert tag in TAGS
        for name, value in attributes.items():
            assert {"href": tag == "a" and re.match(r"(https?://|mailto:)", value, re.IGNORECASE), "class": re.fullmatch("[a-z]+", value),
                    "start": tag == "ol" and value.isdigit(), "title": value == "The model used its calculator"}[name]


def test_what_markdown_has():
    assert markdown_tree("# One *two*\n\nthree **four**\nfive ~~six~~ `a*b*`\n\n---") == [
        ["h1", {}, "One ", ["em", {}, "two"]],
        ["p", {}, "three ", ["strong", {}, "four"], ["br", {}], "five ", ["s", {}, "six"], " ", ["code", {}, "a*b*"]], ["hr", {}]]
    assert markdown_tree("- a\n  1. b\n\n> c") == [["ul", {}, ["li", {}, "a", ["ol", {}, ["li", {}, "b"]]]], ["blockquote", {}, ["p", {}, "c"]]]
    assert markdown_tree("3. a\n4. b") == [["ol", {"start": "3"}, ["li", {}, "a"], ["li", {}, "b"]]]
    assert markdown_tree("|a|b|c|\n|-|:-:|-:|\n|1|2|3|") == [["div", {"class": "table"}, ["table", {},
        ["thead", {}, ["tr", {}, ["th", {}, "a"], ["th", {"class": "center"}, "b"], ["th", {"class": "right"}, "c"]]],
        ["tbody", {}, ["tr", {}, ["td", {}, "1"], ["td", {"class": "center"}, "2"], ["td", {"class": "right"}, "3"]]]]]]
    assert markdown_tree("[x](https://a.b/?c=1&d=2) <mailto:a@b.c> ![y](http://a.b/z.png) ![](http://a.b)") == [
        ["p", {}, ["a", {"href": "https://a.b/?c=1&d=2"}, "x"], " ", ["a", {"href": "mailto:a@b.c"}, "mailto:a@b.c"], " ",
         ["a", {"href": "http://a.b/z.png"}, "y"], " ", ["a", {"href": "http://a.b"}, "http://a.b"]]]
    assert markdown_tree("a\n-") == [["p", {}, "a", ["br", {}], "-"]]  # no heading
    assert markdown_tree("") == []


def test_code():
    (figure,) = markdown_tree("```Python title=x\ndef f(): return 'a' # b\n```")
    assert figure[:2] == ["figure", {"class": "code"}] and text_of(figure[2]) == "Python" and figure[2][-1] == ["copy", {}]
    assert [(node[1]["class"], text_of(node)) for node in found([figure], "span")[1:]] == [
        ("keyword", "def"), ("name", "f"), ("keyword", "return"), ("string", "'a'"), ("comment", "# b")]
    for source in ("```\na < b\n```", "    a < b", "~~~ nosuchlanguage\na < b", "```python3.99\na < b"):
        (code,) = found(markdown_tree(source), "code")
        assert code[2:] == ["a < b"]


@pytest.mark.parametrize("language", sorted(LANGUAGES))
def test_highlighting_changes_no_character(language):
    assert get_lexer_by_name(language)
    source = "  def f(x):\n\n\treturn \"<b>\" + 1.5e3  # 😀 \\\n<tag a='b'>&amp;</tag>\n@x $y `z` {1: [2]}\n\n"
    (code,) = found(markdown_tree(f"```{language}\n{source}```"), "code")
    assert text_of(code) + "\n" == source
    (code,) = found(markdown_tree(f"```{language}\n" + "(\"" * 3000), "code")  # which the lexers do not like
    assert text_of(code) == "(\"" * 3000


def test_math_stays_as_it_is_written():
    for math in ("$a_1 * b_1 * c$", r"\(x_1 * y * z\)", r"\[ a*b*c \]", "$$a*b*c$$", r"$\$5 * \alpha * 2$"):
        assert markdown_tree(f"so {math}, *yes*") == [["p", {}, "so ", ["span", {"class": "math"}, math], ", ", ["em", {}, "yes"]]]
    for math in ("$$\na\n- b\n= c\n$$", "\\[\n# a\n\\]"):
        assert markdown_tree(f"so\n{math}\nyes") == [["p", {}, "so"], ["div", {"class": "math"}, math], ["p", {}, "yes"]]
    assert markdown_tree("> $$\n> a\n> $$\nb")[0][2] == ["div", {"class": "math"}, "$$\na\n$$"]
    for prices in ("$5 and $6", "$10-$5=$5", "5$ or 6 $", "$", "$$", "$$ is money", "a\n$$\nb"):
        assert not [node for node in nodes_of(markdown_tree(prices)) if node[1]]
        assert "".join(map(text_of, markdown_tree(prices))).replace("\n", "") == prices.replace("\n", "")


def test_the_calculator():
    call = ["span", {"class": "call", "title": "The model used its calculator"}]
    assert markdown_tree("so <|python_start|>6*7*1<|python_end|><|output_start|>42<|output_end|>!") == [["p", {}, "so ", [*call, "6*7*1", "\u00a0=\u00a0", ["b", {}, "42"]], "!"]]
    assert markdown_tree("<|python_start|>6*") == [["p", {}, [*call, "6*"]]]  # it is still being written
    assert markdown_tree("<|python_start|>6<|python_end|><|output_start|>") == [["p", {}, [*call, "6", "\u00a0=\u00a0", ["b", {}, ""]]]]
    assert text_of(markdown_tree("<|output_end|> <|x|>")[0]) == "<|output_end|> <|x|>"


PAYLOADS = [
    "<script>alert(1)</script>", "<img src=x onerror=alert(1)>", "<svg onload=alert(1)>", "<svg><script>alert(1)</script></svg>", "<iframe srcdoc='<script>alert(1)</script>'>",
    "<style>*{background:url(http://evil.example)}</style>", "<div style=\"background:url(javascript:alert(1))\">", "<a href=javascript:alert(1)>x</a>", "<math><mi xlink:href=javascript:alert(1)>",
    "[x](javascript:alert(1))", "[x](JaVaScRiPt:alert(1))", "[x](java\tscript:alert(1))", "[x](&#106;avascript:alert(1))", "[x](javascript&colon;alert(1))", "[x](<javascript:alert(1)>)",
    "[x](\x01javascript:alert(1))", "[x]( javascript:alert(1))", "[x](vbscript:x)", "[x](data:text/html,<script>alert(1)</script>)", "[x](data:text/html;base64,PHNjcmlwdD4=)",
    "![x](data:image/svg+xml,<svg onload=alert(1)>)", "![x](javascript:alert(1))", "<javascript:alert(1)>", "<data:text/html,x>", "[x]: javascript:alert(1)\n\n[x]", "[x](file:///etc/passwd)",
    "[x](//evil.example)", "[x](/logout)", "[x](http://a\" onmouseover=\"alert(1))", "[x](http://a 'b\" onclick=alert(1) ')", "![x\" onerror=\"alert(1)](http://a)", "[x](https://a/\"><script>alert(1)</script>)",
    "```\"><img src=x onerror=alert(1)>\ncode\n```", "```python onload=alert(1)\n1\n```", "```../../etc/passwd\n1\n```", "```html\n<script>alert(1)</script>\n```", "~~~' onx='\n1",
    "|<img src=x onerror=alert(1)>|a|\n|-|-|\n|<svg/onload=alert(1)>|[x](javascript:alert(1))|", "# <img src=x onerror=alert(1)>", "1<!--><script>alert(1)</script>-->", "<![CDATA[<script>]]>", "<?php x ?>",
    "&lt;script&gt;alert(1)&lt;/script&gt;", "\\<script>alert(1)\\</script>", "$<img src=x onerror=alert(1)>$", "<|python_start|><img src=x onerror=alert(1)><|python_end|><|output_start|><script>",
    "99999999999. x", "123456789. x", "[x](mailto:a@b?subject=<script>)", "\u202e<script>", "</textarea></code></pre><script>alert(1)</script>", "a\x00<scr\x00ipt>",
]


@pytest.mark.parametrize("payload", PAYLOADS)
def test_nothing_is_injected(payload):
    for text in (payload, f"> - {payload}", f"**{payload}**", f"a\n\n{payload}\n\nb"):
        tree = markdown_tree(text)
        check(tree)
        if "<script>alert(1)</script>" in payload and "](" not in payload and "xml" not in payload:
            assert "<script>alert(1)</script>" in "".join(map(text_of, tree))  # it can be read
    for end in range(len(payload)):  # while it is being written
        check(markdown_tree(payload[:end]))


@pytest.mark.parametrize("text", [">" * 5000, "- " * 5000, "*a " * 4000 + "a* " * 4000, "**a _b " * 2000 + "b_ a** " * 2000, "[" * 5000 + "](http://x)" * 1000,
                                  "\n".join("  " * i + "- a" for i in range(100)), "".join(f"{'>' * (i % 90)} a\n" for i in range(300)), "![" * 3000])
def test_whatever_is_nested_endlessly_is_shown_as_it_is(text):
    tree = markdown_tree(text)
    if tree is not None:
        check(tree)
        depth = lambda node: 1 if isinstance(node, str) else 1 + max(map(depth, node[2:]), default=0)
        assert max(map(depth, tree)) <= MAX_DEPTH + 3
        # nothing has disappeared; markers of quotes and lists are no text
        assert re.sub(r"[>\s*_-]", "", "".join(map(text_of, tree))) == re.sub(r"\(http://x\)|[>\s*_-]", "", text) or "http" in text


def test_a_depth_that_answers_have_is_no_problem():
    tree = markdown_tree("\n".join("  " * i + f"- {i}" for i in range(12)))
    assert len(found(tree, "li")) == 12
    assert markdown_tree(">" * 3000) is None


def test_long_texts():
    assert markdown_tree("a" * MAX_TEXT) == [["p", {}, "a" * MAX_TEXT]]
    assert markdown_tree("*a" * 500_000) is None
    json.dumps(markdown_tree("*a_[`" * (MAX_TEXT // 5)))


def test_tables_that_grow():
    """Short rows are filled up: some hundred columns and as many lines of one character would become 60,000 cells."""
    table = lambda columns, rows: "|a" * columns + "\n" + "|-" * columns + "\n" + "|\n" * rows
    assert markdown_tree(table(200, 300)) is None and markdown_tree("> " + table(200, 300).replace("\n", "\n> ")) is None
    assert markdown_tree("\n".join([table(50, 100)] * 50)) is None, "all together"
    assert markdown_tree(table(10, 300))[0][0] == "div" and len(markdown_tree("a | b\n" * 3000)) == 1
    assert markdown_tree("a\n" * 2000 + "\n" + table(9, 20))[1][0] == "div", "lines of no table"


# -----------------------------------------------------------------------------
# The page's part of the server


@pytest.fixture(scope="module")
def client():
    app = FastAPI()
    app.include_router(page.page_router())
    return TestClient(app)


def test_texts_are_rendered(client):
    texts = ["# a", "b \ud800", "x" * (MAX_TEXT + 1), ""]
    answer = client.post("/render", content=json.dumps({"texts": texts}), headers={"Content-Type": "application/json"})
    assert answer.status_code == 200
    assert answer.json() == {"trees": [[["h1", {}, "a"]], [["p", {}, "b \ud800"]], None, []]}


def test_a_page_elsewhere_cannot_ask(client):
    """A browser sends a text of no declared type to anyone without asking first."""
    assert client.post("/render", content='{"texts": []}', headers={"Content-Type": "text/plain"}).status_code == 415


@pytest.mark.parametrize("body", ["", "no JSON", "[]", "{}", '{"texts": null}', '{"texts": "a"}', '{"texts": [1]}', '{"texts": [["a"]]}', json.dumps({"texts": [""] * 51}), json.dumps({"texts": ["a" * 20_001] * 5}), "[" * 100_000, b"\xff\xfe"])
def test_bodies_that_are_none(client, body):
    answer = client.post("/render", content=body, headers={"Content-Type": "application/json"})
    assert answer.status_code == 400 and "send" in answer.json()["detail"]


def test_rendering_takes_turns(monkeypatch):
    """One text at a time; beyond some that wait others are told to come again, and none that has gone is rendered."""
    monkeypatch.setattr(page, "MAX_WAITING", 2)
    release, rendered = threading.Event(), []

    def slow(body):
        rendered.append(body)
        release.wait(60)
        return b"{}"
    monkeypatch.setattr(page, "_render", slow)
    app = FastAPI()
    app.include_router(page.page_router())

    async def ask():
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://localhost") as client:
            post = lambda: client.post("/render", content=b"{}", headers={"Content-Type": "application/json"})
            first = [asyncio.create_task(post()) for _ in range(2)]
            while not rendered:
                await asyncio.sleep(0)
            third = await post()
            with monkeypatch.context() as patch:
                patch.setattr(Request, "is_disconnected", gone)
                release.set()
                answers = await asyncio.gather(*first)
            return third, answers, await post()

    async def gone(self):
        return True
    third, (first, second), later = asyncio.run(ask())
    assert third.status_code == 503 and third.headers["retry-after"] and first.status_code == later.status_code == 200
    assert second.status_code == 400 and len(rendered) == 2, "it has gone while it waited"


def test_a_request_has_its_time(monkeypatch):
    monkeypatch.setattr(page, "MAX_SECONDS", 0.0)
    assert json.loads(page._render(b'{"texts": ["a", "b"]}')) == {"trees": [[["p", {}, "a"]]]}


def test_the_pages_files(client):
    """All that the page asks for is there, in the package too, and its policy holds for it."""
    html = (ROOT / "nanochat" / "ui.html").read_text(encoding="utf-8")
    wanted = re.findall(r'(?:src|href)="(.*?)"', html)
    for path in list(wanted):
        wanted += [f"/ui/{name}" for name in re.findall(r'from "\./(.*?)"', (ROOT / "nanochat" / path.lstrip("/")).read_text(encoding="utf-8"))]
    assert set(wanted) | {"/"} == set(page.FILES)
    for path in page.FILES:
        answer = client.get(path)
        assert answer.status_code == 200 and client.head(path).status_code == 200
        assert "unsafe" not in answer.headers["content-security-policy"] and "default-src 'none'" in answer.headers["content-security-policy"]
    assert not re.search(r"<script>|<style>| style=| on\w+=", html)
    for path in (ROOT / "nanochat" / "ui").iterdir():
        assert f"/ui/{path.name}" in page.FILES
        assert not re.search(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\b|new Function|https?://(?!www\.w3\.org/2000/svg)[\w.]", path.read_text(encoding="utf-8"))
    assert '"ui/*"' in (ROOT / "pyproject.toml").read_text(encoding="utf-8")


def test_what_the_page_and_the_server_agree_on():
    """The page builds the elements and classes that the server makes, and no others."""
    source = (ROOT / "nanochat" / "ui" / "dom.js").read_text(encoding="utf-8")
    tags, classes = ({*re.search(rf'{name} = new Set\("(.*?)"', source)[1].split()} for name in ("TAGS", "CLASSES"))
    assert tags | {"copy"} == TAGS
    assert classes == {name for _, name in markdown._CLASSES} | {"call", "center", "right", "table", "code", "math"}
    assert sys.getrecursionlimit() > 4 * MAX_DEPTH

"""Markdown of an answer as a tree, from which the page builds its elements one by one: nothing that a model writes is ever parsed as HTML.

A node is a text or a list `[tag, attributes, *children]`, ready for JSON.

* HTML in the text stays text. Links lead to http, https and mail addresses only; a picture becomes a link to it, so nothing is loaded.
* Math stays as it is written: `$a_1 * b_1$` has no emphasis in it, and `\\(` keeps its backslash. A use of the calculator is a node of its own.
* Code is highlighted by Pygments, for a fixed list of languages; any other name is only a label.
* An underlined heading is not recognized: while "text\\n- item" arrives, "text\\n-" would flash up as one.
"""
import re
import time
from functools import lru_cache
from typing import Any

from markdown_it import MarkdownIt
from markdown_it.rules_block import StateBlock
from markdown_it.rules_inline import StateInline
from markdown_it.token import Token
from pygments.lexers import get_lexer_by_name
from pygments.token import Comment, Keyword, Name, Number, String, _TokenType

Node = str | list[Any]

MAX_TEXT = 24_000  # characters; an answer has at most 4096 tokens, and the parser needs a second or two for 24,000 brackets
MAX_CELLS = 5_000  # of a table: short rows are filled up with empty ones, which a line of a character can ask for by the hundred
MAX_CODE = 5_000  # characters that are highlighted
MAX_SECONDS = 0.5  # of highlighting; many lexers are quadratic in code that is none
MAX_MATH = 2_000
MAX_DEPTH = 60  # far beyond any answer, far below the recursion limits of JSON encoders

# Names as people write them after ```. Pygments knows some hundred more; not all of their lexers are quick with odd input.
LANGUAGES = frozenset(
    "bash c c++ cpp cs csharp css diff docker dockerfile go golang haskell html ini java javascript js json jsx julia kotlin latex lua make makefile markdown "
    "md objective-c perl php powershell py python python3 pytb r rb ruby rust scala sh shell sql swift tex toml ts tsx typescript xml yaml yml zsh".split())

_CLASSES: list[tuple[_TokenType, str]] = [(Comment, "comment"), (Keyword, "keyword"), (String, "string"), (Number, "number"), (Name.Function, "name"),
                                          (Name.Class, "name"), (Name.Tag, "keyword"), (Name.Decorator, "name"), (Name.Builtin, "builtin"), (Name.Attribute, "name")]
_DOLLARS = re.compile(r"\$(?![\s$])(?:[^$\\\n]|\\.){1,500}(?<!\s)\$(?!\d)")  # Pandoc's rule, so that $5 and $6 are prices
_RULER = frozenset("-|: \t>*+.)0123456789")  # what the second line of a table is made of, quoted or in a list
_CALL = re.compile(r"<\|python_start\|>(.*?)(?:<\|python_end\|>(?:<\|output_start\|>(.*?)(?:<\|output_end\|>|\Z))?|\Z)", re.DOTALL)
_MATH = {r"\(": r"\)", r"\[": r"\]", "$$": "$$"}


# -----------------------------------------------------------------------------
# What Markdown does not have


def _inline_math(state: StateInline, silent: bool) -> bool:
    closing = _MATH.get(state.src[state.pos:state.pos + 2])
    if closing:
        end = state.src.find(closing, state.pos + 3, state.pos + MAX_MATH) + 2
        if end < 2:
            return False
    elif match := _DOLLARS.match(state.src, state.pos):
        end = match.end()
    else:
        return False
    if end > state.posMax:
        return False
    if not silent:
        state.push("math", "span", 0).content = state.src[state.pos:end]
    state.pos = end
    return True


def _block_math(state: StateBlock, first: int, end_line: int, silent: bool) -> bool:
    start = state.bMarks[first] + state.tShift[first]
    opening = state.src[start:start + 2]
    if opening not in ("$$", r"\[") or state.is_code_block(first):
        return False
    end = state.src.find(_MATH[opening], start + 2, start + MAX_MATH) + 2
    if end < 2 or state.src[end:end + 200].partition("\n")[0].strip():
        return False
    last = next((line for line in range(first, end_line) if state.eMarks[line] >= end), None)
    if last is None or any(0 <= state.sCount[line] < state.blkIndent for line in range(first, last + 1)):
        return False
    if not silent:
        state.push("math_block", "div", 0).content = state.getLines(first, last + 1, state.blkIndent, False).strip("\n")
        state.line = last + 1
    return True


def _call(state: StateInline, silent: bool) -> bool:
    match = _CALL.match(state.src, state.pos)
    if not match or match.end() > state.posMax:
        return False
    if not silent:
        state.push("call", "span", 0).meta = {"call": match[1], "result": match[2]}
    state.pos = match.end()
    return True


def _parser() -> MarkdownIt:
    parser = MarkdownIt("commonmark", {"html": False, "breaks": True, "maxNesting": MAX_DEPTH}).enable(["table", "strikethrough"]).disable("lheading")
    parser.inline.ruler.before("escape", "math", _inline_math)
    parser.inline.ruler.before("escape", "call", _call)
    parser.block.ruler.before("fence", "math_block", _block_math, {"alt": ["paragraph", "blockquote", "list"]})
    parser.validateLink = lambda url: bool(re.match(r"(https?://|mailto:)[^\s]", url, re.IGNORECASE))  # type: ignore[method-assign]
    return parser


_PARSER = _parser()


# -----------------------------------------------------------------------------
# From tokens to nodes


def _add(parent: list[Any], node: Node) -> None:
    """Appends; text to text, so that equal source makes equal nodes."""
    if isinstance(node, str) and parent and isinstance(parent[-1], str):
        parent[-1] += node
    elif node:
        parent.append(node)


@lru_cache(maxsize=256)  # the finished blocks of an answer that is still growing come again and again
def _highlighted(code: str, language: str) -> tuple[Node, ...]:
    nodes: list[Any] = []
    until = time.monotonic() + MAX_SECONDS
    for at, kind, text in get_lexer_by_name(language).get_tokens_unprocessed(code):
        if time.monotonic() > until:
            _add(nodes, code[at:])
            break
        name = next((name for ancestor, name in _CLASSES if kind in ancestor), "")
        if not name:
            _add(nodes, text)
        elif nodes and isinstance(nodes[-1], list) and nodes[-1][1]["class"] == name:
            nodes[-1][2] += text
        else:
            nodes.append(["span", {"class": name}, text])
    whole = "".join(node if isinstance(node, str) else node[2] for node in nodes) == code  # which lexers do not promise
    return tuple(nodes) if whole else (code,)


def _code(code: str, info: str) -> Node:
    label = (info.split() or [""])[0][:30]
    code = code.removesuffix("\n")
    known = label.lower() in LANGUAGES and len(code) <= MAX_CODE
    return ["figure", {"class": "code"}, ["figcaption", {}, ["span", {}, label or "code"], ["copy", {}]],
            ["pre", {}, ["code", {}, *(_highlighted(code, label.lower()) if known else [code] if code else [])]]]


def _leaf(token: Token) -> Node:
    match token.type:
        case "softbreak" | "hardbreak":
            return ["br", {}]
        case "hr":
            return ["hr", {}]
        case "code_inline":
            return ["code", {}, token.content]
        case "fence" | "code_block":
            return _code(token.content, token.info)
        case "math" | "math_block":
            return [token.tag, {"class": "math"}, token.content]
        case "image":
            url = str(token.attrs["src"])
            return ["a", {"href": url}, token.content or url]
        case "call":
            result = token.meta["result"]
            return ["span", {"class": "call", "title": "The model used its calculator"}, token.meta["call"],
                    *([] if result is None else ["\u00a0=\u00a0", ["b", {}, result]])]
        case _:
            return token.content


def _attributes(token: Token) -> dict[str, str]:
    if token.tag == "a":
        return {"href": str(token.attrs["href"])}
    if token.tag == "ol" and "start" in token.attrs:
        return {"start": str(token.attrs["start"])}
    side = str(token.attrs.get("style", "")).removeprefix("text-align:")
    return {"class": side} if side in ("right", "center") else {}


def _cells(text: str) -> int:
    """No less than there are in its tables: of each paragraph the lines times the columns of what may rule a table in it."""
    cells = lines = columns = 0
    for line in [*text.splitlines(), ""]:
        if line.strip():
            lines, columns = lines + 1, max(columns, line.count("|") if _RULER.issuperset(line) else 0)
        else:
            cells, lines, columns = cells + lines * columns, 0, 0
    return cells


def markdown_tree(text: str) -> list[Node] | None:
    """The blocks of a text; None if it is longer than MAX_TEXT, may have more than MAX_CELLS or is nested deeper than MAX_DEPTH, and better shown as it is."""
    if len(text) > MAX_TEXT or _cells(text) > MAX_CELLS:
        return None
    root: list[Any] = []
    stack = [root]
    for block in _PARSER.parse(text):
        for token in block.children or [] if block.type == "inline" else [block]:
            if token.hidden:
                continue  # the paragraph in an item of a tight list
            if token.nesting == -1:
                stack.pop()
                continue
            node: Node = [token.tag, _attributes(token)] if token.nesting == 1 else _leaf(token)
            if token.nesting == 1 and token.tag == "table":
                node = ["div", {"class": "table"}, node]
            _add(stack[-1], node)
            if token.nesting == 1:
                stack.append(node[2] if node[0] == "div" else node)  # type: ignore[arg-type]
            if max(len(stack), block.level + 2) >= MAX_DEPTH:
                return None  # the parser drops what is deeper
    return root

"""The report as a page of its own."""
import base64
import html
import re

from markdown_it import MarkdownIt

_STYLE = """
:root { color-scheme: light dark; --ink: #1c2430; --soft: #5d6875; --paper: #fff; --panel: #f4f6f8; --line: #dfe4ea; --accent: #2463c5; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #dde3ea; --soft: #93a0ad; --paper: #12161b; --panel: #1b2128; --line: #2f3843; --accent: #79aaf2; }
}
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 1.5rem clamp(1rem, 4vw, 3rem) 4rem; max-width: 68rem; background: var(--paper); color: var(--ink);
       font: 16px/1.55 system-ui, sans-serif; overflow-wrap: anywhere; }
h1 { font-size: 1.7rem; margin: .5rem 0; }
h2 { margin: 2.5rem 0 .8rem; padding-bottom: .3rem; border-bottom: 2px solid var(--line); font-size: 1.3rem; }
h3 { margin: 1.6rem 0 .5rem; font-size: 1rem; color: var(--accent); }
h1 + p, h2 + p { color: var(--soft); font-size: .9rem; }
table { display: block; overflow-x: auto; border-collapse: collapse; font-variant-numeric: tabular-nums; margin: .8rem 0; }
th, td { padding: .3rem 1rem .3rem 0; border-bottom: 1px solid var(--line); text-align: left; vertical-align: top; }
th { color: var(--soft); font-weight: 600; }
th:empty { display: none; }
td:first-child { white-space: nowrap; }
td[style*=right] { text-align: right; }
img { width: min(100%, 30.5rem); height: auto; vertical-align: bottom; }
ul { columns: 17rem; column-gap: 2rem; padding: 0; margin: .5rem 0; list-style: none; font-size: .92rem; }
li { break-inside: avoid; }
li > p { margin: 0; }
li:has(pre) { column-span: all; }
pre { background: var(--panel); border-radius: .4rem; padding: .6rem .9rem; margin: .5rem 0; white-space: pre-wrap; }
code { font: .87em/1.5 ui-monospace, monospace; }
hr { border: 0; }
"""


def embedded(png: bytes, label: str) -> str:
    return f"![{label}](data:image/png;base64,{base64.b64encode(png).decode()})"


def page(markdown: str) -> str:
    """A page that needs nothing else: HTML in the Markdown is shown as text, and the policy forbids to load or run anything."""
    body = MarkdownIt("commonmark", {"html": False}).enable("table").render(markdown)
    title = re.search(r"^# (.+)", markdown, re.MULTILINE)
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'; img-src data:">
<title>{html.escape(title[1] if title else 'report')}</title>
<style>{_STYLE}</style>
</head>
<body>
{body}</body>
</html>
"""

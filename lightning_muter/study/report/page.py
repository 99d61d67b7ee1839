"""Markdown to one HTML file with its pictures inside, for a screen, a phone and paper. Nothing is loaded from elsewhere."""

from __future__ import annotations

import base64
import html
import re
from pathlib import Path

from markdown_it import MarkdownIt

STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; max-width: 1100px; margin: 2em auto; padding: 0 1em; color: #222; background: #fff; }
h2 { border-top: 2px solid #0072B2; padding-top: .5em; margin-top: 2em; }
a { color: #00527f; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-size: 14px; font-variant-numeric: tabular-nums; margin: 1em 0; }
th, td { border-bottom: 1px solid #ddd; padding: 4px 9px; text-align: right; vertical-align: top; }
th:nth-child(-n+2), td:nth-child(-n+2) { text-align: left; }
table.figures td { text-align: left; }
table.figures th { text-align: left; }
code { overflow-wrap: anywhere; }
li, p { overflow-wrap: anywhere; }
li p { margin: 0; }
td code, td a, span { white-space: nowrap; }
img { max-width: 100%; }
.picture { overflow-x: auto; }
@media (max-width: 640px) {
  body { margin: 1em auto; }
  h1 { font-size: 1.6em; }
  h2 { font-size: 1.3em; }
  .picture img { max-width: none; width: 620px; }
  table.figures, table.figures tbody, table.figures tr, table.figures td { display: block; width: auto; }
  table.figures thead { display: none; }
  table.figures tr { border-bottom: 1px solid #bbb; padding: .5em 0; }
  table.figures td { border: 0; padding: 1px 0; }
  table.rows, table.rows tbody, table.rows tr { display: block; }
  table.rows thead { display: none; }
  table.rows tr { border-bottom: 1px solid #bbb; padding: .5em 0; }
  table.rows td { display: flex; justify-content: space-between; gap: 1em; border: 0; padding: 1px 0; text-align: right !important; }
  table.rows td::before { content: attr(data-label); color: #555; text-align: left; }
  table.rows td:empty { display: none; }
  table.rows td code, table.rows td a { white-space: normal; overflow-wrap: anywhere; }
}
@media print {
  body { font-size: 10pt; max-width: none; margin: 0; }
  table { font-size: 7.5pt; }
  th, td { padding: 2px 4px; }
  .wide { overflow: visible; }
  tr, img { break-inside: avoid; }
  img { max-height: 7.5cm; }
  h2, h3 { break-after: avoid; }
}
"""

_NUMBER = re.compile(r"\b\d[\d.]*e[+-]\d+")


def _labelled(table: str) -> str:
    """A table whose cells know their column: on a phone each row is a list of named cells, so that nothing scrolls sideways."""
    headers = [re.sub(r"<[^>]+>", "", h) for h in re.findall(r"<th(?: [^>]*)?>(.*?)</th>", table, re.DOTALL)]

    def row(match: re.Match[str]) -> str:
        labels = iter(headers)
        return re.sub(
            r"<td(?=[ >])", lambda _: f'<td data-label="{html.escape(html.unescape(next(labels)))}"', match.group()
        )

    return f'<table class="rows">\n{re.sub(r"<tr>.*?</tr>", row, table, flags=re.DOTALL)}</table>'


def to_html(markdown: str, folder: Path) -> str:
    """The Markdown report as one HTML file with its pictures (in ``folder``) inside."""
    body = MarkdownIt("commonmark", {"html": False}).enable("table").render(markdown)
    body = re.sub(r">[^<]+<", lambda text: _NUMBER.sub(r"<span>\g<0></span>", text.group()), body)

    def inline(match: re.Match[str]) -> str:
        picture = folder / html.unescape(match.group(1))
        data = base64.b64encode(picture.read_bytes()).decode()
        return f'src="data:image/png;base64,{data}"'

    body = re.sub(r'src="([^":]+\.png)"', inline, body)
    body = re.sub(r"<p>(<img [^>]*>)</p>", r'<p class="picture">\1</p>', body)
    body = body.replace(
        "<table>\n<thead>\n<tr>\n<th>figure</th>", '<table class="figures">\n<thead>\n<tr>\n<th>figure</th>'
    )
    body = re.sub(r"<table>\n(.*?)</table>", lambda table: _labelled(table.group(1)), body, flags=re.DOTALL)
    body = body.replace("<table", '<div class="wide"><table').replace("</table>", "</table></div>")
    title = html.escape(markdown.splitlines()[0].lstrip("# "))
    screen = '<meta name="viewport" content="width=device-width, initial-scale=1">'
    head = f'<meta charset="utf-8">{screen}<title>{title}</title><style>{STYLE}</style>'
    return f"<!doctype html>\n<html lang='en'><head>{head}</head><body>\n{body}</body></html>\n"

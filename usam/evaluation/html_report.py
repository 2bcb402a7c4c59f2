"""Blocks of a web page that needs nothing but itself: pictures inside, no script, no network.

`usam.case_report` builds the page of an evaluation from them.
"""

from __future__ import annotations

from base64 import b64encode
from collections.abc import Iterable, Mapping, Sequence
from html import escape

STYLE = """
:root { color-scheme: light; }
body { font: 15px/1.5 system-ui, "Segoe UI", "DejaVu Sans", sans-serif; color: #1c2733;
  max-width: 1180px; margin: 0 auto; padding: 24px 20px 60px; background: #fff; }
h1 { font-size: 26px; margin: 0 0 4px; }
h2 { font-size: 19px; margin: 38px 0 10px; padding-bottom: 4px; border-bottom: 1px solid #d5dce3; }
h3 { font-size: 15px; margin: 22px 0 6px; }
p, li { max-width: 78ch; }
.wide { overflow: auto; max-height: 620px; border: 1px solid #d5dce3; border-radius: 6px;
  width: fit-content; max-width: 100%; }
table { border-collapse: collapse; font-size: 13px; font-variant-numeric: tabular-nums; }
th, td { padding: 4px 7px; text-align: right; white-space: nowrap;
  border-bottom: 1px solid #e6ebf0; }
th { background: #f2f5f8; font-weight: 600; position: sticky; top: 0; white-space: normal;
  vertical-align: bottom; }
th:first-child, td:first-child { text-align: left; white-space: normal; min-width: 9em; }
tr:last-child td { border-bottom: 0; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: 2px 18px; margin: 12px 0; }
dt { color: #5a6a7a; } dd { margin: 0; overflow-wrap: anywhere; }
figure { margin: 14px 0 22px; } img { max-width: 100%; height: auto; display: block; }
figcaption { color: #5a6a7a; font-size: 13px; }
@media print { .wide { overflow: visible; max-height: none; } th { position: static; } }
"""


def page(title: str, subtitle: str, sections: Iterable[str]) -> str:
    """The whole page, of what the other functions of this file give."""
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title>\n<style>{STYLE}</style>\n</head>\n<body>\n"
        f"<h1>{escape(title)}</h1>\n<p>{escape(subtitle)}</p>\n"
        + "\n".join(sections)
        + "\n</body>\n</html>\n"
    )


def section(title: str, *blocks: str) -> str:
    """Blocks below a heading."""
    return "\n".join(["<section>", f"<h2>{escape(title)}</h2>", *blocks, "</section>"])


def heading(text: str) -> str:
    """A small heading within a section."""
    return f"<h3>{escape(text)}</h3>"


def paragraph(text: str) -> str:
    """One paragraph of plain text."""
    return f"<p>{escape(text)}</p>"


def items(texts: Iterable[str]) -> str:
    """A list of plain texts."""
    return "<ul>" + "".join(f"<li>{escape(text)}</li>" for text in texts) + "</ul>"


def facts(values: Mapping[str, object]) -> str:
    """Names and what they are, one a line."""
    rows = "".join(
        f"<dt>{escape(name)}</dt><dd>{escape(str(value))}</dd>" for name, value in values.items()
    )
    return f"<dl>{rows}</dl>"


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table; it scrolls by itself where it is too large for the page."""
    first = "".join(f'<th scope="col">{escape(cell)}</th>' for cell in head)
    body = "".join(
        "<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>\n" for row in rows
    )
    return (
        f'<div class="wide"><table><thead><tr>{first}</tr></thead>\n'
        f"<tbody>{body}</tbody></table></div>"
    )


def picture(png: bytes, caption: str) -> str:
    """A PNG with a line below it."""
    return (
        f'<figure><img alt="{escape(caption)}" src="{data_uri(png, "image/png")}">'
        f"<figcaption>{escape(caption)}</figcaption></figure>"
    )


def download(name: str, content: bytes, kind: str) -> str:
    """A link that saves `content` as a file, e.g. of the kind text/csv."""
    return (
        f'<p><a download="{escape(name)}" href="{data_uri(content, kind)}">{escape(name)}</a></p>'
    )


def data_uri(content: bytes, kind: str) -> str:
    """The content itself as an address."""
    return f"data:{kind};base64,{b64encode(content).decode()}"

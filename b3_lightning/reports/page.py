"""The frame of a page that needs nothing but itself: style and script inside, no network, all words escaped."""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Mapping, Sequence
from functools import cache
from html import escape
from importlib import resources
from typing import Any


@cache
def asset(name: str) -> str:
    """A style sheet or script that ships beside this module."""
    return resources.files(__package__ or "b3_lightning.reports").joinpath(name).read_text(encoding="utf-8")


def page(title: str, body: str, *, script: str = "", data: Any = None) -> str:
    """A whole HTML document.

    Its content security policy admits this one script and pictures inside the page: nothing is fetched, and no script
    that a text of the data might smuggle in would run.

    Args:
        body: HTML, its words escaped already.
        script: JavaScript.
        data: what the script reads from the element ``data``, as JSON.
    """
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    policy = f"default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'sha256-{digest}'"
    scripts = ""
    if script:
        scripts = f'<script type="application/json" id="data">{embed(data)}</script>\n<script>{script}</script>\n'
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<meta name="color-scheme" content="light dark">\n'
        f"<title>{escape(title)}</title>\n<style>{asset('page.css')}</style>\n</head>\n"
        f"<body>\n<main>\n{body}\n</main>\n{scripts}</body>\n</html>\n"
    )


def embed(data: Any) -> str:
    """JSON that cannot end the script element it stands in."""
    text = json.dumps(data, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    return text.replace("&", "\\u0026").replace("<", "\\u003c").replace(">", "\\u003e")


def table(head: Sequence[str], rows: Sequence[Sequence[str]], *, label: str) -> str:
    """A table that scrolls sideways where it is too wide; cells are escaped here, columns of numbers stand right."""
    is_number = [_are_numbers(column) for column in zip(*rows, strict=True)] or [False] * len(head)
    first = "".join(
        f'<th scope="col"{" class=number" if number else ""}>{escape(name)}</th>'
        for name, number in zip(head, is_number, strict=True)
    )
    body = "".join(
        f"<tr>{''.join(_cell(cell, number) for cell, number in zip(row, is_number, strict=True))}</tr>" for row in rows
    )
    return (
        f'<div class="scroll" tabindex="0" role="region" aria-label="{escape(label)}"><table>'
        f"<thead><tr>{first}</tr></thead><tbody>{body}</tbody></table></div>"
    )


def tiles(values: Mapping[str, tuple[str, str]]) -> str:
    """Large figures: name -> (figure, what it says)."""
    parts = [
        f"<div><dt>{escape(name)}</dt><dd>{escape(figure)}<small>{escape(note)}</small></dd></div>"
        for name, (figure, note) in values.items()
    ]
    return f'<dl class="tiles">{"".join(parts)}</dl>'


def section(title: str, content: str, intro: str = "") -> str:
    """A headed part of the page; nothing where there is no content."""
    lead = f'<p class="intro">{escape(intro)}</p>' if intro else ""
    return f"<section><h2>{escape(title)}</h2>{lead}{content}</section>" if content else ""


def _are_numbers(column: Sequence[str]) -> bool:
    filled = [cell for cell in column if cell]
    return bool(filled) and all(cell[0].isdigit() or cell[0] in "-+<" for cell in filled)


def _cell(cell: str, is_number: bool) -> str:
    kind = " class=number" if is_number else " class=long" if len(cell) > 60 else ""
    return f"<td{kind}>{escape(cell)}</td>"

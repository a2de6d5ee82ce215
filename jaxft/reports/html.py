"""A report as one HTML file that loads nothing; all text is escaped."""

from __future__ import annotations

import base64
import html
from collections.abc import Sequence
from pathlib import Path

from jaxft.reports.document import (
    Block,
    Bullets,
    Code,
    Columns,
    Details,
    Flag,
    Gallery,
    Heading,
    Image,
    Inline,
    Part,
    Quote,
    Strong,
    Table,
    Text,
    Verdict,
    one_line,
    parts,
    plain,
    state_of,
    visible,
)

CSP = "default-src 'none'; img-src data:; style-src 'unsafe-inline'; base-uri 'none'; form-action 'none'"


def page(title: str, blocks: Sequence[Block]) -> str:
    """The document as one HTML file that loads nothing: inline CSS, images as data URIs."""
    style = Path(__file__).with_name("page.css").read_text(encoding="utf-8")
    return (
        f'<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{CSP}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f'<meta name="color-scheme" content="light dark">\n<title>{_escape(one_line(title))}</title>\n'
        f"<style>\n{style}</style>\n</head>\n<body>\n<main>\n"
        + "\n".join(map(_html, blocks))
        + "\n</main>\n</body>\n</html>\n"
    )


def _html(block: Block) -> str:
    match block:
        case Heading():
            return f"<h{block.level}>{_ht(block.text)}</h{block.level}>"
        case Text():
            return f"<p>{_ht(block.text)}</p>"
        case Bullets():
            return "<ul>" + "".join(f"<li>{_ht(item)}</li>" for item in block.items) + "</ul>"
        case Verdict():
            return f'<div class="verdict">{_html(Bullets(block.claims))}{_html_flags(block.flags)}</div>'
        case Details():
            inside = "\n".join(map(_html, block.blocks))
            return f"<details><summary>{_ht(block.summary)}</summary>\n{inside}</details>"
        case Table():
            return _html_table(block)
        case Quote():
            text = _escape(visible(block.text))
            return f"<figure><figcaption>{_ht(block.label)}</figcaption><pre>{text}</pre></figure>"
        case Columns():
            return '<div class="columns">' + "".join(map(_html, block.quotes)) + "</div>"
        case Gallery():
            return '<div class="columns">' + "".join(map(_html_image, block.images)) + "</div>"


def _html_flags(flags: Sequence[Flag]) -> str:
    kinds = {True: "raised", False: "clear", None: "unknown"}
    items = (
        f'<li class="{kinds[flag.raised]}"><strong>{_escape(flag.name)}: {state_of(flag)}.</strong> {_ht(flag.words)}</li>'
        for flag in flags
    )
    return f'<ul class="flags">{"".join(items)}</ul>' if flags else ""


def _html_table(table: Table) -> str:
    def kind(column: int) -> str:
        return ' class="words"' if table.figures and table.wordy(column) else ""

    head = "".join(f'<th scope="col"{kind(i) if i else ""}>{_ht(cell)}</th>' for i, cell in enumerate(table.header))
    rows = "".join(
        f'<tr><th scope="row">{_ht(row[0])}</th>'
        + "".join(f"<td{kind(i)}>{_ht(cell)}</td>" for i, cell in enumerate(row[1:], 1))
        + "</tr>\n"
        for row in table.rows
    )
    style = "figures" if table.figures else "facts"
    head = f"<thead><tr>{head}</tr></thead>\n" if any(map(plain, table.header)) else ""
    return f'<div class="scroll" tabindex="0"><table class="{style}">\n{head}<tbody>\n{rows}</tbody></table></div>'


def _html_image(image: Image) -> str:
    return (
        f'<picture><source media="(prefers-color-scheme: dark)" srcset="{_data_uri(image.dark)}">'
        f'<img src="{_data_uri(image.light)}" alt="{_escape(image.alt)}" width="936" height="576"></picture>'
    )


def _data_uri(png: bytes) -> str:
    return "data:image/png;base64," + base64.b64encode(png).decode()


def _ht(text: Inline) -> str:
    return "".join(map(_ht_part, parts(text)))


def _ht_part(part: Part) -> str:
    match part:
        case Code():
            return f"<code>{_escape(one_line(part.text))}</code>"
        case Strong():
            return f"<strong>{_escape(visible(part.text))}</strong>"
        case _:
            return _escape(visible(part))


def _escape(text: str) -> str:
    return html.escape(text, quote=True)

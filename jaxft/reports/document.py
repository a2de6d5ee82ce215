"""A report as blocks, and the blocks as Markdown, as one HTML file, and as plain text.

Text may come from anywhere, so each renderer makes it harmless in its own way: HTML escapes everything; Markdown puts
`Quote`s in fences and `Code` in spans longer than any backticks inside, and escapes the rest.
"""

from __future__ import annotations

import base64
import html
import re
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

JOINERS = "\u200c\u200d"  # format characters that Persian, Indic scripts and emoji need


@dataclass(frozen=True)
class Code:
    """A name or a value, set in fixed width."""

    text: str


@dataclass(frozen=True)
class Strong:
    """Words that carry the paragraph."""

    text: str


Part = str | Code | Strong
Inline = Part | Sequence[Part]


@dataclass(frozen=True)
class Heading:
    """A title; level 1 is the page's."""

    level: int
    text: Inline


@dataclass(frozen=True)
class Text:
    """A paragraph; in HTML a box where `boxed`."""

    text: Inline
    boxed: bool = False


@dataclass(frozen=True)
class Bullets:
    """A list."""

    items: Sequence[Inline]


@dataclass(frozen=True)
class Table:
    """Rows under a header; the first column names the row. `figures` aligns the others to the right."""

    header: Sequence[Inline]
    rows: Sequence[Sequence[Inline]]
    figures: bool = True


@dataclass(frozen=True)
class Quote:
    """Text from data, shown as it is, under a label of ours."""

    label: str
    text: str


@dataclass(frozen=True)
class Columns:
    """Quotes side by side where the page is wide enough."""

    quotes: Sequence[Quote]


@dataclass(frozen=True)
class Image:
    """A PNG for light and one for dark paper; Markdown shows the file at `path`."""

    path: str
    alt: str
    light: bytes
    dark: bytes


@dataclass(frozen=True)
class Gallery:
    """Images side by side where the page is wide enough."""

    images: Sequence[Image]


Block = Heading | Text | Bullets | Table | Quote | Columns | Gallery


def visible(text: str) -> str:
    """`text` with control, direction-changing and unpaired surrogate characters spelled out (`\\x1b`)."""
    text = text.replace("\r\n", "\n")
    return "".join(c if c in "\n\t" or c in JOINERS or not _hidden(c) else ascii(c)[1:-1] for c in text)


def _hidden(character: str) -> bool:
    return unicodedata.category(character) in ("Cc", "Cf", "Cs", "Zl", "Zp")


def _parts(text: Inline) -> list[Part]:
    return [text] if isinstance(text, (str, Code, Strong)) else list(text)


def _line(text: str) -> str:
    return " ".join(visible(text).split())


def plain(text: Inline) -> str:
    """A paragraph for a terminal, without markup."""
    return visible("".join(part if isinstance(part, str) else part.text for part in _parts(text)))


def markdown(blocks: Sequence[Block]) -> str:
    """The document as GitHub-flavoured Markdown."""
    return "\n\n".join(_markdown(block) for block in blocks) + "\n"


def _markdown(block: Block) -> str:
    match block:
        case Heading():
            return f"{'#' * block.level} {_md(block.text)}"
        case Text():
            return f"> {_md(block.text)}" if block.boxed else _md(block.text)
        case Bullets():
            return "\n".join(f"- {_md(item)}" for item in block.items)
        case Table():
            rule = ["---"] + ["---:" if block.figures else "---"] * (len(block.header) - 1)
            rows = [[_md(cell) for cell in row] for row in (block.header, *block.rows)]
            return "\n".join("| " + " | ".join(cells) + " |" for cells in (rows[0], rule, *rows[1:]))
        case Quote():
            return f"{_md(block.label)}\n\n{fenced(block.text)}"
        case Columns():
            return "\n\n".join(map(_markdown, block.quotes))
        case Gallery():
            return "\n\n".join(f"![{_md(image.alt)}]({image.path})" for image in block.images)


def fenced(text: str) -> str:
    """A code block whose fence is longer than any run of backticks inside."""
    text = visible(text)
    fence = "`" * max(3, 1 + _longest_run(text))
    return f"{fence}text\n{text}\n{fence}"


def _longest_run(text: str) -> int:
    return max(map(len, re.findall("`+", text)), default=0)


def _md(text: Inline) -> str:
    return "".join(map(_md_part, _parts(text)))


def _md_part(part: Part) -> str:
    match part:
        case Code():
            text = _line(part.text).replace("|", "\\|")
            ticks = "`" * (1 + _longest_run(text))
            pad = " " if not text or text[0] == "`" or text[-1] == "`" else ""
            return f"{ticks}{pad}{text}{pad}{ticks}"
        case Strong():
            return f"**{_md_part(part.text)}**"
        case _:
            text = re.sub(r"([\\`*\[\]<>|&#~$])|(?<!\w)(_)|(_)(?!\w)", r"\\\g<0>", visible(part))
            return text.replace("\n", " ")


CSP = "default-src 'none'; img-src data:; style-src 'unsafe-inline'; base-uri 'none'; form-action 'none'"


def page(title: str, blocks: Sequence[Block]) -> str:
    """The document as one HTML file that loads nothing: inline CSS, images as data URIs."""
    style = Path(__file__).with_name("page.css").read_text(encoding="utf-8")
    return (
        f'<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{CSP}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f'<meta name="color-scheme" content="light dark">\n<title>{_escape(_line(title))}</title>\n'
        f"<style>\n{style}</style>\n</head>\n<body>\n<main>\n"
        + "\n".join(map(_html, blocks))
        + "\n</main>\n</body>\n</html>\n"
    )


def _html(block: Block) -> str:
    match block:
        case Heading():
            return f"<h{block.level}>{_ht(block.text)}</h{block.level}>"
        case Text():
            kind = ' class="verdict"' if block.boxed else ""
            return f"<p{kind}>{_ht(block.text)}</p>"
        case Bullets():
            return "<ul>" + "".join(f"<li>{_ht(item)}</li>" for item in block.items) + "</ul>"
        case Table():
            return _html_table(block)
        case Quote():
            text = _escape(visible(block.text))
            return f"<figure><figcaption>{_ht(block.label)}</figcaption><pre>{text}</pre></figure>"
        case Columns():
            return '<div class="columns">' + "".join(map(_html, block.quotes)) + "</div>"
        case Gallery():
            return '<div class="columns">' + "".join(map(_html_image, block.images)) + "</div>"


def _html_table(table: Table) -> str:
    head = "".join(f'<th scope="col">{_ht(cell)}</th>' for cell in table.header)
    rows = "".join(
        f'<tr><th scope="row">{_ht(row[0])}</th>' + "".join(f"<td>{_ht(cell)}</td>" for cell in row[1:]) + "</tr>\n"
        for row in table.rows
    )
    kind = "figures" if table.figures else "facts"
    head = f"<thead><tr>{head}</tr></thead>\n" if any(map(plain, table.header)) else ""
    return f'<div class="scroll"><table class="{kind}">\n{head}<tbody>\n{rows}</tbody></table></div>'


def _html_image(image: Image) -> str:
    return (
        f'<picture><source media="(prefers-color-scheme: dark)" srcset="{_data_uri(image.dark)}">'
        f'<img src="{_data_uri(image.light)}" alt="{_escape(image.alt)}" width="936" height="576"></picture>'
    )


def _data_uri(png: bytes) -> str:
    return "data:image/png;base64," + base64.b64encode(png).decode()


def _ht(text: Inline) -> str:
    return "".join(map(_ht_part, _parts(text)))


def _ht_part(part: Part) -> str:
    match part:
        case Code():
            return f"<code>{_escape(_line(part.text))}</code>"
        case Strong():
            return f"<strong>{_escape(visible(part.text))}</strong>"
        case _:
            return _escape(visible(part))


def _escape(text: str) -> str:
    return html.escape(text, quote=True)
